"""`export`: a problem's own form of what was learned, in a new folder, whole or not at all."""

from pathlib import Path

import pytest

from bilevel.cli.app import app
from tests.cli.commands import RUNNER, invoke

PROBLEM = """
from bilevel_problems.quadratic import Quadratic

class Exporting(Quadratic):
    def export(self, x, y, folder, merged):
        folder.mkdir(exist_ok=True)
        (folder / "x.txt").write_text(str(float(sum(v.sum() for v in x.values()))))
        if merged:
            raise RuntimeError("half way")
        (folder / "y.txt").write_text(str(float(sum(v.sum() for v in y.values()))))
"""


@pytest.fixture
def folder(tmp_path: Path, runs: Path) -> Path:
    (tmp_path / "mine.py").write_text(PROBLEM)
    name = f"problem={tmp_path / 'mine.py'}:Exporting"
    invoke("run", "quadratic", name, "upper.steps=1", "--runs-dir", runs)
    return next(runs.glob("*/*"))


def test_what_was_learned_is_written_by_the_problem(folder: Path, tmp_path: Path):
    to = tmp_path / "out"
    assert str(to) in invoke("export", folder, "--to", to).output
    assert sorted(found.name for found in to.iterdir()) == ["x.txt", "y.txt"]
    assert "not an empty folder" in invoke("export", folder, "--to", to, code=1).stderr
    assert sorted(found.name for found in to.iterdir()) == ["x.txt", "y.txt"]


def test_an_export_that_fails_leaves_no_half(folder: Path, tmp_path: Path):
    to = tmp_path / "out"
    result = RUNNER.invoke(app, ["export", str(folder), "--to", str(to), "--merged"])
    assert result.exit_code == 7
    assert "half way" in result.output
    assert not to.exists()


def test_a_problem_without_one_says_where_the_variables_are(runs: Path, tmp_path: Path):
    invoke("run", "quadratic", "upper.steps=1", "--runs-dir", runs)
    folder = next(runs.glob("*/*"))
    result = invoke("export", folder, "--to", tmp_path / "out", code=2)
    assert "tensors.safetensors" in result.stderr
