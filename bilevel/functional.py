"""The functional core: hypergradients, lower solves and unrolled solutions of plain functions."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch

from bilevel import calculus, tree
from bilevel.calculus import fixed_point_maps
from bilevel.calculus.precision import require_resolved
from bilevel.errors import CheckError, ConvergenceError, ProblemError
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import SGD
from bilevel.problem.purity import refuse_impure
from bilevel.problem.second_derivatives import (
    refuse_missing_second_derivative,
    require_second_derivative,
)
from bilevel.problem.tied import Ties, bind
from bilevel.types import (
    ALL_STEPS,
    Counts,
    Estimate,
    Estimator,
    Function,
    Losses,
    LowerSolution,
    LowerSolver,
    Optimizer,
    Pairs,
    Params,
    Path,
    Point,
    Structure,
)
from bilevel.unrolling.path import replay, started


def hypergradient(
    upper_loss: Function,
    lower_loss: Function,
    x: Params,
    y: Params,
    *,
    estimator: Estimator,
    upper_batch: Any = None,
    lower_batch: Any = None,
    state: Any = None,
    path: Path | None = None,
    upper_batches: Iterable[Any] | None = None,
    lower_batches: Iterable[Any] | None = None,
    project: Callable[[Params], Params] | None = None,
    pairs: Pairs | None = None,
    structure: Structure | None = None,
) -> Estimate:
    """Estimate dΦ/dx of Φ(x) = F(x, y*(x)), y*(x) ∈ argmin over y of G(x, y), at (x, y).

        dΦ/dx = ∇x F − (∂²xy G)ᵀ v,    (∂²yy G) v = ∇y F

    Args:
        upper_loss: F(x, y, batch), a scalar; pure.
        lower_loss: G(x, y, batch), a scalar; pure.
        x: upper variables, name to floating-point tensor.
        y: lower variables, at (or near) the lower solution for x.
        estimator: the method, e.g. `bilevel.estimators.implicit.Implicit()`.
        upper_batch: third argument of `upper_loss`.
        lower_batch: third argument of `lower_loss`; best the batch of the last lower step.
        state: `Estimate.state` of the previous call: warm start. None starts cold, and checks
            that both losses are pure (two evaluations each) and, for an estimator that needs it,
            that custom autograd functions of G have their second derivative (`bilevel.problem.purity`).
        path: the recorded lower steps, for estimators that differentiate through them.
        upper_batches: where estimators that draw batches of their own take those for F from.
        lower_batches: the same for G.
        project: the projection onto the set that holds y, for estimators that know of it.
        pairs: `LowerSolution.pairs` of a quasi-Newton lower solve, for estimators that reuse them.
        structure: the proximal map, the constraints or the map T that y* answers to beside G, for
            estimators that know of them (`Needs.knows`).

    Returns:
        The hypergradient in the names, shapes and dtypes of x, F, the state and the evidence.
        Nothing is written to `.grad`, to x, to y or to a random state. Entries that are one
        tensor under two names (tied) are one variable and share its hypergradient.

    Raises:
        ProblemError: a loss is no scalar, is random, changes buffers, or has no second derivative or
            one that loses a part; or an upper variable reaches neither loss; or x or y is of a
            dtype too coarse for the differences that the estimator takes.
        ConvergenceError: a loss or the hypergradient is not finite, or the adjoint solve diverges.
        CheckError: the estimator returned other names or shapes than those of x.
    """
    _require_known(estimator, project, structure)
    return estimate_at(
        upper_loss,
        lower_loss,
        x,
        y,
        estimator=estimator,
        upper_batch=upper_batch,
        lower_batch=lower_batch,
        state=state,
        path=path,
        upper_batches=upper_batches,
        lower_batches=lower_batches,
        project=project,
        pairs=pairs,
        structure=structure,
    )


def estimate_at(
    upper_loss: Function,
    lower_loss: Function,
    x: Params,
    y: Params,
    *,
    estimator: Estimator,
    upper_batch: Any = None,
    lower_batch: Any = None,
    state: Any = None,
    path: Path | None = None,
    upper_batches: Iterable[Any] | None = None,
    lower_batches: Iterable[Any] | None = None,
    project: Callable[[Params], Params] | None = None,
    pairs: Pairs | None = None,
    structure: Structure | None = None,
) -> Estimate:
    """`hypergradient`, also where the estimator does not know what holds y: runs warn of that."""
    began = time.perf_counter()
    _refuse_inference()
    tree.require(x, "x")
    tree.require(y, "y")
    tied = Ties(x), Ties(y)
    x, y = tree.detach(tied[0].unique), tree.detach(tied[1].unique)
    at = Point(x, y, path, project, tied[1].restrict(pairs))
    losses = _drawing(
        bind(upper_loss, lower_loss, upper_batch, lower_batch, tied, structure),
        upper_batches,
        lower_batches,
    )
    first = state is None
    require_resolved(estimator, {entry.dtype for params in (x, y) for entry in params.values()})
    if first:
        for loss in (losses.upper, losses.lower):
            refuse_impure(loss, at.x, at.y)
        if estimator.needs.second_order and losses.lower.structure.map is None:
            refuse_missing_second_derivative(losses.lower, at)
        state = estimator.init(at)
    try:
        estimate = estimator.estimate(losses, at, state)
    except RuntimeError as error:
        _require_own(state, at, error)
        raise
    _require_shapes(estimator, estimate.hypergradient, at.x)
    if first:
        _require_reached(losses, at)
    if not tree.is_finite(estimate.hypergradient):
        bad = [n for n, entry in estimate.hypergradient.items() if not entry.isfinite().all()]
        raise ConvergenceError(
            f"the hypergradient of {', '.join(bad)} is not finite, the losses are; "
            "more damping, a shorter path or float64 may help"
        )
    counts = losses.counts
    stats = replace(
        estimate.stats,
        gradients=counts.gradients,
        hvps=counts.hvps,
        cross_products=counts.cross_products,
        seconds=time.perf_counter() - began,
    )
    moved = estimate.moved
    if moved is not None:
        moved = replace(moved, y=tied[1].expand(moved.y))
    return replace(
        estimate, hypergradient=tied[0].expand(estimate.hypergradient), stats=stats, moved=moved
    )


def solve_lower(
    lower_loss: Function,
    x: Params,
    y: Params | Callable[[Params], Params],
    *,
    solver: LowerSolver | None = None,
    batch: Any = None,
    batches: Iterable[Any] | None = None,
    state: Any = None,
    record: float | bool = False,
    project: Callable[[Params], Params] | None = None,
    structure: Structure | None = None,
) -> LowerSolution:
    """Approximately solve min over y of G(x, y), from y.

    Args:
        lower_loss: G(x, y, batch), a scalar; pure.
        x: upper variables, held fixed.
        y: where to start; not changed. Or the start as a function of x, which the recorded path
            then keeps, so that estimators that unroll differentiate through it (MAML).
        solver: `Gradient` (any torch.optim optimizer; default 20 SGD steps), `LBFGS` or `Newton`.
        batch: the one batch used in every step, or
        batches: one batch a step.
        state: `LowerSolution.state` of the previous call.
        record: True to record every step as `.path` for unrolling, or the number of last steps.
        project: the projection onto the set that holds y, applied after each step.
        structure: its `prox` is for `Proximal`, its `map` for `Iterate`.

    Raises:
        ProblemError: `record` with a solver whose steps cannot be replayed; a proximal map with
            a solver that would ignore it.
        ConvergenceError: G became NaN or infinite.
    """
    restart = None if isinstance(y, dict) else y
    y = y if isinstance(y, dict) else y(tree.detach(x))
    _refuse_inference()
    tree.require(y, "y")
    solver = solver or Gradient()
    keep = ALL_STEPS if record is True else float(record)
    if keep and not solver.records:
        raise ProblemError(
            f"{solver!r} takes no steps that can be replayed; "
            "use Gradient with sgd, adam, adamw or rmsprop"
        )
    if structure and structure.prox and not getattr(solver, "takes_prox", False):
        raise ProblemError(f"{solver!r} would ignore the proximal map; use Proximal")
    tied = Ties(x), Ties(y)
    loss = bind(lower_loss, lower_loss, batch, batch, tied, structure).lower
    draws = _batches(batch, batches)
    x, y = tree.detach(tied[0].unique), tree.clone(tied[1].unique)
    if state is None:
        first = next(draws)
        draws = itertools.chain([first], draws)
        refuse_impure(loss.on(first), x, y)
    start = solver.init(y) if state is None else state
    solution = solver.solve(loss, x, y, batches=draws, state=start, record=keep, project=project)
    solution = started(solution, restart and tied[1].shrunk(tied[0], restart))
    pairs = tied[1].expand_pairs(solution.pairs)
    return replace(solution, y=tied[1].expand(solution.y), pairs=pairs)


def unroll(
    lower_loss: Function,
    x: Params,
    y: Params,
    *,
    steps: int,
    optimizer: Optimizer | None = None,
    batch: Any = None,
    batches: Iterable[Any] | None = None,
) -> Params:
    """y_K after K lower steps from y, differentiable in x and y by ordinary autograd.

    Entries of x and y that require grad are the ones that gradients flow to. Memory grows with
    K graphs; `Unroll(memory="recompute")` gives the hypergradient without that. Before the first
    step G is looked at once (`bilevel.problem.purity`, `bilevel.problem.second_derivatives`): four
    evaluations, 1 gradient and 1 product of each kind, none of them inside torch.func.

    Raises:
        ProblemError: the optimizer's steps cannot be differentiated; or G is not a function of
            (x, y, batch) alone, writes into something, or has no second derivative.
        ConvergenceError: G became NaN or infinite.
    """
    optimizer = optimizer or SGD()
    if not optimizer.differentiable:
        raise ProblemError(
            f"{optimizer!r} writes in place and cannot be differentiated; "
            "use SGD, Adam, AdamW or RMSprop of bilevel.optimizers.differentiable"
        )
    tied = Ties(x), Ties(y)
    loss = bind(lower_loss, lower_loss, batch, batch, tied).lower
    draws = tuple(itertools.islice(_batches(batch, batches), steps))
    start = tied[1].unique
    if draws:
        at, first = Point(tree.detach(tied[0].unique), tree.detach(start)), loss.on(draws[0])
        refuse_impure(first, at.x, at.y)
        require_second_derivative(first, at)
    path = Path(optimizer, start, optimizer.init(start), draws)
    return tied[1].expand(replay(path, loss, tied[0].unique))


def _batches(batch: Any, batches: Iterable[Any] | None) -> Iterator[Any]:
    """One batch for ever, or the batches given; running out of them is an error."""
    if batches is None:
        yield from itertools.repeat(batch)
    yield from batches or ()
    raise ProblemError("batches ended; give one for every step, or itertools.cycle(batches)")


def _require_known(
    estimator: Estimator, project: Callable[[Params], Params] | None, structure: Structure | None
) -> None:
    """What holds y must be known to an estimator that says it differentiates the solution."""
    given = {
        "project_lower": project,
        "prox_lower": structure and structure.prox,
        "lower_constraints": structure and structure.constraints,
    }
    unknown = estimator.needs.unknown([name for name, held in given.items() if held])
    if unknown and estimator.claim in ("solution", "penalty"):
        name, others = {
            "project_lower": ("project", "FixedPoint or Unroll"),
            "prox_lower": ("structure.prox", "FixedPoint"),
            "lower_constraints": ("structure.constraints", "KKT"),
        }[unknown]
        raise ProblemError(
            f"{type(estimator).__name__} does not know {name}, and its hypergradient is wrong "
            f"where that is active; use {others}. Where y* lies inside, leave {name} out"
        )


def _refuse_inference() -> None:
    if torch.is_inference_mode_enabled():
        raise ProblemError(
            "under torch.inference_mode() nothing can be differentiated; call it outside, or use "
            "torch.no_grad(), which does no harm"
        )


def _require_own(state: Any, at: Point, error: Exception) -> None:
    """Raise `ProblemError` if an estimator failed with a state from a point of other shapes."""
    if isinstance(state, list):
        state = dict(enumerate(state))
    if not isinstance(state, dict):
        return
    for params in (at.x, at.y):
        differing = [n for n in params if _shape(state.get(n)) not in (None, _shape(params[n]))]
        if state.keys() == params.keys() and differing:
            name = differing[0]
            raise ProblemError(
                f"the state is of another problem: {name} has shape {_shape(state[name])} in it, "
                f"expected {_shape(params[name])}; pass state=None where the variables have changed"
            ) from error
    for part in state.values():
        _require_own(part, at, error)


def _shape(entry: Any) -> tuple[int, ...] | None:
    return tuple(entry.shape) if isinstance(entry, torch.Tensor) else None


def _require_shapes(estimator: Estimator, hypergradient: Params, x: Params) -> None:
    got = {name: tuple(entry.shape) for name, entry in hypergradient.items()}
    expected = {name: tuple(entry.shape) for name, entry in x.items()}
    if got != expected:
        raise CheckError(
            f"{type(estimator).__name__} returned a hypergradient with {got}; expected the names "
            f"and shapes of x: {expected}"
        )


def _drawing(losses: Losses, upper: Iterable[Any] | None, lower: Iterable[Any] | None) -> Losses:
    return Losses(
        replace(losses.upper, draws=None if upper is None else iter(upper)),
        replace(losses.lower, draws=None if lower is None else iter(lower)),
    )


def _require_reached(losses: Losses, at: Point) -> None:
    """An upper variable that influences neither loss is a wiring mistake: name it."""
    missing = at.x.keys() - losses.counts.reached
    if not missing:
        return
    apart = Counts()
    for loss in (losses.upper, losses.lower):
        calculus.gradient_x(replace(loss, counts=apart), at.x, at.y)
    missing = sorted(missing - apart.reached - fixed_point_maps.reached(losses.lower, at))
    if missing:
        raise ProblemError(
            f"upper variable {', '.join(missing)} reaches neither loss, so its hypergradient "
            "would be zero for ever: use it in upper_loss or lower_loss, or take it out of x "
            "(a .detach(), .item(), a copy into a module, or torch.no_grad() cuts it off). One "
            "that says where the lower level starts, and nothing else, needs estimator=unroll"
        )
