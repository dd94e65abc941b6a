"""A learned start and the pessimistic path: IAPTT."""

import math

import pytest
import torch

from bilevel import hypergradient, solve_lower
from bilevel.estimators.forward import Forward
from bilevel.estimators.unroll import Unroll
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import SGD
from bilevel.problem.learned_start import LearnedStart
from bilevel.registry.build import build
from bilevel.run.engine import Setup, run, start
from bilevel.run.upper import Upper
from bilevel.testing import check
from tests.estimators.starts import Sine, setup


def where_it_ends(problem, estimator):
    """(x, F there at the lower solution nearest to y) after 300 steps."""
    made = Setup(
        problem,
        Gradient(steps=15, optimizer=SGD(lr=0.3)),
        Upper(steps=300, optimizer=SGD(lr=0.1)),
        estimator,
        dtype=torch.float64,
    )
    state = start(made)
    for _ in run(made, state):
        pass
    x, y = float(state.x["x"]), float(state.y["y"])
    basin = -math.pi / 2 + 2 * math.pi * round((x + y - 2 + math.pi / 2) / (2 * math.pi))
    return x, (x - 2) ** 2 + (basin - x - 2) ** 2


def test_iaptt_leaves_the_basin_that_unrolling_is_caught_in():
    x_best, F_best = 3 * math.pi / 4, (3 * math.pi / 2 - 4) ** 2 / 2
    x, F = where_it_ends(LearnedStart(problem=Sine()), build("estimators", "iaptt"))
    assert x == pytest.approx(x_best, abs=2e-3)
    assert pytest.approx(F_best, abs=1e-4) == F


def test_unrolling_is_caught_there():
    _, F = where_it_ends(Sine(), Unroll())
    assert pytest.approx((-2.5 * math.pi - 4) ** 2 / 2, rel=1e-3) == F


def test_a_learned_start_alone_is_not_enough():
    _, F = where_it_ends(LearnedStart(problem=Sine()), Unroll())
    assert F > 10


@pytest.mark.parametrize("memory", ["store", "recompute"])
def test_the_pessimistic_path_ends_where_F_is_largest(memory):
    def hill(x, y, batch):
        """Largest along the way: y passes 1 on its path from 0 to 3."""
        return -((y["y"] - x["x"]).square()).sum()

    def well(x, y, batch):
        return 0.5 * (y["y"] - 3).square().sum()

    one = {"x": torch.ones(1, dtype=torch.float64)}

    def restart(x):
        return {"y": 0.1 * x["x"]}

    solver = Gradient(steps=8, optimizer=SGD(lr=0.25))
    solution = solve_lower(well, one, restart, solver=solver, record=True)
    got = hypergradient(
        hill,
        well,
        one,
        solution,
        estimator=Unroll(pessimistic=True, memory=memory),
    )
    # y_k = 3 − 0.75ᵏ (3 − 0.1 x): 0.825, 1.369, ...; F = −(y_k − x)² is largest at k = 1
    assert got.stats.iterations == 1
    y, dy = 3 - 0.75 * 2.9, 0.75 * 0.1
    assert float(got.value) == pytest.approx(-((y - 1) ** 2), rel=1e-12)
    assert float(got.hypergradient["x"]) == pytest.approx(-2 * (y - 1) * (dy - 1), rel=1e-12)
    last = Unroll(pessimistic=True, memory=memory, last=3)
    late = hypergradient(hill, well, one, solution, estimator=last)
    assert float(late.value) == pytest.approx(-((3 - 0.75**6 * 2.9 - 1) ** 2), rel=1e-12)


def test_check_holds_the_pessimistic_path_to_its_maximum():
    made = setup(LearnedStart(problem=Sine()), steps=4)
    rows = list(check(made, {"iaptt": build("estimators", "iaptt"), "forward": Forward()}))
    assert [row.verdict for row in rows] == ["as claimed"] * 2
