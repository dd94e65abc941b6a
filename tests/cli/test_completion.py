"""What a shell completes."""

import subprocess
import sys

import pytest

from bilevel.cli import completion
from bilevel.cli.names import shipped
from bilevel.recipe.recipe import DEFAULTS, SECTIONS
from tests.cli.commands import run


class Context:
    def __init__(self, **params):
        self.params = params


def found(incomplete: str, *overrides: str, recipe: str = "quadratic") -> list[str]:
    context = Context(recipe=recipe, overrides=list(overrides))
    return [word for word, _ in completion.complete_override(context, incomplete)]


def test_every_section_is_offered():
    words = {word.rstrip("=.") for word in found("")}
    assert words == set(SECTIONS)
    assert {key: DEFAULTS[key] for key in completion._DEFAULTS} == completion._DEFAULTS


@pytest.mark.parametrize(
    ("incomplete", "overrides", "some"),
    [
        ("low", (), {"lower=", "lower."}),
        ("estimator.", (), {"estimator.solver=", "estimator.solver.", "estimator.damping="}),
        ("estimator.solver.", (), {"estimator.solver.iterations="}),
        ("estimator.", ("estimator=unroll",), {"estimator.memory=", "estimator.last="}),
        ("estimator.", ("estimator=soba",), {"estimator.upper_direction="}),
        ("estimator=imp", (), {"estimator=implicit"}),
        ("estimator.solver=c", (), {"estimator.solver=cg"}),
        ("estimator.curvature=", (), {"estimator.curvature=gauss_newton"}),
        ("runtime.dtype=float", (), {"runtime.dtype=float32", "runtime.dtype=float64"}),
        ("evaluate.held=", (), {"evaluate.held=true", "evaluate.held=false"}),
        ("report=", (), {"report=false"}),
        ("problem.cond", (), {"problem.condition="}),
        ("upper.optimizer.", (), {"upper.optimizer.lr="}),
        ("im", ("estimator", "="), {"implicit"}),  # as bash splits it
        ("=", ("estimator",), {"implicit"}),
    ],
)
def test_keys_and_values_of_overrides(incomplete, overrides, some):
    words = found(incomplete, *overrides)
    assert some <= set(words)
    typed = "" if incomplete == "=" else incomplete
    assert all(word.startswith(typed) for word in words)


@pytest.mark.parametrize(
    ("incomplete", "recipe"),
    [("nothing.", "quadratic"), ("estimator.damping.", "quadratic"), ("problem.", "no such")],
)
def test_where_nothing_is_known_nothing_is_offered(incomplete, recipe):
    assert found(incomplete, recipe=recipe) == []


def test_a_preset_has_the_options_of_its_component():
    assert found("estimator.", "estimator=maml") == found("estimator.", "estimator=unroll")


def test_names_of_components_and_recipes():
    words = [word for word, _ in completion.complete_name("qua")]
    assert words == ["quadratic", "quadratic.yaml"]
    assert ("linear/cg" in dict(completion.complete_name("linear/"))) is True
    assert dict(completion.complete_kind("rec")) == {"recipes": "shipped recipes"}
    assert {word for word, _ in completion.complete_recipe("")} >= set(shipped())
    listed = [word for word, _ in completion.complete_estimators("implicit,impl")]
    assert listed == []  # it is in the list already
    assert "implicit,unroll" in dict(completion.complete_estimators("implicit,un"))


def test_runs_by_name_and_by_folder(runs):
    folder = run(runs)
    context = Context(runs_dir=runs)
    assert dict(completion.complete_run(context, "")) == {"quadratic": "newest of its name, done"}
    assert [word for word, _ in completion.complete_run(context, f"{runs}/qua")] == [str(folder)]
    assert completion.complete_run(Context(runs_dir="/proc"), "") == []


def test_files_of_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").touch()
    assert "mine.yaml" in dict(completion.complete_recipe("mi"))
    assert "mine.yaml" not in dict(completion.complete_recipe("no"))


def test_completion_imports_no_torch():
    code = (
        "import sys; from bilevel.cli import completion as c;"
        "x = type('C', (), {'params': {'recipe': 'quadratic', 'overrides': [], 'runs_dir': 'runs'}});"
        "assert c.complete_override(x, 'estimator.') and c.complete_name('c');"
        "c.complete_recipe(''); c.complete_run(x, ''); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
