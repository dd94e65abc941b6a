"""The run: lower steps, estimate, upper step, as a generator of events.

While the generator is suspended its state is still, so whoever drives it may save the state after
any event, and a test is `list(run(setup, state))`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from bilevel import calculus, rng, tree
from bilevel.errors import ConvergenceError, ProblemError
from bilevel.events import (
    Drawn,
    Evaluated,
    Event,
    Finished,
    Progress,
    Started,
    Stepped,
    Totals,
    Warned,
)
from bilevel.functional import hypergradient
from bilevel.lower.recorded import started
from bilevel.problem import Problem, restart_of, structure_of
from bilevel.rng import Streams
from bilevel.samplers import Draws, Sampler, paired
from bilevel.types import (
    Counts,
    Estimate,
    Estimator,
    Loss,
    LowerSolution,
    LowerSolver,
    LowerStats,
    Moved,
    Params,
    Stats,
)
from bilevel.upper import Upper


@dataclass(frozen=True)
class Setup:
    """Everything a run is made of; assembled from a recipe, or by hand."""

    problem: Problem
    lower: LowerSolver
    upper: Upper
    estimator: Estimator
    name: str = "run"
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    evaluate_every: int = 0
    """Upper steps between evaluations; 0 evaluates before and after only."""


@dataclass
class State:
    """Where a run is. All that the next step depends on is here."""

    step: int
    x: Params
    y: Params
    lower: Any
    upper: Any
    estimator: Any
    """None before the first estimate."""
    upper_batches: Draws
    lower_batches: Draws
    totals: Totals = field(default_factory=Totals)
    warned: list[str] = field(default_factory=list)

    def save(self) -> dict[str, Any]:
        """Nested dicts of tensors, numbers and strings, from which `restore` rebuilds the state."""
        return {
            "step": self.step,
            "x": self.x,
            "y": self.y,
            "lower": self.lower,
            "upper": self.upper,
            "estimator": self.estimator,
            "upper_batches": self.upper_batches.save(),
            "lower_batches": self.lower_batches.save(),
            "totals": asdict(self.totals),
            "warned": list(self.warned),
        }


def prepare(setup: Setup) -> Iterator[Event]:
    """Refuse what cannot work, then let the problem do its slow work, then place it."""
    refuse_mismatch(setup)
    work = getattr(setup.problem, "prepare", None)
    if work:
        yield from work()
    place = getattr(setup.problem, "place", None)
    if place:
        place(setup.device, setup.dtype)


def refuse_mismatch(setup: Setup) -> None:
    """Raise `ProblemError` for a combination that makes no sense, before anything slow."""
    required = ("init", "upper_loss", "lower_loss", "upper_batches", "lower_batches")
    missing = [name for name in required if not callable(getattr(setup.problem, name, None))]
    if missing:
        raise ProblemError(
            f"{type(setup.problem).__name__} is no problem: it has no {', '.join(missing)}; "
            "see bilevel.problem.Problem"
        )
    if setup.estimator.needs.path and not setup.lower.records:
        raise ProblemError(
            f"estimator {type(setup.estimator).__name__} differentiates through the lower steps, "
            f"and those of {setup.lower!r} cannot be replayed; use lower: gradient with optimizer "
            "sgd, adam, adamw or rmsprop, or estimator: implicit"
        )
    if setup.estimator.needs.pairs and not getattr(setup.lower, "gives_pairs", False):
        raise ProblemError(
            f"estimator {type(setup.estimator).__name__} reuses the curvature that a quasi-Newton "
            f"lower solver met, and {setup.lower!r} keeps none; use lower: lbfgs, or "
            "estimator: implicit"
        )
    _refuse_unheld(setup)


def _refuse_unheld(setup: Setup) -> None:
    """Nothing may move y that does not know what holds it."""
    problem, needs = setup.problem, setup.estimator.needs
    prox = hasattr(problem, "prox_lower")
    if needs.moves_upper and hasattr(problem, "project_upper"):
        raise ProblemError(
            f"estimator {type(setup.estimator).__name__} moves x itself and knows no project_upper, "
            "so what it accepts is not where x would be; use estimator: implicit"
        )
    for name in ("project_lower", "prox_lower"):
        if hasattr(problem, name) and needs.moves_lower and name not in needs.knows:
            raise ProblemError(
                f"estimator {type(setup.estimator).__name__} moves y itself and knows no {name}, so y "
                "would leave its set; use estimator: fixed_point, or unroll for a projection"
            )
    if prox and not getattr(setup.lower, "takes_prox", False):
        raise ProblemError(
            f"the problem has prox_lower, and {setup.lower!r} would ignore it; use lower: proximal"
        )
    held = prox or hasattr(problem, "project_lower")
    if hasattr(problem, "lower_constraints") and not held:
        raise ProblemError(
            "the problem has lower_constraints and neither project_lower nor prox_lower, so that "
            "no lower solver would keep y within them; add the projection"
        )


def start(setup: Setup) -> State:
    """The state before the first step."""
    x, y = setup.problem.init(Streams(setup.seed))
    for params, name in ((x, "x"), (y, "y")):
        tree.require(params, name)
        if len({id(entry) for entry in params.values()}) < len(params):
            raise ProblemError(f"{name} holds one tensor under two names; give it one name")
    if not y:
        raise ProblemError("y is empty: a bilevel problem has lower variables")
    x, y = (
        tree.contiguous(tree.clone(tree.to(params, setup.device, setup.dtype))) for params in (x, y)
    )
    upper_batches, lower_batches = _draws(setup)
    return State(
        step=0,
        x=x,
        y=y,
        lower=setup.lower.init(y),
        upper=setup.upper.optimizer.init(x),
        estimator=None,
        upper_batches=upper_batches,
        lower_batches=lower_batches,
    )


def _draws(setup: Setup) -> tuple[Draws, Draws]:
    """Where the (upper, lower) batches come from: one by one, or in pairs that belong together."""

    def sampler(make: Any, name: str) -> Sampler:
        return Sampler(make, setup.seed, name, setup.device, setup.dtype)

    episodes = getattr(setup.problem, "episodes", None)
    if episodes is not None:
        return paired(sampler(episodes, "episodes"))
    return (
        sampler(setup.problem.upper_batches, "upper.batches"),
        sampler(setup.problem.lower_batches, "lower.batches"),
    )


def restore(setup: Setup, saved: dict[str, Any]) -> State:
    """The state that `State.save` described, on the setup's device."""
    state = start(setup)
    for name in ("x", "y", "lower", "upper", "estimator"):
        setattr(state, name, _on(saved[name], setup.device))
    state.upper_batches.restore(saved["upper_batches"])
    state.lower_batches.restore(saved["lower_batches"])
    state.step, state.warned = saved["step"], list(saved["warned"])
    state.totals = Totals(**saved["totals"])
    return state


def run(setup: Setup, state: State) -> Iterator[Event]:
    """Take the upper steps that are left, from `state`, which is advanced in place.

    Raises:
        ConvergenceError: a loss or a hypergradient is not finite; the message names the step, and
            the state is that of the last good step.
    """
    began, steps = time.perf_counter(), setup.upper.steps
    yield Started(
        state.step,
        steps,
        setup.name,
        tree.size(state.x),
        tree.size(state.y),
        str(setup.device),
        str(setup.dtype).removeprefix("torch."),
    )
    yield from _caution(setup, state)
    if state.step == 0:
        yield from evaluate(setup, state)
    while state.step < steps:
        yield from _advance(setup, state)
        due = setup.evaluate_every and state.step % setup.evaluate_every == 0
        if due or state.step == steps:
            yield from evaluate(setup, state)
    yield from _draw(setup, state)
    yield Finished(state.step, "done", time.perf_counter() - began)


def _caution(setup: Setup, state: State) -> Iterator[Warned]:
    """What is known to go wrong before the first step; raises where it cannot go right."""
    if state.step:
        return
    problem, stream = setup.problem, rng.stream(setup.seed, "inspection")
    counts = Counts()
    for loss, make in (
        (Loss(problem.upper_loss, None, counts, "upper"), problem.upper_batches),
        (Loss(problem.lower_loss, None, counts, "lower"), problem.lower_batches),
    ):
        batch = tree.to(next(iter(make(stream)), None), setup.device, setup.dtype)
        calculus.refuse_impure(loss.on(batch), state.x, state.y)
    caution = getattr(setup.estimator, "caution", None)
    if caution:
        state.warned.append("estimator")
        yield Warned(0, "estimator", caution)
    name = unknown_to(setup.estimator, problem)
    if name and setup.estimator.claim in ("solution", "penalty"):
        state.warned.append("projection")
        yield Warned(
            0,
            "projection",
            f"{name} shapes the lower solution, and {type(setup.estimator).__name__} does not know "
            "it: the hypergradient is wrong where it is active; estimator: fixed_point knows, "
            "unroll a projection, kkt what lower_constraints says",
        )


def unknown_to(estimator: Estimator, problem: Any) -> str | None:
    """What holds a problem's y that the estimator does not take into account, if anything."""
    knows = estimator.needs.knows
    if "lower_constraints" in knows and hasattr(problem, "lower_constraints"):
        return None  # they say the same as the projection
    for name in ("project_lower", "prox_lower"):
        if hasattr(problem, name) and name not in knows:
            return name
    return None


def evaluate(setup: Setup, state: State) -> Iterator[Event]:
    """The problem's own measures at the present point, if it has any."""
    measure = getattr(setup.problem, "evaluate", None)
    if measure is None:
        return
    began = time.perf_counter()
    metrics = measure(state.x, state.y)
    if isinstance(metrics, Iterator):
        metrics = yield from metrics
    yield Evaluated(state.step, metrics, time.perf_counter() - began)


def _draw(setup: Setup, state: State) -> Iterator[Event]:
    draw = getattr(setup.problem, "figures", None)
    if draw is None:
        return
    yield Progress("figures", 0)
    for name, figure in draw(state.x, state.y).items():
        yield Drawn(state.step, name, figure)


def _advance(setup: Setup, state: State) -> Iterator[Event]:
    """One upper step. `state` changes only once all that can fail has not."""
    began = time.perf_counter()
    for draws in (state.upper_batches, state.lower_batches):
        draws.renew()
    try:
        solution = _solve_lower(setup, state)
        upper_batch = next(state.upper_batches)
        estimate = _estimate(setup, state, solution, upper_batch)
    except ConvergenceError as error:
        raise ConvergenceError(f"step {state.step + 1}: {error}") from error
    if estimate.moved:
        solution = _moved(solution, estimate.moved)
    with torch.no_grad():
        if estimate.step is None:
            x, upper = setup.upper.optimizer.step(state.x, estimate.hypergradient, state.upper)
        else:
            x, upper = tree.axpy(-estimate.step, estimate.hypergradient, state.x), state.upper
        project = getattr(setup.problem, "project_upper", None)
        x = project(x) if project else x
    for level, after in (("upper", x), ("lower", solution.y)):
        if not tree.is_finite(after):
            raise ConvergenceError(
                f"step {state.step + 1}: the {level} step made a variable that is not finite; "
                f"lower {level}.optimizer.lr"
            )
    # plain memory: a checkpoint keeps values, not strides, and sums depend on their order
    state.x, state.y, state.upper, state.lower, state.estimator = (
        tree.contiguous(part) for part in (x, solution.y, upper, solution.state, estimate.state)
    )
    state.step += 1
    stats, lower = estimate.stats, solution.stats
    state.totals = state.totals.plus(
        gradients=stats.gradients + lower.gradients,
        hvps=stats.hvps + lower.hvps,
        cross_products=stats.cross_products,
    )
    yield from _warnings(state, stats)
    yield Stepped(
        state.step,
        float(estimate.value),
        lower.loss,
        tree.norm(estimate.hypergradient),
        lower,
        stats,
        state.totals,
        time.perf_counter() - began,
    )


def _solve_lower(setup: Setup, state: State) -> LowerSolution:
    problem, y, lower = setup.problem, state.y, state.lower
    restart = restart_of(problem, y)
    if restart:
        y = tree.detach(restart(state.x))
        lower = setup.lower.init(y)
    if setup.estimator.needs.moves_lower and state.x:
        untaken = LowerStats(0, 0, math.nan, math.nan)
        return LowerSolution(y, lower, untaken, next(state.lower_batches))
    solution = setup.lower.solve(
        Loss(problem.lower_loss, None, Counts(), "lower", structure=structure_of(problem)),
        state.x,
        y,
        batches=state.lower_batches,
        state=lower,
        record=setup.estimator.needs.path if state.x else 0,
        project=getattr(problem, "project_lower", None),
    )
    return started(solution, restart)


def _estimate(setup: Setup, state: State, solution: LowerSolution, upper_batch: Any) -> Estimate:
    problem = setup.problem
    if not state.x:  # one level only: F is watched, not descended
        loss = Loss(problem.upper_loss, upper_batch, Counts(), "upper")
        with torch.no_grad():
            return Estimate({}, calculus.value(loss, {}, solution.y), None, Stats())
    return hypergradient(
        problem.upper_loss,
        problem.lower_loss,
        state.x,
        solution.y,
        estimator=setup.estimator,
        upper_batch=upper_batch,
        lower_batch=solution.batch,
        state=state.estimator,
        path=solution.path,
        upper_batches=state.upper_batches,
        lower_batches=state.lower_batches,
        project=getattr(problem, "project_lower", None),
        pairs=solution.pairs,
        structure=structure_of(problem),
    )


def _moved(solution: LowerSolution, moved: Moved) -> LowerSolution:
    """What the estimator did to y; its gradients are counted with the estimate."""
    stats = LowerStats(moved.steps, 0, moved.loss, moved.gradient_norm)
    return replace(solution, y=moved.y, stats=stats)


def _warnings(state: State, stats: Stats) -> Iterator[Warned]:
    found = {}
    if stats.curvature is not None and stats.curvature <= 0:
        found["curvature"] = (
            f"the lower Hessian has curvature {stats.curvature:.3g} along a search direction: it "
            "is not positive definite here, so the adjoint is not reliable. Take more lower "
            "steps, or set estimator.damping above its size"
        )
    elif stats.degenerate:
        found["degenerate"] = (
            f"{stats.degenerate} of the lower level's kinks or active constraints are active only "
            "just, or in doubt: the hypergradient is that of one side. Take more lower steps; if "
            "it stays, Φ has no derivative here"
        )
    elif stats.converged is False and stats.residual is None:
        found["inner solve"] = (
            "the estimator's inner solve did not reach its tolerance; give estimator.solver more "
            "steps, or raise estimator.strength if the penalised problem has no minimum"
        )
    elif stats.converged is False:
        found["adjoint"] = (
            f"the adjoint solve ended after {stats.iterations} iterations at a relative residual "
            f"of {stats.residual:.2g}, above its tolerance; raise estimator.solver.iterations, or loosen "
            "estimator.solver.tolerance"
        )
    for kind, message in found.items():
        if kind not in state.warned:
            state.warned.append(kind)
            yield Warned(state.step, kind, message)


def _on(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _on(item, device) for key, item in value.items()}
    if isinstance(value, list):
        return [_on(item, device) for item in value]
    return value
