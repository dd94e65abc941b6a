"""The progress of a run from Python: where it is shown, and what it says."""

import io
import sys
import types

from rich.console import Console

from bilevel.events import Evaluated, Progress, Started, Stepped, Totals
from bilevel.sinks.progress import Lines, Redrawn, progress
from bilevel.types import LowerStats, Stats


def stepped(step):
    lower = LowerStats(1, 1, 2.0, 0.5)
    return Stepped(step, 3.0, 2.0, 0.25, lower, Stats(), Totals(), 0.1)


def events(steps):
    yield Progress("data", 1, 2, "half")
    yield Started(0, steps, "run", 1, 1, "cpu", "float32")
    yield Evaluated(0, {"a": 1.0})
    yield from (stepped(step + 1) for step in range(steps))


def show(receiver, steps):
    for event in events(steps):
        receiver.receive(event)
    receiver.close()


def test_a_log_gets_a_line_every_tenth():
    out = io.StringIO()
    show(Lines(out, every=None), 200)
    lines = out.getvalue().splitlines()
    assert lines[:2] == ["data 1/2  half", "step 0/200"]
    assert lines[2] == "step 20/200  F 3.000e+00  G 2.000e+00  ‖dΦ/dx‖ 2.5e-01"
    assert lines[-1].startswith("step 200/200")
    assert len(lines) == 12


def test_auto_is_nothing_in_a_log_and_a_bar_in_a_terminal():
    log = Console(file=io.StringIO(), force_terminal=False)
    assert progress("auto", log) is None
    assert progress(False, Console(force_terminal=True)) is None
    assert isinstance(progress(True, log), Lines)
    out = io.StringIO()
    terminal = Console(file=out, force_terminal=True, width=80, _environ={"TERM": "xterm"})
    bar = progress("auto", terminal)
    assert isinstance(bar, Redrawn)
    show(bar, 3)
    assert "3/3" in out.getvalue()
    assert "‖dΦ/dx‖" in out.getvalue()


def test_a_notebook_has_one_output_that_is_updated(monkeypatch):
    shown = []

    class Handle:
        def update(self, data, raw):
            assert raw
            shown.append(data["text/plain"])

    def display(data, raw, display_id):
        assert raw
        assert display_id
        return Handle()

    fake = types.ModuleType("IPython.display")
    fake.display = display
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", fake)
    show(progress("auto", Console(file=io.StringIO(), force_jupyter=True)), 3)
    assert shown[-1].startswith("step 3/3  F 3.000e+00")
