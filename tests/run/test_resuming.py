"""Resuming byte for byte, and batches that cannot be drawn again."""

import itertools
import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from bilevel import tree
from bilevel.errors import CheckpointError
from bilevel.estimators.unroll import Unroll
from bilevel.events import Stepped
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import Adam
from bilevel.optimizers.torch_optim import TorchOptimizer
from bilevel.rng import stream
from bilevel.run.batches import COUNTED, RTOL, Sampler, glimpse
from bilevel.run.engine import restore, run, start
from bilevel_problems.hyper_cleaning import HyperCleaning
from tests.run.setups import Noisy, frozen, same, setup


class Strided(Noisy):
    """y starts as a transposed view; sums over it depend on the order of its memory."""

    def init(self, streams):
        y = torch.randn(31, 30, generator=streams["init"]).T
        return {"log_penalty": torch.zeros(3)}, {"w": y}

    def upper_loss(self, x, y, batch):
        return super().upper_loss(x, {"w": y["w"][:3].sum(1)}, batch) + (y["w"] ** 2).mean()

    def lower_loss(self, x, y, batch):
        return self.upper_loss(x, y, batch) + (x["log_penalty"].exp().sum() * y["w"] ** 2).sum()


RESUMABLE = {
    "quadratic, cg warm start": setup(),
    "hyper-cleaning, float32": setup(
        HyperCleaning(num_train=60, num_clean=40), dtype=torch.float32
    ),
    "shuffled epochs": setup(Noisy(), dtype=torch.float32),
    "unroll, adam below": setup(
        Noisy(), Unroll(), lower=Gradient(steps=4, optimizer=Adam(lr=0.05))
    ),
    "strided memory": setup(Strided(), lower=Gradient(steps=3, optimizer=Adam(lr=0.05))),
    "torch optimizers": setup(
        Noisy(),
        lower=Gradient(steps=3, optimizer=TorchOptimizer(optimizer="Adagrad")),
        optimizer=TorchOptimizer(optimizer="NAdam"),
    ),
}


@pytest.mark.parametrize("s", RESUMABLE.values(), ids=RESUMABLE)
def test_resuming_is_bit_identical(s):
    whole = start(s)
    log = [e for e in run(s, whole) if isinstance(e, Stepped)]
    for stop in (1, 4):
        first = start(s)
        for event in run(s, first):
            if isinstance(event, Stepped) and event.step == stop:
                break
        again = restore(s, frozen(first.save()))
        rest = [e for e in run(s, again) if isinstance(e, Stepped)]
        assert same(again.save(), whole.save())
        assert [e.upper_loss for e in rest] == [e.upper_loss for e in log[stop:]]


@pytest.mark.parametrize("lost", ["estimator", "lower", "upper", "lower_batches"])
def test_every_part_of_the_state_matters(lost):
    """Negative control: forgetting any part is seen."""
    s = setup(Noisy(), lower=Gradient(steps=3, optimizer=Adam(lr=0.05)))
    whole = start(s)
    list(run(s, whole))
    first = start(s)
    for event in run(s, first):
        if isinstance(event, Stepped) and event.step == 3:
            break
    saved = frozen(first.save())
    saved[lost] = start(s).save()[lost]
    again = restore(s, saved)
    list(run(s, again))
    assert not torch.equal(tree.flatten(again.x), tree.flatten(whole.x))


def test_a_sampler_that_cannot_be_repeated_is_refused():
    class Stray(Noisy):
        def lower_batches(self, generator):
            while True:
                torch.randn(int(torch.randint(1, 9, ())), generator=generator)
                yield torch.randn(6, 3, generator=generator)

    s = setup(Stray())
    torch.manual_seed(0)
    state = start(s)
    for event in run(s, state):
        if isinstance(event, Stepped) and event.step == 3:
            break
    with pytest.raises(CheckpointError, match=r"lower.batches cannot be resumed.*state_dict"):
        restore(s, state.save())


def _from_torch(generator):
    while True:
        yield torch.randn(6, 3)


def _from_numpy(generator):
    while True:
        yield {"rows": [np.random.randn(6, 3)], "name": "text"}


def _from_random(generator):
    while True:
        yield (torch.tensor([[random.random() for _ in range(3)] for _ in range(6)]), None)


def _shuffled_by_nobody(generator):
    while True:
        yield from (rows for (rows,) in DataLoader(TensorDataset(DATA), 6, shuffle=True))


def _shuffled_by_the_stream(generator):
    loader = DataLoader(TensorDataset(DATA), 6, shuffle=True, generator=generator)
    while True:
        yield from (rows for (rows,) in loader)


def _in_order(generator):
    """Takes a seed from the global state for workers that it has not, and gives the same batches."""
    while True:
        yield from (rows for (rows,) in DataLoader(TensorDataset(DATA), 6))


DATA = torch.randn(20, 3, generator=stream(0, "data"))


@pytest.mark.parametrize(
    ("make", "repeats"),
    [
        (_from_torch, False),
        (_from_numpy, False),
        (_from_random, False),
        (_shuffled_by_nobody, False),
        (_shuffled_by_the_stream, True),
        (_in_order, True),
    ],
)
def test_batches_from_a_global_random_state_are_not_resumed(make, repeats):
    def sampler(dtype=torch.float32):
        return Sampler(make, 0, "lower.batches", torch.device("cpu"), dtype)

    first = sampler()
    for _ in range(5):
        next(first)
    saved = first.save()
    if not repeats:
        with pytest.raises(CheckpointError, match=r"another batch.*generator=stream"):
            sampler().restore(saved)
        return
    again = sampler()
    again.restore(saved)
    assert same(again.save(), saved)
    for _ in range(5):
        assert torch.equal(next(again), next(first))


def test_a_batch_is_known_again_in_another_dtype():
    """A problem may place its data in the dtype of the run that goes on from a state."""
    batch = {"a": torch.randn(200, 7), "b": [torch.arange(5), 3.5]}
    seen = glimpse(batch)
    assert len(seen) == 64 + 5 + 1
    for dtype in (torch.float64, torch.bfloat16):
        moved = glimpse(tree.to(batch, torch.device("cpu"), dtype))
        assert torch.allclose(moved, seen, rtol=RTOL, atol=0)
    other = {"a": batch["a"].flip(0), "b": batch["b"]}
    assert not torch.allclose(glimpse(other), seen, rtol=RTOL, atol=0)


def test_an_iterator_with_a_position_resumes_by_it():
    class Counting:
        def __init__(self):
            self.at = 0

        def __iter__(self):
            return self

        def __next__(self):
            self.at += 1
            return torch.full((2, 3), 1.0 / self.at)

        def state_dict(self):
            return {"at": self.at}

        def load_state_dict(self, state):
            self.at = state["at"]

    class Positioned(Noisy):
        def lower_batches(self, generator):
            return Counting()

    s = setup(Positioned())
    whole, first = start(s), start(s)
    list(run(s, whole))
    next(itertools.islice(run(s, first), 2, None))
    again = restore(s, frozen(first.save()))
    assert 0 < again.step < 6
    list(run(s, again))
    assert same(again.save(), whole.save())


def numbers(generator):
    while True:
        yield torch.rand(2, generator=generator)


class Counted:
    """An iterator that is resumed by its position."""

    asked = 0

    def __init__(self, generator):
        self.at = {"at": 0}

    def __iter__(self):
        return self

    def __next__(self):
        self.at["at"] += 1
        return torch.tensor([float(self.at["at"])])

    def state_dict(self):
        self.asked += 1
        return self.at  # which it goes on to write into

    def load_state_dict(self, saved):
        self.at = dict(saved)


@pytest.mark.parametrize("make", [numbers, Counted])
def test_where_a_step_began_is_counted_from_a_place_that_is_noted_seldom(make):
    batches = []

    def noted(generator):
        batches.append(make(generator))
        return batches[-1]

    def sampler():
        return Sampler(noted, 0, "lower.batches", torch.device("cpu"), torch.float64)

    plain = [batch for batch, _ in zip(sampler(), range(3 * COUNTED), strict=False)]
    one = sampler()
    for _ in range(2 * COUNTED):
        next(one)
        one.renew()
    if make is Counted:
        assert batches[-1].asked == 3
    for _ in range(2):  # two steps later, and in the middle of the third
        next(one), next(one)
        one.renew()
    next(one)
    one.rewind()
    two = sampler()
    two.restore(one.save())
    assert two.drawn == 2 * COUNTED + 4
    assert torch.equal(next(two), plain[2 * COUNTED + 4])


def test_a_place_is_told_by_what_its_batch_was_then():
    """The iterator writes into one buffer."""

    def buffer(generator):
        one = torch.zeros(2)
        while True:
            yield one.copy_(torch.rand(2, generator=generator))

    def sampler():
        return Sampler(buffer, 0, "lower.batches", torch.device("cpu"), torch.float64)

    one, two = sampler(), sampler()
    for _ in range(COUNTED + 3):
        next(one)
        one.renew()
    expected = next(one).clone()
    one.rewind()
    two.restore(one.save())
    assert torch.equal(next(two), expected)


def test_a_position_that_was_altered_is_refused():
    one = Sampler(numbers, 0, "lower.batches", torch.device("cpu"), torch.float64)
    next(one)
    two = Sampler(numbers, 0, "lower.batches", torch.device("cpu"), torch.float64)
    with pytest.raises(CheckpointError, match="since"):
        two.restore(one.save() | {"since": -1})
