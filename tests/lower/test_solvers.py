"""Lower solvers reach the closed form, stop where they say, and never claim what they did not do."""

import itertools
import math

import pytest
import torch

from bilevel import tree
from bilevel.errors import ConvergenceError, ProblemError
from bilevel.functional import solve_lower
from bilevel.lower import newton
from bilevel.lower.gradient import Gradient
from bilevel.lower.lbfgs import LBFGS
from bilevel.lower.newton import Newton
from bilevel.optimizers.differentiable import SGD, Adam
from bilevel.optimizers.torch_optim import TorchOptimizer
from bilevel.types import Counts, Loss, Structure
from tests.cases import NAMES, PROBLEMS, closed_form, offset, relative


def solve(case, solver, start=None, **options):
    y = offset(case.y, 3.0) if start is None else start
    return solve_lower(
        case.problem.lower_loss, case.x, y, solver=solver, batch=case.lower_batch, **options
    )


@pytest.mark.parametrize("make", PROBLEMS, ids=NAMES)
@pytest.mark.parametrize(
    ("solver", "rtol"), [(Newton(), 1e-8), (LBFGS(steps=800, history=50, tolerance=1e-7), 1e-2)]
)
def test_reaches_the_closed_form(make, solver, rtol):
    case = closed_form(make, 0)
    assert relative(solve(case, solver).y, case.y) <= rtol
    few = type(solver)(steps=1) if isinstance(solver, LBFGS) else None
    if few and len(tree.flatten(case.y)) > 1:  # control: one step is not enough
        assert relative(solve(case, few).y, case.y) > 1e-4


def test_gradient_descent_contracts_at_its_rate():
    case = closed_form(PROBLEMS[0], 0)
    values = torch.linalg.eigvalsh(case.hessian())
    lr = 0.9
    start = offset(case.y, 5.0)
    rate = max(abs(1 - lr * float(v)) for v in values)
    gaps = [
        tree.norm(tree.sub(solve(case, Gradient(steps=k, optimizer=SGD(lr=lr)), start).y, case.y))
        for k in (40, 60)
    ]
    assert (gaps[1] / gaps[0]) ** (1 / 20) == pytest.approx(rate, rel=1e-3)


def test_early_stopping_stops_at_the_tolerance():
    case = closed_form(PROBLEMS[0], 0)
    solution = solve(case, Gradient(steps=10_000, optimizer=SGD(lr=0.9), tolerance=1e-5))
    stats = solution.stats
    assert stats.converged
    assert stats.gradient_norm <= 1e-5
    assert stats.gradients == stats.steps + 1 < 10_000
    assert solve(case, Gradient(steps=3, tolerance=1e-5)).stats.converged is False


def test_the_state_goes_on():
    """Ten steps and ten more are twenty, momentum and Adam's averages included."""
    case = closed_form(PROBLEMS[0], 0)
    start = offset(case.y, 1.0)
    for optimizer in (SGD(lr=0.1, momentum=0.9), Adam(lr=0.1)):
        ten = Gradient(steps=10, optimizer=optimizer)
        first = solve(case, ten, start)
        second = solve(case, ten, first.y, state=first.state)
        twenty = solve(case, Gradient(steps=20, optimizer=optimizer), start)
        assert torch.equal(tree.flatten(second.y), tree.flatten(twenty.y))
        forgetful = solve(case, ten, first.y)
        assert not torch.equal(tree.flatten(forgetful.y), tree.flatten(twenty.y))


def test_one_batch_a_step_and_the_last_one_returned():
    seen = []

    def lower(x, y, batch):
        seen.append(batch)
        return (y["y"] - batch) ** 2

    y = {"y": torch.zeros((), dtype=torch.float64)}
    solver = Gradient(steps=3)
    solution = solve_lower(lower, {}, y, solver=solver, batches=itertools.count(5), record=True)
    assert seen == [5, 5, 5, 6, 7]  # the first is looked at twice: is the loss a function of it?
    assert solution.batch == 7
    assert solution.path.batches == (5, 6, 7)


@pytest.mark.parametrize("last", [1, 4, 10, math.inf])
def test_a_recorded_path_ends_at_the_solution(last):
    from bilevel.types import Counts, Loss
    from bilevel.unrolling.path import advance

    case = closed_form(PROBLEMS[0], 0)
    solver = Gradient(steps=10, optimizer=Adam(lr=0.1))
    solution = solve(case, solver, record=last)
    path = solution.path
    assert len(path.batches) == min(last, 10)
    loss = Loss(case.problem.lower_loss, None, Counts(), "lower")
    end = advance(path, loss, case.x, len(path.batches)).start
    assert torch.equal(tree.flatten(end), tree.flatten(solution.y))


def test_newton_descends_where_the_hessian_is_indefinite():
    def lower(x, y, batch):
        return (y["y"] ** 4 / 4 - y["y"] ** 2 / 2).sum() + 0.1 * y["y"].sum()

    y = {"y": torch.tensor([0.05, -0.1, 0.3], dtype=torch.float64)}  # curvature −1 around 0
    solution = solve_lower(lower, {}, y, solver=Newton())
    assert solution.stats.converged
    assert float((3 * solution.y["y"] ** 2 - 1).min()) > 0  # minima, not the stationary maximum


@pytest.mark.parametrize("solver", [LBFGS(), Newton()], ids=repr)
def test_what_cannot_project_or_replay_says_so(solver):
    case = closed_form(PROBLEMS[0], 0)
    projected = Structure(project=lambda y: y)
    with pytest.raises(ProblemError, match=r"has project_lower, and \w+ would ignore it.*gradient"):
        solve_lower(None, case.x, case.y, solver=solver, structure=projected)
    with pytest.raises(ProblemError, match="sgd, adam, adamw or rmsprop"):
        solve(case, solver, record=True)


def test_a_projection_is_applied_after_each_step():
    def lower(x, y, batch):
        return ((y["y"] - 3.0) ** 2).sum()

    def below_one(y):
        return tree.map(lambda p: p.clamp(max=1.0), y)

    from bilevel.types import Counts, Loss, Structure

    solution = Gradient(steps=50).solve(
        Loss(lower, None, Counts(), "lower", structure=Structure(project=below_one)),
        {},
        {"y": torch.zeros(2)},
        batches=itertools.repeat(None),
        state={},
    )
    assert torch.equal(solution.y["y"], torch.ones(2))


def test_divergence_is_an_error_and_not_a_nan():
    case = closed_form(PROBLEMS[0], 0)
    with pytest.raises(ConvergenceError, match=r"lower_loss = .*lower.optimizer.lr"):
        solve(case, Gradient(steps=5000, optimizer=SGD(lr=100.0)))


def test_inputs_are_not_touched():
    case = closed_form(PROBLEMS[0], 0)
    start = offset(case.y, 1.0)
    before = tree.clone(start)
    for solver in (Gradient(), LBFGS(), Newton(), Gradient(optimizer=_adagrad())):
        solve(case, solver, start)
        assert torch.equal(tree.flatten(start), tree.flatten(before))
        assert start["y"].grad is None


def _adagrad():
    return TorchOptimizer(optimizer="Adagrad", options={"lr": 0.1})


# what newton, lbfgs and gradient say of themselves ------------------------------------------------


def test_newton_counts_its_steps_and_solves_a_quadratic_in_one():
    case = closed_form(PROBLEMS[0], 0)
    dim = tree.size(case.y)
    stats = solve(case, Newton()).stats
    # at the start, for its scale, and after the step
    assert (stats.steps, stats.gradients, stats.hvps, stats.converged) == (1, 3, dim, True)
    assert solve(case, Newton(), case.y).stats.steps == 0


@pytest.mark.parametrize("condition", [1e6, 1e9, 1e12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_newton_solves_a_positive_definite_quadratic_in_one_step_whatever_its_condition(
    condition, dtype
):
    """Control: what the dtype does not resolve of H is not solved."""
    start = {name: torch.zeros((), dtype=dtype) for name in "ab"}

    def G(x, y, _):
        return (y["a"] - x["s"]).square() / 2 + condition * (y["b"] - 1).square() / 2

    found = solve_lower(G, {"s": torch.tensor(3.0, dtype=dtype)}, start, solver=Newton())
    resolved = condition * 2 * torch.finfo(dtype).eps < 1
    assert found.stats.steps == 1
    assert (abs(float(found.y["a"]) - 3) < 1e-6) is resolved


def test_newton_stops_at_its_budget_and_says_so():
    def lower(x, y, batch):
        return (y["y"] ** 4).sum()

    y = {"y": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    stats = solve_lower(lower, {}, y, solver=Newton(steps=3)).stats
    assert (stats.steps, stats.gradients, stats.hvps, stats.converged) == (3, 5, 6, False)


@pytest.mark.parametrize(("share", "taken"), [(0.95e-4, 0.25), (1.05e-4, 1.0)])
def test_newton_takes_the_first_step_that_falls_by_a_ten_thousandth_of_the_slope(share, taken):
    """G falls by `share` of t · |slope| at t = 1 and 1/2, and by half of it at t = 1/4."""

    def lower(x, y, batch):
        t = float(y["y"])
        fall = {0.25: 0.5, 0.5: share, 1.0: share}[t] * 3.0 * t
        return torch.tensor(5.0 - fall, dtype=torch.float64)

    start = {"y": torch.zeros(1, dtype=torch.float64)}
    direction = {"y": torch.ones(1, dtype=torch.float64)}
    loss = Loss(lower, None, Counts(), "lower")
    y, moved = newton._search(loss, {}, start, direction, value=5.0, slope=-3.0)
    assert moved
    assert float(y["y"]) == taken


def test_newton_works_in_sixteen_bits():
    def lower(x, y, batch):
        return (torch.tensor([1.0, 4.0], dtype=torch.bfloat16) * (y["y"] - 3) ** 2).sum()

    y = {"y": torch.tensor([0.5, -1.0], dtype=torch.bfloat16)}
    found = solve_lower(lower, {}, y, solver=Newton(steps=5)).y["y"]
    assert found.dtype == torch.bfloat16
    assert float((found - 3).abs().max()) <= 3 * torch.finfo(torch.bfloat16).eps


def test_lbfgs_may_take_as_many_iterations_as_it_has_steps():
    """Each is one evaluation or more, and in all 1.25 of them are allowed."""
    case = closed_form(PROBLEMS[1], 0)
    stats = solve(case, LBFGS(steps=40, tolerance=0.0)).stats
    assert 40 <= stats.gradients <= 40 * 5 // 4 + 5 + 25  # 25: one line search may overrun it
    assert 0 < stats.steps <= 40 < stats.gradients


def test_gradient_counts_the_steps_it_took():
    case = closed_form(PROBLEMS[0], 0)
    stats = solve(case, Gradient(steps=7)).stats
    assert (stats.steps, stats.gradients, stats.converged) == (7, 7, None)
    few = solve(case, Gradient(steps=7, tolerance=1e-12)).stats
    assert (few.steps, few.gradients, few.converged) == (7, 7, False)


@pytest.mark.parametrize("seed", range(4))
def test_lbfgs_takes_no_jump_across_a_kink_for_curvature(seed):
    """Steps across it get as short as one likes; a curvature of 1e7 had met any gradient's tolerance."""
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(60, 5, generator=g, dtype=torch.float64)
    t = torch.sign(A.sum(1) + torch.randn(60, generator=g, dtype=torch.float64))

    def G(x, y, _, sharp=True):
        z = 1 - t * (A @ y["w"])
        hinge = z.relu() if sharp else torch.nn.functional.softplus(z)
        return hinge.mean() + 0.05 * y["w"].square().sum()

    x, y = {"s": torch.zeros(1).double()}, {"w": torch.zeros(5, dtype=torch.float64)}

    def solved(sharp):
        return solve_lower(
            lambda x, y, _: G(x, y, _, sharp) + 0 * x["s"].sum(), x, y, solver=LBFGS()
        ).stats

    found = solved(sharp=True)
    assert (found.converged, found.stopped) == (False, "stagnation")
    assert found.gradient_norm > 1e-3
    smooth = solved(sharp=False)
    assert smooth.converged
    assert smooth.gradient_norm < 1e-6
