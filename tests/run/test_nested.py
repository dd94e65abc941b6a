"""A problem whose x and y are nested runs as the one of flat dicts does, and gets its containers back."""

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch

import bilevel
import bilevel.testing
from bilevel.errors import ProblemError
from bilevel.estimators import FixedPoint, Implicit, Unroll
from bilevel.lower import LBFGS, Gradient, Proximal
from bilevel.optimizers import SGD
from bilevel.problem.nested_variables import _MAPS
from bilevel.problem.protocol import OPTIONAL
from bilevel.run import Setup, Upper, engine
from bilevel.run.setup import restore

M = torch.tensor([[2.0, 0.3], [0.3, 1.0]])


class Layer(NamedTuple):
    weight: torch.Tensor
    bias: torch.Tensor


@dataclass
class Penalty:
    log: torch.Tensor
    shift: list


def value(log, shift, weight, bias):
    """(F, G) of the leaves."""
    A = M.to(weight)
    upper = (weight - 1).square().sum() + (bias + 0.5) ** 2
    lower = 0.5 * weight @ A @ weight - weight @ shift + (bias - shift.sum()) ** 2
    return upper, lower + log.exp() * (weight.square().sum() + bias**2)


START = (torch.tensor(-1.0), torch.tensor([0.5, -1.0]), torch.tensor([0.2, 0.4]), torch.tensor(0.3))


class Flat:
    def init(self, streams):
        log, shift, weight, bias = START
        return {"p.log": log, "p.shift.0": shift}, {"0.weight": weight, "0.bias": bias}

    def leaves(self, x, y):
        return x["p.log"], x["p.shift.0"], y["0.weight"], y["0.bias"]

    def upper_loss(self, x, y, batch):
        return value(*self.leaves(x, y))[0]

    def lower_loss(self, x, y, batch):
        return value(*self.leaves(x, y))[1]

    def upper_batches(self, stream):
        return itertools.repeat(None)

    lower_batches = upper_batches

    def lower_start(self, x, y):
        return {"0.weight": x["p.shift.0"] * 2, "0.bias": y["0.bias"]}

    def evaluate(self, x, y):
        return {"size": float(self.leaves(x, y)[2].norm())}

    def project_upper(self, x):
        return {**x, "p.log": x["p.log"].clamp(max=-0.9)}

    def project_lower(self, y):
        return {**y, "0.weight": y["0.weight"].clamp(max=0.6)}


class Nested(Flat):
    def init(self, streams):
        log, shift, weight, bias = START
        return {"p": Penalty(log, [shift])}, [Layer(weight, bias)]

    def leaves(self, x, y):
        assert isinstance(x["p"], Penalty)
        assert isinstance(y[0], Layer)
        return x["p"].log, x["p"].shift[0], y[0].weight, y[0].bias

    def lower_start(self, x, y):
        return [Layer(x["p"].shift[0] * 2, y[0].bias)]

    def project_upper(self, x):
        return {"p": Penalty(x["p"].log.clamp(max=-0.9), x["p"].shift)}

    def project_lower(self, y):
        return [Layer(y[0].weight.clamp(max=0.6), y[0].bias)]


def without(kind, *names):
    return type(kind.__name__, (kind,), dict.fromkeys(names))()


CASES = {
    "implicit": (("lower_start", "project_upper", "project_lower"), LBFGS(), Implicit()),
    "unroll from x": (
        ("project_lower",),
        Gradient(steps=5, optimizer=SGD(lr=0.1, momentum=0.5)),
        Unroll(),
    ),
    "projected": (("lower_start",), Proximal(), FixedPoint()),
}


@pytest.mark.parametrize("case", CASES)
def test_the_numbers_are_those_of_flat_dicts(case):
    left_out, lower, estimator = CASES[case]

    def run(kind):
        return bilevel.minimize(
            without(kind, *left_out), lower=lower, estimator=estimator, upper=SGD(lr=0.1), steps=4
        )

    flat, nested = run(Flat), run(Nested)
    assert isinstance(nested.x["p"], Penalty)
    assert isinstance(nested.y[0], Layer)
    assert torch.equal(nested.x["p"].log, flat.x["p.log"])
    assert torch.equal(nested.x["p"].shift[0], flat.x["p.shift.0"])
    assert torch.equal(nested.y[0].weight, flat.y["0.weight"])
    assert torch.equal(nested.y[0].bias, flat.y["0.bias"])
    assert [e.upper_loss for e in nested.history] == [e.upper_loss for e in flat.history]
    assert nested.metrics == flat.metrics
    assert not torch.equal(flat.x["p.shift.0"], START[1])  # it went somewhere


def test_a_saved_state_is_flat_and_goes_on():
    setup = Setup(without(Nested, "project_lower"), LBFGS(), Upper(steps=2), Implicit())
    state = engine.start(setup)
    list(engine.run(setup, state))
    saved = state.save()
    assert set(saved["x"]) == {"p.log", "p.shift.0"}
    again = Setup(without(Nested, "project_lower"), LBFGS(), Upper(steps=2), Implicit())
    restored = restore(again, saved)
    assert torch.equal(restored.x["p.log"], state.x["p.log"])
    assert "evaluate" in again.levels


def test_every_optional_method_is_mapped():
    assert _MAPS.keys() == OPTIONAL.keys()


def test_one_tensor_under_two_names_is_refused():
    class Tied(Nested):
        def init(self, streams):
            once = torch.zeros(2)
            return {"p": Penalty(START[0], [once, once])}, [Layer(*START[2:])]

    with pytest.raises(ProblemError, match="x holds one tensor under two names"):
        bilevel.minimize(Tied(), steps=1)


def test_check_problem_takes_it():
    bilevel.testing.check_problem(without(Nested, "project_lower", "project_upper"))
