"""A recipe: what a run is made of, read from YAML, checked as a whole, frozen and hashed.

Sections: version, name, seed or seeds, problem, lower, upper, estimator, runtime, evaluate, checkpoint,
sinks, report. Components are given by name or as `path/to/file.py:Class`, relative to the recipe.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt, PositiveInt

from bilevel import registry
from bilevel.components import component
from bilevel.errors import RecipeError
from bilevel.problem.levels import lacks
from bilevel.problem.protocol import Problem
from bilevel.recipe import yaml_limits
from bilevel.recipe.seeds import seeds_of, settled
from bilevel.recipe.settings import digest
from bilevel.recipe.yaml_source import Source, override, parse, to_yaml
from bilevel.registry.build import Builder, Built
from bilevel.registry.diagnostics import Complaints, Where
from bilevel.run.options import Evaluate, Runtime, Seed
from bilevel.run.targets import Best
from bilevel.run.upper import Upper
from bilevel.sinks import Sink
from bilevel.types import Estimator, LowerSolver

VERSION = 1
MAX_SINKS = 20


@component
class Checkpoint:
    """When the state is saved: always at the end and when the run is interrupted."""

    every: NonNegativeInt = 50
    """Also every so many steps; 0 for never."""
    keep: PositiveInt = 2
    """How many of the newest checkpoints stay on disk."""
    best: Best | None = None
    """Beside them stays the one at which a measure was best, in `checkpoints/best`."""


@dataclass(frozen=True)
class Recipe:
    """A checked recipe: its plain content with all defaults filled in, and what was built of it.

    Two recipes are equal when their content is.
    """

    content: Mapping[str, Any]
    problem: Problem = field(compare=False, repr=False)
    lower: LowerSolver = field(compare=False, repr=False)
    upper: Upper = field(compare=False, repr=False)
    estimator: Estimator = field(compare=False, repr=False)
    runtime: Runtime = field(compare=False, repr=False)
    evaluate: Evaluate = field(compare=False, repr=False)
    checkpoint: Checkpoint = field(compare=False, repr=False)
    sinks: tuple[Sink, ...] = field(compare=False, repr=False)
    report: bool = field(compare=False, repr=False)

    @property
    def name(self) -> str:
        return self.content["name"]

    @property
    def seed(self) -> int:
        """The seed of its run; of an ensemble, that of the first."""
        return self.seeds[0]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Those of an ensemble, or its one seed."""
        return tuple(self.content["seeds"]) if self.is_ensemble else (self.content["seed"],)

    @property
    def is_ensemble(self) -> bool:
        """Whether it stands for a run a seed."""
        return "seeds" in self.content

    def at(self, seed: int) -> Recipe:
        """The recipe of one run, with this seed."""
        content = {
            "seed" if key == "seeds" else key: seed if key in ("seed", "seeds") else part
            for key, part in self.content.items()
        }
        return replace(self, content=content)

    @property
    def hash(self) -> str:
        """SHA-256 of what the numbers of its run depend on; see `bilevel.recipe.settings.digest`."""
        return digest(self.content)

    def dump(self) -> str:
        """The content as YAML; `loads` makes an equal recipe of it."""
        return to_yaml(self.content)


def load(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read and check the recipe in a file. Raises `RecipeError` with everything that is wrong."""
    return loads(read(path), overrides, title=str(path), base=path.parent)


def read(path: Path) -> str:
    """The text of a recipe file."""
    try:
        with path.open(encoding="utf-8") as file:  # which may have no end: /dev/zero
            return file.read(yaml_limits.CHARACTERS + 1)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not UTF-8 text: {error.reason}") from error


def loads(
    text: str, overrides: Iterable[str] = (), *, title: str = "recipe", base: Path | None = None
) -> Recipe:
    """Check the recipe in a text; files it names are relative to `base`."""
    source = settled(override(parse(text, title), overrides))
    return _Reading(source, base or Path()).recipe()


class _Reading:
    """One pass over a source: every section is checked before anything is raised."""

    def __init__(self, source: Source, base: Path) -> None:
        self._source = source
        self._complaints = Complaints(source.title, source.origins)
        self._builder = Builder(self._complaints, base)

    def recipe(self) -> Recipe:
        for key in self._source.data.keys() - set(SECTIONS):
            self._complaints.add_unknown_key((key,), list(SECTIONS))
        seed = "seeds" if "seeds" in self._source.data else "seed"
        built = {
            "version": self._version(),
            "name": self._name(),
            seed: self._seeds() if seed == "seeds" else self._seed(),
            "problem": self._component("problem", "problems", Problem),
            "lower": self._component("lower", "lower", LowerSolver),
            "upper": self._options("upper", Upper),
            "estimator": self._component("estimator", "estimators", Estimator),
            "runtime": self._options("runtime", Runtime),
            "evaluate": self._options("evaluate", Evaluate),
            "checkpoint": self._options("checkpoint", Checkpoint),
            "sinks": self._sinks(),
            "report": self._report(),
        }
        self._complaints.finish()
        good = {key: part for key, part in built.items() if part is not None}
        assert len(good) == len(built)
        parts = {key: part.value for key, part in good.items()}
        for key in ("version", "name", seed):
            del parts[key]
        return Recipe(content={key: part.content for key, part in good.items()}, **parts)

    def _get(self, key: str, default: Any = None) -> Any:
        return self._source.data.get(key, default)

    def _version(self) -> Built | None:
        got = self._get("version", VERSION)
        if type(got) is not int or got != VERSION:
            self._complaints.add(("version",), f"this release reads version {VERSION}", got)
            return None
        return Built(got, got)

    def _name(self) -> Built | None:
        got = self._get("name", Path(self._source.title).stem)
        if not isinstance(got, str) or not re.fullmatch(r"\w[\w.-]*", got):
            self._complaints.add(
                ("name",), "must be letters, digits, '_', '-' and '.' (it names a folder)", got
            )
            return None
        return Built(got, got)

    def _seed(self) -> Built | None:
        got = self._get("seed", 0)
        return Built(got, got) if self._builder.fits(Seed, got, ("seed",)) else None

    def _seeds(self) -> Built | None:
        if "seed" in self._source.data:
            self._complaints.add(("seeds",), "`seed` and `seeds` are both given; leave one out")
            return None
        got = self._get("seeds")
        try:
            seeds = seeds_of(got)
        except ValueError as error:
            self._complaints.add(("seeds",), str(error), got)
            return None
        return Built(seeds, list(seeds))

    def _report(self) -> Built | None:
        got = self._get("report", DEFAULTS["report"])
        if not isinstance(got, bool):
            self._complaints.add(("report",), "must be true or false", got)
            return None
        return Built(got, got)

    def _options(self, key: str, cls: type[Any]) -> Built | None:
        return self._builder.options(cls, self._get(key, {}), (key,))

    def _component(self, key: str, group: str, protocol: type[Any]) -> Built | None:
        given = self._get(key, DEFAULTS.get(key))
        if given is None:
            known = ", ".join(registry.names(group))
            self._complaints.add((key,), f"missing; name one of {known}, or file.py:Class")
            return None
        if isinstance(given, Mapping) and "name" not in given and key in DEFAULTS:
            given = {"name": DEFAULTS[key], **given}
        built = self._builder.component(group, given, (key,))
        if built is None or isinstance(built.value, protocol):
            return built
        missing = [m for m in _members(protocol) if not hasattr(built.value, m)]
        kind = type(built.value).__name__
        what = f"{'an' if protocol.__name__[0] in 'AEIO' else 'a'} {protocol.__name__}"
        self._complaints.add((key,), f"{kind} is not {what}: {lacks(built.value, missing)}")
        return None

    def _sinks(self) -> Built | None:
        given = self._get("sinks", DEFAULTS["sinks"])
        if not isinstance(given, list):
            self._complaints.add(("sinks",), "must be a list, e.g. [jsonl]", given)
            return None
        if len(given) > MAX_SINKS:
            self._complaints.add(("sinks",), f"{len(given):,} of them; at most {MAX_SINKS}")
            return None
        built = [self._sink(spec, ("sinks", index)) for index, spec in enumerate(given)]
        good = [part for part in built if part is not None]
        if len(good) < len(built):
            return None
        return Built(tuple(p.value for p in good), [p.content for p in good])

    def _sink(self, spec: Any, where: Where) -> Built | None:
        built = self._builder.component("sinks", spec, where)
        if built is None or isinstance(built.value, Sink):
            return built
        self._complaints.add(where, f"{type(built.value).__name__} is not a Sink: it lacks open")
        return None


SECTIONS = (
    "version",
    "name",
    "seed",
    "seeds",
    "problem",
    "lower",
    "upper",
    "estimator",
    "runtime",
    "evaluate",
    "checkpoint",
    "sinks",
    "report",
)
DEFAULTS: Mapping[str, Any] = {
    "lower": "gradient",
    "estimator": "implicit",
    "sinks": ["jsonl", "rows", "figures"],
    "report": True,
}


def _members(protocol: type[Any]) -> list[str]:
    return sorted(name for name in vars(protocol) if not name.startswith("_"))
