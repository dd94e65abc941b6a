"""Tables of a run, as files."""

import json
import math
import os
from pathlib import Path

import pytest

from bilevel.errors import CheckpointError
from bilevel.events import Evaluated, Tabulated
from bilevel.runfolder import record
from bilevel.sinks import Sink
from bilevel.sinks.jsonl import JSONLines
from bilevel.sinks.rows import RowFiles


def write(folder: Path, *events) -> None:
    receiver = RowFiles().open(folder, None)
    for event in events:
        receiver.receive(event)
    receiver.close()


def read(path: Path) -> list:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def table(step: int, *values) -> Tabulated:
    return Tabulated(step, "some cases", tuple({"id": "é", "value": value} for value in values))


def test_the_last_evaluation_and_the_one_before_the_first_step_are_kept(tmp_path: Path):
    assert isinstance(RowFiles(), Sink)
    write(tmp_path, table(0, 1.0, 2.0), Evaluated(0, {}), table(5, 3.0), table(9, 4.0, 5.0))
    rows = tmp_path / "rows"
    assert [row["value"] for row in read(rows / "some_cases.jsonl")] == [4.0, 5.0]
    assert [row["value"] for row in read(rows / "start" / "some_cases.jsonl")] == [1.0, 2.0]
    assert read(rows / "some_cases.jsonl")[0]["id"] == "é"
    assert sorted(p.name for p in rows.rglob("*") if p.is_file()) == ["some_cases.jsonl"] * 2


def test_without_a_table_there_is_no_folder(tmp_path: Path):
    write(tmp_path, Evaluated(0, {"accuracy": 1.0}))
    assert not list(tmp_path.iterdir())


def test_numbers_that_json_has_not(tmp_path: Path):
    write(tmp_path, table(1, math.nan, -math.inf))
    first, second = (row["value"] for row in read(tmp_path / "rows" / "some_cases.jsonl"))
    assert (first, second) == ("NaN", "-Infinity")
    assert record.number(second) == -math.inf


def test_tables_stay_out_of_the_record(tmp_path: Path):
    receiver = JSONLines().open(tmp_path, None)
    receiver.receive(table(0, 1.0))
    receiver.receive(Evaluated(0, {"accuracy": 1.0}))
    receiver.close()
    assert [event["event"] for event in record.read(tmp_path)] == ["evaluated"]


@pytest.mark.skipif(os.name == "nt", reason="a file stands where a folder is wanted")
def test_a_table_that_cannot_be_written_is_a_checkpoint_error(tmp_path: Path):
    (tmp_path / "rows").write_text("")
    with pytest.raises(CheckpointError, match=r"rows.*cannot be written: .*then resume"):
        write(tmp_path, table(1, 1.0))
