"""The front page's picture: two levels and the hypergradient, on one x and one y.

G(x, y) = ½ (y − r(x))²  (1 + ¼ (y − r(x))²),    r(x) = 1 + tanh(2 x)
F(x, y) = ½ (y − 0.6)² + 0.15 (x − 2.2)²
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from bilevel import hypergradient, solve_lower
from bilevel.estimators import Alternating, Implicit
from bilevel.linear import Dense
from bilevel.lower import Newton
from docs.pictures.style import BLUE, INK, ORANGE, PALE, PAPER, canvas

TITLE = "A bilevel problem in one x and one y, and its hypergradient"
AT = 0.4
"""x at which the hypergradient is drawn."""


def F(x: dict[str, Tensor], y: dict[str, Tensor], batch: None) -> Tensor:
    return 0.5 * (y["y"] - 0.6) ** 2 + 0.15 * (x["x"] - 2.2) ** 2


def G(x: dict[str, Tensor], y: dict[str, Tensor], batch: None) -> Tensor:
    off = y["y"] - 1 - torch.tanh(2 * x["x"])
    return 0.5 * off**2 * (1 + 0.25 * off**2)


def _solution(x: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    at = {"x": torch.tensor(x, dtype=torch.float64)}
    start = {"y": torch.tensor(0.0, dtype=torch.float64)}
    return at, solve_lower(G, at, start, solver=Newton()).y


def compute() -> dict[str, Any]:
    """y* and Φ along x; at one x the hypergradient and ∇x F at fixed y."""
    xs = [round(-1.6 + 0.05 * i, 2) for i in range(65)]
    solved = [_solution(x) for x in xs]
    x, y = _solution(AT)
    slope = {
        name: float(hypergradient(F, G, x, y, estimator=estimator).hypergradient["x"])
        for name, estimator in (
            ("implicit", Implicit(solver=Dense())),
            ("direct", Alternating()),
        )
    }
    return {
        "x": xs,
        "y": [float(y["y"]) for _, y in solved],
        "phi": [float(F(x, y, None)) for x, y in solved],
        "at": {"y": float(y["y"]), "phi": float(F(x, y, None)), **slope},
    }


def draw(data: dict[str, Any]) -> Figure:
    xs, ys, phi, at = np.array(data["x"]), np.array(data["y"]), np.array(data["phi"]), data["at"]
    with canvas(6.2, 4.9) as figure:
        plane, curve = figure.subplots(2, 1, sharex=True, height_ratios=(1.25, 1))
        X, Y = np.meshgrid(xs, np.linspace(-1.2, 3.2, 90))
        grid = {"x": torch.tensor(X)}, {"y": torch.tensor(Y)}
        levels = G(*grid, None).numpy()
        plane.contour(X, Y, levels, [0.04, 0.2, 0.6, 1.4], colors=PALE, linewidths=0.8)
        plane.plot(xs, ys, color=INK, linewidth=2.4)
        back = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.5}
        plane.text(-1.52, 0.0, "y*(x), the lower solution", color=INK, va="center", bbox=back)
        plane.text(-1.52, -0.92, "level lines of G(x, ·)", color=PALE, va="center", bbox=back)
        arrow = {"arrowstyle": "-|>", "color": BLUE, "linewidth": 1.6, "shrinkB": 4}
        plane.annotate("", (AT, at["y"]), (AT, -0.9), arrowprops=arrow)
        plane.text(AT + 0.06, -0.95, "lower level: x is held,\ny goes down G", color=BLUE)
        plane.plot([AT], [at["y"]], "o", color=BLUE, markersize=7, markeredgecolor=PAPER)
        plane.set_ylabel("y")
        curve.plot(xs, phi, color=INK, linewidth=2.4)
        near = np.array([AT - 0.55, AT + 0.55])
        for name, label, color, dash in (
            ("implicit", "slope dΦ/dx: the hypergradient", BLUE, "-"),
            ("direct", "slope ∇x F at fixed y: the wrong way", ORANGE, (0, (4, 2))),
        ):
            curve.plot(
                near, at["phi"] + at[name] * (near - AT), color=color, linestyle=dash, label=label
            )
        curve.plot([AT], [at["phi"]], "o", color=BLUE, markersize=7, markeredgecolor=PAPER)
        best = int(phi.argmin())
        curve.plot([xs[best]], [phi[best]], "*", color=INK, markersize=11)
        curve.annotate(
            "x*", (xs[best], phi[best]), (0, -14), textcoords="offset points", ha="center"
        )
        curve.set(xlabel="x", ylabel="Φ(x) = F(x, y*(x))", ylim=(0.6, 2.4))
        curve.legend(loc="upper right")
        return figure
