"""Unrolling from a traced step: equal to the eager one, and never a trace that has gone stale."""

import gc
from collections import Counter

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from bilevel import hypergradient, solve_lower
from bilevel.errors import ProblemError
from bilevel.estimators.unroll import Unroll
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import Adam, RMSprop
from bilevel.unrolling import traced
from tests.unrolling.nets import OPTIMIZERS, Net, X, Y, ask, batch, draw, off


@pytest.fixture(autouse=True)
def _nothing_kept():
    traced._traces.clear()
    yield
    traced._traces.clear()


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_equals_the_eager_steps(optimizer):
    net = Net()
    expected = ask(net, "store", optimizer)
    for _ in range(2):  # with a new trace, then with the kept one
        assert off(ask(net, "traced", optimizer), expected) < 1e-12
    assert off(ask(net, "traced", optimizer, steps=4), expected) > 1e-3  # negative control


def test_the_counts_are_those_of_recompute():
    net = Net()
    stats = [ask(net, memory).stats for memory in ("recompute", "traced", "traced")]
    assert len({(s.gradients, s.hvps, s.cross_products) for s in stats}) == 1


class Calls(TorchDispatchMode):
    """How often an operation is run."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func] += 1
        return func(*args, **(kwargs or {}))


def test_the_dead_products_are_gone():
    net, seen = Net(), {}
    ask(net, "traced", steps=11)
    for memory in ("recompute", "traced"):
        with Calls() as calls:
            ask(net, memory, steps=11)
        seen[memory] = calls.seen[torch.ops.aten.mm.default]
    # one layer: of the products of a step one, ∂loss/∂w itself; the first step is taken both ways
    step = seen["recompute"] - seen["traced"]
    with Calls() as calls:
        ask(net, "recompute", steps=1)
    assert step > 0
    assert step >= 10 - calls.seen[torch.ops.aten.mm.default]


def lightened(function, *inputs):
    """(what it gives, its operations) after `_lighten`."""
    graph = make_fx(function, tracing_mode="fake")(*inputs)
    traced._lighten(graph.graph)
    graph.recompile()
    used = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    return graph(*inputs), Counter(name.removeprefix("aten.") for name in used)


A, B, C = draw(3, 3, seed=10), draw(3, 4, seed=11), draw(4, 3, seed=12)


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b, c: a + b @ c,
        lambda a, b, c: b @ c + a,
        lambda a, b, c: a[:1].expand(3, 3) + b @ c,
        lambda a, b, c: (a + b @ c) + (a @ b) @ c,
        lambda a, b, c: b @ c + a @ a,
        lambda a, b, c: a + (b @ c).detach(),
    ],
)
def test_a_product_is_added_where_it_is_made(function):
    got, used = lightened(function, A, B, C)
    torch.testing.assert_close(got, function(A, B, C), rtol=1e-14, atol=1e-14)
    assert used["addmm.default"] >= 1
    assert used["add.Tensor"] == used["detach.default"] == 0


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b, c: torch.add(a, b @ c, alpha=2),
        lambda a, b, c: (b @ c).add(1.0),
        lambda a, b, c: a.expand(2, 3, 3) + b @ c,  # the sum is larger than the product
        lambda a, b, c: a[0] + b @ c,
        lambda a, b, c: a.float() + b @ c,
        lambda a, b, c: (p := b @ c) * (a + p),  # the product is asked for twice
        lambda a, b, c: a.T + b @ c,  # the sum is column-major, as a.T is
        lambda a, b, c: (p := b @ c, b.add_(1.0), a + p)[2],  # b is written over in between
        lambda a, b, c: (p := a.detach(), p.t_(), a + b @ c)[2],  # p alone is another shape
    ],
)
def test_a_product_is_left_where_its_sum_is_another(function):
    expected = function(A.clone(), B.clone(), C.clone())
    got, used = lightened(function, A.clone(), B.clone(), C.clone())
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)
    assert got.stride() == expected.stride()
    assert used["addmm.default"] == 0


def test_a_closure_that_changed_between_calls_is_seen():
    net = Net()
    before = ask(net, "traced")
    net.decay = 0.31
    expected = ask(net, "recompute")
    assert off(ask(net, "traced"), expected) < 1e-12
    assert off(before, expected) > 1e-4  # negative control: the stale trace is another


def test_and_of_a_loss_that_is_small_in_scale():
    """What agrees is told by size: 1e-14 is nothing beside 1, and all of this loss."""
    net = Net()

    def small(x, y, batch):
        return 1e-14 * net.lower(x, y, batch)

    ask(net, "traced", lower=small)
    net.decay = 0.6
    assert off(ask(net, "traced", lower=small), ask(net, "recompute", lower=small)) < 1e-12


def test_without_the_check_it_would_not_be(monkeypatch):
    net = Net()
    ask(net, "traced")
    net.decay = 0.31
    monkeypatch.setattr(traced, "_agree", lambda got, truth: True)
    assert off(ask(net, "traced"), ask(net, "recompute")) > 1e-4


def test_a_frozen_tensor_that_was_exchanged_is_seen():
    net = Net()
    net.decay = draw(seed=6).abs()
    ask(net, "traced")
    net.decay = 2 * net.decay
    assert off(ask(net, "traced"), ask(net, "recompute")) < 1e-12


def test_two_losses_of_one_shape_have_traces_of_their_own():
    nets = Net(0.3), Net(0.6)
    for net in (*nets, *nets):
        assert off(ask(net, "traced"), ask(net, "recompute")) < 1e-12
    assert len(traced._traces) == 2


def test_a_batch_of_another_shape_and_an_option_in_it_retrace():
    net = Net()

    def scaled(x, y, batch):
        return batch["scale"] * net.lower(x, y, batch)

    for size, scale in ((6, 1.0), (4, 1.0), (4, 2.0), (6, 1.0)):
        given = batch(size) | {"scale": scale}
        got, expected = (
            ask(net, memory, given=given, lower=scaled) for memory in ("traced", "recompute")
        )
        assert off(got, expected) < 1e-12
    assert len(traced._traces) == 3


def test_batches_that_change_from_step_to_step_are_no_constants():
    """The tensors of a batch are inputs of the trace."""
    net, found = Net(), {}
    draws = iter([batch(seed=s) for s in range(20, 25)])
    solved = solve_lower(net.lower, X, Y, solver=Gradient(steps=5), batches=draws, record=True)
    for memory in ("store", "traced"):
        found[memory] = hypergradient(
            net.upper,
            net.lower,
            X,
            solved,
            estimator=Unroll(memory=memory),
            upper_batch=batch(seed=9),
            lower_batch=batch(),
        )
    assert off(found["traced"], found["store"]) < 1e-12


def test_what_is_written_into_a_detached_view_stays_there():
    """Of the first batch that goes back, which the trace is compared on, nothing of it is seen."""
    square = {"w": draw(4, 4, seed=13), "b": Y["b"]}
    inputs, found = draw(6, 4, seed=14), {}

    def lower(x, y, batch):
        other = y["w"].detach().t_()
        seen = batch * (other * (y["w"].sin() * x["decay"]).square()).sum()
        return (inputs @ y["w"] - inputs).square().mean() + 0.1 * seen + y["b"].square().sum()

    batches = [torch.tensor(on, dtype=torch.float64) for on in (1.0, 1.0, 1.0, 0.0)]
    solved = solve_lower(
        lower, X, square, solver=Gradient(steps=4), batches=iter(batches), record=True
    )
    for memory in ("store", "traced"):
        found[memory] = hypergradient(
            lambda x, y, batch: (y["w"] - 1).square().sum(),
            lower,
            {"decay": X["decay"]},
            solved,
            estimator=Unroll(memory=memory),
            lower_batch=batches[0],
        )
    assert off(found["traced"], found["store"]) < 1e-12


@pytest.mark.parametrize(
    "shaped",
    [
        lambda h: h.T.reshape(-1),
        lambda h: h.T.contiguous().view(-1),
        lambda h: (h.T + 1).flatten(),
    ],
)
def test_sums_that_are_not_row_major(shaped):
    net = Net()

    def lower(x, y, batch):
        h = batch["in"][:, :3].T + (y["w"].T @ batch["in"].T).tanh() + y["w"].T @ batch["in"].T
        return shaped(h).square().mean() + net.lower(x, y, batch)

    expected = ask(net, "store", lower=lower)
    for _ in range(2):
        assert off(ask(net, "traced", lower=lower), expected) < 1e-12


@pytest.mark.parametrize("optimizer", [Adam(lr=0.03), RMSprop(lr=0.02)], ids=repr)
def test_a_derivative_that_is_nearly_rounding_is_not_refused(optimizer):
    """Adam's first step is about the sign of the gradient: its derivative is what cancels."""
    net = Net()

    def lower(x, y, batch):
        hidden = (batch["in"] @ y["w"] + y["b"]).tanh()
        return net.lower(x, y, batch) + (hidden @ y["w"].T - batch["in"]).square().mean()

    for steps in (1, 2):
        expected = ask(net, "store", optimizer, lower=lower, steps=steps)
        assert off(ask(net, "traced", optimizer, lower=lower, steps=steps), expected) < 1e-6


def test_a_generator_of_its_own_is_refused():
    """Pure, since it begins anew at each call; in a trace it would go on."""
    net = Net()

    def seeded(x, y, batch):
        noise = torch.randn(3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        return net.lower(x, y, batch) + (noise * y["b"]).sum() ** 2

    with pytest.raises(ProblemError, match=r"random numbers.*memory: recompute"):
        ask(net, "traced", lower=seeded)
    ask(net, "recompute", lower=seeded)  # negative control


def test_a_branch_on_a_tensor_is_refused():
    net = Net()

    def branching(x, y, batch):
        return net.lower(x, y, batch) * (2.0 if y["b"].sum() > 0 else 1.0)

    with pytest.raises(ProblemError, match="memory: recompute"):
        ask(net, "traced", lower=branching)


def test_a_random_loss_is_refused():
    net = Net()

    def random(x, y, batch):
        return net.lower(x, y, batch) * (1 + torch.rand((), dtype=torch.float64))

    with pytest.raises(ProblemError, match="random"):
        ask(net, "traced", lower=random)


def test_an_object_in_a_batch_is_refused():
    net = Net()

    def lower(x, y, batch):
        return net.lower(x, y, batch[0])

    with pytest.raises(ProblemError, match="holds a Net"):
        ask(net, "traced", given=(batch(), net), lower=lower)


def test_one_tensor_under_two_names():
    net, x = Net(), {"weight": X["weight"], "decay": X["decay"]}

    def lower(x, y, batch):
        return net.lower(x, y, batch) + (x["again"] * y["b"]).sum()

    x["again"] = Y["b"]  # an entry of x that is an entry of y
    got, expected = (ask(net, memory, lower=lower, x=x) for memory in ("traced", "recompute"))
    assert off(got, expected) < 1e-12


def test_what_is_kept_is_bounded_and_keeps_no_loss_alive():
    nets = [Net() for _ in range(traced.LIMIT + 3)]  # at once, since an id is used again
    for net in nets:
        ask(net, "traced", steps=1)
    del nets, net
    gc.collect()
    assert len(traced._traces) == traced.LIMIT
    assert not any(owner() for kept in traced._traces.values() for owner in kept.owners)
