"""A bilevel run step by step: the lower path at the present x above, the upper step on Φ below.

G(x, y) = ½ (y − r(x))ᵀ A (y − r(x)),    r(x) = (2 cos x, 1.5 sin x)
F(x, y) = ½ ‖y − t‖² + 0.05 x²
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from bilevel import hypergradient, solve_lower
from bilevel.estimators import Implicit
from bilevel.lower import Gradient, Newton
from bilevel.optimizers import SGD
from docs.pictures.style import BLUE, INK, ORANGE, PALE, PAPER, canvas

TITLE = "Three upper steps of a bilevel run"
SHOWN, LOWER_STEPS, LOWER_LR, UPPER_LR = (1, 2, 4), 6, 0.35, 0.3
A = torch.tensor([[1.6, 0.7], [0.7, 0.9]], dtype=torch.float64)
T = torch.tensor([-0.6, 1.4], dtype=torch.float64)


def r(x: Tensor) -> Tensor:
    return torch.stack([2 * x.cos(), 1.5 * x.sin()], -1)


def F(x: dict[str, Tensor], y: dict[str, Tensor], batch: None) -> Tensor:
    return 0.5 * (y["y"] - T).square().sum(-1) + 0.05 * x["x"] ** 2


def G(x: dict[str, Tensor], y: dict[str, Tensor], batch: None) -> Tensor:
    off = y["y"] - r(x["x"])
    return 0.5 * (off @ A * off).sum(-1)


def _path(x: dict[str, Tensor], y: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """y_0 to y_K of the lower steps from y."""
    solvers = [Gradient(steps=k + 1, optimizer=SGD(lr=LOWER_LR)) for k in range(LOWER_STEPS)]
    return [y, *(solve_lower(G, x, y, solver=solver).y for solver in solvers)]


def compute() -> dict[str, Any]:
    """Of each upper step: x, the lower path, the hypergradient at its end; and Φ along x."""
    x = {"x": torch.tensor(0.1, dtype=torch.float64)}
    y = {"y": torch.tensor([-1.6, -1.2], dtype=torch.float64)}
    steps = []
    for _ in range(max(SHOWN)):
        path = _path(x, y)
        y = path[-1]
        h = hypergradient(F, G, x, y, estimator=Implicit()).hypergradient["x"]
        steps.append({"x": float(x["x"]), "y": [p["y"].tolist() for p in path], "h": float(h)})
        x = {"x": x["x"] - UPPER_LR * h}
    xs = torch.linspace(-0.3, 2.8, 63, dtype=torch.float64)
    curve = [solve_lower(G, {"x": at}, y, solver=Newton()).y["y"] for at in xs]
    phi = [float(F({"x": at}, {"y": best}, None)) for at, best in zip(xs, curve, strict=True)]
    return {"steps": steps, "x": xs.tolist(), "y": [p.tolist() for p in curve], "phi": phi}


def draw(data: dict[str, Any]) -> Figure:
    X, Y = np.meshgrid(np.linspace(-2.3, 2.7, 70), np.linspace(-1.7, 2.1, 60))
    grid = torch.tensor(np.stack([X, Y], -1))
    best, xs, phi = np.array(data["y"]), np.array(data["x"]), np.array(data["phi"])
    with canvas(6.4, 4.7) as figure:
        axes = figure.subplots(2, len(SHOWN), sharex="row", sharey="row", height_ratios=(1.2, 1))
        for column, number in enumerate(SHOWN):
            above, below = axes[:, column]
            step = data["steps"][number - 1]
            x, path = step["x"], np.array(step["y"])
            levels = G({"x": torch.tensor(x).double()}, {"y": grid}, None).numpy()
            above.contour(X, Y, levels, [0.1, 0.5, 1.3, 2.6, 4.5], colors=PALE, linewidths=0.8)
            marks = [
                above.plot(
                    *path[0], "o", color=BLUE, markersize=6, markerfacecolor=PAPER, zorder=3
                ),
                above.plot(*path.T, "-o", color=BLUE, markersize=3.5, linewidth=1.3),
                above.plot(*r(torch.tensor(x)).numpy(), "x", color=INK, markersize=7),
                above.plot(*best.T, color=PALE, linestyle=(0, (2, 2)), linewidth=1),
                above.plot(*T.numpy(), "*", color=ORANGE, markersize=10),
            ]
            above.set(xticks=(-2, 0, 2), yticks=(-1, 0, 1, 2))
            above.set_title(f"upper step {number}")
            above.set_aspect("equal")
            value = float(np.interp(x, xs, phi))
            below.plot(xs, phi, color=INK)
            near = np.array([x - 0.45, x + 0.45])
            below.plot(near, value + step["h"] * (near - x), color=ORANGE)
            below.plot([x], [value], "o", color=ORANGE, markersize=6)
            moved = x - UPPER_LR * step["h"]
            arrow = {"arrowstyle": "-|>", "color": ORANGE, "linewidth": 1.3}
            below.annotate("", (moved, -0.35), (x, -0.35), arrowprops=arrow)
            for end in (x, moved):
                below.plot(
                    [end, end],
                    [-0.35, np.interp(end, xs, phi)],
                    color=PALE,
                    linewidth=0.8,
                    linestyle=":",
                )
            below.set_xlabel("x")
        names = ("y as it was", "lower steps", "y*(x)", "y* of every x", "y that F wants")
        figure.legend([line for (line,) in marks], names, loc="outside lower center", ncols=5)
        axes[0, 0].set_ylabel("lower level: y on G(x, ·)")
        axes[1, 0].set(ylabel="upper level: Φ(x)", ylim=(-0.7, None))
        return figure
