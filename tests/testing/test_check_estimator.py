"""`check_estimator` finds every kind of mistake that it says it finds, and nothing where there is none."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from bilevel import calculus, tree
from bilevel.errors import CheckError
from bilevel.estimators.alternating import Alternating
from bilevel.estimators.fomaml import FOMAML
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.kkt import KKT
from bilevel.estimators.one_step import OneStep
from bilevel.estimators.penalty import Penalty
from bilevel.estimators.reptile import Reptile
from bilevel.estimators.unroll import Unroll
from bilevel.linear.identity import Identity
from bilevel.testing import check_estimator
from bilevel.testing.cases import cases
from bilevel.testing.needs import adaptation_cases, cases_of, constrained_cases
from bilevel.types import Moved, Needs, Point
from tests.wrapped import Wrapped

QUICK = (0,)


@dataclass
class Around(Wrapped):
    """An estimator with something wrong around it."""

    inner: Any


def complaint(estimator, **options):
    with pytest.raises(CheckError) as caught:
        check_estimator(estimator, seeds=QUICK, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    "estimator", [Implicit(), OneStep(), Unroll(), Penalty(), Alternating()], ids=repr
)
def test_what_is_right_passes_with_nothing_around_it(estimator):
    check_estimator(Around(estimator), seeds=QUICK)


def test_a_claim_that_does_not_hold():
    class Off(Around):
        def estimate(self, losses, at, state):
            got = super().estimate(losses, at, state)
            return replace(got, hypergradient=tree.scale(1.001, got.hypergradient))

    said = complaint(Off(Implicit()))
    for name in cases(0):
        assert f"claim ({name}, seed 0): claim missed by 1.0e-03" in said
    assert "warm start (nonlinear, seed 0): relative error 1.0e-03" in said
    assert "no adjoint: F does not depend on y, and it is 1.0e-03 off" in said


def test_no_claim_and_an_answer_that_is_far_off():
    assert "must be > 0" in complaint(Implicit(solver=Identity()))
    check_estimator(Implicit(solver=Identity()), seeds=QUICK, within=1.5)
    assert "within = 0.01 was asked for" in complaint(Implicit(solver=Identity()), within=0.01)


def test_a_claim_without_its_function():
    class Mute:
        needs, claim = Needs(second_order=False), "direct"
        init, estimate = Alternating().init, Alternating().estimate

    assert "has no `objective(losses, at)`" in complaint(Mute())


def test_an_unknown_claim():
    class Other(Around):
        claim = "perfect"

    assert "claim = 'perfect'; must be one of" in complaint(Other(Alternating()))


def test_no_estimator_at_all():
    assert "is not an Estimator: it lacks needs, claim, init, estimate" in complaint(object())


@pytest.mark.parametrize(("converged", "stopped"), [(True, "iterations"), (False, "tolerance")])
def test_reasons_that_do_not_agree(converged, stopped):
    class Says(Around):
        def estimate(self, losses, at, state):
            got = super().estimate(losses, at, state)
            return replace(got, stats=replace(got.stats, converged=converged, stopped=stopped))

    said = complaint(Says(Alternating()))
    assert f"says converged = {converged} beside stopped = {stopped!r}" in said


def test_an_answer_that_is_the_one_before():
    class Stale(Around):
        def init(self, at):
            return {"inner": self.inner.init(at)}

        def estimate(self, losses, at, state):
            got = self.inner.estimate(losses, at, state["inner"])
            h = state.get("before", got.hypergradient)
            kept = {"inner": got.state, "before": got.hypergradient}
            return replace(got, hypergradient=h, state=kept)

    said = complaint(Stale(Alternating()))
    assert "with the state from before, the very answer from before" in said


def test_a_state_that_decides():
    class Drifting(Around):
        def init(self, at):
            return {"inner": self.inner.init(at), "calls": 0}

        def estimate(self, losses, at, state):
            got = self.inner.estimate(losses, at, state["inner"])
            h = tree.scale(1 + 0.1 * state["calls"], got.hypergradient)
            return replace(
                got, hypergradient=h, state={"inner": got.state, "calls": state["calls"] + 1}
            )

    assert "from the state of another x" in complaint(Drifting(Implicit()))


def test_a_state_that_is_written_to():
    class Writes(Around):
        def estimate(self, losses, at, state):
            got = super().estimate(losses, at, state)
            for adjoint, new in zip(state["past"], got.state["past"], strict=False):
                tree.axpy_(adjoint, 1.0, new)
            return got

    assert "writes into the state that it is given: ['past'" in complaint(Writes(Implicit()))


def test_a_state_that_whoever_asks_may_write_into():
    class Shares(Around):
        kept = "hypergradient"

        def init(self, at):
            return {"inner": self.inner.init(at)}

        def estimate(self, losses, at, state):
            got = self.inner.estimate(losses, at, state["inner"])
            shared = {"hypergradient": got.hypergradient, "x": at.x, "y": at.y}[self.kept]
            return replace(got, state={"inner": got.state, "shared": [shared]})

    assert "shares memory with hypergradient" in complaint(Shares(Implicit()))
    for name in ("x", "y"):
        Shares.kept = name
        assert f"shares memory with {name}," in complaint(Shares(Implicit()))


def test_a_state_that_holds_where_y_was_moved_to():
    class Moves(Around):
        needs = Needs(second_order=False, moves_lower=True)

        def estimate(self, losses, at, state):
            got = super().estimate(losses, at, state)
            moved = Moved(tree.clone(at.y), 0.0, 0.0)
            return replace(got, moved=moved, state=moved.y)

    assert "shares memory with moved.y" in complaint(Moves(Alternating()))


def test_a_state_that_no_checkpoint_holds():
    class Odd(Around):
        def estimate(self, losses, at, state):
            return replace(super().estimate(losses, at, state), state={"at": (1, 2)})

    said = complaint(Odd(Alternating()))
    assert "state: " in said
    assert "tuple" in said or "(1, 2)" in said


def test_a_memory_outside_the_state():
    class Remembers(Around):
        calls = 0

        def estimate(self, losses, at, state):
            self.calls += 1
            got = super().estimate(losses, at, state)
            return replace(got, hypergradient=tree.scale(1 + self.calls * 1e-9, got.hypergradient))

    assert "asked again, with the same state, it answers otherwise" in complaint(
        Remembers(Alternating())
    )


def test_fields_that_change():
    @dataclass
    class Counting(Around):
        calls: int = 0

        def estimate(self, losses, at, state):
            self.calls += 1
            return super().estimate(losses, at, state)

    assert "changes its own fields" in complaint(Counting(Alternating()))


def test_random_numbers_from_everybodys_stream():
    class Dice(Around):
        def estimate(self, losses, at, state):
            torch.rand(1)
            return super().estimate(losses, at, state)

    assert "draws from the global random state" in complaint(Dice(Alternating()))


def test_y_is_the_callers():
    class Moves(Around):
        def estimate(self, losses, at, state):
            got = super().estimate(losses, at, state)
            tree.axpy_(at.y, 1e-9, at.y)
            return got

    assert "writes into y" in complaint(Moves(Alternating()))


def test_what_is_returned_has_the_form_of_x():
    class Wide(Around):
        def estimate(self, losses, at, state):
            got = super().estimate(losses, at, state)
            h = tree.map(torch.Tensor.double, got.hypergradient)
            return replace(got, hypergradient=h, value=got.value.reshape(1))

    said = complaint(Wide(Alternating()))
    assert "float32: raised CheckError: Wide.estimate must return a hypergradient with" in said
    assert "as {'slope': (2,) float32, 'level': () float32}; got {'slope': (2,) float64" in said
    assert "value must be a detached scalar tensor" in said


def test_moves_are_announced():
    class Walks(Around):
        def estimate(self, losses, at, state):
            return replace(super().estimate(losses, at, state), moved=Moved(at.y, 0.0, 0.0))

    class Flattens(Around):
        def estimate(self, losses, at, state):
            flat = tree.map(torch.Tensor.flatten, at.y)
            return replace(super().estimate(losses, at, state), moved=Moved(flat, 0.0, 0.0))

    class Stands(Around):
        needs = Needs(second_order=False, moves_lower=True)

    assert "its needs do not say moves_lower" in complaint(Walks(Alternating()))
    said = complaint(Flattens(Alternating()))
    assert "must return the y that it moved as {'weight': (2, 2) float64, 'bias'" in said
    assert "got {'weight': (4,) float64, 'bias'" in said
    assert "needs.moves_lower, and `moved` is None" in complaint(Stands(Alternating()))


def test_products_that_are_not_counted():
    class Thrifty(Around):
        def estimate(self, losses, at, state):
            got = super().estimate(losses, at, state)
            losses.counts.hvps = losses.counts.gradients = 0
            return got

    said = complaint(Thrifty(Implicit()))
    assert "counts 0 gradients; autograd was asked for 2" in said
    assert "counts 1 second-order products; autograd was asked for" in said


@pytest.mark.parametrize(
    "estimator", [Implicit(), OneStep(), OneStep(finite_difference=True), Unroll(), Penalty()]
)
def test_what_is_counted_is_what_autograd_did(estimator):
    """Exactly for those that take one pass a product; unrolling has two products in one."""
    from bilevel.testing.harness import Harness
    from bilevel.testing.passes import Passes

    harness, seen = Harness(estimator, cases(0)["nonlinear"], 0), Passes()
    scene = harness.scene()
    stats = harness.ask(scene, harness.init(scene), wrap=seen.watch).stats
    assert stats.gradients == seen.first
    each = 2 if isinstance(estimator, Unroll) else 1
    assert stats.hvps + stats.cross_products == each * seen.second


def test_a_second_derivative_where_none_is_promised():
    class Secretly(Around):
        def estimate(self, losses, at, state):
            calculus.linearize(losses.lower, at)
            return super().estimate(losses, at, state)

    class Openly(Around):
        needs = Needs(second_order=False)

    assert "a gradient was taken with its graph" in complaint(Secretly(Alternating()))
    said = complaint(Openly(Implicit()))
    assert "needs.second_order is False, and it counts" in said


def test_fresh_batches_only_where_they_are_announced():
    class Greedy(Around):
        def estimate(self, losses, at, state):
            losses.lower.fresh()
            return super().estimate(losses, at, state)

    assert "the estimator draws fresh batches, and only one was given" in complaint(
        Greedy(Alternating())
    )


def test_a_solve_that_divides_by_a_right_hand_side_of_zero():
    class Unguarded(Around):
        def estimate(self, losses, at, state):
            _, _, F_y = calculus.gradients(losses.upper, at)
            got = super().estimate(losses, at, state)
            one = torch.ones((), dtype=torch.float64) * tree.norm(F_y)
            return replace(
                got, hypergradient=tree.map(lambda h: h * (one / one), got.hypergradient)
            )

    assert "no adjoint: raised ConvergenceError" in complaint(Unguarded(Alternating()))


@pytest.mark.parametrize("name", cases(0))
@pytest.mark.parametrize("seed", range(3))
def test_the_closed_forms_are_right(name, seed):
    """Autograd through the lower solution, which is stationary; each term of dΦ/dx matters."""
    from bilevel.rng import Streams

    problem = cases(seed)[name]
    start, _ = problem.init(Streams(seed))
    x, k = tree.leaves(start), problem.constants
    value = problem.upper_loss(x, problem.lower_solution(x), k)
    truth = dict(zip(x, torch.autograd.grad(value, list(x.values())), strict=True))
    h = problem.hypergradient(start)
    assert tree.norm(tree.sub(h, truth)) < 1e-13
    y = tree.detach(problem.lower_solution(start))
    _, g = calculus.gradient_y(_losses(problem).lower, start, y)
    assert tree.norm(g) < 1e-13
    _, F_x, _ = calculus.gradients(_losses(problem).upper, Point(start, y))
    assert tree.norm(F_x) > 0.1 * tree.norm(h)
    assert tree.norm(tree.sub(h, F_x)) > 0.1 * tree.norm(h)


@pytest.mark.parametrize(
    ("estimator", "options"), [(KKT(), {}), (FOMAML(), {"within": 0.2}), (Reptile(), {})], ids=repr
)
def test_what_needs_more_of_a_problem_is_held_to_problems_that_have_it(estimator, options):
    check_estimator(Around(estimator), seeds=QUICK, **options)


@dataclass
class Needy(Around):
    """It says that it needs or knows something of the problem."""

    asked: Needs = field(default_factory=Needs)

    @property
    def needs(self):
        return self.asked


def test_constraints_that_are_required_and_not_used():
    said = complaint(Needy(Implicit(), Needs(requires=frozenset({"lower_constraints"}))))
    for name in constrained_cases(0):
        assert f"claim ({name}, seed 0): " in said
    assert "nonlinear" not in said


def test_a_set_that_is_said_to_be_known_and_is_not():
    boasts = Needy(Implicit(), Needs(supports=frozenset({"project_lower"})))
    assert {*cases_of(boasts, 0)} == {*cases(0), *constrained_cases(0)}
    said = complaint(boasts)
    assert "claim (constrained, seed 0): claim missed by" in said
    assert "warm start (constrained, seed 0): relative error" in said
    assert "claim (nonlinear, seed 0)" not in said


def test_a_start_that_is_pulled_the_wrong_way():
    class Uphill(Around):
        def estimate(self, losses, at, state):
            got = super().estimate(losses, at, state)
            return replace(got, hypergradient=tree.scale(-1.0, got.hypergradient))

    for estimator in (FOMAML(), Reptile()):
        said = complaint(Uphill(estimator))
        assert all(f"size ({name}, seed 0): cosine -" in said for name in adaptation_cases(0))


def test_a_need_that_no_case_can_serve():
    odd = Needy(Implicit(), Needs(requires=frozenset({"lower_prices"})))
    assert "requires lower_prices, which no problem that it could be held to has" in complaint(odd)


@pytest.mark.parametrize("make", [constrained_cases, adaptation_cases])
@pytest.mark.parametrize("seed", range(3))
def test_the_closed_forms_of_the_needy_are_right(make, seed):
    """y* stays where it is under a projected step, and dΦ/dx is autograd's through it."""
    from bilevel.rng import Streams

    for problem in make(seed).values():
        start, _ = problem.init(Streams(seed))
        batch = next(problem.upper_batches(None))
        x = tree.leaves(start)
        value = problem.upper_loss(x, problem.lower_solution(x), batch)
        truth = dict(zip(x, torch.autograd.grad(value, list(x.values())), strict=True))
        h = problem.hypergradient(start)
        assert tree.norm(tree.sub(h, truth)) < 1e-13
        y = tree.detach(problem.lower_solution(start))
        _, g = calculus.gradient_y(_losses(problem).lower, start, y)
        project = getattr(problem, "project_lower", None)
        step = tree.axpy(-0.1, g, y)
        assert tree.norm(tree.sub(project(step) if project else step, y)) < 1e-13
        if project:
            assert tree.norm(g) > 0.1, "what holds y is active"
            c = problem.lower_constraints(start, y, batch)
            assert float(c["equality"].abs().max()) < 1e-13
            assert int((c["inequality"] > -1e-9).sum()) == 1
        _, F_x, _ = calculus.gradients(_losses(problem).upper, Point(start, y))
        assert tree.norm(F_x) > 0.1 * tree.norm(h)
        assert tree.norm(tree.sub(h, F_x)) > 0.1 * tree.norm(h)


def _losses(problem):
    from bilevel.types import Counts, Loss, Losses

    counts, k = Counts(), next(problem.upper_batches(None))
    return Losses(
        Loss(problem.upper_loss, k, counts, "upper"), Loss(problem.lower_loss, k, counts, "lower")
    )
