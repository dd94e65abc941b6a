"""Whether x and y have left the place where they began, looked at once, when a run is over.

A learning rate that is too small by orders of magnitude ends as "done" otherwise, at losses that look like any
others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from bilevel.events import Warned
from bilevel.run.setup import Setup, State, glimpsed

NOTHING = 1e-6
"""Of the largest entry: a change up to this is none."""
MATTERS = 1e-3
"""Of a loss: what a gradient promises below this, for a step as long as the variable, is no reason to move."""


def unmoved(setup: Setup, state: State) -> Iterator[Warned]:
    """Warn of a level whose every entry is as it was, and whose gradient says that it should not be.

    It may be there on purpose, where it began at its solution, has no steps or no gradient: of these nothing is said.
    """
    last = state.last
    if last is None:
        return
    lower = last.lower
    has_lower = lower.steps > 0 and lower.converged is not True
    said = []
    for level, has, now, size, loss in (
        ("x", True, state.x, last.hypergradient_norm, last.upper_loss),
        ("y", has_lower, state.y, lower.gradient_norm, lower.loss),
    ):
        scale = _scale(state.began.get(level, {}))
        if not has or scale is None or not math.isfinite(size):
            continue
        change = _change(state.began[level], glimpsed(now))
        if change <= NOTHING * scale and size * max(scale, 1.0) > MATTERS * abs(loss):
            gradient = "‖dΦ/dx‖" if level == "x" else "‖∇y G‖"
            said.append(
                f"{level} is where it began: after {state.step} steps no entry has changed by more than "
                f"{change:.0e}, with {gradient} = {size:.1e}; take larger steps, see "
                f"{'upper' if level == 'x' else 'lower'}.optimizer.lr"
            )
    if said:
        state.warned["unmoved"] = state.step
        rounding = torch.finfo(setup.dtype).eps
        lost = f". In {setup.dtype} a step below {rounding:.0e} of an entry is lost"
        yield Warned(state.step, "unmoved", "; ".join(said) + (lost if rounding > NOTHING else ""))


def _scale(began: Mapping[str, Tensor]) -> float | None:
    """The largest entry, 1 where all are 0; None where there is none."""
    most = [float(entry.abs().max()) for entry in began.values() if entry.numel()]
    return (max(most) or 1.0) if most else None


def _change(began: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> float:
    parts = [float((now[name] - entry).abs().max()) for name, entry in began.items() if len(entry)]
    return max(parts)
