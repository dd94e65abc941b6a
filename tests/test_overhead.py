"""What a call of `hypergradient` costs beside its products, in operations and calls, not in time."""

import pytest
import torch

from bilevel import hypergradient, tree
from bilevel.estimators import Implicit
from bilevel.linear import guards
from tests.counting import operations, own_calls

D = 5


def draw(*shape, seed):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


HALF = draw(D, D, seed=0)
A, B, T = HALF @ HALF.T / D + torch.eye(D, dtype=torch.float64), draw(D, D, seed=1), draw(D, seed=2)
X = {"x": draw(D, seed=3)}
Y = {"y": torch.linalg.solve(A, B @ X["x"])}


def upper(x, y, _):
    return 0.5 * (y["y"] - T).square().sum() + 0.05 * x["x"].square().sum()


def lower(x, y, _):
    return 0.5 * y["y"] @ (A @ y["y"]) - y["y"] @ (B @ x["x"])


def by_hand(v):
    """dΦ/dx by conjugate gradient from v as one would write it for this problem; v, and its steps."""
    x, y = X["x"].detach().requires_grad_(), Y["y"].detach().requires_grad_()
    F_x, F_y = torch.autograd.grad(upper({"x": x}, {"y": y}, None), [x, y])
    (G_y,) = torch.autograd.grad(lower({"x": x}, {"y": y}, None), [y], create_graph=True)

    def product(u):
        return torch.autograd.grad(G_y, y, u, retain_graph=True)[0]

    v, r = v.clone(), F_y - product(v)
    p, rr, size, steps = r.clone(), float(r @ r), float(F_y @ F_y), 0
    while rr > 1e-12 * size and steps < 20:
        Ap = product(p)
        alpha = rr / float(p @ Ap)
        v, r = v + alpha * p, r - alpha * Ap
        p, rr = r + float(r @ r) / rr * p, float(r @ r)
        steps += 1
    return F_x - torch.autograd.grad(G_y, x, v)[0], v, steps


def ask(state):
    return hypergradient(upper, lower, X, Y, estimator=Implicit(), state=state)


@pytest.fixture(scope="module")
def states():
    """(that of a solve with its adjoint, one that begins at 0)."""
    solved = ask(None).state
    return solved, {**solved, "past": []}


def test_they_are_the_same_solve(states):
    warm, cold = states
    for state, start in ((warm, warm["past"][-1]["y"]), (cold, torch.zeros_like(T))):
        found = ask(state)
        h, _, steps = by_hand(start)
        torch.testing.assert_close(found.hypergradient["x"], h, rtol=1e-12, atol=1e-14)
        assert found.stats.iterations == steps
    assert steps == D


def fixed_and_each(call, warm, cold):
    """(operations of a solve with no step, what each step adds)."""
    no_step, steps = (sum(operations(lambda s=s: call(s)).values()) for s in (warm, cold))
    return no_step, (steps - no_step) / D


def test_operations_are_those_of_conjugate_gradient_by_hand(states, monkeypatch):
    warm, cold = states
    fixed, each = fixed_and_each(ask, warm, cold)
    hand, each_by_hand = fixed_and_each(by_hand, warm["past"][-1]["y"], torch.zeros_like(T))
    assert fixed - hand <= 26  # detached inputs, evidence, checks of what is finite
    assert each <= 15 < each_by_hand
    assert operations(lambda: ask(warm))["dot"] <= 11

    # control: one norm more in a step would be seen
    looked = guards.is_below_rounding

    def wasteful(left, eps, size, largest, length):
        tree.norm(Y)
        return looked(left, eps, size, largest, length)

    monkeypatch.setattr(guards, "is_below_rounding", wasteful)
    assert fixed_and_each(ask, warm, cold)[1] > 15


def test_calls_within_the_package(states):
    """As many as there are now; a check that is made once and not in every call keeps them so."""
    warm, cold = states
    own = own_calls(lambda: ask(warm))
    assert own <= 278
    assert (own_calls(lambda: ask(cold)) - own) / D <= 25
