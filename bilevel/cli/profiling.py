"""`run --profile`: where the time of upper steps goes, as a table and as a trace for a viewer.

Losses, derivatives, solvers, sinks and checkpoints are timed where the run calls them, each without
what it calls in its turn; nothing stands in the way of a run that is not profiled.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bilevel.calculus import unsupported
from bilevel.cli.run_loop import RunLoop
from bilevel.problem import estimation
from bilevel.problem.levels import Levels
from bilevel.run import engine
from bilevel.run.upper import Upper
from bilevel.runfolder import files
from bilevel.types import Loss

KINDS = {
    "losses": "F and G evaluated",
    "gradients": "first derivatives of F and G",
    "products": "products with second derivatives",
    "lower": "algebra of the lower solver",
    "estimate": "algebra and checks of the estimator",
    "upper": "the step of x",
    "engine": "the rest of a step: batches, checks, events",
    "sinks": "what is recorded and shown",
    "checkpoints": "states saved",
}
OUTERMOST = ("engine", "sinks", "checkpoints")
WARM, TRACED = 2, 2
"""Upper steps before those that the trace has, and those: none of them is in the table of a longer run."""


class StepClock:
    """Seconds and calls of each kind of work, each without what it called that is of another."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now, self._open = now, []
        self._since = now()
        self.restart()

    def restart(self) -> None:
        """Forget what was counted; what is being worked at goes on."""
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self.calls: Counter[str] = Counter()
        self.steps = 0

    @contextmanager
    def span(self, kind: str) -> Iterator[None]:
        """Work of this kind; not counted outside of upper steps, as in an evaluation."""
        if not self._open and kind not in OUTERMOST:
            yield
            return
        self._charge()
        self._open.append(kind)
        self.calls[kind] += 1
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def _charge(self) -> None:
        now = self._now()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def timed(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with self.span(kind), torch.profiler.record_function(f"bilevel: {kind}"):
                return function(*args, **kwargs)

        return wrapper

    def table(self) -> dict[str, dict[str, float]]:
        """Of each kind: seconds and calls an upper step, and the share of all seconds."""
        whole, steps = sum(self.seconds.values()) or 1.0, max(1, self.steps)
        return {
            kind: {
                "seconds": self.seconds[kind] / steps,
                "share": self.seconds[kind] / whole,
                "calls": self.calls[kind] / steps,
            }
            for kind in KINDS
        }


@contextmanager
def profiling(console: Console, folder: Path) -> Iterator[None]:
    """Profile what runs within; the table, `profile.json` and `trace.json` at the end, however it ends."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or it says when it starts, among the steps
    clock = StepClock()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    recorder = torch.profiler.profile(
        activities=activities,
        schedule=torch.profiler.schedule(wait=WARM - 1, warmup=1, active=TRACED, repeat=1),
        on_trace_ready=lambda found: found.export_chrome_trace(str(folder / "trace.json")),
    )
    try:
        with recorder, _watching(clock, recorder.step):
            yield
    finally:
        if folder.is_dir() and clock.steps:
            written = {"steps": clock.steps, "upper step": clock.table()}
            text = json.dumps(written, indent=1) + "\n"
            files.write_text(
                folder / "profile.json", text, remedy="free some space, or profile elsewhere"
            )
            _print(console, folder, clock)


@contextmanager
def _watching(clock: StepClock, stepped: Callable[[], None]) -> Iterator[None]:
    """Every place where the run calls what is timed, with a clock; as they were afterwards."""
    advance, taken = engine.advance, 0

    def watched_advance(*given: Any) -> Iterator[Any]:
        nonlocal taken
        if taken == WARM + TRACED:
            clock.restart()
        events = advance(*given)
        while True:
            with clock.span("engine"):
                event = next(events, None)
            if event is None:
                break
            yield event
        clock.steps, taken = clock.steps + 1, taken + 1
        stepped()

    def watched(grad: Callable[..., Any]) -> Callable[..., Any]:
        gradient, product = clock.timed("gradients", grad), clock.timed("products", grad)

        def either(outputs: Any, inputs: Any, grad_outputs: Any = None, **options: Any) -> Any:
            chosen = gradient if grad_outputs is None else product
            return chosen(outputs, inputs, grad_outputs, **options)

        return either

    places: list[tuple[Any, str, Callable[..., Any]]] = [
        (engine, "advance", watched_advance),
        (torch.autograd, "grad", watched(torch.autograd.grad)),
        (unsupported, "backward", watched(unsupported.backward)),
        (Loss, "__call__", clock.timed("losses", Loss.__call__)),
        (Levels, "solve", clock.timed("lower", Levels.solve)),
        (estimation, "estimate", clock.timed("estimate", estimation.estimate)),
        (Upper, "step", clock.timed("upper", Upper.step)),
        (RunLoop, "_tell", clock.timed("sinks", RunLoop._tell)),
        (RunLoop, "_save", clock.timed("checkpoints", RunLoop._save)),
    ]
    with ExitStack() as restoring:
        for owner, name, watched in places:
            restoring.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, watched)
        yield


def _print(console: Console, folder: Path, clock: StepClock) -> None:
    console.print(f"an upper step, the mean of {clock.steps}")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("work")
    for head in ("ms", "%", "calls"):
        table.add_column(head, justify="right")
    for kind, row in clock.table().items():
        cells = f"{1e3 * row['seconds']:.3f}", f"{100 * row['share']:.1f}", f"{row['calls']:.4g}"
        table.add_row(kind, *cells)
    console.print(table)
    if (folder / "trace.json").exists():
        console.print(f"{folder / 'trace.json'}: for ui.perfetto.dev", soft_wrap=True)
