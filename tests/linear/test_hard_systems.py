"""Every linear solver beside what is hard: never silently wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from bilevel import registry, tree
from bilevel.errors import ConvergenceError, ProblemError
from bilevel.linear.cg import CG
from bilevel.linear.dense import Dense
from bilevel.linear.gmres import GMRES
from bilevel.linear.identity import Identity
from bilevel.linear.minres import MINRES
from bilevel.linear.neumann import Neumann
from bilevel.linear.normal_cg import NormalCG
from bilevel.linear.nystrom import Nystrom
from bilevel.linear.task_cg import TaskCG
from bilevel.registry.build import build
from tests.hard import LARGE, System, contraction, singular, spread, symmetric, vector

EPS = torch.finfo(torch.float64).eps


def saddle(n):
    """[0, C; Cᵀ, 0] with condition number 1e10: no diagonal says how large it is."""
    C = symmetric(spread(n, 1e5)) @ symmetric(spread(n, 1e5), seed=2)
    zero = torch.zeros(n, n, dtype=torch.float64)
    return torch.cat([torch.cat([zero, C], 1), torch.cat([C.T, zero], 1)])


HARD: dict[str, Callable[[], System]] = {
    "easy": lambda: System(symmetric(spread(10, 10)), vector(10)),
    "condition 1e6": lambda: System(symmetric(spread(30, 1e6)), vector(30)),
    "indefinite": lambda: System(symmetric([-0.5, -0.1, *spread(9, 10)]), vector(11)),
    "singular, b outside": lambda: singular(inside=False),
    "singular, b inside": lambda: singular(inside=True),
    "no symmetry": lambda: System(contraction(12), vector(12)),
    "saddle of condition 1e10": lambda: System(saddle(6), vector(12)),
    "b = 0 from a start": lambda: System(
        symmetric(spread(5, 10)), torch.zeros(5).double(), vector(5)
    ),
    "one dimension": lambda: System(torch.tensor([[0.7]]).double(), torch.tensor([-3.0]).double()),
    "200,000 dimensions": lambda: System(1 + torch.linspace(0, 1, LARGE).double(), vector(LARGE)),
    "a start of 1e11": lambda: System(symmetric(spread(10, 10)), vector(10), 1e11 * vector(10, 3)),
    "products not finite": lambda: System(float("nan") * symmetric(spread(5, 10)), vector(5)),
    "b too small to square": lambda: System(symmetric(spread(5, 10)), 1e-200 * vector(5)),
}
SOLVERS: dict[str, Any] = {
    "cg": CG(iterations=300),
    "task_cg": TaskCG(iterations=300),
    "minres": MINRES(iterations=300),
    "gmres": GMRES(iterations=300, restart=30),
    "normal_cg": NormalCG(iterations=300),
    "neumann": Neumann(iterations=300, scale=0.9, tolerance=1e-6),
    "dense": Dense(),
    "nystrom": Nystrom(rank=20),
    "identity": Identity(),
}
TOLERANCE = 1e-6


def shaped(name):
    """Every system is one task to task_cg."""
    return (1, -1) if name == "task_cg" else (-1,)


def solved(name, system, solver=None):
    shape = shaped(name)
    b = {"a": system.b.reshape(shape)}
    start = torch.zeros_like(system.b) if system.start is None else system.start

    def matvec(v):
        return {"a": system.times(v["a"].reshape(-1)).reshape(shape)}

    return (solver or SOLVERS[name]).solve(matvec, b, {"a": start.reshape(shape)})


def outcome(name, system):
    """What became of it, with what was said held against what is true."""
    try:
        solve = solved(name, system)
    except (ConvergenceError, ProblemError) as error:
        text = str(error)
        assert any(
            word in text for word in ("use ", "Use ", "lower `scale`", "move y", "scale upper_loss")
        ), text
        return "stopped" if isinstance(error, ConvergenceError) else "refused"
    v, stats = solve.solution["a"].reshape(-1), solve.stats
    assert bool(torch.isfinite(v).all())
    true = system.off(v)
    if stats.residual is None:
        return "says nothing"
    assert math.isfinite(stats.residual)
    assert true <= 3 * stats.residual + 10 * EPS, (true, stats.residual)
    if stats.converged:
        assert true <= 2 * TOLERANCE
        return "solved"
    return "flagged" if stats.converged is False else "says its residual"


APPROXIMATE = {"nystrom": "says its residual", "identity": "says nothing"}
STOPPED = {**dict.fromkeys(SOLVERS, "stopped"), "identity": "says nothing"}
"""It asks for no product and squares nothing."""


def solved_but(**others: str) -> dict[str, str]:
    return {**dict.fromkeys(SOLVERS, "solved"), **APPROXIMATE, **others}


BECOMES: dict[str, dict[str, str]] = {
    "easy": solved_but(),
    "condition 1e6": solved_but(neumann="flagged", normal_cg="flagged"),
    "indefinite": solved_but(cg="flagged", task_cg="flagged", neumann="stopped"),
    "singular, b outside": {**dict.fromkeys(SOLVERS, "flagged"), **APPROXIMATE},
    "singular, b inside": solved_but(dense="flagged"),
    "no symmetry": solved_but(
        cg="flagged", task_cg="flagged", minres="flagged", normal_cg="flagged"
    ),
    "saddle of condition 1e10": solved_but(
        cg="flagged", task_cg="flagged", normal_cg="flagged", neumann="stopped"
    ),
    "b = 0 from a start": solved_but(nystrom="solved"),
    "one dimension": solved_but(),
    "200,000 dimensions": solved_but(dense="refused"),
    "a start of 1e11": {
        **dict.fromkeys(SOLVERS, "flagged"),
        **APPROXIMATE,
        "dense": "solved",  # it uses no start
    },
    "products not finite": STOPPED,
    "b too small to square": STOPPED,
}


def test_the_solvers_are_all_there():
    assert {*SOLVERS} == {*registry.names("linear")}
    assert {*BECOMES} == {*HARD}


@pytest.mark.parametrize("case", HARD)
def test_solvers(case):
    system = HARD[case]()
    assert {name: outcome(name, system) for name in SOLVERS} == BECOMES[case]


@pytest.mark.parametrize(
    "name", [name for name, said in BECOMES["easy"].items() if said == "solved"]
)
@pytest.mark.parametrize("case", ["easy", "condition 1e6", "indefinite", "no symmetry"])
def test_what_is_called_solved_is_the_solution(case, name):
    if BECOMES[case][name] != "solved":
        pytest.skip(f"{name}: {BECOMES[case][name]}")
    system = HARD[case]()
    truth = torch.linalg.solve(system.A, system.b)
    error = solved(name, system).solution["a"].reshape(-1) - truth
    condition = float(torch.linalg.cond(system.A))
    assert float(error.norm() / truth.norm()) <= condition * 2 * TOLERANCE
    if condition < 1e3:  # negative control: one step is not enough
        short = solved(name, system, build("linear", {"name": name, **ONE_STEP[name]}))
        error = short.solution["a"].reshape(-1) - truth
        assert float(error.norm() / truth.norm()) > condition * 2 * TOLERANCE or name == "dense"


ONE_STEP = {name: {} if name == "dense" else {"iterations": 1} for name in SOLVERS}


@pytest.mark.parametrize("name", sorted(APPROXIMATE.keys() ^ SOLVERS.keys()))
def test_nothing_moves_a_solution_of_zero(name):
    solve = solved(name, HARD["b = 0 from a start"]())
    assert tree.norm(solve.solution) == 0
    assert (solve.stats.residual, solve.stats.converged) == (0.0, True)


@pytest.mark.parametrize("name", ["cg", "task_cg", "minres", "dense"])
def test_an_indefinite_matrix_shows_in_the_curvature(name):
    assert solved(name, HARD["indefinite"]()).stats.curvature < 0
    assert solved(name, HARD["easy"]()).stats.curvature > 0


BEYOND = {
    "cg": CG(iterations=5000, tolerance=0.0),
    "task_cg": TaskCG(iterations=5000, tolerance=0.0),
    "minres": MINRES(iterations=5000, tolerance=0.0),
    "gmres": GMRES(iterations=5000, restart=30, tolerance=0.0),
    "normal_cg": NormalCG(iterations=5000, tolerance=0.0),
    "neumann": Neumann(iterations=5000, scale=0.9),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", BEYOND)
def test_a_budget_beyond_convergence_loses_nothing(name, dtype):
    """Thousands of steps more: the same solution, and no curvature that is an underflow."""
    easy = HARD["easy"]()
    system = System(easy.A.to(dtype), easy.b.to(dtype))
    solve = solved(name, system, BEYOND[name])
    v, stats = solve.solution["a"].reshape(-1), solve.stats
    rounding, squared = torch.finfo(dtype).eps, 10.0 if name == "normal_cg" else 1.0
    assert system.off(v) <= 100 * rounding * squared
    assert system.off(v) / 10 <= stats.residual <= 100 * rounding * squared
    assert stats.iterations < 5000
    if stats.curvature is not None:
        assert 0.1 * (1 - 100 * rounding) <= stats.curvature <= 1 + 100 * rounding


def test_singular_iterates_do_not_run_away():
    """MINRES ends at the least-squares solution, however many steps there are left."""
    system = HARD["singular, b outside"]()
    best = torch.linalg.lstsq(system.A, system.b[:, None], driver="gelsd").solution[:, 0]
    got = solved("minres", system, MINRES(iterations=500, tolerance=1e-12)).stats.residual
    assert got == pytest.approx(system.off(best), rel=1e-6)


@pytest.mark.parametrize("iterations", [1, 2, 3, 1000])
@pytest.mark.parametrize("start", [None, vector(10, 7)], ids=["cold", "warm"])
def test_a_diverging_series_is_stopped_within_three_terms(iterations, start):
    """Also where there are fewer terms than three, and from a warm start."""
    calls = []
    system = System(30 * symmetric(spread(10, 10)), vector(10), start)

    @dataclass(frozen=True)
    class Counting(System):
        def times(self, v):
            calls.append(1)
            return super().times(v)

    counting = Counting(system.A, system.b, system.start)
    series = Neumann(iterations=iterations, scale=1.0)
    with pytest.raises(ConvergenceError, match=r"diverges.*lower `scale` to .*damping"):
        solved("neumann", counting, series)
    assert len(calls) <= 3 + (start is not None)
    right = solved("neumann", system, Neumann(iterations=iterations, scale=1 / 30))  # the control
    assert system.off(right.solution["a"]) < system.off(
        torch.zeros(10).double() if start is None else start
    )
