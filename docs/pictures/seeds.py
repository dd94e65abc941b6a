"""Two arms over five seeds: means, and the interval that a page of many runs gives them."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.figure import Figure

from bilevel.estimators import SingleLoop
from bilevel.events import Stepped
from bilevel.lower import Gradient
from bilevel.optimizers import SGD
from bilevel.report.seeds import over_steps
from bilevel.run import Setup, Upper, engine
from bilevel_problems.simulated_quadratic import SimulatedQuadratic
from docs.pictures.keep import Picture
from docs.pictures.style import CYCLE, DASHES, canvas

TITLE = "Two step sizes over five seeds: each run, the means, and their 95 % intervals"
SEEDS, STEPS = 5, 60
RATES = (0.2, 0.05)


def compute() -> dict[str, list[list[float]]]:
    """‖dΦ/dx‖ after each upper step, a row a seed, by what the arms differ in."""
    return {f"upper.optimizer.lr={lr}": [_norms(lr, seed) for seed in range(SEEDS)] for lr in RATES}


def _norms(lr: float, seed: int) -> list[float]:
    problem = SimulatedQuadratic(
        upper_samples=256, lower_samples=256, batch_size=32, num_upper=3, num_lower=6
    )
    estimator = SingleLoop(lower_lr=0.5, adjoint_lr=0.5)
    upper = Upper(steps=STEPS, optimizer=SGD(lr=lr))
    setup = Setup(problem, Gradient(), upper, estimator, seed=seed)  # which moves y itself
    state = engine.start(setup)
    found = []
    for event in engine.run(setup, state):
        if isinstance(event, Stepped):
            measures = problem.evaluate(state.x, state.y)
            found.append(math.sqrt(measures["squared hypergradient norm"]))
    return found


def draw(arms: dict[str, Any]) -> Figure:
    with canvas(6.0, 3.4) as figure:
        axes = figure.subplots()
        for i, (name, runs) in enumerate(arms.items()):
            curves = [list(enumerate(run, 1)) for run in runs]
            for curve in curves:
                axes.plot(*zip(*curve, strict=True), color=CYCLE[i], linewidth=0.5, alpha=0.6)
            steps, found = zip(*over_steps(curves), strict=True)
            low, high = ([f.mean + sign * (f.half or 0) for f in found] for sign in (-1, 1))
            axes.fill_between(steps, low, high, color=CYCLE[i], alpha=0.2, linewidth=0)
            means = [each.mean for each in found]
            axes.plot(steps, means, color=CYCLE[i], linestyle=DASHES[i], label=name)
        axes.set(xlabel="upper step", ylabel="‖dΦ/dx‖", ylim=(0, None))
        axes.grid(True)
        figure.legend(loc="outside lower center", ncols=2, handlelength=2.6)
        return figure


PICTURES = {"many_runs": Picture(TITLE, compute, draw)}
