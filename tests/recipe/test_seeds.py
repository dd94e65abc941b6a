"""`seeds` in a recipe: how they are written, and what an ensemble is made of."""

import pytest

from bilevel import recipe as recipes
from bilevel.cli.names import shipped
from bilevel.errors import RecipeError
from bilevel.recipe.seeds import parse_seeds

QUADRATIC = shipped()["quadratic"]
TEXT = "problem: quadratic\n"


def load(*overrides: str):
    return recipes.load(QUADRATIC, overrides)


@pytest.mark.parametrize(
    ("written", "seeds"),
    [
        ("0..3", (0, 1, 2, 3)),
        ("7", (7,)),
        ("2,0..1,2", (2, 0, 1)),
        ("[4, 1]", (4, 1)),
        ("[0..1, 5]", (0, 1, 5)),
    ],
)
def test_seeds_as_they_are_written(written, seeds):
    recipe = recipes.loads(f"{TEXT}seeds: {written}\n")
    assert recipe.is_ensemble
    assert (recipe.seeds, recipe.seed) == (seeds, seeds[0])
    assert load(f"seeds={written}").seeds == seeds
    assert recipes.loads(recipe.dump()) == recipe


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("4..0", "the smaller end first"),
        ("x", "must be like"),
        ("-1", "must be like"),
        ("0..1000", "more than 1,000"),
        ("[]", "or a list of these"),
        ("[1, true]", "or a list of these"),
        ("[[1]]", "or a list of these"),
        ("null", "or a list of these"),
        ("{a: 1}", "or a list of these"),
        ("1.5", "or a list of these"),
    ],
)
def test_seeds_that_are_none_are_refused(written, said):
    with pytest.raises(RecipeError, match=f"seeds=.*{said}"):
        load(f"seeds={written}")
    with pytest.raises(RecipeError, match=f"recipe:2: seeds = .*{said}"):
        recipes.loads(f"{TEXT}seeds: {written}\n")


def test_a_seed_and_seeds_together_are_refused():
    with pytest.raises(RecipeError, match="recipe:3: seeds: `seed` and `seeds` are both given"):
        recipes.loads(f"{TEXT}seed: 0\nseeds: 0..1\n")
    with pytest.raises(RecipeError, match="both given"):
        load("seed=1", "seeds=0..1")


def test_an_override_of_one_takes_the_place_of_the_other():
    assert "seed: 0" in QUADRATIC.read_text()
    assert "seed" not in load("seeds=0..1").content
    ensemble = f"{TEXT}seeds: 0..4\n"
    assert recipes.loads(ensemble, ["seed=3"]).content["seed"] == 3
    assert not recipes.loads(ensemble, ["seed=3"]).is_ensemble


def test_the_recipe_of_one_seed_is_that_of_a_run_with_it():
    ensemble, run = load("seeds=2..4"), load("seed=3")
    assert ensemble.at(3) == run
    assert list(ensemble.at(3).content) == list(run.content)
    assert ensemble.at(3).hash == run.hash
    assert run.at(5).hash == load("seed=5").hash
    hashes = {load(f"seeds={seeds}").hash for seeds in ("2..4", "2..3", "3", "4,3,2")}
    assert len({*hashes, run.hash}) == 5
    assert load("seeds=2..4").hash == load("seeds=[2,3,4]").hash


def test_seeds_of_the_command_line():
    assert parse_seeds("5, 1..2,2") == (5, 1, 2)
    with pytest.raises(RecipeError, match="--seeds 'a': must be like"):
        parse_seeds("a")
