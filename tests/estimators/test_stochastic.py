"""Single-loop methods against their loops written out, and directions against their identities."""

import itertools
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from pydantic import ValidationError

from bilevel import hypergradient, rng, tree
from bilevel.directions.average import Average
from bilevel.directions.blocks import every_block
from bilevel.directions.draw import Draw
from bilevel.directions.plain import Plain
from bilevel.directions.saga import Saga
from bilevel.directions.spider import Spider
from bilevel.directions.storm import Storm
from bilevel.errors import ProblemError
from bilevel.estimators.single_loop import SingleLoop
from bilevel.functional import estimate_at
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import SGD
from bilevel.recipe.build import build
from bilevel.run.engine import Setup, restore, run, start
from bilevel.run.upper import Upper
from bilevel.testing import CheckRow, check, check_estimator
from bilevel.types import Counts, Loss
from bilevel_problems.quadratic import Quadratic
from bilevel_problems.simulated_quadratic import SimulatedQuadratic
from tests.cases import ask_drawing

N, M = 3, 2  # blocks of G, of F
LR, ADJOINT, UPPER = 0.1, 0.15, 0.2
NAMES = ["bsa", "ttsa", "stocbio", "amigo", "fsla", "soba", "saba", "srba"]
NAMES += ["ma_soba", "sustain", "mrbo", "vrbo"]


class Curved:
    """Blocks of G and F whose second derivatives all move with (x, y), so that no point is as good."""

    def __init__(self):
        stream = rng.stream(3, "curved")

        def draw(*shape):
            return torch.randn(*shape, generator=stream, dtype=torch.float64)

        root = draw(N, 3, 3) / 2
        self.A = root @ root.mT + torch.eye(3, dtype=torch.float64)
        self.B, self.c, self.e = draw(N, 3, 2), draw(N, 3) + 1, draw(N, 2) / 5
        self.D, self.t, self.s = draw(M, 3, 2) / 2, draw(M, 3) + 2, draw(M, 2) - 1
        self.x, self.y = {"x": draw(2) + 0.5}, {"y": draw(3) / 2}

    def G(self, x, y, i):
        bent = 0.05 * (y**4).sum() + 0.5 * (torch.sin(x) @ self.e[i]) * (y @ y)
        return 0.5 * y @ self.A[i] @ y + y @ (self.B[i] @ torch.sin(x) - self.c[i]) + bent

    def F(self, x, y, j):
        off, far = y - self.t[j], x - self.s[j]
        return 0.5 * off @ off + 0.3 * far @ far + y @ self.D[j] @ x + 0.05 * (y**3).sum()

    def lower_loss(self, x, y, batch):
        return self.G(x["x"], y["y"], batch["block"])

    def upper_loss(self, x, y, batch):
        return self.F(x["x"], y["y"], batch["block"])

    # what the methods are made of, by plain autograd on dense matrices

    def F_xy(self, j, x, y):
        x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
        return torch.autograd.grad(self.F(x, y, j), (x, y))

    def G_y(self, i, x, y):
        y = y.clone().requires_grad_()
        return torch.autograd.grad(self.G(x, y, i), y)[0]

    def second(self, i, x, y):
        """(∂²yy G, ∂²yx G) [3, 3], [3, 2]."""
        x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
        (g,) = torch.autograd.grad(self.G(x, y, i), y, create_graph=True)
        rows = [torch.autograd.grad(part, (y, x), retain_graph=True) for part in g]
        return tuple(torch.stack(part) for part in zip(*rows, strict=True))

    def H(self, i, x, y):
        return self.second(i, x, y)[0]

    def J(self, i, x, y, v):
        return self.second(i, x, y)[1].T @ v

    def batches(self, order, blocks):
        return iter([{"block": b, "blocks": blocks} for b in order])


p = Curved()
LOWER = torch.randint(N, (400,), generator=rng.stream(0, "lower order")).tolist()
UPPERS = torch.randint(M, (400,), generator=rng.stream(0, "upper order")).tolist()


ask = partial(ask_drawing, p)


def follow(estimator, steps=4):
    """x and y after steps of the estimator with plain steps of x, and the batches that are left."""
    lower, upper = p.batches(LOWER, N), p.batches(UPPERS, M)
    x, y, state = p.x, p.y, None
    for _ in range(steps):
        got = ask(estimator, x, y, state, lower, upper)
        x, y, state = tree.axpy(-UPPER, got.hypergradient, x), got.moved.y, got.state
    return x["x"], y["y"], len(list(lower)), len(list(upper))


@dataclass
class Hand:
    """Where a loop written out is, and its batches in the order it draws them."""

    x: torch.Tensor
    y: torch.Tensor
    v: torch.Tensor
    lower: object
    upper: object
    call: int = 0

    def all_of(self, orders, blocks):
        met = set()
        while len(met) < blocks:
            met.add(next(orders))


def by_hand(body, steps=4):
    h = Hand(p.x["x"], p.y["y"], torch.zeros(3, dtype=torch.float64), iter(LOWER), iter(UPPERS))
    kept = {}
    for h.call in range(steps):
        body(h, kept)
    return h.x, h.y, len(list(h.lower)), len(list(h.upper))


def three(h, i, j, x, y, v):
    """(∇y G, ∂²yy G v − ∇y F, ∇x F − ∂²xy G v) on one batch of each."""
    F_x, F_y = p.F_xy(j, x, y)
    return p.G_y(i, x, y), p.H(i, x, y) @ v - F_y, F_x - p.J(i, x, y, v)


def soba(h, kept):
    d = three(h, next(h.lower), next(h.upper), h.x, h.y, h.v)
    h.y, h.v, h.x = h.y - LR * d[0], h.v - ADJOINT * d[1], h.x - UPPER * d[2]


def ma_soba(h, kept):
    d = three(h, next(h.lower), next(h.upper), h.x, h.y, h.v)
    kept.setdefault("h", d[2])
    h.y, h.v, h.x = h.y - LR * d[0], h.v - ADJOINT * d[1], h.x - UPPER * kept["h"]
    kept["h"] = 0.7 * kept["h"] + 0.3 * d[2]


def saba(h, kept):
    i, j = next(h.lower), next(h.upper)
    F_x, F_y = p.F_xy(j, h.x, h.y)
    now = {"g": p.G_y(i, h.x, h.y), "Hv": p.H(i, h.x, h.y) @ h.v, "Jv": p.J(i, h.x, h.y, h.v)}
    now |= {"F_x": F_x, "F_y": F_y}
    d = {}
    for name, value in now.items():
        block, blocks = (j, M) if name.startswith("F") else (i, N)
        table = kept.setdefault(name, torch.zeros(blocks, len(value), dtype=torch.float64))
        d[name] = value - table[block] + table.mean(0)
        table[block] = value
    h.y = h.y - LR * d["g"]
    h.v, h.x = h.v - ADJOINT * (d["Hv"] - d["F_y"]), h.x - UPPER * (d["F_x"] - d["Jv"])


def whole(h):
    pairs = [three(h, i, j, h.x, h.y, h.v) for i in range(N) for j in range(M)]
    return [torch.stack(part).mean(0) for part in zip(*pairs, strict=True)]


def srba(h, kept):
    if h.call % 2 == 0:
        h.all_of(h.lower, N)
        h.all_of(h.upper, M)
        kept["d"] = whole(h)
    else:
        i, j = next(h.lower), next(h.upper)
        now, old = three(h, i, j, h.x, h.y, h.v), three(h, i, j, *kept["before"])
        kept["d"] = [d + a - b for d, a, b in zip(kept["d"], now, old, strict=True)]
    kept["before"], d = (h.x, h.y, h.v), kept["d"]
    h.y, h.v, h.x = h.y - LR * d[0], h.v - ADJOINT * d[1], h.x - UPPER * d[2]


def summed(factors, b, x, y):
    """η Σ_q Π (I − η H) b, the products growing by one batch at a time."""
    term = result = b
    for f in factors:
        term = term - ADJOINT * p.H(f, x, y) @ term
        result = result + term
    return ADJOINT * result


def drawn(factors, b, x, y):
    """K η Π_{p factors} (I − η H) b."""
    for f in factors:
        b = b - ADJOINT * p.H(f, x, y) @ b
    return 3 * ADJOINT * b


def power(h, step=0):
    stream = rng.stream(7, f"series.{h.call}.{step}")
    return int(torch.randint(3, (), generator=stream))


def two_loops(adjoint, steps):
    """y steps, the adjoint, the upper direction at both: BSA, TTSA, stocBiO, AmIGO."""

    def body(h, kept):
        for _ in range(steps):
            h.y = h.y - LR * p.G_y(next(h.lower), h.x, h.y)
        j = next(h.upper)
        F_x, F_y = p.F_xy(j, h.x, h.y)
        h.v, i = adjoint(h, F_y)
        h.x = h.x - UPPER * (F_x - p.J(i, h.x, h.y, h.v))

    return body


def stocbio_adjoint(h, F_y):
    i = next(h.lower)
    return summed([next(h.lower) for _ in range(3)], F_y, h.x, h.y), i


def bsa_adjoint(h, F_y):
    i = next(h.lower)
    return drawn([next(h.lower) for _ in range(power(h))], F_y, h.x, h.y), i


def amigo_adjoint(h, F_y):
    v = h.v
    for _ in range(3):
        v = v - ADJOINT * (p.H(next(h.lower), h.x, h.y) @ v - F_y)
    return v, next(h.lower)


def fsla(h, kept):
    before_y, before_v = h.y, h.v
    h.y = h.y - LR * p.G_y(next(h.lower), h.x, h.y)
    j = next(h.upper)
    h.v = h.v - ADJOINT * (p.H(next(h.lower), h.x, h.y) @ h.v - p.F_xy(j, h.x, h.y)[1])
    i = next(h.lower)
    d = p.F_xy(j, h.x, h.y)[0] - p.J(i, h.x, h.y, h.v)
    if h.call:
        x = kept["x"]
        old = p.F_xy(j, x, before_y)[0] - p.J(i, x, before_y, before_v)
        d = d + (1 - 0.3) * (kept["d"] - old)
    kept["x"], kept["d"] = h.x, d
    h.x = h.x - UPPER * d


def storms(series, count):
    """SUSTAIN and MRBO: STORM for y and for the whole hypergradient with its series."""

    def body(h, kept):
        i, j = next(h.lower), next(h.upper)
        factors = [next(h.lower) for _ in range(count(h))]

        def at(x, y):
            F_x, F_y = p.F_xy(j, x, y)
            return [p.G_y(i, x, y), F_x - p.J(i, x, y, series(factors, F_y, x, y))]

        d = at(h.x, h.y)
        if h.call:
            old = at(*kept["before"])
            d = [
                0.3 * new + 0.7 * (last + new - past)
                for new, last, past in zip(d, kept["d"], old, strict=True)
            ]
        kept["before"], kept["d"] = (h.x, h.y), d
        h.y, h.x = h.y - LR * d[0], h.x - UPPER * d[1]

    return body


def vrbo(h, kept):
    """Period 3, two steps of y a call: the full pass at the first of every third step."""
    for _ in range(2):
        i, j = next(h.lower), next(h.upper)
        factors = [next(h.lower) for _ in range(2)]

        def at(x, y, i=i, j=j, factors=factors):
            F_x, F_y = p.F_xy(j, x, y)
            return [p.G_y(i, x, y), F_x - p.J(i, x, y, summed(factors, F_y, x, y))]

        if kept.setdefault("age", 0) % 3 == 0:
            drain(h, i, j)
            kept["d"] = full_series(h)
        else:
            changes = zip(kept["d"], at(h.x, h.y), at(*kept["before"]), strict=True)
            kept["d"] = [d + a - b for d, a, b in changes]
        kept["before"] = (h.x, h.y)
        kept["age"] += 1
        h.y = h.y - LR * kept["d"][0]
    h.x = h.x - UPPER * kept["d"][1]


def drain(h, i, j):
    """A pass begins with the batches drawn already and draws on until all blocks are met."""
    for orders, first, blocks in ((h.lower, i, N), (h.upper, j, M)):
        met = {first}
        while len(met) < blocks:
            met.add(next(orders))


def full_series(h):
    F = [p.F_xy(j, h.x, h.y) for j in range(M)]
    F_x, F_y = (torch.stack(part).mean(0) for part in zip(*F, strict=True))
    H = torch.stack([p.H(i, h.x, h.y) for i in range(N)]).mean(0)
    term = result = F_y
    for _ in range(2):
        term = term - ADJOINT * H @ term
        result = result + term
    J = torch.stack([p.J(i, h.x, h.y, ADJOINT * result) for i in range(N)]).mean(0)
    return torch.stack([p.G_y(i, h.x, h.y) for i in range(N)]).mean(0), F_x - J


COMMON = {"lower_lr": LR, "adjoint_lr": ADJOINT, "seed": 7}
STORM = {"name": "storm", "momentum": 0.3}
SPIDER = {"name": "spider", "period": 2}
THREE = {"adjoint_steps": 3}
LOOPS = {
    "bsa": ({"lower_steps": 2} | THREE, two_loops(bsa_adjoint, 2)),
    "ttsa": (THREE, two_loops(bsa_adjoint, 1)),
    "stocbio": ({"lower_steps": 2} | THREE, two_loops(stocbio_adjoint, 2)),
    "amigo": ({"lower_steps": 2} | THREE, two_loops(amigo_adjoint, 2)),
    "fsla": ({"upper_direction": STORM}, fsla),
    "soba": ({}, soba),
    "saba": ({}, saba),
    "srba": ({f"{q}_direction": SPIDER for q in ("lower", "adjoint", "upper")}, srba),
    "ma_soba": ({"upper_direction": {"name": "average", "weight": 0.3, "lagged": True}}, ma_soba),
    "sustain": (
        {"lower_direction": STORM, "upper_direction": STORM} | THREE,
        storms(drawn, power),
    ),
    "mrbo": (
        {"lower_direction": STORM, "upper_direction": STORM} | THREE,
        storms(summed, lambda h: 3),
    ),
    "vrbo": (
        {"adjoint_steps": 2, "lower_steps": 2}
        | {f"{q}_direction": {"name": "spider", "period": 3} for q in ("lower", "upper")},
        vrbo,
    ),
}


def preset(name):
    return build("estimators", {"name": name, **COMMON, **LOOPS[name][0]})


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


# oracle calls ----------------------------------------------------------------------------------

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


# expectations ----------------------------------------------------------------------------------

V = {"y": torch.tensor([0.4, -1.0, 0.3], dtype=torch.float64)}
STATE = {"calls": 0, "v": V, "memory": {}, "before": {}}


def directions(estimator, lower, upper, state=STATE):
    """(d_y, d_v, d_x) of one call on given batches, read off from where it moved."""
    got = ask(estimator, p.x, p.y, state, p.batches(lower, N), p.batches(upper, M))
    d_y = tree.scale(1 / LR, tree.sub(p.y, got.moved.y))["y"]
    d_v = tree.scale(1 / ADJOINT, tree.sub(V, got.state["v"]))["y"]
    return d_y, d_v, got.hypergradient["x"]


def truth():
    h = Hand(p.x["x"], p.y["y"], V["y"], None, None)
    return whole(h)


def mean(rows):
    return [torch.stack(part).mean(0) for part in zip(*rows, strict=True)]


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


# directions ------------------------------------------------------------------------------------


def vector(*values):
    return {"a": torch.tensor(values, dtype=torch.float64)}


def made(now, before=None, full=None, block=(0, 1)):
    """A draw of given values; what is not given must not be asked for."""

    def give(value):
        def call():
            assert value is not None, "asked for what it does not need"
            return {"lower": value}

        return call

    return Draw(give(now), give(before), give(full), lambda share: block)


def test_storm_at_momentum_one_is_the_draw():
    d, memory = Storm(momentum=1.0).take(made(vector(1.0)), {})
    d, memory = Storm(momentum=1.0).take(made(vector(5.0)), memory)
    assert d == vector(5.0)
    assert not Storm(momentum=1.0).looks_back


def test_storm_follows_its_formula_and_its_own_draw_first():
    d, memory = Storm(momentum=0.25).take(made(vector(2.0)), {})
    assert d == vector(2.0)
    d, _ = Storm(momentum=0.25).take(made(vector(3.0), before=vector(1.0)), memory)
    assert d == vector(3.0 + 0.75 * (2.0 - 1.0))


def test_spider_telescopes_to_the_full_direction():
    """One block: d_t is q(z_t) exactly, by a pass every fourth time and differences between."""
    points, memory, passes = [1.0, 4.0, -2.0, 0.5, 3.0, 7.0], {}, 0
    for t, point in enumerate(points):
        full = vector(point**2) if t % 4 == 0 else None
        before = vector(points[t - 1] ** 2) if t % 4 else None
        now = vector(point**2) if t % 4 else None
        d, memory = Spider(period=4).take(made(now, before, full), memory)
        passes += full is not None
        assert d == vector(point**2)
    assert passes == 2


def test_spider_keeps_the_error_of_no_batch_while_z_rests():
    d, memory = Spider(period=9).take(made(None, full=vector(3.0)), {})
    for noise in (10.0, -4.0):
        d, memory = Spider(period=9).take(made(vector(noise), vector(noise)), memory)
    assert d == vector(3.0)


def test_saga_is_the_full_direction_once_its_table_is_full_at_rest():
    rows, memory = [1.0, 5.0, -3.0], {}
    for block, value in enumerate(rows):
        _, memory = Saga().take(made(vector(value), block=(block, 3)), memory)
    for block, value in enumerate(rows):
        d, _ = Saga().take(made(vector(value), block=(block, 3)), memory)
        assert d == vector(1.0)


def test_saga_writes_into_no_state_it_was_given():
    _, memory = Saga().take(made(vector(1.0), block=(0, 2)), {})
    kept = {"mean": memory["lower"]["mean"]["a"].clone(), "rows": set(memory["lower"]["rows"])}
    Saga().take(made(vector(7.0), block=(1, 2)), memory)
    Saga().take(made(vector(9.0), block=(0, 2)), memory)
    assert torch.equal(memory["lower"]["mean"]["a"], kept["mean"])
    assert set(memory["lower"]["rows"]) == kept["rows"]
    assert memory["lower"]["rows"]["0"] == vector(1.0)


LAGGED = build("estimators", "ma_soba").upper_direction


def test_average_forgets_at_its_weight():
    _, memory = Average(weight=0.25).take(made(vector(4.0)), {})
    d, _ = Average(weight=0.25).take(made(vector(8.0)), memory)
    assert d == vector(0.75 * 4.0 + 0.25 * 8.0)


def test_a_lagged_average_has_every_draw_but_the_present():
    draws, plain, lagged = (4.0, 8.0, -2.0, 7.0), [], []
    for direction, taken in ((Average(weight=0.25), plain), (replace(LAGGED, weight=0.25), lagged)):
        memory = {}
        for value in draws:
            d, memory = direction.take(made(vector(value)), memory)
            taken.append(d)
    assert lagged == [vector(4.0), *plain[:-1]]
    assert LAGGED.lagged  # what ma_soba moves along


def loss_over(orders):
    draws = iter(orders)
    return Loss(lambda x, y, b: y["y"].sum(), next(draws), Counts(), "lower", draws)


def test_a_pass_has_each_block_once_in_order():
    orders = [{"block": b, "blocks": 3} for b in (1, 1, 0, 1, 2, 0)]
    assert [loss.batch["block"] for loss in every_block(loss_over(orders))] == [0, 1, 2]


def test_a_pass_waits_for_a_block_that_is_late():
    """Fifty draws a block are allowed: 100 for two of them."""
    late = [{"block": 0, "blocks": 2}] * 99 + [{"block": 1, "blocks": 2}]
    assert [loss.batch["block"] for loss in every_block(loss_over(late))] == [0, 1]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"data": 1}, 'lower: .*dicts with "block"'),
        (torch.ones(2), "a Tensor, does not say"),
        ({"block": 3, "blocks": 3}, "block 3 of 3"),
        ({"block": 0, "blocks": 2}, "met 1 of 2 blocks in 100 batches"),
    ],
)
def test_batches_that_name_no_block_are_refused(batch, message):
    with pytest.raises(ProblemError, match=message):
        every_block(loss_over(itertools.repeat(batch)))


def test_no_batch_at_all_is_one_block():
    loss = Loss(lambda x, y, b: y["y"].sum(), None, Counts(), "lower")
    assert every_block(loss) == [loss]


# the component ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"adjoint_steps": 2},
        {"adjoint": "series", "adjoint_direction": Storm()},
        {"lower_lr": 0.0},
    ],
)
def test_combinations_that_say_nothing_are_refused(options):
    with pytest.raises(ValidationError):
        SingleLoop(**options)


@pytest.mark.parametrize(
    ("options", "fresh"),
    [
        ({}, False),
        ({"lower_steps": 2}, True),
        ({"order": "sequential"}, True),
        ({"adjoint": "series", "adjoint_steps": 3}, True),
        ({"upper_direction": Storm()}, False),
        ({"upper_direction": Average()}, False),
        ({"upper_direction": Saga()}, True),
        ({"lower_direction": Spider()}, True),
    ],
    ids=str,
)
def test_batches_of_its_own_are_asked_for_where_they_are_drawn(options, fresh):
    """Saga and Spider have to be told blocks, which only batches that are drawn have."""
    estimator = SingleLoop(**options)
    assert estimator.needs.fresh is fresh
    tight = estimator.tight(3)
    assert all(not d.by_block for d in (tight.lower_direction, tight.upper_direction))


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
    with pytest.raises(ProblemError, match="no set that holds y"):
        estimate_at(
            lambda x, y, b: (y["y"] - x["x"]).square().sum(),
            lambda x, y, b: (y["y"] + x["x"]).square().sum(),
            p.x,
            {"y": p.x["x"]},
            estimator=SingleLoop(),
            project=lambda y: y,
        )


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


def quadratic_setup(problem, estimator, steps=1):
    upper = Upper(steps=steps, optimizer=SGD(lr=0.1))
    return Setup(problem, Gradient(), upper, estimator, dtype=torch.float64)


def verdicts(problem, names, **options):
    setup = quadratic_setup(problem, SingleLoop())
    asked = {n: build("estimators", {"name": n, **options}) for n in names}
    return {row.name: row.verdict for row in check(setup, asked) if isinstance(row, CheckRow)}


def test_what_they_settle_at_is_the_hypergradient():
    small, long = Quadratic(num_lower=4, condition=4.0), {"lower_lr": 0.8, "adjoint_lr": 0.8}
    found = verdicts(small, ["soba", "amigo", "fsla", "ma_soba"], **long)
    assert set(found.values()) == {"exact"}
    whole = SimulatedQuadratic(num_lower=4, upper_samples=64, lower_samples=512)
    assert set(verdicts(whole, ["saba", "srba"], **long).values()) == {"exact"}
    kept = {"lower_steps": 400, "tolerance": 1e-9}  # their own directions, which tight replaces
    for name in ("saba", "srba"):
        estimator = build("estimators", {"name": name, **long, **kept})
        assert at_rest(estimator, whole) < 1e-7
    assert set(verdicts(small, ["stocbio", "sustain"]).values()) == {"approximate"}


def at_rest(estimator, problem):
    """The relative error after all steps of one call at y*."""
    x = tree.map(lambda e: e + 1.0, problem.init(rng.Streams(0))[0])
    batch = next(problem.lower_batches(rng.stream(0, "")))
    other = next(problem.upper_batches(rng.stream(0, "")))
    got = hypergradient(
        problem.upper_loss,
        problem.lower_loss,
        x,
        problem.lower_solution(x),
        estimator=estimator,
        upper_batch=other,
        lower_batch=batch,
        upper_batches=itertools.repeat(other),
        lower_batches=itertools.repeat(batch),
    )
    truth = problem.hypergradient(x)
    return tree.norm(tree.sub(got.hypergradient, truth)) / tree.norm(truth)


@pytest.mark.parametrize("name", ["soba", "fsla", "mrbo"])
def test_they_hold_the_contract_of_estimators(name):
    estimator = build("estimators", {"name": name, "lower_lr": 0.3, "adjoint_lr": 0.3})
    check_estimator(estimator, seeds=(0,))


class Halved:
    """SOBA with a wrong adjoint step, which claims what SOBA does."""

    claim = "solution"

    def __init__(self, of):
        self.of, self.needs = of, of.needs

    def tight(self, dim):
        return Halved(self.of.tight(dim))

    def init(self, at):
        return self.of.init(at)

    def estimate(self, losses, at, state):
        function = losses.upper.function
        half = replace(losses.upper, function=lambda x, y, b: function(x, y, b) / 2)
        return self.of.estimate(replace(losses, upper=half), at, state)


def test_and_a_wrong_one_is_told():
    setup = quadratic_setup(Quadratic(num_lower=4, condition=4.0), SingleLoop())
    rows = [
        r
        for r in check(setup, {"halved": Halved(SingleLoop(lower_lr=0.8, adjoint_lr=0.8))})
        if isinstance(r, CheckRow)
    ]
    assert rows[0].verdict == "wrong"


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


def test_rest_is_relative_to_the_size_of_F():
    """The adjoint's residual to ‖∇y F‖, and the change of d_x to d_x: 1e4 F settles as F does."""
    problem = Quadratic(num_lower=4, condition=4.0)
    x = {"x": torch.ones(5, dtype=torch.float64)}
    y, batch = problem.lower_solution(x), problem.constants

    def ask_for(size, steps):
        return hypergradient(
            lambda *at: size * problem.upper_loss(*at),
            problem.lower_loss,
            x,
            y,
            estimator=SingleLoop(lower_steps=steps, tolerance=1e-6, lower_lr=0.5, adjoint_lr=0.5),
            upper_batch=batch,
            lower_batch=batch,
            upper_batches=itertools.repeat(batch),
            lower_batches=itertools.repeat(batch),
        ).stats

    few, many = (tuple(ask_for(size, steps) for size in (1.0, 1e4, 1e-4)) for steps in (3, 5000))
    assert few[0].residual > 0.01
    for stats in few:
        assert stats.residual == pytest.approx(few[0].residual, rel=1e-9)
    assert len({stats.iterations for stats in many}) == 1
    assert all(stats.converged for stats in many)


def test_y_at_rest_is_told_by_its_gradient():
    """With F blind to y, v and d_x rest from the first step: y alone says when to end."""
    problem = Quadratic(num_lower=4, condition=4.0)
    x = {"x": torch.ones(5, dtype=torch.float64)}
    y, batch = tree.scale(3.0, problem.lower_solution(x)), problem.constants
    got = hypergradient(
        lambda x, y, b: x["x"].square().sum() + 0.0 * y["y"].sum(),
        problem.lower_loss,
        x,
        y,
        estimator=SingleLoop(lower_steps=5000, tolerance=1e-6, lower_lr=0.5),
        upper_batch=batch,
        lower_batch=batch,
        upper_batches=itertools.repeat(batch),
        lower_batches=itertools.repeat(batch),
    )
    assert 10 < got.stats.iterations < 1000
    assert got.moved is not None
    assert got.moved.gradient_norm <= 1e-6
    # the smallest curvature of G is the largest, 1, over the condition number
    off = tree.norm(tree.sub(got.moved.y, problem.lower_solution(x)))
    assert off <= 4.0 * 1e-6


def test_one_that_has_not_settled_says_so():
    problem = Quadratic(num_lower=4, condition=4.0)
    x = {"x": torch.ones(5, dtype=torch.float64)}
    y, batch = problem.lower_solution(x), problem.constants

    def ask_for(steps):
        return hypergradient(
            problem.upper_loss,
            problem.lower_loss,
            x,
            y,
            estimator=SingleLoop(lower_steps=steps, tolerance=1e-8),
            upper_batch=batch,
            lower_batch=batch,
            upper_batches=itertools.repeat(batch),
            lower_batches=itertools.repeat(batch),
        ).stats

    few, many = ask_for(3), ask_for(5000)
    assert few.converged is False
    assert few.residual > 0.1
    assert few.iterations == 3
    assert many.converged
    assert many.residual <= 1e-8
    assert many.iterations < 1500


# in a run --------------------------------------------------------------------------------------

SMALL = SimulatedQuadratic(
    num_upper=2, num_lower=3, upper_samples=8, lower_samples=16, batch_size=4
)


@pytest.mark.parametrize("name", ["saba", "srba", "vrbo", "sustain", "fsla"])
def test_a_resumed_run_is_the_whole_one(name):
    setup = quadratic_setup(SMALL, build("estimators", name), steps=7)
    whole = start(setup)
    list(run(setup, whole))
    half = replace(setup, upper=Upper(steps=3, optimizer=SGD(lr=0.1)))
    state = start(half)
    list(run(half, state))
    resumed = restore(setup, state.save())
    list(run(setup, resumed))
    for a, b in ((whole.x, resumed.x), (whole.y, resumed.y)):
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_in_a_run_y_is_moved_by_the_estimator_alone():
    setup = quadratic_setup(SMALL, build("estimators", "soba"), steps=3)
    state = start(setup)
    first = (tree.clone(state.x)["x"], tree.clone(state.y)["y"])
    draws = [SMALL.lower_batches(rng.stream(0, "lower.batches")), None]
    draws[1] = SMALL.upper_batches(rng.stream(0, "upper.batches"))
    list(run(setup, state))
    x, y = first
    v = torch.zeros_like(y)
    for _ in range(3):
        g, f = next(draws[0]), next(draws[1])
        G_y = g["yy"] @ y + x @ g["xy"] + g["y"]
        F_x, F_y = f["xx"] @ x + f["xy"] @ y + f["x"], f["yy"] @ y + x @ f["xy"] + f["y"]
        d_v, h = g["yy"] @ v - F_y, F_x - g["xy"] @ v
        x, y, v = x - 0.1 * h, y - 0.1 * G_y, v - 0.1 * d_v
    torch.testing.assert_close(state.x["x"], x, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(state.y["y"], y, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(state.estimator["v"]["y"], v, rtol=1e-12, atol=1e-13)
