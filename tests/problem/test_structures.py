"""What callers of the functional core say of y* is held to the form of y, and their counts are checked."""

import pytest
import torch

import bilevel
from bilevel.errors import ProblemError, RecipeError
from bilevel.estimators import FixedPoint
from bilevel.lower import Gradient, Iterate, Proximal
from bilevel.types import Structure


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("field", "solver", "estimator"),
    [
        ("project", Gradient(steps=2), FixedPoint()),
        ("prox", Proximal(steps=2), FixedPoint()),
        ("map", Iterate(steps=2), FixedPoint()),
    ],
)
@pytest.mark.parametrize(
    ("spoil", "got"),
    [
        (lambda w: w[:1], r"\(1,\) float64"),
        (lambda w: w.float(), r"\(3,\) float32"),
        (lambda w: w[:, None], r"\(3, 1\) float64"),
        (lambda w: None, "None"),
    ],
)
def test_what_restricts_y_is_held_to_the_form_of_y(field, solver, estimator, nested, spoil, got):
    one, three = torch.ones((), dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    x, y = {"a": one}, {"w": [three]} if nested else {"w": three}

    def entry(y):
        return y["w"][0] if nested else y["w"]

    def loss(x, y, batch):
        return (entry(y) - x["a"]).square().sum()

    def restricting(change):
        def method(*given):
            w = change(entry(given[0] if field == "project" else given[1]) * 0.5)
            return {"w": [w] if nested else w}

        return Structure(**{field: method})

    good, bad = restricting(lambda w: w), restricting(spoil)
    name = "w.0" if nested else "w"
    said = rf"^structure\.{field} must return y as \{{'{name}': \(3,\) float64\}}; got .*{got}"
    with pytest.raises(ProblemError, match=said):
        bilevel.solve_lower(loss, x, y, solver=solver, structure=bad)
    with pytest.raises(ProblemError, match=said):
        bilevel.hypergradient(loss, loss, x, y, estimator=estimator, structure=bad)
    solved = bilevel.solve_lower(loss, x, y, solver=solver, structure=good)  # control
    assert solved.structure is good
    assert entry(solved.y).shape == (3,)


@pytest.mark.parametrize("count", ["a", -1, None, float("nan")])
def test_a_count_that_is_none_is_named(count):
    y = {"w": torch.ones(2)}

    def loss(x, y, batch):
        return y["w"].square().sum()

    with pytest.raises(RecipeError, match=r"^record = .*; must be True, False, or a number of"):
        bilevel.solve_lower(loss, {}, y, record=count)
    for steps in (count, True, 1.0):
        with pytest.raises(RecipeError, match=r"^steps = .*; must be an integer ≥ 0$"):
            bilevel.unroll(loss, {}, y, steps=steps)
    assert torch.equal(bilevel.unroll(loss, {}, y, steps=0)["w"], y["w"])
