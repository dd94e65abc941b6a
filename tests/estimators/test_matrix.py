"""Every method beside every shipped problem: held to its claim, or refused with what to do instead.

A method or preset that is registered joins by itself: its verdict follows from its claim, and a
refusal that is not in the tables below fails.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch

from bilevel import recipe, registry, tree
from bilevel.calculus.fixed_point_maps import linearize_map
from bilevel.calculus.products import gradients, linearize
from bilevel.cli.names import locate
from bilevel.errors import RequirementError
from bilevel.estimators.aggregation import Aggregation
from bilevel.estimators.fixed_point import FixedPoint
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.single_loop import SingleLoop
from bilevel.linear.cg import CG
from bilevel.linear.dense import Dense, matrix
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import SGD
from bilevel.recipe.assemble import assemble
from bilevel.registry import presets
from bilevel.registry.build import build
from bilevel.run import refusals
from bilevel.run.setup import Setup
from bilevel.run.upper import Upper
from bilevel.testing import CheckRow, Scene, check
from bilevel.testing.check_scenes import CheckScenes
from bilevel.types import Offers, Point
from bilevel_problems.mllm_hft import formulations
from tests.problems.mllm_hft import miniature

CLOSED = {
    "quadratic": ["problem.num_upper=3", "problem.num_lower=5", "problem.condition=4"],
    "ridge": ["problem.data=synthetic", "problem.initial_log_penalty=-1.0"],
    "lasso": ["problem.num_features=6", "problem.num_relevant=3"],
    "box_qp": ["problem.num_upper=3", "problem.num_lower=6", "problem.condition=4"],
    "simulated_quadratic": [
        "problem.batch_size=null",
        "problem.upper_samples=64",
        "problem.lower_samples=256",
        "problem.num_upper=3",
        "problem.num_lower=6",
    ],
}
OTHERS = {  # x of 25 entries or more is compared along six random directions, less than 25 in all
    "hyper_cleaning": ["problem.num_train=25", "problem.num_clean=20", "problem.ridge=1.0"],
    "logistic": [
        "problem.data=synthetic",
        "problem.num_features=6",
        "problem.initial_log_penalty=-2.0",
    ],
    "sinusoid": ["problem.num_tasks=2", "problem.problem.width=2"],
    "sinusoid proximal": [
        "problem.num_tasks=1",
        "problem.problem.width=1",
        "problem.problem.proximal=5.0",
        "problem.batched=false",
    ],
}
WRAPPERS = {"over_tasks": "sinusoid", "learned_start": "tests/estimators/test_meta.py"}


@cache
def methods() -> dict[str, Any]:
    """Every registered estimator and preset, with its defaults, by name."""
    found = {}
    for name in [*registry.names("estimators"), *presets.of("estimators")]:
        try:
            found[name] = build("estimators", name)
        except RequirementError:
            assert name.startswith("betty:"), f"{name} needs what is not installed here"
    return found


def distinct() -> dict[str, Any]:
    """The first name of each: a preset that is a component with its defaults is that component."""
    found: dict[str, Any] = {}
    for name, made in methods().items():
        if made not in found.values():
            found[name] = made
    return found


def first_name(name: str) -> str:
    return next(n for n, made in distinct().items() if made == methods()[name])


# ---- what is refused, and why

STARTS = {"fomaml", "reptile"}
BLOCKS = {"saba", "srba", "vrbo"}
PAIRS = {"shine", "shine_block", "shine_refined"}
MOVES = {
    *("bome", "gradient_gap", "joint", "maid", "moreau", "meso", "value_function", "value_gap"),
    *("single_loop", "bsa", "ttsa", "stocbio", "amigo", "fsla", "soba", "saba", "srba"),
    *("ma_soba", "sustain", "mrbo", "vrbo", "pbgd", "g_pbgd", "bvfsm"),
    *("averaged_multipliers", "sl_bamm", "dynamic_barrier", "rising_penalty"),
}
IGNORE_THE_SET = {"implicit", "imaml", "lancbio", "betty:cg"}
KNOW_PROX = {"fixed_point", "richardson", "alternating", "none"}
THROUGH_THE_START = {"unroll", "maml", "iaptt", "forward", "fg2u", "fomaml", "reptile"}
SEE_NO_WIRING = {"zeroth_order", "betty:darts", "betty:sama"}

NO_START = r"for problems that have lower_start.*add it, or use estimator: implicit"
NO_CONSTRAINTS = r"for problems that have lower_constraints.*add it, or use estimator: implicit"
NO_BLOCKS = r"which block of the data a batch is.*or use the direction plain"
plain = {
    **dict.fromkeys(STARTS, NO_START),
    **dict.fromkeys(BLOCKS, NO_BLOCKS),
    "kkt": NO_CONSTRAINTS,
}
"""Refused where y is held by nothing, starts anywhere and the data is in one piece."""

REFUSED: dict[str, dict[str, str]] = {
    "quadratic": plain,
    "ridge": plain,
    "logistic": plain,
    "hyper_cleaning": plain,
    "sinusoid proximal": {n: why for n, why in plain.items() if n not in STARTS},
    "simulated_quadratic": {n: why for n, why in plain.items() if n not in BLOCKS},
    "box_qp": {
        **dict.fromkeys(STARTS, r"have lower_start.*or use estimator: fixed_point"),
        **dict.fromkeys(PAIRS, r"keeps none; use estimator: fixed_point"),
        **dict.fromkeys(MOVES, r"moves y itself.*use estimator: fixed_point, or unroll"),
        **dict.fromkeys(
            IGNORE_THE_SET, r"project_lower restricts.*use estimator: fixed_point, or kkt"
        ),
    },
    "lasso": {
        name: r"does not support prox_lower.*use estimator: fixed_point"
        for name in methods()
        if name not in KNOW_PROX
    },
    # x is nothing but a start: whatever forgets it along y* or one step has a hypergradient of 0
    "sinusoid": {
        **dict.fromkeys(
            set(methods()) - THROUGH_THE_START - SEE_NO_WIRING, r"reaches neither loss"
        ),
        **dict.fromkeys(BLOCKS, NO_BLOCKS),
        "kkt": NO_CONSTRAINTS,
        "betty:neumann": r"betty's functions need every entry.*leave the others out",
        "betty:cg": r"betty's functions need every entry.*leave the others out",
    },
}
UNTESTED = {
    "sinusoid": {
        "maid": r"curvature -.*use estimator: implicit with damping, or unroll",
        "richardson": r"diverges",
    }
}


TRUTHLESS = {"sinusoid"}
"""Problems whose lower level cannot be solved tightly, so that dΦ/dx is not known."""


def expected(problem: str, name: str) -> str:
    """The verdict that is due."""
    if first_name(name) in UNTESTED.get(problem, {}):
        return "untested"
    if name in REFUSED[problem]:
        return "refused"
    if name == "betty:cg":
        return "wrong"
    method = methods()[name]
    if method.claim is None:
        is_known = is_as_configured(problem, method) and problem not in TRUTHLESS
        return "approximate" if is_known else "untested"
    return "exact" if method.claim == "solution" else "as claimed"


@cache
def offers(problem: str) -> Offers:
    return setup(problem, 0).lower.offers


def is_as_configured(problem: str, method: Any) -> bool:
    """Whether the recipe's own lower solver keeps what a method needs."""
    kept, needs = offers(problem), method.needs
    return (kept.path or not needs.path) and (kept.pairs or not needs.pairs)


# ---- what is found


def setup(problem: str, seed: int) -> Any:
    name = problem.split(" ")[0]
    data = "problem.problem.data_seed" if name == "sinusoid" else "problem.data_seed"
    options = [*{**CLOSED, **OTHERS}[problem], f"seed={seed}", f"{data}={seed}"]
    return replace(assemble(recipe.load(locate(name), options)), dtype=torch.float64)


LONG = {"ridge", "simulated_quadratic"}
FAST = {"quadratic": 0.5, "simulated_quadratic": 0.5}
"""Step sizes of the single-loop methods where the largest curvature is near 1: their own is 0.1."""


def suited(problem: str) -> dict[str, Any]:
    """`distinct`, with step sizes for which the lower level and the adjoint settle soon."""
    lr = FAST.get(problem)
    return {
        name: replace(made, lower_lr=lr, adjoint_lr=lr)
        if lr and isinstance(made, SingleLoop)
        else made
        for name, made in distinct().items()
    }


def rows(made: Any, estimators: dict[str, Any]) -> dict[str, CheckRow]:
    return {row.name: row for row in check(made, estimators) if isinstance(row, CheckRow)}


def hold(problem: str, found: dict[str, CheckRow]) -> None:
    """Each verdict is the one that is due, and each refusal says why and what works."""
    asked = [name for name in methods() if first_name(name) in found]
    assert {first_name(name) for name in asked} == {*found}
    got = {name: found[first_name(name)].verdict for name in asked}
    due = {name: expected(problem, name) for name in asked}
    odd = {n: (got[n], due[n], found[first_name(n)].note) for n in got if got[n] != due[n]}
    assert not odd, odd
    for name, why in {**REFUSED[problem], **UNTESTED.get(problem, {})}.items():
        if name in asked:
            note = found[first_name(name)].note
            assert re.search(why, note), (name, note)


def bound(scene: Scene, estimator: Any, size: float) -> float:
    """How far, relative to `size`, the tight solve of an exact method may leave it off.

    ‖Bᵀ(v − v_k)‖ ≤ ‖B‖ ‖A⁻¹‖ δ ‖b‖ for a relative residual δ, and where y is stepped as well, to
    ‖∇y G‖ ≤ δ, ‖dh/dy‖ δ ‖A⁻¹‖ more. A moving average of weight m that changes by δ of itself is
    δ / m behind, and a lagged one as much again. Rounding is eps times the condition number of A.
    """
    at = Point(scene.x, scene.tight)
    _, _, F_y = gradients(scene.losses.upper, at)
    lower = linearize(scene.losses.lower, at)
    A, cross = matrix(lower.hvp_yy, at.y), lower.vjp_xy
    if isinstance(estimator, FixedPoint):
        step = linearize_map(scene.losses.lower, at, estimator.lr)
        A, cross = matrix(lambda v: tree.sub(v, step.vjp_y(v)), at.y), step.vjp_x
    units = [tree.unflatten(e, at.y) for e in torch.eye(tree.size(at.y), dtype=torch.float64)]
    B = torch.stack([tree.flatten(cross(u)) for u in units])
    spectrum = torch.linalg.svdvals(A)
    delta = 1e-9 if isinstance(estimator, SingleLoop) else 1e-11
    allowed = float(torch.linalg.matrix_norm(B, 2) / spectrum[-1]) * delta * tree.norm(F_y)
    if isinstance(estimator, SingleLoop):
        allowed += _slope(scene) * delta / float(spectrum[-1])
        allowed += 2 * size * delta / getattr(estimator.upper_direction, "weight", math.inf)
    condition = float(spectrum[0] / spectrum[-1])
    return allowed / size + 100 * torch.finfo(torch.float64).eps * condition


def _slope(scene: Scene) -> float:
    """‖dh/dy‖, by differences."""
    columns = []
    for e in torch.eye(tree.size(scene.tight), dtype=torch.float64):
        ends = []
        for sign in (1, -1):
            y = tree.axpy(sign * 1e-5, tree.unflatten(e, scene.tight), scene.tight)
            exact, at = Implicit(solver=Dense()), Point(scene.x, y)
            h = exact.estimate(scene.losses, at, exact.init(at)).hypergradient
            ends.append(tree.flatten(h))
        columns.append((ends[0] - ends[1]) / 2e-5)
    return float(torch.linalg.matrix_norm(torch.stack(columns), 2))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("problem", CLOSED)
def test_methods_and_closed_forms(problem, seed):
    """All of them at one seed; at the others, on the problems where that is long, the exact ones."""
    made = setup(problem, seed)
    asked = suited(problem)
    if seed and problem in LONG:
        asked = {n: m for n, m in asked.items() if expected(problem, n) == "exact"}
    found = rows(made, asked)
    hold(problem, found)
    check_scene = CheckScenes(made, 0.1).own
    assert check_scene.reference is not None
    for name, row in found.items():
        assert row.reference == "closed form"
        if row.verdict == "exact":
            size = float(check_scene.reference.truth.norm())
            allowed = bound(check_scene.scene, distinct()[name], size)
            assert row.claim_error is not None
            assert row.claim_error <= allowed < 1e-5, (name, allowed)


@pytest.mark.parametrize("problem", OTHERS)
def test_methods_and_the_other_problems(problem):
    hold(problem, rows(setup(problem, 0), distinct()))


MEMORIES = ("store", "recompute", "checkpoint", "traced", "mixed", "reversible")


class OfTheSum:
    """F is of x + y alone, so that autograd has one tensor for ∇x F and ∇y F; y* = A⁻¹ x."""

    A = torch.diag(torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64))

    def init(self, streams):
        x = torch.tensor([0.3, 0.7, -0.2], dtype=torch.float64)
        return {"a": x}, {"a": torch.zeros_like(x)}

    def upper_loss(self, x, y, batch):
        s = x["a"] + y["a"] - 1
        return 0.5 * s.square().sum() + 0.1 * s.pow(3).sum()

    def lower_loss(self, x, y, batch):
        return 0.5 * y["a"] @ self.A @ y["a"] - x["a"] @ y["a"]

    def upper_batches(self, stream):
        return itertools.repeat(None)

    lower_batches = upper_batches


def test_methods_where_both_gradients_are_one_tensor():
    """Who writes into one of them has the other as it was; `reversible` once had not."""
    steps = Gradient(steps=6, optimizer=SGD(lr=0.1, momentum=0.9))
    made = Setup(OfTheSum(), steps, Upper(steps=1), Implicit(), dtype=torch.float64)
    found = rows(made, suited("quadratic"))
    got = {name: row.verdict for name, row in found.items()}
    due = {name: expected("simulated_quadratic", name) for name in found}  # its data are one block
    assert got == due, {n: found[n] for n in got if got[n] != due[n]}
    kept = rows(
        made,
        {memory: build("estimators", {"name": "unroll", "memory": memory}) for memory in MEMORIES},
    )
    assert {n: row.verdict for n, row in kept.items()} == dict.fromkeys(MEMORIES, "as claimed")


def test_every_problem_that_is_shipped_is_among_them():
    known = {*CLOSED, *OTHERS, *WRAPPERS, "mllm_hft"}
    assert {*registry.names("problems")} <= known
    assert {*REFUSED} == {*CLOSED, *OTHERS}


def test_every_method_is_tested_somewhere():
    """Not refused everywhere: one problem at least on which its claim is compared with the truth."""
    for name in methods():
        assert {expected(problem, name) for problem in REFUSED} - {"refused", "untested"}, name


# ---- negative controls


@dataclass(frozen=True)
class Half(Implicit):
    """Half of the implicit term is lost."""

    def estimate(self, losses, at, state):
        got = super().estimate(losses, at, state)
        _, F_x, _ = gradients(losses.upper, at)
        return replace(got, hypergradient=tree.scale(0.5, tree.add(got.hypergradient, F_x)))


@pytest.mark.parametrize("problem", ["quadratic", "ridge", "simulated_quadratic", "logistic"])
def test_a_lost_half_is_found_everywhere(problem):
    assert rows(setup(problem, 0), {"half": Half()})["half"].verdict == "wrong"


def test_a_lost_refusal_is_found(monkeypatch):
    monkeypatch.setattr(refusals, "_refuse_ignored_prox", lambda setup: None)
    chosen = {name: made for name, made in distinct().items() if name in ("penalty", "alternating")}
    found = rows(setup("lasso", 0), chosen)
    assert found["penalty"].verdict == "as claimed"  # of a problem without the lasso's penalty
    assert expected("lasso", "penalty") == "refused"


def test_a_new_refusal_is_found():
    found = rows(setup("quadratic", 0), {"none": methods()["none"]})["none"]
    with pytest.raises(AssertionError, match="refused"):
        hold("quadratic", dict.fromkeys(distinct(), replace(found, verdict="refused")))


def test_a_solve_that_is_not_quite_tight_is_above_the_bound():
    check_scene = CheckScenes(setup("quadratic", 0), 0.1).own
    assert check_scene.reference is not None
    at, loose = (
        Point(check_scene.scene.x, check_scene.scene.tight),
        Implicit(solver=CG(tolerance=1e-6)),
    )
    off = loose.estimate(check_scene.scene.losses, at, loose.init(at)).hypergradient
    off = tree.axpy(1e-9 * tree.norm(off), tree.map(torch.ones_like, off), off)
    error = check_scene.reference.error(off)
    assert error > bound(check_scene.scene, Implicit(), float(check_scene.reference.truth.norm()))


MINUTES = {"forward", "penalty", "f2sa_p", "regularised_gap", "gaffo"}
"""Left out on the language model: dim(x) products a step, or an inner solve a value."""


def test_methods_and_the_miniature(monkeypatch):
    """Its lower level cannot be solved tightly, so "solution" has no truth; other claims have one.

    The steps are those of SGD: the first ones of Adam are ±lr, and y_K is a staircase in x. y is
    projected, as it is where τ is in it: that refuses what moves y itself, and would take minutes.
    """
    monkeypatch.setattr(formulations, "RANGES", {"projector"})
    steps = Gradient(steps=2, optimizer=SGD(lr=0.05))
    made = miniature.setup(miniature.prepared())
    made = replace(made, dtype=torch.float64, lower=steps)
    chosen = {n: m for n, m in distinct().items() if n not in MINUTES}
    chosen["aggregation"] = Aggregation(steps=2)
    found = rows(made, chosen)
    due = dict.fromkeys(chosen, "refused")
    for name, method in chosen.items():
        if name in REFUSED["box_qp"] and name not in IGNORE_THE_SET:
            assert re.search(r"use estimator: |have lower_start", found[name].note), found[name]
        elif name == "kkt":
            assert re.search(r"have lower_constraints", found[name].note)
        elif method.claim == "solution":
            due[name] = "untested"
            assert "cannot be solved tightly" in found[name].note
        else:
            due[name] = "as claimed" if method.claim else "untested"
    got = {name: row.verdict for name, row in found.items()}
    assert got == due, {n: found[n] for n in got if got[n] != due[n]}
    assert {n for n in chosen if due[n] == "as claimed"} >= {
        "aggregation",
        "alternating",
        "one_step",
        "unroll",
    }
