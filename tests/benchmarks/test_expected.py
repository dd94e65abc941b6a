"""Every stochastic preset reaches, call for call, the suboptimality that its papers' loop has.

On the simulated quadratic the mean of ‖∇Φ‖² over all draws is known exactly (`expected`); the mean
over some seeds of the library's runs has to be that to four standard errors. A step of x a fifth
longer is told from it.
"""

import math
import re
from pathlib import Path

import pytest
import torch

from bilevel import hypergradient, rng, tree
from bilevel.build import build
from bilevel_problems.simulated_quadratic import SimulatedQuadratic
from tests.benchmarks.expected import METHODS, Blocks, curve

LR, UPPER, CALLS = 0.3, 0.4, 10
SHOWN = [0, 4, 9]
PERIOD = 4
"""Of spider, for full passes in between and not at the start alone."""
SPIDERS = {"srba": ("lower", "adjoint", "upper"), "vrbo": ("lower", "upper")}
START = rng.stream(0, "expected")
X = torch.randn(5, generator=START, dtype=torch.float64)
Y = torch.randn(20, generator=START, dtype=torch.float64)


def blocks_for(name):
    """Of 256 samples, or 512 where the cost grows with their number: tables, passes of a series."""
    return Blocks(SimulatedQuadratic(batch_size=512 if name in ("saba", "vrbo") else 256))


def expected(name, upper=UPPER):
    method = METHODS[name](blocks_for(name), LR, upper)
    method.period = PERIOD
    found = list(curve(method, X, Y, CALLS))
    return torch.tensor(found, dtype=torch.float64)[SHOWN]


def measured(name, seed):
    """‖∇Φ(x)‖² after the calls that are shown."""
    blocks = blocks_for(name)
    problem, W = blocks.problem, blocks.slope()
    options = {"lower_lr": LR, "adjoint_lr": LR, "seed": seed}
    for quantity in SPIDERS.get(name, ()):
        options[f"{quantity}_direction"] = {"name": "spider", "period": PERIOD}
    estimator = build("estimators", {"name": name, **options})
    lower = problem.lower_batches(rng.stream(seed, "lower"))
    upper = problem.upper_batches(rng.stream(seed, "upper"))
    x, y, state, found = {"x": X}, {"y": Y}, None, []
    for _ in range(CALLS):
        got = hypergradient(
            problem.upper_loss,
            problem.lower_loss,
            x,
            y,
            estimator=estimator,
            upper_batch=next(upper),
            lower_batch=next(lower),
            state=state,
            upper_batches=upper,
            lower_batches=lower,
        )
        x, y, state = tree.axpy(-UPPER, got.hypergradient, x), got.moved.y, got.state
        slope = W @ torch.cat([torch.ones(1, dtype=torch.float64), x["x"]])
        found.append(float(slope @ slope))
    return [found[t] for t in SHOWN]


@pytest.mark.parametrize("name", ["soba", "ma_soba"])
def test_the_page_says_where_they_end(name):
    """The others take ten seconds to a minute each to settle."""
    page = Path(__file__).parents[2] / "docs" / "estimators" / "stochastic.md"
    (said,) = re.findall(rf"^\| `{name}` \|.*\| ([\d.]+) \|$", page.read_text(), re.MULTILINE)
    *_, end = curve(METHODS[name](blocks_for(name), LR, UPPER), X, Y, 1000)
    assert end == pytest.approx(float(said), rel=0.01)


def off(values, theory):
    """How many standard errors the mean of the seeds is from the theory; rounding apart."""
    mean, error = values.mean(0), values.std(0) / math.sqrt(len(values))
    return float(((mean - theory).abs() / (error + 1e-9 * theory)).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_the_curve_is_the_expected_one(name):
    seeds = 12 if name == "vrbo" else 24
    values = torch.tensor([measured(name, seed) for seed in range(seeds)], dtype=torch.float64)
    assert off(values, expected(name)) < 4
    assert off(values, expected(name, 1.2 * UPPER)) > 4  # negative control
