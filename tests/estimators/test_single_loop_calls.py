"""What an iteration of a single-loop method costs beside its tensors: calls and passes, not time."""

import pytest
import torch

from bilevel.calculus import unsupported
from bilevel.estimators.single_loop import SingleLoop
from bilevel.events import Stepped
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import SGD
from bilevel.registry.build import build
from bilevel.run import engine
from bilevel.run.engine import Setup
from bilevel.run.upper import Upper
from bilevel_problems.simulated_quadratic import SimulatedQuadratic
from tests.counting import own_calls


def iterations(name, batch_size=16):
    """A call that takes so many upper steps of one run."""
    estimator = build("estimators", name)
    assert isinstance(estimator, SingleLoop)
    problem = SimulatedQuadratic(upper_samples=64, lower_samples=512, batch_size=batch_size)
    setup = Setup(
        problem, Gradient(), Upper(steps=500, optimizer=SGD(lr=0.1)), estimator, dtype=torch.float64
    )
    events = engine.run(setup, engine.start(setup))

    def take(number):
        for event in events:
            number -= isinstance(event, Stepped)
            if not number:
                return

    return take


def each(name, batch_size=16, before=100, more=10):
    """Calls within the package of one iteration, once the tables of SAGA are all but full."""
    take = iterations(name, batch_size)
    take(before)
    return own_calls(lambda: take(more)) / more


def test_they_do_not_grow_with_the_number_of_blocks():
    """32 blocks of G and 4 of F, or 8 and 1: what is kept of the others is not looked at again."""
    assert each("saba", 16) <= each("saba", 64) + 8


@pytest.mark.parametrize(("name", "most"), [("soba", 186), ("saba", 275)])
def test_calls_within_the_package_of_an_iteration(name, most):
    assert each(name) <= most


@pytest.mark.parametrize(("name", "passes"), [("soba", 3), ("saba", 3), ("srba", 6)])
def test_backward_passes_of_an_iteration(name, passes, monkeypatch):
    """∇y G, both products of its graph in one, and ∇F; twice where a direction looks back."""
    found, plain = [], unsupported._on_cpu
    monkeypatch.setattr(
        unsupported,
        "_on_cpu",
        lambda *given, **options: found.append(0) or plain(*given, **options),
    )
    take = iterations(name)
    take(10)  # the checks of the first, and the full pass of srba
    found.clear()
    take(4)
    assert len(found) == 4 * passes
