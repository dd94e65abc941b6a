"""Where files are looked up: beside the recipe that names them, or in the current folder."""

from pathlib import Path

import pytest

from bilevel import recipe as recipes
from bilevel import registry
from bilevel.errors import RecipeError, RequirementError

SINK = "class Mine:\n    where = {where!r}\n    def open(self, folder, step): ...\n"


@pytest.fixture
def places(tmp_path: Path, monkeypatch) -> tuple[Path, Path]:
    """A recipe's folder and the current one, each with a sink.py of its own."""
    there, here = tmp_path / "recipes", tmp_path / "current"
    for place in (there, here):
        place.mkdir()
        (place / "sink.py").write_text(SINK.format(where=place.name))
    (there / "r.yaml").write_text("problem: quadratic\nsinks: ['sink.py:Mine']\n")
    monkeypatch.chdir(here)
    return there, here


def test_a_file_is_relative_to_what_names_it(places):
    there, here = places
    recipe = recipes.load(there / "r.yaml")
    assert vars(type(recipe.sinks[0]))["where"] == "recipes"
    for override in ("sinks=['sink.py:Mine']", "sinks.0=sink.py:Mine"):
        overridden = recipes.load(there / "r.yaml", [override])
        assert vars(type(overridden.sinks[0]))["where"] == "current"
        assert overridden.content["sinks"][0]["name"] == f"{here.resolve()}/sink.py:Mine"
    beside = recipes.load(there / "r.yaml", ["sinks.0.name=sink.py:Mine"])
    assert vars(type(beside.sinks[0]))["where"] == "current"
    other = recipes.load(there / "r.yaml", ["seed=3"])  # an override elsewhere changes no place
    assert vars(type(other.sinks[0]))["where"] == "recipes"


def test_one_that_lies_beside_the_recipe_is_pointed_to(places):
    there, here = places
    (here / "sink.py").unlink()
    with pytest.raises(RecipeError, match=rf"no file sink.py.*there is {there}/sink.py"):
        recipes.load(there / "r.yaml", ["sinks=['sink.py:Mine']"])
    (there / "sink.py").unlink()
    with pytest.raises(RecipeError) as told:
        recipes.load(there / "r.yaml", ["sinks=['sink.py:Mine']"])
    assert "there is /" not in str(told.value)


def test_a_module_beside_a_file_is_imported(tmp_path: Path):
    (tmp_path / "helper_beside.py").write_text("VALUE = 7\n")
    (tmp_path / "uses.py").write_text("from helper_beside import VALUE\nclass A: value = VALUE\n")
    assert registry.find("problems", "uses.py:A", tmp_path).value == 7
    (tmp_path / "lacks.py").write_text("import helper_elsewhere\nclass A: ...\n")
    with pytest.raises(RequirementError, match=r"put helper_elsewhere\.py beside"):
        registry.find("problems", "lacks.py:A", tmp_path)


def test_what_is_installed_is_not_shadowed(tmp_path: Path):
    (tmp_path / "tomllib.py").write_text("raise SystemExit\n")
    (tmp_path / "plain.py").write_text("import tomllib\nclass A: has = tomllib.loads\n")
    assert registry.find("problems", "plain.py:A", tmp_path).has("a = 1") == {"a": 1}


def test_a_second_module_of_the_same_name_is_refused_not_mistaken(tmp_path: Path):
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "helper_twice.py").write_text(f"VALUE = {number}\n")
        (folder / "uses.py").write_text(
            "import helper_twice\nclass A: value = helper_twice.VALUE\n"
        )
    assert registry.find("problems", "1/uses.py:A", tmp_path).value == 1
    with pytest.raises(RecipeError, match="'helper_twice' beside it is already loaded from"):
        registry.find("problems", "2/uses.py:A", tmp_path)
