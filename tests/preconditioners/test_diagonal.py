"""A diagonal that the problem knows."""

import pytest
import torch

from bilevel import tree
from bilevel.errors import ProblemError
from bilevel.preconditioners.diagonal import Diagonal
from bilevel.problem.levels import structure_of
from bilevel.types import Counts, Loss, Losses, Point, System
from bilevel_problems.logistic import Logistic
from tests.adjoint.systems import seen_by
from tests.cases import PROBLEMS, closed_form


def test_a_known_diagonal_is_that_and_the_damping():
    case = closed_form(PROBLEMS[0], 0)
    made, _ = seen_by(case, damping=0.5)
    given = Diagonal(function=lambda x, y, batch: tree.map(lambda p: p.abs() + 1, y))
    inverse, _ = given.prepare(made, given.init(made.at))
    expected = 1 / (case.y["y"].abs() + 1.5)
    torch.testing.assert_close(inverse(made.b)["y"], expected, rtol=1e-14, atol=0)


def test_the_problem_may_know_its_diagonal():
    problem = Logistic(data="synthetic", num_features=12)
    x, y = problem.init(None)
    y = {"w": y["w"] + 0.3}
    batch = problem.splits["lower"]
    got = problem.lower_diagonal(x, y, batch)["w"]
    losses = Losses(
        Loss(problem.upper_loss, batch, Counts(), "upper"),
        Loss(problem.lower_loss, batch, Counts(), "lower", structure=structure_of(problem)),
    )
    from bilevel.calculus.products import linearize
    from bilevel.linear.dense import matrix

    H = matrix(linearize(losses.lower, Point(x, y)).hvp_yy, y)
    torch.testing.assert_close(got, H.diagonal(), rtol=1e-12, atol=0)
    made = System(lambda v: v, y, losses, Point(x, y), 0.0, None)
    inverse, _ = Diagonal().prepare(made, {})
    torch.testing.assert_close(inverse(y)["w"], y["w"] / got, rtol=1e-12, atol=0)


def test_a_diagonal_nobody_knows_or_that_is_wrong_is_refused():
    case = closed_form(PROBLEMS[0], 0)
    made, _ = seen_by(case)
    with pytest.raises(ProblemError, match="hutchinson"):
        Diagonal().prepare(made, {})
    with pytest.raises(ProblemError, match="not positive"):
        Diagonal(function=lambda x, y, b: tree.zeros_like(y)).prepare(made, {})
    with pytest.raises(ProblemError, match="shapes"):
        Diagonal(function=lambda x, y, b: {"y": torch.ones(3)}).prepare(made, {})
