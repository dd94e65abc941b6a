"""What there is to compare: labelled estimators, seeds and a budget, as one recipe a cell.

A cell's recipe is the user's with another estimator and another seed, so that everything is
checked before anything is started, and a cell is known by its recipe's hash.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bilevel import recipe as recipes
from bilevel import registry
from bilevel.errors import ProblemError, RecipeError, RequirementError
from bilevel.recipe import yaml_source
from bilevel.recipe.assemble import assemble
from bilevel.recipe.recipe import Recipe
from bilevel.registry import presets
from bilevel.run import engine


@dataclass(frozen=True)
class Cell:
    """One estimator at one seed."""

    label: str
    seed: int
    recipe: Recipe | None
    """None where what it needs is missing, so that there is none."""
    budget: int | None
    """Oracle calls of its run; None for as many as the recipe's own estimator uses."""
    refused: str | None = None
    """Why it cannot work here or with the recipe: it is shown as failed, and not started."""

    @property
    def stem(self) -> str:
        """The name of its files: it changes with anything that its numbers depend on."""
        label = re.sub(r"[^\w.-]+", "_", self.label)
        budget = "" if self.budget is None else f"-b{self.budget}"
        known = self.recipe.hash[:12] if self.recipe else "none"
        return f"{label}-seed{self.seed}-{known}{budget}"


@dataclass(frozen=True)
class Plan:
    """A comparison: the user's recipe at every seed, and the cells."""

    recipe: Recipe
    seeds: tuple[int, ...]
    scenes: Mapping[int, Recipe]
    """The recipe, with its own estimator, at each seed."""
    cells: tuple[Cell, ...]
    left_out: Mapping[str, str]
    """Registered estimators that cannot be had here or cannot work with this recipe, and why."""

    @property
    def name(self) -> str:
        return f"compare-{self.recipe.name}-{self.recipe.hash[:6]}"


def make(
    recipe: Recipe,
    *,
    labels: Sequence[str] | None = None,
    given: Mapping[str, Any] | None = None,
    seeds: Sequence[int] = (0,),
    budget: int | None = None,
) -> Plan:
    """The plan for `labels`: names, file.py:Class, or labels in `given` (label → specification).

    The recipe's own estimator comes first, with its options. Without `labels` these are all in
    `given`, or else all that are registered and can work with the recipe; `["all"]` adds the
    presets. One asked for by name that cannot work with the recipe, or needs what is missing, is a
    cell that says why.

    Raises `RecipeError` for a wrong estimator, `RequirementError` where the recipe needs what is
    missing, that or `ProblemError` where none of those asked for by name can work.
    """
    engine.refuse_mismatch(assemble(recipe))
    given = dict(given or {})
    own = own_label(recipe)
    if given.get(own, own) != own:
        raise RecipeError(
            f"label {own!r} is taken: it stands for the recipe's own estimator. Choose another"
        )
    every = labels == ["all"]
    everything = every or (labels is None and not given)
    asked = labels if labels is not None and not every else list(given)
    if everything:
        asked = [
            *registry.names("estimators"),
            *(presets.of("estimators") if every else ()),
            *given,
        ]
    specifications = {own: recipe.content["estimator"]}
    specifications |= {label: given.get(label, label) for label in asked if label != own}
    left_out: dict[str, str] = {}
    cells: list[Cell] = []
    for label, specification in specifications.items():
        try:
            made = {seed: _variant(recipe, specification, seed, label) for seed in seeds}
        except RequirementError as error:
            if label == own:
                raise
            if everything:
                left_out[label] = str(error)
            else:
                cells += [Cell(label, seed, None, budget, str(error)) for seed in seeds]
            continue
        except RecipeError as error:  # of a broken plug-in that nobody asked for
            if not everything or label not in registry.foreign("estimators"):
                raise
            left_out[label] = str(error)
            continue
        refused = _mismatch(made[seeds[0]])
        if refused and everything:
            left_out[label] = refused
            continue
        cells += [Cell(label, seed, variant, budget, refused) for seed, variant in made.items()]
    _refuse_if_all_are(cells, own)
    scenes = {cell.seed: cell.recipe for cell in cells if cell.label == own and cell.recipe}
    return Plan(recipe, tuple(seeds), scenes, tuple(cells), left_out)


def own_label(recipe: Recipe) -> str:
    """What the recipe's own estimator is called: its name, or its class where that is in a file."""
    name = recipe.content["estimator"]["name"]
    match = registry.FILE.match(name)
    return match["name"] if match else name


def _mismatch(recipe: Recipe) -> str | None:
    try:
        engine.refuse_mismatch(assemble(recipe))
    except ProblemError as error:
        return str(error)
    return None


def _refuse_if_all_are(cells: Sequence[Cell], own: str) -> None:
    asked = {cell.label: cell for cell in cells if cell.label != own}
    if not asked or not all(cell.refused for cell in asked.values()):
        return
    reasons = "; ".join(f"{label}: {cell.refused}" for label, cell in asked.items())
    if all(cell.recipe is None for cell in asked.values()):
        raise RequirementError(reasons)
    raise ProblemError(reasons)


def _variant(recipe: Recipe, specification: Any, seed: int, label: str) -> Recipe:
    content = {**recipe.at(seed).content, "estimator": specification}
    try:
        return recipes.loads(yaml_source.to_yaml(content), title=f"estimator {label!r}")
    except RecipeError as error:
        raise RecipeError(_without_lines(str(error))) from error


def _without_lines(message: str) -> str:
    """Complaints without the lines of a text that the user never saw."""
    return re.sub(r"(estimator '[^']*'):\d+:", r"\1:", message)


def read_labels(path: Path) -> dict[str, Any]:
    """The labels in a YAML or JSON file; paths of files in it are relative to it."""
    data = yaml_source.parse(recipes.read(path), str(path)).data
    if not data:
        raise RecipeError(
            f"{path}: holds no label; write a line such as `damped: {{name: implicit}}`"
        )
    for label, specification in data.items():
        name = specification.get("name") if isinstance(specification, Mapping) else specification
        if not isinstance(name, str):
            raise RecipeError(
                f"{path}: {label}: must be a name or a mapping with a name, "
                f"e.g. {label}: {{name: implicit, damping: 1e-3}}"
            )
    return {label: anchored(specification, path.parent) for label, specification in data.items()}


def anchored(specification: Any, base: Path) -> Any:
    """A specification with the paths of files in it made absolute."""
    if isinstance(specification, Mapping):
        return {key: anchored(value, base) for key, value in specification.items()}
    if isinstance(specification, str):
        return registry.absolute(specification, base)
    return specification
