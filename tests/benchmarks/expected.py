"""E ‖∇Φ(x_t)‖² of the stochastic presets on the simulated quadratic, exactly: no draw is made.

There each iteration is a random matrix M(ξ) applied to the state s = (1, x, y, v, memory), ξ
independent of what came before. So S_t = E s_t s_tᵀ obeys S_{t+1} = mean over ξ of M(ξ) S_t M(ξ)ᵀ,
and ∇Φ, which is affine in x, has E ‖∇Φ‖² = tr(W S Wᵀ). The loops are those of the papers that the
presets name, with the differences that docs/estimators/stochastic.md lists; nothing of the library
is used but the coefficients of the problem.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bilevel_problems.simulated_quadratic import SimulatedQuadratic

State = dict[str, Tensor]
"""Slots of the state by name; [d, n]: n states at once."""


@dataclass(frozen=True)
class Blocks:
    """The quantities of the methods on a block i of G and j of F; None: on the whole."""

    problem: SimulatedQuadratic

    @property
    def counts(self) -> tuple[int, int]:
        return len(self.problem.lower["y"]), len(self.problem.upper["y"])

    def _of(self, level: str, block: int | None) -> State:
        rows = getattr(self.problem, level)
        return {k: v.mean(0) if block is None else v[block] for k, v in rows.items()}

    def G_y(self, i: int | None, s: State, p: str = "") -> Tensor:
        k = self._of("lower", i)
        return k["yy"] @ s["y" + p] + k["xy"].T @ s["x" + p] + k["y"][:, None] * s["1"]

    def F_y(self, j: int | None, s: State, p: str = "") -> Tensor:
        k = self._of("upper", j)
        return k["yy"] @ s["y" + p] + k["xy"].T @ s["x" + p] + k["y"][:, None] * s["1"]

    def F_x(self, j: int | None, s: State, p: str = "") -> Tensor:
        k = self._of("upper", j)
        return k["xx"] @ s["x" + p] + k["xy"] @ s["y" + p] + k["x"][:, None] * s["1"]

    def H(self, i: int | None, v: Tensor) -> Tensor:
        return self._of("lower", i)["yy"] @ v

    def J(self, i: int | None, v: Tensor) -> Tensor:
        return self._of("lower", i)["xy"] @ v

    def slope(self) -> Tensor:
        """W with ∇Φ = W (1, x): at y*(x) and v*(x) of the whole."""
        n = self.problem.num_upper
        s = {"1": torch.eye(1, n + 1), "x": torch.eye(n + 1)[1:]}
        s = {name: part.double() for name, part in s.items()}
        G, F = self._of("lower", None), self._of("upper", None)
        s["y"] = -torch.linalg.solve(G["yy"], G["xy"].T @ s["x"] + G["y"][:, None] * s["1"])
        v = torch.linalg.solve(
            G["yy"], F["yy"] @ s["y"] + F["xy"].T @ s["x"] + F["y"][:, None] * s["1"]
        )
        return self.F_x(None, s) - G["xy"] @ v


LOWER, UPPER, BOTH, WHOLE = "lower", "upper", "both", "whole"
Move = tuple[str, Callable[[State, int | None, int | None], State]]
"""(what is drawn, the state after it): linear in the state."""


@dataclass(frozen=True)
class Powers:
    """p factors, p drawn evenly from 0 … count − 1."""

    factor: Move
    count: int


class Loop:
    """A method: the moves of its call number t. `y` and `v` are stepped by `lr`, x by `upper`."""

    period = 64
    """Of the full passes, where there are any."""

    def __init__(self, blocks: Blocks, lr: float, upper: float, terms: int = 10) -> None:
        self.b, self.lr, self.upper, self.terms = blocks, lr, upper, terms

    def slots(self) -> dict[str, int]:
        n, m = self.b.problem.num_upper, self.b.problem.num_lower
        return {"1": 1, "x": n, "y": m, "v": m, **self.memory(n, m)}

    def memory(self, n: int, m: int) -> dict[str, int]:
        return {}

    def call(self, t: int) -> list[Move | Powers]:
        raise NotImplementedError

    def three(self, i, j, s: State, p: str = "") -> list[Tensor]:
        b, v = self.b, s["v" + p]
        return [b.G_y(i, s, p), b.H(i, v) - b.F_y(j, s, p), b.F_x(j, s, p) - b.J(i, v)]

    def move(self, s: State, d: list[Tensor]) -> State:
        """All three steps from one point."""
        y, v, x = s["y"] - self.lr * d[0], s["v"] - self.lr * d[1], s["x"] - self.upper * d[2]
        return s | {"x": x, "y": y, "v": v}


class Soba(Loop):
    def call(self, t):
        return [(BOTH, self.step)]

    def step(self, s, i, j):
        return self.move(s, self.three(i, j, s))


class MaSoba(Loop):
    """x moves along the average of the draws before; at first along the draw itself."""

    def memory(self, n, m):
        return {"h": n}

    def call(self, t):
        return [(BOTH, self.step if t else self.begin)]

    def begin(self, s, i, j):
        d = self.three(i, j, s)
        return self.move(s, d) | {"h": d[2]}

    def step(self, s, i, j):
        g, r, d = self.three(i, j, s)
        return self.move(s, [g, r, s["h"]]) | {"h": 0.9 * s["h"] + 0.1 * d}


class Saba(Loop):
    """A table for each of ∇y G, Hv, Jv, ∇x F, ∇y F."""

    def memory(self, n, m):
        N, M = self.b.counts
        return {"g": N * m, "Hv": N * m, "Jv": N * n, "F_x": M * n, "F_y": M * m}

    def call(self, t):
        return [(BOTH, self.step)]

    def step(self, s, i, j):
        b, kept, d = self.b, {}, {}
        now = {"g": b.G_y(i, s), "Hv": b.H(i, s["v"]), "Jv": b.J(i, s["v"])}
        now |= {"F_x": b.F_x(j, s), "F_y": b.F_y(j, s)}
        for name, value in now.items():
            blocks, block = (b.counts[1], j) if name[0] == "F" else (b.counts[0], i)
            table = s[name].unflatten(0, (blocks, -1)).clone()
            d[name] = value - table[block] + table.mean(0)
            table[block] = value
            kept[name] = table.flatten(0, 1)
        return self.move(s, [d["g"], d["Hv"] - d["F_y"], d["F_x"] - d["Jv"]]) | kept


class Srba(Loop):
    """A full pass every `period` iterations, differences on one batch in between."""

    def memory(self, n, m):
        return {"x'": n, "y'": m, "v'": m, "dy": m, "dv": m, "dx": n}

    def call(self, t):
        return [(BOTH, self.change) if t % self.period else (WHOLE, self.full)]

    def full(self, s, i, j):
        return self.along(s, self.three(None, None, s))

    def change(self, s, i, j):
        pairs = zip(("dy", "dv", "dx"), self.three(i, j, s), self.three(i, j, s, "'"), strict=True)
        return self.along(s, [s[k] + a - b for k, a, b in pairs])

    def along(self, s, d):
        before = {"x'": s["x"], "y'": s["y"], "v'": s["v"]}
        return self.move(s, d) | before | dict(zip(("dy", "dv", "dx"), d, strict=True))


class TwoLoops(Loop):
    """Steps of y, the adjoint, a step of x: BSA, TTSA, stocBiO; AmIGO, which keeps v."""

    def __init__(self, *given, steps: int, adjoint: str) -> None:
        super().__init__(*given)
        self.steps, self.adjoint = steps, adjoint

    def memory(self, n, m):
        return {"F_x": n, "F_y": m, "sum": m}

    def call(self, t):
        middle = {
            "series": [(LOWER, self.add)] * self.terms,
            "random": [Powers((LOWER, self.factor), self.terms)],
            "steps": [(LOWER, self.solve)] * self.terms,
        }
        return [
            *[(LOWER, self.descend)] * self.steps,
            (UPPER, self.ask),
            *middle[self.adjoint],
            (LOWER, self.finish),
        ]

    def descend(self, s, i, j):
        return s | {"y": s["y"] - self.lr * self.b.G_y(i, s)}

    def ask(self, s, i, j):
        F_y = self.b.F_y(j, s)
        return s | {"F_x": self.b.F_x(j, s), "F_y": F_y, "sum": F_y}

    def factor(self, s, i, j):
        return s | {"F_y": s["F_y"] - self.lr * self.b.H(i, s["F_y"])}

    def add(self, s, i, j):
        s = self.factor(s, i, j)
        return s | {"sum": s["sum"] + s["F_y"]}

    def solve(self, s, i, j):
        return s | {"v": s["v"] - self.lr * (self.b.H(i, s["v"]) - s["F_y"])}

    def finish(self, s, i, j):
        v = {
            "series": self.lr * s["sum"],
            "random": self.terms * self.lr * s["F_y"],
            "steps": s["v"],
        }[self.adjoint]
        return s | {"x": s["x"] - self.upper * (s["F_x"] - self.b.J(i, v))}


class Fsla(Loop):
    """A step of y, of v, and STORM for x, all on batches of their own."""

    momentum = 0.1

    def memory(self, n, m):
        return {"x'": n, "y'": m, "v'": m, "d": n, "F_x": n, "F_x'": n, "F_y": m}

    def call(self, t):
        last = self.finish if t else self.begin
        return [(LOWER, self.descend), (UPPER, self.ask), (LOWER, self.solve), (LOWER, last)]

    def descend(self, s, i, j):
        return s | {"y": s["y"] - self.lr * self.b.G_y(i, s)}

    def ask(self, s, i, j):
        b = self.b
        return s | {"F_x": b.F_x(j, s), "F_x'": b.F_x(j, s, "'"), "F_y": b.F_y(j, s)}

    def solve(self, s, i, j):
        return s | {"v": s["v"] - self.lr * (self.b.H(i, s["v"]) - s["F_y"])}

    def begin(self, s, i, j):
        return self.along(s, s["F_x"] - self.b.J(i, s["v"]))

    def finish(self, s, i, j):
        now, old = s["F_x"] - self.b.J(i, s["v"]), s["F_x'"] - self.b.J(i, s["v'"])
        return self.along(s, now + (1 - self.momentum) * (s["d"] - old))

    def along(self, s, d):
        before = {"x'": s["x"], "y'": s["y"], "v'": s["v"], "d": d}
        return s | before | {"x": s["x"] - self.upper * d}


class Storms(Loop):
    """STORM for y and for the hypergradient with its series: SUSTAIN (random) and MRBO (summed)."""

    momentum = 0.5

    def __init__(self, *given, summed: bool) -> None:
        super().__init__(*given)
        self.summed = summed

    def memory(self, n, m):
        kept = {"x'": n, "y'": m, "dy": m, "dx": n}
        return kept | {"F_x": n, "F_y": m, "sum": m} | {"F_x'": n, "F_y'": m, "sum'": m}

    def call(self, t):
        factors = [(LOWER, self.factor)] * self.terms
        middle = factors if self.summed else [Powers((LOWER, self.factor), self.terms)]
        last = self.finish if t else self.begin
        return [(UPPER, self.ask), *middle, (LOWER, last), (WHOLE, self.step_x)]

    def ask(self, s, i, j):
        for p in ("", "'"):
            F_y = self.b.F_y(j, s, p)
            s = s | {"F_x" + p: self.b.F_x(j, s, p), "F_y" + p: F_y, "sum" + p: F_y}
        return s

    def factor(self, s, i, j):
        for p in ("", "'"):
            term = s["F_y" + p] - self.lr * self.b.H(i, s["F_y" + p])
            s = s | {"F_y" + p: term, "sum" + p: s["sum" + p] + term}
        return s

    def quantities(self, s, i, p=""):
        v = self.lr * (s["sum" + p] if self.summed else self.terms * s["F_y" + p])
        return [self.b.G_y(i, s, p), s["F_x" + p] - self.b.J(i, v)]

    def begin(self, s, i, j):
        return self.along(s, *self.quantities(s, i))

    def finish(self, s, i, j):
        pairs = zip(("dy", "dx"), self.quantities(s, i), self.quantities(s, i, "'"), strict=True)
        return self.along(s, *(a + (1 - self.momentum) * (s[k] - b) for k, a, b in pairs))

    def along(self, s, dy, dx):
        return s | {"x'": s["x"], "y'": s["y"], "dy": dy, "dx": dx, "y": s["y"] - self.lr * dy}

    def step_x(self, s, i, j):
        return s | {"x": s["x"] - self.upper * s["dx"]}


class Vrbo(Storms):
    """SPIDER for both over three steps of y, the first of a period being the full pass."""

    steps = 3

    def __init__(self, *given) -> None:
        super().__init__(*given, summed=True)

    def call(self, t):
        change = [(UPPER, self.ask), *[(LOWER, self.factor)] * self.terms, (LOWER, self.change)]
        moves = []
        for age in range(t * self.steps, (t + 1) * self.steps):
            moves += change if age % self.period else [(WHOLE, self.full)]
        return [*moves, (WHOLE, self.step_x)]

    def full(self, s, i, j):
        s = self.ask(s, None, None)
        for _ in range(self.terms):
            s = self.factor(s, None, None)
        return self.along(s, *self.quantities(s, None))

    def change(self, s, i, j):
        pairs = zip(("dy", "dx"), self.quantities(s, i), self.quantities(s, i, "'"), strict=True)
        return self.along(s, *(s[k] + a - b for k, a, b in pairs))


METHODS: dict[str, Callable[..., Loop]] = {
    "bsa": partial(TwoLoops, steps=10, adjoint="random"),
    "ttsa": partial(TwoLoops, steps=1, adjoint="random"),
    "stocbio": partial(TwoLoops, steps=10, adjoint="series"),
    "amigo": partial(TwoLoops, steps=10, adjoint="steps"),
    "fsla": Fsla,
    "soba": Soba,
    "saba": Saba,
    "srba": Srba,
    "ma_soba": MaSoba,
    "sustain": partial(Storms, summed=False),
    "mrbo": partial(Storms, summed=True),
    "vrbo": Vrbo,
}
"""(blocks, step of y and v, step of x) ↦ the method, as its preset has it."""


def curve(loop: Loop, x: Tensor, y: Tensor, calls: int) -> Iterator[float]:
    """E ‖∇Φ‖² after each call, from (x, y) and v = 0."""
    slots, W, matrices = loop.slots(), loop.b.slope(), {}

    def apply(S: Tensor, move: Move | Powers) -> Tensor:
        if isinstance(move, Powers):
            powers = [S]
            for _ in range(move.count - 1):
                powers.append(apply(powers[-1], move.factor))
            return torch.stack(powers).mean(0)
        if move not in matrices:
            matrices[move] = torch.stack(list(_matrices(move, slots, loop.b.counts)))
        M = matrices[move]  # [draws, d, d]; the mean of M S Mᵀ as two products
        moved = (M.flatten(0, 1) @ S).view_as(M)
        return moved.transpose(0, 1).flatten(1) @ M.transpose(1, 2).flatten(0, 1) / len(M)

    start = torch.zeros(sum(slots.values()), dtype=torch.float64)
    shown = 1 + len(x)
    start[0], start[1:shown], start[shown : shown + len(y)] = 1.0, x, y
    S = torch.outer(start, start)
    for t in range(calls):
        for move in loop.call(t):
            S = apply(S, move)
        yield float((W @ S[:shown, :shown]).mul(W).sum())


def _matrices(move: Move, slots: dict[str, int], counts: tuple[int, int]) -> Iterator[Tensor]:
    """M(ξ) for every draw: the move, applied to the unit vectors."""
    kind, function = move
    lower = range(counts[0]) if kind in (LOWER, BOTH) else [None]
    upper = range(counts[1]) if kind in (UPPER, BOTH) else [None]
    units = torch.eye(sum(slots.values()), dtype=torch.float64).split(list(slots.values()))
    for i, j in itertools.product(lower, upper):
        after = function(dict(zip(slots, units, strict=True)), i, j)
        yield torch.cat([after[name] for name in slots])
