"""A package of somebody else: found through its entry points, held to the same contract."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent / "package"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The package in a folder of its own: no environment is changed."""
    pytest.importorskip("setuptools", reason="setuptools builds the package, and is not installed")
    folder = tmp_path_factory.mktemp("third_party")
    source = shutil.copytree(PACKAGE, folder / "source")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--target", str(folder / "site"), str(source)]
    made = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stderr
    return folder / "site"


def python(code: str, *paths: Path, folder: Path | None = None) -> str:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=env,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


LS = "import sys; from bilevel.cli import main; sys.argv = ['bilevel', {}]; main()"


def test_it_is_listed_and_only_while_it_is_there(installed):
    for group, name, text in (
        ("estimators", "response", "dy*/dx"),
        ("problems", "pricing", "Buyers choose y"),
    ):
        command = LS.format(f"'ls', '{group}'")
        (line,) = rows(python(command, installed), name)
        assert text in line
        assert not rows(python(command), name)


def rows(shown: str, name: str) -> list[str]:
    return [line for line in shown.splitlines() if line.split()[:1] == [name]]


CHECKS = """
from bilevel.registry.build import build
from bilevel.testing import check_estimator, check_problem

check_estimator(build("estimators", "response"))
check_problem(build("problems", "pricing"))
"""


def test_it_keeps_its_word(installed):
    python(CHECKS, installed)


def test_a_recipe_runs_it_and_check_calls_it_exact(installed, tmp_path):
    recipe = tmp_path / "pricing.yaml"
    recipe.write_text(
        "version: 1\nname: pricing\nproblem: {name: pricing, goods: 4}\n"
        "estimator: {name: response, iterations: 8}\nupper: {steps: 3}\n"
    )
    shown = python(LS.format(f"'check', '{recipe}'"), installed, folder=tmp_path)
    assert rows(shown, "response")[0].split()[-1] == "exact"
    assert rows(shown, "alternating")[0].split()[-2:] == ["as", "claimed"]
    python(LS.format(f"'run', '{recipe}', '--runs-dir', '{tmp_path}/runs'"), installed)
    assert list((tmp_path / "runs" / "pricing").iterdir())


def test_a_mistake_in_it_is_found(installed, tmp_path):
    """Negative control: the same package with its sign turned."""
    broken = shutil.copytree(installed, tmp_path / "broken")
    source = broken / "bilevel_example" / "response.py"
    right = "-tree.dot(solve.solution, F_y)"
    assert source.read_text().count(right) == 1
    source.write_text(source.read_text().replace(right, right[1:]))
    with pytest.raises(AssertionError, match="claim missed by"):
        python(CHECKS, broken)
