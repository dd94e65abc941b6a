"""A state from another problem is refused at every door; one's own goes on as if never left."""

import pytest
import torch

from bilevel import hypergradient, solve_lower
from bilevel.errors import ProblemError
from bilevel.estimators import Implicit
from bilevel.lower import Gradient
from bilevel.optimizers import SGD, Adam
from bilevel.optimizers.torch_optim import TorchOptimizer
from bilevel.run.engine import restore, start
from tests.run.setups import setup

X = {"s": torch.tensor(2.0, dtype=torch.float64)}
B = torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64)

OPTIMIZERS = {
    "sgd": SGD(lr=0.1, momentum=0.9),
    "adam": Adam(lr=0.1),
    "torch": TorchOptimizer(optimizer="Adam", options={"lr": 0.1}),
    "torch sgd": TorchOptimizer(optimizer="SGD", options={"lr": 0.1, "momentum": 0.9}),
}


def G(x, y, _):
    return (sum(entry.reshape(-1, 3) for entry in y.values()) - x["s"] * B).square().sum() / 2


def F(x, y, _):
    return sum(entry.square().sum() for entry in y.values())


def zeros(*shape, name="w"):
    return {name: torch.zeros(shape, dtype=torch.float64)}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_solve_lower_refuses_momentum_of_another_shape_and_takes_its_own(optimizer):
    few = Gradient(steps=3, optimizer=optimizer)
    other = solve_lower(G, X, zeros(1, 3), solver=few).state
    with pytest.raises(ProblemError, match=r"another problem: it holds 'w' in shape \(1, 3\)"):
        solve_lower(G, X, zeros(3), solver=few, state=other)
    first = solve_lower(G, X, zeros(3), solver=few)
    on = solve_lower(G, X, first.y, solver=few, state=first.state).y["w"]
    whole = solve_lower(G, X, zeros(3), solver=Gradient(steps=6, optimizer=optimizer)).y["w"]
    assert torch.equal(on, whole)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_solve_lower_refuses_momentum_of_other_names(name):
    few = Gradient(steps=3, optimizer=OPTIMIZERS[name])
    other = solve_lower(G, X, zeros(3, name="v"), solver=few).state
    with pytest.raises(ProblemError, match="not one of Gradient for these variables"):
        solve_lower(G, X, zeros(3), solver=few, state=other)


def test_hypergradient_refuses_an_adjoint_of_another_shape():
    other = hypergradient(F, G, X, {"w": 2 * B.reshape(1, 3)}, estimator=Implicit()).state
    with pytest.raises(ProblemError, match="another problem"):
        hypergradient(F, G, X, {"w": 2 * B}, estimator=Implicit(), state=other)
    own = hypergradient(F, G, X, {"w": 2 * B}, estimator=Implicit())
    again = hypergradient(F, G, X, {"w": 2 * B}, estimator=Implicit(), state=own.state)
    # y* = s b: dΦ/ds = 2 s ‖b‖²
    assert float(again.hypergradient["s"]) == pytest.approx(4 * 9.0)


def test_a_run_refuses_a_saved_state_of_another_problem():
    one = setup()
    saved = start(one).save()
    assert restore(one, saved).step == 0
    wrong = {name: entry.unsqueeze(0) for name, entry in saved["y"].items()}
    with pytest.raises(ProblemError, match="the saved state is of another problem: y is"):
        restore(one, saved | {"y": wrong})
    with pytest.raises(ProblemError, match="the saved optimizer is of another problem"):
        restore(one, saved | {"lower": {"momentum": wrong}})
