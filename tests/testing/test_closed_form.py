"""A `lower_solution` is held to ∇y G before anything else is judged by it."""

import pytest
import torch

from bilevel import tree
from bilevel.errors import ProblemError
from bilevel.estimators import FixedPoint, Implicit
from bilevel.lower import LBFGS, Gradient, Proximal
from bilevel.run.engine import Setup
from bilevel.run.upper import Upper
from bilevel.testing import check
from bilevel.testing.check_scenes import CheckScenes
from bilevel_problems.box_qp import BoxQP
from bilevel_problems.lasso import Lasso
from bilevel_problems.quadratic import Quadratic
from bilevel_problems.ridge import Ridge

WRONG = {
    "moved": lambda y: tree.map(lambda p: p + 0.3, y),
    "scaled": lambda y: tree.scale(1.1, y),
    "a little": lambda y: tree.scale(1 + 1e-4, y),
    "zero": tree.zeros_like,
}


def scenes(problem, solver, estimator, dtype=torch.float64, **options):
    setup = Setup(problem, solver, Upper(steps=1), estimator, dtype=dtype, **options)
    return CheckScenes(setup, 0.1).own.scene


def altered(base, change, **options):
    right = base.lower_solution

    def lower_solution(self, x):
        return change(right(self, x))

    return type("Mine", (base,), {"lower_solution": lower_solution})(**options)


@pytest.mark.parametrize("solver", [Gradient(steps=5), LBFGS()], ids=["far", "near"])
@pytest.mark.parametrize("kind", WRONG)
def test_one_that_is_none_is_refused(kind, solver):
    given = altered(Ridge, WRONG[kind], data="synthetic")
    with pytest.raises(
        ProblemError, match=r"^Mine\.lower_solution is not a solution: ‖∇y G‖ = \S+ the"
    ):
        scenes(given, solver, Implicit())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("solver", [Gradient(steps=5), LBFGS()], ids=["far", "near"])
@pytest.mark.parametrize(
    "problem", [Ridge(data="synthetic"), Quadratic()], ids=["ridge", "quadratic"]
)
def test_one_that_is_one_is_taken(problem, solver, dtype):
    assert scenes(problem, solver, Implicit(), dtype).stationary


def test_in_float32_what_is_off_by_more_than_rounding_is_refused():
    given = altered(Ridge, WRONG["scaled"], data="synthetic")
    with pytest.raises(ProblemError, match="is not a solution"):
        scenes(given, LBFGS(), Implicit(), torch.float32)


RESTRICTED = [(BoxQP, Gradient(steps=50)), (Lasso, Proximal())]


@pytest.mark.parametrize(("base", "solver"), RESTRICTED)
def test_where_y_is_restricted_the_restricted_step_is_looked_at(base, solver):
    scenes(base(), solver, FixedPoint())  # where ∇y G is not 0
    for change in (lambda y: tree.scale(0.9, y), WRONG["zero"]):
        said = r"is not a solution: .*a (projected|proximal) step from it leads \S+ away"
        with pytest.raises(ProblemError, match=said):
            scenes(altered(base, change), solver, FixedPoint())


class Kinked(Ridge):
    """G = |w| in asymmetric slopes: torch has ∇y G = 1 at its minimum."""

    def lower_loss(self, x, y, batch):
        return torch.where(y["w"] >= 0, y["w"], -2 * y["w"]).sum() + 0 * x["log_penalty"].sum()

    def lower_solution(self, x):
        w = super().lower_solution(x)["w"]
        return {"w": torch.full_like(w, self.at)}

    at = 0.0


def test_a_minimum_at_a_kink_is_taken_and_a_slope_without_curvature_is_not():
    given = Kinked(data="synthetic")
    assert scenes(given, Gradient(steps=1), Implicit()).stationary
    away = type("Mine", (Kinked,), {"at": 1.0})(data="synthetic")
    with pytest.raises(ProblemError, match=r"^Mine\.lower_solution is not a solution"):
        scenes(away, Gradient(steps=1), Implicit())


def test_check_ends_before_an_estimator_is_blamed():
    setup = Setup(altered(Ridge, WRONG["moved"], data="synthetic"), LBFGS(), Upper(), Implicit())
    with pytest.raises(ProblemError, match=r"Correct it, or take it out"):
        list(check(setup, {"implicit": Implicit()}))
