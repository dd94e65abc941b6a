"""Every estimator against closed forms, autograd through hand-written loops, and predicted slopes."""

import math
import weakref
from typing import ClassVar

import pytest
import torch

from bilevel import tree
from bilevel.components import component
from bilevel.errors import ProblemError
from bilevel.estimators import unroll
from bilevel.estimators.alternating import Alternating
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.one_step import OneStep
from bilevel.estimators.sama import Sama
from bilevel.estimators.unroll import Unroll
from bilevel.functional import hypergradient, solve_lower
from bilevel.linear.cg import CG
from bilevel.linear.dense import Dense
from bilevel.linear.neumann import Neumann
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import SGD, Adam, AdamW, RMSprop
from bilevel.optimizers.torch_optim import TorchOptimizer
from tests.cases import NAMES, PROBLEMS, assert_close, closed_form, offset, relative

EXACT = [
    Implicit(solver=CG(iterations=3000, tolerance=1e-12)),
    Implicit(solver=Dense()),
    Implicit(solver=Neumann(iterations=60_000, scale=0.2, tolerance=1e-12)),
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("make", PROBLEMS, ids=NAMES)
@pytest.mark.parametrize("estimator", EXACT, ids=["cg", "dense", "neumann"])
def test_agrees_with_the_closed_form(estimator, make, seed):
    case = closed_form(make, seed)
    values = torch.linalg.eigvalsh(case.hessian())
    condition = float(values[-1] / values[0])
    if isinstance(estimator.solver, Neumann) and condition > 1e3:
        pytest.skip("a Neumann series needs as many terms as the condition number")
    estimate = case.estimate(estimator)
    # ‖error‖ ≤ condition · (solver tolerance + rounding), times the size of the cross term
    assert_close(estimate.hypergradient, case.truth, rtol=condition * 1e-11)
    assert estimate.stats.residual <= max(1e-12, condition * 1e-15)


def test_one_cg_step_does_not():
    """Negative control: the check above can fail."""
    case = closed_form(PROBLEMS[0], 0)
    with pytest.raises(AssertionError, match="not close"):
        assert_close(
            case.estimate(Implicit(solver=CG(iterations=1))).hypergradient, case.truth, rtol=1e-7
        )


@pytest.mark.parametrize("make", PROBLEMS[:2], ids=NAMES[:2])
def test_cg_is_exact_in_as_many_products_as_unknowns(make):
    case = closed_form(make, 1)
    m = tree.size(case.y)
    full = case.estimate(Implicit(solver=CG(iterations=4 * m, tolerance=1e-10)))
    assert relative(full.hypergradient, case.truth) < 1e-6
    few = case.estimate(Implicit(solver=CG(iterations=m // 3, tolerance=1e-10)))
    assert relative(few.hypergradient, case.truth) > 1e-4


def test_damping_solves_the_damped_system():
    case = closed_form(PROBLEMS[0], 0)
    damping = 0.3
    got = case.estimate(Implicit(solver=Dense(), damping=damping))
    k, x, y = case.problem.constants, case.x["x"], case.y["y"]
    damped = k["A"] + damping * torch.eye(len(y), dtype=torch.float64)
    v = torch.linalg.solve(damped, y - k["t"] + k["D"] @ x)
    direct = case.problem.rho * (x - k["s"]) + k["D"].T @ y
    assert_close(got.hypergradient, {"x": direct + k["B"].T @ v}, rtol=1e-10)
    assert relative(got.hypergradient, case.truth) > 0.01


def test_error_of_implicit_is_linear_in_the_lower_error():
    """Off the solution by δ the hypergradient of a quadratic is off by O(δ): slope 1."""
    case = closed_form(PROBLEMS[0], 0)
    sizes = [1e-1, 1e-3, 1e-5]
    errors = [
        relative(
            case.estimate(Implicit(solver=Dense()), offset(case.y, d)).hypergradient, case.truth
        )
        for d in sizes
    ]
    slope = math.log(errors[0] / errors[-1]) / math.log(sizes[0] / sizes[-1])
    assert slope == pytest.approx(1.0, abs=0.02)


def test_error_of_neumann_falls_at_the_norm_of_the_iteration():
    case = closed_form(PROBLEMS[0], 0)
    scale = 0.9
    ratio = max(abs(1 - scale * float(v)) for v in torch.linalg.eigvalsh(case.hessian()))
    errors = [
        relative(
            case.estimate(Implicit(solver=Neumann(iterations=k, scale=scale))).hypergradient,
            case.truth,
        )
        for k in (40, 80)
    ]
    assert (errors[1] / errors[0]) ** (1 / 40) == pytest.approx(ratio, rel=5e-3)


# unrolling -------------------------------------------------------------------------------------

OPTIMIZERS = [
    SGD(lr=0.1),
    SGD(lr=0.05, momentum=0.9),
    SGD(lr=0.05, momentum=0.9, nesterov=True),
    Adam(lr=0.1),
    AdamW(lr=0.1, weight_decay=0.2),
    RMSprop(lr=0.05, momentum=0.3),
]


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
        got = case.estimate(Unroll(memory=memory), path=path)
        assert_close(got.hypergradient, by_hand(case, optimizer, start, steps), rtol=1e-12)
        assert got.stats.hvps == steps


def test_unroll_of_one_step_less_is_told_apart():
    """Negative control for the comparison above."""
    case = closed_form(PROBLEMS[0], 0)
    start = offset(case.y, 2.0)
    got = case.estimate(Unroll(), path=case.record(10, 0.1, start).path)
    assert relative(got.hypergradient, by_hand(case, SGD(lr=0.1), start, 11)) > 1e-3


@pytest.mark.parametrize("last", [None, 3])
def test_memory_modes_agree(last):
    case = closed_form(PROBLEMS[1], 0)
    path = case.record(17, 0.5, offset(case.y, 1.0), momentum=0.8).path
    values = [
        case.estimate(Unroll(memory=memory, last=last), path=path)
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
            case.estimate(Unroll(), path=case.record(k, lr, case.y).path).hypergradient, case.truth
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
    whole = case.estimate(Unroll(), path=path).hypergradient
    gaps = [
        relative(case.estimate(Unroll(last=k), path=path).hypergradient, whole) for k in (30, 60)
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
    expected = case.estimate(Unroll(), path=case.record(9, 0.2, start).path)
    assert_close(got.hypergradient, expected.hypergradient, rtol=1e-14)
    assert not Unroll(along=along).needs.path
    bad = Gradient(optimizer=TorchOptimizer(optimizer="Adagrad"))
    with pytest.raises(ProblemError, match="cannot be differentiated"):
        case.estimate(Unroll(along=bad), start)


# one step --------------------------------------------------------------------------------------


def test_one_step_equals_its_formula():
    case = closed_form(PROBLEMS[3], 0)
    k, x, start = case.problem.constants, case.x["x"], offset(case.y, 1.0)
    lr = 0.3
    y = start["y"] - lr * (k["A"] @ start["y"] - k["B"] @ x - k["c"])
    F_x = case.problem.rho * (x - k["s"]) + k["D"].T @ y
    F_y = y - k["t"] + k["D"] @ x
    expected = {"x": F_x + lr * k["B"].T @ F_y}
    for estimator in (OneStep(lr=lr), OneStep(lr=lr, finite_difference=True)):
        got = case.estimate(estimator, start)
        assert_close(got.hypergradient, expected, rtol=1e-9)
    assert relative(case.estimate(OneStep(lr=lr / 2), start).hypergradient, expected) > 1e-3


def test_one_step_is_unrolling_one_step():
    case = closed_form(PROBLEMS[4], 0)
    start = offset(case.y, 0.5)
    path = case.record(1, 0.1, start).path
    assert_close(
        case.estimate(OneStep(lr=0.1), start).hypergradient,
        case.estimate(Unroll(), path=path).hypergradient,
        rtol=1e-12,
    )


def test_finite_differences_agree_to_second_order_in_epsilon():
    """On a lower loss whose cross derivative is not linear in y: slope 2 in ε."""

    def upper(x, y, batch):
        return ((y["y"] - 2) ** 2).sum() + (x["x"] * y["y"]).sum()

    def lower(x, y, batch):
        return (torch.exp(x["x"] * y["y"]) + y["y"] ** 4).sum()

    from bilevel import hypergradient

    x = {"x": torch.tensor([0.3, -0.5], dtype=torch.float64)}
    y = {"y": torch.tensor([0.7, 1.1], dtype=torch.float64)}
    exact = hypergradient(upper, lower, x, y, estimator=OneStep()).hypergradient
    sizes = (1e-1, 1e-2)
    errors = [
        relative(
            hypergradient(
                upper, lower, x, y, estimator=OneStep(finite_difference=True, epsilon=e)
            ).hypergradient,
            exact,
        )
        for e in sizes
    ]
    assert math.log10(errors[0] / errors[1]) == pytest.approx(2.0, abs=0.05)


# no second derivative where none is promised ---------------------------------------------------


class _OnceOnly(torch.autograd.Function):
    """A square whose gradient cannot be differentiated."""

    @staticmethod
    def forward(ctx, value):
        ctx.save_for_backward(value)
        return value**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (value,) = ctx.saved_tensors
        return 2 * value * grad


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
        return _OnceOnly.apply(y["y"] - x["x"]).sum()

    def upper(x, y, batch):
        return _OnceOnly.apply(y["y"] + x["x"]).sum()

    assert estimator.needs.second_order is not first_order
    at = {"x": torch.ones(2)}, {"y": torch.ones(2)}
    if first_order:
        hypergradient(upper, lower, *at, estimator=estimator)
    else:
        with pytest.raises(ProblemError, match="once_differentiable"):
            hypergradient(upper, lower, *at, estimator=estimator)


def test_alternating_is_the_direct_gradient():
    case = closed_form(PROBLEMS[0], 0)
    k, x, y = case.problem.constants, case.x["x"], case.y["y"]
    direct = case.problem.rho * (x - k["s"]) + k["D"].T @ y
    got = case.estimate(Alternating())
    assert_close(got.hypergradient, {"x": direct}, rtol=1e-13)
    assert (got.stats.gradients, got.stats.hvps, got.stats.cross_products) == (1, 0, 0)


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
        case.y,
        estimator=Unroll(memory="recompute"),
        upper_batch=case.upper_batch,
        lower_batch=case.lower_batch,
        path=path,
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
            case.y,
            estimator=Unroll(memory=mode),
            upper_batch=case.upper_batch,
            lower_batch=batch,
            path=path,
        ).hypergradient
        for mode in (memory, "store")
    ]
    assert_close(*found, rtol=1e-12)


@pytest.mark.parametrize("estimator", [OneStep(finite_difference=True), Sama()], ids=repr)
def test_a_difference_along_nothing_is_nothing(estimator):
    """∇y F = 0: there is no direction, and the cross term is zero rather than 0 / 0."""
    case = closed_form(PROBLEMS[0], 0)
    got = hypergradient(
        lambda x, y, batch: x["x"].square().sum() + 0.0 * y["y"].sum(),
        case.problem.lower_loss,
        case.x,
        case.y,
        estimator=estimator,
        lower_batch=case.lower_batch,
        path=case.record(2, 0.1, case.y).path,
    )
    assert torch.equal(got.hypergradient["x"], 2 * case.x["x"])


def test_a_difference_along_a_unit_vector_is_taken():
    """The size 1 is nothing special: F = uᵀy with ‖u‖ = 1."""
    case = closed_form(PROBLEMS[0], 0)
    u = torch.zeros_like(case.y["y"])
    u[1] = 1.0

    def upper(x, y, batch):
        return u @ y["y"] + 0.0 * x["x"].sum()

    exact, differences = (
        hypergradient(
            upper,
            case.problem.lower_loss,
            case.x,
            case.y,
            estimator=OneStep(finite_difference=difference),
            lower_batch=case.lower_batch,
        ).hypergradient
        for difference in (False, True)
    )
    assert tree.norm(exact) > 0
    assert_close(differences, exact, rtol=1e-9)


@pytest.mark.parametrize(
    ("memory", "gradients"), [("store", 10), ("recompute", 19), ("checkpoint", 25), ("traced", 19)]
)
def test_what_unrolling_nine_steps_costs(memory, gradients):
    """9 on the way and 1 of F; 9 more on the way back, and the 6 between the checkpoints kept."""
    case = closed_form(PROBLEMS[0], 0)
    path = case.record(9, 0.3, offset(case.y, 1.0)).path
    got = case.estimate(Unroll(memory=memory), path=path).stats
    assert (got.gradients, got.hvps, got.cross_products) == (gradients, 9, 9)
