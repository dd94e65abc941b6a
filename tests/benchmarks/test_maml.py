"""What MAML is compared with computes the same hypergradient; the ratio itself is no test."""

import pytest
import torch

from tests.benchmarks import maml


def test_all_ways_are_of_one_hypergradient(monkeypatch):
    found = {name: call() for name, call in maml.works(3, torch.float64).items()}
    ours = found["bilevel"]
    assert float(ours["weight1"].norm()) > 0.01
    for name in maml.WAYS:
        for key, value in ours.items():
            torch.testing.assert_close(found[name][key], value, rtol=1e-10, atol=1e-12)
    monkeypatch.setattr(maml, "STEPS", 4)  # negative control
    fewer = maml.works(3, torch.float64)
    for name in maml.WAYS:
        with pytest.raises(AssertionError):
            torch.testing.assert_close(fewer[name](), ours, rtol=1e-3, atol=1e-6)


def test_it_measures():
    assert min(maml.times(2, repetitions=1).values()) > 0
