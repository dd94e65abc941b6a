"""Checkpoints: bit-identical, all or nothing, and honest about damage."""

import errno
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bilevel.errors import CheckpointError
from bilevel.runfolder import checkpoint, files

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


def assert_same(got, expected):
    """Equal in structure, type and every bit; raises where it is not."""
    assert type(got) is type(expected), f"{type(got)} is not {type(expected)}"
    if isinstance(expected, torch.Tensor):
        assert got.dtype == expected.dtype
        assert got.shape == expected.shape
        assert got.contiguous().view(-1).view(torch.uint8).tolist() == _bytes(expected)
    elif isinstance(expected, dict):
        assert list(got) == list(expected)
        for key in expected:
            assert_same(got[key], expected[key])
    elif isinstance(expected, list):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, float):
        assert repr(got) == repr(expected)
    else:
        assert got == expected


def _bytes(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8).tolist()


def round_trip(saved, folder: Path):
    return checkpoint.load(checkpoint.save(folder, saved, step=1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_returns_bit_for_bit(dtype, tmp_path: Path):
    bits = torch.randint(0, 256, (6 * 8,), generator=torch.Generator().manual_seed(0))
    bits = bits.to(torch.uint8)
    values = bits.view(dtype) if dtype is not torch.bool else bits % 2 == 0
    saved = {"matrix": values[:6].view(2, 3), "scalar": values[0], "empty": values[:0]}
    assert_same(round_trip(saved, tmp_path), saved)


def test_a_comparison_that_sees_one_bit():
    a = torch.ones(3)
    b = a.clone()
    b.view(torch.uint8)[0] ^= 1
    with pytest.raises(AssertionError):
        assert_same({"a": b}, {"a": a})
    with pytest.raises(AssertionError):
        assert_same([1.0], [1])


def test_what_json_does_not_have(tmp_path: Path):
    saved = {
        "none": None,
        "flags": [True, False],
        "large": 2**53 + 1,
        "huge": -(10**40),
        "floats": [math.nan, math.inf, -math.inf, -0.0, 1e-320, 0.1],
        "text": 'é "quoted" \n $tensor',
        "empty": {},
        "list": [],
        "$tensor": "a key like ours",
        "nested": {"$float": 1, "$dict": {"a/b": torch.ones(1), "a": {"b": torch.zeros(1)}}},
        "": torch.tensor(2.0),
    }
    assert_same(round_trip(saved, tmp_path), saved)


def test_tensors_that_share_memory_or_are_views(tmp_path: Path):
    base = torch.arange(12.0).view(3, 4)
    saved = {
        "base": base,
        "again": base,
        "transposed": base.T,
        "row": base[1],
        "column": base[:, 1],
    }
    got = round_trip(saved, tmp_path)
    assert_same(got, saved)
    got["base"].zero_()
    assert got["again"].sum() == base.sum()  # each has memory of its own


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.lists(st.floats(width=32), max_size=4).map(torch.tensor),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(st.dictionaries(st.text(max_size=4), VALUES, max_size=4))
def test_any_nested_state(tmp_path_factory, saved):
    assert_same(round_trip(saved, tmp_path_factory.mktemp("checkpoint")), saved)


@pytest.mark.parametrize("value", [(1, 2), {1: 2}, object(), {1}], ids=lambda v: type(v).__name__)
def test_what_cannot_be_saved_is_said_with_its_place(value, tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"state\.a\.0: a \w+ cannot be saved"):
        checkpoint.save(tmp_path, {"a": [value]}, step=1)
    assert checkpoint.latest(tmp_path) is None


def _save(folder: Path, *steps: int, keep: int = 2) -> list[Path]:
    return [
        checkpoint.save(folder, {"x": torch.full((100,), float(s))}, step=s, keep=keep)
        for s in steps
    ]


def _steps(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_are_kept_and_found(tmp_path: Path):
    assert checkpoint.latest(tmp_path / "absent") is None
    _save(tmp_path, 5, 10, 15)
    assert _steps(tmp_path) == ["step-00000010", "step-00000015"]
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert (found.step, found.skipped) == (15, ())
    assert checkpoint.load(found.path)["x"][0] == 15


def test_a_step_saved_again_takes_its_place(tmp_path: Path):
    _save(tmp_path, 5, 5, 5)
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.path.name == "step-00000005.2"
    assert len(_steps(tmp_path)) == 2


def test_going_back_removes_what_came_later(tmp_path: Path):
    _save(tmp_path, 10, 20)
    _save(tmp_path, 15)
    assert _steps(tmp_path) == ["step-00000010", "step-00000015"]


@pytest.mark.parametrize("name", [checkpoint.TENSORS, checkpoint.STATE])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "gone", "empty"])
def test_damage_is_found_and_the_older_one_named(name, damage, tmp_path: Path):
    older, newest = _save(tmp_path, 1, 2)
    path = newest / name
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"{older.name} is whole"):
        checkpoint.load(newest)
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.path == older
    assert len(found.skipped) == 1
    assert str(newest) in found.skipped[0]
    assert checkpoint.load(found.path)["x"][0] == 1


def test_every_flipped_bit_of_the_state_is_found(tmp_path: Path):
    """All bits of a small state file, so that none is outside the checksums."""
    (path,) = _save(tmp_path, 1)
    file = path / checkpoint.STATE
    content = file.read_bytes()
    for position in range(len(content)):
        altered = bytearray(content)
        altered[position] ^= 1
        file.write_bytes(bytes(altered))
        with pytest.raises(CheckpointError):
            checkpoint.load(path)
    file.write_bytes(content)
    checkpoint.load(path)


def test_when_none_is_whole_it_says_so(tmp_path: Path):
    for path in _save(tmp_path, 1, 2):
        (path / checkpoint.STATE).unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole: .*Start the run again"):
        checkpoint.latest(tmp_path)


def test_another_version_is_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(checkpoint, "VERSION", 9)
    (path,) = _save(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="has version 9, this release reads version 1"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    ("where", "what"), [(checkpoint, "save_tensors"), (checkpoint, "_write"), (files, "_sync")]
)
def test_a_full_disk_leaves_what_was_there(where, what, tmp_path: Path, monkeypatch):
    _save(tmp_path, 1)
    before = _steps(tmp_path)

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(where, what, full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*make room"):
        _save(tmp_path, 2)
    monkeypatch.undo()
    assert _steps(tmp_path)[: len(before)] == before
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert not list(tmp_path.glob(".writing-*"))


@pytest.fixture
def tiny_disk(tmp_path: Path):
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command here")
    if done.returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(tiny_disk: Path):
    small = {"x": torch.zeros(1000)}
    checkpoint.save(tiny_disk / "c", small, step=1)
    with pytest.raises(CheckpointError, match="make room"):
        checkpoint.save(tiny_disk / "c", {"x": torch.zeros(200_000)}, step=2)
    assert _steps(tiny_disk / "c") == ["step-00000001"]
    checkpoint.save(tiny_disk / "c", small, step=3)
    assert _steps(tiny_disk / "c") == ["step-00000001", "step-00000003"]


SAVER = """
import sys, itertools, torch
from pathlib import Path
from bilevel.runfolder import checkpoint
for step in itertools.count(1):
    saved = {"step": step, "x": torch.full((20_000,), float(step))}
    checkpoint.save(Path(sys.argv[1]), saved, step=step)
    if step == 1: print("saving", flush=True)
"""


def test_killed_at_any_moment_a_whole_one_is_left(tmp_path: Path):
    delays = random.Random(0)
    for trial in range(6):
        folder = tmp_path / str(trial)
        command = [sys.executable, "-c", SAVER, str(folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            try:
                process.wait(timeout=delays.uniform(0.0, 0.2))
            except subprocess.TimeoutExpired:
                process.kill()
        found = checkpoint.latest(folder)
        assert found is not None
        assert found.skipped == ()
        saved = checkpoint.load(found.path)
        assert saved["step"] == found.step
        assert torch.equal(saved["x"], torch.full((20_000,), float(found.step)))
        _save(folder, found.step + 1)
        assert not list(folder.glob(".writing-*"))


def test_the_state_is_readable_json(tmp_path: Path):
    (path,) = _save(tmp_path, 7)
    body = json.loads((path / checkpoint.STATE).read_text())["body"]
    assert (body["version"], body["step"]) == (1, 7)
    assert body["state"] == {"x": {"$tensor": "x"}}
