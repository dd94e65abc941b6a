"""Whether the lower level diverges over the steps of a run, of which each solve begins where the last one ended.

Within a solve of ten steps a gradient that grows by a tenth a step is no news; over sixty solves it is.
"""

from __future__ import annotations

import math

from torch import Tensor

from bilevel.lower.divergence import BURN_IN, LIMIT
from bilevel.run.setup import State
from bilevel.types import LowerStats


def note(state: State, value: Tensor, lower: LowerStats) -> str:
    """What to warn of after a step with F = value; nothing while it sets the scale, in the first of a run.

    Compares the last G and ‖∇y G‖ of the lower solve with the largest of the first steps, and G with F there too.
    """
    scale, loss, norm = state.scale, lower.loss, lower.gradient_norm
    if scale.get("steps", 0) < BURN_IN:
        if math.isfinite(loss) and math.isfinite(norm):
            state.scale = {
                "steps": scale.get("steps", 0) + 1,
                "loss": max(scale.get("loss", 0.0), abs(loss), abs(value.item())),
                "norm": max(scale.get("norm", 0.0), norm),
            }
        return ""
    if not (norm > LIMIT * scale["norm"] and loss > LIMIT * scale["loss"]):
        return ""
    return (
        f"the lower level diverges over the steps of this run: lower_loss is {loss:.1e} and ‖∇y G‖ {norm:.1e}, "
        f"where in the first {BURN_IN} steps no loss was above {scale['loss']:.1e} and the norm not above "
        f"{scale['norm']:.1e}; take a smaller lower.optimizer.lr, or upper.optimizer.lr where x runs away"
    )
