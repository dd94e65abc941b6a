"""The events of a short run."""

import math
from pathlib import Path

from bilevel.events import (
    Drawn,
    Evaluated,
    Finished,
    Progress,
    Saved,
    Started,
    Stepped,
    Totals,
    Warned,
)
from bilevel.types import LowerStats, Stats


def stepped(step: int, upper_loss: float = 1.0, seconds: float = 0.0) -> Stepped:
    lower = LowerStats(steps=3, gradients=3, loss=-0.5, gradient_norm=math.inf)
    stats = Stats(hvps=2, residual=1e-3, condition=None)
    return Stepped(step, upper_loss, -0.5, 0.25, lower, stats, Totals(step, step, step), seconds)


STARTED = Started(0, 6, "toy", 3, 1234567, "cpu", "float64")
EVENTS = [
    Progress("data", 1, 2),
    STARTED,
    Evaluated(0, {"accuracy": 0.5, "gap": math.nan}),
    stepped(1),
    Warned(2, "curvature", "negative"),
    stepped(2, math.nan),
    Evaluated(2, {"accuracy": 0.75, "gap": 1.0}),
    Saved(2, Path("checkpoints/step-00000002")),
    *(stepped(step) for step in range(3, 7)),
    Evaluated(6, {"accuracy": 1.0, "gap": 2.0}),
    Drawn(6, "plot", object()),
    Finished(6, "done", 1.0),
]


def with_evidence(step: int, **evidence) -> Stepped:
    return Stepped(**{**vars(stepped(step)), "estimate": Stats(hvps=2, **evidence)})
