"""Every solve says why it ended, in agreement with whether it converged."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from bilevel import registry, solve_lower, tree
from bilevel.errors import ConvergenceError, RequirementError
from bilevel.estimators import (
    KKT,
    AveragedMultipliers,
    FixedPoint,
    Implicit,
    LancBiO,
    Penalty,
    RegularisedGap,
    SingleLoop,
    ValueFunction,
)
from bilevel.linear import CG, GMRES, MINRES
from bilevel.lower import LBFGS, AugmentedLagrangian, Gradient, Iterate, Newton, Proximal
from bilevel.lower.auxiliary import convergence_stats
from bilevel.registry import presets
from bilevel.registry.build import build
from bilevel.testing.harness import Harness, init
from bilevel.testing.needs import cases_of
from bilevel.types import AGREES, LowerStats, Stats, Structure
from tests.linear.systems import INDEFINITE, as_one_task, log_spectrum, system, zero

pytestmark = pytest.mark.filterwarnings("ignore::bilevel.errors.UntrustedWarning")


def assert_agrees(stats: Stats | LowerStats) -> None:
    assert stats.converged in AGREES[stats.stopped], (stats.converged, stats.stopped)


@cache
def methods() -> dict[str, Any]:
    """Every registered estimator and preset that is installed, with its defaults."""
    found, names = {}, {*registry.names("estimators"), *presets.of("estimators")}
    for name in sorted(names - {"betty:cg"}):  # which is wrong, and not finite here
        try:
            found[name] = build("estimators", name)
        except RequirementError:
            assert name.startswith("betty:")
    return found


NO_SOLVE = {
    "aggregation", "alternating", "dynamic_barrier", "fomaml", "forward", "gradient_gap", "joint", "one_step", "reptile",
    "rising_penalty", "sama", "shine", "unroll", "zeroth_order",
}  # fmt: skip
"""Estimators that solve nothing but the run's own lower level: there is no end to explain."""


def says_nothing(name: str) -> bool:
    kind = registry.name_of(type(methods()[name]), "estimators")
    return name != "shine_refined" and (
        name.startswith("betty:") or kind in NO_SOLVE or name == "jfb"
    )


def asked(name: str, estimator: Any, *, tight: bool = False) -> list[Stats]:
    """The evidence on every problem that the method of that name is held to."""
    found = []
    for problem in cases_of(methods()[name], 0).values():
        harness = Harness(estimator, problem, 0)
        scene, made = harness.scene(), harness.tight if tight else estimator
        found.append(harness.ask(scene, init(made, scene), estimator=made).stats)
    return found


@pytest.mark.parametrize("name", methods())
def test_every_method_agrees_with_itself(name):
    for stats in asked(name, methods()[name]):
        assert_agrees(stats)
        assert (stats.stopped is None) == says_nothing(name)


@pytest.mark.parametrize("name", sorted({*registry.names("estimators")} - NO_SOLVE))
def test_every_estimator_that_is_given_enough_says_tolerance(name):
    for stats in asked(name, methods()[name], tight=True):
        assert (stats.converged, stats.stopped) == (True, "tolerance")


CUT = Gradient(steps=1, tolerance=1e-30)
SHORT = {
    "implicit": Implicit(solver=CG(iterations=1)),
    "fixed_point": FixedPoint(solver=GMRES(iterations=1)),
    "kkt": KKT(solver=MINRES(iterations=1)),
    "lancbio": LancBiO(residual=True),
    "averaged_multipliers": AveragedMultipliers(tolerance=1e-9),
    "single_loop": SingleLoop(tolerance=1e-9),
    "penalty": Penalty(lower=CUT),
    "value_function": ValueFunction(lower=CUT),
    "regularised_gap": RegularisedGap(lower=CUT),
}


@pytest.mark.parametrize("name", SHORT)
def test_every_estimator_that_is_cut_short_says_iterations(name):
    found = {(stats.converged, stats.stopped) for stats in asked(name, SHORT[name])}
    assert (False, "iterations") in found
    assert found <= {(False, "iterations"), (True, "tolerance")}  # one unknown is soon found


def test_the_first_reason_of_several_solves_is_the_one_that_failed():
    def end(converged, stopped):
        return {"converged": converged, "stopped": stopped}

    met, unmet, none = end(True, "tolerance"), end(False, "stagnation"), end(None, "iterations")
    for ends, expected in [
        ((met, unmet), (False, "stagnation")),
        ((met, none), (True, "tolerance")),
        ((none, none), (None, "iterations")),
    ]:
        stats = convergence_stats(*ends)
        assert (stats.converged, stats.stopped) == expected


SYSTEMS = {
    "easy": (log_spectrum(9, 10.0), torch.float64),
    "hard": (log_spectrum(9, 1e8), torch.float32),
    "indefinite": (INDEFINITE, torch.float64),
    "singular": ([0.0, 0.0, *log_spectrum(7, 10.0)], torch.float64),
}


@pytest.mark.parametrize("scale", [1.0, 0.0])
@pytest.mark.parametrize("system_of", SYSTEMS)
@pytest.mark.parametrize("iterations", [1, 500])
@pytest.mark.parametrize("name", registry.names("linear"))
def test_every_linear_solver_agrees_with_itself(name, iterations, system_of, scale):
    matvec, _, b = system(SYSTEMS[system_of][0], 0, SYSTEMS[system_of][1])
    solver = build("linear", name)
    if hasattr(solver, "iterations"):
        solver = replace(solver, iterations=iterations)
    b = tree.scale(scale, b)
    if name == "task_cg":
        matvec, b = as_one_task(matvec, b)
    try:
        stats = solver.solve(matvec, b, zero(b)).stats
    except ConvergenceError:  # a series that diverges says so
        assert name == "neumann"
        return
    assert_agrees(stats)
    if name not in ("identity", "nystrom"):
        assert stats.stopped is not None


LOWER = {
    "gradient": [Gradient(), Gradient(tolerance=1e-3), Gradient(steps=2000, tolerance=1e-3)],
    "lbfgs": [LBFGS(steps=1), LBFGS(), LBFGS(tolerance=0.0)],
    "newton": [Newton(steps=1, tolerance=0.0), Newton()],
    "proximal": [Proximal(steps=1), Proximal(steps=2000)],
    "iterate": [Iterate(steps=1), Iterate(steps=5000, tolerance=1e-6)],
    "augmented_lagrangian": [AugmentedLagrangian(rounds=1), AugmentedLagrangian()],
}


def test_every_lower_solver_is_among_them():
    assert set(LOWER) == set(registry.names("lower"))


ENDS = {
    "gradient": [(None, "iterations"), (False, "iterations"), (True, "tolerance")],
    "lbfgs": [(False, "iterations"), (True, "tolerance"), (False, "stagnation")],
    "newton": [(False, "iterations"), (True, "tolerance")],
    "proximal": [(False, "iterations"), (True, "tolerance")],
    "iterate": [(False, "iterations"), (True, "tolerance")],
    "augmented_lagrangian": [(False, "iterations"), (True, "tolerance")],
}


@pytest.mark.parametrize("name", LOWER)
def test_every_lower_solver_says_why_it_ended(name):
    def lower(x, y, batch):
        return ((y["w"] - x["s"]) ** 4 + 0.5 * (y["w"] - 1) ** 2).sum()

    x = {"s": torch.tensor([2.0, -1.0], dtype=torch.float64)}
    y = {"w": torch.tensor([0.3, 0.4], dtype=torch.float64)}
    structure = Structure(
        constraints=(lambda x, y, _: {"equality": y["w"][:1] - 0.5})
        if name == "augmented_lagrangian"
        else None,
        map=(lambda x, y, _: {"w": 0.5 * y["w"] + x["s"]}) if name == "iterate" else None,
    )
    got = [solve_lower(lower, x, y, solver=s, structure=structure).stats for s in LOWER[name]]
    assert [(stats.converged, stats.stopped) for stats in got] == ENDS[name]


def test_newton_says_where_no_step_along_its_direction_lowers_the_loss():
    def lower(x, y, batch):  # y² / 2 with the gradient of y² / 2 + y
        return (0.5 * y["w"].square() + y["w"] - y["w"].detach()).sum()

    y = {"w": torch.zeros(1, dtype=torch.float64)}
    stats = solve_lower(lower, {}, y, solver=Newton()).stats
    assert (stats.steps, stats.converged, stats.stopped) == (1, False, "stagnation")


def test_what_does_not_agree_is_found():  # negative control
    for converged, stopped in [(True, "iterations"), (False, "tolerance"), (True, None)]:
        with pytest.raises(AssertionError):
            assert_agrees(Stats(converged=converged, stopped=stopped))
