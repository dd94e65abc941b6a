"""Problems from modules: the same hypergradient as with dicts, frozen parts held, nothing written."""

import itertools

import pytest
import torch
from torch import nn

from bilevel import hypergradient, tree
from bilevel.errors import ProblemError
from bilevel.estimators.implicit import Implicit
from bilevel.linear.cg import CG
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import SGD
from bilevel.problem.from_modules import FromModules
from bilevel.rng import Streams
from bilevel.run.engine import Setup, prepare, run, start
from bilevel.run.upper import Upper


class Weigher(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, a):
        return self.net(a).sigmoid()


def fit(upper, lower, batch):
    return ((lower(batch["a"]) - batch["b"]) ** 2).mean()


def weighted(upper, lower, batch):
    errors = (lower(batch["a"]) - batch["b"]) ** 2
    return (upper(batch["a"]) * errors).mean() + 0.1 * (lower.parameters["weight"] ** 2).sum()


def make(dtype=torch.float64):
    torch.manual_seed(0)
    a = torch.randn(40, 2, dtype=dtype)
    data = {"a": a, "b": a.sum(1, keepdim=True) + 1}
    return FromModules(
        Weigher().to(dtype),
        nn.Linear(2, 1, dtype=dtype),
        fit,
        weighted,
        make_upper_batches=lambda stream: itertools.repeat(data),
        make_lower_batches=lambda stream: itertools.repeat(data),
    )


def test_the_hypergradient_equals_that_of_plain_functions():
    problem = make()
    x, y = problem.init(Streams(0))
    batch = next(problem.upper_batches(torch.Generator()))

    def linear(y):
        return batch["a"] @ y["weight"].T + y["bias"]

    def plain_upper(x, y, _):
        return ((linear(y) - batch["b"]) ** 2).mean()

    def plain_lower(x, y, _):
        hidden = torch.tanh(batch["a"] @ x["net.0.weight"].T + x["net.0.bias"])
        weight = torch.sigmoid(hidden @ x["net.2.weight"].T + x["net.2.bias"])
        return (weight * (linear(y) - batch["b"]) ** 2).mean() + 0.1 * (y["weight"] ** 2).sum()

    estimator = Implicit(solver=CG(iterations=50, tolerance=1e-12))
    expected = hypergradient(plain_upper, plain_lower, x, y, estimator=estimator)
    got = hypergradient(
        problem.upper_loss,
        problem.lower_loss,
        x,
        y,
        estimator=estimator,
        upper_batch=batch,
        lower_batch=batch,
    )
    for name in x:
        torch.testing.assert_close(got.hypergradient[name], expected.hypergradient[name])
    assert tree.norm(got.hypergradient) > 1e-6


def test_a_run_writes_nothing_until_store():
    problem = make()
    before = {n: p.detach().clone() for n, p in problem.lower.named_parameters()}
    setup = Setup(
        problem,
        Gradient(steps=5, optimizer=SGD(lr=0.1)),
        Upper(steps=3),
        Implicit(),
        dtype=torch.float64,
    )
    list(prepare(setup))
    state = start(setup)
    list(run(setup, state))
    for name, p in problem.lower.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is None
    problem.store(state.x, state.y)
    assert torch.equal(problem.lower.weight, state.y["weight"])
    assert not torch.equal(problem.lower.weight, before["weight"])


def test_frozen_parameters_are_no_variables():
    problem = make()
    problem.lower.bias.requires_grad_(False)
    _, y = problem.init(Streams(0))
    assert set(y) == {"weight"}
    problem.lower.weight.requires_grad_(False)
    with pytest.raises(ProblemError, match=r"lower module has no trainable.*requires_grad_"):
        problem.init(Streams(0))
