"""A part of x or y that reaches a loss's value and not its gradient is told, and nothing else is."""

import pytest
import torch

from bilevel import hypergradient

A = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0])).double()
T = torch.tensor([0.3, -1.0, 2.0, 0.5]).double()
X = {"x": torch.tensor([1.0, -2.0, 0.5, 3.0]).double()}
Y = {"y": torch.linalg.solve(A, X["x"])}
RIGHT = torch.linalg.solve(A, Y["y"] - T)


def F(x, y, _):
    return (y["y"] - T).square().sum() / 2


def G(x, y, _):
    return y["y"] @ A @ y["y"] / 2 - y["y"] @ x["x"]


def under_no_grad(p):
    with torch.no_grad():
        return p * 1.0


CUTS = {
    "detach": lambda p: p.detach(),
    "torch.detach": torch.detach,
    "data": lambda p: p.data,
    "no_grad": under_no_grad,
    "numpy": lambda p: torch.from_numpy(p.detach().numpy()),
    "item": lambda p: torch.tensor([e.item() for e in p], dtype=torch.float64),
    "float": lambda p: torch.tensor([float(e) for e in p], dtype=torch.float64),
    "tolist": lambda p: torch.tensor(p.tolist(), dtype=torch.float64),
}


def F_of_x(x, y, batch):
    return F(x, y, batch) + x["x"].square().sum()


def with_half(loss, name, cut):
    """The loss at a variable of which one half reaches it through `cut`."""

    def function(x, y, batch):
        given = {"x": x, "y": y}
        p = given[name][name]
        given[name] = {name: p / 2 + cut(p) / 2}
        return loss(given["x"], given["y"], batch)

    return function


def ask(upper, lower, estimator="implicit", **options):
    return hypergradient(upper, lower, X, Y, estimator=estimator, **options)


@pytest.mark.untrusted("y is not where a cut G has its minimum")
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("level", ["upper", "lower"])
@pytest.mark.parametrize("name", ["x", "y"])
def test_half_of_a_variable_that_is_cut_off_is_told(cut, level, name):
    losses = {"upper": F_of_x, "lower": G}
    losses[level] = with_half(losses[level], name, cut)
    found = ask(*losses.values())
    right = RIGHT + 2 * X["x"]
    assert not torch.allclose(found.hypergradient["x"], right, rtol=0.1)
    assert any(f"{level}_loss changes along a direction of {name}" in r for r in found.reasons)
    losses[level] = with_half({"upper": F_of_x, "lower": G}[level], name, torch.clone)
    found = ask(*losses.values())
    torch.testing.assert_close(found.hypergradient["x"], right)
    assert found.trusted


def test_it_is_told_where_both_slopes_are_zero():
    """G = 0 is reached: neither the whole of G nor what is left of it has a slope there."""

    def lower(x, y, _):
        return (y["y"] - x["x"] - x["x"].detach()).square().sum()

    y = {"y": 2 * X["x"]}
    found = hypergradient(F, lower, X, y, estimator="implicit")
    torch.testing.assert_close(2 * found.hypergradient["x"], 2 * (y["y"] - T))  # half of the truth
    assert "part of x reaches its value and not its gradient" in found.reasons[0]


def squared(p):
    """½ pᵀA p with all of its gradient and half of its Hessian."""
    held = p.detach()
    return p @ A @ p / 4 + held @ A @ p / 2 - held @ A @ held / 4


def product(x, y):
    """xᵀy with both gradients and half of the derivative of one in the other."""
    a, b = x.detach(), y.detach()
    return x @ y / 2 + (a @ y + x @ b - a @ b) / 2


SURROGATES = {
    "Hessian": lambda x, y, _: squared(y["y"]) - y["y"] @ x["x"],
    "cross product": lambda x, y, _: y["y"] @ A @ y["y"] / 2 - product(x["x"], y["y"]),
}


@pytest.mark.parametrize("lower", SURROGATES.values(), ids=SURROGATES)
def test_half_of_a_second_derivative_that_is_cut_off_is_told(lower):
    found = ask(F, lower)
    off = (found.hypergradient["x"] - RIGHT).norm() / RIGHT.norm()
    assert off > 0.4
    assert "lower_loss loses part of its second derivative" in found.reasons[0]
    # what takes no second derivative has lost nothing
    assert ask(F, lower, estimator="none").trusted


def largest_out(p):
    """log Σ exp p, the largest taken out as a constant: nothing is lost."""
    most = p.detach().max()
    return most + (p - most).exp().sum().log()


HARMLESS = {
    "largest": lambda x, y, b: G(x, y, b) + 0 * largest_out(y["y"]) + 0 * largest_out(x["x"]),
    "number": lambda x, y, b: G(x, y, b) * torch.ones(1).item(),
    "weights": lambda x, y, b: G(x, y, b) * T.detach().numpy().shape[0] / 4,
    "value": lambda x, y, b: G(x, y, b) + 0 * float(y["y"].sum().detach()),
}


@pytest.mark.parametrize("lower", HARMLESS.values(), ids=HARMLESS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
def test_what_loses_nothing_is_not_told(lower, dtype):
    def upper(x, y, batch):
        return largest_out(y["y"]) + largest_out(2 * x["x"])

    x, y = ({n: p.to(dtype) for n, p in part.items()} for part in (X, Y))
    found = hypergradient(
        upper, lambda x, y, b: lower(_wide(x), _wide(y), b).to(dtype), x, y, estimator="implicit"
    )
    v = torch.linalg.solve(A.to(dtype), torch.softmax(y["y"], 0))
    torch.testing.assert_close(
        found.hypergradient["x"], 2 * torch.softmax(2 * x["x"], 0) + v, rtol=1e-4, atol=1e-6
    )
    assert found.reasons == ()


def _wide(params):
    return {name: entry.double() for name, entry in params.items()}


def test_it_costs_nothing_where_nothing_is_cut_nor_in_later_calls():
    evaluations = []

    def counted(x, y, batch):
        evaluations.append(batch)
        return G(x, y, batch)

    def cut(x, y, batch):
        return counted(x, y, batch) + 0 * x["x"].detach().sum()

    def times(lower, state=None):
        evaluations.clear()
        found = ask(F, lower, state=state)
        assert found.trusted
        return len(evaluations), found.state

    plain, state = times(counted)
    seen, _ = times(cut)
    assert seen > plain
    assert times(cut, state)[0] == times(counted, state)[0] < plain
