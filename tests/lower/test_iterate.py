"""Iterating the map that a problem has in place of a lower loss."""

from dataclasses import replace

import pytest
import torch

from bilevel import solve_lower
from bilevel.errors import ProblemError
from bilevel.lower.iterate import Iterate
from bilevel.problem.levels import structure_of
from bilevel.rng import Streams
from bilevel.types import Structure
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


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_the_tolerance_is_of_the_scale_of_y(scale):
    """An absolute one of 1e-8 had called a y of 1e-9, far from its fixed point, solved at once."""

    def halfway(x, y, _):
        return {"y": (y["y"] + scale * x["x"]) / 2}

    def G(x, y, _):
        return (y["y"] - halfway(x, y, None)["y"]).square().sum() / 2

    x, y0 = ({name: torch.full((2,), value).double()} for name, value in (("x", 3.0), ("y", 0.0)))
    held = Structure(map=halfway)
    found = solve_lower(G, x, y0, solver=Iterate(), structure=held)
    assert found.stats.converged
    assert found.stats.steps == 27  # 2⁻ⁿ ≤ 1e-8, whatever the scale
    assert_close(found.y, {"y": scale * x["x"]}, rtol=1e-7)
    again = solve_lower(G, x, found.y, solver=Iterate(), structure=held, state=found.state)
    assert again.stats.steps == 1  # control: a start at the solution is seen as one
    absolute = solve_lower(G, x, y0, solver=Iterate(tolerance=1e-8), structure=held)
    assert (absolute.stats.steps == 1) is (scale == 1e-9)


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
