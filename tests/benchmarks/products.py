"""Products with second derivatives to hold a relative error of 1e-3 along a run.

Part of `make benchmark`, or python -m tests.benchmarks.products --page PAGE. Counted are HVPs and
the cross products beyond the one that every hypergradient has, whatever they were spent on:
iterations, starts, preconditioners, or finding out that it is enough. Cold conjugate gradient is
stopped by the truth at its first good iterate, which no method could know.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import torch

from bilevel import calculus, hypergradient, tree
from bilevel.estimators.implicit import Implicit
from bilevel.linear.cg import CG
from bilevel.linear.dense import Dense
from bilevel.lower.newton import Newton
from bilevel.optimizers.differentiable import Adam
from bilevel.preconditioners.diagonal import Diagonal
from bilevel.preconditioners.hutchinson import Hutchinson
from bilevel.preconditioners.none import Nothing
from bilevel.preconditioners.nystrom import Nystrom
from bilevel.rng import Streams, stream
from bilevel.types import Counts, Loss, Params, Point
from bilevel_problems.logistic import Logistic
from docs.pages import put

ERROR = 1e-3


@dataclass(frozen=True)
class At:
    """A point of a run, with the truth."""

    problem: Any
    x: Params
    y: Params
    truth: Params
    condition: float

    def ask(self, estimator: Implicit, state: Any) -> Any:
        return hypergradient(
            self.problem.upper_loss,
            self.problem.lower_loss,
            self.x,
            self.y,
            estimator=estimator,
            upper_batch=self.problem.splits["upper"],
            lower_batch=self.problem.splits["lower"],
            state=state,
        )

    def error(self, h: Params) -> float:
        return tree.norm(tree.sub(h, self.truth)) / tree.norm(self.truth)


def run_of(problem: Any, steps: int, lr: float = 0.1) -> list[At]:
    """A run of Adam on exact hypergradients, the lower level solved by Newton's method."""
    x, y = problem.init(Streams(0))
    optimizer = Adam(lr=lr)
    state, batch, points = optimizer.init(x), problem.splits["lower"], []
    loss = Loss(problem.lower_loss, batch, Counts(), "lower")
    for _ in range(steps):
        y = Newton(tolerance=1e-10).solve(loss, x, y, batches=repeat(batch), state={}).y
        exact = At(problem, x, y, x, 0.0).ask(Implicit(solver=Dense()), None)
        h, condition = exact.hypergradient, exact.stats.condition or 0.0
        points.append(At(problem, x, y, h, condition))
        with torch.no_grad():
            x, state = optimizer.step(x, h, state)
    return points


def along(points: list[At], estimator: Implicit) -> list[tuple[float, int]]:
    """(relative error, products) at every point, the state carried from one to the next."""
    state, found = None, []
    for point in points:
        got = point.ask(estimator, state)
        state, cost = got.state, got.stats
        found.append((point.error(got.hypergradient), cost.hvps + cost.cross_products - 1))
    return found


def cold_products(points: list[At], error: float) -> int:
    """The iterations of cold conjugate gradient until the error is reached, known from the truth."""
    total = 0
    for point in points:
        batches = point.problem.splits
        upper = Loss(point.problem.upper_loss, batches["upper"], Counts(), "upper")
        lower = Loss(point.problem.lower_loss, batches["lower"], Counts(), "lower")
        at = Point(point.x, point.y)
        _, F_x, F_y = calculus.gradients(upper, at)
        graph = calculus.linearize(lower, at)

        def reached(progress: Any, F_x=F_x, graph=graph, point=point) -> bool:
            return point.error(tree.sub(F_x, graph.vjp_xy(progress.v))) <= error

        solver = CG(iterations=100_000)
        solve = solver.solve(graph.hvp_yy, F_y, tree.zeros_like(F_y), stop=reached)
        total += solve.stats.iterations
    return total


def walk(
    problem: Any, estimator: Implicit, steps: int, size: float, seed: int
) -> list[tuple[float, int]]:
    """`along` a random walk on a problem in closed form."""
    x, _ = problem.init(Streams(seed))
    noise, state, found = stream(seed, "walk"), None, []
    upper, lower = (next(make(noise)) for make in (problem.upper_batches, problem.lower_batches))
    for _ in range(steps):
        truth = problem.hypergradient(x)
        got = hypergradient(
            problem.upper_loss,
            problem.lower_loss,
            x,
            problem.lower_solution(x),
            estimator=estimator,
            upper_batch=upper,
            lower_batch=lower,
            state=state,
        )
        state = got.state
        off = tree.norm(tree.sub(got.hypergradient, truth)) / tree.norm(truth)
        found.append((off, got.stats.hvps))
        x = tree.map(lambda p: p + size * torch.randn(p.shape, generator=noise, dtype=p.dtype), x)
    return found


PROBLEMS = {
    "breast cancer": Logistic(),
    "digits": Logistic(data="digits", spread=10.0, initial_log_penalty=-10.0),
    "synthetic, spread 10": Logistic(data="synthetic", spread=10.0, initial_log_penalty=-8.0),
    "synthetic, spread 100": Logistic(data="synthetic", spread=100.0, initial_log_penalty=-10.0),
    "synthetic, spread 1000": Logistic(data="synthetic", spread=1000.0, initial_log_penalty=-14.0),
}
ASKED = Implicit(target_error=ERROR)
ALONE = replace(ASKED, preconditioner=Nothing(), solver=CG(iterations=5000))
METHODS = {
    "start: cold, no preconditioner": replace(ALONE, start="cold"),
    "start: warm, no preconditioner": replace(ALONE, start="warm"),
    "start: linear, no preconditioner": replace(ALONE, start="linear"),
    "start: galerkin, no preconditioner": ALONE,
    "preconditioner: hutchinson": replace(ASKED, preconditioner=Hutchinson()),
    "preconditioner: nystrom": replace(ASKED, preconditioner=Nystrom()),
    "preconditioner: diagonal": replace(ASKED, preconditioner=Diagonal()),
    "start: warm": replace(ASKED, start="warm"),
    "start: linear": replace(ASKED, start="linear"),
    "nothing else asked": ASKED,
}


def table(steps: int) -> str:
    """Products by method and problem; in brackets, at how many points the error was missed."""
    runs = {name: run_of(problem, steps) for name, problem in PROBLEMS.items()}
    cold = {name: cold_products(points, ERROR) for name, points in runs.items()}
    ranges = [
        f"{min(p.condition for p in points):.0e} to {max(p.condition for p in points):.0e}"
        for points in runs.values()
    ]
    lines = [
        f"| `target_error: 1e-3` | {' | '.join(PROBLEMS)} |",
        f"|---|{'---|' * len(PROBLEMS)}",
        f"| condition number | {' | '.join(ranges)} |",
        f"| cold CG, told when to stop | {' | '.join(map(str, cold.values()))} |",
    ]
    for label, estimator in METHODS.items():
        cells = []
        for name, points in runs.items():
            found = along(points, estimator)
            spent, missed = sum(n for _, n in found), sum(error > ERROR for error, _ in found)
            note = f" ({missed} missed)" if missed else ""
            cells.append(f"{spent}, {_part(cold[name], spent)}{note}")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _part(cold: int, spent: int) -> str:
    return f"1/{cold / spent:.1f}" if cold > 1.1 * spent else f"{spent / cold:.1f}×"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--steps", type=int, default=60)
    options.add_argument("--page", type=Path, help="a page with markers to write the table into")
    given = options.parse_args()
    torch.set_num_threads(1)
    text = table(given.steps)
    print(text)
    if given.page:
        page = given.page.read_text(encoding="utf-8")
        given.page.write_text(put(page, "products", text), encoding="utf-8")


if __name__ == "__main__":
    main()
