"""What the loop benchmark compares is the same computation."""

from collections import Counter
from functools import partial

import pytest
import torch

from bilevel import tree
from bilevel.lower import gradient
from tests.benchmarks import loop
from tests.counting import operations, own_calls


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(loop, "UPPER_STEPS", 5)


def test_all_ways_end_at_the_same_x(short):
    here, by_hand = loop.as_a_run(), loop.by_hand()
    assert torch.equal(loop.as_a_run("step"), here)
    torch.testing.assert_close(here, by_hand, rtol=1e-9, atol=1e-12)
    assert (here - loop.PROBLEM.initial_log_penalty).abs().min() > 1e-3  # x has gone somewhere


def test_another_adjoint_is_seen(short, monkeypatch):
    """Negative control: one iteration less, and they part."""
    here = loop.as_a_run()
    monkeypatch.setattr(loop, "CG_STEPS", loop.CG_STEPS - 1)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(here, loop.by_hand(), rtol=1e-9, atol=1e-12)


def each_step(count, way, monkeypatch, first=3, more=4):
    """What `count` finds of an upper step, the fixed part of a run left out."""

    def of(steps):
        monkeypatch.setattr(loop, "UPPER_STEPS", steps)
        found = count(way)
        return found if isinstance(found, int) else sum(found.values())

    return (of(first + more) - of(first)) / more


def test_operations_of_a_step_are_those_by_hand_and_few_more(monkeypatch):
    """18 gradients and 7 products; beside them what is checked to be finite, norms, what is left of y, and the events'."""
    assert loop.PROBLEM.splits  # made once, and not within what is counted
    by_hand = each_step(operations, loop.by_hand, monkeypatch)
    here = each_step(operations, loop.as_a_run, monkeypatch)
    assert by_hand == 522
    assert here - by_hand <= 79


def test_calls_within_the_package_of_a_step(monkeypatch):
    """As many as there are now, 10 lower steps and 6 products: a check made once is not made again."""
    assert each_step(own_calls, loop.as_a_run, monkeypatch) <= 787

    # control: one tree.norm more in a lower step is seen
    look = gradient._look

    def wasteful(loss, x, y, *rest):
        tree.norm(y)
        return look(loss, x, y, *rest)

    monkeypatch.setattr(gradient, "_look", wasteful)
    assert each_step(own_calls, loop.as_a_run, monkeypatch) > 787


def test_operations_of_a_replay_are_fewer_than_by_hand(monkeypatch):
    """What the products of one point have in common is computed once; of Python, what checks a step."""
    replayed = partial(loop.as_a_run, "step")
    assert each_step(operations, replayed, monkeypatch, first=5) <= 420 < 522
    assert each_step(own_calls, replayed, monkeypatch, first=5) <= 330 < 787


def test_a_step_evaluates_each_loss_as_often_as_it_must(monkeypatch):
    """F once; G for 10 lower steps and the graph of the products. G of this problem calls F."""
    seen, kind = Counter(), type(loop.PROBLEM)
    for name in ("upper_loss", "lower_loss"):
        plain = getattr(kind, name)

        def counted(self, *given, name=name, plain=plain):
            seen[name] += 1
            return plain(self, *given)

        monkeypatch.setattr(kind, name, counted)

    def evaluations(way):
        seen.clear()
        way()
        return Counter(seen)

    lower = loop.LOWER_STEPS + 1
    assert each_step(evaluations, loop.as_a_run, monkeypatch) == lower + (1 + lower)
