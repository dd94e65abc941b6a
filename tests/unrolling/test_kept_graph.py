"""A lower solver that keeps the graph of its steps, and `unroll`, which then evaluates none again."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from bilevel import recipe, tree
from bilevel.estimators.unroll import Unroll
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import SGD, Adam
from bilevel.optimizers.learned import Learned
from bilevel.problem.levels import Levels, point_of
from bilevel.recipe.assemble import assemble
from bilevel.rng import Streams
from bilevel.run import engine
from bilevel.types import ALL_STEPS
from bilevel_problems.quadratic import Quadratic
from tests.unrolling.kept import CASE, Boxed, FromX, elsewhere, estimate, shorter, solved


@pytest.mark.parametrize(
    "optimizer", [SGD(lr=0.05, momentum=0.9), Adam(lr=0.05)], ids=["momentum", "adam"]
)
@pytest.mark.parametrize("problem", [CASE.problem, Boxed()], ids=["free", "boxed"])
def test_the_kept_graph_gives_what_taking_the_steps_again_gives_bit_for_bit(optimizer, problem):
    levels, solver = Levels(problem), Gradient(steps=7, optimizer=optimizer)
    kept, plain = solved(solver, levels), solved(solver, levels, graph=False)
    assert kept.path.graph is not None
    assert plain.path.graph is None
    assert all(torch.equal(kept.y[name], entry) for name, entry in plain.y.items())
    assert not any(entry.requires_grad for entry in kept.y.values())
    (ours, spent), (theirs, again) = estimate(kept, levels), estimate(plain, levels)
    for name, entry in theirs.hypergradient.items():
        assert torch.equal(ours.hypergradient[name], entry), name
    assert ours.value == theirs.value
    assert (spent.gradients, again.gradients) == (1, 1 + 7)
    assert spent.hvps == again.hvps == spent.cross_products == 7
    assert spent.reached == again.reached


def test_the_states_of_the_optimizer_carry_no_graph():
    kept = solved(Gradient(steps=3, optimizer=Adam(lr=0.1)))
    plain = solved(Gradient(steps=3, optimizer=Adam(lr=0.1)), graph=False)
    ours, theirs = (dict(tree.named(s.state)) for s in (kept, plain))
    assert ours.keys() == theirs.keys()
    for name, entry in theirs.items():
        assert torch.equal(ours[name], entry)
        assert not ours[name].requires_grad


def test_the_last_steps_alone_are_kept():
    solver = Gradient(steps=9, optimizer=SGD(lr=0.05, momentum=0.9))
    (ours, spent), (theirs, _) = (
        estimate(solved(solver, record=4, graph=graph), estimator=Unroll(last=4))
        for graph in (True, False)
    )
    for name, entry in theirs.hypergradient.items():
        assert torch.equal(ours.hypergradient[name], entry)
    assert spent.gradients == 1


def test_a_learned_rate_is_in_the_graph():
    x = {**CASE.x, "log_lr": torch.tensor(-3.0, dtype=torch.float64)}
    solver = Gradient(steps=5, optimizer=SGD(lr=Learned(upper="log_lr", transform="exp")))
    (ours, counts), (theirs, _) = (
        estimate(solved(solver, x=x, graph=graph), x=x) for graph in (True, False)
    )
    assert torch.equal(ours.hypergradient["log_lr"], theirs.hypergradient["log_lr"])
    assert ours.hypergradient["log_lr"] != 0
    assert "log_lr" in counts.reached


def again(solution):
    estimate(solution)
    return solution, CASE.x


def from_x(solution):
    start = solution.path.start
    moved = {n: v + sum(e.sum() for e in CASE.x.values()) for n, v in start.items()}
    path = replace(
        solution.path,
        restart=lambda x: {n: v + sum(e.sum() for e in x.values()) for n, v in start.items()},
    )
    assert any(not torch.equal(moved[n], v) for n, v in start.items())
    return replace(solution, path=path), CASE.x


@pytest.mark.parametrize("change", [again, elsewhere, shorter, from_x])
def test_a_graph_of_other_steps_is_not_taken(change):
    """Used up, at another x, of fewer steps, from another start: the steps are taken again."""
    solver = Gradient(steps=6, optimizer=SGD(lr=0.05))
    kept, x = change(solved(solver))
    plain = replace(kept, path=replace(kept.path, graph=None))
    (ours, counts), (theirs, _) = estimate(kept, x=x), estimate(plain, x=x)
    for name, entry in theirs.hypergradient.items():
        assert torch.equal(ours.hypergradient[name], entry)
    assert counts.gradients == 1 + len(kept.path.batches)


def test_taking_it_all_the_same_would_be_wrong():
    """Negative control of the above: the graph of another x has another hypergradient."""
    solver = Gradient(steps=6, optimizer=SGD(lr=0.05))
    kept, x = elsewhere(solved(solver))
    forced = replace(kept, path=replace(kept.path, graph=replace(kept.path.graph, of=x)))
    (wrong, _), (right, _) = estimate(forced, x=x), estimate(kept, x=x)
    assert any(
        not torch.allclose(wrong.hypergradient[n], v) for n, v in right.hypergradient.items()
    )


class Doubled(FromX):
    """Another function of x, of the same value."""

    def lower_start(self, x, y):
        once = super().lower_start(x, y)
        return {name: 2 * entry - entry.detach() for name, entry in once.items()}


@pytest.mark.parametrize(
    "optimizer", [SGD(lr=0.05, momentum=0.9), Adam(lr=0.05)], ids=["momentum", "adam"]
)
def test_a_start_that_depends_on_x_is_differentiated_through(optimizer):
    levels, solver = Levels(FromX()), Gradient(steps=5, optimizer=optimizer)
    kept, plain = solved(solver, levels), solved(solver, levels, graph=False)
    assert kept.path.restart is not None
    (ours, spent), (theirs, again) = estimate(kept, levels), estimate(plain, levels)
    for name, entry in theirs.hypergradient.items():
        torch.testing.assert_close(ours.hypergradient[name], entry, rtol=1e-12, atol=1e-14)
    assert (spent.gradients, again.gradients) == (1, 1 + 5)
    assert spent.reached == again.reached
    # negative controls: the start's share is no small part, and the function is the path's own
    forgotten = replace(plain, path=replace(plain.path, restart=None))
    kept = solved(solver, levels)
    doubled = replace(kept, path=replace(kept.path, restart=Levels(Doubled()).restart(CASE.y)))
    for other, is_far in ((forgotten, True), (doubled, True)):
        h = estimate(other, levels)[0].hypergradient
        assert is_far is any(
            not torch.allclose(h[name], entry, rtol=1e-3)
            for name, entry in theirs.hypergradient.items()
        )


def test_a_start_that_is_x_itself_is_taken():
    """Model-agnostic meta-learning: y_0 = x."""

    class Start(Quadratic):
        def lower_start(self, x, y):
            return {"y": x["x"]}

    levels = Levels(Start(num_upper=4, num_lower=4))
    x, y = levels.problem.init(Streams(0))
    batch = next(levels.problem.lower_batches(Streams(0)["b"]))
    x, y, batch = tree.to((x, y, batch), "cpu", torch.float64)
    found = []
    for graph in (True, False):
        losses = levels.losses(batch, batch)
        solution = levels.solve(
            Gradient(steps=3, optimizer=SGD(lr=0.05)),
            x,
            y,
            batches=itertools.repeat(batch),
            record=ALL_STEPS,
            graph=graph,
        )
        found.append(Unroll().estimate(losses, point_of(x, solution), {}).hypergradient["x"])
        assert losses.counts.gradients == (1 if graph else 4)
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


RUN = """
problem: {name: quadratic}
lower: {name: gradient, steps: 5, optimizer: {name: adam, lr: 0.05}}
estimator: {name: unroll, memory: MEMORY}
upper: {steps: 4, optimizer: {name: sgd, lr: 0.05}}
runtime: {dtype: float64}
"""


LEAST = {
    "store": 5,
    "recompute": 5 + 5,
    "mixed": 5 + 2 * 5,  # one gradient a step more, since Adam is not affine in it
    "checkpoint": 5 + 3 + 5,  # two of five iterates are kept, and the three others taken again
}
"""Gradients of a run's upper step of K = 5: those of the solve, and what else `memory` is there for."""


def test_a_run_shares_the_gradients_of_the_lower_solve():
    totals, ends = {}, {}
    for memory in LEAST:
        made = assemble(recipe.loads(RUN.replace("MEMORY", memory)))
        state = engine.start(made)
        for _event in engine.run(made, state):
            pass
        totals[memory], ends[memory] = state.totals, state.x
    assert {name: total.gradients for name, total in totals.items()} == {
        name: 4 * (number + 1) for name, number in LEAST.items()
    }
    assert {total.hvps for total in totals.values()} == {4 * 5}
    for end in ends.values():
        for name, entry in ends["recompute"].items():
            torch.testing.assert_close(end[name], entry, rtol=1e-12, atol=1e-14)
