"""Parts of a region that repeat: cut where they do, alike where one function serves them all."""

from collections import Counter

import pytest
import torch
from torch import fx

from bilevel.replay import repeats
from bilevel.replay.program import Feed, record
from bilevel.replay.repeats import alike, blocks, given
from tests.replay.steps import StandIn, X, compiler


def region_of(step):
    """The operations of a recorded step of X, or a list of tensors of its form, in order."""
    _, program = record(step, X, Feed({}).iterators())
    return [node for node in program.graph.nodes if node.op == "call_function"]


def descent(steps, every=0):
    """Steps of which each `every`-th is kept."""

    def step(x, _):
        a, kept = x.exp(), []
        for k in range(steps):
            x = x - 0.1 * (a * x.sin() + x.tanh() + x * a).cos()
            if every and k % every == 0:
                kept.append(x)
        return [x, *kept]

    return step


def compiled(step):
    """(the regions that a compiler was given, what is found without and with)."""
    found, program = record(step, X, Feed({}).iterators())
    by = StandIn()
    program.compile(compiler(by))
    return by.regions, found, program(X, Feed({}))


def test_a_short_region_stays_whole():
    region = region_of(descent(20))
    assert len(region) <= repeats.WHOLE
    assert list(blocks(region)) == [region]


@pytest.mark.parametrize("steps", [60, 61, 100])
def test_blocks_are_the_region_in_its_order_and_most_are_alike(steps):
    region = region_of(descent(steps))
    parts = list(blocks(region))
    assert [node for part in parts for node in part] == region
    assert max(map(len, parts)) <= repeats.WHOLE
    kinds = Counter(map(alike, parts))
    assert kinds.most_common(1)[0][1] >= steps * 8 // repeats.BLOCK - 2
    assert len(kinds) <= 4


def test_what_is_compiled_does_not_grow_with_the_steps():
    fewer, *_ = compiled(descent(100))
    regions, found, now = compiled(descent(400))
    assert sum(map(len, regions)) <= sum(map(len, fewer)) + repeats.BLOCK
    assert len(regions) <= 4
    assert all(torch.equal(a, b) for a, b in zip(now, found, strict=True))
    assert not torch.equal(found[0], X)


def test_a_region_in_which_nothing_repeats_is_compiled_whole():
    """Negative control: each step takes another number."""

    def step(x, _):
        for k in range(200):
            x = (x * (1 + k / 1000)).sin()
        return x

    regions, found, now = compiled(step)
    assert [len(names) for names in regions] == [400]
    assert torch.equal(found, now)


def test_what_some_steps_alone_keep_is_kept():
    """A result in between, of every step, of one in seven, and of the first."""
    for every in (1, 7, 1000):
        regions, found, now = compiled(descent(120, every))
        assert len(found) == 1 + -(-120 // every)
        assert all(torch.equal(a, b) for a, b in zip(now, found, strict=True))
        assert sum(map(len, regions)) < 400


def test_what_an_early_step_gives_reaches_a_late_one():
    def step(x, _):
        a, before = x.exp(), []
        for _ in range(100):
            before.append(x)
            x = x - 0.1 * (a * x.sin() + before[len(before) // 2] + before[0]).cos()
        return x

    regions, found, now = compiled(step)
    assert torch.equal(found, now)
    assert sum(map(len, regions)) < len(region_of(step))


def test_two_loops_after_each_other():
    def step(x, _):
        for _ in range(80):
            x = x - 0.1 * (x.sin() + x.tanh()).cos()
        x = x.exp()
        for _ in range(90):
            x = (x + x.cos() * 0.5).sin()
        return x

    regions, found, now = compiled(step)
    assert torch.equal(found, now)
    assert sum(map(len, regions)) < 400 < len(region_of(step))


def test_what_gives_several_tensors_is_not_cut_off_from_them(monkeypatch):
    """Wherever in a step the blocks begin, between the two in some."""
    classes, repeated = torch.tensor([0, 2, 1]), repeats._repeated

    def step(x, _):
        for _ in range(120):
            low, at = (x.sin().unsqueeze(0) + x.unsqueeze(1)).min(1)
            x = x - 0.1 * (low + at + torch.nn.functional.cross_entropy(x.outer(x), classes))
        return x

    for shift in range(16):

        def shifted(operations, shift=shift):
            start, period, count = repeated(operations)
            return start + shift, period, max(count - 2, 0)

        monkeypatch.setattr(repeats, "_repeated", shifted)
        regions, found, now = compiled(step)
        assert torch.equal(found, now)
        assert sum(map(len, regions)) < 500
        met = {name for one in regions for name in one}
        assert {"min", "nll_loss_forward.default", "getitem"} <= met


def operations(make):
    """One block: what `make` builds in a graph of two inputs."""
    graph = fx.Graph()
    a, b = (graph.placeholder(name) for name in "ab")
    for node in (a, b):
        node.meta.update(form=((3,), (1,), torch.float64), device="cpu")
    made = make(graph, a, b)
    graph.output(made)
    return [node for node in graph.nodes if node.op == "call_function"]


def calling(*calls):
    def make(graph, a, b):
        made = [a, b]
        for function, places, *more in calls:
            args = (*(made[k] for k in places), *more)
            made.append(graph.call_function(function, args))
        return made[-1]

    return make


ONE = calling((torch.sin, [0]), (torch.mul, [2, 1]), (torch.add, [3], 1))


@pytest.mark.parametrize(
    "other",
    [
        calling((torch.cos, [0]), (torch.mul, [2, 1]), (torch.add, [3], 1)),
        calling((torch.sin, [0]), (torch.mul, [2, 1]), (torch.add, [3], 1.0)),
        calling((torch.sin, [0]), (torch.mul, [2, 1]), (torch.add, [3], 2)),
        calling((torch.sin, [0]), (torch.mul, [2, 0]), (torch.add, [3], 1)),
        calling((torch.sin, [0]), (torch.mul, [1, 2]), (torch.add, [3], 1)),
        calling((torch.sin, [0]), (torch.mul, [2, 1]), (torch.add, [2], 1)),
        calling((torch.sin, [0]), (torch.mul, [2, 1])),
    ],
)
def test_alike(other):
    one, same = operations(ONE), operations(ONE)
    assert alike(one) == alike(same)
    assert [node.name for node in given(one)] == ["a", "b"]
    assert alike(operations(other)) != alike(one)


def test_alike_are_not_those_of_other_shapes_or_dtypes():
    one, *others = (operations(ONE) for _ in range(4))
    forms = [((4,), (1,), torch.float64), ((3,), (2,), torch.float64), ((3,), (1,), torch.float32)]
    for other, form in zip(others, forms, strict=True):
        given(other)[1].meta["form"] = form
        assert alike(other) != alike(one)
