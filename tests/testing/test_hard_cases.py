"""Every linear solver and every second-order family beside what is hard: never silently wrong.

Each cell of the two tables is measured against a direct solve, and is what the table says: solved,
flagged, refused or stopped. In no cell is a reported residual much better than the true one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from bilevel import hypergradient, registry, solve_lower, tree
from bilevel.errors import ConvergenceError, ProblemError
from bilevel.estimators.fixed_point import FixedPoint
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.kkt import KKT
from bilevel.estimators.lancbio import LancBiO
from bilevel.estimators.maid import MAID
from bilevel.estimators.shine import Shine
from bilevel.estimators.single_loop import SingleLoop
from bilevel.estimators.unroll import Unroll
from bilevel.linear.cg import CG
from bilevel.linear.dense import Dense
from bilevel.linear.gmres import GMRES
from bilevel.linear.identity import Identity
from bilevel.linear.minres import MINRES
from bilevel.linear.neumann import Neumann
from bilevel.linear.normal_cg import NormalCG
from bilevel.linear.nystrom import Nystrom
from bilevel.linear.task_cg import TaskCG
from bilevel.lower.gradient import Gradient
from bilevel.lower.lbfgs import LBFGS
from bilevel.optimizers.differentiable import SGD
from bilevel.recipe.build import build
from bilevel.types import Structure

EPS = torch.finfo(torch.float64).eps
LARGE = 200_000


def symmetric(spectrum, seed=0):
    """A matrix with these eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    n = len(spectrum)
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    A = (Q * torch.as_tensor(spectrum, dtype=torch.float64)) @ Q.T
    return (A + A.T) / 2


def vector(n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=generator, dtype=torch.float64) + 0.5


def spread(n, condition):
    return torch.logspace(0, -math.log10(condition), n, dtype=torch.float64).tolist()


def contraction(n, seed=5):
    """I − M with ‖M‖ = 0.9, M of no symmetry."""
    M = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.eye(n, dtype=torch.float64) - 0.9 * M / torch.linalg.matrix_norm(M, 2)


def saddle(n):
    """[0, C; Cᵀ, 0] with condition number 1e10: no diagonal says how large it is."""
    C = symmetric(spread(n, 1e5)) @ symmetric(spread(n, 1e5), seed=2)
    zero = torch.zeros(n, n, dtype=torch.float64)
    return torch.cat([torch.cat([zero, C], 1), torch.cat([C.T, zero], 1)])


# ---- linear solvers


@dataclass(frozen=True)
class System:
    """A v = b; A is a matrix, or the diagonal of one."""

    A: torch.Tensor
    b: torch.Tensor
    start: torch.Tensor | None = None

    def times(self, v: torch.Tensor) -> torch.Tensor:
        return self.A @ v if self.A.dim() == 2 else self.A * v

    def off(self, v: torch.Tensor) -> float:
        """‖b − A v‖ / ‖b‖."""
        size = float(self.b.norm())
        return float((self.b - self.times(v)).norm()) / (size or 1.0)


def singular(inside):
    A = symmetric([0.0, *spread(9, 10)])
    return System(A, A @ vector(10) if inside else vector(10))


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
        assert any(word in text for word in ("use ", "Use ", "lower `scale`", "move y")), text
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


# ---- estimators


@dataclass(frozen=True)
class Lower:
    """G = ½ yᵀ A y − yᵀ (B x + c) at y = A⁺(B x + c), F = ½ ‖y − t‖² + x: dΦ/dx = 1 + Bᵀ A⁺ (y − t)."""

    A: torch.Tensor
    B: torch.Tensor
    y: torch.Tensor
    t: torch.Tensor
    c: torch.Tensor
    x: torch.Tensor

    def times(self, v: torch.Tensor) -> torch.Tensor:
        return self.A @ v if self.A.dim() == 2 else self.A * v

    def lower(self, x, y, batch):
        v = y["y"]
        return 0.5 * v @ self.times(v) - v @ (self.B @ x["x"] + self.c)

    def upper(self, x, y, batch):
        return 0.5 * (y["y"] - self.t).square().sum() + x["x"].sum()

    def truth(self) -> torch.Tensor:
        off = self.y - self.t
        if self.A.dim() == 1:
            v = off / self.A
        else:
            v = torch.linalg.lstsq(self.A, off[:, None], driver="gelsd").solution[:, 0]
        return 1 + self.B.T @ v

    def path(self, steps: int, lr: float) -> torch.Tensor:
        """d/dx F(x, y_K(x)) from y_0 = y: the adjoint of K gradient steps, one after another."""
        y, rest = self.y, self.B @ self.x + self.c
        for _ in range(steps):
            y = y - lr * (self.times(y) - rest)
        v, total = y - self.t, torch.zeros_like(self.y)
        for _ in range(steps):
            total, v = total + lr * v, v - lr * self.times(v)
        return 1 + self.B.T @ total


def level(A, outside=False, away=True):
    """B x + c lies in the range of A, and so does ∇y F unless `outside`; ∇y F = 0 unless `away`."""
    n = A.shape[-1]
    g = torch.Generator().manual_seed(11)
    times = (
        (lambda v: A @ v) if A.dim() == 2 else (lambda v: A[:, None] * v if v.dim() == 2 else A * v)
    )
    B = times(torch.randn(n, 2, generator=g, dtype=torch.float64))
    y, x = times(vector(n, 2)), torch.tensor([0.4, -1.1], dtype=torch.float64)
    c = times(y) - B @ x
    t = y - (vector(n, 3) if outside else times(vector(n, 3))) if away else y.clone()
    return Lower(A, B, y, t, c, x)


LEVELS: dict[str, Callable[[], Lower]] = {
    "easy": lambda: level(symmetric(spread(8, 10))),
    "condition 1e6": lambda: level(symmetric(spread(8, 1e6)), outside=True),
    "indefinite": lambda: level(symmetric([-0.5, -0.1, *spread(6, 10)]), outside=True),
    "singular, ∇y F outside": lambda: level(symmetric([0.0, *spread(7, 10)]), outside=True),
    "singular, ∇y F inside": lambda: level(symmetric([0.0, *spread(7, 10)])),
    "∇y F = 0": lambda: level(symmetric(spread(8, 10)), away=False),
    "one dimension": lambda: level(torch.tensor([[0.7]]).double()),
    "200,000 dimensions": lambda: level(1 + torch.linspace(0, 1, LARGE).double()),
}
NO_CONSTRAINT_IS_NEAR = Structure(
    constraints=lambda x, y, batch: {"inequality": tree.flatten(y)[:1] - 1e6}
)
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "implicit": (Implicit(solver=CG(iterations=300, tolerance=1e-9)), {}),
    "implicit, error 1e-3": (Implicit(error=1e-3), {}),
    "implicit, minres": (Implicit(solver=MINRES(iterations=300, tolerance=1e-9)), {}),
    "lancbio": (LancBiO(dimension=20, products=60, residual=True), {}),
    "shine": (Shine(refine=CG(iterations=300, tolerance=1e-9)), {"pairs": LBFGS()}),
    "fixed_point": (
        FixedPoint(lr=0.5, solver=GMRES(iterations=300, restart=40, tolerance=1e-9)),
        {},
    ),
    "kkt": (
        KKT(solver=MINRES(iterations=300, tolerance=1e-9)),
        {"structure": NO_CONSTRAINT_IS_NEAR},
    ),
    "maid": (MAID(accuracy=1e-7, solver=LBFGS(steps=200)), {}),
    "unroll": (Unroll(), {"path": Gradient(steps=30, optimizer=SGD(lr=0.5))}),
    "single_loop": (SingleLoop(lower_lr=0.5, adjoint_lr=0.5, lower_steps=2000, tolerance=1e-9), {}),
}

REMEDIES = ("use ", "lower ", "smaller step")


def asked(level, estimator, given, state=None):
    x, y = {"x": level.x}, {"y": level.y}
    options = {"structure": given.get("structure")}
    if "pairs" in given:
        near = {"y": level.y + 0.1 * vector(len(level.y), 4)}
        options["pairs"] = solve_lower(level.lower, x, near, solver=given["pairs"]).pairs
    if "path" in given:
        options["path"] = solve_lower(level.lower, x, y, solver=given["path"], record=True).path
    return hypergradient(
        level.upper, level.lower, x, y, estimator=estimator, state=state, **options
    )


def becomes(name, level):
    estimator, given = FAMILIES[name]
    try:
        got = asked(level, estimator, given)
    except ConvergenceError as error:
        return "stopped" if any(word in str(error) for word in REMEDIES) else f"stopped: {error}"
    h, stats = got.hypergradient["x"], got.stats
    truth = level.path(30, 0.5) if name == "unroll" else level.truth()
    error = float((h - truth).norm() / truth.norm())
    limit = 1e-3 if "error" in name else 1e-5
    assert stats.residual is None or math.isfinite(stats.residual)
    if stats.converged is False:
        return "flagged"
    is_saddle = stats.curvature is not None and stats.curvature < 0
    said = "right" if error <= limit else f"WRONG by {error:.1e}"
    return f"{said} of a saddle" if is_saddle else said


def right_but(**others: str) -> dict[str, str]:
    return {**dict.fromkeys(FAMILIES, "right"), **others}


ERROR, MINRES_ = "implicit, error 1e-3", "implicit, minres"
EXPECTED: dict[str, dict[str, str]] = {
    "easy": right_but(),
    "condition 1e6": right_but(single_loop="flagged"),
    "indefinite": {
        **dict.fromkeys(("implicit", ERROR, "shine"), "flagged"),
        **dict.fromkeys((MINRES_, "lancbio", "fixed_point", "kkt"), "right of a saddle"),
        **dict.fromkeys(("maid", "single_loop"), "stopped"),
        "unroll": "right",  # of the path that it was given
    },
    "singular, ∇y F outside": {
        **dict.fromkeys(FAMILIES, "flagged"),
        "maid": "stopped",
        "unroll": "right",
    },
    "singular, ∇y F inside": right_but(),
    "∇y F = 0": right_but(),
    "one dimension": right_but(),
    "200,000 dimensions": right_but(),
}


@pytest.mark.parametrize("case", LEVELS)
def test_families(case):
    level = LEVELS[case]()
    assert {name: becomes(name, level) for name in FAMILIES} == EXPECTED[case]


KINDS: dict[str, Callable[[int], list[float]]] = {
    "definite": lambda seed: spread(12, 10.0 ** (1 + seed % 5)),
    "indefinite": lambda seed: [-(10.0 ** -(seed % 4)), *spread(11, 100)],
    "singular": lambda seed: [0.0] * (1 + seed % 3) + spread(11 - seed % 3, 10.0 ** (1 + seed % 3)),
}
CHEAP = [name for name in FAMILIES if name not in ("maid", "single_loop", "unroll")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CHEAP)
def test_what_says_that_it_has_converged_is_right(name, kind):
    """Fifteen systems of each kind, ∇y F in the range of A or not, and asked twice: warm as well."""
    right = 0
    for seed in range(15):
        below = level(symmetric(KINDS[kind](seed), seed), outside=bool(seed % 2))
        estimator, given = FAMILIES[name]
        got = asked(below, estimator, given)
        got = asked(below, estimator, given, got.state)
        h, truth = got.hypergradient["x"], below.truth()
        if got.stats.converged:
            right += 1
            limit = 1e-3 if name == ERROR else 1e-4
            assert float((h - truth).norm() / truth.norm()) <= limit, seed
        assert bool(torch.isfinite(h).all())
    assert right == 15 or kind != "definite"


def test_a_residual_of_its_own_invention_would_be_found():
    """Negative control: the property above, on a solver that believes its recursion."""

    class Boasts(CG):
        def run(self, *arguments, **options):
            solve = super().run(*arguments, **options)
            return replace(solve, stats=replace(solve.stats, converged=True))

    below = level(symmetric([-0.5, -0.1, *spread(6, 10)]), outside=True)
    got = asked(below, Implicit(solver=Boasts(iterations=300)), {})
    off = got.hypergradient["x"] - below.truth()
    assert got.stats.converged
    assert float(off.norm() / below.truth().norm()) > 1e-2


NO_SYMMETRY = contraction(6)


def affine(x, y, batch):
    """T(x, y) = (I − A) y + B x + c, a contraction of no symmetry; y* = A⁻¹ (B x + c)."""
    v = y["y"]
    return {"y": v - NO_SYMMETRY @ v + 0.3 * vector(6, 8) * x["x"].sum() + vector(6, 9)}


def merit(x, y, batch):
    return 0.5 * (y["y"] - affine(x, y, batch)["y"]).square().sum()


@pytest.mark.parametrize(
    ("solver", "becomes"),
    [
        (GMRES(tolerance=1e-9), "right"),
        (Dense(), "right"),
        (Neumann(iterations=500, scale=1.0, tolerance=1e-9), "right"),
        (CG(iterations=100, tolerance=1e-9), "flagged"),
        (MINRES(iterations=100, tolerance=1e-9), "flagged"),
        (NormalCG(iterations=100, tolerance=1e-9), "flagged"),
        (Neumann(iterations=500, scale=3.0, tolerance=1e-9), "stopped"),
        (Neumann(iterations=2, scale=30.0), "stopped"),
    ],
    ids=repr,
)
def test_a_map_of_no_symmetry(solver, becomes):
    x = {"x": torch.tensor([0.7, -0.2], dtype=torch.float64)}
    rest = 0.3 * vector(6, 8) * x["x"].sum() + vector(6, 9)
    y, t = torch.linalg.solve(NO_SYMMETRY, rest), vector(6, 10)
    truth = 0.3 * vector(6, 8) @ torch.linalg.solve(NO_SYMMETRY.T, y - t)

    def ask():
        return hypergradient(
            lambda x, y, batch: 0.5 * (y["y"] - t).square().sum(),
            merit,
            x,
            {"y": y},
            estimator=FixedPoint(solver=solver),
            structure=Structure(map=affine),
        )

    if becomes == "stopped":
        with pytest.raises(ConvergenceError, match=r"no contraction.*use solver: gmres"):
            ask()
        return
    got = ask()
    error = float((got.hypergradient["x"] - truth).norm() / truth.abs())
    assert got.stats.converged is (becomes == "right")
    assert (error <= 1e-7) == (becomes == "right"), error


@pytest.mark.parametrize("adjoint_lr", [30.0, 3.0, 1.0])
def test_the_series_of_a_single_loop_method_is_stopped_too(adjoint_lr):
    below = LEVELS["easy"]()  # the largest eigenvalue is 1
    method = SingleLoop(adjoint="series", adjoint_steps=10, adjoint_lr=adjoint_lr)
    if adjoint_lr > 2:
        with pytest.raises(ConvergenceError, match=r"diverges.*lower `adjoint_lr` to"):
            asked(below, method, {"fresh": True})
        return
    h = asked(below, method, {"fresh": True}).hypergradient["x"]
    assert float((h - below.truth()).norm() / below.truth().norm()) < 1
