"""`validate`: every error with its line."""

import json
from pathlib import Path

import pytest

from bilevel import recipe as recipes
from bilevel.cli.names import shipped
from tests.cli.commands import invoke


@pytest.mark.parametrize("name", sorted(shipped()))
def test_shipped_recipes_are_valid(name):
    assert "valid (hash" in invoke("validate", name).output
    assert "valid (hash" in invoke("validate", shipped()[name]).output
    recipe = recipes.load(shipped()[name])
    assert recipes.loads(recipe.dump()) == recipe


def test_validate_shows_every_error_with_its_line(tmp_path: Path):
    path = tmp_path / "my.yaml"
    path.write_text("problem: quadratic\nupper:\n  stpes: 3\nseed: -1\n")
    text = invoke("validate", path, "estimator.damping=-1", code=2).stderr
    assert f"{path}:3: upper.stpes: unknown key. Did you mean 'steps'?" in text
    assert f"{path}:4: seed = -1; must be an integer ≥ 0" in text
    assert "override 'estimator.damping=-1': estimator.damping = -1; must be ≥ 0" in text


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("lower=lbfgs", "estimator unroll differentiates through the lower steps"),
        ("estimator=kkt", "for problems that have lower_constraints"),
    ],
)
def test_validate_refuses_what_a_run_refuses_before_it_begins(override, said):
    given = ["quadratic", "estimator=unroll", override]
    end = invoke("validate", *given, code=2)
    assert said in end.stderr
    assert end.stderr == invoke("run", "--dry-run", *given, code=2).stderr
    assert "valid (hash" in invoke("validate", "quadratic", "estimator=unroll").output


def test_a_recipe_for_a_device_that_is_not_here_is_valid():
    assert "valid (hash" in invoke("validate", "quadratic", "runtime.device=cuda").output


def test_a_misspelt_method_is_warned_of(tmp_path: Path):
    (tmp_path / "mine.py").write_text(PROBLEM)
    path = tmp_path / "mine.yaml"
    path.write_text("problem: mine.py:Mine\n")
    said = invoke("validate", path).output
    assert "warning: Mine.project_uper is not a method that a run calls. Did you mean" in said
    (line,) = json.loads(invoke("validate", path, "--json").stdout)["warnings"]
    assert line in said
    dry = invoke("run", path, "--dry-run", "--json")
    assert json.loads(dry.stdout)["warnings"] == [line]
    assert f"warning: {line}" in dry.stderr
    (tmp_path / "mine.py").write_text(PROBLEM.replace("project_uper", "project_upper"))
    assert "warning" not in invoke("validate", path).output
    assert json.loads(invoke("validate", path, "--json").stdout)["warnings"] == []


PROBLEM = """
from bilevel_problems.quadratic import Quadratic

class Mine(Quadratic):
    def project_uper(self, x):
        return x
"""
