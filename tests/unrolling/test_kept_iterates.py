"""A lower solver that keeps the iterates it passes, and what unrolls them, which takes no step to come to them."""

from dataclasses import replace

import pytest
import torch

from bilevel import tree
from bilevel.estimators.unroll import Unroll
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import SGD, Adam
from bilevel.problem.levels import Levels
from tests.cases import assert_close
from tests.unrolling.kept import CASE, LEVELS, Boxed, FromX, elsewhere, estimate, shorter, solved

K = 7
WAYS = {
    "recompute": (Unroll(memory="recompute"), lambda k: k),
    "traced": (Unroll(memory="traced"), lambda k: k),
    "mixed": (Unroll(memory="mixed"), lambda k: 2 * k),
    "checkpoint": (Unroll(memory="checkpoint"), lambda k: 4 + k),  # 1, 2, 4, 5 are passed again
    "pessimistic": (Unroll(memory="recompute", pessimistic=True), lambda k: k),
    "pessimistic, store": (Unroll(pessimistic=True), lambda k: k),
    "last": (Unroll(memory="recompute", last=4), lambda k: k),
}
"""With the gradients that k steps take beside the one of F."""


def both(estimator, levels=LEVELS, optimizer=None):
    """(the solution with iterates, that without)."""
    needs, solver = estimator.needs, Gradient(steps=K, optimizer=optimizer or Adam(lr=0.05))
    return [
        solved(solver, levels, record=needs.path, graph=False, iterates=iterates)
        for iterates in (needs.iterates, None)
    ]


CASES = {(name, "free"): CASE.problem for name in WAYS}
CASES |= {(name, "boxed"): Boxed() for name in ("recompute", "checkpoint", "pessimistic")}
CASES |= {(name, "from x"): FromX() for name in ("recompute", "checkpoint", "pessimistic, store")}


@pytest.mark.parametrize(("case", "problem"), CASES.items(), ids=map(str, CASES))
def test_they_give_what_taking_the_steps_again_gives_bit_for_bit(case, problem):
    (estimator, gradients), levels = WAYS[case[0]], Levels(problem)
    kept, plain = both(estimator, levels)
    assert plain.path.iterates is None
    assert all(torch.equal(kept.y[name], entry) for name, entry in plain.y.items())
    (ours, spent), (theirs, again) = (
        estimate(kept, levels, estimator=estimator),
        estimate(plain, levels, estimator=estimator),
    )
    assert_close(ours.hypergradient, theirs.hypergradient, rtol=0)
    assert ours.value == theirs.value
    used, recorded = spent.cross_products, len(kept.path.batches)
    assert spent.gradients == 1 + gradients(used)
    cut = estimator.pessimistic and estimator.memory == "recompute"
    assert again.gradients == spent.gradients + recorded + used * cut
    assert spent.reached == again.reached


def test_as_many_are_kept_as_are_used():
    kept, _ = both(Unroll(memory="checkpoint"))
    assert sorted(kept.path.iterates.passed) == [0, 3, 6, 7]
    kept, _ = both(Unroll(memory="recompute", last=4))
    assert sorted(kept.path.iterates.passed) == [0, 1, 2, 3, 4]
    for memory in ("store", "reversible"):
        assert Unroll(memory=memory).needs.iterates is None


def test_they_serve_more_than_one_hypergradient():
    estimator = Unroll(memory="recompute")
    kept, _ = both(estimator)
    found = [estimate(kept, estimator=estimator) for _ in range(2)]
    assert [counts.gradients for _, counts in found] == [1 + K] * 2
    assert_close(found[0][0].hypergradient, found[1][0].hypergradient, rtol=0)


@pytest.mark.parametrize("change", [elsewhere, shorter])
@pytest.mark.parametrize(
    "estimator", [Unroll(memory="recompute"), Unroll(pessimistic=True)], ids=repr
)
def test_those_of_other_steps_are_not_taken(estimator, change):
    kept, _ = both(estimator, optimizer=SGD(lr=0.05))
    kept, x = change(kept)
    plain = replace(kept, path=replace(kept.path, iterates=None))
    (ours, spent), (theirs, again) = (
        estimate(one, x=x, estimator=estimator) for one in (kept, plain)
    )
    assert_close(ours.hypergradient, theirs.hypergradient, rtol=0)
    assert spent.gradients == again.gradients


def test_taking_them_all_the_same_would_be_wrong():
    """Negative control of the above: the iterates of another x have another hypergradient."""
    estimator = Unroll(memory="recompute")
    kept, x = elsewhere(both(estimator, optimizer=SGD(lr=0.05))[0])
    forced = replace(kept, path=replace(kept.path, iterates=replace(kept.path.iterates, of=x)))
    wrong, right = (estimate(one, x=x, estimator=estimator)[0] for one in (forced, kept))
    difference = tree.norm(tree.sub(wrong.hypergradient, right.hypergradient))
    assert difference > 1e-3 * tree.norm(right.hypergradient)
