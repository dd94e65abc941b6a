"""The study's file: regimes, arms, what is tuned, seeds and measure; checked as a whole, line by line."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from bilevel.components import PathName, component
from bilevel.errors import RecipeError, unknown
from bilevel.recipe import recipe as recipes
from bilevel.recipe.seeds import seeds_of
from bilevel.recipe.yaml_source import parse
from bilevel.registry.build import Builder
from bilevel.registry.diagnostics import Complaints, Where
from bilevel.runfolder.arithmetic import Instructions
from bilevel.sweeping.space import Dimension
from bilevel.sweeping.space import parse as parse_space

VERSION = 1
OURS, BASELINE = "ours", "baseline"
"""The groups of which one arm each is named on the development seeds."""
Settings = dict[str, Any]
"""Overrides of the recipe: `lower.optimizer.lr` to a value as YAML has it."""


def _name(text: str) -> str:
    if not text or not all(sign.isalnum() or sign in "_-" for sign in text):
        raise ValueError("must be letters, digits, '_' and '-' (it names a folder)")
    return text


Name = Annotated[str, AfterValidator(_name)]


@component
class Seeds:
    """Which seeds settings are chosen on, and which others they are compared on."""

    development: Any
    test: Any
    sets: Annotated[tuple[str, ...], Field(min_length=1)] = ("seed",)
    """Settings that a seed is the value of."""


@component
class Cases:
    """Answers that the measure is computed from, so that pictures (or users, …) are resampled too."""

    table: str
    """Of those that a problem's `evaluate` yields."""
    unit: str
    """Column by which cases are drawn together."""
    score: str
    label: str | None = None
    """Column that is true or false: the measure is then the area under the ROC curve of the score; without
    it the mean of the score."""
    where: dict[str, Any] = Field(default_factory=dict)


@component
class Mixtures:
    """Weights that are tried, each a short run: `points` of the flat Dirichlet distribution, or each name alone."""

    over: str
    """Setting that the names are below: problem.weights."""
    names: Annotated[tuple[str, ...], Field(min_length=2)]
    points: PositiveInt | Literal["alone"]
    least: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    """What the others weigh where one is alone."""


@component
class After:
    """What an arm takes from another one, which is computed first at the same seed."""

    arm: str
    take: dict[str, str] = Field(default_factory=dict)
    """Its measures to settings of this arm; a `*` stands for the same words on both sides."""
    choose: Literal["best", "top", "regression"] | None = None
    """Of an arm with `mixtures`: the best of them, the `top` names alone at equal weights, or the mixture that a
    regression predicts to be the best."""
    by: str = "upper_loss"
    """What the least is best of: upper_loss, lower_loss, or one of the problem's measures."""
    top: PositiveInt = 1


@component
class StudyArm:
    """A way to do it, with what is tuned."""

    title: str = ""
    group: Name = "arm"
    """ours and baseline are compared; the arms of other groups are shown."""
    settings: Settings = Field(default_factory=dict)
    vary: tuple[str, ...] = ()
    """Ranges and lists, as `bilevel sweep` takes them."""
    tuned: str | None = None
    """The arm whose tuned settings it takes."""
    after: After | None = None
    mixtures: Mixtures | None = None
    hidden: bool = False
    """A stage of another arm, which is in no table."""


@component
class Regime:
    """Where the arms are compared."""

    title: str = ""
    settings: Settings = Field(default_factory=dict)
    arms: tuple[str, ...] = ()
    """Those that are computed; () for all. `ours` and `baseline` are the two that were named."""
    test: Any = None
    """Its test seeds; None for those of the study, [] where it is looked at on development seeds alone."""
    tuned: str | None = None
    """The regime whose tuned settings and named arms it takes."""
    at: float | None = None
    """Where it stands on the axis of a figure that joins regimes, such as the number of clean pictures."""
    course: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Measures, as patterns, whose course is kept and of which each name has a share: weights of sources."""


@component
class Headroom:
    """What there must be to be gained, on development seeds, before a test seed is run."""

    bound: str
    """The arm that knows more than the others may, or the best of a group."""
    at_least: float
    """By how much it must be ahead, in the measure, in the mean over development seeds."""
    over: str = BASELINE
    """An arm, or the best of a group."""
    regime: str | None = None
    """None for the first."""


@component
class Arithmetic:
    """What every cell is computed with, so that pairs of a seed differ by their arms and not by their last digits."""

    instructions: Instructions
    """Of the CPU: the least that all machines of the study have."""
    threads: PositiveInt = 1


@component
class Replaces:
    """One run of an arm against a sweep of another: how many runs does it replace?"""

    run: str
    sweep: str
    regime: str | None = None
    """None for the first."""


@component
class StudyFile:
    """A study's file."""

    name: Name
    recipe: PathName
    results: PathName
    """Folder of what is kept, a file a cell; like `page` relative to where the command is given."""
    measure: str
    seeds: Seeds
    regimes: Annotated[dict[Name, Regime], Field(min_length=1)]
    arms: Annotated[dict[Name, StudyArm], Field(min_length=1)]
    version: int = VERSION
    maximize: bool = False
    margin: NonNegativeFloat = 0.0
    """Differences within ± margin are no difference that matters."""
    arithmetic: Arithmetic | None = None
    """None for that of the machine, whichever it is."""
    headroom: Headroom | None = None
    """Cells on test seeds are held back until it is met; None for no such gate."""
    replaces: Replaces | None = None
    """What one run is worth in runs of a sweep, on development seeds."""
    trials: PositiveInt = 9
    """Settings that are tried of each arm, at most."""
    sampler_seed: NonNegativeInt = 0
    settings: Settings = Field(default_factory=dict)
    development: Settings = Field(default_factory=dict)
    """Settings of the runs on development seeds."""
    test: Settings = Field(default_factory=dict)
    cases: Cases | None = None
    keep: tuple[str, ...] = ("*",)
    """Measures that a cell keeps, beside the one that counts; `*` stands for any words."""
    page: PathName | None = None
    """Markdown in which the numbers are written between markers `<!-- study:… -->`."""
    axis: str = ""
    """What `at` of the regimes is."""


@dataclass(frozen=True)
class Study:
    """A checked study; its recipe's path is relative to its file."""

    path: Path
    content: StudyFile
    development: tuple[int, ...]
    test: Mapping[str, tuple[int, ...]]
    """By regime."""
    spaces: Mapping[str, tuple[Dimension, ...]]
    """What is varied, by arm."""

    @property
    def name(self) -> str:
        return self.content.name

    @cached_property
    def recipe(self) -> Path:
        return self.path.parent / os.path.expanduser(self.content.recipe)

    @cached_property
    def results(self) -> Path:
        return Path(os.path.expanduser(self.content.results))

    @cached_property
    def page(self) -> Path | None:
        return Path(os.path.expanduser(self.content.page)) if self.content.page else None

    def load(self, assignments: list[str]) -> recipes.Recipe:
        """The recipe of a cell. Raises `RecipeError` where its settings do not go together."""
        return recipes.load(self.recipe, assignments)

    def tuning(self, regime: str) -> str:
        """The regime in which the arms of this one are tuned."""
        return self.content.regimes[regime].tuned or regime


def read(path: Path) -> Study:
    """Read and check a study's file. Raises `RecipeError` with everything that is wrong."""
    source = parse(recipes.read(path), str(path))
    complaints = Complaints(source.title, source.origins)
    built = Builder(complaints, path.parent).options(StudyFile, source.data, ())
    complaints.finish()
    assert built is not None
    content: StudyFile = built.value
    checked = _Check(content, complaints)
    found = Study(path, content, checked.development, checked.test, checked.spaces)
    complaints.finish()
    return found


class _Check:
    """What no field knows alone: names, seeds, spaces and the order of arms."""

    def __init__(self, content: StudyFile, complaints: Complaints) -> None:
        self._content, self._complaints = content, complaints
        if content.version != VERSION:
            complaints.add(("version",), f"this release reads version {VERSION}", content.version)
        seeds = content.seeds
        self.development = self._seeds(seeds.development, ("seeds", "development"))
        usual = self._seeds(seeds.test, ("seeds", "test"))
        self.test = {
            name: usual if each.test is None else self._of_regime(name, each.test)
            for name, each in content.regimes.items()
        }
        self.spaces = {name: self._space(name, arm) for name, arm in content.arms.items()}
        for name, arm in content.arms.items():
            self._arm(name, arm)
        for name, regime in content.regimes.items():
            self._regime(name, regime)
        if content.headroom:
            self._headroom(content.headroom)
        if content.replaces:
            self._replaces(content.replaces)

    def _seeds(self, given: Any, where: Where) -> tuple[int, ...]:
        try:
            found = seeds_of(given)
        except ValueError as error:
            self._complaints.add(where, str(error), given)
            return ()
        if twice := set(found) & set(self.development if hasattr(self, "development") else ()):
            self._complaints.add(
                where, f"{min(twice)} is a development seed too; no seed may be both", given
            )
        return found

    def _of_regime(self, name: str, given: Any) -> tuple[int, ...]:
        return () if given == [] else self._seeds(given, ("regimes", name, "test"))

    def _space(self, name: str, arm: StudyArm) -> tuple[Dimension, ...]:
        where = ("arms", name, "vary")
        try:
            varied, fixed = parse_space(arm.vary)
        except RecipeError as error:
            self._complaints.add(where, str(error))
            return ()
        for word in fixed:
            self._complaints.add(where, f"{word!r} varies nothing; put it below settings")
        return tuple(varied)

    def _arm(self, name: str, arm: StudyArm) -> None:
        where = ("arms", name)
        before = [*self._content.arms][: [*self._content.arms].index(name)]
        if arm.tuned is not None and arm.vary:
            self._complaints.add((*where, "tuned"), "stands beside vary; leave one out")
        for key, other in (("tuned", arm.tuned), ("after", arm.after and arm.after.arm)):
            if other is not None and other not in before:
                late = " above it in the file" if other in self._content.arms else ""
                self._complaints.add(
                    (*where, key),
                    f"{unknown(other, before, 'arm')}{late and f': it must stand{late}'}",
                )
        if arm.mixtures and (arm.vary or arm.tuned or not arm.hidden):
            self._complaints.add(
                (*where, "mixtures"), "tries weights alone: no vary, no tuned, and hidden: true"
            )
        after = arm.after
        if after is None or after.arm not in before:
            return
        is_mixture = self._content.arms[after.arm].mixtures is not None
        if is_mixture != (after.choose is not None) or is_mixture == bool(after.take):
            self._complaints.add(
                (*where, "after"),
                f"{after.arm} {'tries mixtures: give choose' if is_mixture else 'is one run: give take'}, "
                "and not the other",
            )
        for measure, setting in after.take.items():
            if measure.count("*") != setting.count("*") or measure.count("*") > 1:
                self._complaints.add(
                    (*where, "after", "take"), f"{measure}: {setting}: one * on both sides, or none"
                )

    def _regime(self, name: str, regime: Regime) -> None:
        where = ("regimes", name)
        if regime.tuned is not None and (
            regime.tuned not in self._content.regimes
            or self._content.regimes[regime.tuned].tuned
            or regime.tuned == name
        ):
            known = [each for each, other in self._content.regimes.items() if not other.tuned]
            self._complaints.add(
                (*where, "tuned"), unknown(regime.tuned, known, "regime that is tuned by itself")
            )
        for arm in regime.arms:
            if arm not in (OURS, BASELINE, *self._content.arms):
                self._complaints.add(
                    (*where, "arms"), unknown(arm, [*self._content.arms, OURS, BASELINE], "arm")
                )
            if arm in (OURS, BASELINE) and not regime.tuned:
                self._complaints.add(
                    (*where, "arms"), f"{arm} is named in the regime of `tuned`, which is missing"
                )

    def _headroom(self, asked: Headroom) -> None:
        there = self._there("headroom", asked.regime)
        if not there:
            return
        arms = self._content.arms
        groups = {name: arms[name].group for name in there if not arms[name].hidden}
        self._among(("headroom", "bound"), asked.bound, [*there, *sorted({*groups.values()})])
        bounds = {name for name, group in groups.items() if group == asked.bound}
        bounds = {asked.bound} if asked.bound in arms else bounds
        others = {group for name, group in groups.items() if name not in bounds}
        rivals = [name for name in there if name not in bounds]
        self._among(("headroom", "over"), asked.over, [*sorted(others), *rivals])

    def _replaces(self, asked: Replaces) -> None:
        there = self._there("replaces", asked.regime)
        if there:
            self._among(("replaces", "run"), asked.run, there)
            self._among(("replaces", "sweep"), asked.sweep, there)

    def _there(self, section: str, regime: str | None) -> list[str]:
        """The arms of the regime that a section names; none where it is not tuned by itself."""
        known = [name for name, each in self._content.regimes.items() if not each.tuned]
        regime = regime or next(iter(self._content.regimes))
        if regime in known:
            return arms_of(self._content, regime, {})
        self._among((section, "regime"), regime, known, "regime that is tuned by itself")
        return []

    def _among(self, where: Where, name: str, known: list[str], what: str = "arm") -> None:
        if name not in known:
            self._complaints.add(where, unknown(name, known, what))


def words(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings with their values as an override has them."""
    return {key: json.dumps(value, ensure_ascii=False) for key, value in settings.items()}


def arms_of(content: StudyFile, regime: str, named: Mapping[str, str]) -> list[str]:
    """The arms of a regime in the order of the file, with those that they come after or are tuned as.

    `named` are those that `ours` and `baseline` stand for, empty where they are not known yet.
    """
    given = content.regimes[regime].arms or tuple(content.arms)
    needed = {named.get(name, name) for name in given} & content.arms.keys()
    for name in reversed(content.arms):
        after = content.arms[name].after
        if name in needed and after:
            needed.add(after.arm)
    return [name for name in content.arms if name in needed]
