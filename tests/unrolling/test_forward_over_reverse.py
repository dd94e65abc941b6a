"""Unrolling with products forward over reverse: those of reverse over reverse, or a refusal."""

import subprocess
import sys

import pytest
import torch
from torch.nn.functional import cross_entropy, layer_norm, scaled_dot_product_attention

from bilevel import hypergradient, solve_lower
from bilevel.errors import ProblemError
from bilevel.estimators.unroll import Unroll
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import SGD, Adam
from bilevel.types import Counts, Loss, Structure
from bilevel.unrolling import forward_over_reverse
from tests.unrolling.nets import OPTIMIZERS, Net, X, Y, ask, batch, draw, off

K = 7


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_equals_store(optimizer):
    net = Net()
    expected = ask(net, "store", optimizer, steps=K)
    got = ask(net, "mixed", optimizer, steps=K)
    assert off(got, expected) < 1e-12
    assert off(ask(net, "mixed", optimizer, steps=K - 1), expected) > 1e-3  # negative control
    gradients = 2 * K + 1 if isinstance(optimizer, SGD) else 3 * K + 1
    stats = got.stats
    assert (stats.gradients, stats.hvps, stats.cross_products) == (gradients, K, K)


@pytest.mark.parametrize("memory", ["mixed", "traced", "recompute", "checkpoint"])
def test_a_start_without_memory_of_its_own_for_each_entry(memory):
    """An expanded tensor: what it is at the start, the steps are not."""
    net, y = Net(), {"w": draw(3, seed=15).expand(4, 3), "b": Y["b"]}
    found = [
        hypergradient(
            net.upper,
            net.lower,
            X,
            y,
            estimator=Unroll(memory=mode, along=Gradient(steps=5, optimizer=SGD(lr=0.1))),
            upper_batch=batch(seed=9),
            lower_batch=batch(),
        )
        for mode in (memory, "store")
    ]
    assert off(*found) < 1e-12


def test_a_step_that_says_it_is_affine_and_is_not_would_be_wrong(monkeypatch):
    """Negative control: Adam needs ∇y G before it is differentiated."""
    expected = ask(Net(), "store", Adam(lr=0.03))
    monkeypatch.setattr(Adam, "affine", True, raising=False)
    assert not off(ask(Net(), "mixed", Adam(lr=0.03)), expected) < 1e-3


@pytest.mark.parametrize("optimizer", [SGD(lr=0.1, momentum=0.5), Adam(lr=0.05)], ids=repr)
@pytest.mark.parametrize("last", [None, 4])
def test_batches_a_projection_and_a_start_that_depends_on_x(optimizer, last):
    net = Net()
    x = X | {"start": draw(4, 3, seed=8)}
    draws = iter([batch(seed=s) for s in range(20, 30)])

    def restart(x):
        return {"w": x["start"] * 2, "b": Y["b"]}

    def lower(x, y, batch):
        return net.lower(x, y, batch) + 0.1 * (x["start"] * y["w"]).sin().sum()

    def project(y):
        return {name: entry.clamp(-0.2, 0.2) for name, entry in y.items()}

    solver = Gradient(steps=10, optimizer=optimizer)
    solved = solve_lower(
        lower,
        x,
        restart,
        solver=solver,
        batches=draws,
        record=True,
        structure=Structure(project=project),
    )
    assert any(float(entry.abs().max()) == 0.2 for entry in solved.y.values())
    found = {
        memory: hypergradient(
            net.upper,
            lower,
            x,
            solved,
            estimator=Unroll(memory=memory, last=last),
            upper_batch=batch(seed=9),
            lower_batch=batch(),
        )
        for memory in ("store", "mixed")
    }
    assert off(found["mixed"], found["store"]) < 1e-12
    gradients = {memory: found[memory].stats.gradients for memory in found}
    steps = last or 10  # with a projection the step is not affine, and ∇y G is needed beforehand
    assert gradients == {"store": 11, "mixed": 10 + 2 * steps + 1}


def test_what_networks_are_made_of():
    """Layer norm, softmax, cross-entropy, attention written out: formulas that torch loads late."""
    x, y = {"weight": draw(6, seed=1)}, {"w": draw(4, 4, seed=3), "out": draw(4, 3, seed=4)}
    inputs, labels = draw(6, 4, seed=5), torch.tensor([0, 1, 2, 0, 1, 2])

    def lower(x, y, batch):
        h = layer_norm(inputs @ y["w"], (4,))
        h = (h @ h.T).softmax(-1) @ h
        each = cross_entropy(h @ y["out"], labels, reduction="none")
        return (x["weight"].sigmoid() * each).mean()

    def upper(x, y, batch):
        return cross_entropy(inputs @ y["w"] @ y["out"], labels)

    found = [
        hypergradient(upper, lower, x, y, estimator=Unroll(along=Gradient(steps=K), memory=memory))
        for memory in ("mixed", "store")
    ]
    assert off(*found) < 1e-12


@pytest.mark.parametrize("stop", ["no_grad", "detach"])
def test_what_the_loss_holds_constant_stays_constant(stop):
    net = Net()

    def lower(x, y, batch):
        if stop == "detach":
            scale = y["w"].detach().square().sum()
        else:
            with torch.no_grad():
                scale = y["w"].square().sum()
        return net.lower(x, y, batch) * (1 + 0.1 * scale)

    assert off(ask(net, "mixed", lower=lower), ask(net, "store", lower=lower)) < 1e-12


def test_without_care_no_grad_is_no_constant(monkeypatch):
    """Negative control of the test above: forward mode looks through no_grad."""
    monkeypatch.setattr(
        forward_over_reverse._Constants,
        "__torch_function__",
        lambda s, f, t, a=(), k=None: f(*a, **(k or {})),
    )
    with pytest.raises(AssertionError):
        test_what_the_loss_holds_constant_stays_constant("no_grad")


class Square(torch.autograd.Function):
    """Twice differentiable in reverse mode, and unknown to forward mode."""

    @staticmethod
    def forward(ctx, value):
        ctx.save_for_backward(value)
        return value.square()

    @staticmethod
    def backward(ctx, grad):
        (value,) = ctx.saved_tensors
        return 2 * value * grad


def attention(value):
    heads = value.reshape(1, 1, *value.shape)
    return scaled_dot_product_attention(heads, heads, heads)


@pytest.mark.parametrize("operation", [Square.apply, attention], ids=["function", "attention"])
def test_what_forward_mode_cannot_do_is_refused_with_the_remedy(operation):
    net = Net()

    def lower(x, y, batch):
        return net.lower(x, y, batch) + operation(y["w"]).mean()

    with pytest.raises(ProblemError, match=r"lower_loss does.*memory: recompute"):
        ask(net, "mixed", lower=lower)
    if operation is Square.apply:
        ask(net, "recompute", lower=lower)  # the remedy


def test_an_error_of_the_loss_itself_is_left_alone():
    def lower(x, y, batch):
        return y["w"] @ y["w"]

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        forward_over_reverse.along(Loss(lower, None, Counts(), "lower"), X, Y, Y)


def test_a_loss_without_second_derivatives_is_refused():
    def linear(x, y, batch):
        return y["w"].sum() + x["decay"]

    with pytest.raises(ProblemError, match="every second derivative would be zero"):
        ask(Net(), "mixed", lower=linear)


def test_which_upper_variables_reach_the_loss_is_noted():
    counts = Counts()
    forward_over_reverse.along(
        Loss(Net().lower, batch(), counts, "lower"), X | {"idle": draw(2)}, Y, Y
    )
    assert counts.reached == {"weight", "decay"}
    assert (counts.gradients, counts.hvps) == (1, 0)


def test_loading_torchs_formulas_raises_no_warning():
    """In a process of its own: they are loaded once."""
    code = """
import warnings
warnings.simplefilter("error")
from bilevel.unrolling.forward_over_reverse import _load
_load()
try:
    warnings.warn("`torch.jit.script` is deprecated", DeprecationWarning)
except DeprecationWarning:
    print("others are still heard")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "others are still heard", done.stderr
