"""Stopped and resumed equals never stopped, byte for byte; signals and their exit codes."""

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bilevel import runfolder
from bilevel.cli.boundary import Stopped
from bilevel.cli.signals import Signals
from bilevel.runfolder import checkpoint, record
from tests.cli.commands import invoke, run, unfinished
from tests.cli.ends import assert_same_end, timeless

SIGNALLING = """
import itertools, os, torch
from bilevel.events import Progress, Stepped, Evaluated
from bilevel.components import component

@component
class Signal:
    \"\"\"Sends this process a signal the first time a run sees a step.\"\"\"
    number: int
    step: int
    times: int = 1
    def open(self, folder, step): return Sender(self, folder / "signalled")

class Sender:
    def __init__(self, signal, mark): self.signal, self.mark = signal, mark
    def receive(self, event):
        if isinstance(event, Stepped) and event.step == self.signal.step:
            if not self.mark.exists():
                self.mark.write_text("")
                for _ in range(self.signal.times): os.kill(os.getpid(), self.signal.number)
    def close(self): ...

class Slow:
    def __init__(self, number: int): self.number = number
    def prepare(self):
        yield Progress("preparing", 0, 2)
        os.kill(os.getpid(), self.number)
        yield Progress("preparing", 1, 2)
    def init(self, streams): return {"x": torch.ones(1)}, {"y": torch.ones(1)}
    def upper_loss(self, x, y, batch): return y["y"].square().sum()
    def lower_loss(self, x, y, batch): return (y["y"] - x["x"]).square().sum()
    def upper_batches(self, stream): return itertools.repeat(None)
    def lower_batches(self, stream): return itertools.repeat(None)
"""

MINE = "from bilevel_problems.quadratic import Quadratic as Mine\n"
CASES = {
    "quadratic": ("upper.steps=12", "evaluate.every=4", "checkpoint.every=5", "report=false"),
    "sinusoid": (
        "report=false",
        "upper.steps=12",
        "evaluate.every=4",
        "checkpoint.every=4",
        "problem.num_tasks=3",
        "problem.problem.num_held_out=3",
        "runtime.device=cpu",
    ),
    "hyper_cleaning": (
        "report=false",
        "upper.steps=12",
        "evaluate.every=5",
        "checkpoint.every=4",
        "lower.steps=5",
        "lower.optimizer={name: adam, lr: 0.05}",
        "estimator={name: implicit, solver: {name: cg, iterations: 3}, damping: 1e-3}",
        "problem.num_train=80",
        "problem.num_clean=40",
        "runtime.device=cpu",
    ),
}


def bilevel(*arguments: object, code: int) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, "-c", "from bilevel.cli import main; main()", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == code, (result.stdout, result.stderr)
    assert "Traceback" not in result.stderr
    return result


def start(folder: Path, recipe: str, overrides, code: int, **signalling) -> tuple[Path, str]:
    """Run in a folder of its own, where a sink sends a signal; returns (run folder, stderr).

    A process of its own, which takes seconds, is for what kills it.
    """
    (folder / "signalling.py").write_text(SIGNALLING)
    extra = []
    if signalling:
        options = ", ".join(f"{key}: {value}" for key, value in signalling.items())
        spec = f"{{name: '{folder}/signalling.py:Signal', {options}}}"
        extra = [f"sinks=[jsonl, {spec}]"]
    start = bilevel if code < 0 else invoke
    result = start("run", recipe, *overrides, *extra, "--runs-dir", folder / "runs", code=code)
    (run,) = (folder / "runs").glob("*/*")
    return run, result.stderr


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A recipe, its overrides, and a run of it that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    run, _ = start(folder, request.param, CASES[request.param], 0)
    return request.param, CASES[request.param], run


@pytest.mark.parametrize("step", [4, 5])
def test_interrupted_and_resumed_is_as_never_stopped(case, step, tmp_path):
    recipe, overrides, whole = case
    run, said = start(tmp_path, recipe, overrides, 130, number=int(signal.SIGINT), step=step)
    assert f"bilevel resume {run}" in said
    last = {"event": "finished", "step": step, "reason": "interrupted"}
    assert timeless(run)[-1].items() >= last.items()
    found = checkpoint.latest(run / "checkpoints")
    assert found is not None
    assert found.step == step
    with pytest.raises(AssertionError):
        assert_same_end(run, whole)
    invoke("resume", run)
    assert_same_end(run, whole)


@pytest.mark.parametrize(
    ("number", "code", "reason", "times"),
    [
        (signal.SIGTERM, 143, "terminated", 1),
        (signal.SIGHUP, 129, "hung up", 1),
        (signal.SIGHUP, 129, "hung up", 3),  # as a terminal that closes sends it
    ],
)
def test_terminated_and_hung_up_are_saved_too(number, code, reason, times, tmp_path):
    options = {"number": int(number), "step": 3, "times": times}
    run, _ = start(tmp_path, "quadratic", CASES["quadratic"], code, **options)
    last = {"event": "finished", "step": 3, "reason": reason}
    assert timeless(run)[-1].items() >= last.items()
    found = checkpoint.latest(run / "checkpoints")
    assert found is not None
    assert found.step == 3
    assert re.search(rf"{reason} +3/12", invoke("runs", "--runs-dir", tmp_path / "runs").output)


def test_an_interrupted_run_has_its_report(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr("bilevel.report.missing", list)
    monkeypatch.setattr("bilevel.report.write", lambda folder: written.append(folder.path) or "")
    options = {"number": int(signal.SIGINT), "step": 2}
    run, said = start(tmp_path, "quadratic", ["upper.steps=3"], 130, **options)
    assert written == [run]
    assert said.count("Go on (from step-00000002)") == 1


def test_a_hang_up_that_is_ignored_stays_so(tmp_path):
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        options = {"number": int(signal.SIGHUP), "step": 3}
        run, _ = start(tmp_path, "quadratic", CASES["quadratic"], 0, **options)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert timeless(run)[-1]["reason"] == "done"


ON_TERMINAL = """
import fcntl, termios
from bilevel.cli import main
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
main()
"""


def test_a_process_that_loses_its_terminal_saves_and_exits(tmp_path):
    """The real command on a terminal of its own, which goes away: SIGHUP, and output that fails."""
    controller, terminal = pty.openpty()
    (tmp_path / "signalling.py").write_text(SIGNALLING)
    sink = f"{{name: '{tmp_path}/signalling.py:Signal', number: 0, step: 2}}"
    words = ["quadratic", "upper.steps=1000000", "report=false", f"sinks=[jsonl, {sink}]"]
    process = subprocess.Popen(
        [sys.executable, "-c", ON_TERMINAL, "run", *words, "--runs-dir", str(tmp_path / "runs")],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    os.close(terminal)
    try:
        while not list((tmp_path / "runs").glob("*/*/signalled")):
            assert process.poll() is None
            select.select([controller], [], [], 0.1)[0] and os.read(controller, 65536)
        os.close(controller)
        assert process.wait() == 129
    finally:
        process.kill()
    (run,) = (tmp_path / "runs").glob("*/*")
    assert timeless(run)[-1]["reason"] == "hung up"
    found = checkpoint.latest(run / "checkpoints")
    assert found is not None
    assert found.step == timeless(run)[-1]["step"]


@pytest.mark.parametrize(
    ("case", "step"),
    [("quadratic", 3), ("quadratic", 7), ("sinusoid", 3), ("hyper_cleaning", 7)],
    indirect=["case"],
)
def test_killed_goes_on_from_the_last_checkpoint_or_the_start(case, step, tmp_path):
    recipe, overrides, whole = case
    run, _ = start(tmp_path, recipe, overrides, -9, number=int(signal.SIGKILL), step=step)
    found = checkpoint.latest(run / "checkpoints")
    assert (found is None) == (step == 3)
    invoke("resume", run)
    assert_same_end(run, whole)


def test_a_second_signal_stops_at_once(tmp_path):
    run, said = start(
        tmp_path, "quadratic", CASES["quadratic"], 130, number=int(signal.SIGINT), step=7, times=2
    )
    assert "stopped at once" in said
    found = checkpoint.latest(run / "checkpoints")
    assert found is not None
    assert found.step == 5
    assert timeless(run)[-1]["event"] == "stepped"


def test_a_signal_at_the_last_step_lets_the_run_finish(tmp_path):
    """All of it but the control, which is not begun then."""
    run, _ = start(tmp_path, "quadratic", CASES["quadratic"], 0, number=int(signal.SIGINT), step=12)
    *_, warned, finished = timeless(run)
    assert finished["reason"] == "done"
    assert (warned["kind"], warned["step"]) == ("x held", 12)
    assert "not measured" in warned["message"]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_while_preparing_leaves_nothing_behind(number, code, tmp_path):
    (tmp_path / "signalling.py").write_text(SIGNALLING)
    problem = f"{{name: '{tmp_path}/signalling.py:Slow', number: {int(number)}}}"
    path = tmp_path / "slow.yaml"
    path.write_text(f"problem: {problem}\n")
    result = invoke("run", path, "--runs-dir", tmp_path / "runs", code=code)
    assert "before the first step" in result.stderr
    assert "preparing: 0 of 2" in result.stdout
    assert not list((tmp_path / "runs").glob("*/*"))


def test_what_is_removed_is_removed_whole(tmp_path, monkeypatch):
    """A signal that comes while the folder of a run without a step goes leaves none of it."""
    real, heard = shutil.rmtree, []

    def interrupted(folder, *rest, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        heard.append(folder)
        real(folder, *rest, **options)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    test_a_signal_while_preparing_leaves_nothing_behind(signal.SIGINT, 130, tmp_path)
    assert heard
    with pytest.raises(Stopped), Signals():  # control: one that comes without that is heard
        interrupted(tmp_path)
    assert len(heard) == 1


def test_a_damaged_checkpoint_is_passed_over_and_said(case, tmp_path):
    recipe, overrides, whole = case
    run, _ = start(tmp_path, recipe, overrides, 130, number=int(signal.SIGINT), step=9)
    newest = checkpoint.latest(run / "checkpoints")
    assert newest is not None
    tensors = newest.path / checkpoint.TENSORS
    tensors.write_bytes(tensors.read_bytes()[:-3])
    assert "passed over" in invoke("resume", run).stderr
    assert_same_end(run, whole)


EVALUATED = """
import os, signal
from pathlib import Path
from bilevel_problems.quadratic import Quadratic
class Mine(Quadratic):
    def evaluate(self, x, y):
        mark = Path(__file__).with_name("evaluated")
        if not mark.exists():
            mark.write_text("")
            os.kill(os.getpid(), signal.SIGINT)
        return super().evaluate(x, y)
"""


def test_interrupted_in_the_first_evaluation_and_resumed_is_as_never_stopped(tmp_path):
    path = tmp_path / "mine.yaml"
    (tmp_path / "mine.py").write_text(EVALUATED)
    path.write_text("problem: mine.py:Mine\nupper: {steps: 3}\nreport: false\n")
    invoke("run", path, "--runs-dir", tmp_path / "stopped", code=130)
    invoke("run", path, "--runs-dir", tmp_path / "whole")
    (run,), (whole,) = (list((tmp_path / name).glob("*/*")) for name in ("stopped", "whole"))
    found = checkpoint.latest(run / "checkpoints")
    assert found is not None
    assert found.step == 0
    assert timeless(run) != timeless(whole)
    invoke("resume", run)
    steps = [event["step"] for event in timeless(run) if event["event"] == "evaluated"]
    assert steps == [0, 3]
    assert timeless(run) == timeless(whole)


FAILING = """
import torch
from pathlib import Path
class Positioned:
    def __init__(self, stream): self.stream, self.count = stream, 0
    def __iter__(self): return self
    def __next__(self):
        self.count += 1
        return self.count * torch.randn(2, generator=self.stream)
    def state_dict(self): return {"count": self.count}
    def load_state_dict(self, saved): self.count = saved["count"]
class Mine:
    def __init__(self, where: str = ""): self.where, self.calls = where, 0
    def init(self, streams):
        self.calls = 0
        return {"x": torch.zeros(2)}, {"y": torch.zeros(2)}
    def upper_loss(self, x, y, batch):
        self.fail("upper", 9)
        return (y["y"] - batch).square().sum()
    def lower_loss(self, x, y, batch):
        self.fail("lower", 37)
        return (y["y"] - x["x"] - batch).square().sum()
    def evaluate(self, x, y):
        self.fail("measure", 1)
        return {"size": y["y"].norm().item()}
    def upper_batches(self, stream):
        while True: yield torch.randn(2, generator=stream)
    def lower_batches(self, stream): return Positioned(stream)
    def fail(self, where, calls):
        mark = Path(__file__).with_name("mark")
        self.calls += where == self.where
        if where == self.where and self.calls > calls and not mark.exists():
            mark.write_text("")
            1 / 0
class Paired(Mine):
    def episodes(self, stream):
        while True:
            yield torch.randn(2, generator=stream), torch.randn(2, generator=stream)
"""


@pytest.mark.parametrize("kind", ["Mine", "Paired"])
@pytest.mark.parametrize("where", ["upper", "lower", "measure"])
def test_failed_and_resumed_is_as_never_failed(where, kind, tmp_path):
    """The state of the last good step is saved, and no batch is lost that the failed step drew."""
    (tmp_path / "mine.py").write_text(FAILING)
    path = tmp_path / "mine.yaml"
    problem = f"{{name: mine.py:{kind}, where: {where}}}"
    options = "upper: {steps: 12}\nevaluate: {every: 3}\nlower: {steps: 4}\nreport: false\n"
    path.write_text(f"problem: {problem}\n{options}")
    said = invoke("run", path, "--runs-dir", tmp_path / "failed", code=7).stderr
    invoke("run", path, "--runs-dir", tmp_path / "whole")
    (run,), (whole,) = (list((tmp_path / name).glob("*/*")) for name in ("failed", "whole"))
    found = checkpoint.latest(run / "checkpoints")
    assert found is not None
    assert 0 < found.step < 12
    assert f"Go on (from {found.path.name}): bilevel resume {run}" in said
    assert timeless(run)[-1].items() >= {"step": found.step, "reason": "failed"}.items()
    invoke("resume", run)
    assert_same_end(run, whole)


def test_an_error_of_a_sink_saves_the_step_that_its_record_has(tmp_path):
    (tmp_path / "mine.py").write_text(FAILING)
    (tmp_path / "sink.py").write_text(FULL)
    path = tmp_path / "mine.yaml"
    path.write_text("problem: mine.py:Mine\nreport: false\nsinks: [sink.py:Full, jsonl]\n")
    invoke("run", path, "--runs-dir", tmp_path / "runs", code=7)
    (run,) = (tmp_path / "runs").glob("*/*")
    found = checkpoint.latest(run / "checkpoints")
    assert found is not None
    assert found.step == 3
    steps = [event["step"] for event in timeless(run) if event["event"] == "stepped"]
    assert steps == [1, 2, 3]


FULL = """
class Full:
    def open(self, folder, step): return self
    def receive(self, event):
        if type(event).__name__ == "Stepped" and event.step == 3: raise OSError("full")
    def close(self): ...
"""


def test_a_changed_recipe_is_not_resumed(tmp_path):
    run, _ = start(
        tmp_path, "quadratic", CASES["quadratic"], 130, number=int(signal.SIGINT), step=3
    )
    before, resolved = (run / "events.jsonl").read_bytes(), run / "resolved.yaml"
    text = resolved.read_text()
    for level, was, now in (("lower", 20, 21), ("upper", 12, 13)):
        assert f"  steps: {was}\n" in text
        resolved.write_text(text.replace(f"  steps: {was}\n", f"  steps: {now}\n"))
        said = invoke("resume", run, code=2).stderr
        assert f"since the run began: {level}.steps is {was} there and {now} here" in said
        assert (run / "events.jsonl").read_bytes() == before


def test_a_changed_file_of_the_recipe_is_not_resumed(runs, tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    folder = unfinished(runs, f"problem={tmp_path}/mine.py:Mine")
    (tmp_path / "mine.py").write_text(f"{MINE}# changed\n")
    said = invoke("resume", folder, code=2).stderr
    assert "since the run began: problem.name is" in said
    (tmp_path / "mine.py").write_text(MINE)
    invoke("resume", folder)  # negative control


def test_a_run_older_than_an_option_is_resumed_with_the_default(runs):
    folder = unfinished(runs)
    about = json.loads((folder / "environment.json").read_text())
    assert about["settings"].pop("estimator.damping") == "0.0"
    (folder / "environment.json").write_text(json.dumps(about))
    said = invoke("resume", folder, code=2).stderr
    assert "estimator.damping is not set there and 0.0 here" in said  # it is written in the recipe
    resolved = folder / "resolved.yaml"
    resolved.write_text(resolved.read_text().replace("  damping: 0.0\n", ""))
    invoke("resume", folder)


def test_a_run_that_goes_on_with_other_arithmetic_is_warned_of(runs):
    """It is the same to rounding: nobody is kept from going on, nor told that it is the same to the bit."""
    folder = unfinished(runs)
    assert "begun with" not in invoke("resume", folder).stderr  # control
    folder = unfinished(runs)
    path = folder / "environment.json"
    about = json.loads(path.read_text("utf-8"))
    here = about["instructions"]
    path.write_text(json.dumps(about | {"instructions": "AVX3", "threads": 99}), "utf-8")
    said = invoke("resume", folder).stderr
    assert f"warning: begun with instructions AVX3, here {here} and threads 99, here" in said
    assert "to rounding, not to the bit" in said


def test_a_checkpoint_of_another_recipe_is_not_resumed(tmp_path):
    overrides = CASES["quadratic"]
    options = {"number": int(signal.SIGINT), "step": 3}
    runs = {}
    for name, lr in (("one", 0.1), ("other", 0.2)):
        (tmp_path / name).mkdir()
        words = [*overrides, f"upper.optimizer.lr={lr}"]
        runs[name], _ = start(tmp_path / name, "quadratic", words, 130, **options)
    own = runs["one"] / "checkpoints"
    shutil.move(own, tmp_path / "kept")
    shutil.copytree(runs["other"] / "checkpoints", own)
    before = (runs["one"] / "events.jsonl").read_bytes()
    said = invoke("resume", runs["one"], code=2).stderr
    assert "upper.optimizer.lr is 0.2 there and 0.1 here. Take the recipe" in said
    assert len(said.splitlines()) == 1
    assert (runs["one"] / "events.jsonl").read_bytes() == before
    shutil.rmtree(own)
    shutil.move(tmp_path / "kept", own)
    invoke("resume", runs["one"])  # negative control


def test_a_finished_run_is_not_resumed(runs):
    folder = run(runs)
    before = (folder / "events.jsonl").read_bytes()
    result = invoke("resume", folder, code=2)
    assert "this run is done (4 steps)" in result.stderr
    assert (folder / "events.jsonl").read_bytes() == before


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_a_run_without_its_environment_is_one_message(content, runs):
    folder = unfinished(runs)
    path = folder / "environment.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    result = invoke("resume", folder, code=1)
    assert f"error: {path}: " in result.stderr
    assert "put it back" in result.stderr


def test_a_run_that_is_going_on_is_not_resumed(runs):
    folder = run(runs)
    path = folder / record.FILE
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with runfolder.RunFolder(folder).lock():
        assert re.search(r"running +4/4", invoke("runs", "--runs-dir", runs).output)
        assert "another process is at this run" in invoke("resume", folder, code=1).stderr
    invoke("resume", folder)
