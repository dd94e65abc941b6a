"""Single-loop methods against their loops written out, their cost, and what they refuse."""

from dataclasses import replace

import pytest
import torch

from bilevel import hypergradient, tree
from bilevel.directions.average import Average
from bilevel.directions.plain import Plain
from bilevel.directions.spider import Spider
from bilevel.directions.storm import Storm
from bilevel.errors import ProblemError, RecipeError
from bilevel.estimators.single_loop import SingleLoop
from bilevel.rng import Streams
from bilevel_problems.box_qp import BoxQP
from tests.cases import ask_anyway
from tests.estimators.single_loops import (
    COMMON,
    LOOPS,
    LOWER,
    LR,
    UPPER,
    UPPERS,
    Hand,
    M,
    N,
    ask,
    drawn,
    p,
    power,
    preset,
)

NAMES = ["bsa", "ttsa", "stocbio", "amigo", "fsla", "soba", "saba", "srba"]
NAMES += ["ma_soba", "sustain", "mrbo", "vrbo"]


def follow(estimator, steps=4):
    """x and y after steps of the estimator with plain steps of x, and the batches that are left."""
    lower, upper = p.batches(LOWER, N), p.batches(UPPERS, M)
    x, y, state = p.x, p.y, None
    for _ in range(steps):
        got = ask(estimator, x, y, state, lower, upper)
        x, y, state = tree.axpy(-UPPER, got.hypergradient, x), got.moved.y, got.state
    return x["x"], y["y"], len(list(lower)), len(list(upper))


def by_hand(body, steps=4):
    h = Hand(p.x["x"], p.y["y"], torch.zeros(3, dtype=torch.float64), iter(LOWER), iter(UPPERS))
    kept = {}
    for h.call in range(steps):
        body(h, kept)
    return h.x, h.y, len(list(h.lower)), len(list(h.upper))


def agree(got, expected):
    """x, y after the loop, and how many batches are left of both levels."""
    for a, b in zip(got[:2], expected[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    assert got[2:] == expected[2:]


@pytest.mark.parametrize("name", NAMES)
def test_each_preset_is_its_loop_written_out(name):
    agree(follow(preset(name)), by_hand(LOOPS[name][1]))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("soba", replace(preset("soba"), order="sequential")),
        ("fsla", replace(preset("fsla"), order="together")),
        ("saba", replace(preset("saba"), adjoint_direction=Plain())),
        ("ma_soba", replace(preset("ma_soba"), upper_direction=Average(weight=0.3))),
        ("srba", replace(preset("srba"), upper_direction=Spider(period=3))),
        ("mrbo", replace(preset("mrbo"), adjoint="random_series")),
        ("amigo", replace(preset("amigo"), adjoint="series")),
        ("sustain", replace(preset("sustain"), seed=9)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_and_another_method_is_told_apart(name, wrong):
    with pytest.raises(AssertionError):
        agree(follow(wrong), by_hand(LOOPS[name][1]))


@pytest.mark.parametrize("name", ["fsla", "srba", "saba", "ma_soba"])
def test_what_is_written_into_x_y_and_the_answer_changes_nothing(name):
    lower, upper = p.batches(LOWER, N), p.batches(UPPERS, M)
    x, y, state = tree.clone(p.x), tree.clone(p.y), None
    for _ in range(4):
        got = ask(preset(name), x, y, state, lower, upper)
        tree.axpy_(x, -UPPER, got.hypergradient)
        tree.axpy_(y, 1.0, tree.sub(got.moved.y, y))
        tree.scale_(got.hypergradient, 0.0)
        state = got.state
    agree((x["x"], y["y"], len(list(lower)), len(list(upper))), follow(preset(name)))


# gradients, HVPs, cross products: of the first call, of the second
COSTS = {
    "bsa": None,
    "ttsa": None,
    "stocbio": ((2 + 1 + 3 + 1, 3, 1),) * 2,  # y steps, ∇F, factors, cross product
    "amigo": ((2 + 1 + 3 + 1, 3, 1),) * 2,
    "fsla": ((1 + 1 + 1 + 1, 1, 1), (1 + 1 + 1 + 1 + 2, 1, 2)),
    "soba": ((2, 1, 1),) * 2,
    "saba": ((2, 1, 1),) * 2,
    "srba": ((N + M, N, N), (4, 2, 2)),
    "ma_soba": ((2, 1, 1),) * 2,
    "sustain": None,
    "mrbo": ((1 + 1 + 3, 3, 1), (10, 6, 2)),
    # the pass: ∇F of M, ∇G of N for each factor and once more; then a step at two points
    "vrbo": ((M + 3 * N + 2 * 4, 2 * N + 2 * 2, N + 2), (2 * 4 + M + 3 * N, 2 * 2 + 2 * N, 2 + N)),
}


@pytest.mark.parametrize("name", [name for name in NAMES if COSTS[name]])
def test_every_oracle_call_is_counted(name):
    lower, upper = p.batches(LOWER, N), p.batches(UPPERS, M)
    first = ask(preset(name), p.x, p.y, None, lower, upper)
    x = tree.axpy(-UPPER, first.hypergradient, p.x)
    second = ask(preset(name), x, first.moved.y, first.state, lower, upper)
    got = [(s.stats.gradients, s.stats.hvps, s.stats.cross_products) for s in (first, second)]
    assert tuple(got) == COSTS[name]


def test_a_drawn_term_costs_its_own_factors():
    for seed in range(6):
        estimator = replace(preset("ttsa"), seed=seed)
        got = ask(estimator, p.x, p.y, None, p.batches(LOWER, N), p.batches(UPPERS, M)).stats
        assert got.gradients == 3 + got.hvps
        assert got.cross_products == 1


@pytest.mark.parametrize(
    "options",
    [
        {"adjoint_steps": 2},
        {"adjoint": "series", "adjoint_direction": Storm()},
        {"lower_lr": 0.0},
    ],
)
def test_combinations_that_say_nothing_are_refused(options):
    with pytest.raises(RecipeError):
        SingleLoop(**options)


@pytest.mark.parametrize(
    ("direction", "kept"),
    [(Plain(), False), (Average(), False), (Storm(), True), (Storm(momentum=1.0), False)],
    ids=repr,
)
def test_the_point_before_is_kept_for_those_that_look_back_to_it(direction, kept):
    got = ask(
        SingleLoop(upper_direction=direction), p.x, p.y, None, p.batches([0], N), p.batches([0], M)
    )
    assert bool(got.state["before"]) is kept


def test_a_set_that_holds_y_is_refused():
    with pytest.raises(ProblemError, match="no set that restricts y"):
        ask_anyway(BoxQP(), *BoxQP().init(Streams(0)), SingleLoop())


def test_entries_of_y_that_G_does_not_use_leave_the_adjoint_at_rest():
    """Where G is flat the adjoint has no equation, and steps of it would grow for ever."""
    y = {"used": p.y["y"], "idle": p.y["y"] + 1}
    got = hypergradient(
        lambda x, y, b: (y["used"] + y["idle"]).square().sum() * x["x"].sum(),
        lambda x, y, b: y["used"].square().sum() * (1 + x["x"] @ x["x"]),
        p.x,
        y,
        estimator=SingleLoop(order="sequential", adjoint_steps=4),
    )
    assert not got.state["v"]["idle"].any()
    assert got.state["v"]["used"].all()


def test_a_series_over_many_steps_draws_a_number_for_each():
    def body(h, kept):
        for step in range(3):
            i, j = next(h.lower), next(h.upper)
            factors = [next(h.lower) for _ in range(power(h, step))]
            F_x, F_y = p.F_xy(j, h.x, h.y)
            d = F_x - p.J(i, h.x, h.y, drawn(factors, F_y, h.x, h.y))
            h.y = h.y - LR * p.G_y(i, h.x, h.y)
        h.x = h.x - UPPER * d

    options = {"adjoint": "random_series", "adjoint_steps": 3, "lower_steps": 3}
    agree(follow(SingleLoop(**COMMON, **options)), by_hand(body))


@pytest.mark.untrusted("ends its adjoint solve early on purpose")
def test_the_steps_of_the_adjoint_end_at_the_tolerance():
    """From an adjoint at rest one product is enough to see it."""
    options = {"order": "sequential", "adjoint_steps": 400, "lower_steps": 9, "tolerance": 1e-6}
    estimator = SingleLoop(lower_lr=0.3, adjoint_lr=0.3, **options)
    lower, upper = p.batches([0] * 1300, N), p.batches([0] * 3, M)
    y, state, got = p.y, None, None
    for _ in range(3):
        got = ask(estimator, p.x, y, state, lower, upper)
        y, state = got.moved.y, got.state
    assert got.stats.hvps < 100
    assert got.stats.residual <= 1e-6
