"""What happens in a run, as frozen values. Sinks see these and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # which import torch; reports and lists of runs do without
    from bilevel.types import LowerStats, Stats


@dataclass(frozen=True)
class Totals:
    """Oracle calls of the run so far, lower and upper level together."""

    gradients: int = 0
    hvps: int = 0
    cross_products: int = 0

    @property
    def calls(self) -> int:
        """All of them, as a budget counts them."""
        return self.gradients + self.hvps + self.cross_products

    def plus(self, *, gradients: int = 0, hvps: int = 0, cross_products: int = 0) -> Totals:
        return Totals(
            self.gradients + gradients, self.hvps + hvps, self.cross_products + cross_products
        )


@dataclass(frozen=True)
class Progress:
    """A stage before or between steps that takes a while: data, pretraining, evaluation."""

    stage: str
    done: int
    total: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Started:
    """The run begins (step 0) or goes on (the step it was resumed at)."""

    step: int
    steps: int
    name: str
    num_upper: int
    """Scalars in x."""
    num_lower: int
    """Scalars in y."""
    device: str
    dtype: str


@dataclass(frozen=True)
class Sent:
    """What each of several ranks sent in an upper step."""

    calls: int
    """Sums over ranks."""
    bytes: int
    """Of what was summed."""


@dataclass(frozen=True)
class Stepped:
    """One upper step was taken; losses are those before the step."""

    step: int
    upper_loss: float
    lower_loss: float
    hypergradient_norm: float
    lower: LowerStats
    estimate: Stats
    totals: Totals
    seconds: float
    sent: Sent | None = None
    """None where one rank has computed it."""


@dataclass(frozen=True)
class Evaluated:
    """The problem's own measures at a step."""

    step: int
    metrics: Mapping[str, float]
    seconds: float = 0.0


HELD = "x held"
"""How the control of a run is called, wherever it is shown."""
HELD_NOTE = f"{HELD}: x as it began, y trained as long. Only what is beyond that is owed to x."


@dataclass(frozen=True)
class Held:
    """The problem's own measures with x as it began and y trained as long: what x has no part in."""

    step: int
    metrics: Mapping[str, float]
    seconds: float = 0.0
    """Training y included."""


@dataclass(frozen=True)
class Tabulated:
    """What measures were computed from, a row a case (a question, a picture): plain data."""

    step: int
    name: str
    rows: Sequence[Mapping[str, Any]] = field(repr=False)


@dataclass(frozen=True)
class Drawn:
    """A figure the problem made: a `matplotlib.figure.Figure`."""

    step: int
    name: str
    figure: Any = field(repr=False, compare=False)


@dataclass(frozen=True)
class Warned:
    """Something to know that does not stop the run; each kind is said once."""

    step: int
    kind: str
    message: str


COMPILED = "compiled"
CAPTURED = "captured as CUDA graphs"


@dataclass(frozen=True)
class Traced:
    """An upper step was recorded, and those after it are replayed (`runtime.compile`)."""

    step: int
    count: int
    """Which record of the run it is."""
    operations: int
    why: str
    """Where the step departed from the records before it; empty of the first. `COMPILED` of one whose
    operations were compiled (`runtime.compile: inductor`), `CAPTURED` of one that became CUDA graphs."""
    seconds: float


@dataclass(frozen=True)
class Saved:
    """A checkpoint lies complete on disk."""

    step: int
    path: Path


@dataclass(frozen=True)
class Finished:
    """The run ended: "done", "stopped early", "interrupted", "terminated", "hung up", "diverged" or
    "failed"."""

    step: int
    reason: str
    seconds: float
    warned: Mapping[str, int] = field(default_factory=dict)
    """At how many steps each kind of warning held, those before a resume included."""
    message: str = ""
    """Why it stopped early; what was wrong, of a run that diverged or failed."""


EARLY = "stopped early"
COMPLETE = ("done", EARLY)
"""Reasons of a run that has come to its end: there is nothing to go on with."""

Event = (
    Progress
    | Started
    | Stepped
    | Evaluated
    | Held
    | Tabulated
    | Drawn
    | Warned
    | Traced
    | Saved
    | Finished
)
