"""Names that share memory are one variable, or are refused."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

import bilevel
from bilevel.errors import ProblemError
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.value_gap import ValueGap
from bilevel.linear.cg import CG
from bilevel.linear.dense import Dense
from bilevel.lower.gradient import Gradient
from bilevel.lower.newton import Newton
from bilevel.optimizers.differentiable import SGD
from bilevel.problem.tied import Ties
from tests.cases import PROBLEMS, assert_close, closed_form, relative
from tests.points import halves, product


@pytest.mark.parametrize("make", PROBLEMS[:1] + PROBLEMS[4:5], ids=["quadratic", "diabetes"])
@pytest.mark.untrusted("G is not convex there on purpose")
def test_tied_lower_parameters_are_one_variable(make):
    """The same y under two names; a term that cancels only because they are one."""
    case = closed_form(make, 0)
    (name,) = case.y
    both = {"first": case.y[name], "second": case.y[name]}

    def tie(function):
        def tied(x, y, batch):
            halves = (function(x, {name: y[key]}, batch) / 2 for key in ("first", "second"))
            return sum(halves) + (y["first"] * y["second"] - y["first"] ** 2).sum() / 9

        return tied

    options = {"upper_batch": case.upper_batch, "lower_batch": case.lower_batch}
    up, low = tie(case.problem.upper_loss), tie(case.problem.lower_loss)
    solver = CG(iterations=500, tolerance=1e-12)
    got = bilevel.hypergradient(up, low, case.x, both, estimator=Implicit(solver=solver), **options)
    assert_close(got.hypergradient, case.truth, rtol=1e-7)
    apart = {"first": case.y[name], "second": case.y[name].clone()}  # control: two variables
    untied = bilevel.hypergradient(
        up, low, case.x, apart, estimator=Implicit(solver=solver), **options
    )
    assert relative(untied.hypergradient, case.truth) > 1e-3
    solved = bilevel.solve_lower(low, case.x, both, solver=Newton(), batch=case.lower_batch)
    assert solved.y["first"] is solved.y["second"]
    assert relative({name: solved.y["first"]}, case.y) < 1e-8


def test_one_memory_under_two_names_is_one_variable():
    """As from state_dict(), which makes a tensor of its own for every name of a tied weight."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
            self.b = self.a

    tied = Net().state_dict()
    assert tied["a"] is not tied["b"]
    x = {"x": torch.tensor([0.6, 1.3], dtype=torch.float64)}
    y = bilevel.solve_lower(halves, x, tied, solver=Newton()).y
    assert y["a"] is y["b"]
    # y* = 3x/2, Φ = ‖y*‖²
    got = bilevel.hypergradient(product, halves, x, tied | y, estimator=Implicit())
    assert_close(got.hypergradient, {"x": 4.5 * x["x"]}, rtol=1e-9)
    apart = {name: entry.clone() for name, entry in tied.items()}  # control: two variables
    y = bilevel.solve_lower(halves, x, apart, solver=Newton()).y
    assert_close(y, {"a": x["x"], "b": 2 * x["x"]}, rtol=1e-9)


W = torch.arange(12, dtype=torch.float64).reshape(3, 4)


@pytest.mark.parametrize(
    ("a", "b", "shared"),
    [
        (W, W.t(), True),
        (W[0], W[0, 1:], True),
        (W[:, 1:3], W[1], True),
        (W, W.view(torch.int64).view(torch.float32), True),
        (W[:, :2], W[:, 2:], False),
        (W[0], W[1], False),
        (W[:, ::2], W[:, 1::2], False),
        (W[:0], W, False),
        (W[:1, :1].expand(3, 4), W[:1, :1].expand(3, 4), False),
    ],
    ids=["transpose", "part", "crossing", "dtype", "blocks", "rows", "comb", "empty", "expanded"],
)
def test_memory_shared_in_part_is_refused_and_neighbours_are_not(a, b, shared):
    if shared:
        with pytest.raises(ProblemError, match=r"share a part of their memory.*\.clone\(\)"):
            Ties({"a": a, "other": torch.ones(2), "b": b})
    else:
        assert Ties({"a": a, "b": b}).trivial


def test_tied_upper_variables_share_the_whole_gradient():
    case = closed_form(PROBLEMS[0], 0)
    both = {"p": case.x["x"], "q": case.x["x"]}

    def tie(function):
        return lambda x, y, batch: function({"x": 0.25 * x["p"] + 0.75 * x["q"]}, y, batch)

    got = bilevel.hypergradient(
        tie(case.problem.upper_loss),
        tie(case.problem.lower_loss),
        both,
        case.y,
        estimator=Implicit(solver=Dense()),
        upper_batch=case.upper_batch,
        lower_batch=case.lower_batch,
    ).hypergradient
    assert_close({"x": got["p"]}, case.truth, rtol=1e-8)
    assert_close({"x": got["q"]}, case.truth, rtol=1e-8)


def test_a_nested_module_with_tied_weights():
    """An encoder and decoder that share a matrix, as modules do it, against a dense truth."""
    torch.manual_seed(1)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
            self.head = nn.ModuleDict({"out": nn.Linear(3, 4)})
            self.extra = nn.Linear(4, 3, bias=False)
            self.extra.weight = self.body[0].weight

        def forward(self, a):
            return self.head["out"](self.body(a) + self.extra(a))

    net = Net().double()
    data = torch.randn(30, 4, dtype=torch.float64)
    y = {name: p.detach() for name, p in net.named_parameters()}
    assert "extra.weight" not in y

    def low(x, y, batch):
        off = (functional_call(net, y, (data[:20],)) - data[:20]) ** 2
        ridge = sum((p**2).sum() for p in y.values())
        return (x["feature"].exp() * off).mean() + 0.05 * ridge

    def up(x, y, batch):
        return ((functional_call(net, y, (data[20:],)) - data[20:]) ** 2).mean()

    x = {"feature": torch.zeros(4, dtype=torch.float64)}
    solved = bilevel.solve_lower(low, x, y, solver=Newton(steps=200, tolerance=1e-9))
    assert solved.stats.converged
    got = bilevel.hypergradient(
        up, low, x, solved.y, estimator=Implicit(solver=CG(iterations=500, tolerance=1e-11))
    )

    def value(shift):
        moved = {"feature": x["feature"] + shift}
        return float(
            up(
                moved,
                bilevel.solve_lower(
                    low, moved, solved.y, solver=Newton(steps=200, tolerance=1e-11)
                ).y,
                None,
            )
        )

    h = 1e-4
    for i in range(4):
        e = torch.zeros(4, dtype=torch.float64)
        e[i] = h
        slope = (value(e) - value(-e)) / (2 * h)
        assert float(got.hypergradient["feature"][i]) == pytest.approx(slope, rel=1e-4)


def test_the_unroll_function_keeps_ties():
    w = torch.tensor([0.5, 1.0], dtype=torch.float64)

    def low(x, y, batch):
        return ((y["a"] - x["s"]) ** 2).sum() + 3 * ((y["b"] - 1) ** 2).sum()

    x = {"s": torch.tensor(2.0, dtype=torch.float64)}
    end = bilevel.unroll(low, x, {"a": w, "b": w}, steps=3, optimizer=SGD(lr=0.05))
    solved = bilevel.solve_lower(
        low, x, {"a": w, "b": w}, solver=Gradient(steps=3, optimizer=SGD(lr=0.05))
    )
    assert end["a"] is end["b"]
    torch.testing.assert_close(end["a"], solved.y["a"])


def test_what_moves_tied_variables_moves_them_as_one():
    case = closed_form(PROBLEMS[0], 0)
    both = {"first": case.y["y"] + 1, "second": None}
    both["second"] = both["first"]

    def of_one(function):
        return lambda x, y, batch: function(x, {"y": (y["first"] + y["second"]) / 2}, batch)

    got = bilevel.hypergradient(
        of_one(case.problem.upper_loss),
        of_one(case.problem.lower_loss),
        case.x,
        both,
        estimator=ValueGap(),
        upper_batch=case.upper_batch,
        lower_batch=case.lower_batch,
    )
    alone = case.estimate(ValueGap(), {"y": both["first"]})
    assert got.moved.y.keys() == {"first", "second"}
    assert torch.equal(got.moved.y["first"], got.moved.y["second"])
    assert_close({"y": got.moved.y["first"]}, alone.moved.y, rtol=1e-12)
