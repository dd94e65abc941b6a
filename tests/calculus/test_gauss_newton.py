"""Gauss-Newton products: JᵀHJ typed out, semidefinite where the Hessian is not, exact where linear."""

import pytest
import torch

from bilevel import calculus, hypergradient, tree
from bilevel.calculus.gauss_newton import Composed, gauss_newton
from bilevel.errors import ProblemError
from bilevel.estimators.implicit import Implicit
from bilevel.linear.cg import CG
from bilevel.linear.dense import Dense, matrix
from bilevel.types import Counts, Loss, Point
from tests.cases import assert_close, relative


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


INPUTS, TARGETS = normal(12, 3, seed=1), normal(12, 2, seed=2)


def net(x, y, _):
    return torch.tanh(INPUTS * x["scale"] @ y["first"].T + y["bias"]) @ y["second"].T


def linear_net(x, y, _):
    return INPUTS * x["scale"] @ y["first"].T[:, :2] + y["bias"][:2] + y["second"].sum()


def loss(x, y, z, _):
    """Not a function of z alone: a penalty on y, and a term that mixes both."""
    fit = ((z - TARGETS) ** 2).sum() + 0.1 * (z**4).mean()
    penalty = 0.5 * x["decay"].exp() * sum((entry**2).sum() for entry in y.values())
    return fit + penalty + 0.01 * (z.sum() + y["bias"].sum()) ** 2


G = Composed(outputs=net, loss=loss)


@pytest.fixture
def at():
    x = {"scale": 1 + 0.1 * normal(3, seed=3), "decay": torch.tensor(-3.0, dtype=torch.float64)}
    y = {"first": normal(4, 3), "bias": normal(4, seed=5), "second": normal(2, 4, seed=6)}
    return Point(x, y)


def bound(function):
    return Loss(function, None, Counts(), "lower")


def typed_out(function, at):
    """[I; J]ᵀ ∇²loss [I; J] from whole Jacobians and a whole Hessian."""
    flat = tree.flatten(at.y)

    def outputs(vector):
        return function.outputs(at.x, tree.unflatten(vector, at.y), None).reshape(-1)

    def of_both(both):
        y, z = both[: len(flat)], both[len(flat) :]
        return function.loss(at.x, tree.unflatten(y, at.y), z.reshape(12, 2), None)

    J = torch.autograd.functional.jacobian(outputs, flat)
    H = torch.autograd.functional.hessian(of_both, torch.cat([flat, outputs(flat)]))
    stacked = torch.cat([torch.eye(len(flat), dtype=torch.float64), J])
    return stacked.T @ H @ stacked


@pytest.mark.parametrize("outputs", [net, linear_net])
def test_the_product_is_its_formula_typed_out(outputs, at):
    function = Composed(outputs=outputs, loss=loss)
    got = matrix(gauss_newton(bound(function), at), at.y)
    torch.testing.assert_close(got, typed_out(function, at), rtol=1e-10, atol=1e-10)


def test_semidefinite_where_the_hessian_is_not(at):
    hessian = matrix(calculus.linearize(bound(G), at).hvp_yy, at.y)
    product = matrix(gauss_newton(bound(G), at), at.y)
    assert torch.linalg.eigvalsh(hessian)[0] < -0.1
    assert torch.linalg.eigvalsh(product)[0] > 0.04  # the penalty's exp(−3), less rounding
    assert float((hessian - product).norm() / hessian.norm()) > 0.1


def test_the_hessian_where_the_outputs_are_linear(at):
    function = Composed(outputs=linear_net, loss=loss)
    hessian = matrix(calculus.linearize(bound(function), at).hvp_yy, at.y)
    got = matrix(gauss_newton(bound(function), at), at.y)
    torch.testing.assert_close(got, hessian, rtol=1e-10, atol=1e-10)


def upper(x, y, _):
    return sum(((entry - 0.3) ** 2).sum() for entry in y.values())


@pytest.mark.untrusted("G is not convex there on purpose")
def test_implicit_solves_with_it_and_counts_it(at):
    estimator = Implicit(solver=Dense(), curvature="gauss_newton")
    got = hypergradient(upper, G, at.x, at.y, estimator=estimator)
    v = torch.linalg.solve(
        typed_out(G, at), tree.flatten(calculus.gradient_y(bound(upper), at.x, at.y)[1])
    )
    lower = calculus.linearize(bound(G), at)
    cross = lower.vjp_xy(tree.unflatten(v, at.y))
    assert_close(got.hypergradient, tree.scale(-1.0, cross), rtol=1e-9)
    size = tree.size(at.y)
    counted = got.stats.gradients, got.stats.hvps, got.stats.cross_products
    assert counted == (3, size, 1)
    exact = hypergradient(upper, G, at.x, at.y, estimator=Implicit(solver=Dense()))
    assert relative(got.hypergradient, exact.hypergradient) > 0.1  # negative control
    assert exact.stats.gradients == 2
    assert estimator.claim is None


@pytest.mark.untrusted("G is not convex there on purpose")
def test_cg_goes_through_where_the_hessian_stops_it(at):
    solver = CG(iterations=200, tolerance=1e-9)
    plain = hypergradient(upper, G, at.x, at.y, estimator=Implicit(solver=solver))
    assert plain.stats.converged is False
    assert plain.stats.curvature <= 0
    estimator = Implicit(solver=solver, curvature="gauss_newton")
    got = hypergradient(upper, G, at.x, at.y, estimator=estimator)
    assert got.stats.converged
    assert got.stats.curvature > 0


@pytest.mark.untrusted("G is not convex there on purpose")
def test_it_is_the_loss_that_it_stands_for(at):
    def plain(x, y, batch):
        return loss(x, y, net(x, y, batch), batch)

    got, expected = (
        hypergradient(upper, f, at.x, at.y, estimator=Implicit(solver=Dense())) for f in (G, plain)
    )
    assert_close(got.hypergradient, expected.hypergradient, rtol=1e-14)


def test_another_loss_is_refused_with_the_remedy(at):
    estimator = Implicit(curvature="gauss_newton")
    with pytest.raises(ProblemError, match=r"Composed\(outputs"):
        hypergradient(upper, lambda x, y, b: G(x, y, b), at.x, at.y, estimator=estimator)


def test_tied_variables(at):
    """One tensor under two names is one variable, for Gauss-Newton too."""
    shared = at.y["bias"]
    y = {**at.y, "again": shared}

    def outputs(x, y, batch):
        return net(x, y, batch) + y["again"].sum()

    def penalised(x, y, z, batch):
        return loss(x, {n: y[n] for n in at.y}, z, batch) + y["again"].square().sum()

    def joined(function):
        return lambda x, y, *rest: function(x, {**y, "again": y["bias"]}, *rest)

    estimator = Implicit(solver=Dense(), curvature="gauss_newton")
    tied = Composed(outputs=outputs, loss=penalised)
    got = hypergradient(upper, tied, at.x, y, estimator=estimator)
    one = Composed(outputs=joined(outputs), loss=joined(penalised))
    expected = hypergradient(joined(upper), one, at.x, at.y, estimator=estimator)
    assert_close(got.hypergradient, expected.hypergradient, rtol=1e-10)
