"""The two errors of `bilevel check` for the problem of docs/debugging.md, with its bug and without."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from matplotlib.figure import Figure

from bilevel.estimators import Implicit
from bilevel.lower import Gradient
from bilevel.optimizers import SGD
from bilevel.registry.build import build
from bilevel.run import Setup, Upper
from bilevel.testing import CheckRow, check
from docs.pictures.style import BLUE, INK, ORANGE, PALE, canvas

TITLE = "What the two errors of bilevel check say"
NAMES = ("implicit", "unroll", "one_step", "f2sa")


class Weights:
    """The problem of the page; `bug` cuts a derivative in x."""

    def __init__(self, bug: bool):
        draw = torch.Generator().manual_seed(0)
        A, held = torch.randn(2, 30, 4, generator=draw, dtype=torch.float64)
        b = A.sum(1)
        b[:10] += 3 * torch.randn(10, generator=draw, dtype=torch.float64)
        self.bug, self.train, self.held = bug, (A, b), (held, held.sum(1))

    def init(self, streams: Any) -> Any:
        return {"logit": torch.zeros(30)}, {"w": torch.zeros(4)}

    def upper_loss(self, x: Any, y: Any, batch: Any) -> torch.Tensor:
        return (batch[0] @ y["w"] - batch[1]).square().mean()

    def lower_loss(self, x: Any, y: Any, batch: Any) -> torch.Tensor:
        weight = x["logit"].sigmoid()
        total = weight.sum().detach() if self.bug else weight.sum()
        off = (batch[0] @ y["w"] - batch[1]).square()
        return weight @ off / total + 1e-2 * y["w"].square().sum()

    def upper_batches(self, stream: Any) -> Any:
        return itertools.repeat(self.held)

    def lower_batches(self, stream: Any) -> Any:
        return itertools.repeat(self.train)


def _rows(bug: bool, steps: int = 20, names: tuple[str, ...] = NAMES) -> dict[str, list[float]]:
    lower = Gradient(steps=steps, optimizer=SGD(lr=0.2))
    setup = Setup(Weights(bug), lower, Upper(), Implicit(), dtype=torch.float64)
    found = check(setup, {name: build("estimators", name) for name in names})
    rows = [row for row in found if isinstance(row, CheckRow)]
    return {row.name: [row.claim_error, row.error] for row in rows}


def compute() -> dict[str, Any]:
    """[claim err, err vs dΦ/dx] of each estimator."""
    return {"bug": _rows(True), "mended": _rows(False), "3 steps": _rows(False, 3, NAMES[:2])}


def draw(data: dict[str, Any]) -> Figure:
    with canvas(6.2, 3.8) as figure:
        axes = figure.subplots()
        axes.axvline(1e-5, color=PALE, linewidth=1)
        axes.axhline(0.03, color=PALE, linewidth=1)
        for kind, label, look in (
            ("bug", "with the bug", {"color": ORANGE, "marker": "s"}),
            ("mended", "mended", {"color": BLUE, "marker": "o"}),
            ("3 steps", "mended, 3 lower steps", {"color": INK, "marker": "^"}),
        ):
            points = [(max(claim, 1e-12), error) for claim, error in data[kind].values()]
            axes.plot(*zip(*points, strict=True), linestyle="", label=label, **look)
            for name, point in zip(data[kind], points, strict=True):
                offset = {"textcoords": "offset points", "color": look["color"], "fontsize": 8}
                left = kind == "bug" and name == "implicit"  # unroll is close on the right
                axes.annotate(
                    name, point, (-6 if left else 6, 3), ha="right" if left else "left", **offset
                )
        for at, words in (
            ((2e-13, 4.0), "right, but not of Φ:\ny is not solved, or a rough estimator"),
            ((1.5e-5, 4.0), "a wrong derivative:\nthe loss, or the estimator"),
            ((2e-13, 8e-4), "the hypergradient"),
        ):
            axes.annotate(words, at, color=PALE, va="top" if at[1] > 1 else "bottom", fontsize=8.5)
        axes.set(xscale="log", yscale="log", xlim=(1.5e-13, 1), ylim=(7e-4, 5))
        axes.set(xlabel="claim err", ylabel="err vs dΦ/dx")
        figure.legend(loc="outside lower center", ncols=3)
        return figure
