"""Every estimator keeps the contract, and with a mistake in it does not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from bilevel import calculus, registry, tree
from bilevel.errors import RequirementError
from bilevel.registry.build import build
from tests.mutation.held import CLAIMS_NOTHING, LEFT_OUT, first_complaint
from tests.wrapped import Wrapped

NAMES = [name for name in registry.names("estimators") if name not in LEFT_OUT]
DIRECT = "it has no implicit term"


@dataclass(frozen=True)
class Mutant(Wrapped):
    """An estimator with one mistake in what it returns."""

    inner: Any

    def estimate(self, losses, at, state):
        got = self.inner.estimate(losses, at, state)
        y = got.moved.y if got.moved else at.y
        _, F_x, _ = calculus.gradients(losses.upper, replace(at, y=y))
        return replace(got, hypergradient=self.mistake(got.hypergradient, F_x))

    def mistake(self, h, F_x):
        return h


class Negated(Mutant):
    """The sign of the implicit term."""

    def mistake(self, h, F_x):
        return tree.sub(tree.scale(2.0, F_x), h)


class Indirect(Mutant):
    """The direct term ∇x F dropped."""

    def mistake(self, h, F_x):
        return tree.sub(h, F_x)


class Severed(Mutant):
    """y does not depend on x: the cross product is zero."""

    def mistake(self, h, F_x):
        return F_x


class Stale(Mutant):
    """The answer of the call before."""

    def init(self, at):
        return {"inner": self.inner.init(at)}

    def estimate(self, losses, at, state):
        got = self.inner.estimate(losses, at, state["inner"])
        kept = {"inner": got.state, "before": got.hypergradient}
        h = state.get("before", got.hypergradient)
        return replace(got, hypergradient=h, state=kept)


EQUIVALENT = {
    (name, kind): DIRECT for name in ("alternating", "none") for kind in (Negated, Severed)
}


def built(name):
    try:
        return build("estimators", name)
    except RequirementError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", NAMES)
def test_as_it_is_nothing_is_wrong(name):
    assert first_complaint(name, built(name)) is None


@pytest.mark.parametrize("mutant", [Negated, Indirect, Severed, Stale], ids=lambda m: m.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_a_mutant_is_killed(name, mutant):
    estimator = built(name)
    if estimator.claim is None and name not in CLAIMS_NOTHING:
        pytest.skip(f"{name} claims nothing, and held.py does not say how near it comes")
    estimator = mutant(estimator)
    assert (first_complaint(name, estimator) is None) is ((name, mutant) in EQUIVALENT)
