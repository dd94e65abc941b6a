"""The mean of a direction over all batches and all draws is what it estimates."""

import itertools
from dataclasses import replace

import pytest
import torch

from bilevel import tree
from bilevel.estimators.single_loop import SingleLoop
from tests.estimators.single_loops import (
    ADJOINT,
    LOWER,
    LR,
    UPPERS,
    M,
    N,
    V,
    ask,
    mean,
    p,
    preset,
    truth,
)

STATE = {"calls": 0, "v": V, "memory": {}, "before": {}}


def directions(estimator, lower, upper, state=STATE):
    """(d_y, d_v, d_x) of one call on given batches, read off from where it moved."""
    got = ask(estimator, p.x, p.y, state, p.batches(lower, N), p.batches(upper, M))
    d_y = tree.scale(1 / LR, tree.sub(p.y, got.moved.y))["y"]
    d_v = tree.scale(1 / ADJOINT, tree.sub(V, got.state["v"]))["y"]
    return d_y, d_v, got.hypergradient["x"]


PAIRS = list(itertools.product(range(N), range(M)))


@pytest.mark.parametrize("name", ["soba", "saba"])
def test_the_mean_over_all_batches_is_the_deterministic_direction(name):
    """Exact, not sampled; SAGA too, whatever its tables hold."""
    state = STATE
    if name == "saba":  # tables filled at another point, one row left empty
        moved = tree.map(lambda e: e + 0.3, p.y)
        for i, j in ((0, 1), (2, 1)):
            args = p.batches([i], N), p.batches([j], M)
            state = ask(preset(name), p.x, moved, state, *args).state | {"v": V}
    got = mean([directions(preset(name), [i], [j], state) for i, j in PAIRS])
    for a, b in zip(got, truth(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    one = directions(preset(name), [0], [0], state)
    assert float((one[0] - truth()[0]).norm()) > 0.1  # one batch alone is far off


def test_the_mean_of_a_series_is_the_truncated_series():
    """Over every sequence of batches: η Σ_{q ≤ K} (I − η H)^q ∇y F of the mean H, F."""
    K = 2
    estimator = SingleLoop(
        lower_lr=LR, adjoint_lr=ADJOINT, adjoint="series", adjoint_steps=K, order="together"
    )
    rows = [
        directions(estimator, [i, *factors], [j])[2]
        for i, j in PAIRS
        for factors in itertools.product(range(N), repeat=K)
    ]
    got = torch.stack(rows).mean(0)
    torch.testing.assert_close(got, biased(K), rtol=1e-12, atol=1e-13)
    for other in (K - 1, K + 1):
        assert float((got - biased(other)).norm()) > 1e-3


def biased(K):
    """∇x F − J η Σ_{q ≤ K} (I − η H)^q ∇y F of the means."""
    x, y = p.x["x"], p.y["y"]
    F_x, F_y = mean([p.F_xy(j, x, y) for j in range(M)])
    H = torch.stack([p.H(i, x, y) for i in range(N)]).mean(0)
    power, v = torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for _ in range(K + 1):
        v = v + ADJOINT * power @ F_y
        power = power @ (torch.eye(3, dtype=torch.float64) - ADJOINT * H)
    return F_x - torch.stack([p.J(i, x, y, v) for i in range(N)]).mean(0)


DRAWN = SingleLoop(lower_lr=LR, adjoint_lr=ADJOINT, adjoint="random_series", adjoint_steps=3)


def test_a_drawn_term_has_the_mean_of_the_series_one_term_short():
    """Over every sequence of batches and every number of factors from 0 to K − 1."""
    seeds = {hvps_at(seed): seed for seed in range(20)}
    assert sorted(seeds) == [0, 1, 2]
    rows = []
    for count, seed in seeds.items():
        cases = [
            directions(replace(DRAWN, seed=seed), [i, *factors], [j])[2]
            for i, j in PAIRS
            for factors in itertools.product(range(N), repeat=count)
        ]
        rows.append(torch.stack(cases).mean(0))
    got = torch.stack(rows).mean(0)
    torch.testing.assert_close(got, biased(2), rtol=1e-12, atol=1e-13)
    for other in (1, 3):
        assert float((got - biased(other)).norm()) > 1e-3


def hvps_at(seed):
    args = p.batches(LOWER, N), p.batches(UPPERS, M)
    return ask(replace(DRAWN, seed=seed), p.x, p.y, STATE, *args).stats.hvps


def test_the_number_of_factors_is_drawn_evenly():
    """Each of K numbers within 4 standard errors of 1 / K, and another one in the next call."""
    draws = 300
    found = [hvps_at(seed) for seed in range(draws)]
    error = (draws * (1 / 3) * (2 / 3)) ** 0.5
    for count in range(3):
        assert abs(found.count(count) - draws / 3) < 4 * error
    lower, upper = p.batches(LOWER, N), p.batches(UPPERS, M)
    state, along = STATE, set()
    for _ in range(12):
        got = ask(DRAWN, p.x, p.y, state, lower, upper)
        state = got.state
        along.add(got.stats.hvps)
    assert along == {0, 1, 2}
