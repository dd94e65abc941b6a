"""Every container that a batch may be, at every door that looks into one."""

from collections import UserDict, namedtuple
from dataclasses import dataclass

import pytest
import torch

from bilevel.estimators.unroll import Unroll
from bilevel.lower.gradient import Gradient
from bilevel.problem.over_tasks import OverTasks
from bilevel.run.engine import Setup, restore, run, start
from bilevel.run.upper import Upper
from bilevel.testing import check_problem
from bilevel.testing.findings import difference

Pair = namedtuple("Pair", "a b")


@dataclass
class Data:
    a: torch.Tensor
    b: torch.Tensor
    scale: float | None = None


class Regression:
    """Ridge regression on batches in a container."""

    def __init__(self, pack, unpack):
        self.pack, self.unpack = pack, unpack

    def init(self, streams):
        return {"log": torch.zeros(())}, {"w": torch.zeros(3)}

    def upper_loss(self, x, y, batch):
        a, b = self.unpack(batch)
        return (a @ y["w"] - b).square().mean()

    def lower_loss(self, x, y, batch):
        return self.upper_loss(x, y, batch) + x["log"].exp() * y["w"].square().sum()

    def upper_batches(self, stream):
        while True:
            a = torch.randn(8, 3, generator=stream)
            yield self.pack(a, a.sum(1) + 0.1)

    lower_batches = upper_batches

    def episodes(self, stream):
        draws = self.upper_batches(stream)
        return zip(draws, draws, strict=True)


CONTAINERS = {
    "tuple": (lambda a, b: (a, b), lambda batch: batch),
    "tuples": (lambda a, b: ((a, b), (a, 2 * b)), lambda batch: batch[0]),
    "named tuple": (Pair, lambda batch: (batch.a, batch.b)),
    "list": (lambda a, b: [a, [b]], lambda batch: (batch[0], batch[1][0])),
    "dict": (lambda a, b: {"a": a, "b": b}, lambda batch: (batch["a"], batch["b"])),
    "mapping": (lambda a, b: UserDict(a=a, b=b), lambda batch: (batch["a"], batch["b"])),
    "dataclass": (Data, lambda batch: (batch.a, batch.b)),
}


@pytest.mark.parametrize(("pack", "unpack"), CONTAINERS.values(), ids=CONTAINERS)
def test_every_container_of_a_batch_is_taken(pack, unpack):
    check_problem(Alone(pack, unpack))


@pytest.mark.parametrize(("pack", "unpack"), CONTAINERS.values(), ids=CONTAINERS)
def test_a_run_of_them_is_that_of_tuples_and_resumes(pack, unpack):
    def setup_of(pack, unpack):
        problem = Alone(pack, unpack)
        unrolled = Unroll(memory="traced")
        return Setup(problem, Gradient(steps=2), Upper(steps=3), unrolled, dtype=torch.float64)

    expected, setup = setup_of(*CONTAINERS["tuple"]), setup_of(pack, unpack)
    first, state = start(expected), start(setup)
    list(run(expected, first))
    list(run(setup, state))
    assert torch.equal(state.x["log"], first.x["log"])
    again = restore(setup, state.save())
    assert not difference(next(again.lower_batches), next(state.lower_batches))


class Alone(Regression):
    """Without tasks."""

    def __getattribute__(self, name):
        if name == "episodes":
            raise AttributeError(name)
        return super().__getattribute__(name)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(
    ("pack", "unpack"),
    CONTAINERS.values(),
    ids=CONTAINERS,
)
def test_tasks_of_them_are_batched(pack, unpack, batched):
    problem = OverTasks(problem=Regression(pack, unpack), num_tasks=3, batched=batched)
    batch = next(problem.upper_batches(torch.Generator().manual_seed(0)))
    assert type(batch) is type(pack(torch.ones(1), torch.ones(1)))
    assert [tuple(part.shape) for part in unpack(batch)] == [(3, 8, 3), (3, 8)]
    y = {"w": torch.randn(3, 3, generator=torch.Generator().manual_seed(1))}
    a, b = unpack(batch)
    expected = (torch.einsum("tij,tj->ti", a, y["w"]) - b).square().mean()
    torch.testing.assert_close(problem.upper_loss({}, y, batch), expected)


def test_a_difference_in_a_container_is_found():
    for pack, _ in CONTAINERS.values():
        a, b = torch.ones(2), torch.zeros(2)
        assert difference(pack(a, b), pack(a, b)) is None
        assert difference(pack(a, b), pack(a, b + 1))
        assert difference(pack(a, b), (a, b, b))
