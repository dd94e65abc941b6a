"""Reverse differentiation through the lower steps. Franceschi et al. (2017), arXiv:1703.01785.

Truncated to the last steps: Shaban et al. (2019), arXiv:1810.10667. To the worst step, of a lower
level that is not convex: IAPTT, Liu, Liu, Zeng and Zhang (2021), arXiv:2110.00455.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from bilevel import calculus, tree
from bilevel.calculus.products import gradients
from bilevel.components import Slot, component
from bilevel.errors import ProblemError
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.learned import require_in_range, upper_entries
from bilevel.scalars.scalar import Recording
from bilevel.types import (
    Estimate,
    Iterates,
    Loss,
    Losses,
    Needs,
    Params,
    Path,
    PathIterates,
    Point,
    Stats,
)
from bilevel.unrolling import forward_over_reverse, reversible
from bilevel.unrolling.nested import flat, rebuild, zeros
from bilevel.unrolling.path import advance, along, pull_start, replay, require_steps, step
from bilevel.unrolling.traced import Pull, traced


@component
class Unroll:
    """d/dx F(x, y_K(x)) through the K recorded lower steps, and through y_0 where it depends on x.

    Exact for the function it differentiates; its distance to dΦ/dx falls with K as the lower
    iteration contracts. `last` differentiates the last steps only and holds what came before
    fixed, the start included: the error falls at the contraction rate in `last` (Shaban et al.
    2019, prop. 3.1).
    Costs 1 gradient, 1 HVP and 1 cross product a step, and 1 gradient for F. `recompute`, `traced`,
    `mixed` and `reversible` add 1 gradient a step, `checkpoint` 2; `mixed` adds 2 where the step is
    not affine in the gradient (Adam, RMSprop) or is projected. In a run all but `reversible` spare 1
    gradient a step: the lower solver keeps the graph of the steps that it takes (`store`), or the
    iterates that are kept anyway.

    `memory`: "store" keeps the graph of every step; "recompute" keeps every iterate and rebuilds
    one graph at a time; "traced" does that from a trace of one step, kept between calls and
    checked in each (`bilevel.unrolling.traced`); "mixed" keeps every iterate and takes the products
    forward over reverse (`bilevel.unrolling.forward_over_reverse`); "checkpoint" keeps each √K-th iterate;
    "reversible" keeps none and runs SGD with momentum backwards, in multiples of 2⁻⁴⁶, so that y_K
    and the result are those of `store` to K / (1 − momentum) such units times their sensitivity
    (`bilevel.unrolling.reversible`).
    `pessimistic` ends the path at its step k of the largest F(x, y_k), and so differentiates
    max over 1 ≤ k ≤ K of F(x, y_k(x)): for a lower level that is not convex, with the start
    learned (`learned_start`). K gradients and K values of F more, in a run the values alone.
    `along`: the steps to take and differentiate, from y, where the point comes with no path.

    Raises:
        ProblemError: no path, and no `along`; with "traced", a step that cannot be traced; with
            "mixed", a loss that forward mode cannot differentiate; with "reversible", steps that
            do not run backwards, |y| ≥ 2¹⁴, or a lower gradient that is not the same when asked again.
    """

    last: PositiveInt | None = None
    memory: Literal["store", "recompute", "checkpoint", "traced", "mixed", "reversible"] = "store"
    pessimistic: bool = False
    along: Annotated[Gradient | None, Slot("lower")] = None

    @property
    def needs(self) -> Needs:
        steps = 0 if self.along else self.last or math.inf
        shares = self.memory == "store" and not self.pessimistic
        return Needs(path=steps, graph=shares, iterates=self._iterates, learned=True)

    @property
    def _iterates(self) -> Iterates | None:
        """Those that are evaluated at: the lower solver passes them anyway."""
        if self.pessimistic or self.memory in ("recompute", "traced", "mixed"):
            return "each"
        return "root" if self.memory == "checkpoint" else None

    @property
    def claim(self) -> Literal["path"]:
        return "path"

    def init(self, at: Point) -> dict[str, Any]:
        return {}

    def estimate(self, losses: Losses, at: Point, state: dict[str, Any]) -> Estimate:
        path = self._cut(self.path(losses, at), losses, at.x)
        value, hypergradient = self._through(path, losses, at.x)
        return Estimate(hypergradient, value, state, Stats(iterations=len(path.batches)))

    def _through(self, path: Path, losses: Losses, x: Params) -> tuple[Tensor, Params]:
        """F at the end of the path, and its gradient in x, as `memory` says."""
        if self.memory == "reversible":
            return reversible.differentiate(path, losses, x)
        K = len(path.batches)
        losses.counts.hvps += K
        losses.counts.cross_products += K
        if self.memory == "store" or K == 0:
            return _store(path, losses, x)
        every = math.isqrt(K - 1) + 1 if self.memory == "checkpoint" else 1
        pull = {"traced": traced(_back), "mixed": forward_over_reverse.pull}.get(self.memory, _back)
        return _recompute(path, losses, x, every, pull)

    def objective(self, losses: Losses, at: Point) -> Callable[[Params], Tensor]:
        """x ↦ F(x, y_K(x)), or its maximum over the steps if `pessimistic`."""
        path = self.path(losses, at)
        return lambda x: along(self._cut(path, losses, x), losses)(x)

    def path(self, losses: Losses, at: Point) -> Path:
        """The steps that are differentiated, with those before `last` already taken."""
        path = at.path
        if path is None and self.along is not None:
            if not self.along.optimizer.differentiable:
                raise ProblemError("unroll.along: this optimizer's steps cannot be differentiated")
            rule = self.along.rule
            require_in_range(rule, at.x, at.y)
            batches = (losses.lower.batch,) * self.along.steps
            path = Path(rule, at.y, self.along.begin(rule.init(at.y)), batches)
        if path is None:
            raise ProblemError(
                "unroll has no lower steps to differentiate: of bilevel.hypergradient pass as y what "
                "bilevel.solve_lower(..., record=True) returns, or set `along`"
            )
        require_steps(path, self.last or math.inf, "Unroll")
        surplus = len(path.batches) - (self.last or len(path.batches))
        return advance(path, losses.lower, at.x, max(0, surplus))

    def _cut(self, path: Path, losses: Losses, x: Params) -> Path:
        """The path up to its step of the largest F, if `pessimistic`; the first of equal ones."""
        if not self.pessimistic or not path.batches:
            return path
        values, kept = [], path.iterates and path.iterates.along(path, x)
        passed = (
            (kept[k + 1][0] for k in range(len(path.batches))) if kept else _taken(path, losses, x)
        )
        with torch.no_grad():
            values = [calculus.value(losses.upper, x, y).item() for y in passed]
        most = values.index(max(values)) + 1
        batches = path.batches[:most]
        if kept:
            upto = {k: kept[k] for k in range(most + 1)}
            return replace(path, batches=batches, iterates=PathIterates(x, batches, upto))
        return replace(path, batches=batches)


def _taken(path: Path, losses: Losses, x: Params) -> Iterator[Params]:
    """y after each step of the path."""
    for _ in path.batches:
        path = advance(path, losses.lower, x, 1)
        yield path.start


def _store(path: Path, losses: Losses, x: Params) -> tuple[Tensor, Params]:
    kept = _kept(path, x)
    if kept:
        x, from_x, start, y = kept
        losses.counts.reached.update(upper_entries(path.optimizer, x))
    else:
        x = tree.leaves(x)
        y, from_x, start = replay(path, losses.lower, x), {}, {}
    with torch.enable_grad():
        value = calculus.value(losses.upper, x, y)
    losses.counts.gradients += 1
    h, at_start = calculus.through_from(value, x, start, losses, y)
    if from_x:
        h = tree.add(h, calculus.vjp(from_x, x, at_start, losses.lower, upper=True))
    return value.detach(), h


def _kept(path: Path, x: Params) -> tuple[Params, Params, Params, Params] | None:
    """(x as leaves, y_0 as a function of them if it is one, y_0 as leaves, y_K) of a graph that was kept.

    None where none was, or where it is of other steps or another start.
    """
    kept = path.graph and path.graph.take(path, x)
    if not kept:
        return None
    leaves, start, y = kept
    if path.restart is None:
        return leaves, {}, {}, y
    with torch.enable_grad():
        from_x = path.restart(leaves)
    if from_x.keys() != start.keys():
        return None
    if any(not torch.equal(from_x[name], entry) for name, entry in start.items()):
        return None
    return leaves, from_x, start, y


def _recompute(
    path: Path, losses: Losses, x: Params, every: int, pull: Pull
) -> tuple[Tensor, Params]:
    """The adjoint recursion backwards over segments of `every` steps, one step's graph at a time."""
    starts, final = _passed(path, x) or _forward(path, losses, x, every)
    value, total, F_y = gradients(losses.upper, Point(x, final.start))
    adjoint = (F_y, zeros(final.state))
    del final, F_y  # each as large as y, and of no use any more
    while starts:
        # taken out, so that the steps before it have its memory
        for one in reversed(list(_iterates(starts.pop(), losses, x))):
            part, adjoint = pull(one, losses.lower, x, adjoint)
            total = tree.axpy_(total, 1.0, part)
    return value, tree.axpy_(total, 1.0, pull_start(path, losses.lower, x, adjoint[0]))


def _passed(path: Path, x: Params) -> tuple[list[Path], Path] | None:
    """What `_forward` returns, from the iterates that the lower solver kept; None where it kept none."""
    kept = path.iterates and path.iterates.along(path, x)
    if not kept:
        return None
    parts = [
        Path(path.optimizer, *kept[first], path.batches[first:end])
        for first, end in itertools.pairwise(sorted(kept))
    ]
    return parts, Path(path.optimizer, *kept[max(kept)], ())


def _forward(path: Path, losses: Losses, x: Params, every: int) -> tuple[list[Path], Path]:
    """(the path at the start of each segment of `every` steps, what is left at its end)."""
    first, *others = [path.batches[i : i + every] for i in range(0, len(path.batches), every)]
    starts = [replace(advance(path, losses.lower, x, 0), batches=first)]
    final = advance(starts[0], losses.lower, x, len(first))
    # all at once: iterates allocated between the temporaries of the steps would leave holes that
    # the process holds on to, 120 MB resident where 71 are in use
    rows = [[torch.empty_like(leaf) for leaf in flat(_whole(final))] for _ in others]
    for segment, row in zip(others, rows, strict=True):
        starts.append(replace(_moved(final, row), batches=segment))
        final = advance(starts[-1], losses.lower, x, len(segment))
    return starts, final


def _whole(path: Path) -> dict[str, Any]:
    return {"start": path.start, "state": path.state}


@torch.no_grad()
def _moved(path: Path, row: list[Tensor]) -> Path:
    """The path with its iterate copied into the memory of `row`, where it fits: a state may grow."""
    here = _whole(path)
    leaves = flat(here)
    if Recording.tape and Recording.tape.makes_anew(row):
        return path
    if [(to.shape, to.dtype) for to in row] != [(leaf.shape, leaf.dtype) for leaf in leaves]:
        return path
    copies = [to.copy_(leaf) for to, leaf in zip(row, leaves, strict=True)]
    return replace(path, **rebuild(here, iter(copies)))


def _iterates(segment: Path, losses: Losses, x: Params) -> Iterator[Path]:
    """The one-step paths that a segment consists of."""
    while segment.batches:
        yield replace(segment, batches=segment.batches[:1])
        if len(segment.batches) == 1:
            return
        segment = advance(segment, losses.lower, x, 1)


def _back(
    one: Path, loss: Loss, x: Params, adjoint: tuple[Params, Any]
) -> tuple[Params, tuple[Params, Any]]:
    """(contribution to the hypergradient, adjoint before the step) of one step."""
    x, y = tree.leaves(x), tree.leaves(one.start)
    inputs = [leaf.detach().requires_grad_() for leaf in flat(one.state)]
    state = rebuild(one.state, iter(inputs))
    # finite: the step was taken on the way here
    y_next, state_next = step(one, loss, x, y, state, one.batches[0], evaluate=calculus.scalar)
    pairs = [
        (out, grad)
        for out, grad in zip(
            [*y_next.values(), *flat(state_next)],
            [*adjoint[0].values(), *flat(adjoint[1])],
            strict=True,
        )
        if out.requires_grad
    ]
    # one call for all: fetching y and x apart was 20 % slower
    found = calculus.grad(
        loss,
        [out for out, _ in pairs],
        [*x.values(), *y.values(), *inputs],
        grad_outputs=[grad for _, grad in pairs],
    )
    found = [
        torch.zeros_like(leaf) if g is None else g
        for leaf, g in zip([*x.values(), *y.values(), *inputs], found, strict=True)
    ]
    at_y, at_state = found[len(x) : len(x) + len(y)], found[len(x) + len(y) :]
    before = dict(zip(y, at_y, strict=True)), rebuild(one.state, iter(at_state))
    return dict(zip(x, found[: len(x)], strict=True)), before
