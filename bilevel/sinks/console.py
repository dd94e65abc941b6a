"""What a person sees of a run: a live panel in a terminal, plain lines anywhere else."""

from __future__ import annotations

import os
import textwrap
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bilevel.events import (
    CAPTURED,
    COMPILED,
    EARLY,
    HELD,
    HELD_NOTE,
    Evaluated,
    Event,
    Finished,
    Held,
    Progress,
    Saved,
    Started,
    Stepped,
    Traced,
    Warned,
)
from bilevel.sinks.evidence import CALLS, EVIDENCE, Clock, Column
from bilevel.sinks.numbers import at_end, duration, spelled
from bilevel.sinks.panel import Panel

ROWS = 20
"""Rows of a run without a terminal, besides one for every `PATIENCE` seconds of silence."""
PATIENCE = 30.0


class ConsoleReceiver:
    """Shows events on a rich console; `measured` is what was measured of a run that is resumed."""

    def __init__(self, console: Console, measured: Iterable[Evaluated] = ()) -> None:
        self._console = console
        self._before: Mapping[str, float] = {}
        self._held: Mapping[str, float] | None = None
        self._measured: Evaluated | None = None
        for event in measured:
            self._note(event)
        self._live = Panel(console) if console.is_terminal else None
        self._plain = None if console.is_terminal else _Plain(console)
        self._first: Stepped | None = None
        self._last: Stepped | None = None
        self._resumed_at = 0
        self._warned: set[str] = set()

    def receive(self, event: Event) -> None:
        shown = self._live or self._plain
        assert shown is not None
        if isinstance(event, Started):
            self._resumed_at = event.step
            self._console.print(_headline(event), highlight=False)
        if isinstance(event, Evaluated):
            self._note(event)
        if isinstance(event, Held):
            self._held = event.metrics
        if isinstance(event, Stepped):
            self._first, self._last = self._first or event, event
        if isinstance(event, Warned):
            if event.kind not in self._warned:
                self._warned.add(event.kind)
                self._warn(event)
        elif isinstance(event, Traced):
            self._console.print(Text(_recorded(event), style="dim"))
        elif isinstance(event, Finished):
            self.close()
            self._finish(event)
        elif not isinstance(event, Saved):
            shown.receive(event)

    def stopping(self) -> None:
        """Say that the run stops after this step. Called from a signal handler."""
        (self._live or self._plain).stopping()  # pyright: ignore[reportOptionalMemberAccess]

    def close(self) -> None:
        if self._live:
            self._live.close()

    def _note(self, event: Evaluated) -> None:
        self._before = self._before if event.step else event.metrics
        self._measured = event

    def _warn(self, event: Warned) -> None:
        if self._live:
            self._live.receive(event)
        text = Text.assemble((f"warning (step {event.step}): ", "yellow"), event.message)
        self._console.print(text)

    def _finish(self, event: Finished) -> None:
        if self._measured and self._measured.metrics:
            head, after = at_end(self._measured.metrics, self._measured.step, event.step)
            columns = {"before": self._before}
            columns |= {HELD: self._held} if self._held else {}
            self._console.print(_comparison(columns | {head: after}))
            if self._held:
                self._console.print(Text(HELD_NOTE, style="dim"))
        elif self._first and self._last:  # a problem without measures has its losses
            first = {} if self._resumed_at else _losses(self._first)
            self._console.print(_comparison({"before": first, "after": _losses(self._last)}))
        done = f"{event.reason} at step {event.step} after {duration(event.seconds)}"
        if self._resumed_at:
            done += f" since step {self._resumed_at}"
        if self._last:
            done += f" · {spelled(*astuple(self._last.totals))}"
            done += " since the start" if self._resumed_at else ""
        self._console.print(done, highlight=False)
        if event.reason == EARLY:
            self._console.print(event.message, highlight=False)
        for kind, count in event.warned.items():
            if count:
                steps = f" at {count:,} of {event.step:,} steps"
                self._console.print(Text.assemble((f"warned: {kind}", "yellow"), steps))


def say(console: Console, text: str) -> None:
    """Print a text in lines as wide as the console; a word that is wider, as a path, stays whole."""
    lines = textwrap.wrap(
        text,
        max(1, console.width),
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


class _Plain:
    """Some twenty rows a run, none wider than 80 columns.

    A column of evidence is there from the first row that fills it: the head is then said again.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._clock = Clock()
        self._stages: set[tuple[str, bool]] = set()
        self._shown: Sequence[Column] | None = None
        self._said = time.monotonic()

    def receive(self, event: Event) -> None:
        if isinstance(event, Started):
            self._clock = Clock(event)
        elif isinstance(event, Progress):
            self._stage(event)
        elif isinstance(event, Stepped):
            every = max(1, self._clock.steps // ROWS)
            is_end = event.step in (self._clock.first + 1, self._clock.steps)
            if event.step % every == 0 or is_end or self._silent():
                self._row(event)

    def stopping(self) -> None:
        # the signal may have come within a write, and no stream can be written to from within one
        with suppress(OSError):
            os.write(2, b"stopping after this step; once more to stop at once\n")

    def _stage(self, event: Progress) -> None:
        ends = event.total is not None and event.done >= event.total
        if (event.stage, ends) in self._stages and not self._silent():
            return
        self._stages.add((event.stage, ends))
        if event.total:
            count = f"{event.done:,} of {event.total:,}"
        else:
            count = f"{event.done:,}" if event.done else "…"
        self._said = time.monotonic()
        parts = (f"{event.stage}: {count}", event.note)
        say(self._console, "  ".join(part for part in parts if part))

    def _row(self, event: Stepped) -> None:
        before = self._shown or ()
        shown = [each for each in EVIDENCE if each in before or each.of(event) is not None]
        width = max(4, len(str(self._clock.steps)))
        digits = 3 if width == 4 else 2
        self._said = time.monotonic()
        if shown != self._shown:
            self._shown = shown
            heads = " ".join(f"{each.head:>{each.width}}" for each in (*shown, CALLS))
            self._print(
                f"{'step':>{width}} {'F':>{digits + 7}} {'G':>{digits + 7}} ‖dΦ/dx‖ {heads} {'ETA':>6}"
            )
        cells = " ".join(f"{each.of(event) or '-':>{each.width}}" for each in (*shown, CALLS))
        self._print(
            f"{event.step:{width}d} {event.upper_loss:{digits + 7}.{digits}e} "
            f"{event.lower_loss:{digits + 7}.{digits}e} "
            f"{event.hypergradient_norm:7.1e} {cells} {self._clock.left(event.step):>6}"
        )

    def _silent(self) -> bool:
        return time.monotonic() - self._said > PATIENCE

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def _headline(event: Started) -> Text:
    resumed = f", resumed from step {event.step}" if event.step else ""
    return Text.assemble(
        (event.name, "bold"),
        f": {event.num_upper:,} upper and {event.num_lower:,} lower variables, "
        f"{event.device} {event.dtype}{resumed}",
    )


def _recorded(event: Traced) -> str:
    """What `runtime.compile` has done."""
    what = f"step {event.step} recorded, to be replayed"
    if event.why in (COMPILED, CAPTURED):
        what = f"step {event.step}: record {event.count} {event.why}"
    elif event.count > 1:
        what = f"step {event.step} recorded ({event.count}: {event.why})"
    return f"{what}: {event.operations:,} operations, {duration(event.seconds)}"


def _losses(step: Stepped) -> dict[str, float]:
    """Those before the step, as its event has them."""
    return {"upper loss F": step.upper_loss, "lower loss G": step.lower_loss}


def _comparison(columns: Mapping[str, Mapping[str, float]]) -> Table:
    """Measures by the heads of their columns; the last has the names, if any."""
    before, *_, after = columns.values()
    table = Table("", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in columns:
        table.add_column(title, justify="right")
    for name in after or before:
        known = (f"{found[name]:.4g}" if name in found else "-" for found in columns.values())
        table.add_row(Text(name), *known)
    return table
