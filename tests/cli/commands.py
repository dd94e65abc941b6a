"""How a test invokes a command."""

from pathlib import Path

from typer.testing import CliRunner

from bilevel.cli.app import app
from bilevel.runfolder import record

RUNNER = CliRunner()
SHORT = ("upper.steps=4", "evaluate.every=2", "checkpoint.every=2", "report=false")


def invoke(*arguments: object, code: int = 0):
    result = RUNNER.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.stderr, result.exception)
    return result


def run(runs: Path, *overrides: str, recipe: str = "quadratic") -> Path:
    before = set(runs.glob("*/*"))
    invoke("run", recipe, *SHORT, *overrides, "--runs-dir", runs)
    (folder,) = set(runs.glob("*/*")) - before
    return folder


def unfinished(runs: Path, *overrides: str) -> Path:
    folder = run(runs, *overrides)
    path = folder / record.FILE
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    return folder
