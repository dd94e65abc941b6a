"""The augmented Lagrangian: its rounds by hand, quadratic programs in closed form, kkt upon it."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from bilevel import recipe, solve_lower
from bilevel.calculus.finite_differences import central
from bilevel.errors import ProblemError
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.kkt import KKT
from bilevel.linear.dense import Dense
from bilevel.lower.augmented_lagrangian import AugmentedLagrangian
from bilevel.lower.gradient import Gradient
from bilevel.lower.lbfgs import LBFGS
from bilevel.lower.newton import Newton
from bilevel.optimizers.differentiable import SGD
from bilevel.problem.levels import structure_of
from bilevel.recipe.assemble import assemble
from bilevel.rng import Streams, stream
from bilevel.run import engine
from bilevel.run.engine import Setup
from bilevel.run.upper import Upper
from bilevel.testing.verdicts import check
from bilevel.types import Offers, Structure
from tests.cases import ask_anyway, assert_close, relative

NEWTON = AugmentedLagrangian(tolerance=1e-11)
BY_VALUES = AugmentedLagrangian(solver=LBFGS(steps=200), tolerance=1e-5)


class Polyhedral:
    """G = ½ yᵀAy − yᵀ(Bx + c) under E y = P x and D y ≤ Q x + r; the active set by enumeration."""

    def __init__(self, seed, equal=2, bounds=4, m=6, n=3):
        s = stream(seed, "polyhedral")

        def draw(*shape):
            return torch.randn(*shape, generator=s, dtype=torch.float64)

        half = draw(m, m)
        self.A, self.B, self.c, self.t = (
            half @ half.T / m + torch.eye(m),
            draw(m, n),
            draw(m),
            draw(m),
        )
        self.E, self.P = draw(equal, m), draw(equal, n)
        self.D, self.Q, self.r = draw(bounds, m), draw(bounds, n), draw(bounds) / 3
        self.n, self.m = n, m

    def init(self, streams):
        x = torch.randn(self.n, generator=streams["init"], dtype=torch.float64)
        return {"x": x}, {"y": torch.zeros(self.m, dtype=torch.float64)}

    def upper_loss(self, x, y, batch):
        return 0.5 * (y["y"] - self.t).square().sum() + 0.1 * (x["x"] ** 4).sum()

    def lower_loss(self, x, y, batch):
        return 0.5 * y["y"] @ self.A @ y["y"] - y["y"] @ (self.B @ x["x"] + self.c)

    def lower_constraints(self, x, y, batch):
        return {
            "equality": self.E @ y["y"] - self.P @ x["x"],
            "inequality": self.D @ y["y"] - self.Q @ x["x"] - self.r,
        }

    def upper_batches(self, stream):
        return itertools.repeat(None)

    lower_batches = upper_batches

    def solution(self, x):
        """(y*, λ, μ): the one active set whose multipliers are right and whose y is allowed."""
        x, k = x["x"], len(self.E)
        for active in itertools.product([False, True], repeat=len(self.D)):
            chosen = torch.tensor(active, dtype=torch.bool)
            J = torch.cat([self.E, self.D[chosen]])
            right = torch.cat([self.P @ x, (self.Q @ x + self.r)[chosen]])
            zero = torch.zeros(len(J), len(J), dtype=torch.float64)
            K = torch.cat([torch.cat([self.A, J.T], 1), torch.cat([J, zero], 1)])
            if len(J) > self.m:
                continue
            found = torch.linalg.solve(K, torch.cat([self.B @ x + self.c, right]))
            y, free = found[: self.m], self.D @ found[: self.m] - self.Q @ x - self.r
            mu = torch.zeros(len(self.D), dtype=torch.float64)
            mu[chosen] = found[self.m + k :]
            if (mu >= 0).all() and (free[~chosen] <= 0).all():
                return y, found[self.m : self.m + k], mu
        raise AssertionError("no solution")


def solved(problem, x, solver, state=None):
    _, y = problem.init(Streams(0))
    structure = structure_of(problem)
    return solve_lower(problem.lower_loss, x, y, solver=solver, structure=structure, state=state)


@pytest.mark.parametrize("kind", [(2, 0), (0, 4), (2, 4)], ids=["equal", "bounds", "both"])
@pytest.mark.parametrize("solver", [NEWTON, BY_VALUES], ids=["newton", "lbfgs"])
def test_it_reaches_the_kkt_point(solver, kind):
    """To the tolerance, magnified by the conditions of A and of the constraints, some 1e2 here."""
    seen = 0
    for seed in range(3):
        problem = Polyhedral(seed, *kind)
        x, _ = problem.init(Streams(seed))
        y, equal, bound = problem.solution(x)
        got = solved(problem, x, solver)
        assert got.stats.converged
        tolerance = 1e3 * solver.tolerance
        torch.testing.assert_close(got.y["y"], y, rtol=0, atol=tolerance)
        found = got.state["multipliers"]
        torch.testing.assert_close(found["equality"], equal, rtol=0, atol=10 * tolerance)
        torch.testing.assert_close(found["inequality"], bound, rtol=0, atol=10 * tolerance)
        assert got.stats.loss == pytest.approx(float(problem.lower_loss(x, got.y, None)), rel=1e-12)
        assert got.stats.gradient_norm <= solver.tolerance * got.state["curvature"]
        seen += int((bound > 0).sum())
        free = torch.linalg.solve(problem.A, problem.B @ x["x"] + problem.c)
        assert float((free - y).norm()) > 0.1, "the constraints made no difference"
    assert seen or not kind[1], "no inequality was active"


def test_its_rounds_by_hand():
    """Two rounds and one growth of ρ on ½ ‖y‖² under 3 − y₁ ≤ 0 and y₂ = 2, minimised exactly.

    L is ½ y₁² + (μ + ρ (3 − y₁))² / 2ρ, least at y₁ = (μ + 3ρ) / (1 + ρ), and the same with λ.
    """

    def constraints(x, y, batch):
        return {"equality": y["y"][1:] - 2, "inequality": 3 - y["y"][:1]}

    def G(x, y, batch):
        return 0.5 * y["y"].square().sum()

    def ask(rounds, **options):
        solver = AugmentedLagrangian(rounds=rounds, solver=Newton(), tolerance=1e-12, **options)
        y = {"y": torch.zeros(2, dtype=torch.float64)}
        return solve_lower(G, {}, y, solver=solver, structure=Structure(constraints=constraints))

    rho, mu, lam = 2.0, 0.0, 0.0
    y1, y2 = (mu + 3 * rho) / (1 + rho), (2 * rho - lam) / (1 + rho)
    violation = math.hypot(3 - y1, y2 - 2)
    one = ask(1, penalty=2.0)
    torch.testing.assert_close(one.y["y"], torch.tensor([y1, y2], dtype=torch.float64))
    assert violation > rho**-0.1, "not met as well as asked: ρ grows and the multipliers stay"
    assert one.state["penalty"] == 20
    assert float(one.state["multipliers"]["inequality"]) == 0
    assert one.stats.converged is False
    rho = 20.0
    y1, y2 = 3 * rho / (1 + rho), 2 * rho / (1 + rho)
    mu, lam = rho * (3 - y1), rho * (y2 - 2)
    two = ask(2, penalty=2.0)
    assert two.state["penalty"] == 20
    assert float(two.state["multipliers"]["inequality"]) == pytest.approx(mu, rel=1e-12)
    assert float(two.state["multipliers"]["equality"]) == pytest.approx(lam, rel=1e-12)
    assert lam < 0 < mu
    three = ask(3, penalty=2.0)
    y1, y2 = (mu + 3 * rho) / (1 + rho), (2 * rho - lam) / (1 + rho)
    torch.testing.assert_close(three.y["y"], torch.tensor([y1, y2], dtype=torch.float64))
    assert (three.stats.steps, three.stats.hvps) == (3, 6)


def test_for_fixed_penalty_the_error_falls_at_its_rate():
    """Multipliers converge at 1 / (1 + ρ σ), σ the eigenvalue of E A⁻¹ Eᵀ, with one equality."""
    problem = Polyhedral(1, 1, 0)
    x, _ = problem.init(Streams(0))
    y, _, _ = problem.solution(x)
    sigma = float((problem.E @ torch.linalg.solve(problem.A, problem.E.T)).squeeze())
    rho = 100.0 / sigma
    errors = []
    for rounds in (2, 3):
        solver = AugmentedLagrangian(rounds=rounds, penalty=rho, solver=Newton(), tolerance=1e-13)
        got = solved(problem, x, solver)
        assert got.state["penalty"] == rho
        errors.append(float((got.y["y"] - y).norm()))
    assert errors[0] / errors[1] == pytest.approx(1 + rho * sigma, rel=1e-3)


def test_a_warm_start_keeps_the_multipliers():
    problem = Polyhedral(0)
    x, _ = problem.init(Streams(0))
    cold = solved(problem, x, NEWTON)
    warm = solved(problem, x, NEWTON, state=cold.state)
    assert warm.stats.steps < cold.stats.steps
    torch.testing.assert_close(warm.y["y"], cold.y["y"], rtol=0, atol=1e-9)


def test_a_solver_without_a_tolerance_is_taken_as_it_is():
    class Fixed:
        """Steps that cannot be told when to stop."""

        offers, asked = Offers(), Gradient(steps=400, optimizer=SGD(lr=0.01))

        def init(self, y):
            return self.asked.init(y)

        def solve(self, *args, **options):
            return self.asked.solve(*args, **options)

    problem = Polyhedral(0, 1, 0)
    x, _ = problem.init(Streams(0))
    got = solved(problem, x, AugmentedLagrangian(rounds=4, penalty=5.0, solver=Fixed()))
    told = solved(problem, x, AugmentedLagrangian(rounds=4, penalty=5.0, solver=Fixed.asked))
    assert got.stats.steps == 4 * 400 > told.stats.steps
    y, _, _ = problem.solution(x)
    torch.testing.assert_close(got.y["y"], y, rtol=0, atol=1e-3)


def test_without_constraints_it_says_what_to_use():
    with pytest.raises(ProblemError, match="use lower: lbfgs"):
        solve_lower(
            lambda x, y, b: (y["y"] ** 2).sum(),
            {},
            {"y": torch.ones(2)},
            solver=AugmentedLagrangian(),
        )


# kkt upon it -----------------------------------------------------------------------------------


def at(problem, x, solver=NEWTON, estimator=None):
    return ask_anyway(problem, x, solved(problem, x, solver), estimator or KKT(solver=Dense()))


@pytest.mark.parametrize("seed", range(3))
def test_the_hypergradient_is_that_of_the_closed_form(seed):
    problem = Polyhedral(seed)
    x, _ = problem.init(Streams(seed))

    def value(x):
        return problem.upper_loss(x, {"y": problem.solution(x)[0]}, None)

    found = central(value, x, stream(0, "differences"))
    got = at(problem, x)
    assert_close({"x": found.along(got.hypergradient)}, {"x": found.slopes}, rtol=1e-7)
    assert got.stats.degenerate == 0
    wrong = at(problem, x, estimator=Implicit(solver=Dense())).hypergradient
    assert relative({"x": found.along(wrong)}, {"x": found.slopes}) > 0.05  # control


class Disc:
    """A curved set that x moves: min ‖y − a‖² over ‖y‖² ≤ x², so y* = x a / ‖a‖ for 0 < x < ‖a‖."""

    a = torch.tensor([3.0, 4.0], dtype=torch.float64)
    x = torch.tensor([2.0], dtype=torch.float64)

    def init(self, streams):
        return {"x": self.x}, {"y": torch.ones(2, dtype=torch.float64)}

    def upper_loss(self, x, y, batch):
        return (y["y"] * torch.tensor([1.0, 2.0], dtype=torch.float64)).sum() ** 2

    def lower_loss(self, x, y, batch):
        return (y["y"] - self.a).square().sum()

    def lower_constraints(self, x, y, batch):
        return {"inequality": (y["y"].square().sum() - x["x"].square().sum())[None]}

    upper_batches = lower_batches = Polyhedral.upper_batches


def test_a_curved_set():
    """F = (x (0.6 + 1.6))², so dΦ/dx = 2 · 2.2² x."""
    problem = Disc()
    got = at(problem, {"x": problem.x})
    assert_close(got.hypergradient, {"x": 2 * 2.2**2 * problem.x}, rtol=1e-8)


def made(problem, **options):
    parts = {"lower": NEWTON, "estimator": KKT(), "upper": Upper(steps=3)} | options
    return Setup(problem=problem, dtype=torch.float64, **parts)


@pytest.mark.parametrize("problem", [Polyhedral(0), Disc()], ids=["polyhedral", "disc"])
def test_check_finds_kkt_exact_and_refuses_implicit(problem):
    rows = {
        row.name: row
        for row in check(made(problem), {"kkt": KKT(), "implicit": Implicit()})
        if hasattr(row, "verdict")
    }
    assert rows["kkt"].reference == "central differences"
    assert rows["kkt"].verdict == "exact"
    assert rows["kkt"].error < 1e-5
    assert rows["implicit"].verdict == "refused"
    assert "lower_constraints" in rows["implicit"].note


def test_a_run_moves_x_along_the_true_hypergradient():
    problem = Disc()
    setup = made(problem, upper=Upper(steps=2, optimizer=SGD(lr=1e-2)))
    state = engine.start(setup)
    x = state.x["x"]
    for _ in engine.run(setup, state):
        pass
    for _ in range(2):
        x = x - 1e-2 * 2 * 2.2**2 * x
    torch.testing.assert_close(state.x["x"], x, rtol=1e-7, atol=0)


def test_only_what_keeps_them_may_run():
    with pytest.raises(ProblemError, match="use lower: augmented_lagrangian"):
        engine.refuse_mismatch(made(Disc(), lower=LBFGS()))
    engine.refuse_mismatch(made(Disc(), lower=replace(NEWTON, solver=LBFGS())))


def test_a_recipe_names_it():
    """The box is given as constraints and as a projection; its closed form is the truth."""
    text = """
problem: {name: box_qp}
lower: {name: augmented_lagrangian, tolerance: 1e-10, solver: {name: newton}}
estimator: {name: kkt}
upper: {steps: 2}
"""
    setup = assemble(recipe.loads(text, title="r"))
    (row,) = (row for row in check(setup, {"kkt": setup.estimator}) if hasattr(row, "verdict"))
    assert (row.reference, row.verdict) == ("closed form", "exact")
    assert row.error < 1e-7


def nearest(x, y, _):
    return (y["y"] - x["s"]).square().sum() / 2


def squares(offset):
    """c(y) = y² + offset: no root where the offset is positive."""
    return Structure(constraints=lambda x, y, _: {"equality": y["y"].square() + offset})


def test_constraints_that_cannot_be_met_end_it_early_and_are_said():
    x = {"s": torch.tensor(2.0, dtype=torch.float64)}
    start = {"y": torch.tensor([0.5], dtype=torch.float64)}
    end = solve_lower(nearest, x, start, solver=AugmentedLagrangian(), structure=squares(1.0))
    assert end.stats.infeasible
    assert end.stats.converged is False
    assert end.stats.violation == pytest.approx(1.0, abs=1e-2)  # least at y = 0
    assert end.stats.steps < 200
    # the same penalty again, on a problem that can be met: y = 2 is nearest to s
    on = solve_lower(
        nearest, x, start, solver=AugmentedLagrangian(), structure=squares(-4.0), state=end.state
    )
    assert on.stats.converged
    assert on.stats.infeasible is False
    assert float(on.y["y"]) == pytest.approx(2.0, abs=1e-8)


@pytest.mark.parametrize("offset", [-1.0, -1e-4, 0.0])
def test_constraints_that_can_be_met_are_not_called_infeasible(offset):
    x = {"s": torch.tensor(2.0, dtype=torch.float64)}
    start = {"y": torch.tensor([0.5], dtype=torch.float64)}
    end = solve_lower(nearest, x, start, solver=AugmentedLagrangian(), structure=squares(offset))
    assert not end.stats.infeasible
    assert float(end.y["y"]) == pytest.approx((-offset) ** 0.5, abs=1e-3)
