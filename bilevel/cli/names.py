"""Recipes and components by name, for commands and for completion; imports no torch."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path

from bilevel import registry
from bilevel.errors import RecipeError

SUFFIXES = (".yaml", ".yml")
STUDIES = "studies"
"""Folder of studies beside the recipes."""
SCHEMA_KEY = "# yaml-language-server: $schema="
"""Begins the comment by which editors find the schema of a recipe, and complete its keys."""

SENTENCE_END = re.compile(r"(?<=[.!?]) +(?=[A-Z])")


def shipped() -> dict[str, Path]:
    """The recipes that are installed with the package, by name."""
    return {path.stem: path for path in _files() if path.parent.name != STUDIES}


def shipped_studies() -> dict[str, Path]:
    """The studies that are installed with the package, by name."""
    return {path.stem: path for path in _files() if path.parent.name == STUDIES}


def _files() -> list[Path]:
    return [path for folder in _folders() for path in sorted(Path(folder).rglob("*.yaml"))]


def schema_path() -> Path:
    """The JSON schema of recipes that is installed beside them."""
    return Path(*_folders()[:1]) / "recipe.schema.json"


def _folders() -> list[str]:
    """Where the shipped recipes lie."""
    spec = find_spec("bilevel_recipes")
    return list(spec.submodule_search_locations or []) if spec else []


def locate(reference: str, what: str = "recipe") -> Path:
    """The file of a recipe, or of a study, given by path or by shipped name."""
    path = Path(os.path.expanduser(reference))
    known = shipped() if what == "recipe" else shipped_studies()
    if path.suffix in SUFFIXES:
        if os.path.isfile(path):  # which no odd name makes raise
            return path
        hint = f" There is a {what} called {path.stem!r}." if path.stem in known else ""
        raise RecipeError(f"{reference}: there is no such file.{hint}")
    if reference in known:
        return known[reference]
    local = f"{path}.yaml"
    hint = f" Did you mean {local}?" if os.path.isfile(local) else ""
    raise RecipeError(registry.unknown(reference, known, what) + hint)


def names_in(given: str, option: str) -> list[str]:
    """The names in the `A,B` of an option; raises `RecipeError` where one of them is nothing."""
    names = [name.strip() for name in given.split(",")]
    if not all(names):
        raise RecipeError(
            f"{option} {given!r}: must be names like A,B; leave it out for the default"
        )
    return names


def summary(path: Path) -> str:
    """The first sentence of the comment that a recipe begins with, on however many lines."""
    with path.open(encoding="utf-8") as file:
        text = " ".join(line.strip("# \n") for line in takewhile(_is_comment, file))
    return SENTENCE_END.split(text, maxsplit=1)[0]


def _is_comment(line: str) -> bool:
    return line.startswith("#") and not line.startswith(SCHEMA_KEY)
