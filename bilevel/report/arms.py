"""Arms: runs whose recipes differ in nothing but the seed, named by what they differ in from the others."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bilevel.errors import BilevelError
from bilevel.events import COMPLETE
from bilevel.recipe.settings import settings_of_run, shown
from bilevel.report.history import History, read
from bilevel.report.page import content_of
from bilevel.runfolder.folder import RunFolder

Settings = Mapping[str, str]
"""Flat: `lower.optimizer.lr` is "0.1"."""
LONGEST = 40
"""Letters of a name of an arm that a table and a legend have room for."""


@dataclass(frozen=True)
class Run:
    """A run as it was recorded."""

    folder: RunFolder
    history: History
    settings: Settings
    """All that its numbers depend on but the seed."""
    seed: str

    @property
    def status(self) -> str:
        """How it ended, or that it did not."""
        return self.history.finished["reason"] if self.history.finished else "not finished"


@dataclass(frozen=True)
class Arm:
    """Runs that differ in nothing but the seed, one for each."""

    name: str
    runs: tuple[Run, ...]

    @property
    def settings(self) -> Settings:
        return self.runs[0].settings


@dataclass(frozen=True)
class Selection:
    """What a page of many runs shows."""

    arms: tuple[Arm, ...]
    repeated: tuple[Run, ...]
    """Left out: another run has the same recipe and seed, and got further or is newer."""
    damaged: Mapping[str, str]
    """The folders that could not be read, and why."""


def select(folders: Sequence[RunFolder]) -> Selection:
    """Read runs and sort them into arms, in the order in which the arms first come."""
    runs: list[Run] = []
    damaged: dict[str, str] = {}
    for folder in dict.fromkeys(folders):
        try:
            runs.append(_read(folder))
        except (BilevelError, OSError, UnicodeDecodeError) as error:
            damaged[str(folder.path)] = str(error)
    grouped: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        arm = grouped.setdefault(json.dumps(run.settings, sort_keys=True), {})
        arm.setdefault(run.seed, []).append(run)
    chosen = [
        [max(same, key=_completeness) for same in by_seed.values()] for by_seed in grouped.values()
    ]
    kept = {id(run) for arm in chosen for run in arm}
    names = named([arm[0].settings for arm in chosen])
    if len(chosen) == 1:
        names = [chosen[0][0].history.started["name"]]
    return Selection(
        tuple(Arm(name, tuple(arm)) for name, arm in zip(names, chosen, strict=True)),
        tuple(run for run in runs if id(run) not in kept),
        damaged,
    )


def differing(recipes: Sequence[Settings]) -> list[str]:
    """The keys of which the recipes do not all have the same value."""
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    return [key for key in keys if len({recipe.get(key) for recipe in recipes}) > 1]


def sorted_out(recipes: Sequence[Settings]) -> tuple[list[str], list[str]]:
    """The keys that differ: those that tell recipes apart, and those that follow from a component's name."""
    differ = differing(recipes)
    follow = [key for key in differ if _follows(key, differ, recipes)]
    return [key for key in differ if key not in follow], follow


def named(recipes: Sequence[Settings]) -> list[str]:
    """A name for each recipe, by what differs: "estimator=unroll lr=0.1".

    Options that follow from a component's name (an estimator's defaults) are not told. Where names
    would be longer than `LONGEST` letters, only as much is told as tells the recipes apart.
    """
    told, _ = sorted_out(recipes)
    names = _written(recipes, told)
    if max(map(len, names), default=0) > LONGEST:
        names = _written(recipes, _telling(recipes, told))
    return names


def _written(recipes: Sequence[Settings], told: Sequence[str]) -> list[str]:
    words = [_short(key) for key in told]
    short = {
        key: word if words.count(word) == 1 else key.removesuffix(".name")
        for key, word in zip(told, words, strict=True)
    }

    def name(recipe: Settings, with_digest: bool) -> str:
        parts = (f"{short[k]}={shown(recipe[k], with_digest)}" for k in told if k in recipe)
        return " ".join(parts) or "without these settings"

    names = [name(recipe, False) for recipe in recipes]
    if len(set(names)) == len(names):
        return names
    return [name(recipe, True) for recipe in recipes]  # a file was edited between the runs


def _telling(recipes: Sequence[Settings], told: Sequence[str]) -> list[str]:
    """As few of the keys as tell the recipes apart: next is the one that tells most apart."""

    def classes(keys: Sequence[str]) -> int:
        return len({tuple(recipe.get(key) for key in keys) for recipe in recipes})

    chosen: list[str] = []
    while classes(chosen) < classes(told):
        chosen.append(max(told, key=lambda key: classes([*chosen, key])))
    return [key for key in told if key in chosen]


def _follows(key: str, differ: Sequence[str], recipes: Sequence[Settings]) -> bool:
    """Whether the name of a component that holds `key`, itself different, decides its value."""
    for parent in differ:
        prefix = parent.removesuffix("name")
        if parent == key or not parent.endswith(".name") or not key.startswith(prefix):
            continue
        values: dict[str | None, set[str | None]] = {}
        for recipe in recipes:
            values.setdefault(recipe.get(parent), set()).add(recipe.get(key))
        if all(len(each) == 1 for each in values.values()):
            return True
    return False


def _short(key: str) -> str:
    """The last word of a key that says something: lr, estimator, layers.0."""
    parts = key.removesuffix(".name").split(".")
    start = max((n for n, part in enumerate(parts) if not part.isdecimal()), default=0)
    return ".".join(parts[start:])


def _completeness(run: Run) -> tuple[bool, int, str]:
    return run.status in COMPLETE, (run.history.steps or [0])[-1], run.folder.path.name


def _read(folder: RunFolder) -> Run:
    made = folder.environment().get("settings")  # a run of an older version has none there
    if not isinstance(made, dict):
        made = settings_of_run(content_of(folder, folder.resolved.read_text(encoding="utf-8")))
    settings = {key: str(value) for key, value in made.items()}
    return Run(folder, read(folder.path), settings, shown(settings.pop("seed")))
