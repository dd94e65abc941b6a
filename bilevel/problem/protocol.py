"""The Problem protocol: two pure losses and where their data comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from bilevel.rng import Streams
from bilevel.types import Params


@runtime_checkable
class Problem(Protocol):
    """min over x of F(x, y*(x)),  y*(x) ∈ argmin over y of G(x, y).

    The losses are pure in (x, y, batch): no `.grad`, no buffers changed, no random numbers drawn
    that are not in the batch. Batches are tensors in dicts, lists, tuples or dataclasses; the run
    moves them to its device and casts floating ones to its dtype.

    A batch iterator is infinite and a deterministic function of its stream. One that has
    `state_dict()` and `load_state_dict(state)` resumes by them; any other is resumed by drawing
    again what it had drawn.

    Beside these five a problem may have any of the methods in `OPTIONAL`, which says what each
    changes. They are found once, by `bilevel.problem.levels.Levels`.
    """

    def init(self, streams: Streams) -> tuple[Params, Params]:
        """x and y to start from."""
        ...

    def upper_loss(self, x: Params, y: Params, batch: Any) -> Tensor:
        """F, a scalar."""
        ...

    def lower_loss(self, x: Params, y: Params, batch: Any) -> Tensor:
        """G, a scalar."""
        ...

    def upper_batches(self, stream: Any) -> Iterator[Any]:
        """Batches for F, drawn with the generator `stream`."""
        ...

    def lower_batches(self, stream: Any) -> Iterator[Any]:
        """Batches for G, drawn with the generator `stream`."""
        ...


@dataclass(frozen=True)
class Optional:
    """A method that a problem may have."""

    signature: str
    effect: str
    """What is otherwise where a problem has it."""


OPTIONAL: Mapping[str, Optional] = {
    "prepare": Optional(
        "(device) -> Iterator[Progress]",
        "slow work (download, pretraining) before `init`, reported as it goes; a method without a "
        "parameter is called without the run's device",
    ),
    "place": Optional(
        "(device, dtype)",
        "moves constants that live in the problem to the run's device and dtype, once, before `init`; "
        "may return a list of Progress to be told",
    ),
    "part": Optional(
        "(batch, rank, ranks) -> (batch, weight)",
        "one rank's part of a batch, where a run has several ranks: a loss on the batch is the sum over "
        "ranks of weight times its value on the part; rows, weighted by their share, without it",
    ),
    "lower_start": Optional(
        "(x, y) -> y",
        "each lower solve starts there (MAML, cold start) and not at the last y; differentiable in x "
        "where unrolling is to see that y_0 depends on x",
    ),
    "lower_solution": Optional("(x) -> y*", "the closed form of y*(x), for `bilevel check`"),
    "hypergradient": Optional("(x) -> dict", "the closed form of dΦ/dx, for `bilevel check`"),
    "evaluate": Optional(
        "(x, y) -> dict[str, float]",
        "measures before and after a run, and as often as the recipe says; a generator of Progress "
        "may return them, and yield Tabulated: the cases they are computed from",
    ),
    "figures": Optional("(x, y) -> dict[str, Figure]", "matplotlib figures, drawn at the end"),
    "export": Optional(
        "(x, y, folder, merged)", "writes what was learned for other programs (`bilevel export`)"
    ),
    "episodes": Optional(
        "(stream) -> Iterator[(lower batch, upper batch)]",
        "batches that belong together, as the two halves of a task do: one pair an upper step, and "
        "nothing else is drawn to train on; `upper_batches` and `lower_batches` are its halves, which "
        "losses are looked at on before a run",
    ),
    "project_upper": Optional("(x) -> x", "the projection of x, after each upper step"),
    "project_lower": Optional("(y) -> y", "the projection of y, after each lower step"),
    "prox_lower": Optional(
        "(x, y, step) -> y",
        "the proximal map of step · R: y* minimises G + R and `lower_loss` is G alone; the projection "
        "onto a set that depends on x is one",
    ),
    "lower_map": Optional(
        "(x, y, batch) -> y",
        "a map whose fixed point y* is, where no G has y* as its minimum; `lower_loss` is then a "
        "merit function, ½ ‖y − T(x, y)‖²",
    ),
    "lower_constraints": Optional(
        '(x, y, batch) -> {"equality": c, "inequality": d}',
        "y* minimises G over c = 0, d ≤ 0; `project_lower`, `prox_lower` or lower: "
        "augmented_lagrangian keeps y there",
    ),
    "lower_diagonal": Optional(
        "(x, y, batch) -> dict",
        "what is known of the diagonal of ∂²yy G, positive, for preconditioner: diagonal",
    ),
}
"""The optional methods of a problem by name. Problems that are made of problems map each of them."""
