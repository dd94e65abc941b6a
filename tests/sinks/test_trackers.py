"""TensorBoard, Weights & Biases, MLflow and Trackio: each written by its package and read back from its files."""

import json
import math
import os
import signal
import struct
import sys
import time
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import pytest

from bilevel.errors import RequirementError, TrackerError
from bilevel.events import Drawn, Evaluated, Finished, Held, Warned
from bilevel.sinks import Receiver, tracking
from bilevel.sinks.jsonl import JSONLines
from bilevel.sinks.mlflow import MLflow
from bilevel.sinks.tensorboard import TensorBoard
from bilevel.sinks.trackio import Trackio
from bilevel.sinks.wandb import WandB
from tests.sinks.events import STARTED, stepped

# of what these packages do themselves
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

RESOLVED = """\
name: toy
seed: 3
estimator:
  name: implicit
  damping: 0.5
sinks: [jsonl]
"""
NAMES = {"upper/loss", "lower/loss", "hypergradient/norm", "hypergradient/residual"}
NAMES |= {"lower/gradient_norm", "oracle/gradients", "oracle/hvps", "oracle/cross_products"}
NAMES |= {"time/step", "eval/accuracy", "control/accuracy"}


def figure():
    made = pytest.importorskip("matplotlib.figure").Figure(figsize=(1, 1), dpi=40)
    made.subplots().plot([1, 2])
    return made


def events(first=1, last=6):
    """Steps `first` to `last`, with F = 10 − step; measures at 0 and 4 and at the end."""
    if first == 1:
        yield Evaluated(0, {"accuracy": 0.5})
    for step in range(first, last + 1):
        if step == 2:
            yield Warned(2, "curvature", "negative")
        yield stepped(step, 10.0 - step)
        if step == 4:
            yield Evaluated(4, {"accuracy": 0.75})
    if last == 6:
        yield Evaluated(6, {"accuracy": 1.0})
        yield Drawn(6, "plot", figure())
        yield Held(6, {"accuracy": 0.625})
        yield Finished(6, "done", 1.0)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "runs" / "toy" / "20260101-000000-abcdef"
    path.mkdir(parents=True)
    (path / "resolved.yaml").write_text(RESOLVED)
    yield path
    if trackio := sys.modules.get(
        "trackio"
    ):  # which has one folder a process, and so a run of this name
        for run in trackio.Api().runs("toy"):
            run.delete()


def write(sink, folder, told, step=None, *, crash=False):
    """Through the record and the tracker, as a run does; a crash leaves out the tracker's last word."""
    receivers = [JSONLines().open(folder, step), sink.open(folder, step)]
    for event in [replace(STARTED, step=step or 0), *told]:
        for receiver in receivers:
            receiver.receive(event)
    for receiver in receivers[: 1 if crash else 2]:
        receiver.close()
    return receivers[1]


def read_tensorboard(folder):
    pytest.importorskip("tensorboard", reason="needs bilevel[tensorboard]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    scalars = {
        tag: [(one.step, one.value) for one in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }
    return scalars, found


def wandb_records(path):
    """The records of a .wandb file: a header of 7 bytes, then blocks of 32 KiB in LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):  # the service may be writing: what is not whole is left out
        if (rest := 32768 - at % 32768) < 7:
            at += rest
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        if at + 7 + size > len(data):
            return
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a record in one piece, or its last piece
            yield Record.FromString(whole)
            whole = b""


def written(folder):
    """All records that there are of every part of the run."""
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    return [one for path in files for one in wandb_records(path)]


def rows_of(found):
    """The rows of the history by name, and all records."""
    rows = {}
    for one in found:
        items = {(i.key or i.nested_key[0]): json.loads(i.value_json) for i in one.history.item}
        for name in items.keys() - {"_step", "_timestamp", "_runtime"}:
            rows.setdefault(name, []).append((items["_step"], items[name]))
    return rows, found


def read_wandb(folder):
    """The rows by name, and all records, once W&B's service has written the end of the run."""
    while not any(one.WhichOneof("record_type") == "exit" for one in written(folder)):
        time.sleep(0.05)
    return rows_of(written(folder))


def read_mlflow(folder, name=""):
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{folder.parent.parent / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    [experiment] = client.search_experiments(filter_string="name = 'toy'")
    called = f"attributes.run_name = '{name}'" if name else ""
    [run] = client.search_runs([experiment.experiment_id], called)
    metrics = {
        name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }
    return metrics, client.get_run(run.info.run_id), client


def read_trackio(folder):
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    assert storage.get_runs("toy") == [folder.name]
    rows = storage.get_logs("toy", folder.name)
    names = {name for row in rows for name in row} - {"step", "timestamp"}
    scalars = {name: [(row["step"], row[name]) for row in rows if name in row] for name in names}
    return scalars, storage


TRACKERS = {
    "tensorboard": (TensorBoard(), read_tensorboard),
    "wandb": (WandB(), read_wandb),
    "mlflow": (MLflow(), read_mlflow),
    "trackio": (Trackio(), read_trackio),
}


@pytest.fixture(params=TRACKERS)
def tracker(request):
    sink, read = TRACKERS[request.param]
    try:
        sink.require()
    except RequirementError as missing:
        pytest.skip(str(missing))
    return sink, read


def check_history(scalars):
    assert scalars.keys() >= NAMES
    assert scalars["upper/loss"] == [(step, 10.0 - step) for step in range(1, 7)]
    assert scalars["lower/loss"] == [(step, -0.5) for step in range(1, 7)]
    assert scalars["oracle/hvps"] == [(step, step) for step in range(1, 7)]
    assert scalars["eval/accuracy"] == [(0, 0.5), (4, 0.75), (6, 1.0)]
    assert scalars["control/accuracy"] == [(6, 0.625)]
    assert "hypergradient/condition" not in scalars, "the method does not give it"


def test_a_crash_and_a_resumed_run_give_each_step_once(tracker, folder):
    """Saved at step 3, killed after step 5 with nothing closed, resumed from 3."""
    sink, read = tracker
    lost = None
    if isinstance(sink, WandB):  # whose service has each run open once
        lose_a_process(folder)
    else:
        lost = write(sink, folder, events(1, 5), crash=True)
    write(sink, folder, events(4), step=3)
    scalars, *_ = read(folder)
    check_history(scalars)
    if lost:
        lost.close()


def lose_a_process(folder):
    """One that writes the first steps with W&B, and is killed once W&B has had its second to write them."""
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            write(WandB(), folder, events(1, 5), crash=True)
            time.sleep(1000)
        os._exit(1)
    while not (rows := rows_of(written(folder))[0].get("upper/loss")):
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it could not write"
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert rows[0] == (1, 9.0)
    assert (
        rows_of(written(folder))[0]["upper/loss"][: len(rows)] == rows
    )  # what there was is still read


def test_tensorboard_has_figures_text_and_settings(folder):
    pytest.importorskip("tensorboard", reason="needs bilevel[tensorboard]")
    write(TensorBoard(), folder, events())
    scalars, found = read_tensorboard(folder)
    check_history(scalars)
    [image] = found.Images("figures/plot")
    assert (image.step, image.width, image.height) == (6, 40, 40)
    [text] = found.Tensors("warning/curvature/text_summary")
    assert (text.step, text.tensor_proto.string_val) == (2, [b"negative"])
    begun = found.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"estimator.damping" in begun
    assert b"implicit" in begun


@pytest.mark.parametrize("first", ["interrupted", "terminated"])
def test_tensorboard_says_how_a_resumed_run_has_ended(first, folder):
    """It keeps the settings that it reads first, and with them how the run was said to have ended."""
    write(TensorBoard(), folder, [*events(1, 3), Finished(3, first, 1.0)])
    _, stopped = read_tensorboard(folder)
    assert "_hparams_/session_start_info" not in stopped.summary_metadata
    write(TensorBoard(), folder, events(4), step=3)
    _, found = read_tensorboard(folder)
    begun = found.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"done" in begun


def test_wandb_has_settings_figures_warnings_and_how_it_ended(folder, monkeypatch):
    pytest.importorskip("wandb", reason="needs bilevel[wandb]")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 36 + "feed")
    monkeypatch.setattr(sys, "argv", ["bilevel", "run", "typed-on-the-line"])
    write(WandB(tags=("a",)), folder, [*events(1, 5), Finished(5, "diverged", 1.0, {}, "F is NaN")])
    rows, found = read_wandb(folder)
    assert rows["upper/loss"] == [(step, 10.0 - step) for step in range(1, 6)]
    [run] = [one.run for one in found if one.WhichOneof("record_type") == "run"]
    assert (run.project, run.run_id, run.display_name) == ("toy", folder.name, folder.name)
    assert list(run.tags) == ["a"]
    config = {item.key: item.value_json for item in run.config.update}
    assert json.loads(config["estimator"]) == {"name": "implicit", "damping": 0.5}
    summary = {
        (i.key or i.nested_key[0]): i.value_json for one in found for i in one.summary.update
    }
    assert summary["status"] == '"failed"'
    assert summary["end"] == '"step 5: F is NaN"'
    assert [one.exit.exit_code for one in found if one.WhichOneof("record_type") == "exit"] == [1]
    everything = b"".join(p.read_bytes() for p in (folder / "wandb").rglob("*") if p.is_file())
    assert b"negative" in everything
    assert b"feed" not in everything, "the key"
    assert b"typed-on-the-line" not in everything, "the command line"


@pytest.mark.parametrize("why", ["No API key configured. Use `wandb login`.", ""])
def test_wandb_online_without_a_server_is_written_offline(why, folder, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="needs bilevel[wandb]")
    begun = []

    def init(**given):
        begun.append(given["mode"])
        if given["mode"] == "online":
            raise wandb.errors.CommError(why)
        return SimpleNamespace(log=lambda *a, **k: None, finish=lambda **k: None, summary={})

    monkeypatch.setattr(wandb, "init", init)
    opened = WandB(mode="online").open(folder, None)
    assert begun == ["online", "offline"]
    said = "No API key configured. Use `wandb login`" if why else "CommError"
    assert opened.caution.startswith(f"wandb: {said}; the run is written offline, and sent by")
    assert WandB().open(folder, None).caution == ""  # negative control


def test_mlflow_has_params_figures_tags_and_status(folder):
    pytest.importorskip("mlflow", reason="needs bilevel[mlflow]")
    write(MLflow(), folder, events())
    scalars, run, client = read_mlflow(folder)
    check_history(scalars)
    assert (run.info.run_name, run.info.status) == (folder.name, "FINISHED")
    assert run.data.params["estimator.damping"] == "0.5"
    assert run.data.params["sinks.0"] == "jsonl"
    assert run.data.tags["warning/curvature"] == "step 2: negative"
    [picture] = client.list_artifacts(run.info.run_id, "figures")
    assert picture.path == "figures/plot.png"
    assert not run.data.tags.keys() & {"mlflow.user", "mlflow.source.name"}


def test_trackio_has_settings_figures_and_alerts(folder, capsys):
    pytest.importorskip("trackio", reason="needs bilevel[trackio]")
    write(Trackio(), folder, [*events()][:-1])
    write(Trackio(), folder, [Finished(6, "diverged", 1.0, {}, "F is NaN")], step=6)
    scalars, storage = read_trackio(folder)
    check_history(scalars)
    [(step, image)] = scalars["figures/plot"]
    assert (step, image["_type"]) == (6, "trackio.image")
    config = storage.get_run_config("toy", folder.name)
    assert config["estimator"] == {"name": "implicit", "damping": 0.5}
    assert config["_Username"] is None
    alerts = [(a["level"], a["step"], a["title"], a["text"]) for a in storage.get_alerts("toy")]
    assert sorted(alerts) == [
        ("error", 6, "end", "F is NaN"),
        ("error", 6, "status", "failed"),
        ("warn", 2, "warning/curvature", "negative"),
    ]
    assert capsys.readouterr().out == ""


def test_two_runs_that_begin_at_once_share_a_new_database_of_mlflow(folder):
    """Without the lock, the second finds tables half made, or makes the experiment twice."""
    pytest.importorskip("mlflow", reason="needs bilevel[mlflow]")
    folders, children = [folder, folder.with_name("20260101-000001-abcdef")], []
    for each in folders:
        each.mkdir(exist_ok=True)
        (each / "resolved.yaml").write_text(RESOLVED)
        if not (child := os.fork()):
            with suppress(BaseException):
                write(MLflow(), each, events())
                os._exit(0)
            os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    for each in folders:
        check_history(read_mlflow(each, each.name)[0])


def test_a_password_in_an_address_is_refused():
    with pytest.raises(ValueError, match="must have no password"):
        MLflow(tracking_uri="https://me:secret@example.org")
    assert MLflow(tracking_uri="https://example.org").tracking_uri  # negative control


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_said_with_the_line_that_installs_it(name, monkeypatch):
    monkeypatch.setattr(tracking, "find_spec", lambda module: None)
    sink, _ = TRACKERS[name]
    with pytest.raises(RequirementError, match=rf"pip install 'bilevel\[{name}\]'"):
        sink.require()


class Broken:
    def scalars(self, step, values):
        raise ConnectionError("the network\nis gone")

    def __getattr__(self, name):
        return lambda *arguments: None


def test_whatever_a_tracker_raises_is_a_tracker_error(tmp_path):
    receiver = tracking.TrackerReceiver("mine", Broken(), tmp_path, None, repeats=True)
    assert isinstance(receiver, Receiver)
    receiver.receive(STARTED)
    with pytest.raises(TrackerError, match=r"^mine: the network; it is left out from here on"):
        receiver.receive(stepped(1))


def test_numbers_that_are_not_finite_are_numbers():
    event = {"event": "evaluated", "step": 1, "metrics": {"gap": "NaN", "ratio": "-Infinity"}}
    found = tracking.scalars(event)
    assert math.isnan(found["eval/gap"])
    assert found["eval/ratio"] == -math.inf


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("done", "done"),
        ("stopped early", "done"),  # as evaluate.stop asks: it is over
        ("interrupted", "stopped"),
        ("hung up", "stopped"),
        ("diverged", "failed"),
    ],
)
def test_an_end_is_one_of_three(reason, expected):
    assert tracking.status(reason) == expected
