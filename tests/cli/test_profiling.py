"""`run --profile`: each kind of work is counted as often as it is done, and the run is the same."""

import json
import subprocess
import sys

import pytest
import torch

from bilevel import types
from bilevel.cli.profiling import KINDS, TRACED, WARM, StepClock
from tests.cli.commands import invoke, run
from tests.cli.ends import assert_same_end

STEPS = WARM + TRACED + 3
LOWER = "lower={name: gradient, steps: 4, optimizer: {name: sgd, lr: 0.01}}"
SOLVER = "estimator={name: implicit, solver: {name: cg, iterations: 3, tolerance: 0}, start: cold}"
SETTINGS = (f"upper.steps={STEPS}", "evaluate.every=0", LOWER, SOLVER)


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    runs = tmp_path_factory.mktemp("profiled")
    before = types.Loss.__call__, torch.autograd.grad
    result = invoke("run", "quadratic", *SETTINGS, "report=false", "--profile", "--runs-dir", runs)
    assert (types.Loss.__call__, torch.autograd.grad) == before  # put back
    (folder,) = runs.glob("*/*")
    return folder, result.output


def test_calls_are_those_of_the_method(profiled):
    folder, _ = profiled
    found = json.loads((folder / "profile.json").read_text())
    calls = {kind: row["calls"] for kind, row in found["upper step"].items()}
    assert found["steps"] == STEPS - WARM - TRACED
    assert calls["losses"] == 4 + 1 + 1  # lower steps, the linearization of G, F
    assert calls["gradients"] == 4 + 1 + 1
    assert calls["products"] == 3 + 1  # CG from 0, and ∂²xy G
    assert calls["lower"] == calls["estimate"] == calls["upper"] == 1
    assert calls["checkpoints"] == pytest.approx(1 / 3)  # at the end
    assert sum(row["share"] for row in found["upper step"].values()) == pytest.approx(1)


def test_the_table_has_a_row_a_kind(profiled):
    folder, output = profiled
    lines = output[output.index("an upper step, the mean of 3") :].splitlines()
    assert [kind for kind in KINDS if any(line.startswith(f"{kind} ") for line in lines)] == [
        *KINDS
    ]
    assert f"{folder / 'trace.json'}" in output.replace("\n", "")


def test_the_trace_has_the_spans_of_two_steps(profiled):
    folder, _ = profiled
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    named = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert named.count("bilevel: lower") == named.count("bilevel: upper") == TRACED
    assert named.count("bilevel: products") == TRACED * (3 + 1)


def test_a_profiled_run_is_the_same_run(profiled, runs):
    folder, _ = profiled
    plain = run(runs, *SETTINGS)
    assert_same_end(folder, plain, step=STEPS)
    assert not (plain / "profile.json").exists()


def test_the_profiler_says_nothing_among_the_steps(tmp_path):
    """torch's profiler writes to the terminal by itself, which only a process of its own shows."""
    words = ["run", "quadratic", "upper.steps=4", "evaluate.held=false", "report=false"]
    command = [sys.executable, "-m", "bilevel", *words, "--profile", "--runs-dir", str(tmp_path)]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "profiler_start" not in told.stdout + told.stderr
    assert "an upper step, the mean of" in told.stdout  # control


def test_seeds_are_refused(runs):
    result = invoke("run", "quadratic", "seeds=0..1", "--profile", "--runs-dir", runs, code=2)
    assert "--profile is of one run" in result.stderr


def test_work_is_charged_to_the_innermost_kind_alone():
    times = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0, 21.0])
    clock = StepClock(now=lambda: next(times))
    with clock.span("losses"):  # outside of a step: at no time and not counted
        pass
    with clock.span("engine"):  # at 1
        with clock.span("losses"):  # at 3
            pass  # at 6
        with clock.span("losses"):  # at 10
            pass  # at 15
    # at 21
    spent = {kind: seconds for kind, seconds in clock.seconds.items() if seconds}
    assert spent == {"engine": (3 - 1) + (10 - 6) + (21 - 15), "losses": 3 + 5}
    assert clock.calls == {"engine": 1, "losses": 2}


def test_a_recipe_with_seeds_is_told_what_to_write_and_that_works(tmp_path):
    path = tmp_path / "seeds.yaml"
    path.write_text("problem: quadratic\nseeds: 0..2\nupper: {steps: 2}\n")
    said = invoke("run", path, "--profile", "--runs-dir", tmp_path / "runs", code=2).stderr
    remedy = said.strip().rpartition("as in ")[2]
    assert remedy == "seed=0"
    assert "seed: 0" in invoke("run", path, remedy, "--profile", "--dry-run").output
