"""`sweep` as a user meets it: trials as runs, the best to run, failures, pruning, Ctrl-C, what is refused."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from bilevel import recipe as recipes
from bilevel.cli import ensemble, sweep_trial
from bilevel.cli import sweep as command
from bilevel.cli.names import shipped
from bilevel.events import Evaluated
from bilevel.runfolder import RunFolder, record
from bilevel.sweeping import figure, request, space, study
from tests.cli.commands import SHORT, invoke

pytest.importorskip("optuna")

FAST = (*SHORT, "evaluate.held=false", "sinks=[jsonl]")
LR = "upper.optimizer.lr"


def sweep(runs: Path, *words: object, code: int = 0, workers: int = 0, fast=FAST):
    end = ["--runs-dir", runs, "--workers", workers]
    return invoke("sweep", "quadratic", *fast, *words, *end, code=code)


def found(runs: Path) -> dict:
    return json.loads((runs / "quadratic-sweep" / "sweep.json").read_text())


def loss(folder: Path) -> float:
    event = record.last(folder, "stepped")
    assert event is not None
    return event["upper_loss"]


@pytest.fixture(autouse=True)
def drawn(monkeypatch) -> Callable[..., list[Path]]:
    """Figures take longer than the runs; the test that looks at one draws it."""
    draw = figure.draw
    monkeypatch.setattr(figure, "draw", lambda *_: [])
    return draw


def test_a_grid_its_trials_and_the_recipe_that_wins(runs, drawn, monkeypatch):
    monkeypatch.setattr(figure, "draw", drawn)
    result = sweep(runs, f"{LR}=0.01,0.1,0.5", "--seeds", "0..1")
    place = runs / "quadratic-sweep"
    truth = {}
    for number in range(3):
        folders = [place / f"trial-{number:04d}-seed{seed}" for seed in (0, 1)]
        for seed, folder in enumerate(folders):
            recipe = recipes.load(folder / "resolved.yaml")
            assert recipe.seed == seed
        lr = recipes.load(folders[0] / "resolved.yaml").content["upper"]["optimizer"]["lr"]
        truth[lr] = sum(map(loss, folders)) / 2
    trials = found(runs)["trials"]
    assert {float(each["values"][LR]): each["value"] for each in trials} == truth
    assert [each["value"] for each in trials] == sorted(truth.values())
    assert found(runs)["importance"] == {LR: 1.0}
    assert (place / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert re.findall(r'id="([pm]\w+)"', drawing := (place / "sweep.svg").read_text())
    assert not re.search(r"\b[pmh][0-9a-f]{10}\b", drawing)  # which are others in each file
    (head, *rows) = csv.reader((place / "trials.csv").read_text().splitlines())
    assert head == ["trial", "status", "upper_loss", "half", LR, "seconds", "reason"]
    assert [float(row[2]) for row in rows] == sorted(truth.values())
    assert "3 done; smallest upper_loss first, mean ± 95 % interval over 2 seeds" in result.output
    command = result.output.splitlines()[-1]
    assert command == f"bilevel run {place / 'best.yaml'}"
    # what wins gives the same number, bit for bit
    invoke("run", place / "best.yaml", "--runs-dir", runs / "again")
    (whole,) = (path.parent for path in (runs / "again").glob("*/*/ensemble.yaml"))
    again = [loss(ensemble.run_of(RunFolder(whole), seed).path) for seed in (0, 1)]
    assert sum(again) / 2 == min(truth.values())
    assert again == trials[0]["seeds"]
    # and the same command has nothing to do
    times = {path: path.stat().st_mtime_ns for path in place.glob("trial-*/events.jsonl")}
    assert len(times) == 6
    sweep(runs, f"{LR}=0.01,0.1,0.5", "--seeds", "0..1")
    assert times == {path: path.stat().st_mtime_ns for path in place.glob("trial-*/events.jsonl")}
    assert found(runs)["trials"] == trials


def test_a_measure_of_the_problem_and_the_largest_first(runs):
    words = (f"{LR}=0.01,0.5", "--measure", "upper-value", "--maximize", "--json")
    answer = json.loads(sweep(runs, *words).stdout)
    assert answer["measure"] == "upper value"
    assert answer["file"] == str(runs / "quadratic-sweep" / "sweep.json")
    best, other = answer["trials"]
    assert best["value"] > other["value"]
    folder = runs / "quadratic-sweep" / f"trial-{best['number']:04d}-seed0"
    event = record.last(folder, "evaluated")
    assert event is not None
    assert best["value"] == event["metrics"]["upper value"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing is varied"),
        ([f"{LR}=1e-1..1e-3"], "the smaller end first"),
        ([f"{LR}=a..b"], "finite numbers"),
        (["=3..4"], "names no key"),
        ([f"{LR}=0..1,log"], "begin above 0"),
        (["upper.optimiser.lr=1..2"], "unknown key. Did you mean 'optimizer'?"),
        (["lower.steps=5..50"], "lower.steps=5..50,int"),
        (["estimator=implicit,unrol"], "'unrol'"),
        (["estimator=implicit,kkt"], "kkt"),
        (["lower.steps=1..999999999,int", "--sampler", "grid"], "999,999,999 points"),
        ([f"{LR}=1..2", "--sampler", "grid"], "needs a number of points"),
        ([f"{LR}=1..2,5", "--sampler", "tpe"], "points are of --sampler grid"),
        ([f"{LR}=1..2", "--measure", "accuracy"], "unknown measure"),
        (
            [f"{LR}=1..2", "--sampler", "tpee"],
            "--sampler 'tpee': unknown choice. Did you mean 'tpe'",
        ),
        ([f"{LR}=1..2", "--pruner", "x"], "--pruner"),
        ([f"{LR}=1..2", "--on-error", "x"], "--on-error"),
        ([f"{LR}=1..2", "--seeds", "4..0"], "the smaller end first"),
    ],
)
def test_what_cannot_be_is_one_line_before_anything_runs(words, said, runs):
    result = sweep(runs, *words, code=2)
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not runs.exists()


def test_without_optuna_it_says_what_to_install(runs, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = sweep(runs, f"{LR}=1..2", code=3)
    assert result.stderr == "error: a sweep needs optuna: pip install 'bilevel[sweep]'\n"


@pytest.mark.parametrize("width", [30, 40, 80])
def test_what_is_shown_while_it_runs_fits_the_terminal(width, runs):
    sweep(runs, f"{LR}=0.1,0.5", "lower.steps=5,20", "upper.steps=1")
    made = SimpleNamespace(trials=9, request=asked(runs))
    made.study = study.study(made.request, runs / "quadratic-sweep")
    console = Console(width=width, force_terminal=True, color_system=None, record=True)
    with console.capture() as shown:
        console.print(command._live(console, made))  # pyright: ignore[reportArgumentType]
    lines = shown.get().splitlines()
    assert lines[0].strip() == "4/9 trials: 4 done"
    assert lines[1].split()[:2] == ["trial", "upper_loss"]
    assert len(lines) == 6
    assert max(map(len, lines)) <= width
    assert ("time" in lines[1]) == (width == 80)


def asked(runs: Path) -> request.Request:
    varied, fixed = space.parse([f"{LR}=0.1,0.5", "lower.steps=5,20"])
    recipe = recipes.load(shipped()["quadratic"], fixed)
    return request.Request(recipe, tuple(varied), "upper_loss", False, "grid", "none", 0)


def test_another_sweep_is_refused_and_more_trials_are_not(runs):
    words = (f"{LR}=0.01..1,log", "--sampler", "random")
    sweep(runs, *words, "--trials", 2)
    said = sweep(runs, *words, "--trials", 2, "--sampler-seed", 1, code=2).stderr
    assert "sampler_seed is 0 there and 1 here" in said
    sweep(runs, *words, "--trials", 3)
    assert len(found(runs)["trials"]) == 3


def test_trials_that_diverge_are_kept_with_their_reason(runs):
    # gradient descent on a quadratic diverges where lr is above 2 / curvature
    words = ("lower.optimizer.lr=1.0,1e150", "--seeds", "0..1")
    result = sweep(runs, *words, code=6)
    done, failed = found(runs)["trials"]
    assert (done["status"], failed["status"]) == ("done", "failed")
    assert re.match("seed 0: .*(finite|diverge)", failed["reason"])
    assert f"trial {failed['number']} failed: {failed['reason']}" in result.output
    assert (runs / "quadratic-sweep" / "best.yaml").is_file()
    stopped = sweep(
        runs / "stopped", "lower.optimizer.lr=1e150,1e151", "--on-error", "stop", code=6
    )
    assert "1 failed" in stopped.output
    assert len(found(runs / "stopped")["trials"]) == 1


def test_what_is_worse_than_the_median_is_pruned_at_its_step(runs):
    rates = ",".join(["0.5"] * 1 + [f"0.{n}" for n in (41, 42, 43, 44)] + ["1e-4", "1e-5"])
    sweep(runs, f"{LR}={rates}", "upper.steps=3", "--pruner", "median")
    trials = found(runs)["trials"]
    by_state = {each["values"][LR]: each for each in trials}
    states = {lr: each["status"] for lr, each in by_state.items()}
    assert "pruned" in states.values()
    place = runs / "quadratic-sweep"
    # the rule, by hand: the first five are never pruned; then what is above the median is
    in_order = sorted(trials, key=lambda each: each["number"])
    assert all(each["status"] == "done" for each in in_order[:5])
    for each in in_order:
        folder = place / f"trial-{each['number']:04d}-seed0"
        finished = record.last(folder)
        assert finished is not None
        assert finished["reason"] == ("pruned" if each["status"] == "pruned" else "done")
        if each["status"] == "pruned":
            assert each["value"] == loss(folder)  # the mean so far, of one seed
            assert finished["step"] == 2  # at step 1 the loss is that of the start, equal for all


BREAKS = """
import os, signal
from pathlib import Path
from bilevel.components import component
from bilevel_problems.quadratic import Quadratic
HERE = Path(__file__).parent
@component
class Breaks(Quadratic):
    way: str = ""
    def evaluate(self, x, y):
        once = HERE / "once"
        if self.way == "exit":
            os._exit(17)
        if self.way == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.way == "stop" and not once.exists() and (HERE / "armed").exists():
            once.touch()
            os.kill(os.getpid(), signal.SIGINT)
        return super().evaluate(x, y)
"""


@pytest.fixture
def breaks(tmp_path: Path) -> str:
    (tmp_path / "breaks.py").write_text(BREAKS)
    return f"problem={{name: '{tmp_path / 'breaks.py'}:Breaks'}}"


def test_a_process_that_dies_costs_its_trial_alone(runs, breaks):
    result = sweep(runs, breaks, "problem.way=a,exit,kill", workers=2, code=6)
    trials = {each["values"]["problem.way"]: each for each in found(runs)["trials"]}
    assert {way: each["status"] for way, each in trials.items()} == {
        "a": "done",
        "exit": "failed",
        "kill": "failed",
    }
    assert trials["exit"]["reason"].startswith("the process ended with code 17")
    assert trials["kill"]["reason"].startswith("the process was killed by SIGKILL")
    assert "1 done, 2 failed" in result.output


def test_ctrl_c_saves_the_trial_and_the_same_command_goes_on(runs, breaks, tmp_path):
    words = (breaks, "problem.way=stop,a", f"{LR}=0.05,0.1", "--seeds", "0..1")
    sweep(runs / "whole", *words)
    (tmp_path / "armed").touch()
    result = sweep(runs, *words, code=130)
    assert "trials are over: the same command goes on" in result.stderr
    assert (tmp_path / "once").exists()
    sweep(runs, *words)
    kept = ("number", "status", "value", "values", "seeds")
    one, two = (
        [{key: each[key] for key in kept} for each in found(place)["trials"]]
        for place in (runs / "whole", runs)
    )
    assert one == two


def test_a_sweep_that_goes_on_with_another_cpu_is_warned_of(runs):
    """Its trials compare to rounding; with another number of workers they have other threads, as is known."""
    sweep(runs, f"{LR}=0.01,0.1")
    assert "warning" not in sweep(runs, f"{LR}=0.01,0.1").stderr  # negative control
    first, path = sorted((runs / "quadratic-sweep").glob("trial-*/environment.json"))
    about = json.loads(path.read_text("utf-8"))
    here = about["instructions"]
    path.write_text(json.dumps(about | {"instructions": "AVX3", "threads": 99}), "utf-8")
    first.write_text("{")  # damaged: no more is known of it
    said = sweep(runs, f"{LR}=0.01,0.1").stderr
    assert (
        f"1 of the runs that are there were computed with instructions AVX3, here {here}: " in said
    )
    assert "to rounding, not to the bit" in said
    assert "threads" not in said


def test_of_several_seeds_the_mean_so_far_is_told(tmp_path):
    made = study.study(asked(tmp_path), tmp_path)
    trial = made.ask()
    spec = {"measure": "accuracy", "id": trial._trial_id}
    watcher = sweep_trial.Watcher(spec, (1.0, 2.0), 10, made, inner=SimpleNamespace(receive=id))
    for event in (Evaluated(0, {"accuracy": 9.0}), Evaluated(4, {"accuracy": 6.0})):
        watcher.receive(event)
        watcher.receive(event)  # told again as it is resumed
    (told,) = made.get_trials(deepcopy=False)
    assert told.intermediate_values == {2 * 10 + 4: 3.0}
    assert not watcher.is_pruned


def test_what_a_step_does_not_say_is_not_a_value(tmp_path):
    (tmp_path / record.FILE).write_text("")
    with pytest.raises(ValueError, match="accuracy is None at the end of the run"):
        sweep_trial.measured(RunFolder(tmp_path), "accuracy")
