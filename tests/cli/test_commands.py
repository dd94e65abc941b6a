"""What each command shows and with which code it exits."""

import errno
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from bilevel import recipe as recipes
from bilevel import runfolder
from bilevel.cli.app import app
from bilevel.cli.names import shipped
from bilevel.errors import CheckpointError, RequirementError
from bilevel.estimators import betty
from bilevel.recipe.yaml_source import parse
from bilevel.runfolder import checkpoint, record

RUNNER = CliRunner()
SHORT = ("upper.steps=4", "evaluate.every=2", "checkpoint.every=2")


def invoke(*arguments: object, code: int = 0):
    result = RUNNER.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.stderr, result.exception)
    return result


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def run(runs: Path, *overrides: str, recipe: str = "quadratic") -> Path:
    before = set(runs.glob("*/*"))
    invoke("run", recipe, *SHORT, *overrides, "--runs-dir", runs)
    (folder,) = set(runs.glob("*/*")) - before
    return folder


COMMANDS = {
    "ls": ["KIND?"],
    "show": ["NAME", "--resolved"],
    "cp": ["RECIPE", "DESTINATION"],
    "validate": ["RECIPE", "OVERRIDES?"],
    "run": ["RECIPE", "OVERRIDES?", "--runs-dir", "--dry-run"],
    "resume": ["RUN", "--runs-dir"],
    "check": ["RECIPE", "OVERRIDES?", "--estimators"],
    "compare": [
        "RECIPE",
        "OVERRIDES?",
        "--estimators",
        "--with",
        "--seeds",
        "--budget",
        "--runs-dir",
    ],
    "report": ["RUN", "--runs-dir"],
    "runs": ["--runs-dir"],
    "schema": [],
    "doctor": [],
}


def test_commands_and_options_are_frozen():
    """Changing this table is a decision: scripts out there depend on it."""
    group: Any = typer.main.get_command(app)
    got = {
        name: [
            param.opts[0] if param.opts[0].startswith("-") else _argument(param)
            for param in command.params
            if param.name != "help"
        ]
        for name, command in group.commands.items()
    }
    assert got == COMMANDS
    top = [param.opts[0] for param in group.params if param.name not in ("help",)]
    assert top == ["--debug", "--install-completion", "--show-completion"]


def _argument(param) -> str:
    return param.name.upper() + ("" if param.required else "?")


LIGHT = [
    ["--help"],
    ["run", "--help"],
    ["ls"],
    ["ls", "recipes"],
    ["show", "cg"],
    ["show", "quadratic"],
    ["show", "quadratic.yaml"],
    ["runs", "--runs-dir", "no/such/folder"],
]


@pytest.mark.parametrize("arguments", LIGHT, ids=" ".join)
def test_looking_imports_no_torch(arguments):
    _assert_light(arguments, {})


def test_completion_imports_no_torch():
    environment = {
        "_BILEVEL_COMPLETE": "complete_bash",
        "COMP_WORDS": "bilevel run qu",
        "COMP_CWORD": "2",
    }
    assert "quadratic" in _assert_light([], environment)


def test_validating_does_import_torch():  # negative control of the two above
    with pytest.raises(AssertionError, match="imports torch"):
        _assert_light(["validate", "quadratic"], {})


def _assert_light(arguments, environment) -> str:
    code = (
        f"import os, sys; sys.argv = ['bilevel', *{arguments!r}]; os.environ.update({environment!r})\n"
        "from bilevel.cli import main\n"
        "try: main()\n"
        "except SystemExit as exit: assert not exit.code, exit.code\n"
        "print('imports torch' if 'torch' in sys.modules else 'light', file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stderr.strip().endswith("light"), "imports torch"
    return result.stdout


def test_ls_lists_what_is_registered():
    text = invoke("ls").output
    for name in (
        "quadratic",
        "implicit",
        "newton",
        "cg",
        "adam",
        "jsonl",
        "hyper_cleaning",
        "soba",
    ):
        assert re.search(rf"[ ,]{name}[ ,\n]", text), name
    assert max(map(len, text.splitlines())) <= 80
    assert len(text.splitlines()) < 50
    assert "bilevel ls estimators" in text
    told = invoke("ls", "estimators").output
    assert re.search(r"^  implicit +∇x F", told, re.MULTILINE)
    single_loop = " ".join(
        re.search(r"^  single_loop((.*\n)+?)  \w", told, re.MULTILINE)[1].split()
    )
    assert single_loop.endswith("direction d_x."), "no half clause"
    assert max(map(len, told.splitlines())) <= 80
    only = invoke("ls", "linear").output
    assert "cg" in only
    assert "adam" not in only
    assert "Did you mean 'linear'" in invoke("ls", "liner", code=2).stderr


def test_show_tells_the_options_of_a_component():
    text = invoke("show", "implicit").output
    assert re.search(r"damping +0.0 +NonNegativeFloat", text)
    assert "bilevel ls linear" in text
    assert "arXiv:1602.02355" in text
    assert "Literal['cold', 'warm', 'linear', 'galerkin']" in text
    assert re.search(
        r"^preconditioner +None +one of: bilevel ls preconditioners \| None", text, re.M
    )
    raised = text.partition("Raises:\n")[2].partition("\n\n")[0].splitlines()
    assert {len(line) - len(line.lstrip()) for line in raised} == {4, 8}
    assert "bilevel show quadratic.yaml" in invoke("show", "quadratic").output
    assert "Did you mean 'implicit'" in invoke("show", "implict", code=2).stderr
    assert invoke("show", "linear/cg").output != invoke("show", "optimizers/sgd").output


def test_show_a_recipe_as_written_and_resolved():
    assert invoke("show", "ridge.yaml").output.startswith("# One ridge penalty")
    resolved = invoke("show", "ridge.yaml", "--resolved").output
    assert recipes.loads(resolved) == recipes.load(shipped()["ridge"])


def test_cp_copies_and_never_overwrites(tmp_path: Path):
    assert "bilevel run" in invoke("cp", "ridge", tmp_path).output
    copied = tmp_path / "ridge.yaml"
    assert copied.read_bytes() == shipped()["ridge"].read_bytes()
    copied.write_text("mine")
    assert "is there already" in invoke("cp", "ridge", copied, code=2).stderr
    assert copied.read_text() == "mine"
    invoke("cp", "ridge", tmp_path / "other")
    assert (tmp_path / "other.yaml").is_file()
    assert "no such folder" in invoke("cp", "ridge", tmp_path / "a" / "b.yaml", code=2).stderr


@pytest.mark.parametrize("name", sorted(shipped()))
def test_shipped_recipes_are_right(name):
    assert "right (hash" in invoke("validate", name).output
    assert "right (hash" in invoke("validate", shipped()[name]).output
    recipe = recipes.load(shipped()[name])
    assert recipes.loads(recipe.dump()) == recipe


@pytest.mark.parametrize("name", ["hyper_cleaning", "quadratic", "ridge", "sinusoid"])
def test_shipped_recipes_run_for_two_steps_without_a_warning(name, runs):
    folder = run(runs, "upper.steps=2", recipe=name)
    kinds = [event["event"] for event in record.read(folder)]
    assert kinds == ["started", "evaluated", "stepped", "stepped", "evaluated", "finished"]


def test_validate_shows_every_error_with_its_line(tmp_path: Path):
    path = tmp_path / "my.yaml"
    path.write_text("problem: quadratic\nupper:\n  stpes: 3\nseed: -1\n")
    text = invoke("validate", path, "estimator.damping=-1", code=2).stderr
    assert f"{path}:3: upper.stpes: unknown key. Did you mean 'steps'?" in text
    assert f"{path}:4: seed = -1; must be an integer ≥ 0" in text
    assert "override 'estimator.damping=-1': estimator.damping = -1; must be ≥ 0" in text


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "quadratc"], 2, "Did you mean 'quadratic'?"),
        (["run", "absent/quadratic.yaml"], 2, "There is a recipe called 'quadratic'"),
        (["run", "quadratic", "runtime.device=cuda:99"], 3, "runtime.device = 'cuda:99'"),
        (["run", "quadratic", "estimator=unroll", "lower=newton"], 2, "cannot be replayed"),
        (["run"], 2, "Missing argument"),
        (["resume", "absent"], 2, "is no run"),
        (["report", "absent"], 2, "is no run"),
        (["check", "quadratic", "--estimators", "implict"], 2, "Did you mean 'implicit'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_message_and_a_code(arguments, code, message, runs):
    where = ["--runs-dir", str(runs)] if arguments[0] in ("run", "resume", "report") else []
    result = invoke(*arguments, *where, code=code)
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not runs.exists()


def test_debug_shows_the_traceback():
    result = RUNNER.invoke(app, ["--debug", "run", "quadratc"])
    assert type(result.exception).__name__ == "RecipeError"
    RUNNER.invoke(app, ["ls", "sinks"])
    assert RUNNER.invoke(app, ["run", "quadratc"]).exit_code == 2


def test_a_dry_run_writes_nothing(runs):
    text = invoke("run", "quadratic", "seed=9", "--dry-run", "--runs-dir", runs).output
    assert recipes.loads(text).seed == 9
    assert "nothing was run" in text
    assert not runs.exists()


def test_a_run_leaves_its_folder(runs):
    folder = run(runs, "seed=2")
    names = {path.name for path in folder.iterdir()}
    expected = {"recipe.yaml", "resolved.yaml", "environment.json", "events.jsonl", "checkpoints"}
    assert expected <= names
    assert (folder / "recipe.yaml").read_bytes() == shipped()["quadratic"].read_bytes()
    recipe = recipes.load(folder / "resolved.yaml")
    assert recipe == recipes.load(shipped()["quadratic"], [*SHORT, "seed=2"])
    about = json.loads((folder / "environment.json").read_text())
    assert about["hash"] == recipe.hash
    assert about["overrides"] == [*SHORT, "seed=2"]
    assert folder.name.endswith(recipe.hash[:6])
    assert about["packages"]["torch"]
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "evaluated"] == [0, 2, 4]
    assert [e["step"] for e in events if e["event"] == "stepped"] == [1, 2, 3, 4]
    assert events[-1] | {"seconds": 0} == {
        "event": "finished",
        "step": 4,
        "reason": "done",
        "warned": {},
        "seconds": 0,
    }
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000004",
    ]


def test_two_runs_at_once_have_two_folders(runs):
    assert run(runs) != run(runs)


def test_a_folder_that_cannot_be_made_is_said_before_anything_slow(tmp_path: Path):
    (tmp_path / "file").write_text("")
    result = invoke("run", "quadratic", *SHORT, "--runs-dir", tmp_path / "file", code=1)
    assert "no run folder can be made" in result.stderr


def test_runs_lists_what_became_of_them(runs):
    assert "No runs in" in invoke("runs", "--runs-dir", runs).output
    folder = run(runs)
    text = invoke("runs", "--runs-dir", runs).output
    assert re.search(rf"quadratic/{folder.name} +done +4/4 +implicit +\S+e", text)


def test_runs_say_which_estimator_and_which_y(runs):
    run(runs, "estimator=bome")
    run(runs, "estimator=betty:neumann") if importlib.util.find_spec("betty") else None
    text = " ".join(invoke("runs", "--runs-dir", runs).output.split())
    assert re.search(r"done 4/4 bome \d", text)
    assert "F at the y of the run itself" in text


def test_a_warning_is_counted_in_the_console_the_record_and_the_report(runs):
    words = ("run", "quadratic", *SHORT, "estimator.solver={name: neumann, iterations: 2}")
    result = invoke(*words, "--runs-dir", runs)
    assert "warned: residual at 4 of 4 steps" in result.output
    (folder,) = runs.glob("*/*")
    assert (record.last(folder, "finished") or {})["warned"] == {"residual": 4}
    if (folder / "report.html").is_file():
        assert "At 4 of 4 steps." in (folder / "report.html").read_text()


def test_a_finished_run_is_not_resumed(runs):
    folder = run(runs)
    before = (folder / "events.jsonl").read_bytes()
    result = invoke("resume", folder, code=2)
    assert "this run is done (4 steps)" in result.stderr
    assert (folder / "events.jsonl").read_bytes() == before


def test_a_full_disk_stops_the_run_and_it_can_be_resumed(runs, monkeypatch):
    write = checkpoint._write

    def fill(folder: Path, structure: object, tensors: Any, step: int) -> None:
        if step == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(folder, structure, tensors, step)

    monkeypatch.setattr(checkpoint, "_write", fill)
    result = invoke("run", "quadratic", *SHORT, "--runs-dir", runs, code=1)
    assert "No space left on device" in result.stderr
    (folder,) = runs.glob("*/*")
    found = checkpoint.latest(folder / "checkpoints")
    assert found is not None
    assert found.step == 2
    assert re.search(r"stopped +4/4", invoke("runs", "--runs-dir", runs).output)
    monkeypatch.undo()
    invoke("resume", folder)
    kinds = [event["event"] for event in record.read(folder)]
    assert kinds.count("stepped") == 4
    assert kinds[-1] == "finished"


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
from bilevel.cli import main
main()
"""


@pytest.mark.parametrize(("limit", "remedy"), [(4096, "make room"), (16, "--runs-dir")])
def test_a_file_that_cannot_grow_is_one_message(limit, remedy, runs):
    """4096 bytes hold the recipe and some twelve events, 16 nothing."""
    command = ["run", "quadratic", "upper.steps=30", "checkpoint.every=10", "--runs-dir", str(runs)]
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), *command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 1, result.stderr
    assert result.stderr.startswith("error: ")
    assert "File too large" in result.stderr
    assert remedy in result.stderr
    assert len(result.stderr.splitlines()) == 1
    folders = list(runs.glob("*/*"))
    assert len(folders) == (limit > 16)
    for folder in folders:
        assert list(record.read(folder))
        invoke("resume", folder)
        steps = [e["step"] for e in record.read(folder) if e["event"] == "stepped"]
        assert steps == list(range(1, 31))


def create(runs, recipe, environment):
    """A run folder of a recipe, with nothing run in it."""
    return runfolder.create(
        runs,
        recipe.name,
        recipe.hash,
        text="text",
        resolved=recipe.dump(),
        overrides=[],
        environment=environment,
    )


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_folder_is_made_whole_or_not_at_all(failing, runs, monkeypatch):
    write, calls = Path.write_text, []

    def fill(path: Path, *arguments: Any, **options: Any) -> int:
        calls.append(path)
        if len(calls) == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, *arguments, **options)

    recipe = recipes.load(shipped()["quadratic"])
    monkeypatch.setattr(Path, "write_text", fill)
    with pytest.raises(CheckpointError, match=r"no run folder can be made: No space left"):
        create(runs, recipe, {})
    assert len(calls) == failing
    assert not list(runs.glob("*/*"))
    assert create(runs, recipe, {}).resolved.is_file()


def test_a_folder_killed_while_it_was_made_hides_no_run(runs, monkeypatch):
    """Killed before the last file: what lies there is no run, and an older run is still found."""
    folder = run(runs)
    recipe = recipes.load(folder / "resolved.yaml")
    monkeypatch.setattr(runfolder.folder, "_mark", lambda path, resolved: None)
    killed = create(runs, recipe, {"time": "now"})
    monkeypatch.undo()
    assert killed.environment()["time"] == "now"
    assert runfolder.find("quadratic", runs).path == folder
    newer = create(runs, recipe, {})  # negative control
    assert runfolder.find("quadratic", runs).path == newer.path


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_a_run_without_its_environment_is_one_message(content, runs):
    folder = _unfinished(runs)
    path = folder / "environment.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    result = invoke("resume", folder, code=1)
    assert f"error: {path}: " in result.stderr
    assert "put it back" in result.stderr


def test_a_damaged_record_is_one_message_and_hides_no_other_run(runs):
    whole, folder = run(runs), _unfinished(runs)
    path = folder / record.FILE
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], "{torn\n", *lines[3:]]))
    assert f"error: {path}:3: " in invoke("resume", folder, code=1).stderr
    text = invoke("runs", "--runs-dir", runs).output
    assert re.search(rf"{whole.name} +done", text)
    assert re.search(rf"{folder.name} +stopped", text)
    path.write_text("".join([*lines[:-1], "{torn\n"]))
    assert re.search(rf"{folder.name} +damaged", invoke("runs", "--runs-dir", runs).output)
    path.write_text("".join(lines))
    invoke("resume", folder)


def _unfinished(runs: Path) -> Path:
    folder = run(runs)
    path = folder / record.FILE
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    return folder


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
    assert "pip install no_such" in checked.stderr
    invoke("check", _mine(tmp_path), "--estimators", "implicit")  # negative control


@pytest.mark.parametrize("command", ["run", "check"])
def test_another_error_of_a_problem_keeps_its_traceback(command, tmp_path: Path, runs):
    recipe = _mine(tmp_path, init="raise ZeroDivisionError('mine')")
    where = ["--runs-dir", str(runs)] if command == "run" else []
    result = RUNNER.invoke(app, [command, str(recipe), *where])
    assert isinstance(result.exception, ZeroDivisionError)


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


def test_a_run_that_is_going_on_is_not_resumed(runs):
    folder = run(runs)
    path = folder / record.FILE
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with runfolder.RunFolder(folder).lock():
        assert re.search(r"running +4/4", invoke("runs", "--runs-dir", runs).output)
        assert "another process is at this run" in invoke("resume", folder, code=1).stderr
    invoke("resume", folder)


def test_a_report_is_written_again(runs):
    folder = run(runs)
    (folder / "report.html").unlink(missing_ok=True)
    result = RUNNER.invoke(app, ["report", "quadratic", "--runs-dir", str(runs)])
    if result.exit_code == 3:
        pytest.skip("without the extra report")
    assert result.output.strip() == str(folder / "report.html")
    assert (folder / "report.html").is_file()


def test_check_shows_a_row_for_each_estimator():
    text = invoke("check", "quadratic").output
    assert "reference: closed form" in text
    for name in ("implicit", "none", "one_step", "unroll"):
        verdict = "exact" if name == "implicit" else "as claimed"
        assert re.search(rf"^{name} .* {verdict}", text, re.MULTILINE)
    only = invoke("check", "quadratic", "--estimators", "implicit,none").output
    assert "unroll" not in only
    assert max(map(len, text.splitlines())) <= 80


WRONG = """
from bilevel import tree
from bilevel.estimators.implicit import Implicit
from dataclasses import replace
class Wrong:
    claim = "solution"
    needs = Implicit().needs
    def init(self, at): return Implicit().init(at)
    def estimate(self, losses, at, state):
        got = Implicit().estimate(losses, at, state)
        return replace(got, hypergradient=tree.scale(1.01, got.hypergradient))
"""


def test_check_says_which_are_exact_only_once_settled():
    text = " ".join(invoke("check", "quadratic", "--estimators", "implicit,lancbio").output.split())
    assert re.search(r"lancbio 4.\de-01 .* exact ", text)
    assert "lancbio: exact with all inner solves" in text
    assert "implicit, lancbio: exact with" not in text  # it is 2.5e-02 off


def test_one_that_is_not_installed_costs_the_others_nothing(monkeypatch):
    def absent():
        raise RequirementError("betty-ml is not installed")

    monkeypatch.setattr(betty, "require", absent)
    result = invoke("check", "quadratic", "--estimators", "none,betty:neumann", code=3)
    assert re.search(r"^none .* as claimed", result.output, re.MULTILINE)
    assert re.search(r"^betty:neumann .* untested", result.output, re.MULTILINE)
    assert "betty:neumann: betty-ml is not installed" in result.output
    assert "betty:neumann: not tested" in result.stderr
    alone = invoke("check", "quadratic", "--estimators", "betty:neumann", code=3)
    assert "betty-ml is not installed" in alone.stderr
    assert "betty-ml  is not installed" in invoke("doctor").output.replace("betty-ml is", "is")


def test_a_preset_that_is_not_there_is_no_class_of_that_module():
    got = invoke("check", "quadratic", "--estimators", "betty:neuman", code=2).stderr
    assert "unknown estimator. Did you mean 'betty:neumann'" in got
    assert "site-packages" not in invoke("run", "quadratic", "estimator=betty:bogus", code=2).stderr


def test_a_wrong_estimator_fails_the_check(tmp_path: Path):
    (tmp_path / "wrong.py").write_text(WRONG)
    path = tmp_path / "wrong.yaml"
    path.write_text("problem: quadratic\nestimator: wrong.py:Wrong\n")
    result = invoke("check", path, code=4)
    assert re.search(r"wrong *$", result.output, re.MULTILINE)
    assert "not the hypergradient that is claimed" in result.stderr


def test_one_that_was_asked_for_and_cannot_work_fails_the_check():
    result = invoke("check", "quadratic", "--estimators", "implicit,kkt", code=4)
    assert re.search(r"^kkt .* refused", result.output, re.MULTILINE)
    assert "lower_constraints" in result.output
    assert "kkt: cannot work on this problem" in result.stderr
    invoke("check", "quadratic", "--estimators", "implicit")  # negative control


def test_a_run_that_diverges_exits_with_its_own_code(runs):
    overrides = ["lower.optimizer.lr=1e200", "upper.steps=4"]
    result = invoke("run", "quadratic", *overrides, "--runs-dir", runs, code=5)
    assert "step 1" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_schema_takes_shipped_recipes_and_refuses_wrong_ones():
    schema = json.loads(invoke("schema").output)
    draft = pytest.importorskip("jsonschema").Draft202012Validator
    draft.check_schema(schema)
    validator = draft(schema)
    for path in shipped().values():
        validator.validate(parse(path.read_text(), path.name).data)
    for wrong in (
        "upper: {steps: 3}",
        "problem: quadratic\nupper: {stpes: 3}",
        "problem: quadratic\nupper: {steps: 0}",
        "problem: quadratic\nestimator: {name: implicit, damping: -1}",
        "problem: quadratic\nestimator: {name: implicit, solver: {name: cg, itrations: 3}}",
        "problem: quadratc",
    ):
        assert not validator.is_valid(parse(wrong, "w").data), wrong


def test_the_doctor_finds_this_installation_sound():
    text = invoke("doctor").output
    assert "All that is needed is there." in text
    assert re.search(r"ok +hypergradient", text)


def test_the_doctor_says_what_is_wrong(monkeypatch):
    monkeypatch.setattr("bilevel.cli.doctor._quadratic_error", lambda: 1e-3)
    result = invoke("doctor", code=4)
    assert re.search(r"no +hypergradient", result.output)
