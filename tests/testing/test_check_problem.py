"""`check_problem` passes what is right and finds each mistake that it says it finds."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch

from bilevel import tree
from bilevel.errors import CheckError
from bilevel.testing import check_problem
from bilevel.testing.cases import ClosedForm, cases
from bilevel_problems.box_qp import BoxQP
from bilevel_problems.hyper_cleaning import HyperCleaning
from bilevel_problems.lasso import Lasso
from bilevel_problems.quadratic import Quadratic
from bilevel_problems.ridge import Ridge
from tests.estimators.shared import OnceOnly

SHIPPED = [
    Quadratic(),
    Quadratic(num_upper=7, num_lower=1),
    Quadratic(num_lower=40, condition=1e4),
    Ridge(),
    Lasso(),
    BoxQP(),
    Ridge(data="synthetic"),
    HyperCleaning(num_train=40, num_clean=30),
    *cases(1).values(),
    ClosedForm(without_y=True),
]


@pytest.mark.parametrize("problem", SHIPPED, ids=repr)
def test_what_is_shipped_passes(problem):
    check_problem(problem)


def complaint(problem, **options):
    with pytest.raises(CheckError) as caught:
        check_problem(problem, **options)
    return str(caught.value)


@dataclass(frozen=True)
class Right(ClosedForm):
    """To be made wrong in one way at a time."""

    is_nonlinear: bool = True


def test_all_that_is_wrong_is_said_at_once():
    class Wrong(Right):
        def lower_solution(self, x):
            return tree.scale(1.01, super().lower_solution(x))

        def evaluate(self, x, y):
            return {"name": "text"}

    said = complaint(Wrong())
    assert said.startswith("Wrong: ")
    assert "lower_solution: lower_solution(x) is not stationary" in said
    assert "evaluate: evaluate must return numbers, got {'name': 'text'}" in said


def test_no_problem_at_all():
    assert "is not a Problem: it lacks init, upper_loss" in complaint(object())


def test_a_wrong_hypergradient():
    class Wrong(Right):
        def hypergradient(self, x):
            return tree.scale(1.001, super().hypergradient(x))

    assert "hypergradient(x) is 1.0e-03 off differences" in complaint(Wrong())


def test_another_start_at_every_call():
    calls = itertools.count(1.0)

    class Wrong(Right):
        def init(self, streams):
            x, y = super().init(streams)
            return x, {"weight": y["weight"] + next(calls), "bias": y["bias"]}

    assert "init: y: ['weight'] differs from one call to the next" in complaint(Wrong())


def test_batches_from_everybodys_stream():
    class Wrong(Right):
        def upper_batches(self, stream):
            while True:
                yield {**self.constants, "t": self.constants["t"] + torch.rand(())}

    said = complaint(Wrong())
    assert "upper_batches are not a function of their stream: [0]['t'] differs" in said
    assert "draws from the global random state" in said


def test_measures_that_draw_are_of_the_seed_and_leave_the_callers_state():
    drawn = []

    class Sampled(Right):
        def evaluate(self, x, y):
            drawn.append(float(torch.rand(())))
            return {"noise": drawn[-1]}

    before = torch.get_rng_state()
    check_problem(Sampled())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    check_problem(Sampled())
    torch.set_rng_state(before)
    assert drawn[0] == drawn[1]


def test_batches_that_lose_their_place():
    class Forgetful:
        def __init__(self, constants):
            self.constants, self.at = constants, 0

        def __iter__(self):
            return self

        def __next__(self):
            self.at += 1
            return {**self.constants, "c": self.constants["c"] * self.at}

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            self.at = 0

    class Wrong(Right):
        def lower_batches(self, stream):
            return Forgetful(self.constants)

    assert "lower_batches do not resume where they were: [0]['c'] differs" in complaint(Wrong())


def test_batches_that_end():
    class Wrong(Right):
        def lower_batches(self, stream):
            return itertools.islice(itertools.repeat(self.constants), 4)

    assert "lower.batches ended after 4 batches" in complaint(Wrong())


def test_a_loss_that_is_another_each_time():
    own = torch.Generator()

    class Wrong(Right):
        def upper_loss(self, x, y, batch):
            noise = torch.rand((), generator=own, dtype=torch.double)
            return super().upper_loss(x, y, batch) * (1 + 1e-9 * noise)

    assert "upper_loss: another value at the same x, y and batch" in complaint(Wrong())

    class Drawing(Right):
        def upper_loss(self, x, y, batch):
            return super().upper_loss(x, y, batch) * torch.rand((), dtype=torch.double)

    assert "upper_loss draws random numbers" in complaint(Drawing())


def test_a_loss_that_writes():
    class Wrong(Right):
        def lower_loss(self, x, y, batch):
            loss = super().lower_loss(x, y, batch)
            with torch.no_grad():
                batch["c"] += 1e-9
            return loss

    assert "lower_loss writes into the batch['c']" in complaint(Wrong())


def test_constants_of_another_dtype():
    class Wrong(Right):
        def upper_loss(self, x, y, batch):
            return super().upper_loss(x, y, batch).float()

        def lower_loss(self, x, y, batch):
            return super().lower_loss(x, y, batch).double()

    said = complaint(Wrong())
    assert "upper_loss is torch.float32 where x, y and the batch are torch.float64" in said
    assert "lower_loss is torch.float64 where x, y and the batch are float32" in said


def test_an_upper_variable_that_reaches_nothing():
    class Wrong(Right):
        def init(self, streams):
            x, y = super().init(streams)
            return {**x, "idle": torch.ones(2, dtype=torch.float64)}, y

        def upper_loss(self, x, y, batch):
            return super().upper_loss({n: v for n, v in x.items() if n != "idle"}, y, batch)

        def lower_loss(self, x, y, batch):
            return super().lower_loss({n: v for n, v in x.items() if n != "idle"}, y, batch)

        lower_solution = hypergradient = None

    assert "wiring: x['idle'] reaches neither loss" in complaint(Wrong())


class _Halved(torch.autograd.Function):
    """A square whose derivative is half of what it should be."""

    @staticmethod
    def forward(ctx, value):
        ctx.save_for_backward(value)
        return value**2

    @staticmethod
    def backward(ctx, grad):
        (value,) = ctx.saved_tensors
        return value * grad


class _Twice(torch.autograd.Function):
    """The identity; its gradient is right, the gradient of that is doubled."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return _Doubling.apply(grad)


class _Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def test_a_gradient_that_is_none_of_the_loss():
    class Wrong(Right):
        def upper_loss(self, x, y, batch):
            return super().upper_loss(x, y, batch) + _Halved.apply(y["bias"])

    assert "∇y of upper_loss is" in complaint(Wrong())


def test_a_second_derivative_that_is_none_of_the_gradient():
    class Wrong(Right):
        def lower_loss(self, x, y, batch):
            return super().lower_loss(x, {n: _Twice.apply(v) for n, v in y.items()}, batch)

    said = complaint(Wrong())
    assert "(∂²xy G)ᵀ v is 1.0e+00 off differences" in said
    assert "∇y of lower_loss" not in said


def test_a_hessian_that_is_not_symmetric():
    class Wrong(Right):
        def lower_loss(self, x, y, batch):
            return super().lower_loss(x, {**y, "weight": _Twice.apply(y["weight"])}, batch)

    assert "∂²yy G is not symmetric" in complaint(Wrong())


def test_no_second_derivative_where_none_is_asked_for():
    class First(Right):
        lower_solution = hypergradient = None

        def lower_loss(self, x, y, batch):
            return OnceOnly.apply(tree.flatten(y) - self._goal(x, batch)).sum()

    check_problem(First(), second_order=False)
    assert "second derivatives: raised" in complaint(First())


def test_projections_that_do_not_rest():
    class Wrong(Right):
        lower_solution = hypergradient = None

        def project_upper(self, x):
            return tree.scale(0.9, x)

        def project_lower(self, y):
            return {"weight": y["weight"]}

    said = complaint(Wrong())
    assert "project_upper moves what it has projected" in said
    assert (
        "projections: Wrong.project_lower must return y as {'weight': (2, 2) float64, 'bias'"
        in said
    )


def test_a_projection_of_another_form():
    class Wrong(Right):
        lower_solution = hypergradient = None
        calls = 0

        def project_upper(self, x):
            return tree.map(lambda p: p.clamp_(-1, 1), x)

    assert "project_upper writes into what it is given" in complaint(Wrong())


def test_a_start_that_is_no_y():
    class Wrong(Right):
        def lower_start(self, x, y):
            return {"weight": y["weight"]}

    assert (
        "lower_start: Wrong.lower_start must return y as {'weight': (2, 2) float64, "
        in complaint(Wrong())
    )
