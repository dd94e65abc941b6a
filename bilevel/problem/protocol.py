"""The Problem protocol: two pure losses and where their data comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from bilevel.rng import Streams
from bilevel.types import Params, Structure


@runtime_checkable
class Problem(Protocol):
    """min over x of F(x, y*(x)),  y*(x) ∈ argmin over y of G(x, y).

    The losses are pure in (x, y, batch): no `.grad`, no buffers changed, no random numbers drawn
    that are not in the batch. Batches are tensors in dicts, lists, tuples or dataclasses; the run moves them
    to its device and casts floating ones to its dtype.

    A batch iterator is infinite and a deterministic function of its stream. One that has
    `state_dict()` and `load_state_dict(state)` resumes by them; any other is resumed by drawing
    again what it had drawn.

    Optional methods, looked up by name:

    - `prepare() -> Iterator[Progress]`: slow work (download, pretraining) before `init`, reported as it goes;
    - `place(device, dtype)`: move constants that live in the problem; called once before `init`;
    - `lower_start(x, y) -> y`: where each lower solve starts (MAML, cold start); default: the last
      y; differentiable in x, where unrolling is to see that y_0 depends on x;
    - `lower_solution(x) -> y` and `hypergradient(x) -> dict`: closed forms, used by `bilevel check`;
    - `export(x, y, folder, merged)`: write what was learned for other programs (`bilevel export`);
    - `evaluate(x, y) -> dict[str, float]`: measures; `figures(x, y) -> dict[str, Figure]`: drawn at the end;
    - `episodes(stream) -> Iterator[(lower batch, upper batch)]`: batches that belong together, as
      the two halves of a task do; a run then draws one pair an upper step and nothing else;
    - `project_upper(x) -> x`, `project_lower(y) -> y`: projections after each step;
    - `prox_lower(x, y, step) -> y`: the proximal map of step · R, where y* minimises G + R and
      `lower_loss` is G alone; the projection onto a set that depends on x is one;
    - `lower_map(x, y, batch) -> y`: a map whose fixed point y* is, where no G has y* as its
      minimum; `lower_loss` is then a merit function, ½ ‖y − T(x, y)‖²;
    - `lower_constraints(x, y, batch) -> {"equality": c, "inequality": d}`: y* minimises G over
      c = 0, d ≤ 0; `project_lower`, `prox_lower` or lower: augmented_lagrangian holds y there.
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


def restart_of(problem: Any, y: Params) -> Callable[[Params], Params] | None:
    """`lower_start` as a function of x alone, y held fixed; None where the problem has none."""
    lower_start = getattr(problem, "lower_start", None)
    return None if lower_start is None else lambda x: lower_start(x, y)


def structure_of(problem: Any) -> Structure:
    """The optional methods of a problem that say what y* is beside the minimum of G."""
    return Structure(
        prox=getattr(problem, "prox_lower", None),
        map=getattr(problem, "lower_map", None),
        constraints=getattr(problem, "lower_constraints", None),
    )
