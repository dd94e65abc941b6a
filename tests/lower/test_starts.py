"""A start from which no solver can go on is named as such; no smaller step is offered for it."""

import math

import pytest
import torch

from bilevel import hypergradient, solve_lower
from bilevel.errors import ConvergenceError
from bilevel.estimators import Implicit
from bilevel.lower import LBFGS, AugmentedLagrangian, Gradient, Iterate, Newton, Proximal
from bilevel.optimizers import SGD
from bilevel.types import Structure

X = {"s": torch.tensor(2.0, dtype=torch.float64)}
B = torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64)

SOLVERS = {
    "gradient": Gradient(steps=200),
    "lbfgs": LBFGS(),
    "newton": Newton(),
    "proximal": Proximal(),
    "augmented_lagrangian": AugmentedLagrangian(tolerance=1e-6),
}
CONSTRAINED = Structure(constraints=lambda x, y, _: {"equality": y["w"][0:1] - 1})


def structure(solver):
    return CONSTRAINED if isinstance(solver, AugmentedLagrangian) else None


def kinked(x, y, _):
    """min at w = b; the length of w, at a weight of 0, has a derivative of 0/0 at w = 0."""
    return (y["w"] - B).square().sum() / 2 + 0 * y["w"].square().sum().sqrt()


def rooted(x, y, _):
    """min at w = b, with a term whose derivative at 0 is 0 · ∞."""
    return (y["w"] - B).square().sum() / 2 + 0.0 * y["w"].sqrt().sum()


def barrier(x, y, _):
    """min at w = b; infinite at w = 0."""
    return (y["w"] - B).square().sum() / 2 + 1e-30 / y["w"].square().sum()


def at(*values):
    return {"w": torch.tensor(values, dtype=torch.float64)}


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("loss", [kinked, rooted])
def test_a_gradient_without_a_value_at_the_start_names_the_start(name, loss):
    solver = SOLVERS[name]
    options = {"solver": solver, "structure": structure(solver)}
    with pytest.raises(ConvergenceError, match=r"gradient .* y\['w'\] has NaN .* before the first"):
        solve_lower(loss, X, at(0.0, 0.0, 0.0), **options)
    # control: from elsewhere the same solver finds the closed form
    good = solve_lower(loss, X, at(1.0, 1.0, 1.0), **options).y["w"]
    assert torch.allclose(good, B, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_loss_that_is_infinite_at_the_start_names_the_start(name):
    solver = SOLVERS[name]
    options = {"solver": solver, "structure": structure(solver)}
    with pytest.raises(
        ConvergenceError, match=r"^lower_loss = inf at finite x and y, before"
    ) as caught:
        solve_lower(barrier, X, at(0.0, 0.0, 0.0), **options)
    assert "give another start" in str(caught.value)
    good = solve_lower(barrier, X, at(1.0, 1.0, 1.0), **options).y["w"]
    assert torch.allclose(good, B, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_batch_that_is_not_finite_is_named_and_no_step_is_blamed(name):
    solver, bad = SOLVERS[name], B.clone()
    bad[1] = math.nan
    options = {"solver": solver, "structure": structure(solver)}

    def loss(x, y, batch):
        return (y["w"] - batch["rows"][0]).square().sum() / 2

    with pytest.raises(ConvergenceError) as told:
        solve_lower(loss, X, at(1.0, 1.0, 1.0), batch={"rows": [bad]}, **options)
    assert "because its batch is not finite: batch['rows'][0] has NaN" in str(told.value)
    assert "step" not in str(told.value)
    good = solve_lower(loss, X, at(1.0, 1.0, 1.0), batch={"rows": [B]}, **options).y["w"]
    assert torch.allclose(good, B, rtol=0, atol=1e-4)


def test_a_lower_loss_without_a_bound_is_said_to_have_none():
    def loss(x, y, _):
        return -y["w"].square().sum().exp()

    with pytest.raises(ConvergenceError, match=r"lower_loss = -inf .* has no lower bound no step"):
        solve_lower(loss, X, at(1.0, 1.0, 1.0), solver=Gradient(optimizer=SGD(lr=9.0)))


def test_newton_says_that_the_hessian_is_not_finite_and_lbfgs_solves_it():
    def powered(x, y, _):
        return (y["w"] - B).square().sum() / 2 + y["w"].abs().pow(1.5).sum()

    def normed(x, y, _):
        return (y["w"] - B).square().sum() / 2 + y["w"].norm()

    # w − b + 1.5 √w = 0: √w = (−1.5 + √(2.25 + 4 b)) / 2; and w = b (1 − 1 / ‖b‖), ‖b‖ = 3
    roots = (((2.25 + 4 * B).sqrt() - 1.5) / 2).square()
    for loss, right in ((powered, roots), (normed, B * 2 / 3)):
        with pytest.raises(ConvergenceError, match=r"∂²yy G is not finite .* lower: lbfgs"):
            solve_lower(loss, X, at(0.0, 0.0, 0.0), solver=Newton())
        got = solve_lower(loss, X, at(0.0, 0.0, 0.0), solver=LBFGS()).y["w"]
        assert torch.allclose(got, right, atol=1e-7)


@pytest.mark.parametrize("name", SOLVERS)
def test_nan_in_x_or_y_is_named_with_its_entry(name):
    solver = SOLVERS[name]
    options = {"solver": solver, "structure": structure(solver)}

    def loss(x, y, _):
        return (y["w"] - x["s"] * B).square().sum()

    with pytest.raises(ConvergenceError, match=r"x\['s'\] has NaN"):
        solve_lower(loss, {"s": X["s"] * math.nan}, at(1.0, 1.0, 1.0), **options)
    with pytest.raises(ConvergenceError, match=r"y\['w'\] has NaN"):
        solve_lower(loss, X, at(1.0, math.nan, 1.0), **options)


def test_nan_in_x_is_named_by_an_estimate_too():
    def F(x, y, _):
        return y["w"].square().sum()

    def G(x, y, _):
        return (y["w"] - x["s"] * B).square().sum() / 2

    with pytest.raises(ConvergenceError, match=r"upper_loss = nan because y\['w'\] has NaN"):
        hypergradient(F, G, X, at(1.0, math.nan, 1.0), estimator=Implicit())
    with pytest.raises(ConvergenceError, match=r"because x\['s'\] has NaN"):
        hypergradient(F, G, {"s": X["s"] * math.nan}, at(1.0, 1.0, 1.0), estimator=Implicit())
    found = hypergradient(F, G, X, {"w": 2 * B}, estimator=Implicit())
    assert float(found.hypergradient["s"]) == pytest.approx(4 * float(B @ B))


def test_a_later_step_that_leaves_the_domain_is_still_a_matter_of_the_step():
    def loss(x, y, _):
        return y["w"].square().sum() - y["w"].log().sum()

    with pytest.raises(
        ConvergenceError, match=r"^lower_loss = nan at finite x and y; a smaller step"
    ):
        solve_lower(loss, X, at(5.0, 5.0, 5.0), solver=Gradient(optimizer=SGD(lr=0.9)))
    # 2 w = 1 / w
    good = solve_lower(loss, X, at(5.0, 5.0, 5.0), solver=Gradient(steps=200))
    assert torch.allclose(good.y["w"], torch.full_like(B, 0.5**0.5))


def test_iterate_names_a_start_without_a_value_and_a_map_that_does_not_contract():
    def G(x, y, _):
        return y["w"].square().sum()

    rooted_map = Structure(map=lambda x, y, _: {"w": (y["w"] - 1).sqrt() + 2})
    with pytest.raises(ConvergenceError, match=r"lower_map\(x, y\)\['w'\] has NaN, before"):
        solve_lower(G, X, at(0.0, 2.0, 2.0), solver=Iterate(), structure=rooted_map)
    good = solve_lower(G, X, at(3.0, 3.0, 3.0), solver=Iterate(), structure=rooted_map)
    # w − 2 = √(w − 1): w = (5 + √5) / 2
    assert torch.allclose(good.y["w"], torch.full_like(B, (5 + 5**0.5) / 2))

    squared = Structure(map=lambda x, y, _: {"w": y["w"].square() * 2})
    with pytest.raises(ConvergenceError, match=r"after .* steps: lower_map does not contract"):
        solve_lower(G, X, at(3.0, 3.0, 3.0), solver=Iterate(), structure=squared)


def test_no_step_at_all_leaves_y_as_it_is_and_says_so():
    y = at(1.0, 2.0, 3.0)
    still = solve_lower(
        lambda x, y, batch: (y["w"] - batch).square().sum(),
        X,
        y,
        solver=Gradient(steps=0),
        batch=B,
        record=True,
    )
    assert torch.equal(still.y["w"], y["w"])
    assert (still.stats.steps, still.stats.gradients, still.stats.converged) == (0, 1, None)
    g = 2 * (y["w"] - B)
    assert still.stats.loss == pytest.approx(float((g / 2).square().sum()))
    assert still.stats.gradient_norm == pytest.approx(float(g.norm()))
    assert still.batch is B
    assert still.path is not None
    assert still.path.batches == ()
    one = solve_lower(
        lambda x, y, batch: (y["w"] - batch).square().sum(), X, y, solver=Gradient(steps=1), batch=B
    )
    assert not torch.equal(one.y["w"], y["w"])


def test_without_a_step_a_tolerance_says_whether_y_is_good_enough():
    def ask(y, **options):
        solver = Gradient(steps=0, **options)
        stats = solve_lower(distance, X, y, solver=solver, batch=B).stats
        return stats.converged, stats.stopped, stats.gradients

    away = at(1.0, 2.0, 3.0)
    assert ask(away, tolerance=1e-6) == (False, "iterations", 1)
    assert ask({"w": B.clone()}, tolerance=1e-6) == (True, "tolerance", 1)
    assert ask(away, relative_tolerance=1e-6) == (False, "iterations", 2)
    assert ask(away, accumulate=3) == (None, "iterations", 3)


def distance(x, y, batch):
    return (y["w"] - batch).square().sum()
