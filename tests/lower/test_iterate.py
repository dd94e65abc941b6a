"""Iterating the map that a problem has in place of a lower loss."""

from dataclasses import replace

import pytest
import torch

from bilevel import solve_lower
from bilevel.errors import ProblemError
from bilevel.lower.iterate import Iterate
from bilevel.problem.levels import structure_of
from bilevel.rng import Streams
from bilevel_problems.quadratic import Quadratic
from tests.cases import assert_close
from tests.estimators.maps import Recurrent


def test_iterating_the_map():
    p = Recurrent(0)
    y0 = {"y": torch.zeros(6, dtype=torch.float64)}
    solved = solve_lower(
        p.lower_loss,
        p.x,
        y0,
        solver=Iterate(steps=500, tolerance=1e-12),
        structure=structure_of(p),
    )
    assert solved.stats.converged
    assert solved.stats.gradients == solved.stats.steps < 500
    assert_close(solved.y, p.solved(), rtol=1e-11)
    few = solve_lower(
        p.lower_loss,
        p.x,
        y0,
        solver=Iterate(steps=3, tolerance=1e-12),
        structure=structure_of(p),
    )
    y = y0
    for _ in range(3):
        last, y = y, p.lower_map(p.x, y, None)
    assert torch.equal(few.y["y"], y["y"])
    assert not few.stats.converged
    assert few.stats.gradient_norm == pytest.approx(float((y["y"] - last["y"]).norm()))


def test_iterate_without_a_map_says_so():
    q = Quadratic()
    x, y = q.init(Streams(0))
    with pytest.raises(ProblemError, match="no map to iterate"):
        solve_lower(q.lower_loss, x, y, solver=Iterate(), batch=q.constants)


def test_iterate_refuses_a_projection():
    p = Recurrent(0)
    with pytest.raises(ProblemError, match="has project_lower, and Iterate would ignore it"):
        solve_lower(
            p.lower_loss,
            p.x,
            {"y": p.t},
            solver=Iterate(),
            structure=replace(structure_of(p), project=lambda y: y),
        )
