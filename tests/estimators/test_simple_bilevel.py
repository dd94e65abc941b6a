"""One variable at both levels: θ = y, x empty; F = ½ ‖θ − c‖², G = ½ ‖A θ − b‖², A with few rows.

The solution is the projection of c on {A θ = b}, c + A⁺ (b − A c).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cached_property

import pytest
import torch

from bilevel.comparing import scene
from bilevel.errors import ProblemError, RecipeError
from bilevel.estimators.aggregation import Aggregation
from bilevel.estimators.alternating import Alternating
from bilevel.estimators.bome import Bome
from bilevel.estimators.dynamic_barrier import DynamicBarrier
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.joint import Joint
from bilevel.estimators.rising_penalty import RisingPenalty
from bilevel.events import Warned
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import SGD
from bilevel.run import engine
from bilevel.run.engine import Setup
from bilevel.run.upper import Upper
from bilevel.testing import check, path_agreement
from tests.estimators.typed_out import LR, STEP, assert_moves


@dataclass(frozen=True)
class NearestFit:
    """Rows of A orthogonal, of norms from 1 to ½: G curves by 1 at most."""

    rows: int = 3
    seed: int = 0

    @cached_property
    def data(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        g = torch.Generator().manual_seed(self.seed)
        basis = torch.linalg.qr(torch.randn(6, 6, generator=g, dtype=torch.float64))[0]
        sizes = torch.linspace(1.0, 0.5, 3, dtype=torch.float64)[: self.rows]
        b, c = (torch.randn(n, generator=g, dtype=torch.float64) for n in (self.rows, 6))
        return sizes[:, None] * basis[: self.rows], b, c

    @property
    def best(self) -> torch.Tensor:
        A, b, c = self.data
        return c + torch.linalg.pinv(A) @ (b - A @ c)

    def init(self, streams):
        return {}, {"theta": torch.full((6,), 0.5)}

    def upper_loss(self, x, y, batch):
        return 0.5 * (y["theta"] - self.data[2]).square().sum()

    def lower_loss(self, x, y, batch):
        A, b, _ = self.data
        return 0.5 * (A @ y["theta"] - b).square().sum()

    def upper_batches(self, stream):
        return itertools.repeat(None)

    lower_batches = upper_batches


def setup(estimator, steps=1, problem=None, lower=None):
    return Setup(
        problem=problem or NearestFit(),
        lower=lower or Gradient(steps=1),
        upper=Upper(steps=steps),
        estimator=estimator,
        dtype=torch.float64,
    )


def ended(estimator, steps, problem=None) -> torch.Tensor:
    made = setup(estimator, steps, problem)
    state = engine.start(made)
    for _ in engine.run(made, state):
        pass
    return state.y["theta"]


def distance(estimator, steps, problem=None) -> float:
    problem = problem or NearestFit()
    return float((ended(estimator, steps, problem) - problem.best).norm())


def slopes(problem, theta):
    """(G, ∇F, ∇G) written down."""
    A, b, c = problem.data
    r = A @ theta - b
    return 0.5 * r @ r, theta - c, A.T @ r


START = torch.full((6,), 0.5, dtype=torch.float64)


# ---- directions


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("barrier", "lowest", "rate"),
    [(0.5, None, None), (1e-3, None, None), (20.0, 0.0, 1.0), (20.0, 1e3, 1.0)],
)
def test_the_barrier_equals_its_formula(barrier, lowest, rate, seed):
    problem = NearestFit(seed=seed)
    G, f, g = slopes(problem, START)
    least = barrier * g @ g
    if lowest is not None:
        least = min(rate * (G - lowest), least)
    strength = max(0.0, float((least - f @ g) / (g @ g)))
    estimator = DynamicBarrier(barrier=barrier, lowest=lowest, rate=rate, optimizer=STEP)
    expected = START - LR * (f + strength * g)
    torch.testing.assert_close(ended(estimator, 1, problem), expected, rtol=1e-13, atol=1e-13)


def test_by_hand():
    """θ = (2, 1), F = ½ ‖θ‖², G = ½ (θ₁ − 4)²: ∇F = (2, 1), ∇G = (−2, 0), λ = (½·4 + 4) / 4 = 1.5."""

    class Two(NearestFit):
        data = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([4.0]).double(), torch.zeros(2)

        def init(self, streams):
            return {}, {"theta": torch.tensor([2.0, 1.0])}

    steps = setup(DynamicBarrier(optimizer=SGD(lr=1.0)), 1, Two())
    state = engine.start(steps)
    event = next(e for e in engine.run(steps, state) if hasattr(e, "upper_loss"))
    assert state.y["theta"].tolist() == [2 - (2 - 1.5 * 2), 1 - 1]
    assert (event.upper_loss, event.lower_loss, event.totals.gradients) == (2.5, 2.0, 2)
    assert event.lower.gradient_norm == pytest.approx(2**0.5)
    # two steps of G + F / λ with λ = 2 (k + 1): θ₁ 2 → 2 + 2 − 1 = 3, → 3 + 1 − ¾; θ₂ 1 → ½ → 3/8
    found = ended(RisingPenalty(strength=2.0, growth=1.0, optimizer=SGD(lr=1.0)), 2, Two())
    assert found.tolist() == [3.25, 0.375]


def test_G_falls_at_the_rate_asked_and_no_faster_than_needed():
    """⟨direction, ∇G⟩ is the larger of φ and ⟨∇F, ∇G⟩, both of which are met."""
    seen = set()
    for seed, barrier in itertools.product(range(6), (0.01, 0.5, 5.0)):
        problem = NearestFit(seed=seed)
        _, f, g = slopes(problem, START)
        along = (START - ended(DynamicBarrier(barrier=barrier, optimizer=STEP), 1, problem)) / LR
        least = float(barrier * g @ g)
        assert float(along @ g) == pytest.approx(max(least, float(f @ g)), rel=1e-10)
        seen.add(least > float(f @ g))
    assert seen == {True, False}


def test_with_upper_variables_both_move_along_the_sum(here):
    case, start, at = here
    y = start["y"]
    got = case.estimate(DynamicBarrier(optimizer=STEP), start)
    f, g = torch.cat([at.F_x(y), at.F_y(y)]), torch.cat([at.G_x(y), at.G_y(y)])
    strength = max(0.0, float(0.5 - f @ g / (g @ g)))
    assert_moves(got, at.F_x(y) + strength * at.G_x(y), y, at.F_y(y) + strength * at.G_y(y))
    rising = case.estimate(RisingPenalty(strength=4.0, growth=1.0, optimizer=STEP), start)
    assert_moves(rising, at.F_x(y) + 4 * at.G_x(y), y, at.G_y(y) + at.F_y(y) / 4)
    assert rising.moved.loss == pytest.approx(float(at.G(y) + at.F(y) / 4), rel=1e-12)
    again = case.estimate(
        RisingPenalty(strength=4.0, growth=1.0, optimizer=STEP), start, state=rising.state
    )
    assert_moves(again, at.F_x(y) + 8 * at.G_x(y), y, at.G_y(y) + at.F_y(y) / 8)


def test_where_G_is_flat_F_alone_moves():
    class Flat(NearestFit):
        def lower_loss(self, x, y, batch):
            return 0 * y["theta"].sum()

    expected = START - LR * (START - NearestFit().data[2])
    assert torch.allclose(ended(DynamicBarrier(optimizer=STEP), 1, Flat()), expected)


# ---- where runs end


@pytest.mark.parametrize("seed", range(3))
def test_along_one_residual_the_barrier_converges_at_its_rate(seed):
    """r ← (1 − lr · barrier) r once the barrier binds, and what is along argmin G by 1 − lr."""
    problem, estimator = NearestFit(1, seed), DynamicBarrier(optimizer=SGD(lr=0.1))
    A, b, _ = problem.data
    residuals = [float(A @ ended(estimator, k, problem) - b) for k in (100, 101, 200)]
    assert residuals[1] / residuals[0] == pytest.approx(0.95, rel=1e-6)
    assert residuals[2] / residuals[0] == pytest.approx(0.95**100, rel=1e-6)
    assert distance(estimator, 300, problem) < 1e-5


@pytest.mark.parametrize("seed", range(3))
def test_the_barrier_ends_off_by_the_step(seed):
    """Of several residuals a constant step leaves O(lr): half the step, half of it."""
    problem = NearestFit(seed=seed)
    off = [
        distance(DynamicBarrier(optimizer=SGD(lr=lr)), round(60 / lr), problem)
        for lr in (0.1, 0.05)
    ]
    assert off[1] / off[0] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("growth", [0.5, 1.0])
def test_the_penalty_falls_with_the_steps(growth, seed):
    """O(1/λ) = O(steps^−growth): four times the steps, 4^−growth of the distance."""
    problem, estimator = NearestFit(seed=seed), RisingPenalty(growth=growth, optimizer=SGD(lr=1.0))
    off = [distance(estimator, steps, problem) for steps in (400, 1600)]
    assert off[1] / off[0] == pytest.approx(4**-growth, rel=0.1)


def test_a_penalty_that_does_not_rise_ends_where_its_sum_is_stationary():
    """(Aᵀ A + I / λ) θ = Aᵀ b + c / λ, off by O(1/λ)."""
    problem = NearestFit()
    A, b, c = problem.data
    found = ended(RisingPenalty(strength=10.0, growth=0.0, optimizer=SGD(lr=0.5)), 600)
    expected = torch.linalg.solve(A.T @ A + torch.eye(6).double() / 10, A.T @ b + c / 10)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert float((expected - problem.best).norm()) > 0.1


def test_a_constraint_on_G_is_kept_and_tight():
    """`lowest` above min G: min F over G ≤ lowest, whose multiplier is positive here."""
    problem = NearestFit(1)
    _, _, c = problem.data
    assert float(problem.lower_loss({}, {"theta": c}, None)) > 0.02
    estimator = DynamicBarrier(lowest=0.02, rate=1.0, optimizer=SGD(lr=0.1))
    theta = ended(estimator, 300, problem)
    assert float(problem.lower_loss({}, {"theta": theta}, None)) == pytest.approx(0.02, rel=1e-3)
    A, b, _ = problem.data
    # nearest point of the band |Aθ − b| ≤ √0.04 in the direction of its one row, of norm 1
    r = A @ c - b
    expected = c - A.T @ (r - r.sign() * 0.2)
    torch.testing.assert_close(theta, expected, rtol=1e-3, atol=1e-3)


# ---- negative controls


class _Planted(DynamicBarrier):
    sign, factor = 1.0, 1.0

    def _strength(self, G, F_xy, G_xy):
        return self.sign * self.factor * super()._strength(G, F_xy, G_xy)


@pytest.mark.parametrize(("sign", "factor"), [(-1.0, 1.0), (1.0, 0.0)], ids=["sign", "λ = 0"])
def test_a_planted_error_ends_elsewhere(sign, factor):
    planted = type("Planted", (_Planted,), {"sign": sign, "factor": factor})
    off = distance(planted(optimizer=SGD(lr=0.1)), 200)
    assert off > 5 * distance(DynamicBarrier(optimizer=SGD(lr=0.1)), 200)


def test_one_level_alone_ends_elsewhere():
    """G alone stops at the projection of the start, and a fixed sum off by its weight."""
    assert distance(Alternating(), 300) > 0.5
    assert distance(Joint(optimizer=SGD(lr=0.5)), 300) > 0.5


# ---- other methods, and what is refused


@pytest.mark.parametrize("estimator", [Bome(optimizer=SGD(lr=0.1)), Aggregation()], ids=repr)
def test_every_method_that_moves_y_is_asked_where_x_is_empty(estimator):
    assert distance(estimator, 200) < 0.5 < distance(Alternating(), 200)


def test_bome_with_x_empty_is_the_barrier():
    both = (kind(barrier=0.3, optimizer=STEP) for kind in (Bome, DynamicBarrier))
    a, b = (ended(estimator, 50) for estimator in both)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_run_goes_on_where_it_stopped():
    made = setup(RisingPenalty(growth=1.0), 6)
    whole, half = engine.start(made), engine.start(made)
    list(engine.run(made, whole))
    list(engine.run(replace(made, upper=Upper(steps=3)), half))
    again = engine.restore(made, half.save())
    list(engine.run(made, again))
    assert torch.equal(whole.y["theta"], again.y["theta"])


def test_what_needs_a_hypergradient_is_refused_with_what_works():
    made = setup(DynamicBarrier())
    for asked in (
        check(made, {"own": made.estimator}),
        path_agreement(made, {"own": Alternating()}),
        scene._train(made),  # of `bilevel compare`
    ):
        with pytest.raises(ProblemError, match=r"x is empty.*dynamic_barrier, or rising_penalty"):
            list(asked)


def test_a_run_that_does_not_lower_F_says_so():
    def warned(estimator) -> list[str]:
        made = setup(estimator)
        events = engine.run(made, engine.start(made))
        return [event.message for event in events if isinstance(event, Warned)]

    (message,) = warned(Implicit())
    assert "implicit has nothing to estimate" in message
    assert "dynamic_barrier or rising_penalty" in message
    assert warned(Alternating()) == warned(RisingPenalty()) == []


@pytest.mark.parametrize("given", [{"lowest": 0.0}, {"rate": 1.0}])
def test_lowest_and_rate_belong_together(given):
    with pytest.raises(RecipeError, match=r"without .*: give both, or neither"):
        DynamicBarrier(**given)
