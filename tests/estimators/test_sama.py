"""SAMA: its formula, and the order of its error."""

import math

import pytest
import torch

from bilevel import hypergradient, minimize
from bilevel.errors import ProblemError
from bilevel.estimators.alternating import Alternating
from bilevel.estimators.sama import Sama
from bilevel.estimators.unroll import Unroll
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import SGD, Adam, RMSprop
from bilevel.types import LowerSolution, Path
from tests.cases import PROBLEMS, assert_close, closed_form, relative


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
    got = case.estimate(Sama(), LowerSolution({"y": end}, path=path))
    assert_close(got.hypergradient, expected, rtol=1e-9)
    assert relative({"x": at.F_x(end) + at.k["B"].T @ at.F_y(end)}, expected) > 1e-2  # control
    assert (got.stats.gradients, got.stats.hvps, got.stats.cross_products) == (4 + 3, 0, 0)
    last = Path(optimizer, {"y": y}, state, path.batches[:1])
    again = case.estimate(Sama(), LowerSolution({"y": end}, path=last))
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
            hypergradient(
                upper, lower, x, LowerSolution(y, path=path), estimator=Sama(epsilon=e)
            ).hypergradient,
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
        lambda x, y, b: (x["x"] ** 2).sum() + 0 * y["y"].sum(),
        lambda x, y, b: ((y["y"] - x["x"]) ** 2).sum(),
        {"x": torch.ones(2)},
        LowerSolution({"y": torch.zeros(2)}, path=Path(SGD(), {"y": torch.zeros(2)}, {}, (None,))),
        estimator=Sama(),
    )
    assert torch.equal(got.hypergradient["x"], torch.full((2,), 2.0))


def test_where_the_lower_solve_takes_no_step_only_the_direct_part_is_left():
    """As of an unrolled path of no steps: y does not move with x."""
    lower = Gradient(steps=9, tolerance=1e6)
    found = [
        minimize("quadratic", estimator=one, lower=lower, steps=3, dtype="float64", progress=False)
        for one in (Sama(), Unroll(), Alternating())
    ]
    assert all(step.hypergradient_norm > 0 for step in found[0].history)
    assert all(step.lower.steps == 0 for step in found[0].history)
    for other in found[1:]:
        assert torch.equal(found[0].x["x"], other.x["x"])
