"""What is redrawn of a run in a terminal: bar, losses with small curves, evidence, memory."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from bilevel.events import Event, Progress, Started, Stepped, Warned
from bilevel.sinks.evidence import CALLS, EVIDENCE, Clock

BLOCKS, ASCII = "▁▂▃▄▅▆▇█", "_.-=+*%#"
KEPT = 256
"""Points of a curve at most; beyond, every second one is dropped."""
REFRESHES = 4
"""Times a second that the panel is drawn, by a thread of its own."""


class Panel:
    """Redrawn lines, which fit 60 columns: bar and ETA, losses with their curves, evidence, warning.

    A step costs a few assignments: what is shown is made when it is drawn. The last state of a run
    that took steps stays on the screen where it `stays`; the stages before the first step leave nothing.
    """

    def __init__(self, console: Console, *, stays: bool = True) -> None:
        self._console = console
        self._stays = stays
        self._clock = Clock()
        self._stage: Progress | None = None
        self._step: Stepped | None = None
        self._left = ""
        self._warning: Warned | None = None
        self._is_stopping = False
        self._upper, self._lower = Curve(), Curve()
        encoding = console.encoding.replace("-", "").lower()
        self._has_blocks = encoding.startswith("utf")
        self._live = Live(
            get_renderable=self.drawn,
            console=console,
            refresh_per_second=REFRESHES,
            transient=True,
        )

    def receive(self, event: Event) -> None:
        if self.takes(event) and not self._live.is_started:
            self._live.start()

    def takes(self, event: Event) -> bool:
        """Remember what it says; whether it is a reason to begin to draw."""
        if isinstance(event, Warned):
            self._warning = event
            return False
        if isinstance(event, Progress):
            self._stage = event
        elif isinstance(event, Started):
            self._clock = Clock(event)
            self._stage = Progress("step", event.step, event.steps)
        elif isinstance(event, Stepped):
            self._step, self._stage = event, None
            self._left = self._clock.left(event.step)
            self._upper.add(event.upper_loss)
            self._lower.add(event.lower_loss)
        else:
            return False
        return True

    def stopping(self) -> None:
        self._is_stopping = True  # and no more: a signal may have come while the panel is drawn

    def close(self) -> None:
        if not self._live.is_started:
            return
        self.settle()
        self._live.transient = self._step is None or not self._stays
        self._live.stop()

    def settle(self) -> None:
        """Show of a run that took steps where it ended; the warning stands elsewhere, in full."""
        if self._step:
            self._stage = None
        self._warning = None
        self._left = ""
        self._is_stopping = False

    def drawn(self) -> RenderableType:
        """What is on the screen now."""
        step, lines = self._step, [self.bar()]
        if step:
            norm = "‖dΦ/dx‖" if self._has_blocks else "|dPhi/dx|"
            known = {each.head: each.of(step) for each in EVIDENCE}
            first = [f"{norm} {step.hypergradient_norm:.1e}"]
            rest = [f"{CALLS.head} {CALLS.of(step)}"]
            for place, (head, value) in enumerate(known.items()):
                if value is not None:
                    shown = head if self._has_blocks else head.replace("≥", ">=")
                    (rest if place else first).append(f"{shown} {value}")
            first += [f"memory {size}"] if (size := peak_memory()) else []
            lines += [
                self._loss("F", step.upper_loss, self._upper),
                self._loss("G", step.lower_loss, self._lower),
                _line("  ".join(first)),
                _line("  ".join(rest)),
            ]
        if self._warning:
            said = f"step {self._warning.step}: {self._warning.message}"
            lines.append(_line(said.replace("\n", " "), "yellow"))
        return Group(*lines)

    def bar(self) -> RenderableType:
        """The first line alone."""
        step = self._step.step if self._step else 0
        at = self._stage or Progress("step", step, self._clock.steps)
        count = f"{at.done:,}/{at.total:,}" if at.total else f"{at.done:,}"
        note = at.note or (f"ETA {self._left}" if self._left and at.stage == "step" else "")
        name = "stopping" if self._is_stopping else at.stage
        line = Table.grid(padding=(0, 1), pad_edge=False)
        for _ in range(4):
            line.add_column(no_wrap=True, overflow="ellipsis")
        bar = ProgressBar(total=at.total or None, completed=at.done, width=16)
        line.add_row(Text(name, style="bold"), bar, Text(count), Text(note))
        return line

    def _loss(self, name: str, value: float, curve: Curve) -> Text:
        width = max(0, min(60, self._console.width) - 16)
        ramp = BLOCKS if self._has_blocks else ASCII
        return _line(f"{name} {value:.3e}".ljust(14) + spark(curve.values(), width, ramp))


class Curve:
    """A loss at equally spaced steps, `KEPT` points at most, the first step among them."""

    def __init__(self) -> None:
        self._points: list[float] = []
        self._every, self._seen = 1, 0
        self._last = math.nan

    def add(self, value: float) -> None:
        if self._seen % self._every == 0:
            self._points.append(value)
            if len(self._points) > KEPT:
                self._points = self._points[::2]
                self._every *= 2
        self._last = value
        self._seen += 1

    def values(self) -> list[float]:
        is_last_in = (self._seen - 1) % self._every == 0
        return [*self._points] if is_last_in or not self._seen else [*self._points, self._last]


def spark(values: Sequence[float], width: int, ramp: str = BLOCKS) -> str:
    """A curve of `width` characters at most, lowest to highest finite value; × is NaN or infinite.

    Its scale is that of the logarithm where all values are positive and span a factor of 100.
    """
    if len(values) > width:
        last = len(values) - 1
        values = [values[round(i * last / max(1, width - 1))] for i in range(width)]
    finite = [value for value in values if math.isfinite(value)]
    if finite and 0 < 100 * min(finite) <= max(finite):
        values = [math.log(v) if math.isfinite(v) and v > 0 else math.nan for v in values]
        finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    # halves, so that the span of the largest floats is finite
    span = high / 2 - low / 2
    top = len(ramp) - 1

    def character(value: float) -> str:
        if not math.isfinite(value):
            return "×" if ramp == BLOCKS else "x"
        return ramp[round((value / 2 - low / 2) / span * top)] if span > 0 else ramp[0]

    return "".join(map(character, values))


def peak_memory() -> str | None:
    """The most that the process held, of a CUDA device too where one is in use; None if unknown."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    held = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.1f} GB"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        held += f", CUDA {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
    return held


def _line(text: str, style: str = "") -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")
