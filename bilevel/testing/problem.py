"""`check_problem`: a problem held to the contract of `bilevel.problem.Problem`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from bilevel import calculus, rng, tree
from bilevel.calculus.fixed_point_maps import reached
from bilevel.errors import ProblemError
from bilevel.estimators.alternating import Alternating
from bilevel.lower.gradient import Gradient
from bilevel.lower.proximal import Proximal
from bilevel.problem.answers import initial
from bilevel.problem.levels import Levels
from bilevel.problem.purity import refuse_impure
from bilevel.rng import Streams
from bilevel.run.batches import Sampler
from bilevel.run.engine import Setup, prepare, start
from bilevel.run.upper import Upper
from bilevel.testing.derivatives import (
    Place,
    first_derivatives,
    hypergradient,
    second_derivatives,
    solution,
)
from bilevel.testing.findings import copied, difference, report
from bilevel.testing.reference import noise_like
from bilevel.types import Counts
from bilevel.unrolling.path import projected


def check_problem(problem: Any, *, seed: int = 0, second_order: bool = True) -> None:
    """Hold a problem to its contract, near its initial point, in float64 and then in float32.

    - `init` gives the same x and y for the same seed; batches too, and they resume where they were;
    - both losses are scalar, finite, of the dtype of x and y, and the same when asked again; they
      write to nothing and draw no random number;
    - every entry of x reaches a loss, and some of y the lower one;
    - gradients agree with differences of the losses, second derivatives of G with differences of
      its gradients, and ∂²yy G is symmetric;
    - `lower_solution` is stationary, and `hypergradient` is the derivative of F(x, y*(x));
    - projections rest where they have been, `lower_start` has the form of y, `evaluate` returns
      finite numbers and writes to nothing.

    A loss with kinks where it is differenced is not judged there. The problem is left placed on
    the CPU in float32.

    Args:
        problem: the component, its data small.
        seed: of its streams.
        second_order: False for a problem whose lower loss has no second derivative.

    Raises:
        CheckError: with everything that is wrong.
    """
    name = type(problem).__name__
    report(name, {"protocol": lambda: _protocol(problem)})
    at = _at(problem, seed, torch.float64)
    parts: dict[str, Callable[[], Iterator[str]]] = {
        "init": lambda: _init(at.problem, seed),
        "batches": lambda: _batches(at),
        "losses": lambda: _losses(at),
        "wiring": lambda: _wiring(at),
        "gradients": lambda: first_derivatives(at),
        "second derivatives": lambda: second_derivatives(at) if second_order else iter(()),
        "lower_solution": lambda: solution(at),
        "hypergradient": lambda: hypergradient(at),
        "projections": lambda: _projections(at),
        "lower_start": lambda: _start(at),
        "evaluate": lambda: _evaluate(at),
        "float32": lambda: _float32(at, seed),
    }
    report(name, parts)


def _protocol(problem: Any) -> Iterator[str]:
    try:
        Levels(problem)
    except ProblemError as error:
        yield str(error)


def _at(problem: Any, seed: int, dtype: torch.dtype) -> Place:
    """Off the initial point, which may be symmetric, in the sets that hold x and y."""
    lower = Proximal() if "prox_lower" in Levels(problem) else Gradient()
    setup = Setup(problem, lower, Upper(), Alternating(), seed=seed, dtype=dtype)
    for _ in prepare(setup):
        pass
    state, generator = start(setup), rng.stream(seed, "check problem")
    x, y = (
        tree.map(lambda p: p + 0.1 * noise_like(p, generator), side) for side in (state.x, state.y)
    )
    project = setup.levels.get("project_upper")
    with suppress(ProblemError):
        x = tree.detach(project(x)) if project else x
    losses = setup.levels.losses(next(state.upper_batches), next(state.lower_batches))
    with suppress(ProblemError):  # of a projection of another form, which `_projections` tells
        y = tree.detach(projected(losses.lower, y))
    return Place(setup, losses, x, y, generator)


def _init(problem: Any, seed: int) -> Iterator[str]:
    first, second = initial(problem, Streams(seed)), initial(problem, Streams(seed))
    for name, a, b in zip("xy", first, second, strict=True):
        if said := difference(tree.detach(a), tree.detach(b)):
            yield f"{name}: {said} from one call to the next with the same seed"


def _batches(at: Place) -> Iterator[str]:
    random = torch.random.get_rng_state()
    for level in ("upper", "lower"):
        one, other, later = (_sampler(at, level) for _ in range(3))
        drawn = [next(one) for _ in range(3)]
        if said := difference(drawn, [next(other) for _ in range(3)]):
            yield f"{level}_batches are not a function of their stream: {said}"
            continue
        saved = one.save()
        expected = [next(one) for _ in range(3)]
        later.restore(saved)
        if said := difference(expected, [next(later) for _ in range(3)]):
            yield f"{level}_batches do not resume where they were: {said}"
    if not torch.equal(random, torch.random.get_rng_state()):
        yield "draws from the global random state; the stream that is given is there for it"


def _sampler(at: Place, level: str) -> Sampler:
    make, setup = getattr(at.problem, f"{level}_batches"), at.setup
    return Sampler(make, setup.seed, f"{level}.batches", setup.device, setup.dtype)


def _losses(at: Place) -> Iterator[str]:
    for loss in at.both:
        refuse_impure(loss, at.x, at.y)
        random = torch.random.get_rng_state()
        inputs = {"x": at.x, "y": at.y, "the batch": loss.batch}
        kept = {name: copied(part) for name, part in inputs.items()}
        value, g_x, g_y = calculus.gradients(loss, at.point)
        again, *others = calculus.gradients(loss, at.point)
        if not torch.equal(value, again) or difference([g_x, g_y], others):
            yield f"{loss.level}_loss: another value at the same x, y and batch"
        if value.dtype != at.setup.dtype:
            yield (
                f"{loss.level}_loss is {value.dtype} where x, y and the batch are "
                f"{at.setup.dtype}: a constant of another dtype; see `place`"
            )
        for name, part in inputs.items():
            if said := difference(part, kept[name]):
                yield f"{loss.level}_loss writes into {name}: {said}"
        if not torch.equal(random, torch.random.get_rng_state()):
            yield f"{loss.level}_loss draws random numbers; they belong in the batch"


def _wiring(at: Place) -> Iterator[str]:
    counts = Counts()
    for loss in at.both:
        calculus.gradients(replace(loss, counts=counts), at.point)
    for name in sorted(at.x.keys() - counts.reached - reached(at.losses.lower, at.point)):
        yield f"x[{name!r}] reaches neither loss, so its hypergradient is always zero"
    _, g = calculus.gradient_y(at.losses.lower, at.x, at.y)
    if tree.norm(g) == 0:
        yield "∇y G = 0 off the initial point: y does not reach lower_loss"


def _projections(at: Place) -> Iterator[str]:
    for name, of in (("project_upper", at.x), ("project_lower", at.y)):
        project = at.setup.levels.get(name)
        if project is None:
            continue
        far = tree.map(lambda p: p + 3 * noise_like(p, at.generator), of)
        kept = tree.clone(far)
        try:
            once = tree.detach(project(far))
        except ProblemError as error:
            yield str(error)
            continue
        if difference(far, kept):
            yield f"{name} writes into what it is given"
        off = tree.norm(tree.sub(project(once), once))
        if not off <= 1e-9 * (1 + tree.norm(once)):
            yield f"{name} moves what it has projected, by {off:.1e}"


def _start(at: Place) -> Iterator[str]:
    restart = at.setup.levels.restart(at.y)
    if restart:
        try:
            restart(at.x)
        except ProblemError as error:
            yield str(error)


def _evaluate(at: Place) -> Iterator[str]:
    measure = at.setup.levels.get("evaluate")
    if measure is None:
        return
    kept = tree.clone(at.x), tree.clone(at.y)
    with at.setup.seeded("evaluate"):
        metrics = measure(at.x, at.y)
        if isinstance(metrics, Iterator):
            metrics = _last(metrics)
    for name, part, before in (("x", at.x, kept[0]), ("y", at.y, kept[1])):
        if said := difference(part, before):
            yield f"evaluate writes into {name}: {said}"
    bad = {key: value for key, value in metrics.items() if not isinstance(value, (int, float))}
    if bad:
        yield f"evaluate must return numbers, got {bad}"


def _last(steps: Iterator[Any]) -> Any:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def _float32(at: Place, seed: int) -> Iterator[str]:
    values = [float(loss(at.x, at.y)) for loss in at.both]
    narrow = _at(at.problem, seed, torch.float32)  # which places the problem's constants again
    for expected, loss in zip(values, narrow.both, strict=True):
        value = calculus.value(loss, narrow.x, narrow.y)
        if value.dtype != torch.float32:
            yield f"{loss.level}_loss is {value.dtype} where x, y and the batch are float32"
        if abs(float(value) - expected) > 1e-3 * (1 + abs(expected)):
            yield f"{loss.level}_loss = {float(value):.6g} in float32, {expected:.6g} in float64"
