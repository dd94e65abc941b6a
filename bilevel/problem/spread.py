"""A problem whose losses are computed by several ranks, each on its part of the batch.

F(x, y, batch) = Σ over ranks r of w_r F(x, y, part_r), with the derivatives of every order of the
loss on the whole batch: see `bilevel.ranks`. x, y and all that is made of them are on every rank, the
same bits. A component that a run is made of does not see the difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from bilevel import ranks as over
from bilevel import rng, tree
from bilevel.calculus.gauss_newton import Composed
from bilevel.errors import ProblemError, RankError
from bilevel.problem.levels import Levels
from bilevel.problem.mapped import Maps, keep, mapped
from bilevel.problem.purity import is_transformed
from bilevel.ranks import Ranks
from bilevel.rng import Streams
from bilevel.types import Function

LEVELS = ("upper", "lower")


class Spread:
    """`problem` over ranks; with the batches of the whole, of which each rank takes its part.

    Before a loss is first used, its value on the whole batch is compared with that on the parts, where
    the run begins and at a random point beside it: one evaluation of the whole more for each, without
    a graph. What takes a batch and is no loss (`lower_map`, `lower_constraints`, `lower_diagonal`)
    has the whole, on every rank. Measures and figures are the first rank's, which the others wait for.

    Raises:
        ProblemError: when a loss is first used: it is not the weighted sum of its values on the parts.
    """

    def __init__(self, problem: Any, ranks: Ranks) -> None:
        self.problem, self.ranks = problem, ranks
        self._compared: set[str] = set()
        self.upper_loss, self.lower_loss = (self._spread(level) for level in LEVELS)

    def init(self, streams: Streams) -> tuple[Any, Any]:
        with over.apart():
            return self.problem.init(streams)

    def upper_batches(self, stream: torch.Generator) -> Iterator[Any]:
        return self.problem.upper_batches(stream)

    def lower_batches(self, stream: torch.Generator) -> Iterator[Any]:
        return self.problem.lower_batches(stream)

    def __getattr__(self, name: str) -> Any:
        inner = vars(self).get("problem")  # none yet while it is being copied
        return mapped(self, inner, _MAPS, name)

    def part(self, batch: Any) -> tuple[Any, float]:
        """(this rank's part of a batch, its weight)."""
        cut = getattr(self.problem, "part", None) or over.by_rows
        return cut(batch, self.ranks.rank, self.ranks.size)

    def _spread(self, level: str) -> Function:
        function = getattr(self.problem, f"{level}_loss")
        if isinstance(function, Composed):
            return Composed(
                outputs=lambda x, y, batch: function.outputs(*self._own(level, x, y, batch)[0]),
                loss=lambda x, y, z, batch: self._whole(
                    level, x, y, batch, lambda x, y, part: function.loss(x, y, z, part)
                ),
            )
        return lambda x, y, batch: self._whole(level, x, y, batch, function)

    def _own(self, level: str, x: Any, y: Any, batch: Any) -> tuple[tuple[Any, Any, Any], float]:
        """((x, y, part), weight): what this rank evaluates a loss at."""
        if level not in self._compared and not is_transformed(tree.flat(x, "x"), tree.flat(y, "y")):
            self._compared.add(level)
            self._compare(level, x, y, batch)
        part, weight = self.part(batch)
        return (self._entered("x", x), self._entered("y", y), part), weight

    def _whole(self, level: str, x: Any, y: Any, batch: Any, function: Function) -> Tensor:
        at, weight = self._own(level, x, y, batch)
        value = function(*at)
        if not isinstance(value, Tensor):
            return value  # refused by name where a loss is called
        # a sum in 16 bits would lose more than the loss itself did
        return over.leave(self.ranks, weight * tree.wide(value)).to(value.dtype)

    def _entered(self, level: str, variables: Any) -> Any:
        team = self.ranks.team
        if team is not None and level in team.levels:
            return variables  # gathered of parts, to which their gradients go back as sums
        leaves = [leaf for _, leaf in tree.named(variables)]
        found = iter(over.enter(self.ranks, leaves))
        return tree.map_nested(lambda leaf: next(found), variables)

    # whether the parts make the whole

    def _compare(self, level: str, x: Any, y: Any, batch: Any) -> None:
        function = getattr(self.problem, f"{level}_loss")
        with torch.no_grad():
            for beside in (0.0, 0.1):
                at = self._beside(beside, x, y)
                with self.ranks.telling(f"{level}_loss"), over.apart():
                    whole = function(*at, batch)
                    part, weight = self.part(batch)
                if not isinstance(whole, Tensor) or whole.numel() != 1:
                    return  # refused by name where a loss is called
                if getattr(self.problem, "part", None) is None:
                    self._refuse_failing(level, lambda a=at, p=part: function(*a, p))
                self._refuse_drifted(level, whole)
                own = weight * tree.wide(function(*at, part)).reshape(())
                both = torch.stack([own, own.abs()])
                self._refuse_unlike(level, whole, *self.ranks.sum_of(both).tolist())

    def _beside(self, size: float, x: Any, y: Any) -> tuple[Any, Any]:
        """x and y, or a point at some distance: parts may make the whole at the start alone."""
        stream = rng.stream(0, "spread")

        def moved(leaf: Tensor) -> Tensor:
            leaf = leaf.detach()
            scale = size * (float(leaf.double().square().mean().sqrt()) or 1.0)
            return leaf + scale * torch.randn(leaf.shape, generator=stream).to(leaf)

        if not size:
            return tree.map_nested(Tensor.detach, x), tree.map_nested(Tensor.detach, y)
        found = []
        for level, variables in (("upper", x), ("lower", y)):
            project = getattr(self.problem, f"project_{level}", None)
            there = tree.map_nested(moved, variables)
            found.append(project(there) if project else there)
        return found[0], found[1]

    def _refuse_failing(self, level: str, evaluate: Callable[[], Any]) -> None:
        """Raise `ProblemError` where a loss fails on rows of a batch: no rank may wait for such a one.

        Not for a problem with a `part` of its own, which may need the rows of others to be evaluated.
        """
        said = ""
        with over.apart():
            try:
                evaluate()
            except Exception as error:  # of whatever the problem's own code raises
                said = f"{type(error).__name__}: {error}"
        failed = [(rank, said) for rank, said in enumerate(self.ranks.gather(said)) if said]
        if failed:
            rank, said = failed[0]
            raise ProblemError(
                f"{level}_loss of {self._name} can be evaluated on the whole batch, but not on the "
                f"part of rank {rank} of {self.ranks.size} ({said.splitlines()[0]}). Remedy: {over.PART}"
            )

    def _refuse_drifted(self, level: str, whole: Tensor) -> None:
        """Raise `RankError` where ranks find other values of the same loss on the same whole batch."""
        values = self.ranks.gather(float(whole))
        for rank, value in enumerate(values):
            if abs(value - values[0]) > _rough(whole) * (abs(value) + abs(values[0])):
                raise RankError(
                    f"{level}_loss of {self._name} is {values[0]:.9g} on the whole batch on rank 0, and "
                    f"{value:.9g} on rank {rank} of {self.ranks.size}: they have other x, y or batches "
                    "than each other. Draw random numbers from the streams that init and batches are "
                    "given, and read the same files in the same order on every rank"
                )

    def _refuse_unlike(self, level: str, whole: Tensor, parts: float, size: float) -> None:
        value = float(whole)
        rough = _rough(whole)
        if abs(value - parts) <= rough * (abs(value) + size) or value != value:
            return
        if not (math.isfinite(value) or math.isfinite(parts)):
            return  # a divergence, which is told as one
        raise ProblemError(
            f"{level}_loss of {self._name} is {value:.9g} on the whole batch, and {parts:.9g} as the "
            f"weighted sum of its parts on {self.ranks.size} ranks: it is not a mean over rows. "
            "Within it, take sums over the batch by bilevel.ranks.share and other rows by "
            f"bilevel.ranks.rows; or {over.PART}"
        )

    @property
    def _name(self) -> str:
        return type(self.problem).__name__


def spread(problem: Any, ranks: Ranks) -> Any:
    """The problem over ranks; itself where there is one. Raises `ProblemError` where it is none."""
    if ranks.is_alone:
        return problem
    Levels(problem)
    # of the same name, which messages begin with
    kind = type(type(problem).__name__, (Spread,), {"__doc__": Spread.__doc__})
    return kind(problem, ranks)


def _rough(value: Tensor) -> float:
    """What two evaluations of a loss on the same rows, cut otherwise, may differ by."""
    dtype, where = value.dtype, value.device.type
    if torch.is_autocast_enabled(where):
        dtype = torch.get_autocast_dtype(where)
    # other sizes are other kernels, on a GPU with other roundings of their products
    return max(torch.finfo(dtype).eps ** 0.6, 1e-3 if where == "cuda" else 0.0)


def _prepare(outer: Spread, work: Any) -> Any:
    """The first rank's slow work before the others': they find what it has downloaded."""

    def prepare(device: torch.device) -> Iterator[Any]:
        def whole() -> Iterator[Any]:
            yield from work(device) if signature(work).parameters else work()

        yield from _by_the_first(outer.ranks, whole, "prepare")
        if not outer.ranks.is_first:
            with over.apart():
                yield from whole()

    return prepare


def _by_the_first(ranks: Ranks, work: Callable[[], Iterator[Any]], name: str) -> Any:
    """What a generator returns on the first rank, on all; its events there alone."""
    found: Any = None
    if ranks.is_first:
        try:
            with over.apart():
                found = yield from work()
        except GeneratorExit:
            raise
        except BaseException as error:
            ranks.from_first((None, f"{type(error).__name__}: {error}"))
            raise
    found, failed = ranks.from_first((found, ""))
    if failed:
        raise RankError(f"rank 0 failed in {name}: {failed}")
    return found


def _evaluate(outer: Spread, measure: Any) -> Any:
    def evaluate(x: Any, y: Any) -> Iterator[Any]:
        def whole() -> Any:
            found = measure(x, y)
            return (yield from found) if isinstance(found, Iterator) else found

        return (yield from _by_the_first(outer.ranks, whole, "evaluate"))

    return evaluate


def _figures(outer: Spread, draw: Any) -> Any:
    def figures(x: Any, y: Any) -> dict[str, Any]:
        if not outer.ranks.is_first:
            return {}
        with over.apart():
            return draw(x, y)

    return figures


def _of_the_whole(outer: Spread, method: Any) -> Any:
    """A method that has the whole batch, on every rank."""

    def call(*arguments: Any) -> Any:
        with over.apart():
            return method(*arguments)

    return call


_MAPS: Maps = {
    "prepare": _prepare,
    "place": _of_the_whole,
    "part": keep,  # not looked up here: it is a method of its own
    "lower_start": keep,
    "lower_solution": _of_the_whole,
    "hypergradient": _of_the_whole,
    "evaluate": _evaluate,
    "figures": _figures,
    "export": _of_the_whole,
    "episodes": keep,
    "project_upper": keep,
    "project_lower": keep,
    "prox_lower": keep,
    "lower_map": _of_the_whole,
    "lower_constraints": _of_the_whole,
    "lower_diagonal": _of_the_whole,
}
