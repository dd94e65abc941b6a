"""The conditions of optimality under constraints, against closed forms."""

import itertools

import pytest
import torch

from bilevel import hypergradient
from bilevel.errors import ProblemError
from bilevel.estimators.fixed_point import FixedPoint
from bilevel.estimators.kkt import KKT
from bilevel.linear.dense import Dense
from bilevel.linear.minres import MINRES
from bilevel.rng import stream
from bilevel.types import Structure
from bilevel_problems.box_qp import BoxQP
from bilevel_problems.quadratic import Quadratic
from tests.cases import assert_close
from tests.estimators.maps import EXACT, SEEDS, ask, at_random


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("solver", [MINRES(iterations=300, tolerance=1e-13), Dense()], ids=repr)
def test_kkt_agrees_with_the_closed_form_of_the_box(solver, seed):
    p = BoxQP(data_seed=seed)
    x = at_random(p, seed)
    got = ask(p, x, p.lower_solution(x), KKT(solver=solver))
    assert_close(got.hypergradient, p.hypergradient(x), rtol=1e-9)
    assert (got.stats.gradients, got.stats.cross_products, got.stats.degenerate) == (3, 1, 0)


# an equality that x moves, by hand: y* = A⁻¹(c + Cᵀμ'), C y = d + E x


class Affine:
    """½ yᵀAy − cᵀy over C y = d + E x; the projection is that onto the affine set, so a prox."""

    def __init__(self, seed=0):
        s = stream(seed, "affine")
        draw = lambda *n: torch.randn(*n, generator=s, dtype=torch.float64)  # noqa: E731
        M = draw(7, 7)
        self.A, self.c, self.t = (
            M @ M.T / 7 + 0.5 * torch.eye(7, dtype=M.dtype),
            draw(7),
            draw(7) + 2,
        )
        self.C, self.d, self.E = draw(3, 7), draw(3), draw(3, 4)

    def upper_loss(self, x, y, batch):
        return 0.5 * ((y["y"] - self.t) ** 2).sum() + (x["x"] ** 2).sum()

    def lower_loss(self, x, y, batch):
        return 0.5 * y["y"] @ self.A @ y["y"] - self.c @ y["y"]

    def upper_batches(self, stream):
        return itertools.repeat(None)

    lower_batches = upper_batches

    def lower_constraints(self, x, y, batch):
        return {"equality": self.C @ y["y"] - self.d - self.E @ x["x"]}

    def prox_lower(self, x, y, step):
        gap = self.C @ y["y"] - self.d - self.E @ x["x"]
        return {"y": y["y"] - self.C.T @ torch.linalg.solve(self.C @ self.C.T, gap)}

    def closed(self, x):
        """(y*, dΦ/dx): y* = A⁻¹(c + Cᵀ S⁻¹(r − C A⁻¹ c)), S = C A⁻¹ Cᵀ, r = d + E x."""
        inverse = torch.linalg.inv(self.A)
        S = self.C @ inverse @ self.C.T
        response = inverse @ self.C.T @ torch.linalg.solve(S, self.E)
        r = self.d + self.E @ x
        y = inverse @ (self.c + self.C.T @ torch.linalg.solve(S, r - self.C @ inverse @ self.c))
        return {"y": y}, {"x": 2 * x + response.T @ (y - self.t)}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "estimator",
    [
        KKT(solver=Dense()),
        KKT(solver=MINRES(iterations=200, tolerance=1e-13)),
        FixedPoint(solver=EXACT),
    ],
    ids=["kkt dense", "kkt minres", "fixed point"],
)
def test_an_equality_that_x_moves(estimator, seed):
    p, x = Affine(seed), torch.linspace(-1, 2, 4, dtype=torch.float64)
    y, truth = p.closed(x)
    got = ask(p, {"x": x}, y, estimator)
    assert_close(got.hypergradient, truth, rtol=1e-9)
    assert got.stats.converged


def test_curvature_along_the_constraints_is_reported():
    p, x = Affine(0), torch.ones(4, dtype=torch.float64)
    y, _ = p.closed(x)
    _, _, Vh = torch.linalg.svd(p.C)
    free = Vh[3:].T @ Vh[3:]
    smallest = float(torch.linalg.eigvalsh(Vh[3:] @ p.A @ Vh[3:].T)[0])
    got = ask(p, {"x": x}, y, KKT(solver=Dense()))
    assert got.stats.curvature >= smallest - 1e-10
    p.A = p.A - 20 * free  # bends down wherever y may go; y stays stationary as c follows
    p.c = p.c - 20 * free @ y["y"]
    got = ask(p, {"x": x}, y, KKT(solver=Dense()))
    assert got.stats.curvature < 0


@pytest.mark.parametrize(
    "estimator", [FixedPoint(solver=EXACT), KKT(solver=Dense())], ids=["fixed point", "kkt"]
)
@pytest.mark.parametrize("shift", [0.0, 1e-9])
def test_a_multiplier_of_zero_is_flagged(estimator, shift):
    p = BoxQP()
    x = at_random(p, 0)
    y = p.lower_solution(x)
    assert ask(p, x, y, estimator).stats.degenerate == 0
    k = p.constants
    y = torch.linalg.solve(k["A"], k["B"] @ x["x"] + k["c"])
    p = BoxQP(bound=float(y.abs().max()) + shift)  # the set now only just touches y*
    got = ask(p, x, p.lower_solution(x), estimator)
    assert got.stats.degenerate >= 1
    assert (got.stats.converged, got.stats.stopped) == (False, "degenerate")


def test_dependent_constraints_are_flagged():
    p, x = Affine(0), torch.ones(4, dtype=torch.float64)
    y, truth = p.closed(x)
    once = p.lower_constraints
    p.lower_constraints = lambda x, y, b: {"equality": once(x, y, b)["equality"].repeat(2)}  # pyright: ignore
    got = ask(p, {"x": x}, y, KKT(solver=MINRES(iterations=200)))
    assert got.stats.degenerate == 3
    assert got.stats.converged is False
    assert_close(got.hypergradient, truth, rtol=1e-4)  # the least-norm solution is still right


def test_kkt_without_constraints_or_with_wrong_ones_says_so():
    q = Quadratic()
    x = at_random(q, 0)
    with pytest.raises(ProblemError, match="no constraints to hold"):
        ask(q, x, q.lower_solution(x), KKT())
    for wrong in ({"equal": x["x"]}, {"equality": x["x"].sum()}):
        structure = Structure(constraints=lambda x, y, b, wrong=wrong: wrong)
        with pytest.raises(ProblemError, match="expected vectors"):
            hypergradient(
                q.upper_loss,
                q.lower_loss,
                x,
                q.lower_solution(x),
                estimator=KKT(),
                upper_batch=q.constants,
                lower_batch=q.constants,
                structure=structure,
            )


def test_kkt_is_tight_with_a_multiplier_for_each_unknown():
    """The system has as many unknowns more as constraints are active, up to dim(y)."""
    assert KKT().tight(30).solver == MINRES().tight(60)
    p = Affine(0)
    p.C, p.d, p.E = torch.eye(7, dtype=p.A.dtype), torch.ones(7, dtype=p.A.dtype), p.A[:, :4]
    y, truth = p.closed(torch.ones(4, dtype=p.A.dtype))
    got = ask(p, {"x": torch.ones(4, dtype=p.A.dtype)}, y, KKT().tight(7))
    assert_close(got.hypergradient, truth, rtol=1e-9)
    assert got.stats.converged


def test_a_curved_constraint():
    """−(c + x d)ᵀy on the unit sphere: y* = u / ‖u‖, u = c + x d, and μ = ‖u‖ / 2 bends L."""
    s = stream(0, "sphere")
    c, d, t = (torch.randn(4, generator=s, dtype=torch.float64) for _ in range(3))
    x = torch.tensor([0.6], dtype=torch.float64)
    u = c + x * d
    y = u / u.norm()
    got = hypergradient(
        lambda x, y, b: 0.5 * ((y["y"] - t) ** 2).sum(),
        lambda x, y, b: -(c + x["x"] * d) @ y["y"],
        {"x": x},
        {"y": y},
        estimator=KKT(solver=Dense()),
        structure=Structure(constraints=lambda x, y, b: {"equality": (y["y"] @ y["y"])[None] - 1}),
    )
    response = (d - y * (y @ d)) / u.norm()
    assert_close(got.hypergradient, {"x": ((y - t) @ response)[None]}, rtol=1e-12)


@pytest.mark.parametrize(("pull", "doubtful"), [(1.0015e-3, 1), (1.0025e-3, 0)])
@pytest.mark.untrusted("a weakly active constraint is its subject")
def test_a_multiplier_is_measured_by_the_gradient_it_balances(pull, doubtful):
    """½‖y‖² − xᵀy over y₁ ≤ 0 and y₂ = 0, at y = 0: μ = x, and 1e-6 (1 + ‖x‖) is 1.002e-3."""
    got = hypergradient(
        lambda x, y, b: (y["y"] - 1).square().sum() + x["x"].square().sum(),
        lambda x, y, b: 0.5 * y["y"] @ y["y"] - x["x"] @ y["y"],
        {"x": torch.tensor([pull, 1001.0], dtype=torch.float64)},
        {"y": torch.zeros(2, dtype=torch.float64)},
        estimator=KKT(solver=Dense()),
        structure=Structure(
            constraints=lambda x, y, b: {"inequality": y["y"][:1], "equality": y["y"][1:]}
        ),
    )
    assert got.stats.degenerate == doubtful
