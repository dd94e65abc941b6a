"""A loss that is cut from its graph, or does not depend on y, is refused by every estimator and solver."""

import itertools

import pytest
import torch

import bilevel
from bilevel.errors import ProblemError
from bilevel.estimators.bome import Bome
from bilevel.estimators.forward import Forward
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.joint import Joint
from bilevel.estimators.moreau import Moreau
from bilevel.estimators.one_step import OneStep
from bilevel.estimators.penalty import Penalty
from bilevel.estimators.sama import Sama
from bilevel.estimators.unroll import Unroll
from bilevel.estimators.value_gap import ValueGap
from bilevel.estimators.zeroth_order import ZerothOrder
from bilevel.lower.gradient import Gradient
from bilevel.lower.lbfgs import LBFGS
from bilevel.lower.newton import Newton
from bilevel.lower.proximal import Proximal
from bilevel.run.engine import Setup, run, start
from bilevel.run.upper import Upper
from bilevel.types import LowerSolution, Structure

X = {"s": torch.tensor(0.7, dtype=torch.float64)}
Y = {"w": torch.tensor([0.3, -0.4], dtype=torch.float64)}
GOAL = torch.tensor([1.0, 2.0], dtype=torch.float64)
MODEL = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))


def upper(x, y, batch):
    return (y["w"] - GOAL).square().sum()


def lower(x, y, batch):
    return 0.5 * (y["w"] - x["s"]).square().sum()


def without_grad(loss):
    def cut(x, y, batch):
        with torch.no_grad():
            return loss(x, y, batch)

    return cut


def detached(loss):
    return lambda x, y, batch: loss(x, y, batch).detach()


def as_a_number(loss):
    return lambda x, y, batch: torch.tensor(loss(x, y, batch).item(), dtype=torch.float64)


def of_a_model(loss):
    """The mistake of calling a module instead of a function of its parameters."""
    return lambda x, y, batch: loss({"s": MODEL.sum()}, {"w": MODEL}, batch)


def of_detached_y(loss):
    return lambda x, y, batch: loss(x, {"w": y["w"].detach()}, batch) + x["s"] ** 2


CUTS = [without_grad, detached, as_a_number, of_a_model, of_detached_y]


def hypergradient(F, G, estimator):
    solved = bilevel.solve_lower(lower, X, Y, solver=Gradient(steps=3), record=True)
    pairs = bilevel.solve_lower(lower, X, Y, solver=LBFGS(steps=3)).pairs
    return bilevel.hypergradient(
        F,
        G,
        X,
        LowerSolution(solved.y, path=solved.path, pairs=pairs),
        estimator=estimator,
        batches=(itertools.repeat(None), itertools.repeat(None)),
    )


@pytest.mark.parametrize("cut", CUTS, ids=lambda f: f.__name__)
def test_a_cut_upper_loss_is_refused(cut):
    with pytest.raises(ProblemError, match=r"upper_loss does not depend on y.*no_grad"):
        hypergradient(cut(upper), lower, Implicit())


@pytest.mark.parametrize("cut", CUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "solver",
    [Gradient(), Gradient(tolerance=1e-8), LBFGS(), Proximal(), Newton()],
    ids=repr,
)
def test_no_solver_takes_a_cut_lower_loss_for_solved(solver, cut):
    with pytest.raises(ProblemError, match=r"lower_loss does not depend on y.*no_grad"):
        bilevel.solve_lower(cut(lower), X, Y, solver=solver)
    # the control: what is left alone is solved
    solved = bilevel.solve_lower(lower, X, Y, solver=solver)
    assert solved.stats.gradient_norm < 0.5


@pytest.mark.parametrize("cut", CUTS, ids=lambda f: f.__name__)
def test_unroll_refuses_a_cut_lower_loss(cut):
    with pytest.raises(ProblemError, match=r"lower_loss does not depend on y.*no_grad"):
        bilevel.unroll(cut(lower), X, Y, steps=2)


@pytest.mark.parametrize("level", ["upper", "lower"])
@pytest.mark.parametrize("cut", CUTS, ids=lambda f: f.__name__)
def test_a_run_refuses_it(cut, level):
    class Cut:
        def init(self, streams):
            return X, Y

        def upper_loss(self, x, y, batch):
            return (cut(upper) if level == "upper" else upper)(x, y, batch)

        def lower_loss(self, x, y, batch):
            return (cut(lower) if level == "lower" else lower)(x, y, batch)

        def upper_batches(self, stream):
            return itertools.repeat(None)

        lower_batches = upper_batches

    setup = Setup(Cut(), Gradient(steps=2), Upper(steps=1), Implicit(), dtype=torch.float64)
    with pytest.raises(ProblemError, match=rf"{level}_loss does not depend on y") as caught:
        list(run(setup, start(setup)))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("cut", CUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("level", ["upper", "lower"])
@pytest.mark.parametrize(
    "estimator",
    [
        Implicit(),
        Unroll(),
        Unroll(memory="recompute"),
        Unroll(memory="mixed"),
        OneStep(),
        OneStep(finite_difference=True),
        Penalty(),
        ValueGap(),
        Bome(),
        Moreau(),
        Sama(),
        Joint(),
        Forward(),
    ],
    ids=lambda e: type(e).__name__,
)
def test_every_estimator_refuses_it(estimator, level, cut):
    F, G = (cut(upper), lower) if level == "upper" else (upper, cut(lower))
    with pytest.raises(ProblemError, match=rf"{level}_loss does not depend on y"):
        hypergradient(F, G, estimator)


# what is meant, and right


def test_an_upper_loss_without_x_and_one_that_says_that_y_is_not_in_it():
    """F of y alone: dΦ/ds = Σ (s − b), y* = s. And F = s² of x alone, said by 0 · y: 2 s."""
    y = {"w": X["s"].expand(2).clone()}
    got = bilevel.hypergradient(upper, lower, X, y, estimator=Implicit()).hypergradient["s"]
    assert float(got) == pytest.approx(2 * (1.4 - 3.0))
    alone = lambda x, y, b: x["s"] ** 2 + 0 * y["w"].sum()  # noqa: E731
    got = bilevel.hypergradient(alone, lower, X, y, estimator=Implicit()).hypergradient["s"]
    assert float(got) == pytest.approx(1.4)


def test_a_lower_loss_without_x_where_x_acts_elsewhere():
    """y* = prox of s ‖·‖² / 2 at the fixed point: G = ½ ‖y − b‖² has no x; y* = b / (1 + s)."""
    structure = Structure(prox=lambda x, z, step: {"w": z["w"] / (1 + step * x["s"])})
    goal = lambda x, y, b: 0.5 * (y["w"] - GOAL).square().sum()  # noqa: E731
    solved = bilevel.solve_lower(goal, X, Y, solver=Proximal(), structure=structure)
    assert torch.allclose(solved.y["w"], GOAL / 1.7)


def test_a_function_whose_values_alone_are_used_may_have_no_graph():
    """zeroth_order takes differences of F: a measure that is not differentiable is what it is for."""
    h = hypergradient(as_a_number(upper), lower, ZerothOrder()).hypergradient["s"]
    assert torch.isfinite(h)
    assert float(h) != 0
