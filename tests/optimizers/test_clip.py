"""Clipping against its formula, against torch's, and its derivative against differences."""

import math

import pytest
import torch
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from bilevel.optimizers import Clip

G = {
    "a": torch.tensor([[3.0, -0.5], [0.1, 4.0]], dtype=torch.float64),
    "b": torch.tensor(-2.0, dtype=torch.float64),
}
NORM = math.sqrt(9 + 0.25 + 0.01 + 16 + 4)


def of_torch(clip):
    entries = {name: torch.nn.Parameter(torch.zeros_like(entry)) for name, entry in G.items()}
    for name, entry in entries.items():
        entry.grad = G[name].clone()
    if clip.value:
        clip_grad_value_(entries.values(), clip.value)
    if clip.norm:
        clip_grad_norm_(entries.values(), clip.norm)
    return {name: entry.grad for name, entry in entries.items()}


@pytest.mark.parametrize("clip", [Clip(norm=2.0), Clip(value=0.7), Clip(norm=1.1, value=2.9)])
def test_as_torch_does(clip):
    found, truth = clip.apply(G), of_torch(clip)
    for name in G:
        # torch divides by ‖g‖ + 1e-6
        torch.testing.assert_close(found[name], truth[name], rtol=2e-6, atol=0)
        assert not torch.equal(found[name], G[name])


def test_the_formula():
    found = Clip(norm=2.0).apply(G)
    for name in G:
        torch.testing.assert_close(found[name], G[name] * (2 / NORM), rtol=1e-15, atol=0)
    assert Clip(value=1.5).apply(G)["a"].tolist() == [[1.5, -0.5], [0.1, 1.5]]


def test_a_short_gradient_is_left_bit_for_bit():
    found = Clip(norm=NORM * 1.001, value=4.0).apply(G)
    assert all(torch.equal(found[name], G[name]) for name in G)


@pytest.mark.parametrize(
    "clip", [Clip(norm=2.0), Clip(norm=50.0), Clip(value=0.7), Clip(norm=1.1, value=2.9)]
)
def test_its_derivative(clip):
    def clipped(a, b):
        return tuple(clip.apply({"a": a, "b": b}).values())

    inputs = tuple(entry.clone().requires_grad_() for entry in G.values())
    assert torch.autograd.gradcheck(clipped, inputs)


def test_at_zero_it_is_the_identity():
    zero = torch.zeros(3, requires_grad=True)
    out = Clip(norm=1.0).apply({"a": zero})["a"]
    (at,) = torch.autograd.grad(out.sum(), zero)
    assert at.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_float32_neither_overflows_nor_vanishes(size):
    found = Clip(norm=size / 2).apply({"a": torch.tensor([3 * size, -4 * size])})["a"]
    torch.testing.assert_close(found, torch.tensor([0.3 * size, -0.4 * size]), rtol=1e-6, atol=0)


def test_nothing_to_clip():
    assert Clip(norm=1.0).apply({}) == {}
    with pytest.raises(ValueError, match="norm, value, or both"):
        Clip()
