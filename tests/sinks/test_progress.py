"""The progress of a run from Python: where it is shown, and what it says."""

import io
import math
import sys
import types

import pytest
from rich.console import Console

from bilevel.events import Evaluated, Progress, Started, Stepped, Totals
from bilevel.sinks.panel import Panel
from bilevel.sinks.progress import Lines, NotebookPanel, progress
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
    show(Lines(out), 200)
    lines = out.getvalue().splitlines()
    assert lines[:2] == ["data 1/2  half", "step 0/200"]
    assert lines[2] == "step 20/200  F 3.000e+00  G 2.000e+00  ‖dΦ/dx‖ 2.5e-01"
    assert lines[-1].startswith("step 200/200")
    assert len(lines) == 12


def test_auto_is_nothing_in_a_log_and_the_panel_in_a_terminal():
    log = Console(file=io.StringIO(), force_terminal=False)
    assert progress("auto", log) is None
    assert progress(False, Console(force_terminal=True)) is None
    assert isinstance(progress(True, log), Lines)
    out = io.StringIO()
    terminal = Console(file=out, force_terminal=True, width=80, _environ={"TERM": "xterm"})
    panel = progress("auto", terminal)
    assert isinstance(panel, Panel)
    show(panel, 3)
    assert "3/3" in out.getvalue()
    assert "‖dΦ/dx‖" in out.getvalue()


ERASED = "\x1b[1A\x1b[2K"
"""One line up, and that line is gone."""


@pytest.mark.parametrize("stays", [False, True])
def test_the_panel_of_minimize_is_gone_when_the_run_ends(stays):
    out = io.StringIO()
    terminal = Console(file=out, force_terminal=True, width=80, _environ={"TERM": "xterm"})
    show(progress("auto", terminal) if not stays else Panel(terminal), 3)
    # bar, F, G, ‖dΦ/dx‖, oracle calls: five lines that it takes back, or leaves
    assert out.getvalue().endswith(5 * ERASED) is not stays


class Cell:
    """A notebook's cell: the states of its outputs, one list an output."""

    def __init__(self, monkeypatch):
        self.outputs = []
        fake = types.ModuleType("IPython.display")
        fake.display = self.display
        monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
        monkeypatch.setitem(sys.modules, "IPython.display", fake)

    def display(self, shown, display_id):
        assert display_id
        states = [shown._repr_mimebundle_((), ())]
        self.outputs.append(states)
        handle = types.SimpleNamespace()
        handle.update = lambda shown: states.append(shown._repr_mimebundle_((), ()))
        return handle


def in_a_notebook(monkeypatch, receive):
    cell = Cell(monkeypatch)
    panel = progress("auto", Console(file=io.StringIO(), force_jupyter=True))
    assert isinstance(panel, NotebookPanel)
    receive(panel)
    panel.close()
    return cell.outputs


def test_a_notebook_has_one_output_that_is_updated(monkeypatch):
    monkeypatch.setattr("bilevel.sinks.progress.REFRESHES", math.inf)  # after each event
    [states] = in_a_notebook(monkeypatch, lambda panel: [panel.receive(e) for e in events(3)])
    assert len(states) == 6  # of data, start, three steps, and the end
    before_the_end = states[-2]["text/plain"].splitlines()
    assert before_the_end[0].split()[0::2] == ["step", "3/3", "0.0s"]  # and the time that is left
    assert [line.split()[:2] for line in before_the_end[1:4]] == [
        ["F", "3.000e+00"],
        ["G", "2.000e+00"],
        ["‖dΦ/dx‖", "2.5e-01"],
    ]
    assert states[-1]["text/plain"].split()[0::2] == ["step", "3/3"]  # nothing that varies
    assert all("<script" not in state["text/html"] for state in states)


def test_a_notebook_is_drawn_for_few_of_many_events(monkeypatch):
    monkeypatch.setattr("bilevel.sinks.progress.time", types.SimpleNamespace(monotonic=lambda: 7.0))
    [states] = in_a_notebook(monkeypatch, lambda panel: [panel.receive(e) for e in events(500)])
    assert len(states) == 2  # no time has passed since the first


def test_a_run_that_fails_before_its_first_step_shows_what_it_was_at(monkeypatch):
    [states] = in_a_notebook(monkeypatch, lambda panel: panel.receive(Progress("data", 1, 2)))
    assert states[-1]["text/plain"].split()[0::2] == ["data", "1/2"]
