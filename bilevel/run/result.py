"""What `minimize` returns: where a run ended, how it came there, and how that is shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass, field
from typing import Any

from bilevel import notebook
from bilevel.events import HELD, HELD_NOTE, Evaluated, Stepped, Warned
from bilevel.run.setup import Setup
from bilevel.sinks.numbers import at_end, dated, duration, significant, spelled

_OF_A_STEP = {
    "upper loss F": "upper_loss",
    "lower loss G": "lower_loss",
    "‖dΦ/dx‖": "hypergradient_norm",
}


@dataclass(frozen=True)
class BestPoint:
    """The state of a run at which a measure was best."""

    step: int
    metrics: Mapping[str, float]
    x: Any
    y: Any


@dataclass(frozen=True, repr=False)
class Result:
    """Where a run ended and how it came there. Printed it is a table; a notebook adds the curves."""

    x: Any
    """In the containers of the problem's own: a dict of tensors, or nested."""
    y: Any
    history: tuple[Stepped, ...]
    """One event an upper step: losses before the step, ‖dΦ/dx‖, evidence and oracle calls."""
    evaluations: tuple[Evaluated, ...]
    """The problem's own measures, before, in between where asked for, and after."""
    held: Mapping[str, float]
    """Them with x as it began and y trained as long; empty unless `evaluate_held`."""
    warned: tuple[Warned, ...]
    figures: Mapping[str, Any]
    reason: str
    """"done", "stopped early" or "interrupted"."""
    best: BestPoint | None
    """Where the measure that `best` names was best; None unless it was asked for."""
    setup: Setup = field(repr=False)

    @property
    def metrics(self) -> Mapping[str, float]:
        """The problem's own measures when they were last taken, `measured_at`; empty where it has none."""
        return self.evaluations[-1].metrics if self.evaluations else {}

    @property
    def measured_at(self) -> int | None:
        """The step of `metrics`: of a run that was interrupted or raised, often one before its last."""
        return self.evaluations[-1].step if self.evaluations else None

    def columns(self) -> dict[str, list[float]]:
        """The history as lists of one length: what `pandas.DataFrame` and `plt.plot` take."""
        return {
            "step": [event.step for event in self.history],
            "upper_loss": [event.upper_loss for event in self.history],
            "lower_loss": [event.lower_loss for event in self.history],
            "hypergradient_norm": [event.hypergradient_norm for event in self.history],
            "gradients": [event.totals.gradients for event in self.history],
            "hvps": [event.totals.hvps for event in self.history],
            "cross_products": [event.totals.cross_products for event in self.history],
            "seconds": [event.seconds for event in self.history],
        }

    def __repr__(self) -> str:
        if not self.history:
            return self._headline()
        shown = notebook.aligned(["", *self._heads()], list(self._rows()))
        return "\n".join([self._headline(), *shown, *self._notes()])

    def _repr_html_(self) -> str:
        """What a notebook shows: the table, the curves of losses and ‖dΦ/dx‖, the problem's figures."""
        if not self.history:
            return notebook.lines(self._headline())
        columns = self.columns()
        curves = {
            title: list(zip(columns["step"], columns[column], strict=True))
            for title, column in _OF_A_STEP.items()
        }
        return "".join(
            [
                notebook.lines(self._headline()),
                notebook.table(["", *self._heads()], list(self._rows())),
                notebook.lines(*self._notes()),
                notebook.curves(curves),
                *(notebook.picture(name, figure) for name, figure in self.figures.items()),
            ]
        )

    def _headline(self) -> str:
        total = self.setup.upper.steps
        return f"{self.setup.name}: {self.reason} after {self._taken()} of {total} steps"

    def _taken(self) -> int:
        return self.history[-1].step if self.history else 0

    def _heads(self) -> list[str]:
        return ["before", HELD, "after"] if self.held else ["before", "after"]

    def _rows(self) -> Iterator[tuple[str, list[str]]]:
        """(name, cells): F, G and ‖dΦ/dx‖ of the first and the last step, then the measures."""
        for name, column in _OF_A_STEP.items():
            ends = (significant(getattr(self.history[n], column)) for n in (0, -1))
            yield name, [*ends] if not self.held else [next(ends), "", next(ends)]
        is_before = self.evaluations and not self.evaluations[0].step
        first = self.evaluations[0].metrics if is_before else {}
        at, end = self.measured_at or 0, self._taken()
        _, last = at_end(self.metrics, at, end)
        for name in self.metrics:
            sources = (first, self.held, last) if self.held else (first, last)
            cells = [significant(of[name]) if name in of else "-" for of in sources]
            yield name, [*cells[:-1], dated(cells[-1], at or None, end)]

    def _notes(self) -> list[str]:
        """Oracle calls, time, the best point, what the run was warned of."""
        seconds = sum(event.seconds for event in self.history)
        notes = [f"{spelled(*astuple(self.history[-1].totals))} in {duration(seconds)}"]
        if self.held:
            notes.append(HELD_NOTE)
        if self.best:
            notes.append(f"best at step {self.best.step}: see .best")
        return [*notes, *(f"warning (step {w.step}): {w.message}" for w in self.warned)]
