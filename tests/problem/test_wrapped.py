"""Modules that others have wrapped for several ranks are refused: their derivatives are those of one."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from bilevel import hypergradient
from bilevel.errors import ProblemError
from bilevel.estimators import OneStep
from tests.ranks import on_ranks

ROWS = torch.linspace(0, 1, 12).reshape(6, 2)


class FSDPModule:
    """What fully_shard mixes into the class of a module, under this name."""


class Sharded(FSDPModule, torch.nn.Linear):
    pass


def ask(module):
    def loss(x, y, batch):
        made = torch.func.functional_call(module, y, (ROWS,))
        return (made - x["x"]).square().mean()

    y = {name: p.detach().clone() for name, p in module.named_parameters()}
    return hypergradient(loss, loss, {"x": torch.ones(1)}, y, estimator=OneStep(lr=0.1))


def test_one_of_fully_shard():
    with pytest.raises(ProblemError, match=r"wrapped by fully_shard, which torch\.autograd\.grad"):
        ask(Sharded(2, 1))


def test_one_within_another():
    with pytest.raises(ProblemError, match=r"wrapped by fully_shard \(1\)"):
        ask(torch.nn.Sequential(torch.nn.Linear(2, 2), Sharded(2, 1)))


def test_one_of_ddp():
    def work(ranks):
        wrapped = DistributedDataParallel(torch.nn.Linear(2, 1))
        with pytest.raises(ProblemError, match="Give the plain module") as caught:
            ask(wrapped)
        ask(wrapped.module)  # the remedy
        return str(caught.value)

    said = on_ranks(2, work)[0]
    assert said.startswith("upper_loss holds a module wrapped by DistributedDataParallel, which")
