"""Single-loop methods as loops written out, with a problem and batches to run them on."""

from dataclasses import dataclass
from functools import partial

import torch

from bilevel import rng
from bilevel.registry.build import build
from tests.cases import ask_drawing

N, M = 3, 2  # blocks of G, of F
LR, ADJOINT, UPPER = 0.1, 0.15, 0.2


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


V = {"y": torch.tensor([0.4, -1.0, 0.3], dtype=torch.float64)}


def truth():
    h = Hand(p.x["x"], p.y["y"], V["y"], None, None)
    return whole(h)


def mean(rows):
    return [torch.stack(part).mean(0) for part in zip(*rows, strict=True)]
