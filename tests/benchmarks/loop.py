"""A whole run beside the loop that one would write by hand: `python -m tests.benchmarks.loop`.

One ridge penalty a feature for logistic regression, 100 variables at each level: upper steps of 10 lower
SGD steps, an adjoint of 5 CG iterations from the last one, and Adam. By hand is plain torch with one
tensor a level and no check of anything; all end at the same x. "replayed" is `runtime.compile: step`,
what it takes to record a step included.
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from bilevel.estimators.implicit import Implicit
from bilevel.events import Stepped
from bilevel.linear.cg import CG
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import SGD, Adam
from bilevel.run import engine
from bilevel.run.engine import Setup
from bilevel.run.upper import Upper
from bilevel_problems.logistic import Logistic

FEATURES, LOWER_STEPS, CG_STEPS, UPPER_STEPS, LR, UPPER_LR = 100, 10, 5, 60, 0.5, 0.1
PROBLEM = Logistic(data="synthetic", num_features=FEATURES)


def by_hand(steps: int | None = None) -> Tensor:
    """The x of the last step."""
    (A, b), (C, d) = (
        (PROBLEM.splits[name]["A"], PROBLEM.splits[name]["b"]) for name in ("lower", "upper")
    )
    softplus = torch.nn.functional.softplus

    def upper(w: Tensor) -> Tensor:
        return softplus(-d * (C @ w)).mean()

    def lower(x: Tensor, w: Tensor) -> Tensor:
        return softplus(-b * (A @ w)).mean() + 0.5 * (x.exp() * w**2).sum()

    x = torch.full((FEATURES,), PROBLEM.initial_log_penalty, dtype=torch.float64)
    w, v, m, s = (torch.zeros(FEATURES, dtype=torch.float64) for _ in range(4))
    for step in range(1, (steps or UPPER_STEPS) + 1):
        for _ in range(LOWER_STEPS):
            w = w.detach().requires_grad_()
            w = w.detach() - LR * torch.autograd.grad(lower(x, w), w)[0]
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        (F_w,) = torch.autograd.grad(upper(w), w)
        (G_w,) = torch.autograd.grad(lower(x, w), w, create_graph=True)
        v = conjugate_gradient(G_w, w, F_w, v)
        (cross,) = torch.autograd.grad(G_w, x, v)
        h = -cross
        m, s = 0.9 * m + 0.1 * h, 0.999 * s + 0.001 * h * h
        root = (s / (1 - 0.999**step)).sqrt() + 1e-8
        x = x.detach() - UPPER_LR * (m / (1 - 0.9**step)) / root
    return x


def conjugate_gradient(G_w: Tensor, w: Tensor, b: Tensor, v: Tensor) -> Tensor:
    def product(u: Tensor) -> Tensor:
        return torch.autograd.grad(G_w, w, u, retain_graph=True)[0]

    r = b - product(v)
    p, rr = r, r @ r
    for _ in range(CG_STEPS):
        Ap = product(p)
        alpha = rr / (p @ Ap)
        v, r = v + alpha * p, r - alpha * Ap
        new = r @ r
        p, rr = r + (new / rr) * p, new
    return v


def setup(steps: int, **options: Any) -> Setup:
    return Setup(
        PROBLEM,
        Gradient(steps=LOWER_STEPS, optimizer=SGD(lr=LR)),
        Upper(steps=steps, optimizer=Adam(lr=UPPER_LR)),
        Implicit(solver=CG(iterations=CG_STEPS, tolerance=0.0)),
        dtype=torch.float64,
        **options,
    )


def as_a_run(compile: Literal["off", "step"] = "off") -> Tensor:
    """The same by the engine, event by event, as `bilevel run` and `minimize` drive it."""
    chosen = setup(UPPER_STEPS, compile=compile)
    state = engine.start(chosen)
    for event in engine.run(chosen, state):
        if isinstance(event, Stepped) and event.step == UPPER_STEPS:
            break
    return state.x["log_penalty"]


WAYS = {"a run": as_a_run, "replayed": partial(as_a_run, "step"), "by hand": by_hand}


def times(repetitions: int = 9) -> dict[str, list[float]]:
    """CPU seconds of each way, taken in turn; the first round is left out."""
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(repetitions + 1):
        for name, way in WAYS.items():
            began = time.process_time()
            way()
            found[name].append(time.process_time() - began)
    return {name: each[1:] for name, each in found.items()}


def main() -> None:
    torch.set_num_threads(1)
    found = times()
    for name, each in found.items():
        ratios = [one / two for one, two in zip(each, found["by hand"], strict=True)]
        print(
            f"{name}: {UPPER_STEPS / statistics.median(each):.0f} upper steps a CPU second, by hand "
            f"times {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
