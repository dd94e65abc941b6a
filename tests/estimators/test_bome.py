"""BOME: its formula, its barrier, and where it leads."""

import pytest
import torch

from bilevel import hypergradient, tree
from bilevel.estimators.bome import Bome
from bilevel.lower.gradient import Gradient
from bilevel.lower.newton import Newton
from bilevel.optimizers.differentiable import SGD
from bilevel_problems.quadratic import Quadratic
from tests.cases import PROBLEMS, assert_close, closed_form, offset, relative
from tests.estimators.typed_out import LR, STEP, Typed, assert_moves, descend, run, solution, steps


@pytest.mark.parametrize("barrier", [0.5, 1e-3, 20.0])
def test_bome_equals_its_formula(here, barrier):
    case, start, at = here
    estimator = Bome(
        barrier=barrier, optimizer=STEP, lower=Gradient(steps=5, optimizer=SGD(lr=0.3))
    )
    y = start["y"]
    z = descend(y, at.G_y, 5, 0.3)
    q_x, q_y = at.G_x(y) - at.G_x(z), at.G_y(y)
    square = q_x @ q_x + q_y @ q_y
    strength = max(float(barrier - (at.F_x(y) @ q_x + at.F_y(y) @ q_y) / square), 0.0)
    got = case.estimate(estimator, start)
    assert_moves(got, at.F_x(y) + strength * q_x, y, at.F_y(y) + strength * q_y)
    assert got.moved.loss == pytest.approx(
        float(at.F(y)) + strength * float(at.G(y) - at.G(z)), rel=1e-12
    )
    assert got.stats.gradients == 3 + 5


def test_the_barrier_makes_the_gap_fall_at_its_rate_and_no_faster_than_needed():
    """⟨direction, ∇q⟩ = max(barrier ‖∇q‖², ⟨∇F, ∇q⟩): λ is 0 exactly where F alone lowers q enough."""
    seen = set()
    for seed in range(6):
        case = closed_form(PROBLEMS[0], seed)
        start, at = offset(case.y, 3.0, seed), Typed(case)
        y = start["y"]
        z = descend(y, at.G_y, 5, 0.3)
        q = torch.cat([at.G_x(y) - at.G_x(z), at.G_y(y)])
        F = torch.cat([at.F_x(y), at.F_y(y)])
        solver = Gradient(steps=5, optimizer=SGD(lr=0.3))
        for barrier in (0.01, 0.5, 5.0):
            got = case.estimate(Bome(barrier=barrier, optimizer=STEP, lower=solver), start)
            along = torch.cat([got.hypergradient["x"], (y - got.moved.y["y"]) / LR])
            least = barrier * float(q @ q)
            assert float(along @ q) == pytest.approx(max(least, float(F @ q)), rel=1e-8)
            seen.add(least > float(F @ q))
    assert seen == {True, False}, "one of the two cases was never met"


def test_bome_at_a_solved_lower_level_descends_the_upper_loss(here):
    case, _, at = here
    got = case.estimate(Bome(optimizer=STEP, lower=Newton()), tree.detach(case.y))
    y = case.y["y"]
    # ∇q is rounding there, λ whatever; at ∇q = 0 itself it is 0
    flat = hypergradient(
        lambda x, y, b: ((y["y"] - x["x"]) ** 2).sum(),
        lambda x, y, b: (y["y"] ** 2).sum() + 0 * x["x"].sum(),
        {"x": torch.ones(2)},
        {"y": torch.zeros(2)},
        estimator=Bome(optimizer=STEP),
    )
    assert torch.equal(flat.hypergradient["x"], torch.full((2,), 2.0))
    assert torch.allclose(flat.moved.y["y"], torch.full((2,), LR * 2.0))
    assert_close(got.hypergradient, {"x": at.F_x(y)}, rtol=1e-5)


def test_a_run_under_the_barrier_comes_near_the_solution():
    best = solution(Quadratic())
    estimator = Bome(optimizer=SGD(lr=0.02), lower=steps(10, 1.0))
    errors = [relative(run(estimator, count, 0.02)[1].x, best) for count in (1, 100, 400)]
    assert errors[0] > 1
    assert errors[2] < 0.5 * errors[1] < 0.2
    assert errors[2] < 0.1
