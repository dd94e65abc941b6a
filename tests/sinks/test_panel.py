"""The live panel: what it shows at a width, what it leaves, and its curves."""

import io
import math
import os
import pty
import re
from contextlib import suppress

import pytest
from rich.console import Console

from bilevel.events import Finished, Progress, Warned
from bilevel.sinks.console import ConsoleReceiver
from bilevel.sinks.panel import ASCII, BLOCKS, KEPT, Curve, Panel, spark
from tests.sinks.events import STARTED, stepped, with_evidence

KNOWN = {"residual": 3e-4, "curvature": 0.1, "condition": 4e7, "error_bound": 5e-4}


class Encoded(io.StringIO):
    encoding = "utf-8"


class AsciiText(Encoded):
    encoding = "ascii"


def drawn(panel: Panel, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(panel.drawn())
    return capture.get()


def panel_of(events, width: int = 60, out: io.StringIO | None = None) -> Panel:
    panel = Panel(Console(file=out or Encoded(), width=width, force_terminal=True))
    for event in events:
        panel.receive(event)
    return panel


EVENTS = [STARTED, stepped(1, 4.0), stepped(2, math.nan), with_evidence(3, **KNOWN)]


@pytest.mark.parametrize("width", [40, 60, 80])
def test_the_panel_is_six_lines_within_the_width(width):
    panel = panel_of([*EVENTS, Warned(3, "curvature", "negative " * 30)], width)
    try:
        lines = drawn(panel, width).splitlines()
    finally:
        panel.close()
    assert len(lines) == 6
    assert max(map(len, lines)) <= width
    assert lines[0].startswith("step ")
    assert "3/6" in lines[0]
    assert lines[1].rstrip() == "F 1.000e+00   █×▁"
    assert lines[2].startswith("G -5.000e-01")
    assert lines[5].startswith("step 3: negative")
    if width >= 60:
        assert "ETA" in lines[0]
        assert re.match(r"‖dΦ/dx‖ 2.5e-01  adj.res 3.0e-04  memory \d+\.\d GB", lines[3])
        assert lines[4].split() == [
            "grad/HVP/cross",
            "3/3/3",
            "cond≥",
            "4e+07",
            "rel.err",
            "~2.0e-03",
        ]


def test_a_terminal_without_blocks_gets_ascii():
    panel = panel_of([STARTED, stepped(1, 4.0), stepped(2, 1.0)], out=AsciiText())
    try:
        lines = drawn(panel, 60).splitlines()
    finally:
        panel.close()
    assert lines[1].rstrip() == "F 1.000e+00   #_"
    assert lines[3].startswith("|dPhi/dx| 2.5e-01")


def test_a_run_leaves_its_last_state_and_a_stage_leaves_nothing():
    out = Encoded()
    panel_of([Progress("data", 1, 2)], out=out).close()
    assert out.getvalue().endswith("\x1b[1A\x1b[2K"), "the stage is wiped out"
    out = Encoded()
    panel = panel_of([*EVENTS, Warned(3, "curvature", "negative"), Progress("held", 1)], out=out)
    panel.close()
    panel.close()
    last = drawn(panel, 60)
    assert "ETA" not in last, "nothing is to come"
    assert "3/6" in out.getvalue()
    assert "3/6" in last
    assert "held" not in last
    assert "negative" not in last, "it stands above, in full"
    assert out.getvalue().rstrip("\n").endswith("\x1b[?25h"), "the cursor is shown again"


def test_a_stop_is_said_in_the_panel():
    panel = panel_of(EVENTS)
    try:
        assert "ETA" in drawn(panel, 60)
        assert "stopping" not in drawn(panel, 60)
        panel.stopping()
        assert drawn(panel, 60).startswith("stopping")
    finally:
        panel.close()
    assert "stopping" not in drawn(panel, 60), "it has stopped"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], ""),
        ([2.0, 2.0], "▁▁"),
        ([0.0, 7.0, math.inf, math.nan, 1.0], "▁█××▂"),
        ([1.0, 10.0**3.5, 1e7], "▁▅█"),
        ([-1.0, 1e7], "▁█"),
        ([-1.7e308, 1.7e308], "▁█"),
        ([math.nan], "×"),
    ],
)
def test_curves_by_hand(values, expected):
    assert spark(values, 10) == expected


def test_a_curve_keeps_its_ends_in_bounded_room():
    curve = Curve()
    for value in range(10 * KEPT + 1):
        curve.add(float(value))
        assert curve.values()[-1] == value
    assert len(curve.values()) <= KEPT + 1
    assert curve.values()[0] == 0
    line = spark(curve.values(), 44)
    assert (len(line), line[0], line[-1]) == (44, BLOCKS[0], BLOCKS[-1])
    assert spark([0.0, 1.0], 2, ASCII) == "_#"


def test_the_table_follows_the_last_state_on_a_pty():
    ours, theirs = pty.openpty()
    with open(theirs, "w", encoding="utf-8") as file:
        receiver = ConsoleReceiver(Console(file=file, width=60))
        for event in [*EVENTS, Finished(3, "diverged", 1.0)]:
            receiver.receive(event)
        receiver.close()
    data = b""
    with suppress(OSError):  # which ends a pty that nobody writes to any more
        while found := os.read(ours, 4096):
            data += found
    os.close(ours)
    text = data.decode()
    assert "\x1b[?25h" in text
    assert text.index("3/6") < text.rindex("adj.res") < text.index("upper loss F")
    assert text.split()[-3:] == ["3", "cross", "products"]
