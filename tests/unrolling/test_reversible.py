"""SGD with momentum run backwards: bit for bit, equal to the stored path, memory flat in K."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from bilevel import calculus, hypergradient, solve_lower, tree
from bilevel.errors import ProblemError
from bilevel.estimators.unroll import Unroll
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import SGD, Adam
from bilevel.types import Counts, Loss, LowerSolution, Path, Point, Structure
from bilevel.unrolling import reversible
from bilevel.unrolling.reversible import UNIT, Ratio, Reel
from tests.unrolling.nets import Net, X, Y, ask, batch, draw, off

OPTIMIZERS = [
    SGD(lr=0.1, momentum=0.9),
    SGD(lr=0.1, momentum=0.5, weight_decay=0.1),
    SGD(lr=0.1, momentum=1 / 3, dampening=0.3, weight_decay=0.1),
    SGD(lr=0.02, momentum=1.0),
]


# whole numbers ------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(-(2**61), 2**61), min_size=1, max_size=40),
    st.integers(1, 2**30 - 1).flatmap(
        lambda d: st.tuples(st.integers(max(1, math.ceil(d / 256)), d), st.just(d))
    ),
)
def test_a_product_is_the_nearest_and_comes_back(numbers, ratio):
    n, d = ratio
    v = torch.tensor(numbers)
    product, lost = Ratio(n, d).times(v)
    assert product.tolist() == [(2 * a * n + d) // (2 * d) for a in numbers]
    assert Ratio(n, d).back(product, lost).tolist() == numbers


def test_without_the_lost_bits_it_does_not_come_back():
    v = torch.arange(-20, 20)
    product, lost = Ratio(1, 2).times(v)
    assert not torch.equal(Ratio(1, 2).back(product, torch.zeros_like(lost)), v)


def test_a_momentum_is_the_ratio_that_one_reads():
    assert Ratio.near(0.9) == Ratio(9, 10)
    assert Ratio.near(0.5) == Ratio(1, 2)
    assert Ratio.near(1.0) == Ratio(1, 1)
    assert abs(Ratio.near(math.pi / 4).n / Ratio.near(math.pi / 4).d - math.pi / 4) < 2e-16


@pytest.mark.parametrize("momentum", [0.99, 0.9, 0.5])
def test_the_bits_that_are_kept(momentum):
    """2 (1 − β) of a number on average; log2(1 / β), the least there is, is below that."""
    count = 200_000
    generator = torch.Generator().manual_seed(0)
    v = torch.randint(-(2**40), 2**40, (count,), generator=generator)
    _, lost = Ratio.near(momentum).times(v)
    expected = 2 * (1 - momentum)
    spread = math.sqrt(expected * (1 - min(expected, 1)) / count)
    assert 8 * lost.numel() / count == pytest.approx(expected, abs=4 * spread + 8 / count)
    assert expected >= math.log2(1 / momentum)
    assert Ratio.near(momentum).times(torch.zeros_like(v))[1].numel() == (
        count // 8 if momentum == 0.5 else 0
    )


# there and back -----------------------------------------------------------------------------------


def reel(net, optimizer, steps, seen=None):
    def lower(x, y, batch):
        if seen is not None:
            seen.append(tree.clone(y))
        return net.lower(x, y, batch)

    path = Path(optimizer, Y, {}, (batch(),) * steps)
    return Reel(path, Loss(lower, None, Counts(), "lower"), X)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_the_way_back_is_the_way_there_bit_for_bit(optimizer):
    seen, K = [], 300
    run = reel(Net(), optimizer, K, seen)
    run.forwards()
    assert len(list(run.backwards())) == K
    assert len(seen) == 2 * K
    for there, back in zip(seen[:K], reversed(seen[K:]), strict=True):
        assert all(torch.equal(there[name], back[name]) for name in there)
    assert not torch.equal(seen[0]["w"], seen[K - 1]["w"])
    assert run.kept == 0  # every bit was used


@pytest.mark.parametrize(("momentum", "steps"), [(0.9, 1500), (0.5, 120)])
def test_in_floating_point_it_drifts(momentum, steps):
    """Negative control: the same inversion without the bits.

    A step back multiplies volumes in (y, v) by 1 / β a number, and so lengths by 1 / √β on average.
    """
    loss, y = Loss(Net().lower, batch(), Counts(), "lower"), Y
    v = tree.zeros_like(y)
    for _ in range(steps):
        g = calculus.gradient_y(loss, X, y)[1]
        v = tree.axpy(0.1, g, tree.scale(momentum, v))
        y = tree.sub(y, v)
    for _ in range(steps):
        y = tree.add(y, v)
        g = calculus.gradient_y(loss, X, y)[1]
        v = tree.scale(1 / momentum, tree.axpy(-0.1, g, v))
        if not tree.is_finite(y) or tree.norm(y) > 1e6:
            break
    assert not tree.norm(tree.sub(y, Y)) < 1e-6 * tree.norm(Y)


@pytest.mark.parametrize(("momentum", "changed"), [(0.9, 2.0**-40), (1.0, 2.0**-40), (0.9, 1.0)])
def test_a_gradient_that_changes_is_not_believed(momentum, changed):
    net, calls = Net(), []

    def lower(x, y, batch):
        calls.append(None)
        # one evaluation on the way back
        return net.lower(x, y, batch) * (1 + changed * (len(calls) == 35))

    path = Path(SGD(lr=0.1, momentum=momentum), Y, {}, (batch(),) * 20)
    run = Reel(path, Loss(lower, None, Counts(), "lower"), X)
    run.forwards()
    with pytest.raises(ProblemError, match=r"did not come back .*memory: recompute"):
        list(run.backwards())


# the hypergradient --------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_equals_store_to_the_units(optimizer, monkeypatch):
    """The error is proportional to UNIT, and the factor is what a coarse unit shows."""
    net, K = Net(), 20
    expected = ask(net, "store", optimizer, steps=K)
    fine = ask(net, "reversible", optimizer, steps=K)
    coarse = 2.0**-20
    monkeypatch.setattr(reversible, "UNIT", coarse)
    rough = off(ask(net, "reversible", optimizer, steps=K), expected)
    # the roundings are others, so the factor is known but for the luck of K · dim of them
    assert off(fine, expected) <= 10 * rough * UNIT / coarse + 1e-14
    assert rough > 1e-7  # negative control: it is the unit that decides
    assert (fine.stats.gradients, fine.stats.hvps, fine.stats.cross_products) == (2 * K + 1, K, K)
    assert expected.stats.gradients == K + 1
    assert off(ask(net, "reversible", optimizer, steps=K - 1), expected) > 1e-4


def on(path, memory, structure=None, **options):
    net = Net()
    return hypergradient(
        net.upper,
        net.lower,
        X,
        LowerSolution(Y, path=path, structure=structure),
        estimator=Unroll(memory=memory, **options),
        upper_batch=batch(seed=9),
        lower_batch=batch(),
    )


def recorded(start=Y, state=None):
    draws = iter([batch(seed=s) for s in range(20, 40)])
    solver = Gradient(steps=12, optimizer=SGD(lr=0.1, momentum=0.9, dampening=0.2))
    return solve_lower(
        Net().lower, X, start, solver=solver, batches=draws, record=True, state=state
    )


def test_other_batches_a_warm_average_and_the_last_steps():
    warm = recorded()
    path = recorded(warm.y, warm.state).path
    assert path.state
    for last in (None, 5):
        expected, got = (on(path, memory, last=last) for memory in ("store", "reversible"))
        assert off(got, expected) < 1e-11
    assert off(on(recorded(warm.y).path, "reversible"), on(path, "store")) > 1e-3


def test_a_start_that_depends_on_x_and_the_worst_step():
    net = Net()
    x = X | {"start": draw(4, 3, seed=8)}
    solver = Gradient(steps=6, optimizer=SGD(lr=0.1, momentum=0.9))

    def restart(x):
        return {"w": x["start"] * 2, "b": Y["b"]}

    solved = solve_lower(net.lower, x, restart, solver=solver, batch=batch(), record=True)
    found = [
        hypergradient(
            net.upper,
            net.lower,
            x,
            solved,
            estimator=Unroll(memory=memory, pessimistic=pessimistic),
            upper_batch=batch(seed=9),
            lower_batch=batch(),
        )
        for pessimistic in (False, True)
        for memory in ("store", "reversible")
    ]
    assert float(found[0].hypergradient["start"].norm()) > 1e-3
    assert off(found[1], found[0]) < 1e-11
    assert off(found[3], found[2]) < 1e-11


def test_in_float32_it_is_as_near_as_rounding():
    net, single = Net(), torch.float32
    found = [
        hypergradient(
            net.upper,
            net.lower,
            tree.to(X, "cpu", dtype),
            tree.to(Y, "cpu", dtype),
            estimator=Unroll(
                along=Gradient(steps=20, optimizer=SGD(lr=0.1, momentum=0.9)), memory=memory
            ),
            upper_batch=tree.to(batch(seed=9), "cpu", dtype),
            lower_batch=tree.to(batch(), "cpu", dtype),
        )
        for memory, dtype in (("reversible", single), ("store", torch.float64))
    ]
    assert found[0].hypergradient["weight"].dtype == single
    assert off(found[0], found[1]) < 1e-4


# what cannot be run backwards ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "why"),
    [
        (SGD(), "momentum = 0.0"),
        (SGD(momentum=0.003), "momentum = 0.003"),
        (SGD(momentum=1.5), "momentum = 1.5"),
        (SGD(momentum=0.9, nesterov=True), "Nesterov"),
        (Adam(), "Adam is not SGD"),
    ],
)
def test_steps_that_forget_are_refused_with_the_remedy(optimizer, why):
    with pytest.raises(ProblemError, match=rf"{why}.*memory: recompute"):
        ask(Net(), "reversible", optimizer)
    ask(Net(), "recompute", optimizer)  # the remedy


def test_a_projection_is_refused():
    path = Path(SGD(momentum=0.9), Y, {}, (batch(),))
    on(path, "reversible")
    with pytest.raises(ProblemError, match=r"a projection.*memory: recompute"):
        on(path, "reversible", structure=Structure(project=lambda y: y))


def test_a_y_that_its_units_cannot_hold_is_refused():
    far = tree.scale(1e5, Y)
    path = Path(SGD(momentum=0.9), far, {}, (batch(),))
    with pytest.raises(ProblemError, match=r"step 0 has .*memory: recompute"):
        on(path, "reversible")
    path = Path(SGD(lr=1e7, momentum=0.9), Y, {}, (batch(),))
    with pytest.raises(ProblemError, match=r"lower\.optimizer\.lr"):
        on(path, "reversible")


# memory -------------------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """The largest sum of bytes alive at once, of all that is made inside."""

    def __init__(self):
        super().__init__()
        self._alive = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                held = StorageWeakRef(leaf.untyped_storage())
                self._alive.setdefault(held, leaf.untyped_storage().nbytes())
        self._alive = {held: size for held, size in self._alive.items() if not held.expired()}
        self.peak = max(self.peak, sum(self._alive.values()))
        return out


def bytes_of(memory, steps, momentum=0.9):
    """Of K steps on 64 × 64 numbers of eight bytes."""
    x, y = {"s": draw(64, seed=1)}, {"w": draw(64, 64, seed=2)}

    def lower(x, y, batch):
        return (y["w"].sin() * x["s"]).square().mean()

    def upper(x, y, batch):
        return y["w"].square().sum()

    along = Gradient(steps=steps, optimizer=SGD(lr=0.1, momentum=momentum))
    with Live() as live:
        hypergradient(upper, lower, x, y, estimator=Unroll(along=along, memory=memory))
    return live.peak


def test_memory_does_not_grow_with_the_steps_but_for_the_bits():
    entries, more = 64 * 64, 60
    grown = bytes_of("reversible", 20 + more) - bytes_of("reversible", 20)
    # 0.2 bits a number and step at momentum 0.9; a step ends on a whole byte
    assert grown <= more * (1.1 * 0.2 * entries / 8 + 1)
    # negative control: iterates and averages of eight bytes a number
    assert bytes_of("recompute", 20 + more) - bytes_of("recompute", 20) >= more * entries * 8


def test_the_products_are_those_of_the_graph_at_that_point():
    loss = Loss(Net().lower, batch(), Counts(), "lower")
    lower = calculus.linearize(loss, Point(X, Y))
    u = tree.map(torch.cos, Y)
    apart = lower.hvp_yy(u), lower.vjp_xy(u)
    for got, expected in zip(lower.pull(u), apart, strict=True):
        assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert (loss.counts.hvps, loss.counts.cross_products) == (2, 2)
