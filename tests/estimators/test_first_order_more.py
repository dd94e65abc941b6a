"""Methods that move x and y together, SAMA and BDA: formulas typed out, limits, counter-examples."""

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch

from bilevel import hypergradient, tree
from bilevel.calculus.finite_differences import central
from bilevel.errors import ConvergenceError, ProblemError
from bilevel.estimators.aggregation import Aggregation
from bilevel.estimators.bome import Bome
from bilevel.estimators.gradient_gap import GradientGap
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.joint import Joint
from bilevel.estimators.moreau import Moreau
from bilevel.estimators.regularised_gap import RegularisedGap
from bilevel.estimators.sama import Sama
from bilevel.estimators.unroll import Unroll
from bilevel.estimators.value_function import ValueFunction
from bilevel.estimators.value_gap import ValueGap
from bilevel.events import Stepped
from bilevel.lower.gradient import Gradient
from bilevel.lower.lbfgs import LBFGS
from bilevel.lower.newton import Newton
from bilevel.optimizers.differentiable import SGD, Adam, RMSprop
from bilevel.rng import stream
from bilevel.run import engine
from bilevel.run.engine import Setup
from bilevel.run.upper import Upper
from bilevel.testing import CheckRow, check
from bilevel.types import Counts, Loss, Losses, Path, Point, Structure
from bilevel_problems.box_qp import BoxQP
from bilevel_problems.quadratic import Quadratic
from tests.cases import NAMES, PROBLEMS, assert_close, closed_form, offset, relative
from tests.estimators.test_estimators import _OnceOnly

LR = 0.05
STEP = SGD(lr=LR)


class Typed:
    """The derivatives of the quadratic problem, written down."""

    def __init__(self, case):
        self.k, self.x, self.rho = case.problem.constants, case.x["x"], case.problem.rho

    def F(self, y):
        k, x = self.k, self.x
        return 0.5 * (y - k["t"]).square().sum() + (
            0.5 * self.rho * (x - k["s"]).square().sum() + y @ k["D"] @ x
        )

    def G(self, y):
        return 0.5 * y @ self.k["A"] @ y - y @ (self.k["B"] @ self.x + self.k["c"])

    def F_x(self, y):
        return self.rho * (self.x - self.k["s"]) + self.k["D"].T @ y

    def F_y(self, y):
        return y - self.k["t"] + self.k["D"] @ self.x

    def G_x(self, y):
        return -self.k["B"].T @ y

    def G_y(self, y):
        return self.k["A"] @ y - self.k["B"] @ self.x - self.k["c"]


@pytest.fixture
def here():
    """(a quadratic case, y off its solution, the derivatives typed out)"""
    case = closed_form(PROBLEMS[0], 1)
    start = offset(case.y, 1.0)
    return case, start, Typed(case)


def descend(y, gradient, steps, lr):
    for _ in range(steps):
        y = y - lr * gradient(y)
    return y


def assert_moves(got, h, y, along):
    """Both directions, to rounding."""
    assert_close(got.hypergradient, {"x": h}, rtol=1e-12)
    assert_close(got.moved.y, {"y": y - LR * along}, rtol=1e-13)
    assert_close({"y": (y - got.moved.y["y"]) / LR}, {"y": along}, rtol=1e-11)
    assert got.moved.gradient_norm == pytest.approx(float(along.norm()), rel=1e-12)


# the formulas ----------------------------------------------------------------------------------


def test_value_gap_equals_its_formula_twice(here):
    case, start, at = here
    estimator = ValueGap(
        strength=7.0, optimizer=STEP, solver=Gradient(steps=4, optimizer=SGD(lr=0.3))
    )
    state, y, z = None, start["y"], start["y"]
    for _ in range(2):  # z goes on from the last one
        got = case.estimate(estimator, {"y": y}, state=state)
        z = descend(z, at.G_y, 4, 0.3)
        h = at.F_x(y) + 7 * (at.G_x(y) - at.G_x(z))
        assert_moves(got, h, y, at.G_y(y) + at.F_y(y) / 7)
        assert got.moved.loss == pytest.approx(float(at.G(y) + at.F(y) / 7), rel=1e-12)
        assert (got.stats.gradients, got.stats.hvps, got.stats.cross_products) == (3 + 4, 0, 0)
        state, y = got.state, got.moved.y["y"]


@pytest.mark.parametrize("barrier", [0.5, 1e-3, 20.0])
def test_bome_equals_its_formula(here, barrier):
    case, start, at = here
    estimator = Bome(
        barrier=barrier, optimizer=STEP, solver=Gradient(steps=5, optimizer=SGD(lr=0.3))
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
            got = case.estimate(Bome(barrier=barrier, optimizer=STEP, solver=solver), start)
            along = torch.cat([got.hypergradient["x"], (y - got.moved.y["y"]) / LR])
            least = barrier * float(q @ q)
            assert float(along @ q) == pytest.approx(max(least, float(F @ q)), rel=1e-8)
            seen.add(least > float(F @ q))
    assert seen == {True, False}, "one of the two cases was never met"


def test_bome_at_a_solved_lower_level_descends_the_upper_loss(here):
    case, _, at = here
    got = case.estimate(Bome(optimizer=STEP, solver=Newton()), tree.detach(case.y))
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


def test_gradient_gap_equals_its_formula(here):
    case, start, at = here
    y, k = start["y"], at.k
    got = case.estimate(GradientGap(strength=3.0, optimizer=STEP), start)
    g = at.G_y(y)
    assert_moves(got, at.F_x(y) - 2 * 3 * k["B"].T @ g, y, at.F_y(y) / 3 + 2 * k["A"] @ g)
    assert got.moved.loss == pytest.approx(float(at.F(y) / 3 + g @ g), rel=1e-12)
    assert (got.stats.gradients, got.stats.hvps, got.stats.cross_products) == (2, 1, 1)


def test_moreau_equals_its_formula_and_its_proximal_step(here):
    case, start, at = here
    eta, gamma = 0.2, 0.6
    estimator = Moreau(
        strength=4.0,
        growth=0.4,
        gamma=gamma,
        optimizer=STEP,
        solver=Gradient(steps=1, optimizer=SGD(lr=eta)),
    )
    state, y, theta = None, start["y"], start["y"]
    for call in range(3):
        got = case.estimate(estimator, {"y": y}, state=state)
        theta = theta - eta * (at.G_y(theta) + (theta - y) / gamma)
        strength = 4 * (call + 1) ** 0.4
        h = at.F_x(y) + strength * (at.G_x(y) - at.G_x(theta))
        assert_moves(got, h, y, at.F_y(y) / strength + at.G_y(y) - (y - theta) / gamma)
        value = at.F(y) / strength + at.G(y) - (y - theta).square().sum() / (2 * gamma)
        assert got.moved.loss == pytest.approx(float(value), rel=1e-11)
        assert got.stats.gradients == 3 + 1
        state, y = got.state, got.moved.y["y"]


def test_the_proximal_point_is_where_the_envelope_is(here):
    """(A + I / γ) θ = B x + c + y / γ, at convergence of `solver`."""
    case, start, at = here
    got = case.estimate(Moreau(gamma=0.3, solver=Newton(tolerance=1e-12)), start)
    A, right = at.k["A"], at.k["B"] @ at.x + at.k["c"] + start["y"] / 0.3
    theta = torch.linalg.solve(A + torch.eye(len(A), dtype=torch.float64) / 0.3, right)
    assert_close(got.state["proximal"]["y"], {"y": theta}, rtol=1e-11)


def test_joint_equals_its_formula(here):
    case, start, at = here
    y = start["y"]
    got = case.estimate(Joint(weight=2.5, optimizer=STEP), start)
    assert_moves(got, at.F_x(y) + 2.5 * at.G_x(y), y, at.F_y(y) + 2.5 * at.G_y(y))
    assert got.moved.loss == pytest.approx(float(at.F(y) + 2.5 * at.G(y)), rel=1e-12)
    assert (got.stats.gradients, got.stats.hvps, got.stats.cross_products) == (2, 0, 0)


@pytest.mark.parametrize("penalty", ["quadratic", "log"])
def test_value_function_equals_its_formula_twice(here, penalty):
    case, start, at = here
    sigma, theta, steps, lr = 0.7, 0.02, 6, 0.02
    mu = 0.3 if penalty == "log" else 1e-4  # a large one puts all of y below the level
    estimator = ValueFunction(
        penalty=penalty,
        sigma=sigma,
        mu=mu,
        theta=theta,
        decay=0.5,
        solver=Gradient(steps=steps, optimizer=SGD(lr=lr)),
    )
    state, y, z = None, start["y"], start["y"]
    for call in range(2):
        got = case.estimate(estimator, start, state=state)
        s, m, t = (value / (call + 1) ** 0.5 for value in (sigma, mu, theta))
        z = descend(z, lambda z, m=m: at.G_y(z) + m * z, steps, lr)
        level = at.G(z) + m / 2 * z @ z

        def slope(y, level=level, s=s):
            gap = float(at.G(y) - level)
            return max(gap, 0) / s if penalty == "quadratic" else -s / gap

        if penalty == "log" and at.G(y) >= level:
            y = z
        y = descend(y, lambda y, t=t, P=slope: at.F_y(y) + P(y) * at.G_y(y) + t * y, steps, lr)
        h = at.F_x(y) + slope(y) * (at.G_x(y) - at.G_x(z))
        assert_close(got.hypergradient, {"x": h}, rtol=1e-10)
        assert_close(got.moved.y, {"y": y}, rtol=1e-11)
        assert slope(y) > 0
        assert got.moved.steps == steps
        left = at.F_y(y) + slope(y) * at.G_y(y) + t * y
        assert got.moved.gradient_norm == pytest.approx(float(left.norm()), rel=1e-9)
        assert (got.stats.gradients, got.stats.hvps) == (3 + steps + 2 * steps, 0)
        state = got.state


def test_a_barrier_is_refused_a_solver_that_would_cross_it():
    with pytest.raises(ValueError, match="solver: newton"):
        ValueFunction(penalty="log")
    with pytest.raises(ProblemError, match="200"):
        ValueFunction(penalty="log", solver=Newton()).tight(201)


def test_a_start_outside_the_barrier_begins_at_the_regularised_minimum(here):
    """The problem is convex, so where it starts makes no difference to where it ends."""
    case, start, at = here
    estimator = ValueFunction(penalty="log", sigma=1.0, mu=0.1, solver=Newton())
    outside = offset(case.y, 60.0)
    got, near = case.estimate(estimator, outside), case.estimate(estimator, start)
    z = near.state["value"]["y"]["y"]
    assert at.G(outside["y"]) > at.G(z) + 0.05 * z @ z
    assert_close(got.hypergradient, near.hypergradient, rtol=1e-8)


def test_a_barrier_without_an_inside_has_a_remedy(here):
    case, _, _ = here
    with pytest.raises(ProblemError, match=r"raise mu, or use penalty: quadratic"):
        case.estimate(ValueFunction(penalty="log", mu=0.0, solver=Newton()))


# SAMA ------------------------------------------------------------------------------------------


def adapted(optimizer, g, state, vector):
    """(∂u/∂g) · vector, derived by hand; every matrix here is diagonal."""
    if isinstance(optimizer, SGD):
        return optimizer.lr * vector
    if isinstance(optimizer, RMSprop):
        a = optimizer.alpha
        root = (a * state["square"]["y"] + (1 - a) * g**2).sqrt()
        return (
            optimizer.lr
            * vector
            * (1 / (root + optimizer.eps) - ((1 - a) * g**2 / (root * (root + optimizer.eps) ** 2)))
        )
    b1, b2, t = optimizer.beta1, optimizer.beta2, int(state["step"]) + 1
    m = (b1 * state["mean"]["y"] + (1 - b1) * g) / (1 - b1**t)
    root = ((b2 * state["square"]["y"] + (1 - b2) * g**2) / (1 - b2**t)).sqrt()
    bottom = root + optimizer.eps
    of_mean = (1 - b1) / (1 - b1**t) / bottom
    of_root = m * (1 - b2) / (1 - b2**t) * g / (root * bottom**2)
    return optimizer.lr * vector * (of_mean - of_root)


ADAPTED = [SGD(lr=0.3), Adam(lr=0.1), RMSprop(lr=0.05)]


@pytest.mark.parametrize("optimizer", ADAPTED, ids=lambda o: type(o).__name__)
def test_sama_equals_its_formula(here, optimizer):
    """The quadratic's ∇x G is linear in y, so the central difference adds nothing."""
    case, start, at = here
    path = recorded_by(case, optimizer, start, 4)
    y, state = path.start["y"], path.state
    for _ in range(3):
        moved, state = optimizer.step({"y": y}, {"y": at.G_y(y)}, state)
        y = moved["y"]
    g = at.G_y(y)
    end = optimizer.step({"y": y}, {"y": g}, state)[0]["y"]
    v = adapted(optimizer, g, state, at.F_y(end))
    expected = {"x": at.F_x(end) + at.k["B"].T @ v}
    got = case.estimate(Sama(), {"y": end}, path=path)
    assert_close(got.hypergradient, expected, rtol=1e-9)
    assert relative({"x": at.F_x(end) + at.k["B"].T @ at.F_y(end)}, expected) > 1e-2  # control
    assert (got.stats.gradients, got.stats.hvps, got.stats.cross_products) == (4 + 3, 0, 0)
    last = Path(optimizer, {"y": y}, state, path.batches[:1])
    again = case.estimate(Sama(), {"y": end}, path=last)
    assert_close(again.hypergradient, got.hypergradient, rtol=1e-12)
    assert again.stats.gradients == 4


def recorded_by(case, optimizer, start, steps):
    path = case.record(steps, 0.1, start).path
    return Path(optimizer, start, optimizer.init(start), path.batches)


def test_the_difference_in_sama_is_of_second_order():
    """On a lower loss whose cross derivative is not linear in y: slope 2 in ε."""

    def upper(x, y, batch):
        return ((y["y"] - 2) ** 2).sum()

    def lower(x, y, batch):
        return (torch.exp(x["x"] * y["y"]) + y["y"] ** 4).sum()

    x = {"x": torch.tensor([0.3, -0.5], dtype=torch.float64)}
    y = {"y": torch.tensor([0.7, 1.1], dtype=torch.float64)}
    path = Path(SGD(lr=0.1), y, {}, (None,))
    v = 0.1 * 2 * (y["y"] - 2)
    rest, u = x["x"] * y["y"], torch.exp(x["x"] * y["y"])
    exact = {"x": -(u * (1 + rest)) * v}  # ∂²xy G = exp(xy) (1 + xy)
    errors = [
        relative(
            hypergradient(upper, lower, x, y, estimator=Sama(epsilon=e), path=path).hypergradient,
            exact,
        )
        for e in (1e-1, 1e-2)
    ]
    assert math.log10(errors[0] / errors[1]) == pytest.approx(2.0, abs=0.05)


def test_sama_without_an_implicit_part_and_without_a_path():
    case = closed_form(PROBLEMS[0], 0)
    with pytest.raises(ProblemError, match="record=True"):
        case.estimate(Sama())
    got = hypergradient(
        lambda x, y, b: (x["x"] ** 2).sum(),
        lambda x, y, b: ((y["y"] - x["x"]) ** 2).sum(),
        {"x": torch.ones(2)},
        {"y": torch.zeros(2)},
        estimator=Sama(),
        path=Path(SGD(), {"y": torch.zeros(2)}, {}, (None,)),
    )
    assert torch.equal(got.hypergradient["x"], torch.full((2,), 2.0))


# aggregation -----------------------------------------------------------------------------------


def test_aggregation_equals_autograd_through_a_loop(here):
    case, start, _ = here
    estimator = Aggregation(steps=7, alpha=0.8, upper_lr=0.3, lower_lr=0.2)
    x = tree.leaves(case.x)
    y = start["y"].clone().requires_grad_()
    for k in range(7):
        alpha = 0.8 / (k + 1)
        F = case.problem.upper_loss(x, {"y": y}, case.upper_batch)
        G = case.problem.lower_loss(x, {"y": y}, case.lower_batch)
        (F_y,) = torch.autograd.grad(F, y, create_graph=True)
        (G_y,) = torch.autograd.grad(G, y, create_graph=True)
        y = y - alpha * 0.3 * F_y - (1 - alpha) * 0.2 * G_y
    F = case.problem.upper_loss(x, {"y": y}, case.upper_batch)
    (h,) = torch.autograd.grad(F, x["x"])
    got = case.estimate(estimator, start)
    assert_close(got.hypergradient, {"x": h}, rtol=1e-12)
    assert_close(got.moved.y, {"y": y.detach()}, rtol=1e-13)
    assert got.stats.gradients == 2 * 7 + 2
    assert (got.stats.hvps, got.stats.cross_products) == (2 * 7, 2 * 7)
    assert got.moved.gradient_norm == pytest.approx(
        float(Typed(case).G_y(y.detach()).norm()), rel=1e-12
    )
    other = case.estimate(replace(estimator, steps=6), start)
    assert relative(other.hypergradient, {"x": h}) > 1e-3  # control


def test_aggregation_projects_after_each_step_and_differentiates_through_it():
    problem, K = BoxQP(), 6
    estimator = Aggregation(steps=K, alpha=0.4, upper_lr=0.3, lower_lr=0.9)
    made = Setup(
        problem, Gradient(), Upper(steps=3, optimizer=SGD(lr=0.05)), estimator, dtype=torch.float64
    )
    state, k = engine.start(made), problem.constants
    x, y = state.x["x"].clone(), state.y["y"].clone()
    held = []
    for event in engine.run(made, state):
        if not isinstance(event, Stepped):
            continue
        x.requires_grad_()
        for step in range(K):
            alpha = 0.4 / (step + 1)
            F_y, G_y = y - k["t"], k["A"] @ y - k["B"] @ x - k["c"]
            y = (y - alpha * 0.3 * F_y - (1 - alpha) * 0.9 * G_y).clamp(-1.0, 1.0)
        F = 0.5 * (y - k["t"]).square().sum() + 0.05 * (x - k["s"]).square().sum()
        (h,) = torch.autograd.grad(F, x)
        held.append(int((y.detach().abs() == 1.0).sum()))
        x, y = (x - 0.05 * h).detach(), y.detach()
        assert event.upper_loss == pytest.approx(float(F.detach()), rel=1e-12)
        assert event.hypergradient_norm == pytest.approx(float(h.norm()), rel=1e-12)
        assert_close(state.x, {"x": x}, rtol=1e-12)
        assert_close(state.y, {"y": y}, rtol=1e-12)
    assert len(held) == 3
    assert all(0 < count < 10 for count in held)  # some of y on a bound, some free


def test_aggregation_in_a_box_is_what_it_claims():
    rows = check(
        Setup(BoxQP(), Gradient(), Upper(steps=1), Implicit(), dtype=torch.float64),
        {"aggregation": Aggregation(lower_lr=0.9)},
    )
    (row,) = [row for row in rows if isinstance(row, CheckRow)]
    assert (row.verdict, row.claim) == ("as claimed", "path")


class TwoMinima:
    """Liu et al. (2020): F = ½ (x − y₂)² + ½ (y₁ − 1)², G = ½ y₁² − x y₁. Every y₂ minimises G.

    The optimistic solution is x = 1, y = (1, 1).
    """

    def upper(self, x, y, batch):
        return 0.5 * (x["x"] - y["y"][1]) ** 2 + 0.5 * (y["y"][0] - 1) ** 2

    def lower(self, x, y, batch):
        return 0.5 * y["y"][0] ** 2 - x["x"] * y["y"][0]

    def lowest(self, estimator):
        """Where the estimate is 0, every lower solve starting at 0: it is affine in x here."""
        start = {"y": torch.zeros(2, dtype=torch.float64)}

        def h(x):
            at = {"x": torch.tensor(x, dtype=torch.float64)}
            got = hypergradient(self.upper, self.lower, at, start, estimator=estimator)
            return float(got.hypergradient["x"])

        root = h(0.0) / (h(0.0) - h(1.0))
        assert h(root) == pytest.approx(0.0, abs=1e-12)
        return root


def test_aggregation_solves_the_counter_example_that_unrolling_does_not():
    """y₁ goes to x at any rate, y₂ stays at 0 under G: F is then ½ x² + ½ (x − 1)², least at ½."""
    example = TwoMinima()
    for steps in (40, 80):
        unrolled = Unroll(along=Gradient(steps=steps, optimizer=SGD(lr=0.5)))
        assert example.lowest(unrolled) == pytest.approx(0.5, abs=1e-9)
    off = [
        1 - example.lowest(Aggregation(steps=K, alpha=1.0, upper_lr=0.9, lower_lr=0.9))
        for K in (20, 40, 80, 160)
    ]
    # ½ (x − y₂)² is left with (1 − y₂ / x)², and y₂ / x = 1 − Π (1 − 0.9 / k) = 1 − O(K^-0.9)
    assert math.log2(off[2] / off[3]) == pytest.approx(2 * 0.9, abs=0.05)
    assert 0 < off[3] < 2e-6


def test_value_function_keeps_its_y_apart_from_the_one_it_hands_back(here):
    case, start, _ = here
    got = case.estimate(ValueFunction(), start)
    kept = copy.deepcopy(got.state)
    got.moved.y["y"].fill_(math.nan)
    assert torch.equal(got.state["upper"]["y"]["y"], kept["upper"]["y"]["y"])


# claims ----------------------------------------------------------------------------------------

CLAIMING = [
    ValueGap(),
    Bome(barrier=30.0),
    GradientGap(),
    Moreau(),
    RegularisedGap(),
    Joint(),
    ValueFunction(),
    Aggregation(),
    Sama(),
]


def against_differences(estimator, objective_of, make):
    """(relative error against differences of the claimed function, error of the differences)"""
    case = closed_form(make, 0)
    y = offset(case.y, 0.7)
    path = case.record(3, 0.1, y).path if estimator.needs.path else None
    tight = estimator.tight(tree.size(y)) if hasattr(estimator, "tight") else estimator
    got = case.estimate(tight, y, path=path)
    other = objective_of(tight).objective(case.losses(), Point(case.x, y, path))
    found = central(other, case.x, stream(0, "differences"))
    assert float(found.slopes.norm()) > 0
    error = float((found.along(got.hypergradient) - found.slopes).norm() / found.slopes.norm())
    return error, found.error


@pytest.mark.parametrize("make", [PROBLEMS[0], PROBLEMS[3]], ids=[NAMES[0], NAMES[3]])
@pytest.mark.parametrize("estimator", CLAIMING, ids=lambda e: type(e).__name__)
def test_each_is_the_gradient_of_what_it_claims(estimator, make):
    error, rounding = against_differences(estimator, lambda e: e, make)
    assert error <= max(1e-8, 10 * rounding)


@pytest.mark.parametrize(
    ("estimator", "wrong"),
    [
        (ValueGap(), {"strength": 10.1}),
        (Bome(barrier=30.0), {"barrier": 30.3}),
        (GradientGap(), {"strength": 10.1}),
        (Moreau(), {"gamma": 1.01}),
        (Joint(), {"weight": 1.01}),
        (ValueFunction(), {"sigma": 1.1e-2}),
        (Aggregation(), {"alpha": 0.51}),
    ],
    ids=lambda e: type(e).__name__,
)
def test_and_not_of_something_near_it(estimator, wrong):
    error, rounding = against_differences(estimator, lambda e: replace(e, **wrong), PROBLEMS[0])
    assert error > 1e-4 > 10 * rounding


def test_the_function_of_a_barrier_is_claimed_too():
    for mu in (0.1, 1e-3):
        estimator = ValueFunction(penalty="log", mu=mu, solver=Newton())
        error, rounding = against_differences(estimator, lambda e: e, PROBLEMS[0])
        assert error <= max(1e-8, 10 * rounding)


# where x and y rest ----------------------------------------------------------------------------


def resting(estimator, case):
    """(x, y) at which neither moves: both directions are affine on a quadratic, so one solve."""
    n, m = tree.size(case.x), tree.size(case.y)

    def directions(point):
        at = replace(case, x={"x": point[:n]}, y={"y": point[n:]})
        got = at.estimate(estimator)
        return torch.cat([got.hypergradient["x"], (point[n:] - got.moved.y["y"]) / LR])

    origin = directions(torch.zeros(n + m, dtype=torch.float64))
    columns = [directions(e) - origin for e in torch.eye(n + m, dtype=torch.float64)]
    point = torch.linalg.solve(torch.stack(columns, 1), -origin)
    assert float(directions(point).norm()) <= 1e-6 * float(origin.norm()), "not affine"
    return {"x": point[:n]}, {"y": point[n:]}


def solution(problem):
    """x* with ∇Φ(x*) = 0, which is affine in x on a quadratic."""
    n = problem.num_upper
    origin = problem.hypergradient({"x": torch.zeros(n, dtype=torch.float64)})["x"]
    columns = [
        problem.hypergradient({"x": e})["x"] - origin for e in torch.eye(n, dtype=torch.float64)
    ]
    return {"x": torch.linalg.solve(torch.stack(columns, 1), -origin)}


@pytest.mark.parametrize(
    "make",
    [
        lambda s: ValueGap(strength=s, optimizer=STEP, solver=Newton(tolerance=1e-13)),
        lambda s: Moreau(strength=s, optimizer=STEP, solver=Newton(tolerance=1e-13)),
        lambda s: GradientGap(strength=s, optimizer=STEP),
    ],
    ids=["value gap", "Moreau", "gradient gap"],
)
@pytest.mark.parametrize("seed", range(2))
def test_the_resting_point_is_off_by_one_over_the_strength(make, seed):
    case = closed_form(PROBLEMS[0], seed)
    best = solution(case.problem)
    errors = [relative(resting(make(s), case)[0], best) for s in (1e3, 1e4)]
    assert math.log10(errors[0] / errors[1]) == pytest.approx(1.0, abs=0.05)
    assert errors[1] < 0.05


def test_the_joint_loss_rests_elsewhere_however_heavy_the_lower_loss():
    """Its error goes to a limit that is not 0, where that of the value gap goes on falling."""
    case = closed_form(PROBLEMS[0], 0)
    best = solution(case.problem)
    errors = [relative(resting(Joint(weight=w, optimizer=STEP), case)[0], best) for w in (1e2, 1e4)]
    assert errors[1] == pytest.approx(errors[0], rel=0.05)
    assert errors[1] > 0.1


def solved_errors(case, estimators):
    return [relative(case.estimate(e).hypergradient, case.truth) for e in estimators]


def test_the_value_function_tends_to_the_hypergradient_at_the_cube_root():
    """P' = gap / σ and gap = O(1 / P'²), so P' = O(σ^-1/3), which is λ in O(1/λ)."""
    case = closed_form(PROBLEMS[0], 0)
    errors = solved_errors(
        case,
        [
            ValueFunction(sigma=s, mu=0.0, theta=0.0, solver=Newton(steps=200, tolerance=1e-9))
            for s in (1e-5, 1e-8)
        ],
    )
    assert math.log10(errors[0] / errors[1]) / 3 == pytest.approx(1 / 3, abs=0.02)
    assert errors[1] < 0.02


def test_the_barrier_tends_to_it_with_the_root_of_the_slack():
    """With σ at 0 G may be mu/2 ‖z‖² above its least value, and F takes y √mu far from y*."""
    case = closed_form(PROBLEMS[0], 0)
    newton = Newton(tolerance=1e-6)
    errors = solved_errors(
        case,
        [
            ValueFunction(penalty="log", sigma=0.1, mu=mu, theta=0.0, solver=newton)
            for mu in (1e-4, 1e-6)
        ],
    )
    assert math.log10(errors[0] / errors[1]) / 2 == pytest.approx(0.5, abs=0.02)


# no second derivative where none is promised ---------------------------------------------------

FIRST_ORDER = [ValueGap(), Bome(), Moreau(), RegularisedGap(), Joint(), ValueFunction(), Sama()]
SECOND_ORDER = [GradientGap(), Aggregation()]


@pytest.mark.parametrize("estimator", FIRST_ORDER + SECOND_ORDER, ids=lambda e: type(e).__name__)
def test_first_order_methods_take_no_second_derivative(estimator):
    def lower(x, y, batch):
        return _OnceOnly.apply(y["y"] - x["x"]).sum()

    def upper(x, y, batch):
        return _OnceOnly.apply(y["y"] + x["x"]).sum()

    x, y = {"x": torch.ones(2)}, {"y": torch.zeros(2)}
    path = Path(SGD(), y, {}, (None,))
    assert estimator.needs.second_order is (estimator in SECOND_ORDER)
    if estimator in FIRST_ORDER:
        got = hypergradient(upper, lower, x, y, estimator=estimator, path=path)
        assert (got.stats.hvps, got.stats.cross_products) == (0, 0)
    else:
        with pytest.raises(ProblemError, match="once_differentiable"):
            hypergradient(upper, lower, x, y, estimator=estimator, path=path)


# in a run --------------------------------------------------------------------------------------


def run(estimator, steps, lr, problem=None):
    made = Setup(
        problem=problem or Quadratic(),
        lower=Gradient(steps=1),
        upper=Upper(steps=steps, optimizer=SGD(lr=lr)),
        estimator=estimator,
        dtype=torch.float64,
    )
    state = engine.start(made)
    for _ in engine.run(made, state):
        pass
    return made.problem, state


def steps(count, lr):
    return Gradient(steps=count, optimizer=SGD(lr=lr))


@pytest.mark.parametrize(
    "estimator",
    [
        ValueGap(strength=10.0, optimizer=SGD(lr=0.5), solver=steps(3, 1.0)),
        Moreau(strength=10.0, gamma=10.0, optimizer=SGD(lr=0.5), solver=steps(1, 0.9)),
    ],
    ids=lambda e: type(e).__name__,
)
def test_a_run_comes_to_rest_where_its_penalty_says(estimator):
    """One step of everything at a time, from where the problem starts."""
    problem, state = run(estimator, 1500, 2e-2)
    exact = replace(estimator, solver=Newton(tolerance=1e-13), optimizer=STEP)
    case = replace(closed_form(PROBLEMS[0], 0), problem=problem)
    x, y = resting(exact, case)
    assert_close(state.x, x, rtol=1e-3)
    assert_close(state.y, y, rtol=1e-3)
    assert relative(state.x, solution(problem)) > 1e-2  # which is not x*


def test_a_run_under_the_barrier_comes_near_the_solution():
    best = solution(Quadratic())
    estimator = Bome(optimizer=SGD(lr=0.02), solver=steps(10, 1.0))
    errors = [relative(run(estimator, count, 0.02)[1].x, best) for count in (1, 100, 400)]
    assert errors[0] > 1
    assert errors[2] < 0.5 * errors[1] < 0.2
    assert errors[2] < 0.1


def test_a_run_of_the_value_function_comes_near_the_solution():
    best = solution(Quadratic())
    estimator = ValueFunction(sigma=1e-4, mu=0.0, theta=0.0)
    errors = [relative(run(estimator, count, 1.5e-2)[1].x, best) for count in (1, 30)]
    assert errors[0] > 1
    assert errors[1] < 0.2


def test_the_joint_loss_may_have_no_limit():
    """G falls without bound in (x, y) here; the bilevel problem has a solution all the same."""
    with pytest.raises(ConvergenceError):
        run(Joint(weight=10.0, optimizer=SGD(lr=0.1)), 2000, 0.1)


class Batches(Quadratic):
    """A lower batch that says which it is."""

    def lower_batches(self, stream):
        for index in itertools.count():
            yield self.constants | {"index": index}

    def lower_loss(self, x, y, batch):
        SEEN.append(int(batch["index"]))
        return super().lower_loss(x, y, batch)


SEEN: list[int] = []


@pytest.mark.parametrize(
    ("estimator", "fresh"),
    [
        (ValueGap(solver=steps(3, 0.1)), 3),
        (Bome(solver=steps(3, 0.1)), 3),
        (Moreau(solver=steps(2, 0.1)), 2),
    ],
    ids=lambda e: type(e).__name__,
)
def test_inner_steps_draw_their_own_batches(estimator, fresh):
    SEEN.clear()
    run(estimator, 2, 1e-3, Batches())
    assert max(SEEN) == 2 * (1 + fresh) - 1


# under constraints -----------------------------------------------------------------------------


class Bounded:
    """G = ½ ‖y − x‖² over y ≤ 1 and F = ½ ‖y − t‖² + ½ ‖x − s‖².

    The first bound is active with multiplier x₁ − 1, so x₁* = s₁ = 2 and y₁* = 1; the second is
    not, so x₂* = y₂* = (s₂ + t₂) / 2 = −¼.
    """

    s, t, best = (torch.tensor(v, dtype=torch.float64) for v in ((2, -1), (3, 0.5), (2, -0.25)))
    structure = Structure(constraints=lambda x, y, batch: {"inequality": y["y"] - 1})

    def ask(self, estimator, x, y, state=None, **options):
        return hypergradient(
            lambda x, y, b: (
                0.5 * (y["y"] - self.t).square().sum() + 0.5 * (x["x"] - self.s).square().sum()
            ),
            lambda x, y, b: 0.5 * (y["y"] - x["x"]).square().sum(),
            {"x": x},
            {"y": y},
            estimator=estimator,
            state=state,
            **options,
        )

    def rest(self, estimator, count, **options):
        x, y, state = torch.zeros_like(self.s), torch.zeros_like(self.s), None
        for _ in range(count):
            got = self.ask(estimator, x, y, state, **options)
            x = x - 0.5 / estimator.strength * got.hypergradient["x"]
            y, state = got.moved.y["y"], got.state
        return x, y, state


def test_regularised_gap_equals_its_formula():
    at, eta, g1, g2 = Bounded(), 0.2, 0.7, 0.4
    estimator = RegularisedGap(
        strength=4.0,
        growth=0.3,
        gamma1=g1,
        gamma2=g2,
        multiplier_lr=0.5,
        multiplier_bound=0.05,
        optimizer=STEP,
        solver=steps(1, eta),
    )
    x = torch.tensor([3.0, -0.5], dtype=torch.float64)
    y = torch.tensor([1.2, 0.4], dtype=torch.float64)
    theta, z, state = y, torch.zeros_like(y), None
    bounds = set()
    for call in range(5):
        got = at.ask(estimator, x, y, state, structure=at.structure)
        theta = theta - eta * (theta - x + z + (theta - y) / g1)
        mu = (z + g2 * (y - 1)).clamp(min=0)
        strength = 4 * (call + 1) ** 0.3
        h = x - at.s + strength * ((x - y) - (x - theta))
        assert_moves(got, h, y, (y - at.t) / strength + y - x + mu - (y - theta) / g1)
        assert got.stats.gradients == 4
        z = (z - 0.5 * ((mu - z) / g2 - (theta - 1))).clamp(0, 0.05)
        torch.testing.assert_close(got.state["z"]["inequality"], z, rtol=1e-12, atol=0)
        bounds |= set(z.tolist()) & {0.0, 0.05}
        y, state = got.moved.y["y"], got.state
    assert bounds == {0.0, 0.05}, "one of the bounds of z was never met"


def test_equalities_have_multipliers_of_either_sign():
    at = Bounded()
    equal = Structure(constraints=lambda x, y, b: {"equality": y["y"].sum()[None] - x["x"][:1]})
    got = at.ask(
        RegularisedGap(optimizer=STEP, gamma2=0.5, solver=steps(1, 0.2)),
        torch.tensor([3.0, 1.0], dtype=torch.float64),
        y := torch.tensor([0.5, 0.2], dtype=torch.float64),
        structure=equal,
    )
    mu = 0.5 * (0.7 - 3.0)  # negative: no max with 0
    theta = y - 0.2 * (y - torch.tensor([3.0, 1.0]))
    x_part = torch.tensor([3.0, 1.0], dtype=torch.float64) - at.s
    h = x_part + 10 * (theta - y + torch.tensor([-mu, 0.0], dtype=torch.float64))
    assert_close(got.hypergradient, {"x": h}, rtol=1e-12)
    z = -0.1 * (mu / 0.5 - (float(theta.sum()) - 3.0))
    assert float(got.state["z"]["equality"]) == pytest.approx(z, rel=1e-12)


def test_without_constraints_the_regularised_gap_is_the_moreau_envelope(here):
    case, start, _ = here
    state = other = None
    for _ in range(3):
        got = case.estimate(RegularisedGap(gamma1=0.6, growth=0.2), start, state=state)
        same = case.estimate(Moreau(gamma=0.6, growth=0.2), start, state=other)
        assert torch.equal(got.hypergradient["x"], same.hypergradient["x"])
        assert torch.equal(got.moved.y["y"], same.moved.y["y"])
        assert got.stats.gradients == same.stats.gradients
        state, other, start = got.state, same.state, got.moved.y


def test_the_regularised_gap_is_the_gradient_of_what_it_claims_under_constraints():
    estimator = RegularisedGap(solver=Newton(tolerance=1e-13), gamma2=0.3)
    y = torch.tensor([1.8, 0.4], dtype=torch.float64)
    x = torch.tensor([1.5, -0.5], dtype=torch.float64)

    def lower(x, y, batch):  # x in the constraints too
        return 0.5 * (y["y"] - x["x"]).square().sum()

    structure = Structure(constraints=lambda x, y, b: {"inequality": y["y"] - x["x"].square()})
    losses = Losses(
        Loss(lambda x, y, b: (y["y"] * x["x"]).sum(), None, Counts(), "upper"),
        Loss(lower, None, Counts(), "lower", structure=structure),
    )
    here = Point({"x": x}, {"y": y})
    got = estimator.estimate(losses, here, estimator.init(here))
    found = central(estimator.objective(losses, here), here.x, stream(0, "d"))
    assert_close({"x": found.slopes}, got.hypergradient, rtol=1e-8)
    loose = central(replace(estimator, gamma2=0.31).objective(losses, here), here.x, stream(0, "d"))
    assert relative({"x": loose.slopes}, got.hypergradient) > 1e-3


def test_under_constraints_it_rests_off_by_one_over_the_strength():
    at = Bounded()
    errors = []
    for strength in (10.0, 40.0):
        estimator = RegularisedGap(
            strength=strength,
            multiplier_lr=0.3,
            optimizer=SGD(lr=0.3),
            solver=steps(1, 0.5),
        )
        x, y, state = at.rest(estimator, int(40 * strength), structure=at.structure)
        errors.append(float((x - at.best).norm()))
        assert float(state["z"]["inequality"][0]) == pytest.approx(1.0, abs=2 / strength)
        assert float(y[0]) == pytest.approx(1.0, abs=2.5 / strength)
    assert math.log(errors[0] / errors[1]) / math.log(4) == pytest.approx(1.0, abs=0.1)
    blind = at.rest(estimator, 1600)[0]  # the bound is not known: x₁ = (s₁ + t₁) / 2
    assert float(blind[0]) == pytest.approx(2.5, abs=0.02)


# evidence and state ----------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", CLAIMING, ids=lambda e: type(e).__name__)
def test_a_state_is_never_written_to(estimator):
    case = closed_form(PROBLEMS[0], 0)
    path = case.record(2, 0.1, case.y).path
    first = case.estimate(estimator, offset(case.y, 1.0), path=path)
    kept = copy.deepcopy(first.state)
    second = case.estimate(estimator, offset(case.y, 1.0), path=path, state=first.state)
    again = case.estimate(estimator, offset(case.y, 1.0), path=path, state=kept)
    assert torch.equal(second.hypergradient["x"], again.hypergradient["x"])
    assert str(first.state) == str(kept)


@pytest.mark.parametrize("name", ["ValueGap", "Bome", "Moreau", "ValueFunction"])
def test_an_unsolved_side_problem_is_flagged(name):
    case = closed_form(PROBLEMS[0], 0)
    make = {type(e).__name__: type(e) for e in CLAIMING}[name]
    start = offset(case.y, 1.0)
    # values of some 1e3 say nothing of gradients below √(eps · 1e3 · curvature), 1e-5 under P
    for count, solved in ((1, False), (200, True)):
        got = case.estimate(make(solver=LBFGS(steps=count, tolerance=1e-4)), start)
        assert got.stats.converged is solved
    assert case.estimate(make(solver=steps(2, 1e-3)), start).stats.converged is None


@pytest.mark.parametrize("estimator", CLAIMING, ids=lambda e: type(e).__name__)
def test_single_precision_is_kept(estimator):
    case = closed_form(PROBLEMS[0], 0)

    def single(params):
        return tree.to(params, "cpu", torch.float32)

    y = single(offset(case.y, 1.0))
    got = hypergradient(
        case.problem.upper_loss,
        case.problem.lower_loss,
        single(case.x),
        y,
        estimator=estimator,
        upper_batch=single(case.upper_batch),
        lower_batch=single(case.lower_batch),
        path=Path(Adam(), y, Adam().init(y), (single(case.lower_batch),)),
    )
    assert got.hypergradient["x"].dtype == torch.float32
    assert got.moved is None or got.moved.y["y"].dtype == torch.float32


@pytest.mark.parametrize("estimator", [ValueGap(), ValueFunction(), Moreau()], ids=repr)
def test_products_of_a_side_problem_are_those_of_each_loss_in_it(here, estimator):
    """Newton takes dim(y) products with the Hessian of what it minimises: of G, or of F and G."""
    case, start, _ = here
    dim = tree.size(start)
    got = case.estimate(replace(estimator, solver=Newton(steps=2, tolerance=0.0)), start)
    solved = {"ValueGap": 1, "Moreau": 1, "ValueFunction": 1 + 2}[type(estimator).__name__]
    assert got.stats.hvps == solved * 2 * dim
