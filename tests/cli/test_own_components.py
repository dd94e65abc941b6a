"""Components of somebody's own that raise, or return what their protocol does not allow: one message each."""

import json
from pathlib import Path

import pytest

from bilevel.runfolder import checkpoint, record
from tests.cli.commands import invoke
from tests.cli.ends import assert_same_end

OWN = """
from dataclasses import replace
from bilevel import component, tree
from bilevel.estimators import Implicit
from bilevel.linear import CG
from bilevel.lower import Gradient
from bilevel.types import Needs

@component
class Estimates:
    answer: str = "found"
    at: str = "estimate"
    @property
    def needs(self):
        return eval(self.answer) if self.at == "needs" else Needs()
    claim = "solution"
    def init(self, at):
        return {}
    def estimate(self, losses, at, state):
        found = Implicit().estimate(losses, at, Implicit().init(at))
        h, found = found.hypergradient, replace(found, state={})
        return eval(self.answer)

@component
class Solves:
    answer: str = "found"
    def solve(self, matvec, b, start):
        found = CG().solve(matvec, b, start)
        v = found.solution
        return eval(self.answer)

@component
class Preconditions:
    answer: str = "(lambda r: r, state)"
    def init(self, at):
        return {}
    def prepare(self, system, state):
        return eval(self.answer)

@component
class Steps:
    differentiable = True
    answer: str = "(z, state)"
    def init(self, y):
        return {}
    def step(self, y, gradient, state):
        z = tree.axpy(-0.1, gradient, y)
        return eval(self.answer)

@component
class Lowers:
    answer: str = "found"
    offers = Gradient().offers
    def init(self, y):
        return Gradient().init(y)
    def solve(self, loss, x, y, **rest):
        found = Gradient().solve(loss, x, y, **rest)
        return eval(self.answer)

@component
class Writes:
    method: str = "none"
    event: str = "Stepped"
    step: int = 2
    answer: str = "1 / 0"
    def open(self, folder, step):
        if self.method == "open":
            return eval(self.answer)
        return Writer(self, open(folder / "mine.txt", "w" if step is None else "a"))

class Writer:
    def __init__(self, sink, file):
        self.sink, self.file = sink, file
    def receive(self, event):
        name, sink = type(event).__name__, self.sink
        if sink.method == "receive" and name == sink.event and event.step >= sink.step:
            eval(sink.answer)
        print(name, file=self.file)
    def close(self):
        self.file.close()
        if self.sink.method == "close":
            eval(self.sink.answer)
"""
X, Y = "{'x': (5,) float64}", "{'y': (10,) float64}"
ANSWERS = {
    "no estimate": ("estimator", "Estimates", "None", "a bilevel.types.Estimate; got a NoneType"),
    "a number": ("estimator", "Estimates", "1.5", "a bilevel.types.Estimate; got a float"),
    "no needs": ("estimator", "Estimates", "None", "Estimates.needs must be a bilevel.types.Needs"),
    "names of h": (
        "estimator",
        "Estimates",
        "replace(found, hypergradient={'q': h['x']})",
        f"Estimates.estimate must return a hypergradient with the form of x, as {X}; got {{'q': (5,) float64}}",
    ),
    "dtype of h": ("estimator", "Estimates", "replace(found, hypergradient={'x': h['x'].long()})",
                   f"as {X}; got {{'x': (5,) int64}}"),
    "no h": ("estimator", "Estimates", "replace(found, hypergradient=None)", f"as {X}; got a NoneType"),
    "value": ("estimator", "Estimates", "replace(found, value=1.0)", "a tensor of one number; got a float"),
    "stats": ("estimator", "Estimates", "replace(found, stats={})", "must be a bilevel.types.Stats; got a dict"),
    "no solve": ("estimator.solver", "Solves", "v", "what Solves.solve returns must be a bilevel.types.Solve"),
    "shape of v": ("estimator.solver", "Solves", "replace(found, solution={'y': v['y'][:7]})",
                   f"with the form of b, as {Y}; got {{'y': (7,) float64}}"),
    "no pair": ("estimator.preconditioner", "Preconditions", "None", "(r ↦ M⁻¹ r, or None; its state); got a NoneType"),
    "no inverse": ("estimator.preconditioner", "Preconditions", "(1.5, state)", "r ↦ M⁻¹ r, or None, and its state; got a float"),
    "M⁻¹ r": ("estimator.preconditioner", "Preconditions", "(lambda r: r['y'], state)",
              f"with the form of r, as {Y}; got (10,) float64"),
    "no step": ("upper.optimizer", "Steps", "z", "Steps.step must return (the variables, its state); got a dict"),
    "step of x": ("upper.optimizer", "Steps", "({'x': z['x'].float()}, state)", f"variables as {X}; got {{'x': (5,) float32}}"),
    "step of y": ("lower.optimizer", "Steps", "({'y': z['y'].tolist()}, state)", f"variables as {Y}; got {{'y': a list}}"),
    "no solution": ("lower", "Lowers", "found.y", "must be a bilevel.types.LowerSolution; got a dict"),
    "y": ("lower", "Lowers", "replace(found, y={'y': found.y['y'][:3]})", f"return y as {Y}; got {{'y': (3,) float64}}"),
    "lower stats": ("lower", "Lowers", "replace(found, stats=None)", "must be a bilevel.types.LowerStats"),
    "no receiver": ("sinks", "Writes", "3", "Writes.open must return what has receive(event) and close(); got a int"),
}  # fmt: skip


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path / "own.py"


def given(own: Path, key: str, name: str, **options: object) -> str:
    said = "".join(f", {option}: {json.dumps(value)}" for option, value in options.items())
    spec = f"{{name: {own}:{name}{said}}}"
    return f"sinks=[{spec}, jsonl]" if key == "sinks" else f"{key}={spec}"


def short(runs: Path) -> tuple[object, ...]:
    return ("upper.steps=4", "checkpoint.every=0", "evaluate.every=0", "report=false", "--runs-dir", runs)  # fmt: skip


@pytest.mark.parametrize(("key", "name", "answer", "message"), ANSWERS.values(), ids=ANSWERS)
def test_what_no_protocol_allows_is_one_line(key, name, answer, message, own, runs):
    at = {"at": "needs"} if "Estimates.needs" in message else {}
    at |= {"method": "open"} if key == "sinks" else {}
    override = given(own, key, name, answer=answer, **at)
    said = invoke("run", "quadratic", override, *short(runs), code=4).stderr
    assert message in said
    assert len(said.splitlines()) == 1
    assert not list(runs.glob("*/*"))


@pytest.mark.parametrize(
    ("key", "name"), sorted({(key, name) for key, name, *_ in ANSWERS.values() if key != "sinks"})
)
def test_what_they_allow_runs(key, name, own, runs):  # negative control
    invoke("run", "quadratic", given(own, key, name), *short(runs))


RAISED = {
    "needs": ("estimator", "Estimates", {"at": "needs"}, "Estimates.needs failed"),
    "estimate": ("estimator", "Estimates", {}, "Estimates.estimate failed in step 1"),
    "solver": ("estimator.solver", "Solves", {}, "Solves.solve failed in step 1"),
    "preconditioner": (
        "estimator.preconditioner",
        "Preconditions",
        {},
        "Preconditions.prepare failed in step 1",
    ),
    "optimizer": ("upper.optimizer", "Steps", {}, "Steps.step failed in step 1"),
    "lower": ("lower", "Lowers", {}, "Lowers.solve failed in step 1"),
}


@pytest.mark.parametrize(("key", "name", "options", "message"), RAISED.values(), ids=RAISED)
def test_what_they_raise_is_told_in_their_own_frames(key, name, options, message, own, runs):
    override = given(own, key, name, answer="1 / 0", **options)
    said = invoke("run", "quadratic", override, *short(runs), code=7).stderr
    assert f"{message}: ZeroDivisionError: division by zero\n" in said
    assert "own.py:" in said
    assert "bilevel/" not in said.replace(str(own), "")


SINKS = {
    "open": ({"method": "open"}, "Writes.open failed: ", None),
    "started": ({"method": "receive", "event": "Started", "step": 0}, "Writer.receive failed at event started of step 0: ", None),
    "step": ({"method": "receive"}, "Writer.receive failed at event stepped of step 2: ", 2),
    "exit": ({"method": "receive", "answer": "exit(0)"}, "it calls sys.exit(0)", 2),
    "last": ({"method": "receive", "step": 4}, "at event stepped of step 4: ", 4),
    "measures": ({"method": "receive", "event": "Evaluated", "step": 4}, "at event evaluated of step 4: ", 4),
    "end": ({"method": "receive", "event": "Finished", "step": 4}, "at event finished of step 4: ", 4),
    "close": ({"method": "close"}, "Writer.close failed at the end of the run: ", 4),
}  # fmt: skip


@pytest.mark.parametrize(("options", "message", "saved"), SINKS.values(), ids=SINKS)
def test_a_sink_that_raises_costs_the_run_no_step(options, message, saved, own, runs):
    override = given(own, "sinks", "Writes", **options)
    said = invoke("run", "quadratic", override, *short(runs), code=7).stderr
    assert message in said
    assert said.count("Error" if "exit" not in message else "exit(0)") >= 1
    assert "bilevel/" not in said.replace(str(own), "").replace(f"bilevel resume {runs}", "")
    folders = list(runs.glob("*/*"))
    if saved is None:
        assert folders == []
        return
    (folder,) = folders
    found = checkpoint.latest(folder / "checkpoints")
    assert found is not None
    assert found.step == saved
    steps = [event["step"] for event in record.read(folder) if event["event"] == "stepped"]
    assert steps == [*range(1, saved + 1)]  # the record, whose turn comes after, has the step
    is_done = options.get("event") == "Finished" or options["method"] == "close"
    last = record.last(folder) or {}
    assert last["reason"] == ("done" if is_done else "failed")
    assert ("bilevel resume" in said) is not is_done


def test_a_run_whose_sink_is_mended_ends_as_if_it_had_never_raised(own, runs):
    override = given(own, "sinks", "Writes", method="receive", answer="is_mended")
    said = invoke("run", "quadratic", override, *short(runs), code=7).stderr
    assert "NameError: name 'is_mended' is not defined" in said
    (cut,) = runs.glob("*/*")
    invoke("resume", cut, "--no-report", code=7)  # negative control: it is not mended yet
    own.write_text(f"{OWN}\nis_mended = True\n")
    invoke("resume", cut, "--no-report")
    invoke("run", "quadratic", override, *short(runs))
    (whole,) = set(runs.glob("*/*")) - {cut}
    assert_same_end(cut, whole, step=4)
    told = (cut / "mine.txt").read_text().split()
    assert told.count("Stepped") == 2  # all but the two that it raised at
