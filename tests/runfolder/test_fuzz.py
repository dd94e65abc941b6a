"""Checkpoints and records that were altered: one clear error each, and no other run is hidden."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel.errors import BilevelError, CheckpointError
from bilevel.report.history import read as read_history
from bilevel.run.engine import Setup, State, restore, run, start
from bilevel.runfolder import checkpoint, files, folder, record
from bilevel.sinks.jsonl import JSONLines
from tests.run.setups import setup

DEEP = "[" * 100_000 + "]" * 100_000
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 2),
    st.just(10**400),
    st.just(2**63),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(
        st.sampled_from(["$tensor", "$float", "$dict", "x"]), st.integers(), max_size=1
    ),
)


def places(value, where=()):
    """Every place in nested data."""
    yield where
    if isinstance(value, list):
        value = dict(enumerate(value))
    for key, part in value.items() if isinstance(value, dict) else ():
        yield from places(part, (*where, key))


def altered(value, where, new):
    """A copy with `new` at a place; without it where `new` is ... ."""
    if not where:
        return new
    copy = value.copy()
    if new is ... and len(where) == 1:
        del copy[where[0]]
    else:
        copy[where[0]] = altered(value[where[0]], where[1:], new)
    return copy


@pytest.fixture(scope="module")
def made() -> Setup:
    return setup(steps=3)


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory) -> Path:
    """A run folder with a record and a checkpoint at its step 3."""
    path = tmp_path_factory.mktemp("runs") / "name" / "20260101-000000-abcdef"
    path.mkdir(parents=True)
    (path / folder.RESOLVED).write_text("estimator:\n  name: implicit\n")
    state, sink = start(made), JSONLines().open(path, None)
    for event in run(made, state):
        sink.receive(event)
    sink.close()
    checkpoint.save(path / "checkpoints", state.save(), step=3, settings={"seed": "0"})
    return path


def forged(body) -> str:
    """The text of a state file whose checksum is right."""
    text = checkpoint._text(body)
    return checkpoint._text({"checksum": checkpoint._digest(text.encode()), "body": body})


def outcome(call):
    """What a call returns, or the error that it is meant to raise; any other passes."""
    try:
        return call()
    except BilevelError as error:
        return error


def resumed(made: Setup, path: Path):
    found = checkpoint.latest(path.parent)
    assert found is not None
    return restore(made, checkpoint.load(found.path))


@settings(max_examples=60)
@given(data=st.data())
def test_a_forged_checkpoint_is_resumed_or_one_error(data, made, whole, tmp_path_factory):
    path = shutil.copytree(
        whole / "checkpoints", tmp_path_factory.mktemp("forged"), dirs_exist_ok=True
    ) / ("step-00000003")
    body = json.loads((path / checkpoint.STATE).read_text())["body"]
    where = data.draw(st.sampled_from([place for place in places(body) if place]))
    body = altered(body, where, data.draw(ODD | st.just(...)))
    try:
        text = forged(body)
    except ValueError:  # a number that JSON does not have
        return
    (path / checkpoint.STATE).write_text(text)
    end = outcome(lambda: resumed(made, path))
    assert 0 <= end.step <= 3 if isinstance(end, State) else len(str(end)) < 2000


@pytest.mark.parametrize("step", ["3", -1, float("nan"), None, True, 10**30, 4, 2.0, [3]])
def test_a_step_that_is_none_is_refused(step, made, whole, tmp_path):
    path = shutil.copytree(whole / "checkpoints", tmp_path / "c") / "step-00000003"
    body = json.loads((path / checkpoint.STATE).read_text())["body"]
    resumed(made, path)  # negative control
    spelled = {"$float": "nan"} if step != step else step
    (path / checkpoint.STATE).write_text(forged(altered(body, ("state", "step"), spelled)))
    with pytest.raises(CheckpointError, match=r"as step: it was altered|that of step 4"):
        resumed(made, path)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("step", 2, "holds step 2, not that of its name"),
        ("step", "3", "holds step 3, not that of its name"),
        ("version", "1", "has version 1, this release"),
        ("version", [1] * 999, "has version"),
        ("version", ..., "is not a checkpoint"),
        ("settings", [], "is not a checkpoint"),
        ("state", 3, "holds no state"),
        ("state", {"$tensor": []}, "holds no state"),
        ("state", {"$tensor": "z"}, "do not belong together"),
    ],
)
def test_a_forged_head_is_one_error(key, value, said, whole, tmp_path):
    path = shutil.copytree(whole / "checkpoints", tmp_path / "c") / "step-00000003"
    body = json.loads((path / checkpoint.STATE).read_text())["body"]
    (path / checkpoint.STATE).write_text(forged(altered(body, (key,), value)))
    with pytest.raises(CheckpointError, match=said):
        checkpoint.load(path)


@pytest.mark.parametrize("text", [DEEP, f'{{"checksum": "", "body": {DEEP}}}', "NaN", "", "[]"])
def test_a_state_file_that_is_none_is_one_error(text, whole, tmp_path):
    path = shutil.copytree(whole / "checkpoints", tmp_path / "c") / "step-00000003"
    (path / checkpoint.STATE).write_text(text)
    with pytest.raises(CheckpointError, match="altered"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    ("text", "is_json"),
    [
        (b"[" * 199 + b"]" * 199, True),
        (b"[" * 201 + b"]" * 201, False),
        (b"[1, NaN]", False),
        (b"[" + b"[]," * 500 + b"1]", True),
        (b'"' + b"[" * 500 + b'"', True),
        (b"\xff", False),
        (b"1" * 5000, False),
    ],
)
def test_json_is_strict_and_not_too_deep(text, is_json):
    if is_json:
        assert files.parse(text) == json.loads(text)
    else:
        with pytest.raises(ValueError):  # noqa: PT011
            files.parse(text)


@settings(max_examples=60)
@given(data=st.data())
def test_an_altered_record_costs_its_own_row(data, whole, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    shutil.copytree(whole.parent, runs / "name", dirs_exist_ok=True)
    shutil.copytree(whole.parent, runs / "other", dirs_exist_ok=True)
    path = runs / "name" / whole.name / record.FILE
    lines = path.read_text().splitlines()
    number = data.draw(st.integers(0, len(lines) - 1))
    if data.draw(st.booleans()):
        event = json.loads(lines[number])
        where = data.draw(st.sampled_from(list(places(event))))
        lines[number] = json.dumps(altered(event, where, data.draw(ODD)))
    else:
        lines[number] = data.draw(st.sampled_from([DEEP, "", "\0", '{"event": "stepped"', "{}"]))
    path.write_text("\n".join(lines) + "\n")
    found = {summary.name: summary for summary in folder.summaries(runs)}
    assert found["other"].status == "done"
    assert isinstance(found["name"].status, str)
    for read in (lambda: read_history(path.parent), lambda: record.cut(path.parent, 2)):
        end = outcome(read)
        assert not isinstance(end, BilevelError) or record.FILE in str(end)


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"estimator:", DEEP.encode()])
def test_a_damaged_recipe_costs_its_own_row(content, whole, tmp_path):
    for name in ("name", "other"):
        shutil.copytree(whole.parent, tmp_path / name)
    path = tmp_path / "name" / whole.name / folder.RESOLVED
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    rows = sorted((row.name, row.status) for row in folder.summaries(tmp_path))
    assert rows == [("name", "damaged")] * (content is not None) + [("other", "done")]


def test_the_tensors_of_another_state_are_refused(made, whole):
    """As by a checkpoint whose tensors were renamed: the shapes are those of other variables."""
    saved = checkpoint.load(whole / "checkpoints/step-00000003")
    assert torch.equal(restore(made, saved).x["x"], saved["x"]["x"])
    with pytest.raises(CheckpointError, match=r"holds '3' as x\.x"):
        restore(made, saved | {"x": {"x": 3}})
    with pytest.raises(CheckpointError, match=r"has no totals\.hvps"):
        restore(made, saved | {"totals": {"gradients": 1}})
    with pytest.raises(CheckpointError, match=r"holds '-1' as upper_batches\.drawn"):
        restore(made, saved | {"upper_batches": saved["upper_batches"] | {"drawn": -1}})
