"""A package as `bilevel new` writes it: found through its entry points, held to the contract."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.commands import invoke


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The package in a folder of its own: no environment is changed."""
    pytest.importorskip("setuptools", reason="setuptools builds the package, and is not installed")
    folder = tmp_path_factory.mktemp("third_party")
    invoke("new", "package", "example", "--to", folder)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--target", str(folder / "site"), str(folder / "example")]
    made = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stderr
    shutil.copytree(folder / "example" / "recipes", folder / "site" / "recipes")
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
        ("estimators", "example_estimator", "(∂²xy G)ᵀ v"),
        ("problems", "example", "the log of each penalty"),
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

check_estimator(build("estimators", "example_estimator"))
check_problem(build("problems", "example"))
"""


def test_it_keeps_its_word(installed):
    python(CHECKS, installed)


def test_a_recipe_runs_it_and_check_calls_it_exact(installed, tmp_path):
    recipe = installed / "recipes" / "example.yaml"
    shown = python(
        LS.format(f"'check', '{recipe}', '--estimators', 'example_estimator,alternating'"),
        installed,
        folder=tmp_path,
    )
    assert rows(shown, "example_estimator")[0].split()[-1] == "exact"
    assert rows(shown, "alternating")[0].split()[-2:] == ["as", "claimed"]
    python(
        LS.format(f"'run', '{recipe}', 'upper.steps=3', '--runs-dir', '{tmp_path}/runs'"), installed
    )
    assert list((tmp_path / "runs" / "example").iterdir())


def test_a_mistake_in_it_is_found(installed, tmp_path):
    """Negative control: the same package with its sign turned."""
    broken = shutil.copytree(installed, tmp_path / "broken")
    source = broken / "example" / "estimator.py"
    right = "tree.sub(F_x, lower.vjp_xy(solve.solution))"
    assert source.read_text().count(right) == 1
    source.write_text(source.read_text().replace(right, right.replace("sub(F_x", "axpy(1.0, F_x")))
    with pytest.raises(AssertionError, match="claim missed by"):
        python(CHECKS, broken)
