"""The table of warnings: what makes each line hold, and what keeps it back."""

from dataclasses import replace

import pytest
import torch

from bilevel.estimators.implicit import Implicit
from bilevel.estimators.penalty import Penalty
from bilevel.linear.cg import CG
from bilevel.run.warnings import TABLE, Step, found
from bilevel.types import Estimate, LowerSolution, LowerStats, Stats

RIGHT = Stats(residual=1e-8, curvature=1.0, converged=True, stopped="tolerance")
SHORT = replace(RIGHT, residual=1e-3, converged=False)


def step(stats=RIGHT, estimator=None, gradient_norm=1e-9, h=1.0, length=None):
    """One upper step with ‖h‖ = h, from a y of length 1 whose solve met its tolerance."""
    lower = LowerSolution(
        {"y": torch.ones(1, dtype=torch.float64)},
        None,
        LowerStats(3, 3, 0.0, gradient_norm, converged=True),
        None,
    )
    h_ = {"x": torch.tensor([h], dtype=torch.float64)}
    estimate = Estimate(h_, torch.zeros(()), None, stats, step=length)
    return Step(estimator or Implicit(), estimate, lower)


CASES = {
    "curvature": (step(replace(RIGHT, curvature=-0.5)), "curvature -0.5"),
    "no curvature at all": (step(replace(RIGHT, curvature=0.0)), "curvature 0"),
    "degenerate": (step(replace(SHORT, degenerate=2)), "2 of the lower level's kinks"),
    "inner solve": (step(Stats(converged=False), Penalty()), "estimator.strength"),
    "adjoint": (step(replace(SHORT, stopped="iterations", iterations=20)), "after 20 iterations"),
    "adjoint, rounding": (step(replace(SHORT, stopped="rounding")), "as far as the dtype allows"),
    "adjoint, stagnation": (step(replace(SHORT, stopped="stagnation")), "gains nothing more"),
    "residual": (step(replace(RIGHT, residual=0.3)), "estimator.solver.iterations, or look"),
    "lower solve": (step(gradient_norm=0.3), "set lower.tolerance to 1e-03"),
}


@pytest.mark.parametrize(("case", "said"), CASES.values(), ids=CASES)
def test_each_line_of_the_table_can_hold_alone(case, said):
    ((_, message),) = found(case).items()
    assert said in message


def test_no_line_is_left_out():
    lines = [row for row in TABLE if any(row.holds(case) for case, _ in CASES.values())]
    assert lines == list(TABLE)


def test_what_is_right_is_not_warned_of():
    assert not found(step())


def test_what_explains_the_others_speaks_alone():
    """Negative curvature makes the residual large and the solve end."""
    stats = replace(SHORT, curvature=-1.0, residual=0.5, degenerate=1, stopped="curvature")
    assert list(found(step(stats))) == ["curvature"]
    assert list(found(step(replace(stats, curvature=1.0)))) == ["degenerate", "residual"]


@pytest.mark.parametrize(("bound", "said"), [(None, True), (0.2, True), (0.05, False)])
def test_a_large_residual_is_no_matter_where_the_error_is_known_to_be_small(bound, said):
    stats = replace(SHORT, residual=0.5, error_bound=bound, stopped="iterations")
    assert ("residual" in found(step(stats))) == said


def test_a_method_that_chooses_its_step_means_its_residual():
    stats = replace(RIGHT, residual=0.5)
    assert list(found(step(stats))) == ["residual"]
    assert not found(step(stats, length=0.1))


@pytest.mark.parametrize(("g", "said"), [(1e-13, []), (1e-3, ["lower solve"])])
def test_y_at_zero_is_not_called_unsolved(g, said):
    """Its length says nothing of how far it is from a y* of zero."""
    near = step(replace(RIGHT, curvature=2.0), Implicit(solver=CG()), gradient_norm=g)
    zero = replace(near.lower, y={"y": torch.full((3,), 1e-14, dtype=torch.float64)})
    assert list(found(replace(near, lower=zero))) == said
