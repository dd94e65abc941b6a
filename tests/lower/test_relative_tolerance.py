"""A relative tolerance asks the same of y whatever the scale of G, and of a warm start as of a cold one."""

import pytest
import torch

from bilevel import solve_lower
from bilevel.lower import LBFGS, Gradient, Newton, Proximal
from bilevel.optimizers import SGD

D = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
START = {"w": torch.zeros(3, dtype=torch.float64)}
RELATIVE = 1e-6


def problem(scale):
    """G = scale · ½ Σ d (w − s)²: w* = s, and ‖∇y G‖ = scale · ‖d (w − s)‖."""
    return lambda x, y, _: scale * (D * (y["w"] - x["s"]).square()).sum() / 2


def x(s):
    return {"s": torch.tensor(s, dtype=torch.float64)}


def solvers(scale, **options):
    return {
        "gradient": Gradient(steps=500, optimizer=SGD(lr=0.3 / scale), **options),
        "lbfgs": LBFGS(**options),
        "newton": Newton(**options),
        "proximal": Proximal(steps=500, lr=0.2 / scale, **options),
    }


def off(y, s):
    """‖d (w − s)‖, relative to that at w = 0 and s = 2."""
    return float((D * (y["w"] - s)).norm() / (2 * D.norm()))


@pytest.mark.parametrize("name", ["gradient", "lbfgs", "newton", "proximal"])
@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e8])
def test_it_asks_the_same_of_y_at_every_scale(name, scale):
    solver = solvers(scale, relative_tolerance=RELATIVE)[name]
    end = solve_lower(problem(scale), x(2.0), START, solver=solver)
    assert end.stats.converged
    assert end.stats.steps > 0
    assert off(end.y, 2.0) <= RELATIVE


@pytest.mark.parametrize("name", ["gradient", "lbfgs", "newton", "proximal"])
def test_an_absolute_tolerance_is_met_at_once_by_a_small_loss(name):
    """Negative control: what the relative one is for."""
    solver = solvers(1e-12, tolerance=1e-8)[name]
    end = solve_lower(problem(1e-12), x(2.0), START, solver=solver)
    assert end.stats.converged
    # proximal gradient looks only after its first step
    assert off(end.y, 2.0) > (0.01 if name == "proximal" else 0.9)


@pytest.mark.parametrize("name", ["gradient", "lbfgs", "newton", "proximal"])
def test_a_warm_start_is_measured_against_the_cold_one(name):
    solver = solvers(1.0, relative_tolerance=RELATIVE)[name]
    cold = solve_lower(problem(1.0), x(2.0), START, solver=solver)
    near = {"w": torch.full_like(D, 2.0 + 1e-9)}
    warm = solve_lower(problem(1.0), x(2.0), near, solver=solver, state=cold.state)
    assert warm.stats.converged
    assert warm.stats.steps <= 1
    # control: with a new state the same start is its own reference, and is not good enough
    alone = solve_lower(problem(1.0), x(2.0), near, solver=solver)
    assert alone.stats.steps > warm.stats.steps
    moved = solve_lower(problem(1.0), x(3.0), warm.y, solver=solver, state=warm.state)
    assert moved.stats.converged
    assert off(moved.y, 3.0) <= RELATIVE
