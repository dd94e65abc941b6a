"""What was asked for: the recipe, what is varied and how. sweep.yaml keeps it; another is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from bilevel.errors import RecipeError
from bilevel.recipe import recipe as recipes
from bilevel.recipe.recipe import Recipe
from bilevel.recipe.settings import differences, flattened
from bilevel.recipe.yaml_source import parse, to_yaml
from bilevel.runfolder.files import write_text
from bilevel.sweeping import FILE
from bilevel.sweeping.space import Dimension, Range, grid_size, written

REMEDY = "make room, or name another folder with --runs-dir; what is done is kept"
Sampler = Literal["grid", "random", "tpe"]
Pruner = Literal["none", "median"]
SAMPLERS: tuple[Sampler, ...] = ("grid", "random", "tpe")
PRUNERS: tuple[Pruner, ...] = ("none", "median")


@dataclass(frozen=True)
class Request:
    """A sweep as it was asked for; how many trials and workers it has may change from start to start."""

    recipe: Recipe
    """With the overrides that hold for every trial; every trial runs all its seeds."""
    space: tuple[Dimension, ...]
    measure: str
    maximize: bool
    sampler: Sampler
    pruner: Pruner
    sampler_seed: int

    @property
    def name(self) -> str:
        return f"{self.recipe.name}-sweep"

    def content(self) -> dict[str, Any]:
        """What sweep.yaml holds."""
        space = {each.key: {k: _plain(v) for k, v in asdict(each).items()} for each in self.space}
        for each in space.values():
            del each["key"]
        return {
            "measure": self.measure,
            "maximize": self.maximize,
            "sampler": self.sampler,
            "pruner": self.pruner,
            "sampler_seed": self.sampler_seed,
            "space": space,
            "recipe": dict(self.recipe.content),
        }

    def assignments(self, values: Mapping[str, Any]) -> list[str]:
        """The values of a trial as overrides."""
        kinds = {each.key: isinstance(each, Range) and each.is_int for each in self.space}
        return [f"{key}={written(values[key], kinds[key])}" for key in kinds]

    def variant(self, values: Mapping[str, Any]) -> Recipe:
        """The recipe of a trial. Raises `RecipeError` where its settings do not go together."""
        text = to_yaml(self.recipe.content)
        return recipes.loads(text, self.assignments(values), title=self.recipe.name)

    def check(self) -> list[Recipe]:
        """Both ends of every range and every listed value, the other keys at their first.

        Raises `RecipeError` for a key that is unknown or a value that is not taken.
        """
        first = {each.key: each.ends[0] for each in self.space}
        found = []
        for each in self.space:
            for value in each.ends:
                try:
                    found.append(self.variant(first | {each.key: value}))
                except RecipeError as error:
                    raise RecipeError(f"{error}{_hint(each, str(error))}") from None
        if self.sampler == "grid":
            grid_size(self.space)
        else:
            for each in self.space:
                if isinstance(each, Range) and each.points is not None:
                    raise RecipeError(
                        f"{each.key}: {each.points} points are of --sampler grid; {self.sampler} "
                        "takes any value in a range: leave them out"
                    )
        return found


def keep(request: Request, folder: Path) -> None:
    """Write sweep.yaml, or hold the one that is there to it.

    Raises `RecipeError` with what differs where it is of another sweep.
    """
    path = folder / FILE
    if not path.is_file():
        write_text(path, to_yaml(request.content()), remedy=REMEDY, make_folder=True)
        return
    made = flattened(parse(recipes.read(path), str(path)).data)
    differ = differences(made, flattened(request.content()))
    if differ:
        raise RecipeError(
            f"{folder}: holds another sweep: {differ}. Ask for the same, or give this one a name "
            f"of its own: name={request.recipe.name}2"
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _hint(each: Dimension, said: str) -> str:
    if isinstance(each, Range) and not each.is_int and "integer" in said:
        return f". For integers: {each.key}={each.low:g}..{each.high:g},int"
    return ""
