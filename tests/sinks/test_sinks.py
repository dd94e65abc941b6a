"""The record, the figures and the console, fed with events."""

import errno
import io
import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from bilevel.errors import CheckpointError
from bilevel.events import (
    Drawn,
    Evaluated,
    Finished,
    Held,
    Progress,
    Saved,
    Started,
    Stepped,
    Totals,
    Warned,
)
from bilevel.runfolder import record
from bilevel.sinks import Receiver, Sink
from bilevel.sinks.console import ConsoleReceiver
from bilevel.sinks.figures import Figures
from bilevel.sinks.jsonl import JSONLines, JSONLinesWriter
from tests.sinks.events import EVENTS, STARTED, stepped, with_evidence


def write(folder: Path, events, step=None) -> str:
    receiver = JSONLines().open(folder, step)
    for event in events:
        receiver.receive(event)
    receiver.close()
    return (folder / record.FILE).read_text()


def test_sinks_keep_their_protocol():
    assert isinstance(JSONLines(), Sink)
    assert isinstance(Figures(), Sink)
    assert isinstance(ConsoleReceiver(Console(file=io.StringIO())), Receiver)
    assert not isinstance(object(), Sink)


def test_one_event_a_line_in_strict_json(tmp_path: Path):
    text = write(tmp_path, EVENTS)

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    assert [line["event"] for line in lines] == [
        "started",
        "evaluated",
        "stepped",
        "warned",
        "stepped",
        "evaluated",
        *["stepped"] * 4,
        "evaluated",
        "drawn",
        "finished",
    ]
    assert lines[2]["estimate"]["residual"] == 1e-3
    assert lines[2]["estimate"]["condition"] is None
    assert lines[2]["lower"]["gradient_norm"] == "Infinity"
    assert lines[4]["upper_loss"] == "NaN"
    assert lines[-2] == {"event": "drawn", "step": 6, "name": "plot"}
    with pytest.raises(ValueError, match="is no JSON"):
        json.loads("[NaN]", parse_constant=refuse)


def test_numbers_return_as_they_were():
    for value in (0.1, -0.0, 1e-320, math.inf, -math.inf):
        assert record.number(json.loads(record.line({"v": value}))["v"]) == value
    assert math.isnan(record.number("NaN"))
    assert math.isnan(record.number(None))


@pytest.mark.parametrize("seen", range(8, len(EVENTS) + 1))
@pytest.mark.parametrize("torn", [False, True])
def test_a_stopped_and_resumed_record_equals_one_never_stopped(seen, torn, tmp_path: Path):
    """Stopped anywhere after the checkpoint at step 2, even in the middle of a line."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = write(tmp_path / "a", EVENTS)
    stopped = [*EVENTS[:seen], Finished(2, "interrupted", 0.5)]
    text = write(tmp_path / "b", stopped)
    if torn:
        (tmp_path / "b" / record.FILE).write_text(text[:-9])
    resumed = [Progress("data", 1, 2), Started(2, 6, "toy", 3, 4, "cpu", "float64"), *EVENTS[8:]]
    assert write(tmp_path / "b", resumed, step=2) == whole


def test_a_warning_said_before_is_not_recorded_again(tmp_path: Path):
    write(tmp_path, EVENTS[:8])
    again = [Warned(2, "curvature", "negative"), Warned(3, "adjoint", "slow"), *EVENTS[8:]]
    write(tmp_path, again, step=2)
    kinds = [event["kind"] for event in record.read(tmp_path) if event["event"] == "warned"]
    assert kinds == ["curvature", "adjoint"]


def test_the_last_event_is_found_from_the_end(tmp_path: Path):
    assert record.last(tmp_path) is None
    many = [STARTED, *(stepped(step) for step in range(1, 400))]
    write(tmp_path, many)
    events = list(record.read(tmp_path))
    assert record.last(tmp_path) == events[-1]
    assert record.last(tmp_path, "started") == events[0]
    assert record.last(tmp_path, "finished") is None
    with (tmp_path / record.FILE).open("a") as file:
        file.write('{"event": "torn')
    assert record.last(tmp_path) == events[-1]
    assert list(record.read(tmp_path)) == events


class FullDisk(io.StringIO):
    name = "events.jsonl"

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        self.flush()


def test_a_full_disk_is_a_checkpoint_error():
    writer = JSONLinesWriter(FullDisk(), [])
    with pytest.raises(CheckpointError, match="No space left on device; make room, then resume"):
        writer.receive(STARTED)


def test_a_full_disk_at_the_end_is_one_too(tmp_path: Path):
    writer = JSONLinesWriter(FullDisk(), [])
    with pytest.raises(CheckpointError, match="No space left on device; make room, then resume"):
        writer.close()
    receiver = JSONLines().open(tmp_path, None)
    receiver.close()  # negative control


@pytest.mark.parametrize("step", [None, 2])
def test_a_record_that_cannot_be_opened_is_a_checkpoint_error(step, tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"events\.jsonl: cannot be written: .*make room"):
        JSONLines().open(tmp_path / "absent", step)


def test_a_step_evaluated_again_is_recorded_once(tmp_path: Path):
    """Stopped during the first evaluation, saved at step 0: resuming evaluates step 0 again."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = write(tmp_path / "a", EVENTS)
    write(tmp_path / "b", [*EVENTS[:3], Saved(0, Path("c")), Finished(0, "interrupted", 0.5)])
    assert write(tmp_path / "b", EVENTS, step=0) == whole
    other = [*EVENTS[:3], Evaluated(1, {"accuracy": 0.5, "gap": 1.0}), *EVENTS[3:]]
    assert write(tmp_path / "b", other, step=0) != whole  # negative control


DAMAGE = {
    "cut": b'{"event": "step\n',
    "flipped": b'{"event": "evaluated", "step": \xff}\n',
    "blank": b"\n",
    "no event": b'{"step": 3}\n',
    "a number": b"12\n",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_line_is_named_with_its_place(damage, tmp_path: Path):
    write(tmp_path, EVENTS)
    path = tmp_path / record.FILE
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:5], damage, *lines[6:]]))
    place = rf"{re.escape(str(path))}:6: the line is not an event"
    with pytest.raises(CheckpointError, match=place):
        list(record.read(tmp_path))
    with pytest.raises(CheckpointError, match=place):
        record.last(tmp_path, "started")
    with pytest.raises(CheckpointError, match=place):
        JSONLines().open(tmp_path, 6)
    last = record.last(tmp_path)  # what lies after it is read
    assert last is not None
    assert last["event"] == "finished"
    path.write_bytes(b"".join(lines))
    assert len(list(record.read(tmp_path))) == len(lines)


def test_a_figure_that_cannot_be_written_is_a_checkpoint_error(tmp_path: Path):
    class Unwritable:
        def savefig(self, *arguments: object, **options: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    receiver = Figures().open(tmp_path, None)
    with pytest.raises(CheckpointError, match=r"figure 'gap' cannot be written: No space"):
        receiver.receive(Drawn(6, "gap", Unwritable()))


def test_figures_are_png_and_svg_and_the_same_each_time(tmp_path: Path):
    figures = pytest.importorskip("matplotlib.figure")
    figure = figures.Figure(figsize=(2, 1))
    figure.subplots().plot([1, 2])
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        receiver = Figures(dpi=50).open(tmp_path / folder, None)
        assert not (tmp_path / folder / "figures").exists()
        receiver.receive(STARTED)
        receiver.receive(Drawn(6, "gap: before/after", figure))
        receiver.close()
    png, svg = sorted((tmp_path / "a" / "figures").iterdir())
    assert (png.name, svg.name) == ("gap_before_after.png", "gap_before_after.svg")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in svg.read_bytes()
    assert b"<dc:date>" not in svg.read_bytes()
    assert b"clipPath" in svg.read_bytes()  # whose names matplotlib draws for each file
    for path in (png, svg):
        assert path.read_bytes() == (tmp_path / "b" / "figures" / path.name).read_bytes()


def shown(events, *, terminal: bool = False, measured=()) -> str:
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=terminal, color_system=None)
    receiver = ConsoleReceiver(console, measured)
    for event in events:
        receiver.receive(event)
    receiver.close()
    return out.getvalue()


def test_plain_lines_without_a_terminal():
    text = shown(EVENTS)
    assert "\x1b" not in text
    assert "\r" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert "toy: 3 upper and 1,234,567 lower variables, cpu float64" in text
    assert "data: 1 of 2" in text
    assert text.count("warning (step 2): negative") == 1
    assert re.search(r"accuracy +0.5 +1\n", text.replace("  \n", "\n"))
    assert "done at step 6" in text
    assert len(re.findall(r"^ +\d+  ", text, re.MULTILINE)) == 6


def test_a_long_run_has_some_twenty_rows():
    steps = 1000
    events = [Started(0, steps, "toy", 3, 4, "cpu", "float64")]
    events += [stepped(step) for step in range(1, steps + 1)]
    rows = re.findall(r"^ +\d+  ", shown(events), re.MULTILINE)
    assert 20 <= len(rows) <= 22


def test_a_stage_is_announced_and_ended_not_repeated():
    events = [Progress("features", done, 500) for done in range(0, 501, 5)]
    assert shown(events).splitlines() == ["features: 0 of 500", "features: 500 of 500"]


def test_what_a_stage_notes_is_within_the_columns_and_breaks_no_path():
    path = f"/data/{'long/' * 20}model.gguf"
    note = f"at least 1.25 GB: weights 0.5 GB, graph 0.5 GB, a Hessian product 0.25 GB; {path}"
    lines = shown([Progress("memory of a lower step", 1, 1, note)]).splitlines()
    assert max(len(line) for line in lines if path not in line) <= 80
    assert f"  {path}" in lines
    assert " ".join(" ".join(lines).split()) == f"memory of a lower step: 1 of 1 {note}"


def test_each_kind_of_warning_is_said_once():
    text = shown([STARTED, Warned(1, "a", "one"), Warned(2, "a", "one"), Warned(3, "b", "two")])
    assert (text.count("one"), text.count("two")) == (1, 1)


def test_a_resumed_run_compares_with_its_beginning():
    events = [Started(4, 6, "toy", 3, 4, "cpu", "float64"), *EVENTS[-4:]]
    before = Evaluated(0, {"accuracy": 0.125})
    text = shown(events, measured=[before])
    assert "resumed from step 4" in text
    assert re.search(r"accuracy +0.125 +1\n", text)
    assert not re.search(r"accuracy +0.125", shown(events))
    # and where nothing is measured again, with what was last measured
    silent = [event for event in events if not isinstance(event, Evaluated)]
    text = shown(silent, measured=[before, Evaluated(3, {"accuracy": 0.25})])
    assert re.search(r"before +at step 3\n", text)
    assert re.search(r"accuracy +0.125 +0.25\n", text)
    assert "upper loss" not in text


def test_the_control_stands_between_before_and_after_and_is_explained():
    held = [*EVENTS[:-1], Held(6, {"accuracy": 0.875}), EVENTS[-1]]
    text = shown(held)
    assert re.search(r"before +x held +after\n", text)
    assert re.search(r"accuracy +0.5 +0.875 +1\n", text)
    assert re.search(r"gap +nan +- +2\n", text)
    assert "x held: x as it began, y trained as long" in text
    assert "x held" not in shown(EVENTS)


def test_a_terminal_shows_a_bar_and_leaves_the_table():
    text = shown(EVENTS, terminal=True)
    assert "6/6" in text
    assert "F 1.000e+00" in text
    assert re.search(r"accuracy +0.5 +1\n", text)


KNOWN = {"residual": 3e-4, "curvature": 0.1, "condition": 4e7, "error_bound": 5e-4}
"""5e-4 is 2e-3 of a hypergradient of length 0.25."""


@pytest.mark.parametrize("terminal", [False, True], ids=["plain", "live"])
def test_all_the_evidence_is_shown_within_80_columns(terminal):
    large = Totals(12345678, 99999, 1)
    event = Stepped(**{**vars(with_evidence(1, **KNOWN)), "lower_loss": -5e-10, "totals": large})
    text = shown([STARTED, event], terminal=terminal)
    for number in ("3.0e-04", "4e+07", "~2.0e-03", "12M/100k/1"):
        assert number in text
    assert "curv≤0" not in text
    assert max(len(line) for line in text.splitlines()) <= 80 or terminal
    bent = shown([STARTED, with_evidence(1, **KNOWN | {"curvature": -1e-9})], terminal=terminal)
    assert "curv≤0" in bent
    assert "4e+07" not in bent, "a condition number of an indefinite matrix means nothing"


def test_long_runs_have_room_for_their_steps():
    event = Stepped(**{**vars(with_evidence(99999, **KNOWN)), "lower_loss": -5e-10})
    text = shown([replace(STARTED, steps=99999), event])
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "\n99999 " in text


@pytest.mark.parametrize("terminal", [False, True], ids=["plain", "live"])
@pytest.mark.parametrize(
    ("source", "sign"),
    [
        ("known constants", "≤"),
        ("known constants, y taken as solved", "~"),
        ("Ritz values, y taken as solved", "~"),
        ("estimated", "~"),
    ],
)
def test_a_bound_and_an_estimate_are_told_apart(source, sign, terminal):
    event = with_evidence(1, **KNOWN, error_bound_from=source)
    text = shown([STARTED, event], terminal=terminal)
    assert f"{sign}2.0e-03" in text
    assert ({"≤": "~", "~": "≤"}[sign] + "2.0e-03") not in text


def test_evidence_that_a_method_does_not_give_has_no_column():
    text = shown([STARTED, with_evidence(1), with_evidence(2)])
    assert text.count("step ") == 1
    for head in ("adj.res", "cond≥", "rel.err"):
        assert head not in text
    live = shown([STARTED, with_evidence(1)], terminal=True)
    assert "adj.res" not in live
    assert "grad/HVP/cross 1/1/1" in live


def test_a_column_that_fills_later_is_headed_then_and_stays():
    lines = shown([STARTED, *(with_evidence(n, **{} if n == 1 else KNOWN) for n in (1, 2))])
    heads = [line.split() for line in lines.splitlines() if line.startswith("step ")]
    assert heads[0] == ["step", "F", "G", "‖dΦ/dx‖", "grad/HVP/cross", "ETA"]
    assert heads[1][4:7] == ["adj.res", "cond≥", "rel.err"]
    again = shown([STARTED, with_evidence(1, **KNOWN), with_evidence(2)]).splitlines()
    assert [line.startswith("step ") for line in again].count(True) == 1
    assert again[-1].split()[4:7] == ["-", "-", "-"]


def test_the_end_says_how_often_each_warning_held():
    text = shown([*EVENTS[:-1], Finished(6, "done", 1.0, {"curvature": 4, "estimator": 0})])
    assert "warned: curvature at 4 of 6 steps" in text
    assert "warned: estimator" not in text, "said before the first step, of all of them"
    assert "warned:" not in shown(EVENTS)


@pytest.mark.parametrize("reason", ["interrupted", "terminated", "diverged", "failed"])
def test_measures_stand_below_the_step_at_which_they_were_taken(reason):
    first, later = Evaluated(0, {"gap": 1.0}), Evaluated(2, {"gap": 0.5})
    steps = [stepped(1), stepped(2), later, stepped(3)]
    text = shown([STARTED, first, *steps, Finished(3, reason, 1.0)])
    assert re.search(r"before +at step 2\ngap +1 +0\.5\n", text)
    text = shown([STARTED, first, *steps[:3], Finished(2, reason, 1.0)])
    assert re.search(r"before +after\ngap +1 +0\.5\n", text)
    text = shown([STARTED, first, stepped(1), Finished(1, reason, 1.0)])
    assert re.search(r"before +after\ngap +1 +-\n", text)
    text = shown([STARTED, *steps, Finished(3, reason, 1.0)])
    assert re.search(r"before +at step 2\ngap +- +0\.5\n", text)


def test_without_measures_the_losses_end_a_run():
    steps = [stepped(1, 4.0), stepped(6, 2.5), Finished(6, "done", 1.0)]
    text = shown([STARTED, *steps])
    assert re.search(r"upper loss F +4 +2\.5\n", text)
    assert re.search(r"lower loss G +-0\.5 +-0\.5\n", text)
    assert "upper loss F" not in shown([STARTED, Evaluated(0, {"gap": 1.0}), *steps])
    resumed = shown([replace(STARTED, step=3), *steps])
    assert re.search(r"upper loss F +- +2\.5\n", resumed)
    assert "done at step 6 after 1.0s since step 3" in resumed
    assert resumed.rstrip().endswith("since the start")
    assert "since" not in text
