"""Presets: names of the literature for a component with options."""

import json

import pytest

from bilevel import recipe, registry
from bilevel.cli.schema import recipe_schema
from bilevel.errors import RecipeError, RequirementError
from bilevel.estimators.one_step import OneStep
from bilevel.registry import presets
from bilevel.registry.build import build

ALL = [(group, preset) for group in registry.groups() for preset in presets.of(group).values()]


@pytest.mark.parametrize(("group", "preset"), ALL, ids=[f"{g}/{p.name}" for g, p in ALL])
def test_each_builds_what_its_specification_says(group, preset):
    try:
        direct = build(group, dict(preset.spec))
    except RequirementError as error:
        pytest.skip(str(error))
    assert build(group, preset.name) == direct
    assert preset.about.strip()
    assert preset.name not in registry.names(group), "a component has this name"


def test_options_beside_the_name_go_over_those_of_the_preset():
    assert build("estimators", "darts") == OneStep(finite_difference=True)
    changed = build("estimators", {"name": "darts", "lr": 0.5})
    assert changed == OneStep(finite_difference=True, lr=0.5)
    off = build("estimators", {"name": "darts", "finite_difference": False})
    assert off == OneStep()
    solver = build("estimators", {"name": "jfb", "solver": {"scale": 0.3}}).solver
    assert type(solver).__name__ == "Identity"
    assert solver.scale == 0.3


def test_a_recipe_keeps_the_component_it_stands_for():
    text = "problem: quadratic\nestimator: {name: darts, lr: 0.5}\n"
    made = recipe.loads(text, title="r")
    assert made.content["estimator"]["name"] == "one_step"
    assert made.content["estimator"]["finite_difference"] is True
    assert recipe.loads(made.dump(), title="r").hash == made.hash


def test_a_wrong_option_is_named_with_its_line():
    with pytest.raises(RecipeError, match=r"r:2.*estimator\.lrr"):
        recipe.loads("problem: quadratic\nestimator: {name: darts, lrr: 0.5}\n", title="r")


def test_a_misspelt_preset_has_its_neighbours_named():
    with pytest.raises(RecipeError, match="darts"):
        build("estimators", "drats")


def test_the_schema_knows_them():
    options = json.loads(recipe_schema())["$defs"]["estimators"]["anyOf"]
    assert "darts" in options[0]["enum"]
    (own,) = [o for o in options if o.get("properties", {}).get("name", {}).get("const") == "darts"]
    assert "finite_difference" in own["properties"]
