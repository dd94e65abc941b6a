"""What the shipped problems learn: the recipes as they are, run to their end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from bilevel import recipe, rng, solve_lower, tree
from bilevel.events import Stepped
from bilevel.lower import Gradient
from bilevel.optimizers import SGD
from bilevel.recipe.assemble import assemble
from bilevel.run.engine import run, start
from docs.pictures.keep import Picture
from docs.pictures.style import BLUE, INK, ORANGE, PALE, canvas

RECIPES = Path(__file__).parent.parent.parent / "recipes"
LOOK = 5
"""Steps at the beginning of a run that a test takes again."""


def ran(name: str, steps: int | None = None) -> tuple[Any, Any, dict[str, Any]]:
    """(problem, state at the end, F at each of the first steps) of a shipped recipe, on the CPU."""
    overrides = ["runtime.device=cpu"] + ([f"upper.steps={steps}"] if steps else [])
    setup = assemble(recipe.load(RECIPES / f"{name}.yaml", overrides))
    state = start(setup)
    losses = [event.upper_loss for event in run(setup, state) if isinstance(event, Stepped)]
    return setup.problem, state, {"first losses": losses[:LOOK]}


def begun(name: str) -> Callable[[], dict[str, Any]]:
    return lambda: ran(name, LOOK)[2]


def quadratic(steps: int = 200) -> dict[str, Any]:
    overrides = ["runtime.device=cpu", f"upper.steps={steps}"]
    setup = assemble(recipe.load(RECIPES / "quadratic.yaml", overrides))
    state, kept = start(setup), {"step": [], "upper value": [], "hypergradient norm": []}
    for event in run(setup, state):
        if isinstance(event, Stepped) and (event.step % 10 == 0 or event.step == 1):
            kept["step"].append(event.step)
            measures = setup.problem.evaluate(state.x, state.y)
            for name in ("upper value", "hypergradient norm"):
                kept[name].append(measures[name])
    return kept


def draw_quadratic(data: dict[str, Any]) -> Figure:
    with canvas(5.2, 2.6) as figure:
        axes = figure.subplots()
        axes.plot(data["step"], data["upper value"], "-o", color=BLUE, label="Φ(x)")
        norm = data["hypergradient norm"]
        axes.plot(data["step"], norm, "--s", color=ORANGE, label="‖dΦ/dx‖")
        axes.set(xlabel="upper step", yscale="log")
        axes.grid(True)
        axes.legend()
        return figure


def ridge() -> dict[str, Any]:
    problem, state, found = ran("ridge")
    before, _ = problem.init(rng.Streams(0))
    return {
        **found,
        "penalty": state.x["log_penalty"].exp().tolist(),
        "first": before["log_penalty"].exp().tolist(),
        "weight": problem.lower_solution(state.x)["w"].tolist(),
    }


FEATURES = ("age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6")
"""Of scikit-learn's diabetes data."""


def draw_ridge(data: dict[str, Any]) -> Figure:
    with canvas(5.6, 2.9) as figure:
        above, below = figure.subplots(2, 1, sharex=True)
        at = np.arange(len(FEATURES))
        above.axhline(data["first"][0], color=PALE, linewidth=1)
        above.bar(at, data["penalty"], 0.6, color=ORANGE, bottom=0)
        above.set(yscale="log", ylabel="penalty")
        below.bar(at, data["weight"], 0.6, color=BLUE)
        below.axhline(0, color=PALE, linewidth=0.8)
        below.set(ylabel="weight", xticks=at, xticklabels=FEATURES)
        return figure


def logistic() -> dict[str, Any]:
    _, state, found = ran("logistic")
    weight = next(iter(state.y.values()))
    log_penalty = state.x["log_penalty"]
    return {**found, "penalty": log_penalty.exp().tolist(), "weight": weight.abs().tolist()}


def draw_logistic(data: dict[str, Any]) -> Figure:
    with canvas(5.2, 2.9) as figure:
        axes = figure.subplots()
        axes.axvline(float(np.exp(-6.0)), color=PALE, linewidth=1)
        axes.plot(data["penalty"], data["weight"], "o", color=BLUE)
        axes.set(xscale="log", yscale="log", xlabel="penalty that was learned", ylabel="|weight|")
        axes.grid(True)
        return figure


def lasso() -> dict[str, Any]:
    problem, state, found = ran("lasso")
    weight = problem.lower_solution(state.x)["w"]
    return {
        **found,
        "penalty": state.x["log_penalty"].exp().tolist(),
        "weight": weight.tolist(),
        "relevant": problem.num_relevant,
    }


def draw_lasso(data: dict[str, Any]) -> Figure:
    with canvas(5.6, 2.9) as figure:
        above, below = figure.subplots(2, 1, sharex=True)
        at, relevant = np.arange(1, len(data["weight"]) + 1), data["relevant"]
        for rows, color, hatch, label in (
            (slice(relevant), BLUE, "", "relevant"),
            (slice(relevant, None), ORANGE, "////", "irrelevant"),
        ):
            look = {
                "color": color,
                "label": label,
                "hatch": hatch,
                "edgecolor": INK,
                "linewidth": 0.4,
            }
            above.bar(at[rows], data["penalty"][rows], 0.7, **look)
            below.bar(at[rows], data["weight"][rows], 0.7, **look)
        above.axhline(float(np.exp(-2.0)), color=PALE, linewidth=1)
        above.set(ylabel="penalty", yscale="log", ylim=(0.01, 0.2))
        above.yaxis.set_minor_formatter(NullFormatter())
        figure.legend(*above.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        below.set(ylabel="weight", xlabel="feature", xticks=(1, 5, 10, 15, 20))
        return figure


def box_qp() -> dict[str, Any]:
    problem, state, found = ran("box_qp")
    first, _ = problem.init(rng.Streams(0))
    return {
        **found,
        "before": problem.lower_solution(first)["y"].tolist(),
        "after": problem.lower_solution(state.x)["y"].tolist(),
        "target": problem.constants["t"].tolist(),
    }


def draw_box_qp(data: dict[str, Any]) -> Figure:
    with canvas(5.4, 2.9) as figure:
        axes = figure.subplots()
        at = np.arange(1, len(data["after"]) + 1)
        axes.axhspan(-1, 1, color=PALE, alpha=0.16, linewidth=0)
        axes.plot(at, data["target"], "*", color=ORANGE, markersize=8, label="t, where F wants y")
        axes.plot(at, data["before"], "o", color=INK, markerfacecolor="none", label="y* before")
        axes.plot(at, data["after"], "o", color=BLUE, label="y* after")
        axes.vlines(at, data["before"], data["after"], color=BLUE, linewidth=0.9)
        axes.set(xlabel="entry of y", ylabel="value; the box is shaded", xticks=at)
        figure.legend(loc="outside lower center", ncols=3)
        return figure


def hyper_cleaning() -> dict[str, Any]:
    problem, state, found = ran("hyper_cleaning")
    weight, wrong = state.x["logit"].sigmoid(), problem.splits["lower"]["wrong"]
    edges = torch.linspace(0, 1, 21)
    return {
        **found,
        "edges": edges.tolist(),
        "right": torch.histogram(weight[~wrong], edges).hist.tolist(),
        "wrong": torch.histogram(weight[wrong], edges).hist.tolist(),
    }


def draw_hyper_cleaning(data: dict[str, Any]) -> Figure:
    with canvas(5.4, 2.8) as figure:
        axes = figure.subplots()
        for name, color, hatch in (("right", BLUE, ""), ("wrong", ORANGE, "////")):
            axes.stairs(
                data[name],
                data["edges"],
                fill=True,
                facecolor=color,
                edgecolor=color,
                alpha=0.75,
                hatch=hatch,
                label=f"{name} labels",
            )
        axes.set(xlabel="weight that was learned, σ(xᵢ)", ylabel="samples")
        axes.legend()
        return figure


def sinusoid() -> dict[str, Any]:
    """One held-out wave from the start that was learned, and from an untrained one."""
    tasks, state, found = ran("sinusoid")
    problem = tasks.problem
    _, (shots, _) = problem.held_out
    wave = {name: part[WAVE] for name, part in shots.items()}
    along = torch.linspace(-5, 5, 61)[:, None]
    solver = Gradient(steps=problem.held_out_steps, optimizer=SGD(lr=problem.held_out_lr))
    untrained, _ = problem.init(rng.Streams(0))
    found |= {"a": wave["a"][:, 0].tolist(), "b": wave["b"][:, 0].tolist()}
    found["along"] = along[:, 0].tolist()
    for name, x in (("learned", state.x), ("untrained", untrained)):
        x = tree.map(lambda p: p.detach().float(), x)
        y = problem.lower_start(x, x)
        adapted = solve_lower(problem.lower_loss, x, y, solver=solver, batch=wave).y
        for when, at in (("before", y), ("after", adapted)):
            found[f"{name}, {when}"] = _network(at, along)[:, 0].tolist()
    return found


WAVE = 3
"""Which of the held-out waves is drawn."""


def _network(y: Any, a: torch.Tensor) -> torch.Tensor:
    """The problem's two hidden layers, at inputs of our own."""
    for i in range(3):
        a = a @ y[f"weight{i}"].mT + y[f"bias{i}"]
        a = a.tanh() if i < 2 else a
    return a


def draw_sinusoid(data: dict[str, Any]) -> Figure:
    with canvas(6.0, 2.9) as figure:
        for axes, name in zip(
            figure.subplots(1, 2, sharey=True), ("untrained", "learned"), strict=True
        ):
            axes.plot(data["along"], data[f"{name}, before"], ":", color=PALE, label="start")
            axes.plot(data["along"], data[f"{name}, after"], color=BLUE, label="after 5 steps")
            axes.plot(data["a"], data["b"], "o", color=ORANGE, label="the 10 points")
            axes.set(title=f"{name} start", xlabel="input")
            axes.grid(True)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
        return figure


PICTURES = {
    "quadratic": Picture(
        "quadratic: Φ and its gradient along a run",
        quadratic,
        draw_quadratic,
        lambda: quadratic(20),
    ),
    "ridge": Picture("ridge: one penalty a feature", ridge, draw_ridge),
    "logistic": Picture(
        "logistic: penalties and weights", logistic, draw_logistic, begun("logistic")
    ),
    "lasso": Picture("lasso: penalties and weights", lasso, draw_lasso, begun("lasso")),
    "box_qp": Picture(
        "box_qp: the lower solution before and after", box_qp, draw_box_qp, begun("box_qp")
    ),
    "hyper_cleaning": Picture(
        "hyper_cleaning: weights of right and wrong labels",
        hyper_cleaning,
        draw_hyper_cleaning,
        begun("hyper_cleaning"),
    ),
    "sinusoid": Picture(
        "sinusoid: one wave after five steps from two starts",
        sinusoid,
        draw_sinusoid,
        begun("sinusoid"),
    ),
}
