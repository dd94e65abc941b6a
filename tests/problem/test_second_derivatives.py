"""Second derivatives that are lost in a custom function, or are wrong in torch: refused before use."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import bilevel
from bilevel.errors import ProblemError
from bilevel.estimators.fixed_point import FixedPoint
from bilevel.estimators.forward import Forward
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.lancbio import LancBiO
from bilevel.estimators.one_step import OneStep
from bilevel.estimators.penalty import Penalty
from bilevel.estimators.unroll import Unroll
from bilevel.linear.dense import Dense
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import SGD
from bilevel.problem import estimation, second_derivatives
from bilevel.problem.second_derivatives import refuse_missing_second_derivative
from bilevel.run.engine import Setup, run, start
from bilevel.run.upper import Upper
from bilevel.types import Counts, Point
from tests.problem.squares import X, Y, estimate, lower_of, square


class Double(torch.autograd.Function):
    """Linear, so that its backward rightly depends on nothing but what comes in."""

    @staticmethod
    def forward(ctx, a):
        return 2 * a

    @staticmethod
    def backward(ctx, *grads):
        return 2 * grads[0]


class Once(Double):
    """The same, which loses nothing as the last function of a sum, and what follows it otherwise."""

    backward = staticmethod(torch.autograd.function.once_differentiable(Double.backward))


def cut(derivative, once):
    """y ↦ Σ f(y) with the given derivative, and a backward of which torch loses the graph."""

    def backward(ctx, *grads):
        (y,) = ctx.saved_tensors
        return derivative(y if once else y.detach()) * grads[0], None

    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y, value):
            ctx.save_for_backward(y)
            return value.detach().clone()

    kind = torch.autograd.function.once_differentiable(backward) if once else backward
    return type("Cut", (Cut,), {"backward": staticmethod(kind)}).apply


ONCE = cut(lambda y: 2 * y, once=True)
DETACHED = cut(lambda y: 4 * y**3 + 2 * y, once=False)
CUTS = {
    "once_differentiable": lambda x, y, b: ONCE(y["y"], y["y"].square().sum()) + square(x, y, b),
    "detached": lambda x, y, b: (
        DETACHED(y["y"], (y["y"] ** 4 + y["y"] ** 2).sum()) + square(x, y, b)
    ),
}
CUTS["what follows"] = lambda x, y, b: (
    nn.functional.softplus(Once.apply(y["y"])).sum() + 0.1 * square(x, y, b)
)
SECOND = [Implicit(), Unroll(), Unroll(memory="recompute"), Forward(), LancBiO(), FixedPoint()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("loss", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("estimator", SECOND, ids=lambda e: f"{type(e).__name__}")
def test_a_term_without_its_second_derivative_is_refused(estimator, loss, dtype):
    x, y = ({n: p.to(dtype) for n, p in part.items()} for part in (X, Y))
    with pytest.raises(
        ProblemError, match=r"loses part of its second derivative.*(Cut|Once).*penalty"
    ):
        estimate(loss, estimator, y, x)


def test_without_the_check_the_hypergradient_would_be_wrong(monkeypatch):
    """The control: G = y² + (y − x)², dΦ/dx = 1/2, and 1 with the first term's Hessian lost."""
    monkeypatch.setattr(estimation, "refuse_missing_second_derivative", lambda *_: None)
    got = estimate(CUTS["once_differentiable"], Implicit()).hypergradient["x"]
    assert torch.allclose(got, torch.ones_like(got))


def test_the_remedy_is_accepted_and_right():
    class Whole(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            ctx.save_for_backward(y)
            return y.square().sum()

        @staticmethod
        def backward(ctx, *grads):
            return 2 * ctx.saved_tensors[0] * grads[0]

    got = estimate(lambda x, y, b: Whole.apply(y["y"]) + square(x, y, b)).hypergradient["x"]
    assert torch.allclose(got, torch.full_like(got, 0.5))
    first_order = estimate(CUTS["once_differentiable"], Penalty(strength=1e4)).hypergradient["x"]
    assert torch.isfinite(first_order).all()


class Relu(torch.autograd.Function):
    """The same as torch's, as a custom function: its derivative is constant but for the kink."""

    @staticmethod
    def forward(ctx, a):
        ctx.save_for_backward(a)
        return a.clamp(min=0)

    @staticmethod
    def backward(ctx, *grads):
        return (ctx.saved_tensors[0] > 0) * grads[0]


class Rounded(torch.autograd.Function):
    """A straight-through estimator: a gradient that is meant to be none of the value."""

    @staticmethod
    def forward(ctx, a):
        return a.round()

    @staticmethod
    def backward(ctx, *grads):
        return grads[0]


def network(activation, width, data):
    """A perceptron on random data: many kinks within any step, and none of them a fault."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    inputs, targets = draw(data, 5), draw(data)
    y = {"in": draw(5, width), "out": draw(width) / width**0.5}

    def loss(x, y, batch):
        hidden = activation(inputs.to(y["in"]) @ y["in"])
        miss = hidden @ y["out"] - targets.to(y["in"])
        return miss.square().mean() + x["x"].exp().sum() * 1e-2 * y["in"].square().sum()

    return loss, y


def scaled(x, y, batch):
    weights = torch.logspace(0, -6, 3).to(y["y"])
    return 0.5 * (weights * y["y"].square()).sum() + Double.apply(y["y"]) @ x["x"]


def logistic(x, y, batch):
    return nn.functional.softplus(-3 * Double.apply(y["y"])).sum() + square(x, y, batch)


HARMLESS = {
    "relu": network(Relu.apply, 40, 200),
    "relu, wide": network(Relu.apply, 400, 2000),
    "relu² at its kink": (
        lambda x, y, b: (Relu.apply(y["y"]) * y["y"]).sum() + square(x, y, b),
        {"y": torch.zeros(3, dtype=torch.float64)},
    ),
    "abs at its kink": (
        lambda x, y, b: Double.apply(y["y"]).abs().sum() + square(x, y, b),
        {"y": torch.zeros(3, dtype=torch.float64)},
    ),
    "hinge": (lambda x, y, b: Relu.apply(1 - y["y"]).sum() + square(x, y, b), Y),
    "max-pool": (
        lambda x, y, b: (
            nn.functional.max_pool1d(Double.apply(y["y"])[None], 2).square().sum() + square(x, y, b)
        ),
        Y,
    ),
    "straight through": (
        lambda x, y, b: (3 * Rounded.apply(y["y"]) - x["x"]).square().sum(),
        {"y": 10 * Y["y"]},
    ),
    "condition 1e6": (scaled, Y),
    "condition 1e6, far out": (scaled, {"y": 1e6 * Y["y"]}),
    "logistic": (logistic, Y),
    "linear": (lambda x, y, b: Double.apply(y["y"]) @ x["x"], Y),
}


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("loss", "y"), HARMLESS.values(), ids=HARMLESS)
def test_custom_functions_that_lose_nothing_are_accepted(loss, y, dtype, scale):
    x, y = ({n: p.to(dtype) for n, p in part.items()} for part in (X, y))
    if not math.isfinite(float(loss(x, y, None)) * scale):
        pytest.skip("overflows")
    refuse_missing_second_derivative(lower_of(lambda x, y, b: loss(x, y, b) * scale), Point(x, y))


def test_the_check_is_not_counted_and_costs_one_evaluation_without_custom_functions():
    loss = lower_of(square)
    refuse_missing_second_derivative(loss, Point(X, Y))
    assert loss.counts == Counts()
    calls = []

    def counted(x, y, batch):
        calls.append(1)
        return square(x, y, batch)

    refuse_missing_second_derivative(lower_of(counted), Point(X, Y))
    assert len(calls) == 1


# tensors without memory


@pytest.mark.parametrize(
    "estimator", [Implicit(), Implicit(solver=Dense()), *SECOND[1:]], ids=lambda e: repr(e)[:30]
)
@pytest.mark.untrusted("G is not convex there on purpose")
def test_an_entry_seen_through_its_absolute_value_alone(estimator):
    """abs has a second derivative of zeros that torch keeps no memory for."""

    def lower(x, y, batch):
        return 0.5 * (y["y"] - x["x"]).square().sum() + y["kink"].abs().sum()

    y = {"y": X["x"].clone(), "kink": torch.tensor([0.3, -2.0], dtype=torch.float64)}
    solved = bilevel.solve_lower(lower, X, y, solver=Gradient(steps=60), record=True)

    def squares(x, y, batch):
        return 0.5 * y["y"].square().sum()

    got = bilevel.hypergradient(squares, lower, X, solved, estimator=estimator).hypergradient["x"]
    # y* = x, and dΦ/dx = x: the kinked part reaches nothing
    assert torch.allclose(got, X["x"], rtol=3e-3), (got, X["x"])


# the cross product


class Dot(torch.autograd.Function):
    """⟨w, r⟩ with the right gradient, from copies that have no graph."""

    @staticmethod
    def forward(ctx, w, r):
        ctx.kept = w.detach(), r.detach()
        return (w * r).sum()

    @staticmethod
    def backward(ctx, *grads):
        w, r = ctx.kept
        return grads[0] * r, grads[0] * w


class NumpyDot(Dot):
    """The same, computed by numpy both ways."""

    @staticmethod
    def forward(ctx, w, r):
        ctx.kept = w.detach().numpy(), r.detach().numpy()
        return torch.as_tensor(np.dot(*ctx.kept))

    @staticmethod
    def backward(ctx, *grads):
        w, r = ctx.kept
        return torch.as_tensor(grads[0].item() * r), torch.as_tensor(grads[0].item() * w)


class WholeDot(torch.autograd.Function):
    """The same, as it should be written."""

    @staticmethod
    def forward(ctx, w, r):
        ctx.save_for_backward(w, r)
        return (w * r).sum()

    @staticmethod
    def backward(ctx, *grads):
        w, r = ctx.saved_tensors
        return grads[0] * r, grads[0] * w


class HalfDot(WholeDot):
    """∇y is whole, so that ∂y then ∂x is right; ∇x is cut, so that ∂x then ∂y is lost."""

    @staticmethod
    def backward(ctx, *grads):
        w, r = ctx.saved_tensors
        return grads[0] * r.detach(), grads[0] * w


GOAL = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)


def alone(function):
    """G = Σ s (w − b)² at s = 1: y* = 2, ∂yy G = 6, ∂xy G = 2 (2 − b), and with F = y²

    ∇y F = 4, dΦ/ds = −2 (2 − b) · 4 / 6 = (−4/3, 0, 4/3).
    """
    return lambda x, y, batch: function.apply(x["s"], (y["w"] - GOAL) ** 2)


def weighted(function):
    """The same + 3 (w − 2)², whose ∂yy is 6 more: half of that."""

    def lower(x, y, batch):
        return function.apply(x["s"], (y["w"] - GOAL) ** 2) + 3 * (y["w"] - 2) ** 2

    return lower


S, W = {"s": torch.ones_like(GOAL)}, {"w": torch.tensor(2.0, dtype=torch.float64)}
RIGHT = torch.tensor([-4 / 3, 0.0, 4 / 3], dtype=torch.float64)
LOSING = {
    "detached": alone(Dot),
    "detached, one term of two": weighted(Dot),
    "numpy": weighted(NumpyDot),
    "from the other side": weighted(HalfDot),
}


def squares(x, y, batch):
    return y["w"].square().sum()


@pytest.mark.parametrize("loss", LOSING.values(), ids=LOSING)
@pytest.mark.parametrize("estimator", [*SECOND, OneStep()], ids=lambda e: f"{type(e).__name__}")
def test_a_lost_cross_product_is_refused(estimator, loss):
    solved = bilevel.solve_lower(loss, S, W, solver=Gradient(steps=3), record=True)
    with pytest.raises(ProblemError, match=r"loses part of its second derivative.*Dot"):
        bilevel.hypergradient(squares, loss, S, solved, estimator=estimator)


@pytest.mark.parametrize("loss", LOSING.values(), ids=LOSING)
def test_unroll_and_a_run_refuse_it_too(loss):
    with pytest.raises(ProblemError, match=r"loses part of its second derivative.*Dot"):
        bilevel.unroll(loss, S, W, steps=2)

    class Lost:
        def init(self, streams):
            return S, W

        def upper_loss(self, x, y, batch):
            return squares(x, y, batch)

        def lower_loss(self, x, y, batch):
            return loss(x, y, batch)

        def upper_batches(self, stream):
            return itertools.repeat(None)

        lower_batches = upper_batches

    setup = Setup(Lost(), Gradient(steps=3), Upper(steps=2), Implicit(), dtype=torch.float64)
    with pytest.raises(ProblemError, match=r"loses part of its second derivative.*Dot"):
        list(run(setup, start(setup)))


def test_the_same_function_written_whole_is_accepted_and_right():
    for loss, expected in ((alone(WholeDot), RIGHT), (weighted(WholeDot), RIGHT / 2)):
        got = bilevel.hypergradient(squares, loss, S, W, estimator=Implicit()).hypergradient["s"]
        assert torch.allclose(got, expected, rtol=1e-10)


def test_without_the_check_the_cross_product_would_be_lost(monkeypatch):
    """The control: 0, with all evidence green, where (−4/3, 0, 4/3) is right."""
    monkeypatch.setattr(estimation, "refuse_missing_second_derivative", lambda *_: None)
    got = bilevel.hypergradient(squares, alone(Dot), S, W, estimator=Implicit())
    assert not got.hypergradient["s"].any()
    assert got.stats.converged


class Through(torch.autograd.Function):
    """Σ round(s) r, with the gradient in s of Σ s r: straight through the rounding."""

    @staticmethod
    def forward(ctx, s, r):
        ctx.save_for_backward(s, r)
        return (s.round() * r).sum()

    @staticmethod
    def backward(ctx, *grads):
        s, r = ctx.saved_tensors
        return grads[0] * r.detach(), grads[0] * s.round().detach()


def test_a_surrogate_gradient_in_x_is_accepted():
    def lower(x, y, batch):
        return Through.apply(x["s"], (y["w"] - GOAL) ** 2)

    refuse_missing_second_derivative(lower_of(lower), Point({"s": 1.3 * S["s"]}, W))


# torch's own


def normed(v, g, dim):
    """g v / ‖v‖ over all dimensions but `dim`, by hand."""
    others = [d for d in range(v.ndim) if d != dim]
    return g * v / v.norm(dim=others, keepdim=True)


@pytest.mark.parametrize("dim", [0, 1])
def test_weight_norm_of_torch_is_refused_and_the_remedy_is_right(dim):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    v, goal = draw(2, 3), draw(2, 3)
    g = torch.ones(2, 1) if dim == 0 else torch.ones(1, 3)
    g = g.double()

    def lower(weight):
        def loss(x, y, batch):
            w = weight(y["v"], g, dim)
            return (w - goal * x["s"]).square().sum() + 0.1 * (y["v"] - 1).square().sum()

        return loss

    x = {"s": torch.tensor(0.7, dtype=torch.float64)}
    for door in (
        lambda loss: bilevel.hypergradient(total, loss, x, {"v": v}, estimator=Implicit()),
        lambda loss: bilevel.unroll(loss, x, {"v": v}, steps=2),
    ):
        with pytest.raises(ProblemError, match=r"_weight_norm.*wrong in torch.*by hand.*penalty"):
            door(lower(torch._weight_norm))

    leaf = {"s": x["s"].clone().requires_grad_()}
    y = bilevel.unroll(lower(normed), leaf, {"v": v}, steps=4)
    (got,) = torch.autograd.grad(y["v"].sum(), leaf["s"])
    ends = [_steps(lower(torch._weight_norm), x["s"] + h, v) for h in (1e-5, -1e-5)]
    # torch's own first derivatives are right, so that its steps may be differenced
    assert float(got) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)


def _steps(loss, s, v, steps=4, lr=0.1):
    for _ in range(steps):
        v = v.detach().requires_grad_()
        (g,) = torch.autograd.grad(loss({"s": s}, {"v": v}, None), v)
        v = v - lr * g
    return v.sum().item()


def total(x, y, batch):
    return y["v"].sum()


@pytest.mark.parametrize(
    "net",
    [nn.Linear(3, 2), nn.Conv1d(3, 2, 2)],
    ids=["linear", "convolution"],
)
def test_modules_with_weight_norm_are_refused(net):
    net = nn.utils.parametrizations.weight_norm(net.double())
    y = {name: p.detach() for name, p in net.named_parameters()}
    data = torch.ones(4, 3, 3, dtype=torch.float64) if isinstance(net, nn.Conv1d) else GOAL

    def lower(x, y, batch):
        return torch.func.functional_call(net, y, (data,)).square().sum() * x["s"].exp().sum()

    with pytest.raises(ProblemError, match=r"_weight_norm"):
        bilevel.hypergradient(lambda x, y, b: y["bias"].sum(), lower, S, y, estimator=Implicit())
    first = bilevel.hypergradient(
        lambda x, y, b: y["bias"].sum(),
        lower,
        S,
        y,
        estimator=Penalty(lower=Gradient(optimizer=SGD(lr=1e-3))),
    )
    assert torch.isfinite(first.hypergradient["s"]).all()


def test_weight_norm_of_the_whole_tensor_is_right_in_torch_and_accepted():
    def lower(x, y, batch):
        return (torch._weight_norm(y["v"], x["s"].sum(), -1) - 1).square().sum()

    refuse_missing_second_derivative(lower_of(lower), Point(S, {"v": torch.ones(2, 3).double()}))


def test_a_torch_in_which_it_is_mended_is_believed(monkeypatch):
    def lower(x, y, batch):
        return torch._weight_norm(y["v"], S["s"][:2, None], 0).square().sum() * x["s"].sum()

    at = Point(S, {"v": torch.ones(2, 3).double()})
    with pytest.raises(ProblemError, match="weight_norm"):
        refuse_missing_second_derivative(lower_of(lower), at)
    monkeypatch.setattr(second_derivatives, "error_of", lambda name: 1e-10)
    refuse_missing_second_derivative(lower_of(lower), at)
