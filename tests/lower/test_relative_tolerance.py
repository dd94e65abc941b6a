"""Lower solvers stop at the same y whatever the scale of G, and of a warm start as of a cold one."""

import pytest
import torch

from bilevel import hypergradient, solve_lower
from bilevel.estimators import Implicit
from bilevel.lower import LBFGS, AugmentedLagrangian, Gradient, Newton, Proximal
from bilevel.lower.tolerance import curvature_along
from bilevel.optimizers import SGD
from bilevel.types import Counts, Loss, Structure

D = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
START = {"w": torch.zeros(3, dtype=torch.float64)}
SCALES = [1e-8, 1e8]


def problem(scale):
    """scale · Σ (d (w − s)² / 2 + (w − s)⁴ / 4): w* = s, curvature d there."""

    def loss(x, y, _):
        off = y["w"] - x["s"]
        return scale * ((D * off.square()).sum() / 2 + off.pow(4).sum() / 4)

    return loss


def x(s=2.0):
    return {"s": torch.tensor(s, dtype=torch.float64)}


def made(name, scale=1.0, **options):
    if name == "gradient":
        options = {"relative_tolerance": 1e-8, **options}
        return Gradient(steps=500, optimizer=SGD(lr=0.05 / scale), **options)
    return {"lbfgs": LBFGS, "newton": Newton, "proximal": Proximal}[name](**options)


DEFAULT = ["lbfgs", "newton", "proximal"]
NAMES = ["gradient", *DEFAULT]


def off(y, s=2.0):
    """‖w − s‖ / ‖s‖."""
    return float((y["w"] - s).norm() / (s * 3**0.5))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", NAMES)
def test_the_same_y_in_the_same_steps_at_every_scale(name, scale):
    one = solve_lower(problem(1.0), x(), START, solver=made(name))
    end = solve_lower(problem(scale), x(), START, solver=made(name, scale))
    assert one.stats.converged
    assert end.stats.converged
    assert one.stats.steps > 3
    assert (end.stats.steps, end.stats.gradients) == (one.stats.steps, one.stats.gradients)
    torch.testing.assert_close(end.y, one.y, rtol=1e-10, atol=0)
    # ‖w − s‖ ≤ ‖∇y G‖ / 1 ≤ 1e-8 L ‖w‖, with L ≤ 4 + 3 · 2² at the start
    assert off(end.y) <= 16e-8


@pytest.mark.parametrize("name", NAMES)
def test_an_absolute_tolerance_is_met_at_once_by_a_small_loss(name):
    """Negative control: what a default of 1e-8 was, at a scale of 1e-10."""
    absolute = {"tolerance": 1e-8, "relative_tolerance": None} if name == "gradient" else {}
    solver = made(name, 1e-10, **(absolute or {"tolerance": 1e-8}))
    end = solve_lower(problem(1e-10), x(), START, solver=solver)
    assert end.stats.converged
    # proximal gradient looks only after its first step
    assert off(end.y) > (0.01 if name == "proximal" else 0.9)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_the_default_solve_gives_the_hypergradient_at_every_scale(scale):
    """F = Σ w² / 2 at w* = s: dF/ds = Σ s. An absolute tolerance left it 34 % off at 1e-8."""
    solved = solve_lower(problem(scale), x(), START, solver=LBFGS())
    got = hypergradient(
        lambda x, y, _: y["w"].square().sum() / 2,
        problem(scale),
        x(),
        solved,
        estimator=Implicit(),
    )
    assert got.trusted
    assert float(got.hypergradient["s"]) == pytest.approx(6.0, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("state", ["kept", "new"])
@pytest.mark.parametrize("name", NAMES)
def test_a_warm_start_is_asked_no_more_than_a_cold_one(name, state, scale):
    """At the solution, to rounding or a little more, nothing is left to do, whatever is kept."""
    solver = made(name, scale)
    cold = solve_lower(problem(scale), x(), START, solver=solver)
    for shift in (1e-15, 1e-11):
        near = {"w": torch.full_like(D, 2.0 * (1 + shift))}
        kept = cold.state if state == "kept" else None
        warm = solve_lower(problem(scale), x(), near, solver=solver, state=kept)
        assert warm.stats.converged
        assert warm.stats.steps <= 1
        assert off(warm.y) <= 1e-10
        if name in ("lbfgs", "newton"):  # the scale of G is looked for where it is not kept
            assert warm.stats.gradients == (1 if kept else 2)
    moved = solve_lower(problem(scale), x(2.001), cold.y, solver=solver, state=cold.state)
    assert moved.stats.converged
    assert 0 < moved.stats.steps <= cold.stats.steps
    assert off(moved.y, 2.001) <= 16e-8


@pytest.mark.parametrize("solver", [LBFGS(steps=500), Newton()], ids=repr)
def test_a_start_far_out_does_not_loosen_it(solver):
    """Σ exp(w − s) − w: at w = s + 20 the gradient is 5e8, 1e-8 of which would be no tolerance."""

    def loss(x, y, _):
        return ((y["w"] - x["s"]).exp() - y["w"]).sum()

    far = {"w": torch.full_like(D, 22.0)}
    end = solve_lower(loss, x(), far, solver=solver)
    assert end.stats.converged
    assert off(end.y) <= 1e-6


@pytest.mark.parametrize("name", DEFAULT)
def test_a_solution_at_0_is_measured_by_where_solves_began(name):
    start = {"w": torch.ones(3, dtype=torch.float64)}
    end = solve_lower(problem(1.0), x(0.0), start, solver=made(name))
    assert end.stats.converged
    again = solve_lower(problem(1.0), x(0.0), end.y, solver=made(name), state=end.state)
    assert again.stats.converged
    assert again.stats.steps <= 1


@pytest.mark.parametrize("name", DEFAULT)
def test_float32_is_asked_for_what_it_has(name):
    def loss(x, y, _):
        return (D.float() * (y["w"] - x["s"]).square()).sum() / 2

    start = {"w": torch.zeros(3)}
    end = solve_lower(loss, {"s": torch.tensor(2.0)}, start, solver=made(name))
    assert end.stats.converged
    assert off(end.y) <= 1e-4


@pytest.mark.parametrize("scale", SCALES)
def test_constraints_are_met_at_the_same_y_at_every_scale(scale):
    """min Σ d (w − s)² / 2 over Σ w = 3: w = s − λ / d, in the same rounds."""
    structure = Structure(constraints=lambda x, y, _: {"equality": y["w"].sum() - 3})

    def solve(scale):
        def loss(x, y, _):
            return scale * (D * (y["w"] - x["s"]).square()).sum() / 2

        return solve_lower(loss, x(), START, solver=AugmentedLagrangian(), structure=structure)

    one, end = solve(1.0), solve(scale)
    assert end.stats.converged
    multiplier = (2.0 * 3 - 3) / (1 / D).sum()
    torch.testing.assert_close(end.y["w"], 2.0 - multiplier / D, rtol=1e-7, atol=0)
    assert end.stats.steps == one.stats.steps
    assert end.stats.loss == pytest.approx(scale * one.stats.loss, rel=1e-9)
    assert end.stats.gradient_norm <= 1e-7 * scale


def test_the_curvature_along_the_gradient():
    def loss(function):
        return Loss(function, None, Counts(), "lower")

    y = {"w": torch.tensor([3.0, 4.0], dtype=torch.float64)}
    quadratic = loss(lambda x, y, _: 5e-9 * y["w"].square().sum())
    assert curvature_along(quadratic, {}, y, {"w": 1e-8 * y["w"]}) == pytest.approx(1e-8, rel=1e-6)
    linear = loss(lambda x, y, _: (0.1 * y["w"]).sum() + 0.7 * y["w"][0])
    g = {"w": torch.tensor([0.8, 0.1], dtype=torch.float64)}
    assert curvature_along(linear, {}, y, g) == 0
    # a step along −g leaves the domain
    ends = loss(lambda x, y, _: y["w"].log().sum())
    edge = {"w": torch.tensor([1e-300, 1.0], dtype=torch.float64)}
    assert curvature_along(ends, {}, edge, {"w": torch.ones(2, dtype=torch.float64)}) == 0
