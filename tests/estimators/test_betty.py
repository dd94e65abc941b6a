"""betty-ml beside ours: the same numbers where it is right, and its CG shown wrong."""

from __future__ import annotations

import importlib.metadata
import math

import pytest
import torch

from bilevel import tree
from bilevel.errors import CheckError, ProblemError, RequirementError
from bilevel.estimators import betty
from bilevel.estimators.betty import INSTALL, Betty
from bilevel.estimators.implicit import Implicit
from bilevel.events import Warned
from bilevel.linear.identity import Identity
from bilevel.linear.neumann import Neumann
from bilevel.lower.gradient import Gradient
from bilevel.registry.build import build
from bilevel.run import engine
from bilevel.run.engine import Setup
from bilevel.run.upper import Upper
from bilevel.testing import CheckRow, check, check_estimator
from bilevel.testing.cases import cases
from bilevel.testing.harness import Harness
from bilevel.testing.passes import Passes
from bilevel_problems.quadratic import Quadratic
from tests.cases import NAMES, PROBLEMS, assert_close, closed_form, offset, relative


def is_here() -> bool:
    try:
        betty.require()
    except RequirementError:
        return False
    return True


with_betty = pytest.mark.skipif(not is_here(), reason=f"betty-ml is not installed: {INSTALL}")


@with_betty
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("make", PROBLEMS, ids=NAMES)
@pytest.mark.untrusted("a series of few terms")
def test_its_neumann_series_is_ours(make, seed):
    """K terms after the first are K + 1 of ours; away from the lower solution as well."""
    case = closed_form(make, seed)
    y = offset(case.y, 0.3)
    scale = 0.3 / float(torch.linalg.eigvalsh(case.hessian())[-1])
    theirs = case.estimate(Betty(method="neumann", iterations=15, scale=scale), y)
    ours = case.estimate(Implicit(solver=Neumann(iterations=16, scale=scale)), y)
    assert_close(theirs.hypergradient, ours.hypergradient, rtol=1e-12)
    torch.testing.assert_close(theirs.value, ours.value, rtol=1e-14, atol=0)
    one_less = case.estimate(Implicit(solver=Neumann(iterations=15, scale=scale)), y)
    assert relative(theirs.hypergradient, one_less.hypergradient) > 1e-6  # negative control


@with_betty
@pytest.mark.parametrize("method", ["darts", "sama"])
def test_its_difference_is_ours_to_second_order(method):
    """On a lower level that bends: error slope 2 in epsilon against the exact product."""
    harness = Harness(Implicit(solver=Identity(scale=1.0)), cases(0)["nonlinear"], 0)
    scene = harness.scene()
    exact = harness.ask(scene, harness.init(scene)).hypergradient
    sizes = (1e-1, 1e-2)
    errors = [
        relative(
            harness.ask(scene, {}, estimator=Betty(method=method, epsilon=size)).hypergradient,
            exact,
        )
        for size in sizes
    ]
    assert math.log10(errors[0] / errors[1]) == pytest.approx(2.0, abs=0.05)


@with_betty
def test_check_shows_that_its_cg_is_wrong():
    setup = Setup(Quadratic(), Gradient(), Upper(), Implicit())
    methods = {"theirs": Betty(method="cg"), "ours": Implicit()}
    rows = {row.name: row for row in check(setup, methods) if isinstance(row, CheckRow)}
    assert rows["ours"].verdict == "exact"
    assert rows["theirs"].verdict == "wrong"
    assert rows["theirs"].claim_error > 0.1
    assert "claim missed" in rows["theirs"].note
    assert "CG is wrong as released" in rows["theirs"].note
    with pytest.raises(CheckError, match="claim missed"):
        check_estimator(Betty(method="cg"), seeds=(0,))


@with_betty
def test_the_self_test_tells_right_from_wrong(monkeypatch):
    assert betty.cg_error() > 0.1

    def right(vector, curr, prev, sync):
        """Hestenes and Stiefel, with the new residual."""
        gradient = torch.autograd.grad(
            curr.training_step_exec(curr.cur_batch), curr.parameters(), create_graph=True
        )
        b = vector[0]
        v, r, p = torch.zeros_like(b), b.clone(), b.clone()
        for _ in range(curr.config.cg_iterations):
            (Ap,) = torch.autograd.grad(gradient, curr.parameters(), [p], retain_graph=True)
            alpha = (r @ r) / (p @ Ap)
            v, new = v + alpha * p, r - alpha * Ap
            p, r = new + (new @ new) / (r @ r) * p, new
        found = torch.autograd.grad(gradient, prev.parameters(), [v])
        return [-part for part in found]

    monkeypatch.setitem(__import__("betty").hypergradient.jvp_fn_mapping, "cg", right)
    betty.cg_error.cache_clear()
    try:
        assert betty.cg_error() < 1e-12
    finally:
        betty.cg_error.cache_clear()


@with_betty
def test_the_error_is_told_in_sizes_of_the_truth(monkeypatch):
    """An adjoint of zero is off by one of them."""

    def nothing(vector, curr, prev, sync):
        return [torch.zeros_like(part) for part in prev.parameters()]

    theirs = importlib.import_module("betty.hypergradient")
    monkeypatch.setitem(theirs.jvp_fn_mapping, "cg", nothing)
    betty.cg_error.cache_clear()
    try:
        assert betty.cg_error() == pytest.approx(1.0, rel=1e-12)
    finally:
        betty.cg_error.cache_clear()


@with_betty
@pytest.mark.parametrize("method", ["neumann", "darts", "sama"])
def test_the_adapter_keeps_the_contract(method):
    check_estimator(Betty(method=method), seeds=(0,), within=1.5)


@with_betty
@pytest.mark.parametrize("method", ["neumann", "cg", "darts", "sama"])
def test_its_calls_are_counted_as_they_were_made(method):
    harness, seen = Harness(Betty(method=method, iterations=7), cases(0)["nonlinear"], 0), Passes()
    scene = harness.scene()
    stats = harness.ask(scene, {}, wrap=seen.watch).stats
    assert stats.gradients == seen.first == (3 if method in ("neumann", "cg") else 4)
    assert stats.hvps + stats.cross_products == seen.second == (8 if stats.hvps else 0)


@with_betty
@pytest.mark.parametrize("name", ["neumann", "cg", "darts", "sama"])
def test_it_is_found_by_name(name):
    assert build("estimators", f"betty:{name}") == Betty(method=name)
    assert build("estimators", {"name": f"betty:{name}", "iterations": 3}).iterations == 3


@with_betty
def test_a_run_with_its_cg_begins_with_a_warning():
    setup = Setup(Quadratic(), Gradient(), Upper(steps=1), Betty(method="cg"))
    warned = [e for e in engine.run(setup, engine.start(setup)) if isinstance(e, Warned)]
    assert "CG is wrong as released" in warned[0].message
    setup = Setup(Quadratic(), Gradient(), Upper(steps=1), Betty())
    assert not [e for e in engine.run(setup, engine.start(setup)) if isinstance(e, Warned)]


@with_betty
def test_what_betty_cannot_do_is_said():
    case = closed_form(PROBLEMS[0], 0)

    def lower(x, y, batch):
        return case.problem.lower_loss({"x": x["x"]}, y, batch)

    from bilevel import hypergradient

    x = {**case.x, "other": torch.ones(2, dtype=torch.float64)}
    upper = lambda x, y, batch: case.problem.upper_loss(x, y, batch) + x["other"].sum()  # noqa: E731
    batches = {"upper_batch": case.upper_batch, "lower_batch": case.lower_batch}
    with pytest.raises(ProblemError, match="every entry of x in its gradient in y"):
        hypergradient(upper, lower, x, case.y, estimator=Betty(), **batches)
    got = hypergradient(upper, lower, x, case.y, estimator=Implicit(), **batches)
    assert tree.norm({"o": got.hypergradient["other"] - 1}) < 1e-12


@pytest.mark.parametrize("version", [None, "0.1.1"])
def test_without_it_the_command_is_named(version, monkeypatch):
    def found(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", found)
    betty.require.cache_clear()
    try:
        with pytest.raises(RequirementError, match=r"--ignore-requires-python betty-ml==0\.2\.1"):
            build("estimators", "betty:neumann")
    finally:
        betty.require.cache_clear()
