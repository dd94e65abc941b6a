"""Whatever says that it takes no second derivative takes none: every estimator and preset there is."""

import pytest
import torch

from bilevel import registry
from bilevel.errors import ProblemError
from bilevel.estimators.alternating import Alternating
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.one_step import OneStep
from bilevel.estimators.unroll import Unroll
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import SGD
from bilevel.registry import presets
from bilevel.registry.build import build
from bilevel.run.engine import Setup, run, start
from bilevel.run.upper import Upper
from tests.estimators.shared import OnceOnly

NAMES = [*registry.names("estimators"), *presets.of("estimators")]
PEERS = [name for name in NAMES if name.startswith("betty:")]


class Taken(AssertionError):
    """A gradient was recorded, so that it could be differentiated again."""


class _Once(torch.autograd.Function):
    """The identity; its gradient may not be recorded."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        if torch.is_grad_enabled():
            raise Taken
        return gradient


def once(entries):
    return _Once.apply(next(iter(entries.values())))


class Watched:
    """F and G quadratic, y ≤ 1 in its first entry, starting at x: there is something for everyone."""

    def init(self, streams):
        return {"x": torch.tensor([0.5, -1.0, 2.0])}, {"y": torch.tensor([0.2, 0.1, -0.4])}

    def upper_loss(self, x, y, batch):
        return (once(y) - 1).square().sum() + 0.1 * once(x).square().sum()

    def lower_loss(self, x, y, batch):
        return ((once(y) - once(x)).square() * torch.tensor([1.0, 0.5, 0.7])).sum()

    def lower_constraints(self, x, y, batch):
        return {"inequality": once(y)[:1] - 1}

    def project_lower(self, y):
        return {"y": y["y"].clamp(max=1.0)}

    def upper_batches(self, stream):
        while True:
            yield None

    lower_batches = upper_batches


class Free(Watched):
    """The same with nothing that holds y, and a start that depends on x."""

    def lower_start(self, x, y):
        return {"y": 1.0 * x["x"]}

    def __getattribute__(self, name):
        if name in ("lower_constraints", "project_lower"):
            raise AttributeError(name)
        return super().__getattribute__(name)


def taken_by(name, problem):
    """Whether a second derivative is taken in two upper steps."""
    estimator = build("estimators", name)
    setup = Setup(
        problem,
        Gradient(steps=3, optimizer=SGD(lr=0.1)),
        Upper(steps=2),
        estimator,
        dtype=torch.float64,
    )
    try:
        list(run(setup, start(setup)))
    except Taken:
        return True
    return False


def made(name):
    if name in PEERS:
        pytest.importorskip("betty", reason="the peer is not installed")
    return build("estimators", name)


def test_what_says_so_takes_no_second_derivative(subtests):
    """All in one test, since which they are is known only once they are built."""
    first_order = [name for name in NAMES if not made(name).needs.second_order]
    assert len(first_order) >= 15
    for name in first_order:
        with subtests.test(name):
            assert not taken_by(name, Free())


def test_constraints_are_no_exception():
    assert not taken_by("regularised_gap", Watched())


@pytest.mark.parametrize("name", ["implicit", "unroll", "soba", "gradient_gap", "lancbio"])
def test_the_others_are_caught(name):
    """Negative control: the loss does notice."""
    assert made(name).needs.second_order
    assert taken_by(name, Free())


@pytest.mark.parametrize(
    ("estimator", "first_order"),
    [
        (Alternating(), True),
        (OneStep(finite_difference=True), True),
        (OneStep(), False),
        (Implicit(), False),
        (Unroll(along=Gradient(steps=2)), False),
    ],
    ids=repr,
)
def test_first_order_methods_take_no_second_derivative(estimator, first_order):
    from bilevel import hypergradient

    def lower(x, y, batch):
        return OnceOnly.apply(y["y"] - x["x"]).sum()

    def upper(x, y, batch):
        return OnceOnly.apply(y["y"] + x["x"]).sum()

    assert estimator.needs.second_order is not first_order
    at = {"x": torch.ones(2)}, {"y": torch.ones(2)}
    if first_order:
        hypergradient(upper, lower, *at, estimator=estimator)
    else:
        with pytest.raises(ProblemError, match="once_differentiable"):
            hypergradient(upper, lower, *at, estimator=estimator)
