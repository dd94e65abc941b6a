"""Which parts of the library are replayed: all but those that are named here, with the reason."""

from dataclasses import replace

import pytest
import torch

from bilevel import registry
from bilevel.lower.gradient import Gradient
from bilevel.optimizers import SGD
from bilevel.registry import presets
from bilevel.registry.build import build
from bilevel.run.engine import Setup
from bilevel.run.upper import Upper
from bilevel_problems.box_qp import BoxQP
from bilevel_problems.lasso import Lasso
from tests.run.replays import BLOCKS, LOGISTIC, Parts, ended, require_same


class Started(Parts):
    """Where y starts is x, as in meta-learning."""

    def lower_start(self, x, y):
        return {name: entry * 1.0 for name, entry in x.items()}


PROBLEMS = {
    **dict.fromkeys(("saba", "srba", "vrbo", "sustain", "bsa", "ttsa"), BLOCKS),
    **dict.fromkeys(("fomaml", "reptile"), Started()),
    "kkt": BoxQP(),
}
LOWER = dict.fromkeys(("shine", "shine_block", "shine_refined"), "lbfgs")

STEPS = {"iterations": 3, "tolerance": 0.0}
OPTIONS = {
    "fixed_point": {"solver": {"name": "gmres", **STEPS}},
    "lancbio": {"dimension": 2},
    **{name: {"adjoint_steps": 2} for name in ("bsa", "sustain", "ttsa")},
}
TAKEN = {
    "maid": "accuracies change from step to step",
    **dict.fromkeys(LOWER, "torch.optim.LBFGS searches along lines"),
    **dict.fromkeys(("betty:darts", "betty:sama"), "betty-ml adds in place by a number"),
}
"""By themselves, and why."""


def estimators():
    return sorted({*registry.names("estimators"), *presets.of("estimators")})


def setup(name, **parts):
    lower = parts.pop("lower", None) or LOWER.get(name)
    return Setup(
        PROBLEMS.get(name, LOGISTIC) if "problem" not in parts else parts.pop("problem"),
        build("lower", lower) if lower else Gradient(steps=2, optimizer=SGD(lr=0.1)),
        Upper(steps=12, optimizer=SGD(lr=0.01)),
        build("estimators", {"name": name, **OPTIONS.get(name, {}), **parts}),
        dtype=torch.float64,
    )


def require_replayed(s, is_taken=False):
    """To the same bits, from few records; or by itself, which is said."""
    plain, compiled = ended(s), ended(replace(s, compile="step"))
    for state, *_ in (plain, compiled):
        state.warned.pop("compile", None)
    require_same(plain, compiled)
    assert bool(compiled[3]) == is_taken, compiled[3]
    assert is_taken or 1 <= len(compiled[2]) <= 5, [trace.why for trace in compiled[2]]


@pytest.mark.parametrize("name", estimators())
def test_every_estimator_is_replayed_or_named(name):
    if name.startswith("betty:"):
        pytest.importorskip("betty")
    require_replayed(setup(name), name in TAKEN)


@pytest.mark.parametrize("name", sorted(registry.names("linear")))
def test_every_linear_solver_is_replayed(name):
    solver = build("linear", {"name": name})
    options = {key: value for key, value in STEPS.items() if hasattr(solver, key)}
    require_replayed(setup("implicit", solver={"name": name, **options}))


@pytest.mark.parametrize("start", ["linear", "galerkin"])
def test_every_start_of_the_adjoint_is_replayed(start):
    require_replayed(setup("implicit", solver={"name": "cg", **STEPS}, start=start))


@pytest.mark.parametrize("name", ["gradient", "newton", "lbfgs", "proximal"])
def test_lower_solvers_whose_steps_are_alike_are_replayed(name):
    """Not those that search along lines, as lbfgs does in torch's own optimizer and newton where it has to."""
    if name == "proximal":
        s = setup(
            "fixed_point",
            lower=name,
            problem=Lasso(),
            solver={"name": "gmres", "iterations": 2, "tolerance": 0.0},
        )
    else:
        s = setup("implicit", lower={"name": name, "steps": 2})
    require_replayed(s, name == "lbfgs")
