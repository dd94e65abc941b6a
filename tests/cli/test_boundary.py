"""Errors are one message and a code."""

from pathlib import Path

import pytest

from bilevel.cli.app import app
from bilevel.errors import RequirementError
from bilevel.runfolder import record
from tests.cli.commands import RUNNER, invoke, run


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "quadratc"], 2, "Did you mean 'quadratic'?"),
        (["run", "absent/quadratic.yaml"], 2, "There is a recipe called 'quadratic'"),
        (["run", "quadratic", "runtime.device=cuda:99"], 3, "runtime.device = 'cuda:99'"),
        (["run", "quadratic", "estimator=unroll", "lower=newton"], 2, "cannot be replayed"),
        (["run"], 2, "Missing argument"),
        (["resume", "absent"], 2, "is not a run"),
        (["report", "absent"], 2, "is not a run"),
        (["check", "quadratic", "--estimators", "implict"], 2, "Did you mean 'implicit'"),
        (["check", "quadratic", "--estimators", ""], 2, "--estimators '': must be names like A,B"),
        (["check", "quadratic", "--path", "--estimators", ""], 2, "--estimators '': must be names"),
        (["check", "quadratic", "--estimators", "cg,"], 2, "--estimators 'cg,': must be names"),
        (["compare", "quadratic", "--estimators", ""], 2, "--estimators '': must be names"),
        (["compare", "quadratic", "--estimators", "cg,,"], 2, "--estimators 'cg,,': must be names"),
        (["study", "condition", "--no-run", "--arm", ""], 2, "--arm '': must be names like A,B"),
        (
            ["study", "condition", "--no-run", "--phase", ""],
            2,
            "--phase '': must be names like A,B",
        ),
        (["runs", "--show", ""], 2, "--show '': must be names like A,B"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_message_and_a_code(arguments, code, message, runs):
    where = ["--runs-dir", str(runs)] if arguments[0] in ("run", "resume", "report") else []
    result = invoke(*arguments, *where, code=code)
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not runs.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "quadratic"],
        ["compare", "quadratic"],
        ["sweep", "quadratic", "seed=1,2"],
        ["report", "quadratic"],
        ["export", "quadratic", "--to", "there"],
    ],
    ids=lambda value: value[0],
)
def test_several_ranks_are_not_several_runs(arguments, tmp_path, monkeypatch):
    """Each would be a run of its own, with a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = invoke(*arguments, code=2)
    assert "WORLD_SIZE=2" in result.stderr
    assert "without torchrun" in result.stderr
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("command", ["run", "resume"])
def test_a_rank_without_others_is_no_run(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    result = invoke(command, "quadratic", code=1)
    assert "finds no others at (MASTER_ADDR is not set)" in result.stderr
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, "srun -n 2 has started"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun -n 4 has started"),
        ({"PMI_SIZE": "3"}, "mpirun -n 3 has started"),
    ],
)
@pytest.mark.parametrize(
    "arguments",
    [["run", "quadratic"], ["run", "quadratic", "--ranks", "2"], ["check", "quadratic"]],
)
def test_copies_that_do_not_know_of_each_other_are_refused(
    arguments, environment, said, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    result = invoke(*arguments, code=2)
    assert said in result.stderr
    assert "--ranks" in result.stderr
    assert [*tmp_path.iterdir()] == []


def test_a_shell_in_an_allocation_and_a_batch_script_are_one_process(runs, monkeypatch):
    """salloc and sbatch set how many tasks there may be; the step has one."""
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    monkeypatch.setenv("SLURM_PROCID", "0")
    run(runs)


@pytest.mark.parametrize("command", [["run", "quadratic"], ["resume", "quadratic"]])
@pytest.mark.parametrize("size", ["1", "2"])
def test_ranks_start_no_ranks(command, size, tmp_path, monkeypatch):
    """Not under torchrun, and not a run's own ranks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", size)
    result = invoke(*command, "--ranks", "2", code=2)
    assert f"is one of WORLD_SIZE={size} already; leave it out under torchrun" in result.stderr
    assert [*tmp_path.iterdir()] == []


def test_one_rank_is_one_run(runs, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    run(runs)


def test_what_computes_nothing_asks_for_no_ranks(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    invoke("ls", "sinks")


def test_debug_shows_the_traceback():
    result = RUNNER.invoke(app, ["--debug", "run", "quadratc"])
    assert type(result.exception).__name__ == "RecipeError"
    RUNNER.invoke(app, ["ls", "sinks"])
    assert RUNNER.invoke(app, ["run", "quadratc"]).exit_code == 2


PROBLEM = """
import itertools, torch
class Mine:
    def init(self, streams):
        {init}
        return {{"x": torch.ones(2)}}, {{"y": torch.ones(2)}}
    def prepare(self):
        {prepare}
        yield from ()
    def upper_loss(self, x, y, batch): return y["y"].square(){reduced}
    def lower_loss(self, x, y, batch): return (y["y"] - x["x"]).square().sum()
    def upper_batches(self, stream): return itertools.repeat(None)
    def lower_batches(self, stream): return itertools.repeat(None)
"""


def _mine(folder: Path, init: str = "", prepare: str = "", reduced: str = ".sum()") -> Path:
    parts = {"init": init or "pass", "prepare": prepare or "pass", "reduced": reduced}
    (folder / "mine.py").write_text(PROBLEM.format(**parts))
    path = folder / "mine.yaml"
    path.write_text("problem: mine.py:Mine\nupper: {steps: 2}\n")
    return path


def test_a_run_refused_at_its_first_step_leaves_no_folder(tmp_path: Path, runs):
    recipe = _mine(tmp_path, reduced="")
    result = invoke("run", recipe, "--runs-dir", runs, code=2)
    assert "scalar" in result.stderr
    assert not list(runs.glob("*/*"))
    invoke("run", _mine(tmp_path), "--runs-dir", runs)  # negative control
    assert len(list(runs.glob("*/*"))) == 1


@pytest.mark.parametrize("where", ["init", "prepare"])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("import no_such.module", "needs the module 'no_such', which is not installed"),
        ("open('no/such/file.csv')", "needs no/such/file.csv, and there is no such file"),
        ("raise FileNotFoundError('no data: get it')", "problem Mine: no data: get it"),
        ("raise ModuleNotFoundError('no backend')", "problem Mine: no backend"),
    ],
)
def test_what_a_problem_misses_is_one_message(where, line, message, tmp_path: Path, runs):
    recipe = _mine(tmp_path, **{where: line})
    result = invoke("run", recipe, "--runs-dir", runs, code=3)
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not list(runs.glob("*/*"))
    traced = RUNNER.invoke(app, ["--debug", "run", str(recipe), "--runs-dir", str(runs)])
    assert isinstance(traced.exception, RequirementError)
    assert isinstance(traced.exception.__cause__, (ModuleNotFoundError, FileNotFoundError))
    RUNNER.invoke(app, ["ls", "sinks"])


@pytest.mark.parametrize("where", ["init", "prepare"])
def test_check_says_what_a_problem_misses_as_run_does(where, tmp_path: Path, runs):
    recipe = _mine(tmp_path, **{where: "import no_such.module"})
    asked = ["check", recipe, "--estimators", "implicit"]
    checked, ran = (
        invoke(*command, code=3) for command in (asked, ["run", recipe, "--runs-dir", runs])
    )
    assert checked.stderr == ran.stderr
    assert "put no_such.py beside" in checked.stderr
    assert "pip install" not in checked.stderr
    invoke("check", _mine(tmp_path), "--estimators", "implicit")  # negative control


@pytest.mark.parametrize(
    ("step", "raised", "kept"),
    [
        (1, "ZeroDivisionError('mine')", False),  # there is nothing to go on from
        (1, "__import__('bilevel').errors.ConvergenceError('diverged')", True),  # a result
        (1, "OSError('disk')", True),  # the machine's, and may pass
        (2, "ZeroDivisionError('mine')", True),  # a step is on record
    ],
)
def test_an_error_before_the_first_step_is_done_leaves_no_folder(
    step, raised, kept, tmp_path: Path, runs
):
    recipe, path = _mine(tmp_path), tmp_path / "mine.py"
    text = path.read_text().replace(
        "upper_batches(self, stream): return itertools.repeat(None)", BATCHES
    )
    fails = f"if int(batch) == {step}: raise {raised}"
    path.write_text(text.replace("batch): return y", f"batch):\n        {fails}\n        return y"))
    result = RUNNER.invoke(app, ["run", str(recipe), "--runs-dir", str(runs)])
    assert result.exit_code
    folders = list(runs.glob("*/*"))
    assert bool(folders) is kept
    if step == 2:
        assert [e["step"] for e in record.read(folders[0]) if e["event"] == "stepped"] == [1]


BATCHES = "upper_batches(self, stream): return map(torch.tensor, itertools.count(1))"


def test_a_run_that_diverges_exits_with_its_own_code(runs):
    overrides = ["lower.optimizer.lr=1e200", "upper.steps=4"]
    result = invoke("run", "quadratic", *overrides, "--runs-dir", runs, code=5)
    assert "step 1" in result.stderr
    assert "Traceback" not in result.stderr
