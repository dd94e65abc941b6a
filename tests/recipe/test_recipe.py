"""Recipes: lines, overrides, strict types, round trip, hash."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bilevel import recipe as recipes
from bilevel.errors import RecipeError
from bilevel.estimators.alternating import Alternating
from bilevel.linear.cg import CG
from bilevel.optimizers.differentiable import SGD
from bilevel.recipe.recipe import SECTIONS
from bilevel.recipe.yaml_source import override, parse, to_yaml

FOLDER = Path(__file__).parents[2] / "recipes"
loads: Any = recipes.loads
load: Any = recipes.load
OURS = (
    "quadratic",
    "ridge",
    "hyper_cleaning",
    "sinusoid",
    "lasso",
    "box_qp",
    "simulated_quadratic",
)

TEXT = """\
version: 1
name: toy
seed: 3
problem: {name: quadratic, condition: 5}
lower: {name: gradient, steps: 7, optimizer: {name: sgd, lr: 1e-3}}
upper:
  steps: 10
  optimizer: adam
estimator:
  name: implicit
  solver: {name: cg, iterations: 4}
  damping: 0.5
"""


def test_a_recipe_is_what_its_text_says():
    recipe = loads(TEXT)
    assert (recipe.name, recipe.seed, recipe.upper.steps) == ("toy", 3, 10)
    assert recipe.problem.condition == 5.0
    assert recipe.lower.optimizer == SGD(lr=0.001)
    assert recipe.estimator.solver == CG(iterations=4)
    assert recipe.estimator.damping == 0.5
    assert recipe.runtime.dtype == "float32"
    assert recipe.checkpoint.keep == 2
    assert [type(sink).__name__ for sink in recipe.sinks] == ["JSONLines", "RowFiles", "Figures"]


def test_all_defaults_are_filled_in():
    recipe = loads("problem: quadratic", title="a/small.yaml")
    assert list(recipe.content) == [key for key in SECTIONS if key != "seeds"]
    assert recipe.name == "small"
    assert recipe.content["estimator"]["solver"]["name"] == "cg"
    assert recipe.content["upper"]["optimizer"]["lr"] == 1e-2
    assert recipe.content["problem"]["num_upper"] == 5


@pytest.mark.parametrize("name", OURS)
def test_the_resolved_recipe_loads_again_to_an_equal_one(name):
    recipe = load(FOLDER / f"{name}.yaml")
    again = loads(recipe.dump())
    assert again == recipe
    assert again.hash == recipe.hash
    assert again.dump() == recipe.dump()
    assert loads(recipe.dump(), ["seed=1"]) != recipe


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("optimizer: adam", "optimiser: adam", "my.yaml:8: upper.optimiser: unknown key. Did you"),
        ("damping: 0.5", "damping: -1", "my.yaml:12: estimator.damping = -1; must be ≥ 0"),
        (
            "damping: 0.5",
            "error: 1e-3",
            "estimator.error: unknown key. Did you mean 'target_error'?",
        ),
        ("steps: 10", "steps: '10'", "my.yaml:7: upper.steps = '10'; must be an integer"),
        ("steps: 10", "steps: 10.0", "my.yaml:7: upper.steps = 10.0; must be an integer"),
        ("steps: 10", "steps: true", "my.yaml:7: upper.steps = true; must be an integer"),
        ("steps: 10", "steps: no", "my.yaml:7: upper.steps = 'no'; must be an integer"),
        ("steps: 10", "steps: 0", "my.yaml:7: upper.steps = 0; must be > 0"),
        ("name: cg", "name: cgg", "my.yaml:11: estimator.solver.name: 'cgg': unknown linear"),
        ("name: sgd", "name: adam, beta1: 2", "my.yaml:5: lower.optimizer.beta1 = 2; must be < 1"),
        ("seed: 3", "seed: -3", "my.yaml:3: seed = -3; must be an integer ≥ 0"),
        ("seed: 3", "seed: 2026-01-01", "my.yaml:3: seed: a date has no use in a recipe"),
        ("version: 1", "version: 2", "my.yaml:1: version = 2; this release reads version 1"),
        ("name: toy", "name: a/b", "my.yaml:2: name = 'a/b'; must be letters"),
        ("seed: 3", "sede: 3", "my.yaml:3: sede: unknown key. Did you mean 'seed'?"),
        ("seed: 3", "seed: 3\nseed: 4", "my.yaml:4: duplicate key 'seed'"),
        ("seed: 3", "seed: [3", "my.yaml:4: not valid YAML"),
        ("seed: 3", "1: 3", "my.yaml:3: 1: keys must be text"),
        ("problem: {name: quadratic, condition: 5}", "problem:", "my.yaml:4: problem: missing"),
        ("problem: {name: quadratic,", "problem: {", "my.yaml:4: problem: has no name"),
        (
            "quadratic, condition: 5",
            "bilevel.rng:Streams, seed: 1",
            "is not a Problem: it lacks init",
        ),
    ],
)
def test_an_error_says_where_and_what(old, new, message):
    assert old in TEXT
    loads(TEXT, title="my.yaml")
    with pytest.raises(RecipeError) as caught:
        loads(TEXT.replace(old, new, 1), title="my.yaml")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("implicit", "error", "target_error"),
        *(
            (name, "solver", "lower")
            for name in ("penalty", "f2sa_p", "bome", "moreau", "value_gap", "value_function")
        ),
        ("regularised_gap", "solver", "lower"),
        ("maid", "solver", "lower"),
        ("maid", "convexity", "strong_convexity"),
        ("maid", "slope", "sensitivity"),
        ("maid", "finest", "min_accuracy"),
        ("maid", "grow", "step_growth"),
        ("maid", "loosen", "accuracy_growth"),
    ],
)
def test_a_renamed_key_is_answered_with_its_new_name(name, old, new):
    with pytest.raises(RecipeError) as caught:
        loads(f"problem: quadratic\nestimator: {{name: {name}, {old}: 1}}\n", title="r")
    assert str(caught.value) == f"r:2: estimator.{old}: unknown key. Did you mean {new!r}?"


def test_a_new_name_is_suggested_only_where_it_is_one():
    """Negative control: implicit has no `min_accuracy`."""
    with pytest.raises(RecipeError, match=r"unknown key\. Known: "):
        loads("problem: quadratic\nestimator: {name: implicit, finest: 1}\n")


def test_the_estimator_none_is_alternating():
    made = loads("problem: quadratic\nestimator: none\n")
    assert made.estimator == Alternating()
    assert made.content["estimator"] == {"name": "alternating"}


def test_all_errors_are_shown_in_the_order_of_their_lines():
    text = TEXT.replace("seed: 3", "seed: x").replace("damping: 0.5", "damping: -1\nextra: 1")
    with pytest.raises(RecipeError) as caught:
        loads(text, ["runtime.device=gpu"], title="my.yaml")
    head, *lines = str(caught.value).splitlines()
    assert head == "my.yaml: 4 errors"
    assert [line.split(": ")[0].strip() for line in lines] == [
        "my.yaml:3",
        "my.yaml:12",
        "my.yaml:13",
        "override 'runtime.device=gpu'",
    ]


def test_overrides_replace_values_and_sections():
    recipe = loads(TEXT, ["upper.steps=20", "estimator.solver.iterations=9"])
    assert recipe.upper.steps == 20
    assert recipe.estimator.solver == CG(iterations=9)
    replaced = loads(TEXT, ["estimator=unroll"]).content["estimator"]
    assert replaced["name"] == "unroll"
    assert "damping" not in replaced
    assert loads(TEXT, ["upper.optimizer={name: sgd, lr: 1}"]).upper.optimizer == SGD(lr=1)
    kept = loads(TEXT, ["upper.optimizer.lr=0.5"]).upper.optimizer
    assert (type(kept).__name__, kept.lr) == ("Adam", 0.5)
    assert loads(TEXT, ["sinks=[]"]).sinks == ()
    assert loads(TEXT, ["sinks=[jsonl, figures]", "sinks.1.dpi=99"]).sinks[1].dpi == 99


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("upper.steps", "must be key.path=value"),
        ("=3", "must be key.path=value"),
        ("upper..steps=3", "must be key.path=value"),
        ("upper.steps='3'", "override \"upper.steps='3'\": upper.steps = '3'; must be an integer"),
        ("upper.stpes=3", "override 'upper.stpes=3': upper.stpes: unknown key. Did you mean"),
        (
            "upper.schedule={name: StepLR, step_size: 3}",
            "upper.schedule.step_size: unknown key. Known: name, options. What is handed on goes below "
            "options: {step_size: …}",
        ),
        ("uper.steps=3", "override 'uper.steps=3': uper: unknown key. Did you mean 'upper'"),
        ("upper.steps=[3", "override 'upper.steps=[3':1: not valid YAML"),
        ("sinks.7=jsonl", "must be an index below 1"),
    ],
)
def test_a_wrong_override_is_named(assignment, message):
    with pytest.raises(RecipeError) as caught:
        loads(TEXT + "sinks: [jsonl]\n", [assignment], title="my.yaml")
    assert message in str(caught.value)


def test_a_whole_number_is_a_fine_float():
    damping = loads(TEXT, ["estimator.damping=1"]).estimator.damping
    assert damping == 1.0
    assert isinstance(damping, float)
    same = loads(TEXT, ["estimator.damping=1.0"])
    assert same == loads(TEXT, ["estimator.damping=1"])


def test_the_hash_is_that_of_the_resolved_content():
    recipe = loads(TEXT)
    reordered = TEXT.replace("name: toy\nseed: 3\n", "seed: 3 # a comment\nname: toy\n")
    assert loads(reordered).hash == recipe.hash
    spelled_out = TEXT.replace("optimizer: adam", "optimizer: {name: adam, beta1: 0.9}")
    assert loads(spelled_out).hash == recipe.hash
    assert loads(TEXT, ["seed=4"]).hash != recipe.hash


PROBLEM = """
import itertools, torch
class Mine:
    def __init__(self, size: int = 2): self.size = size
    def init(self, streams): return {"x": torch.ones(1)}, {"y": torch.ones(self.size)}
    def upper_loss(self, x, y, batch): return y["y"].square().sum()
    def lower_loss(self, x, y, batch): return (y["y"] - x["x"]).square().sum()
    def upper_batches(self, stream): return itertools.repeat(None)
    def lower_batches(self, stream): return itertools.repeat(None)
"""


def test_a_problem_in_a_file_is_relative_to_the_recipe(tmp_path: Path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(PROBLEM)
        (tmp_path / folder / "r.yaml").write_text("problem: {name: 'mine.py:Mine', size: 4}\n")
    first, second = (load(tmp_path / folder / "r.yaml") for folder in ("a", "b"))
    assert first.problem.size == 4
    assert loads(first.dump()) == first  # from anywhere: the path is absolute
    assert first != second
    assert first.hash == second.hash  # the same code and options, wherever they lie
    (tmp_path / "a" / "mine.py").write_text(PROBLEM + "# changed\n")
    assert load(tmp_path / "a" / "r.yaml").hash != second.hash


def test_a_missing_or_binary_file_is_a_recipe_error(tmp_path: Path):
    with pytest.raises(RecipeError, match="cannot be read: No such file"):
        load(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="is not UTF-8 text"):
        load(tmp_path / "binary.yaml")


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(1 - 2**63, 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=20)
    | st.sampled_from(["no", "1e-3", "null", "~", "0x1", "1_000", "a: b", "# c", "- d", "é", ""])
)
KEYS = st.text("abcxyz_é01", min_size=1, max_size=6)
DATA = st.dictionaries(
    KEYS,
    st.recursive(
        SCALARS,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
        max_leaves=8,
    ),
    max_size=4,
)


@given(DATA)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_yaml_round_trip(data):
    again = parse(to_yaml(data), "t").data
    assert again == data
    assert _types(again) == _types(data)


@given(DATA, st.lists(KEYS.filter(lambda key: not key.isdigit()), min_size=1, max_size=3), SCALARS)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_an_override_sets_its_key_and_leaves_the_input(data, path, value):
    source = parse(to_yaml(data), "t")
    before = to_yaml(source.data)
    text = to_yaml({"v": value}).removeprefix("v:").strip()
    assignment = f"{'.'.join(path)}={text}"
    if _leads_into_a_list(data, path):
        with pytest.raises(RecipeError, match="must be an index"):
            override(source, [assignment])
    else:
        got: Any = override(source, [assignment]).data
        for key in path:
            got = got[key]
        assert got == value
    assert to_yaml(source.data) == before


def _types(value):
    if isinstance(value, dict):
        return {key: _types(item) for key, item in value.items()}
    return [_types(item) for item in value] if isinstance(value, list) else type(value)


def _leads_into_a_list(data: Any, path: list[str]) -> bool:
    for key in path:
        if isinstance(data, list):
            return True
        data = data.get(key) if isinstance(data, dict) else None
    return False


def test_episodes_without_batches_are_told_what_to_write(tmp_path):
    lines = ["class Tasks:"]
    for name in ("init", "upper_loss", "lower_loss", "episodes"):
        lines.append(f"    def {name}(self, *given): ...")
    (tmp_path / "tasks.py").write_text("\n".join(lines))
    with pytest.raises(RecipeError) as caught:
        loads("problem: tasks.py:Tasks", base=tmp_path)
    said = "Tasks is not a Problem: it lacks lower_batches, upper_batches, needed beside episodes"
    assert said in str(caught.value)
