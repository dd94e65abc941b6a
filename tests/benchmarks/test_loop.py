"""What the loop benchmark compares is the same computation."""

import pytest
import torch

from tests.benchmarks import loop


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(loop, "UPPER_STEPS", 5)


def test_both_ways_end_at_the_same_x(short):
    here, by_hand = loop.as_a_run(), loop.by_hand()
    torch.testing.assert_close(here, by_hand, rtol=1e-9, atol=1e-12)
    assert (here - loop.PROBLEM.initial_log_penalty).abs().min() > 1e-3  # x has gone somewhere


def test_another_adjoint_is_seen(short, monkeypatch):
    """Negative control: one iteration less, and they part."""
    here = loop.as_a_run()
    monkeypatch.setattr(loop, "CG_STEPS", loop.CG_STEPS - 1)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(here, loop.by_hand(), rtol=1e-9, atol=1e-12)
