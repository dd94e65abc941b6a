"""Unrolling against autograd through hand-written loops, and its modes of memory."""

import weakref
from typing import ClassVar

import pytest
import torch

from bilevel import tree
from bilevel.components import component
from bilevel.errors import ProblemError
from bilevel.estimators import unroll
from bilevel.estimators.unroll import Unroll
from bilevel.functional import hypergradient, solve_lower
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import SGD, AdamW, RMSprop
from bilevel.optimizers.torch_optim import TorchOptimizer
from bilevel.types import LowerSolution
from tests.cases import PROBLEMS, assert_close, closed_form, offset, relative
from tests.estimators.shared import OPTIMIZERS


def by_hand(case, optimizer, start, steps):
    """Autograd through a loop written out here, with the update rules spelled out."""
    x = tree.leaves(case.x)
    y = start["y"].clone().requires_grad_()
    m = torch.zeros_like(y)
    s = torch.zeros_like(y)
    for t in range(1, steps + 1):
        loss = case.problem.lower_loss(x, {"y": y}, case.lower_batch)
        (g,) = torch.autograd.grad(loss, y, create_graph=True)
        if isinstance(optimizer, SGD):
            m = g if t == 1 else optimizer.momentum * m + g
            d = g + optimizer.momentum * m if optimizer.nesterov else m
            y = y - optimizer.lr * d
        elif isinstance(optimizer, RMSprop):
            s = optimizer.alpha * s + (1 - optimizer.alpha) * g**2
            m = optimizer.momentum * m + g / (s.sqrt() + optimizer.eps)
            y = y - optimizer.lr * m
        else:
            if isinstance(optimizer, AdamW):
                y = y * (1 - optimizer.lr * optimizer.weight_decay)
            m = optimizer.beta1 * m + (1 - optimizer.beta1) * g
            s = optimizer.beta2 * s + (1 - optimizer.beta2) * g**2
            hat = (s / (1 - optimizer.beta2**t)).sqrt() + optimizer.eps
            y = y - optimizer.lr * m / (1 - optimizer.beta1**t) / hat
    F = case.problem.upper_loss(x, {"y": y}, case.upper_batch)
    return dict(zip(x, torch.autograd.grad(F, list(x.values())), strict=True))


@pytest.mark.parametrize("memory", ["store", "recompute", "checkpoint"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_unroll_equals_autograd_through_a_loop(optimizer, memory):
    case = closed_form(PROBLEMS[0], 0)
    start = offset(case.y, 2.0)
    for steps in (1, 2, 11):
        solution = case.record(steps, 0.1, start)
        path = type(solution.path)(optimizer, start, optimizer.init(start), solution.path.batches)
        got = case.estimate(Unroll(memory=memory), LowerSolution(case.y, path=path))
        assert_close(got.hypergradient, by_hand(case, optimizer, start, steps), rtol=1e-12)
        assert got.stats.hvps == steps


def test_unroll_of_one_step_less_is_told_apart():
    """Negative control for the comparison above."""
    case = closed_form(PROBLEMS[0], 0)
    start = offset(case.y, 2.0)
    got = case.estimate(Unroll(), LowerSolution(case.y, path=case.record(10, 0.1, start).path))
    assert relative(got.hypergradient, by_hand(case, SGD(lr=0.1), start, 11)) > 1e-3


@pytest.mark.parametrize("last", [None, 3])
def test_memory_modes_agree(last):
    case = closed_form(PROBLEMS[1], 0)
    path = case.record(17, 0.5, offset(case.y, 1.0), momentum=0.8).path
    values = [
        case.estimate(Unroll(memory=memory, last=last), LowerSolution(case.y, path=path))
        for memory in ("store", "recompute", "checkpoint")
    ]
    for other in values[1:]:
        assert_close(other.hypergradient, values[0].hypergradient, rtol=1e-12)
        torch.testing.assert_close(other.value, values[0].value, rtol=1e-13, atol=0)


def test_unroll_converges_to_the_hypergradient():
    """With K steps of gradient descent from near y* the error falls at the contraction rate."""
    case = closed_form(PROBLEMS[0], 0)
    lr = 0.9
    rate = max(abs(1 - lr * float(v)) for v in torch.linalg.eigvalsh(case.hessian()))
    errors = [
        relative(
            case.estimate(
                Unroll(), LowerSolution(case.y, path=case.record(k, lr, case.y).path)
            ).hypergradient,
            case.truth,
        )
        for k in (40, 80)
    ]
    assert (errors[1] / errors[0]) ** (1 / 40) == pytest.approx(rate, rel=5e-3)


def test_truncation_error_falls_at_the_contraction_rate():
    """Shaban et al. (2019): the gap between the last K steps and all of them, slope in K."""
    case = closed_form(PROBLEMS[0], 0)
    lr = 0.9
    rate = max(abs(1 - lr * float(v)) for v in torch.linalg.eigvalsh(case.hessian()))
    path = case.record(200, lr, offset(case.y, 1.0)).path
    whole = case.estimate(Unroll(), LowerSolution(case.y, path=path)).hypergradient
    gaps = [
        relative(
            case.estimate(Unroll(last=k), LowerSolution(case.y, path=path)).hypergradient, whole
        )
        for k in (30, 60)
    ]
    assert (gaps[1] / gaps[0]) ** (1 / 30) == pytest.approx(rate, rel=1e-2)


def test_unroll_without_a_path_says_what_to_do():
    case = closed_form(PROBLEMS[0], 0)
    with pytest.raises(ProblemError, match=r"record=True.*along"):
        case.estimate(Unroll())


def test_along_takes_its_own_steps():
    case = closed_form(PROBLEMS[0], 0)
    start = offset(case.y, 1.0)
    along = Gradient(steps=9, optimizer=SGD(lr=0.2))
    got = case.estimate(Unroll(along=along), start)
    expected = case.estimate(Unroll(), LowerSolution(case.y, path=case.record(9, 0.2, start).path))
    assert_close(got.hypergradient, expected.hypergradient, rtol=1e-14)
    assert not Unroll(along=along).needs.path
    bad = Gradient(optimizer=TorchOptimizer(optimizer="Adagrad"))
    with pytest.raises(ProblemError, match="cannot be differentiated"):
        case.estimate(Unroll(along=bad), start)


@pytest.mark.parametrize(("momentum", "held"), [(0.0, 1), (0.9, 2)])
def test_recomputing_keeps_iterates_apart_from_temporaries_and_lets_them_go(
    momentum, held, monkeypatch
):
    """Allocated after the first step, for want of holes between; each is freed once it is used."""
    case = closed_form(PROBLEMS[0], 0)
    path = case.record(8, 0.1, offset(case.y, 1.0), momentum=momentum).path
    events, kept, alive = [], [], []
    empty, back = torch.empty_like, unroll._back

    def lower(x, y, batch):
        events.append("loss")
        return case.problem.lower_loss(x, y, batch)

    def empty_like(entry):
        made = empty(entry)
        kept.append(weakref.ref(made))
        events.append("memory")
        return made

    def counting(*given):
        alive.append(sum(one() is not None for one in kept))
        return back(*given)

    monkeypatch.setattr(torch, "empty_like", empty_like)
    monkeypatch.setattr(unroll, "_back", counting)
    hypergradient(
        case.problem.upper_loss,
        lower,
        case.x,
        LowerSolution(case.y, path=path),
        estimator=Unroll(memory="recompute"),
        upper_batch=case.upper_batch,
        lower_batch=case.lower_batch,
        state={},
    )
    assert events == ["loss", *7 * held * ["memory"], *15 * ["loss"]]
    assert alive == [held * left for left in (7, 6, 5, 4, 3, 2, 1, 0)]  # the first is the path's


@component
class Recent:
    """SGD along the mean of the last three gradients: its state grows."""

    differentiable: ClassVar[bool] = True
    lr: float = 0.05

    def init(self, y):
        return {}

    def step(self, y, gradient, state):
        kept = [*list(state.values())[-2:], gradient]
        d = kept[0]
        for one in kept[1:]:
            d = tree.add(d, one)
        return tree.axpy(-self.lr / len(kept), d, y), {str(k): g for k, g in enumerate(kept)}


@pytest.mark.parametrize("memory", ["recompute", "traced", "checkpoint", "mixed"])
def test_a_state_may_grow_from_step_to_step(memory):
    case = closed_form(PROBLEMS[0], 0)
    lower = case.problem.lower_loss
    solver = Gradient(steps=6, optimizer=Recent())
    start, batch = offset(case.y, 1.0), case.lower_batch
    path = solve_lower(lower, case.x, start, solver=solver, batch=batch, record=True).path
    found = [
        hypergradient(
            case.problem.upper_loss,
            lower,
            case.x,
            LowerSolution(case.y, path=path),
            estimator=Unroll(memory=mode),
            upper_batch=case.upper_batch,
            lower_batch=batch,
        ).hypergradient
        for mode in (memory, "store")
    ]
    assert_close(*found, rtol=1e-12)


@pytest.mark.parametrize(
    ("memory", "gradients"), [("store", 10), ("recompute", 19), ("checkpoint", 25), ("traced", 19)]
)
def test_what_unrolling_nine_steps_costs(memory, gradients):
    """9 on the way and 1 of F; 9 more on the way back, and the 6 between the checkpoints kept."""
    case = closed_form(PROBLEMS[0], 0)
    path = case.record(9, 0.3, offset(case.y, 1.0)).path
    got = case.estimate(Unroll(memory=memory), LowerSolution(case.y, path=path)).stats
    assert (got.gradients, got.hvps, got.cross_products) == (gradients, 9, 9)
