"""The progress of a run that Python drives: the panel in a terminal or a notebook, lines in a log."""

from __future__ import annotations

import time
from typing import Any, Literal

from rich.console import Console, RenderableType
from rich.jupyter import JupyterMixin

from bilevel.errors import RecipeError
from bilevel.events import Event, Progress, Started, Stepped
from bilevel.sinks import Receiver
from bilevel.sinks.panel import REFRESHES, Panel

NOTEBOOK_WIDTH = 80


def progress(wanted: bool | Literal["auto"], console: Console | None = None) -> Receiver | None:
    """What shows progress, on stderr; "auto" is None where neither a person nor a notebook reads it.

    A terminal has the panel of `bilevel run`, gone when the run ends, since the result says the
    same; a notebook has it in one output that is updated, which needs no widgets. A log gets a
    line every 10 % of the steps, if progress is asked for there.

    Raises:
        RecipeError: `wanted` is neither.
    """
    if not isinstance(wanted, bool) and wanted != "auto":
        raise RecipeError(f"progress = {wanted!r}; must be True, False or 'auto'")
    console = console or Console(stderr=True)
    if not wanted:
        return None
    if console.is_jupyter:
        return NotebookPanel()
    if console.is_terminal:
        return Panel(console, stays=False)
    return None if wanted == "auto" else Lines(console.file)


class NotebookPanel:
    """The panel as an output of a notebook's cell; of a run that has ended its bar stays.

    It is drawn while events come, at most `REFRESHES` times a second: a thread that drew would
    belong to no cell.
    """

    def __init__(self) -> None:
        # no terminal: the notebook's own colours, and characters of its own font
        self._panel = Panel(Console(width=NOTEBOOK_WIDTH, force_jupyter=False))
        self._handle: Any = None
        self._drawn = float("-inf")

    def receive(self, event: Event) -> None:
        if self._panel.takes(event) and time.monotonic() - self._drawn >= 1 / REFRESHES:
            self._show(self._panel.drawn())
            self._drawn = time.monotonic()

    def close(self) -> None:
        if self._handle:
            self._panel.settle()
            self._show(self._panel.bar())

    def _show(self, renderable: RenderableType) -> None:
        from IPython.display import display  # pyright: ignore[reportMissingImports]

        if self._handle is None:
            self._handle = display(Drawing(renderable), display_id=True)
        else:
            self._handle.update(Drawing(renderable))


class Drawing(JupyterMixin):
    """What rich draws, as HTML and as text, at a width that does not hang on that of a terminal."""

    def __init__(self, renderable: RenderableType) -> None:
        self._renderable = renderable

    def __rich__(self) -> RenderableType:
        return self._renderable


class Lines:
    """The same as text, written to `out`: every tenth of a stage."""

    def __init__(self, out: Any) -> None:
        self._out = out
        self._reading = Reading()
        self._said = ("", -1)

    def receive(self, event: Event) -> None:
        seen = self._reading
        if not seen.takes(event):
            return
        at = (seen.stage, 10 * seen.done // (seen.total or 1))
        if at != self._said or seen.done == seen.total:
            self._said = at
            self._out.write(f"{seen.stage} {seen.count}  {seen.note}".rstrip() + "\n")

    def close(self) -> None:
        self._out.flush()


class Reading:
    """What an event says of how far a run is."""

    def __init__(self) -> None:
        self.stage, self.note = "", ""
        self.done, self.total = 0, None
        self._steps = 0

    @property
    def count(self) -> str:
        return f"{self.done:,}/{self.total:,}" if self.total else f"{self.done:,}"

    def takes(self, event: Event) -> bool:
        """Whether it says anything."""
        if isinstance(event, Progress):
            self._is(event.stage, event.done, event.total, event.note)
        elif isinstance(event, Started):
            self._steps = event.steps
            self._is("step", event.step, event.steps)
        elif isinstance(event, Stepped):
            losses = f"F {event.upper_loss:.3e}  G {event.lower_loss:.3e}"
            note = f"{losses}  ‖dΦ/dx‖ {event.hypergradient_norm:.1e}"
            self._is("step", event.step, self._steps, note)
        else:
            return False
        return True

    def _is(self, stage: str, done: int, total: int | None, note: str = "") -> None:
        self.stage, self.done, self.total, self.note = stage, done, total, note
