"""How two runs are compared where one was stopped on its way."""

import json
from pathlib import Path
from typing import Any

from bilevel.runfolder import checkpoint


def timeless(run: Path) -> list[Any]:
    """The record without the seconds in it."""

    def strip(value):
        if isinstance(value, dict):
            return {key: strip(item) for key, item in value.items() if key != "seconds"}
        return value

    return [strip(json.loads(line)) for line in (run / "events.jsonl").read_text().splitlines()]


def assert_same_end(run: Path, whole: Path, *, step: int = 12) -> None:
    """The last checkpoint of both is the same to the byte, and so is the record but for its seconds."""
    found, expected = (checkpoint.latest(folder / "checkpoints") for folder in (run, whole))
    assert found is not None
    assert expected is not None
    assert found.step == expected.step == step
    for name in (checkpoint.TENSORS, checkpoint.STATE):
        assert (found.path / name).read_bytes() == (expected.path / name).read_bytes(), name
    assert timeless(run) == timeless(whole)
