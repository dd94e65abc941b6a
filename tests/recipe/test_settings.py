"""Which settings of a recipe its numbers depend on, and which states are of another."""

from pathlib import Path

import pytest

from bilevel import recipe as recipes
from bilevel.cli.names import shipped
from bilevel.errors import RecipeError
from bilevel.recipe.settings import (
    added_since,
    differences,
    digest,
    refuse_other,
    settings,
    settings_of_run,
)
from bilevel.recipe.yaml_source import parse


def of(*overrides: str) -> dict[str, str]:
    return settings(recipes.load(shipped()["quadratic"], overrides).content)


def test_settings_are_flat_texts():
    assert (
        of().items()
        >= {"seed": "0", "problem.name": '"quadratic"', "upper.optimizer.lr": "0.1"}.items()
    )


WITHOUT_PART = ["evaluate.every=7", "checkpoint.keep=5", "sinks=[]", "name=a", "report=false"]


@pytest.mark.parametrize("override", ["upper.steps=3", *WITHOUT_PART])
def test_what_the_numbers_do_not_depend_on_is_not_compared(override):
    refuse_other(of(), of(override), Path("step"))


@pytest.mark.parametrize("override", WITHOUT_PART)
def test_what_the_numbers_do_not_depend_on_is_not_hashed(override):
    recipe = recipes.load(shipped()["quadratic"], [override])
    assert recipe.hash == recipes.load(shipped()["quadratic"]).hash


@pytest.mark.parametrize("override", ["upper.steps=3", "seed=3", "lower.steps=21"])
def test_what_the_numbers_depend_on_is_hashed(override):
    recipe = recipes.load(shipped()["quadratic"], [override])
    assert recipe.hash != recipes.load(shipped()["quadratic"]).hash


def test_an_option_that_is_newer_than_a_run_is_at_its_default():
    content = recipes.load(shipped()["quadratic"]).content
    recipe = recipes.loads(recipes.load(shipped()["quadratic"]).dump())
    older = recipe.dump().replace("  damping: 0.0\n", "")
    assert older != recipe.dump()
    added = added_since(content, parse(older, "resolved.yaml").data)
    assert added == {"estimator.damping"}
    here = settings_of_run(content)
    then = {key: value for key, value in here.items() if key not in added}
    assert differences(then, here, added) == ""
    assert differences(then, here) == "estimator.damping is not set there and 0.0 here"
    # one that was dropped from the file, though the run had it, is compared
    had = then | {"estimator.damping": "0.5"}
    assert differences(had, here, added) == "estimator.damping is 0.5 there and 0.0 here"
    assert digest(content) == recipe.hash


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed=3", "seed is 0 there and 3 here"),
        ("lower.steps=21", "lower.steps is 20 there and 21 here"),
        ("estimator=unroll", 'estimator.name is "implicit" there and'),
        ("runtime.dtype=float32", 'runtime.dtype is "float64" there and "float32" here'),
        ("upper.optimizer=sgd", r"upper\.optimizer\.name is"),
    ],
)
def test_what_differs_is_said(override, said):
    with pytest.raises(RecipeError, match=said):
        refuse_other(of(), of(override), Path("step"))


def test_many_differences_are_cut_and_counted():
    with pytest.raises(RecipeError, match=r"a is 0 there and not set here.*; and 2 more"):
        refuse_other(dict.fromkeys("abcdefg", "0"), {}, Path("step"))


def test_settings_that_are_not_known_are_not_compared():
    refuse_other(None, of(), Path("step"))


def test_a_file_enters_with_what_is_written_in_it(tmp_path):
    source = "from bilevel_problems.quadratic import Quadratic as Mine\n"
    (tmp_path / "mine.py").write_text(source)
    (tmp_path / "r.yaml").write_text("problem: mine.py:Mine\n")
    first = settings(recipes.load(tmp_path / "r.yaml").content)
    (tmp_path / "mine.py").write_text(f"{source}# changed\n")
    second = settings(recipes.load(tmp_path / "r.yaml").content)
    with pytest.raises(RecipeError, match=r"problem\.name is .*mine\.py:Mine:"):
        refuse_other(first, second, Path("step"))
