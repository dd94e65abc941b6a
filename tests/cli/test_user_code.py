"""A problem's own exceptions and odd returns: the user's frames alone, the step, an exit code of their own."""

import re
import sysconfig
from pathlib import Path

import pytest
import torch

from bilevel.cli.user_code import explained, shape
from bilevel.runfolder import record
from tests.cli.commands import RUNNER, app, invoke

PROBLEM = """
import itertools, sys, torch
class Mine:
    def init(self, streams):
        return {"x": torch.ones(2)}, {"y": torch.ones(2)}
    def upper_loss(self, x, y, batch):
        return (y["y"] - batch).square().sum() + 0 * x["x"].sum()
    def lower_loss(self, x, y, batch):
        return (y["y"] - x["x"]).square().sum()
    def upper_batches(self, stream):
        return (torch.full((2,), float(n)) for n in itertools.count(1))
    def lower_batches(self, stream):
        return itertools.repeat(None)
class Odd(Mine):
    def METHOD:
        BODY
"""
INIT, LOSS, MEASURE = "init(self, streams)", "upper_loss(self, x, y, batch)", "evaluate(self, x, y)"


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr("bilevel.report.missing", lambda: ["altair"])


def odd(folder: Path, method: str, body: str) -> Path:
    (folder / "odd.py").write_text(PROBLEM.replace("METHOD", method).replace("BODY", body))
    path = folder / "r.yaml"
    path.write_text(
        "problem: odd.py:Odd\nupper: {steps: 5}\nsinks: [jsonl]\ncheckpoint: {every: 2}\n"
    )
    return path


AT_3 = "if batch[0] == 3: {}\n        return super().upper_loss(x, y, batch)"
RAISED = {
    "init": (INIT, "1 / 0", "Odd.init failed: ZeroDivisionError: division by zero"),
    "loss": (LOSS, AT_3.format("1 / 0"), "Odd.upper_loss failed in step 3: ZeroDivisionError"),
    "measure": (MEASURE, "return [][1]", "Odd.evaluate failed in step 1: IndexError"),
    "batches": (
        "lower_batches(self, stream)",
        "1 / 0",
        "Odd.lower_batches failed: ZeroDivisionError",
    ),
    "exit": (
        LOSS,
        AT_3.format("sys.exit(0)"),
        "Odd.upper_loss failed in step 3: it calls sys.exit(0)",
    ),
    "exit in init": (INIT, "sys.exit(0)", "Odd.init failed: it calls sys.exit(0)"),
    "memory": (
        LOSS,
        "return torch.empty(2**50).sum()",
        "in step 1: too little memory (RuntimeError",
    ),
}


@pytest.mark.parametrize(("method", "body", "message"), RAISED.values(), ids=RAISED)
def test_what_a_problem_raises_is_told_in_its_own_frames(method, body, message, tmp_path, runs):
    recipe = odd(tmp_path, method, body)
    said = invoke("run", recipe, "--runs-dir", runs, code=7).stderr
    assert said.startswith("error: ")
    assert message in said
    assert re.search(r"odd\.py:\d+ in ", said)
    assert "bilevel/run" not in said
    assert "site-packages" not in said
    assert len(said.splitlines()) <= 5


def test_its_batch_the_end_and_the_way_on_are_told(tmp_path, runs):
    recipe = odd(tmp_path, LOSS, AT_3.format("raise ValueError('mine')"))
    said = invoke("run", recipe, "--runs-dir", runs, code=7).stderr
    (folder,) = runs.glob("*/*")
    assert "\n  batch: (2,) float32\n" in said
    assert f"Go on (from step-00000002): bilevel resume {folder}" in said
    last = record.last(folder) or {}
    assert (last["event"], last["reason"], last["step"]) == ("finished", "failed", 2)
    assert last["message"].startswith("Odd.upper_loss failed in step 3: ValueError: mine")
    assert re.search(r"failed +2/5", invoke("runs", "--runs-dir", runs).output)


CONSTANTS = {
    "vector": "(torch.ones(2) @ y['y']) + 0 * x['x'].sum()",
    "layer": "torch.nn.Linear(2, 1)(y['y'])[0]",
    "convolution": "torch.nn.Conv1d(1, 1, 2)(y['y'].reshape(1, 1, 2)).sum()",
}


@pytest.mark.parametrize("loss", CONSTANTS.values(), ids=CONSTANTS)
def test_constants_of_another_dtype_are_told_of_place(loss, tmp_path, runs):
    path = str(odd(tmp_path, LOSS, f"return {loss}"))
    ended = invoke("run", path, "runtime.dtype=float64", "--runs-dir", runs, code=7)
    assert "by the problem's place(device, dtype)" in ended.stderr
    other = odd(tmp_path, LOSS, "return y['y'].reshape(3)")  # control
    other = invoke("run", other, "--runs-dir", runs, code=7)
    assert "place(" not in other.stderr


def test_one_that_raises_nothing_is_done_and_debug_shows_all(tmp_path, runs):  # negative control
    good = odd(tmp_path, LOSS, "return super().upper_loss(x, y, batch)")
    invoke("run", good, "--runs-dir", runs)
    (folder,) = runs.glob("*/*")
    last = record.last(folder) or {}
    assert last["reason"] == "done"
    assert "message" not in last
    bad = odd(tmp_path, INIT, "1 / 0")
    assert invoke("check", bad, "--estimators", "implicit", code=7).stderr.startswith(
        "error: Odd.init"
    )
    traced = RUNNER.invoke(app, ["--debug", "run", str(bad), "--runs-dir", str(runs)])
    assert isinstance(traced.exception, ZeroDivisionError)
    RUNNER.invoke(app, ["ls", "sinks"])


RETURNED = {
    "a tensor": (MEASURE, "return torch.tensor(1.0)", "a dict of name: number; got a Tensor"),
    "a tensor in it": (MEASURE, "return {'a': torch.ones(3)}", "got 'a': Tensor"),
    "text in it": (MEASURE, "return {'a': 'b'}", "got 'a': str"),
    "no measures": (MEASURE, "return None", "got a NoneType"),
    "a number for a name": (MEASURE, "return {1: 1.0}", "got 1: float"),
    "no start": (INIT, "return None", "Odd.init must return (x, y)"),
    "one start": (INIT, "return {'x': torch.ones(2)}", "Odd.init must return (x, y)"),
    "sparse": (
        INIT,
        "return {'x': torch.eye(2).to_sparse()}, {'y': torch.ones(2)}",
        "x['x'] is sparse",
    ),
    "a number for a name of x": (
        INIT,
        "return {0: torch.ones(2)}, {'y': torch.ones(2)}",
        "Odd.init: x has the name 0, a int; names are texts",
    ),
    "meta": (
        INIT,
        "return {'x': torch.ones(2, device='meta')}, {'y': torch.ones(2)}",
        "has no data",
    ),
    "no batches": (
        "lower_batches(self, stream)",
        "return None",
        "an iterator of batches; got a None",
    ),
    "a number": ("lower_batches(self, stream)", "return 3", "an iterator of batches; got a int"),
    "an end": ("lower_batches(self, stream)", "return iter([1])", "ended after 1 batches"),
    "a write": (
        "lower_loss(self, x, y, batch)",
        "y['q'] = x['x']; return super().lower_loss(x, y, batch)",
        "lower_loss writes into y",
    ),
    "no loss": (LOSS, "return None", "must return a scalar tensor"),
}


@pytest.mark.parametrize(("method", "body", "message"), RETURNED.values(), ids=RETURNED)
def test_what_a_problem_returns_wrongly_is_one_line(method, body, message, tmp_path, runs):
    said = invoke("run", odd(tmp_path, method, body), "--runs-dir", runs, code=2).stderr
    assert message in said
    assert len(said.splitlines()) == 1


def test_measures_may_be_any_real_numbers(tmp_path, runs):  # negative control
    body = "import numpy; return {'a': numpy.float32(2), 'b': 3, 'c': True}"
    invoke("run", odd(tmp_path, MEASURE, body), "upper.steps=1", "--runs-dir", runs)
    (folder,) = runs.glob("*/*")
    assert (record.last(folder, "evaluated") or {})["metrics"] == {"a": 2.0, "b": 3, "c": 1.0}


def test_a_divergence_is_an_event_and_has_a_report(runs, monkeypatch):
    written = []
    monkeypatch.setattr("bilevel.report.missing", list)
    monkeypatch.setattr(
        "bilevel.report.write", lambda folder: written.append(folder) or folder.report
    )
    invoke("run", "quadratic", "lower.optimizer.lr=1e200", "--runs-dir", runs, code=5)
    (folder,) = runs.glob("*/*")
    last = record.last(folder) or {}
    assert (last["event"], last["reason"], last["step"]) == ("finished", "diverged", 0)
    assert last["message"].startswith("step 1: ")
    assert "diverged" in invoke("runs", "--runs-dir", runs).output
    assert [run.path for run in written] == [folder]


@pytest.mark.parametrize(("package", "is_own"), [("mine", True), ("numpy", False)])
def test_a_package_that_registers_components_is_somebodys_own(package, is_own, monkeypatch):
    registered = {"mine": "mine.estimators:Mine", "cg": "bilevel.linear.cg:CG"}
    monkeypatch.setattr("bilevel.registry.references", lambda group: registered)
    code = compile("1 / 0", f"{sysconfig.get_path('purelib')}/{package}/estimators.py", "exec")
    with pytest.raises(ZeroDivisionError) as raised:
        exec(code)
    frames = raised.value.__traceback__
    assert frames is not None
    said = explained(raised.value.with_traceback(frames.tb_next))  # without that of this file
    assert (said is not None and "mine/estimators.py:1" in said) is is_own


def test_the_shapes_of_a_batch():
    batch = {"image": torch.zeros(2, 3), "label": [torch.zeros(2, dtype=torch.int64), "text"]}
    assert shape(batch) == "{image: (2, 3) float32, label: ((2,) int64, str)}"


POSITION = """class Numbers:
    def __init__(self): self.position = 0
    def __iter__(self): return self
    def __next__(self): self.position += 1
    def state_dict(self): return {"position": KIND(self.position)}
    def load_state_dict(self, state): self.position = state["position"]
"""


@pytest.mark.parametrize(("kind", "code"), [("(lambda at: (at,))", 1), ("int", 0)])
def test_a_position_that_cannot_be_saved_ends_a_run_before_its_steps(kind, code, tmp_path, runs):
    """It ended at the first checkpoint, with the steps up to there lost."""
    recipe = odd(tmp_path, "lower_batches(self, stream)", "return Numbers()")
    problem = tmp_path / "odd.py"
    problem.write_text(problem.read_text() + POSITION.replace("KIND", kind))
    ended = invoke("run", recipe, "--runs-dir", runs, code=code)
    assert ("state.lower_batches.position.position: a tuple" in ended.stderr) == bool(code)
    assert len(list(runs.glob("*/*"))) == (0 if code else 1)
