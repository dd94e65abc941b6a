"""Agreement with the path that is run: closed forms, and estimators that differentiate another."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import repeat

import pytest
import torch

from bilevel.errors import ProblemError
from bilevel.estimators.alternating import Alternating
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.unroll import Unroll
from bilevel.lower.gradient import Gradient
from bilevel.lower.newton import Newton
from bilevel.optimizers.differentiable import SGD
from bilevel.run.engine import Setup
from bilevel.run.upper import Upper
from bilevel.testing import PathRow, path_agreement
from bilevel.testing.path_agreement import agreement

RATE, STEPS = 0.1, 2


@dataclass(frozen=True)
class Pulled:
    """G = ½ ‖y − x‖², F = ½ ‖y − b‖² + ⟨c, x⟩: y_K = (1 − (1 − lr)^K) x + (1 − lr)^K y_0."""

    size: int = 3

    def init(self, streams):
        x = torch.linspace(-1, 2, self.size)
        return {"x": x, "s": torch.ones(())}, {"y": torch.zeros(self.size)}

    def upper_loss(self, x, y, batch):
        return (y["y"] - 1).square().sum() / 2 + 0.3 * x["s"] + 0.1 * x["x"].sum()

    def lower_loss(self, x, y, batch):
        return (y["y"] - x["s"] * x["x"]).square().sum() / 2

    def upper_batches(self, stream):
        return repeat(None)

    lower_batches = upper_batches


def setup(**changes) -> Setup:
    given = {
        "problem": Pulled(),
        "lower": Gradient(steps=STEPS, optimizer=SGD(lr=RATE)),
        "upper": Upper(steps=1),
        "estimator": Unroll(),
        **changes,
    }
    return Setup(**given)


def rows(made: Setup, estimators, **options) -> dict[str, PathRow]:
    found = path_agreement(made, estimators, **options)
    return {row.name: row for row in found if isinstance(row, PathRow)}


def test_unrolling_is_the_derivative_of_the_path_and_others_are_off_by_what_they_leave_out():
    found = rows(
        setup(), {"unroll": Unroll(), "implicit": Implicit(), "none": Alternating()}, after=1
    )
    whole = found["unroll"].whole
    assert (whole.cosine, whole.ratio) == pytest.approx((1.0, 1.0), abs=1e-9)
    # One solve before the path, y_0 = (1 − r) x with r = 0.9², y_K = (1 − r²) x; F_y = y_K − 1.
    x = torch.linspace(-1, 2, 3, dtype=torch.float64)
    r = (1 - RATE) ** STEPS
    slope = (1 - r**2) * x - 1
    path = (1 - r) * slope + 0.1  # the start of the path is held
    solution = slope + 0.1  # dy*/dx = 1
    for name, h in (("unroll", path), ("implicit", solution), ("none", torch.full((3,), 0.1))):
        expected = agreement(h.double(), path)
        got = found[name].agreements["x"]
        assert (got.cosine, got.ratio) == pytest.approx(
            (expected.cosine, expected.ratio), rel=1e-6
        ), name
    assert found["none"].agreements["x"].cosine < 0.8


def test_a_wrong_sign_is_seen():
    class Wrong(Unroll):
        def estimate(self, losses, at, state):
            from dataclasses import replace

            found = super().estimate(losses, at, state)
            flipped = {**found.hypergradient, "s": -found.hypergradient["s"]}
            return replace(found, hypergradient=flipped)

    row = rows(setup(), {"wrong": Wrong()})["wrong"]
    assert row.agreements["s"].cosine == pytest.approx(-1.0)
    assert row.agreements["x"].cosine == pytest.approx(1.0)


def test_a_large_variable_is_looked_at_along_directions():
    made = setup(problem=Pulled(size=40))
    row = rows(made, {"unroll": Unroll(), "none": Alternating()})
    assert row["unroll"].agreements["x"].ratio == pytest.approx(1.0, abs=1e-6)
    assert row["none"].agreements["x"].cosine < 0.99


@dataclass(frozen=True)
class Coarse(Pulled):
    """F beside a large constant, rounded to float32, whose steps are as large as what the differences see."""

    def upper_loss(self, x, y, batch):
        found = super().upper_loss(x, y, batch) + 3000
        return found.float().to(found.dtype)


def test_differences_that_rounding_decides_are_marked_and_others_are_not():
    fine, coarse = (
        rows(setup(problem=problem), {"unroll": Unroll()})["unroll"]
        for problem in (Pulled(), Coarse())
    )
    assert not any(found.is_rough for found in (*fine.agreements.values(), fine.whole))
    assert fine.whole.error < 1e-6
    assert all(found.is_rough for found in (*coarse.agreements.values(), coarse.whole))
    # the estimator is the same, and exact: what looks like its error is that of the differences
    assert abs(coarse.whole.ratio - 1) > 1e-3
    assert abs(coarse.whole.ratio - 1) < 2 * coarse.whole.error


def test_what_cannot_work_says_why_and_costs_its_own_row():
    class Fails(Alternating):
        def estimate(self, losses, at, state):
            raise ProblemError("it needs pairs")

    found = rows(setup(), {"fails": Fails(), "unroll": Unroll()})
    assert found["fails"].whole is None
    assert found["fails"].note == "it needs pairs"
    assert found["unroll"].whole is not None
    with pytest.raises(ProblemError, match="Newton keeps no path"):
        rows(setup(lower=Newton(), estimator=Implicit()), {"unroll": Unroll()})


def test_agreement_of_nothing():
    zero, one = torch.zeros(2), torch.ones(2)
    assert agreement(zero, zero).cosine == pytest.approx(agreement(one, one).cosine)
    assert agreement(zero, one).cosine == agreement(one, zero).cosine == 0.0
