"""The commands there are, and what they import."""

import subprocess
import sys
import typing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer.main

import bilevel.cli.app as app_module
from bilevel import report
from bilevel.cli.app import app
from tests.cli.commands import invoke, run

ANSWERS = ["--quiet", "--json"]
COMMANDS = {
    "ls": ["KIND?", "--json"],
    "show": ["NAME", "--resolved"],
    "cp": ["RECIPE", "DESTINATION"],
    "new": ["KIND", "NAME", "--to"],
    "validate": ["RECIPE", "OVERRIDES?", *ANSWERS],
    "run": [
        "RECIPE",
        "OVERRIDES?",
        "--runs-dir",
        "--dry-run",
        "--no-report",
        "--ranks",
        "--profile",
        *ANSWERS,
    ],
    "resume": ["RUN", "--runs-dir", "--no-report", "--ranks", *ANSWERS],
    "check": ["RECIPE", "OVERRIDES?", "--estimators", "--path", "--output", *ANSWERS],
    "compare": [
        "RECIPE",
        "OVERRIDES?",
        "--estimators",
        "--labels",
        "--seeds",
        "--budget",
        "--runs-dir",
        *ANSWERS,
    ],
    "sweep": [
        "RECIPE",
        "SETTINGS?",
        "--trials",
        "--seeds",
        "--measure",
        "--maximize",
        "--sampler",
        "--pruner",
        "--sampler-seed",
        "--workers",
        "--on-error",
        "--engine",
        "--ray-address",
        "--runs-dir",
        *ANSWERS,
    ],
    "study": [
        "FILE",
        "--regime",
        "--arm",
        "--seeds",
        "--phase",
        "--again",
        "--workers",
        "--without-headroom",
        "--no-run",
        "--runs-dir",
        *ANSWERS,
    ],
    "report": ["RUN?", "--output", "--where", "--runs-dir"],
    "export": ["RUN", "--to", "--merged", "--best", "--runs-dir"],
    "runs": [
        "--where",
        "--sort",
        "--descending",
        "--show",
        "--all",
        "--watch",
        "--runs-dir",
        "--json",
    ],
    "runs rm": ["RUN?", "--where", "--yes", "--runs-dir"],
    "schema": [],
    "doctor": ["--ranks"],
}


def test_commands_and_options_are_frozen():
    """Changing this table is a decision: scripts out there depend on it."""
    group: Any = typer.main.get_command(app)
    got = {
        name: [
            param.opts[0] if param.opts[0].startswith("-") else _argument(param)
            for param in command.params
            if param.name != "help" and not getattr(param, "hidden", False)
        ]
        for name, command in _commands(group)
    }
    assert got == COMMANDS
    top = [param.opts[0] for param in group.params if param.name not in ("help",)]
    assert top == ["--version", "--debug", "--install-completion", "--show-completion"]


def test_help_says_what_a_command_does_without_cutting_it_off():
    group: Any = typer.main.get_command(app)
    told = " ".join(invoke("--help").output.split())
    for name, command in group.commands.items():
        assert f"{name} {' '.join(command.help.split())}" in told
    assert "..." not in told.partition("Commands:")[2]


def test_the_version_is_said():
    assert invoke("--version").output == f"bilevel {version('bilevel')}\n"


def test_a_file_bears_its_commands_name():
    files = {path.stem for path in Path(app_module.__file__).parent.glob("*.py")}
    assert set(COMMANDS) - files == {"runs rm"}  # which is in `remove`
    shared = {"__init__", "app", "boundary", "names", "output", "run_loop", "signals", "tables"}
    shared |= {"user_code", "completion", "remove", "selection", "watch", "answer", "shown"}
    shared |= {"ensemble", "one_run", "sweep_trial", "options", "profiling", "doctor_ranks"}
    shared |= {"study_cell", "docstrings", "importing"}
    shared |= {"spreading", "launch", "member", "follow"}
    assert files - set(COMMANDS) == shared


def _commands(group):
    for name, command in group.commands.items():
        yield name, command
        for part, below in getattr(command, "commands", {}).items():
            yield f"{name} {part}", below


def _argument(param) -> str:
    return param.name.upper() + ("" if param.required else "?")


def _paths():
    """(command, option or argument) for every path that a command takes."""
    every = [("", each) for each in app.registered_commands]
    every += [("", app_module.runs_app.registered_callback)]
    every += [("runs ", each) for each in app_module.runs_app.registered_commands]
    for below, each in every:
        hints = typing.get_type_hints(each.callback)
        name = getattr(each, "name", None) or each.callback.__name__
        for parameter, hint in hints.items():
            if Path in (hint, *typing.get_args(hint)):
                yield f"{below}{name}", parameter


@pytest.mark.parametrize(("name", "parameter"), [*_paths()])
def test_an_empty_path_is_refused_and_not_the_current_folder(
    name, parameter, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    command = dict(_commands(typer.main.get_command(app)))[name]
    words = []
    for each in command.params:
        is_option = each.opts[0].startswith("-")
        if each.name == parameter:
            words += [each.opts[0], ""] if is_option else [""]
        elif each.required:
            words += [each.opts[0], "x"] if is_option else ["x"]
    said = invoke(*name.split(), *words, code=2).stderr
    assert "got ''; must name a file or a folder" in said
    assert not list(tmp_path.iterdir())


def test_the_paths_of_every_command_are_found():  # by the test above
    assert len(list(_paths())) >= 15
    assert {("run", "runs_dir"), ("cp", "destination"), ("runs rm", "runs_dir")} <= set(_paths())


@pytest.mark.parametrize("command", [["resume"], ["report"], ["runs", "rm", "-y"]])
def test_no_run_is_named_by_nothing(command, runs, monkeypatch):
    folder = run(runs)
    monkeypatch.chdir(folder)  # which is a run
    assert "'': is not a run" in invoke(*command, "", code=2).stderr
    assert folder.is_dir()


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


def test_listing_a_run_imports_no_torch(runs):
    folder = run(runs)
    place = ["--runs-dir", str(runs)]
    asked = ["--where", "estimator=implicit", "--sort", "hypergradient_norm", "--show", "seed"]
    assert folder.name in _assert_light(["runs", *place, *asked], {})
    if not report.missing():
        to = str(runs / "many.html")
        assert _assert_light(["report", "quadratic", *place, "-o", to], {}) == f"{to}\n"


def test_validating_does_import_torch():  # negative control of the three above
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
