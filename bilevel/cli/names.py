"""Recipes and components by name, for commands and for completion; imports no torch."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from bilevel import registry
from bilevel.errors import RecipeError

SUFFIXES = (".yaml", ".yml")
SCHEMA_KEY = "# yaml-language-server: $schema="
"""Begins the comment by which editors find the schema of a recipe, and complete its keys."""


def shipped() -> dict[str, Path]:
    """The recipes that are installed with the package, by name."""
    paths = [path for folder in _folders() for path in sorted(Path(folder).rglob("*.yaml"))]
    return {path.stem: path for path in paths}


def schema_path() -> Path:
    """The JSON schema of recipes that is installed beside them."""
    return Path(*_folders()[:1]) / "recipe.schema.json"


def _folders() -> list[str]:
    """Where the shipped recipes lie."""
    spec = find_spec("bilevel_recipes")
    return list(spec.submodule_search_locations or []) if spec else []


def locate(reference: str) -> Path:
    """The file of a recipe given by path or by shipped name."""
    path = Path(reference)
    if path.suffix in SUFFIXES:
        if os.path.isfile(path):  # which no odd name makes raise
            return path
        hint = f" There is a recipe called {path.stem!r}." if path.stem in shipped() else ""
        raise RecipeError(f"{reference}: there is no such file.{hint}")
    if reference in shipped():
        return shipped()[reference]
    local = f"{path}.yaml"
    hint = f" Did you mean {local}?" if os.path.isfile(local) else ""
    raise RecipeError(registry.unknown(reference, shipped(), "recipe") + hint)


def summary(path: Path) -> str:
    """The comment on the first line of a recipe."""
    with path.open(encoding="utf-8") as file:
        first = file.readline().strip()
    return first.lstrip("# ") if first.startswith("#") else ""
