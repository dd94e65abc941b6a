"""What a person sees of a run: a live line in a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from bilevel.events import Evaluated, Event, Finished, Progress, Saved, Started, Stepped, Warned

ROWS = 20
"""Rows of a run without a terminal, besides one for every `PATIENCE` seconds of silence."""
PATIENCE = 30.0


class ConsoleReceiver:
    """Shows events on a rich console; `before` are the measures of a run that is resumed."""

    def __init__(self, console: Console, before: Mapping[str, float] | None = None) -> None:
        self._console = console
        self._before = before
        self._after: Mapping[str, float] | None = None
        self._live = _Live(console) if console.is_terminal else None
        self._plain = None if console.is_terminal else _Plain(console)
        self._last: Stepped | None = None
        self._warned: set[str] = set()

    def receive(self, event: Event) -> None:
        shown = self._live or self._plain
        assert shown is not None
        if isinstance(event, Started):
            self._console.print(_headline(event), highlight=False)
        if isinstance(event, Evaluated):
            self._before = self._before or event.metrics
            self._after = event.metrics
        if isinstance(event, Stepped):
            self._last = event
        if isinstance(event, Warned):
            if event.kind not in self._warned:
                self._warned.add(event.kind)
                self._warn(event)
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

    def _warn(self, event: Warned) -> None:
        text = Text.assemble((f"warning (step {event.step}): ", "yellow"), event.message)
        self._console.print(text)

    def _finish(self, event: Finished) -> None:
        if self._before and self._after:
            self._console.print(_comparison(self._before, self._after))
        spent = _duration(event.seconds)
        done = f"{event.reason} at step {event.step} after {spent}"
        if self._last:
            totals = self._last.totals
            done += f" · {totals.gradients:,} gradients, {totals.hvps:,} Hessian products"
        self._console.print(done, highlight=False)
        for kind, count in event.warned.items():
            if count:
                steps = f" at {count:,} of {event.step:,} steps"
                self._console.print(Text.assemble((f"warned: {kind}", "yellow"), steps))


class _Live:
    """Two lines that are redrawn: stage or step, bar, losses, time left; below, the evidence."""

    def __init__(self, console: Console) -> None:
        self._bar = Bar(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=12),
            TextColumn("{task.fields[count]}", markup=False),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
        )
        self._evidence = Text()
        self._panel = Live(Group(self._bar, self._evidence), console=console, transient=True)
        self._task: TaskID | None = None
        self._clock = _Clock()
        self._description = ""

    def receive(self, event: Event) -> None:
        if isinstance(event, Progress):
            count = f"{event.done:,}/{event.total:,}" if event.total else f"{event.done:,}"
            self._show(event.stage, event.done, event.total, count, event.note)
        elif isinstance(event, Started):
            self._clock = _Clock(event)
            self._show("step", event.step, event.steps, f"{event.step}/{event.steps}", "")
        elif isinstance(event, Stepped):
            left = self._clock.left(event.step)
            note = (
                f"F {event.upper_loss:.3e}  G {event.lower_loss:.3e}  "
                f"|h| {event.hypergradient_norm:.1e}  {left}"
            )
            count = f"{event.step}/{self._clock.steps}"
            residual, condition, error = (part.strip() for part in _evidence(event))
            self._evidence.plain = f"  residual {residual}  condition {condition}  error {error}  {_calls(event)} calls"
            self._show("step", event.step, self._clock.steps, count, note)

    def _show(self, what: str, done: int, total: int | None, count: str, note: str) -> None:
        if self._description != "stopping":
            self._description = what
        if self._task is None:
            self._panel.start()
            self._task = self._bar.add_task("", total=total, count="", note="")
        self._bar.update(
            self._task,
            description=self._description,
            completed=done,
            total=total,
            count=count,
            note=note,
        )

    def stopping(self) -> None:
        self._description = "stopping"
        if self._task is not None:
            self._bar.update(self._task, description="stopping")

    def close(self) -> None:
        self._panel.stop()


class _Plain:
    """Some twenty rows a run, none wider than 80 columns."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._clock = _Clock()
        self._stages: set[tuple[str, bool]] = set()
        self._has_head = False
        self._said = time.monotonic()

    def receive(self, event: Event) -> None:
        if isinstance(event, Started):
            self._clock = _Clock(event)
        elif isinstance(event, Progress):
            self._stage(event)
        elif isinstance(event, Stepped):
            every = max(1, self._clock.steps // ROWS)
            is_end = event.step in (self._clock.first + 1, self._clock.steps)
            if event.step % every == 0 or is_end or self._silent():
                self._row(event)

    def stopping(self) -> None:
        self._say("stopping after this step; once more to stop at once")

    def _stage(self, event: Progress) -> None:
        ends = event.total is not None and event.done >= event.total
        if (event.stage, ends) in self._stages and not self._silent():
            return
        self._stages.add((event.stage, ends))
        if event.total:
            count = f"{event.done:,} of {event.total:,}"
        else:
            count = f"{event.done:,}" if event.done else "…"
        self._say("  ".join(part for part in (f"{event.stage}: {count}", event.note) if part))

    def _row(self, event: Stepped) -> None:
        if not self._has_head:
            self._has_head = True
            self._say(
                "step upper loss lower loss     |h| residual   cond.   error         g+H    left"
            )
        residual, condition, error = _evidence(event)
        self._say(
            f"{event.step:4d} {event.upper_loss:10.3e} {event.lower_loss:10.3e} "
            f"{event.hypergradient_norm:7.1e} {residual:>8} {condition:>7} {error:>7} "
            f"{_calls(event):>11} {self._clock.left(event.step):>7}"
        )

    def _silent(self) -> bool:
        return time.monotonic() - self._said > PATIENCE

    def _say(self, text: str) -> None:
        self._said = time.monotonic()
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def _evidence(event: Stepped) -> tuple[str, str, str]:
    """(residual, condition or what stands against it, error relative to h), `-` for the unknown."""
    stats, size = event.estimate, event.hypergradient_norm
    bound = None if stats.error_bound is None or not size else stats.error_bound / size
    is_negative = stats.curvature is not None and stats.curvature <= 0
    condition = "curv≤0" if is_negative else _small(stats.condition)
    return _small(stats.residual), condition, _small(bound)


def _small(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _calls(event: Stepped) -> str:
    """Gradients and Hessian products so far."""
    return f"{_short(event.totals.gradients)}+{_short(event.totals.hvps)}"


def _short(count: int) -> str:
    """At most five characters: 99999, 1235k, 12.3M."""
    if count < 100_000:
        return str(count)
    return f"{count / 1e3:.0f}k" if count < 9_999_500 else f"{count / 1e6:.3g}M"


class _Clock:
    """Time left, from the second step on: the first one also warms everything up."""

    def __init__(self, event: Started | None = None) -> None:
        self.first = event.step if event else 0
        self.steps = event.steps if event else 0
        self._began: float | None = None

    def left(self, step: int) -> str:
        if self._began is None:
            self._began = time.monotonic()
        taken = step - self.first - 1
        spent = time.monotonic() - self._began
        return _duration(spent / taken * (self.steps - step)) if taken else ""


def _headline(event: Started) -> Text:
    goes_on = f", going on from step {event.step}" if event.step else ""
    return Text.assemble(
        (event.name, "bold"),
        f": {event.num_upper:,} upper and {event.num_lower:,} lower variables, "
        f"{event.device} {event.dtype}{goes_on}",
    )


def _comparison(before: Mapping[str, float], after: Mapping[str, float]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for name in after:
        first = f"{before[name]:.4g}" if name in before else "-"
        table.add_row(Text(name), first, f"{after[name]:.4g}")
    return table


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
