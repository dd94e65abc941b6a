"""Every stochastic preset goes the way of the loop whose expectation on the page is exact.

With the blocks that the library draws put into the moves of `expected`, x and y have to be the
same, call for call; so what `curve` gives is the mean of the preset's ‖∇Φ‖² as well, if blocks and
powers are drawn evenly. That is tested on the mean over some seeds.
"""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bilevel import rng, tree
from bilevel.directions.plain import Plain
from bilevel.directions.storm import Storm
from bilevel.registry.build import build
from bilevel_problems.simulated_quadratic import SimulatedQuadratic
from tests.benchmarks.expected import (
    BOTH,
    LOWER,
    METHODS,
    UPPER,
    Blocks,
    Powers,
    Srba,
    Storms,
    TwoLoops,
    Vrbo,
    curve,
)
from tests.cases import ask_drawing

LR, STEP, CALLS = 0.3, 0.4, 10
PERIOD = 4
"""Of the full passes: 64 of them are not reached here."""
SPIDERS = {"srba": ("lower", "adjoint", "upper"), "vrbo": ("lower", "upper")}
START = rng.stream(0, "expected")
X = torch.randn(5, generator=START, dtype=torch.float64)
Y = torch.randn(20, generator=START, dtype=torch.float64)


def loop_of(name, step=STEP, period=PERIOD):
    """On blocks of 256 samples, or 512 where the state or the passes grow with their number."""
    size = 512 if name in ("saba", "vrbo") else 256
    loop = METHODS[name](Blocks(SimulatedQuadratic(batch_size=size)), LR, step)
    loop.period = period
    return loop


def preset(name, seed=0):
    options = {"lower_lr": LR, "adjoint_lr": LR, "seed": seed}
    for quantity in SPIDERS.get(name, ()):
        options[f"{quantity}_direction"] = {"name": "spider", "period": PERIOD}
    return build("estimators", {"name": name, **options})


def run(loop, estimator, seed, calls=CALLS):
    """(x, y, blocks of G drawn, blocks of F drawn) after each call of the library."""
    problem, drawn = loop.b.problem, ([], [])

    def noted(batches, met):
        for batch in batches:
            met.append(batch["block"])
            yield batch

    lower = noted(problem.lower_batches(rng.stream(seed, "lower")), drawn[0])
    upper = noted(problem.upper_batches(rng.stream(seed, "upper")), drawn[1])
    x, y, state = {"x": X}, {"y": Y}, None
    for _ in range(calls):
        for met in drawn:
            met.clear()
        got = ask_drawing(problem, estimator, x, y, state, lower, upper)
        x, y, state = tree.axpy(-STEP, got.hypergradient, x), got.moved.y, got.state
        yield x["x"], y["y"], list(drawn[0]), list(drawn[1])


def placed(loop, t, lower):
    """The drawn blocks of G in the order of the moves of call t; a pass uses up more, and none."""
    if isinstance(loop, Vrbo):
        used = []
        for k in range(loop.steps):
            first, factors, lower = lower[0], lower[1 : 1 + loop.terms], lower[1 + loop.terms :]
            if (t * loop.steps + k) % loop.period:
                used += [*factors, first]
            else:
                lower = after_the_pass(first, lower, loop.b.counts[0])
        return used + lower
    if isinstance(loop, Srba) and t % loop.period == 0:
        return after_the_pass(lower[0], lower[1:], loop.b.counts[0])
    if isinstance(loop, TwoLoops) and loop.adjoint != "steps":
        head, (last, *factors) = lower[: loop.steps], lower[loop.steps :]
        return [*head, *factors, last]
    return [*lower[1:], lower[0]] if isinstance(loop, Storms) else lower


def after_the_pass(first, blocks, count):
    met = {first}
    while len(met) < count:
        met.add(blocks[0])
        blocks = blocks[1:]
    return blocks


def moved(loop, s, t, lower, upper):
    """The state of the loop after call t on these blocks."""
    blocks, moves = placed(loop, t, lower), []
    for move in loop.call(t):
        if isinstance(move, Powers):
            steps = loop.steps if isinstance(loop, TwoLoops) else 0
            moves += [move.factor] * (len(blocks) - steps - 1)
        else:
            moves.append(move)
    if sum(kind in (LOWER, BOTH) for kind, _ in moves) != len(blocks):
        raise IndexError("the library drew another number of blocks than the loop has moves for")
    left = iter(blocks)
    for kind, move in moves:
        i = next(left) if kind in (LOWER, BOTH) else None
        s = move(s, i, upper[0] if kind in (UPPER, BOTH) else None)
    return s


def off(name, estimator, calls=CALLS):
    """How far the library goes from the loop, relative to x and to y; inf if it draws otherwise."""
    loop, worst = loop_of(name), 0.0
    s = {slot: torch.zeros(size, 1, dtype=torch.float64) for slot, size in loop.slots().items()}
    s |= {"1": s["1"] + 1, "x": X[:, None], "y": Y[:, None]}
    for t, (x, y, lower, upper) in enumerate(run(loop, estimator, 0, calls)):
        try:
            s = moved(loop, s, t, lower, upper)
        except IndexError:
            return math.inf
        for got, here in ((x, s["x"]), (y, s["y"])):
            worst = max(worst, float((got - here[:, 0]).norm() / here.norm()))
    return worst


@pytest.mark.parametrize("name", METHODS)
def test_the_way_is_that_of_the_loop(name):
    assert off(name, preset(name)) < 1e-13


def mistakes(name):
    """The preset with one thing changed that it has: a step, a direction, a number of steps."""
    made = preset(name)
    yield "lower_lr", replace(made, lower_lr=1.01 * LR)
    yield "adjoint_lr", replace(made, adjoint_lr=1.01 * LR)
    if made.adjoint == "series" or (made.adjoint == "steps" and made.adjoint_steps > 1):
        yield "adjoint_steps", replace(made, adjoint_steps=made.adjoint_steps - 1)
    if made.lower_steps > 1:
        yield "lower_steps", replace(made, lower_steps=made.lower_steps - 1)
    for quantity in ("lower", "adjoint", "upper"):
        field = f"{quantity}_direction"
        direction = getattr(made, field)
        if direction != Plain():
            yield field, replace(made, **{field: Plain()})
        if isinstance(direction, Storm):
            wrong = replace(direction, momentum=1.01 * direction.momentum)
            yield f"{field}.momentum", replace(made, **{field: wrong})
        if getattr(direction, "lagged", False):
            yield f"{field}.lagged", replace(made, **{field: replace(direction, lagged=False)})


@pytest.mark.parametrize("name", METHODS)
def test_and_no_other_is_taken_for_it(name):
    for what, wrong in mistakes(name):
        assert off(name, wrong, calls=PERIOD + 2) > 1e-6, what


@pytest.mark.parametrize("name", ["soba", "ttsa"])
def test_the_mean_over_seeds_is_the_expectation(name):
    """To four standard errors; blocks drawn, and a power drawn. Of an x step a fifth longer it is not."""
    loop = loop_of(name)
    seeds = [[x for x, *_ in run(loop, preset(name, seed), seed)] for seed in range(24)]
    x = torch.stack([torch.stack(calls) for calls in seeds])
    W = loop.b.slope()
    values = (W[:, 0] + x @ W[:, 1:].T).square().sum(-1)  # ‖∇Φ‖²
    error = values.std(0) / math.sqrt(len(values))
    for step, right in ((STEP, True), (1.2 * STEP, False)):
        theory = torch.tensor(list(curve(loop_of(name, step), X, Y, CALLS)), dtype=torch.float64)
        assert bool(((values.mean(0) - theory).abs() / error).max() < 4) is right


@pytest.mark.parametrize("name", ["soba", "ma_soba"])
def test_the_page_says_where_they_end(name):
    """The others take ten seconds to a minute each to settle."""
    page = Path(__file__).parents[2] / "docs" / "estimators" / "stochastic.md"
    (said,) = re.findall(rf"^\| `{name}` \|.*\| ([\d.]+) \|$", page.read_text(), re.MULTILINE)
    *_, end = curve(loop_of(name), X, Y, 1000)
    assert end == pytest.approx(float(said), rel=0.01)
