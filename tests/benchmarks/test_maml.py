"""What MAML is compared with computes the same hypergradient; the ratio itself is no test."""

import pytest
import torch

from tests.benchmarks import maml


def test_all_ways_are_of_one_hypergradient(monkeypatch):
    found = {name: call() for name, call in maml.works(3, torch.float64).items()}
    ours = found["a run"]
    assert float(ours["weight1"].norm()) > 0.01
    for name, theirs in found.items():
        for key, value in ours.items():
            torch.testing.assert_close(theirs[key], value, rtol=1e-10, atol=1e-12, msg=name)
    monkeypatch.setattr(maml, "STEPS", 4)  # negative control
    fewer = maml.works(3, torch.float64)
    for name in ("a run", *maml.WAYS):
        with pytest.raises(AssertionError):
            torch.testing.assert_close(fewer[name](), ours, rtol=1e-3, atol=1e-6)


def test_it_measures():
    found = maml.times(2, repetitions=2)
    assert all(len(each) == 2 and min(each) > 0 for each in found.values())
    assert maml.ratio({"a": [1.0, 4.0, 9.0], "b": [1.0, 2.0, 3.0]}, "a", "b") == 2.0
