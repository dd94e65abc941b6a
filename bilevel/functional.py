"""The functional core: hypergradients, lower solves and unrolled solutions of plain functions."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from bilevel import tree
from bilevel.errors import ProblemError, RecipeError, UntrustedWarning
from bilevel.lower.start import at_start
from bilevel.optimizers.learned import require_in_range
from bilevel.problem.answers import structured
from bilevel.problem.cuts import lost
from bilevel.problem.estimation import estimate
from bilevel.problem.levels import require_offers, solve
from bilevel.problem.purity import refuse_impure
from bilevel.problem.remeasured import remeasured
from bilevel.problem.second_derivatives import require_second_derivative
from bilevel.problem.tied import Plain, Ties, bind
from bilevel.problem.trust import Step, reasons, unwarned
from bilevel.problem.unwritten import unwritten
from bilevel.registry.build import resolve
from bilevel.types import (
    ALL_STEPS,
    Estimate,
    Estimator,
    Function,
    Losses,
    LowerSolution,
    LowerSolver,
    Named,
    Optimizer,
    Params,
    Path,
    Point,
    Structure,
)
from bilevel.unrolling.path import replay, with_restart

Nested = Mapping[str, Any] | Sequence[Any]
"""Tensors in dicts, lists, tuples, named tuples or dataclasses, nested to any depth."""


def hypergradient(
    upper_loss: Function | Plain,
    lower_loss: Function | Plain,
    x: Params | Nested,
    y: Params | Nested | LowerSolution,
    *,
    estimator: Estimator | Named,
    upper_batch: Any = None,
    lower_batch: Any = None,
    state: Any = None,
    batches: tuple[Iterable[Any], Iterable[Any]] | None = None,
    structure: Structure | None = None,
) -> Estimate:
    """Estimate dΦ/dx of Φ(x) = F(x, y*(x)), y*(x) ∈ argmin over y of G(x, y), at (x, y).

        dΦ/dx = ∇x F − (∂²xy G)ᵀ v,    (∂²yy G) v = ∇y F

    Args:
        upper_loss: F(x, y, batch), or F(x, y), a scalar; pure.
        lower_loss: G(x, y, batch), or G(x, y), a scalar; pure.
        x: upper variables, name to floating-point tensor; or nested, as y may be: messages then
            name `layer.weight`, and the losses and the result have the containers given.
        y: lower variables, at (or near) the lower solution for x; or what `bilevel.solve_lower`
            returned, which brings its recorded path, its quasi-Newton pairs, its last batch and
            its structure to the estimators that use them.
        estimator: the method, e.g. `bilevel.estimators.Implicit()`; or its name, "implicit", or a
            mapping of `name` and options.
        upper_batch: third argument of `upper_loss`.
        lower_batch: third argument of `lower_loss`; best the batch of the last lower step, which
            is what it is where y is a `LowerSolution` and nothing is given.
        state: `Estimate.state` of the previous call: warm start. None starts cold, and checks
            that both losses are pure (two evaluations each) and, for an estimator that needs it,
            that custom autograd functions of G have their second derivative (`bilevel.problem.purity`);
            where y or damping leave a doubt it asks again (`bilevel.problem.remeasured`): that may
            double what the call costs.
        batches: iterables of batches for F and for G, where estimators that draw their own take
            them from.
        structure: what y* is beside the minimum of G (projection, proximal map, constraints, map T,
            known diagonal), for estimators that support it (`Needs.supports`).

    Returns:
        The hypergradient in the names, shapes and dtypes of x, F, the state and the evidence;
        `trusted` says whether to trust it and `reasons` why not, the lower solve included where y
        is a `LowerSolution`.
        Nothing is written to `.grad`, to x, to y or to a random state. Entries that are one
        tensor under two names (tied) are one variable and share its hypergradient.

    Raises:
        ProblemError: a loss is not a scalar, is random, changes buffers, or has no second derivative or
            one that loses a part; or an upper variable reaches neither loss; or x or y is of a
            dtype too coarse for the differences that the estimator takes; or the estimator would
            ignore what restricts y.
        ConvergenceError: a loss or the hypergradient is not finite, or the adjoint solve diverges.
        CheckError: the estimator returned other names or shapes than those of x.
        RecipeError: the estimator is a class, has an unknown name, or is none.

    Warns:
        UntrustedWarning: the evidence speaks against a hypergradient that claims to be that of the
            lower solution. Off with `warnings.filterwarnings("ignore", category=UntrustedWarning)`,
            from `bilevel.errors`.
    """
    path, pairs, solved = None, None, y if isinstance(y, LowerSolution) else None
    if isinstance(y, LowerSolution):
        structure = y.structure if structure is None else structure
        lower_batch = y.batch if lower_batch is None else lower_batch
        y, path, pairs = y.y, y.path, y.pairs
    structure = structured(structure) if structure else Structure()
    method: Estimator = resolve("estimators", estimator, "estimator")
    _refuse_ignored(method, structure)
    tied = _variables(x, y)
    at = Point(
        tree.detach(tied[0].unique), tree.detach(tied[1].unique), path, tied[1].restrict(pairs)
    )
    losses = _drawing(
        bind(upper_loss, lower_loss, upper_batch, lower_batch, tied, structure), batches
    )
    found = estimate(method, losses, at, state)
    cut: tuple[str, ...] = ()
    if state is None:
        found = remeasured(method, losses, at, found)
        cut = lost(losses, at, second_order=method.needs.second_order)
    if solved:
        solved = replace(solved, y=at.y, structure=structure)  # flat, where the caller's is nested
    step = Step(method, found, solved, at.x, losses.lower.batch)
    against = reasons(step)
    if against and step.claim == "solution":
        warnings.warn("; ".join(against), UntrustedWarning, stacklevel=2)
    found = replace(found, reasons=(*against, *cut) or unwarned(step), claim=step.claim)
    if tied[0].trivial and found.moved is None:
        return found
    moved = found.moved and replace(found.moved, y=tied[1].expand(found.moved.y))
    return replace(found, hypergradient=tied[0].expand(found.hypergradient), moved=moved)


def solve_lower(
    lower_loss: Function | Plain,
    x: Params | Nested,
    y: Params | Nested | Callable[[Params], Params],
    *,
    solver: LowerSolver | Named = "gradient",
    batch: Any = None,
    batches: Iterable[Any] | None = None,
    state: Any = None,
    record: float | bool = False,
    structure: Structure | None = None,
) -> LowerSolution:
    """Approximately solve min over y of G(x, y), from y.

    Args:
        lower_loss: G(x, y, batch), or G(x, y), a scalar; pure.
        x: upper variables, held fixed.
        y: where to start; not changed. Or the start as a function of x, which the recorded path
            then keeps, so that estimators that unroll differentiate through it (MAML).
        solver: `Gradient` (any torch.optim optimizer; default 20 SGD steps), `LBFGS` or `Newton`;
            or its name, or a mapping of `name` and options.
        batch: the one batch used in every step, or
        batches: one batch a step.
        state: `LowerSolution.state` of the previous call.
        record: True to record every step as `.path` for unrolling, or the number of last steps.
        structure: what y* is beside the minimum of G: `project` is applied after each step of
            `Gradient`, `prox` is for `Proximal`, `constraints` for `AugmentedLagrangian`, `map` for
            `Iterate`. The first two and `map` return y in the names, shapes and dtypes it has.

    Raises:
        ProblemError: `record` with a solver whose steps cannot be replayed; a projection, a proximal
            map or constraints with a solver that would ignore them, or one that returns another form of y.
        ConvergenceError: G or its gradient became NaN or infinite; it says whether at the start.
        RecipeError: the solver is a class, has an unknown name, or is none; or `record` is no number.
    """
    if not isinstance(record, Real) or not record >= 0:
        raise RecipeError(f"record = {record!r}; must be True, False, or a number of steps ≥ 0")
    restart = y if callable(y) else None
    if callable(y):
        tree.require(tree.flat(x, "x"), "x")
        y = y(tree.map_nested(Tensor.detach, x))
    tied = _variables(x, y)
    lower: LowerSolver = resolve("lower", solver, "solver")
    keep = ALL_STEPS if record is True else float(record)
    require_offers(lower, structure or Structure(), keep)
    held = structured(structure) if structure else None
    loss = bind(lower_loss, lower_loss, batch, batch, tied, held).lower
    draws = _batches(batch, batches)
    x, y = tree.detach(tied[0].unique), tree.clone(tied[1].unique)
    if state is None:
        first = next(draws)
        draws = itertools.chain([first], draws)
        with at_start(0):
            refuse_impure(loss.on(first), x, y)
    solution = solve(lower, loss, x, y, draws, state, keep)
    solution = with_restart(solution, restart and tied[1].shrunk(tied[0], restart))
    pairs = tied[1].expand_pairs(solution.pairs)
    return replace(solution, y=tied[1].expand(solution.y), pairs=pairs, structure=structure)


def unroll(
    lower_loss: Function | Plain,
    x: Params | Nested,
    y: Params | Nested,
    *,
    steps: int,
    optimizer: Optimizer | Named = "sgd",
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
        RecipeError: the optimizer is a class, has an unknown name, or is none; or `steps` is no count.
    """
    if not isinstance(steps, Integral) or isinstance(steps, bool) or steps < 0:
        raise RecipeError(f"steps = {steps!r}; must be an integer ≥ 0")
    tied = _variables(x, y)
    rule: Optimizer = resolve("optimizers", optimizer, "optimizer")
    if not rule.differentiable:
        raise ProblemError(
            f"{rule!r} writes in place and cannot be differentiated; "
            "use SGD, Adam, AdamW or RMSprop of bilevel.optimizers.differentiable"
        )
    loss = bind(lower_loss, lower_loss, batch, batch, tied).lower
    draws = tuple(itertools.islice(_batches(batch, batches), steps))
    start = tied[1].unique
    if draws:
        at, first = Point(tree.detach(tied[0].unique), tree.detach(start)), loss.on(draws[0])
        refuse_impure(first, at.x, at.y)
        require_second_derivative(first, at)
    require_in_range(rule, tied[0].unique, start)
    path = Path(rule, start, rule.init(start), draws)
    return tied[1].expand(replay(path, loss, tied[0].unique))


def _batches(batch: Any, batches: Iterable[Any] | None) -> Iterator[Any]:
    """One batch again and again, or the batches given; running out of them is an error."""
    if batches is None:
        yield from itertools.repeat(batch)
    yield from unwritten(batches or (), "batches")
    raise ProblemError("batches ended; give one for every step, or itertools.cycle(batches)")


def _refuse_ignored(estimator: Estimator, structure: Structure) -> None:
    """What restricts y must be known to an estimator that says it differentiates the solution."""
    ignored = estimator.needs.ignored(structure.restrictions)
    if ignored and estimator.claim in ("solution", "penalty"):
        field, others = {
            "project_lower": ("project", "FixedPoint or Unroll"),
            "prox_lower": ("prox", "FixedPoint"),
            "lower_constraints": ("constraints", "KKT"),
        }[ignored]
        raise ProblemError(
            f"{type(estimator).__name__} does not support {ignored} and would ignore it: its "
            f"hypergradient is wrong where that is active; use {others}. Where y* lies inside, "
            f"pass structure=Structure() without {field}"
        )


def _variables(x: Any, y: Any) -> tuple[Ties, Ties]:
    """x and y as flat dicts of the tensors that there are.

    Raises:
        ProblemError: they are not variables that a hypergradient may have.
    """
    if torch.is_inference_mode_enabled():
        raise ProblemError(
            "under torch.inference_mode() nothing can be differentiated; call it outside, or use "
            "torch.no_grad(), which does no harm"
        )
    for value, name in ((x, "x"), (y, "y")):
        flat = tree.flat(value, name)
        tree.require(flat, name)
        if name == "y" and not flat:
            raise ProblemError(
                "y is empty: a bilevel problem has lower variables, G is minimised in y"
            )
    return Ties(x, "x"), Ties(y, "y")


def _drawing(losses: Losses, batches: tuple[Iterable[Any], Iterable[Any]] | None) -> Losses:
    if batches is None:
        return losses
    upper = unwritten(batches[0], "batches[0]")
    lower = unwritten(batches[1], "batches[1]")
    return Losses(replace(losses.upper, draws=upper), replace(losses.lower, draws=lower))
