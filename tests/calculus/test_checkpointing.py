"""A checkpoint has the derivatives of what it stands for, to any order, and keeps no graph."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from bilevel import rng
from bilevel.calculus import checkpointed
from bilevel.errors import ProblemError
from bilevel.estimators.forward import Forward
from bilevel.estimators.unroll import Unroll
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import SGD
from bilevel.problem.from_modules import Bound
from bilevel.run import engine
from bilevel.run.engine import Setup
from bilevel.run.upper import Upper
from bilevel.types import Params


def layer(w: Tensor, b: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return ((x @ w).tanh() @ w.T + b).sigmoid(), (w**3).sum(0) * b


def inputs(seed: int = 0) -> list[Tensor]:
    stream = torch.Generator().manual_seed(seed)
    shapes = ((3, 3), (3,), (4, 3))
    return [torch.randn(s, generator=stream, dtype=torch.float64).requires_grad_() for s in shapes]


def derivatives(function: Any, at: list[Tensor], order: int) -> list[Tensor]:
    """Gradients of Σ‖∇…‖², `order` deep: what each one is taken of contains the one before."""
    value = sum(out.square().sum() for out in function(*at))
    for _ in range(order):
        found = torch.autograd.grad(value, at, create_graph=True)
        value = sum(g.square().sum() for g in found)
    return [g.detach() for g in found]


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_every_order_is_that_of_the_function(order, seed):
    at = inputs(seed)
    pairs = zip(
        derivatives(checkpointed(layer), at, order), derivatives(layer, at, order), strict=True
    )
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_by_numerical_differences():
    assert torch.autograd.gradcheck(checkpointed(layer), inputs())
    assert torch.autograd.gradgradcheck(checkpointed(layer), inputs())


def test_a_cube_in_closed_form():
    """y³: 3 y², 6 y, 6."""
    y = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    cube = checkpointed(lambda y: y**3)(y)
    expected = (3 * 1.5**2, 6 * 1.5, 6.0)
    for value in expected:
        (cube,) = torch.autograd.grad(cube, y, create_graph=True)
        assert cube.item() == pytest.approx(value, rel=1e-15)


def test_in_one_call_within_another():
    def outer(w: Tensor, b: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        first, _ = checkpointed(layer)(w, b, x)
        return layer(w, b, first)

    at = inputs()
    pairs = zip(derivatives(checkpointed(outer), at, 3), derivatives(outer, at, 3), strict=True)
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_what_is_not_reached_stays_none():
    y, other, index = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True), 1
    out = checkpointed(lambda y, other, index: y[index] ** 2)(y, other, torch.tensor(index))
    at_y, at_other = torch.autograd.grad(out, (y, other), allow_unused=True, create_graph=True)
    assert at_other is None
    assert at_y.tolist() == [0, 2, 0]
    with torch.no_grad():
        assert not checkpointed(torch.sin)(y).requires_grad


def test_an_output_that_is_not_used_is_not_gone_back_through():
    asked = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            return y.clone()

        @staticmethod
        def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
            asked.append(True)
            return cotangents[0]

    y = torch.ones(3, requires_grad=True)
    first, second = checkpointed(lambda y: (y.square(), Watched.apply(y)))(y)
    torch.autograd.grad(first.sum(), y, retain_graph=True)
    assert asked == []
    torch.autograd.grad((first * second).sum(), y)
    assert asked == [True]


class Meter:
    """Bytes that autograd holds: now, and at most."""

    def __init__(self, known: list[Tensor]) -> None:
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.now = self.most = 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda held: held.tensor)

    def pack(self, tensor: Tensor) -> Any:
        return Held(self, tensor)

    def __enter__(self) -> Meter:
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)


class Held:
    def __init__(self, meter: Meter, tensor: Tensor) -> None:
        self.meter, self.tensor = meter, tensor
        new = tensor.untyped_storage().data_ptr() not in meter.known
        self.size = tensor.numel() * tensor.element_size() * new
        meter.now += self.size
        meter.most = max(meter.most, meter.now)

    def __del__(self) -> None:
        self.meter.now -= self.size


def chain(y: Tensor, x: Tensor) -> Tensor:
    for _ in range(20):
        x = (x * y).tanh()
    return x


@pytest.mark.parametrize("second", [False, True])
def test_one_call_is_held_at_a_time(second):
    """Eight calls of twenty steps: without, all are held; with, one."""
    y = torch.full((64,), 0.9, requires_grad=True)
    rows = [torch.full((64,), 0.1 * i) for i in range(8)]

    def most(function: Any) -> tuple[int, int]:
        with Meter([y, *rows]) as meter:
            value = torch.stack([function(y, row).sum() for row in rows]).sum()
            if second:
                (value,) = torch.autograd.grad(value, y, create_graph=True)
            kept = meter.now
            torch.autograd.grad(value.sum(), y)
        return kept, meter.most

    (all_kept, all_most), (kept, at_most) = most(chain), most(checkpointed(chain))
    _, one = most_of_one(y, rows[0], second)
    assert all_kept > 100 * kept
    assert all_most > 6 * at_most
    assert at_most < one + kept + 1024


def most_of_one(y: Tensor, row: Tensor, second: bool) -> tuple[int, int]:
    with Meter([y, row]) as meter:
        value = chain(y, row).sum()
        if second:
            (value,) = torch.autograd.grad(value, y, create_graph=True)
        torch.autograd.grad(value.sum(), y)
    return meter.now, meter.most


def test_frozen_weights_are_closed_over_and_not_kept():
    frozen, y = torch.ones(1000), torch.ones(1000, requires_grad=True)
    with Meter([y]) as meter:
        out = checkpointed(lambda y: y * frozen)(y)
    assert meter.now == 0
    assert torch.equal(torch.autograd.grad(out.sum(), y)[0], frozen)


def test_a_captured_variable_is_refused():
    """Its gradient would be lost: autograd never sees that the output depends on it."""
    y, other = torch.ones(3, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    for function in (lambda y: y * other[0], lambda y: y * other.exp().sum(0)):
        with pytest.raises(ProblemError, match=r"closes over a tensor of shape \(2, 3\)"):
            torch.autograd.grad(checkpointed(function)(y).sum(), y)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # by torch itself
def test_forward_mode_and_transforms_are_refused_by_name():
    y, once = torch.ones(3), checkpointed(torch.sin)
    with (
        forward_ad.dual_level(),
        pytest.raises(ProblemError, match=r"within forward mode.*memory=recompute"),
    ):
        once(forward_ad.make_dual(y, y))
    with pytest.raises(ProblemError, match=r"transform of torch\.func"):
        torch.func.vmap(once)(y)
    with forward_ad.dual_level():
        assert torch.equal(once(y), y.sin())


def test_torchs_own_checkpoint_does_not_serve():
    """With another module's parameters in place for the call alone, and differentiated twice."""
    module = nn.Linear(3, 3, dtype=torch.float64)
    held = {n: torch.randn_like(p).requires_grad_() for n, p in module.named_parameters()}
    x = torch.randn(2, 3, dtype=torch.float64)

    def squared(through: Any) -> list[Tensor]:
        value = through(x).square().sum()
        return list(torch.autograd.grad(value, list(held.values()), create_graph=True))

    def ours(x: Tensor) -> Tensor:
        names = list(held)
        once = checkpointed(
            lambda x, *own: Bound(module, dict(zip(names, own, strict=True)))(x).tanh()
        )
        return once(x, *held.values())

    expected = squared(lambda x: Bound(module, held)(x).tanh())
    for got, wanted in zip(squared(ours), expected, strict=True):
        torch.testing.assert_close(got, wanted)

    class Inside(nn.Module):
        def __init__(self, reentrant: bool) -> None:
            super().__init__()
            self.module, self.reentrant = module, reentrant

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(lambda x: self.module(x).tanh(), x, use_reentrant=self.reentrant)

    inside = {f"module.{name}": value for name, value in held.items()}
    with pytest.raises(RuntimeError):
        squared(lambda x: Bound(Inside(True), inside)(x.requires_grad_()))
    found = squared(lambda x: Bound(Inside(False), inside)(x))
    assert not torch.allclose(found[0], expected[0], rtol=0.1)  # no error, and another gradient


class Rows:
    """G = Σ_rows (tanh(d·y) − 1)² + Σ eˣ y², two rows at a time; F = mean (D y − 1)²."""

    def __init__(self, through: Any) -> None:
        self.through = through
        self.data = torch.randn(6, 3, generator=rng.stream(0, "data"), dtype=torch.float64)

    def init(self, streams: rng.Streams) -> tuple[Params, Params]:
        return {"x": torch.ones(3)}, {"y": torch.ones(3)}

    def upper_loss(self, x: Params, y: Params, batch: None) -> Tensor:
        return (self.data @ y["y"] - 1).square().mean()

    def lower_loss(self, x: Params, y: Params, batch: None) -> Tensor:
        of = self.through(lambda y, d: ((d @ y).tanh() - 1).square())
        fit = torch.cat([of(y["y"], part) for part in self.data.split(2)]).sum()
        return fit + (x["x"].exp() * y["y"].square()).sum()

    def upper_batches(self, stream: torch.Generator) -> Iterator[None]:
        return itertools.repeat(None)

    lower_batches = upper_batches


@pytest.mark.parametrize(
    "estimator",
    [*(Unroll(memory=m) for m in ("store", "recompute", "checkpoint", "traced")), Forward()],
    ids=repr,
)
def test_estimators_see_no_difference(estimator):
    def steps(through: Any) -> Tensor:
        made = Setup(
            problem=Rows(through),
            lower=Gradient(steps=4, optimizer=SGD(lr=0.05)),
            upper=Upper(steps=2, optimizer=SGD(lr=1.0)),
            estimator=estimator,
            dtype=torch.float64,
        )
        state = engine.start(made)
        list(engine.run(made, state))
        return state.x["x"]

    expected = steps(lambda function: function)
    torch.testing.assert_close(steps(checkpointed), expected, rtol=1e-12, atol=0)
    assert float((expected - 1).abs().min()) > 0.01
