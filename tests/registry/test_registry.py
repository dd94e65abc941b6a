"""Names to classes; listing without importing."""

import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from bilevel import registry
from bilevel.errors import RecipeError, RequirementError
from bilevel.linear.cg import CG
from bilevel.linear.dense import Dense
from bilevel.optimizers.differentiable import SGD, Adam
from bilevel.registry import source_docs
from bilevel.registry.build import build

TOYS = '''
from __future__ import annotations
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated
from bilevel.linear.cg import CG
from bilevel.components import Slot, component
from bilevel.types import LinearSolver

class Plain:
    def __init__(self, n: int = 3, tag: str = "a") -> None:
        self.size = n
        if n == 7:
            raise ValueError("seven is refused")

class Anything:
    def __init__(self, **options: object) -> None:
        self.options = options

@dataclass
class Standard:
    n: int = 3
    solver: Annotated[LinearSolver, Slot("linear")] = field(default_factory=lambda: CG(iterations=4))

@component
class Nested:
    """Holds solvers."""
    need: float
    many: Annotated[tuple[LinearSolver, ...], Slot("linear")] = ()
    maybe: Annotated[LinearSolver, Slot("linear")] | None = None
    pair: tuple[float, float] = (0.1, 0.2)
    path: Path | None = None
    named: dict[str, float] | None = None
'''


@pytest.fixture
def toys(tmp_path: Path) -> Path:
    path = tmp_path / "toys.py"
    path.write_text(TOYS)
    return path


def test_names_lead_to_their_classes():
    assert registry.find("linear", "cg") is CG
    assert registry.find("linear", "bilevel.linear.dense:Dense") is Dense


def test_every_entry_point_leads_to_a_class_with_a_summary():
    for group in ("estimators", "linear", "lower", "optimizers", "sinks", "problems"):
        for entry in registry.entries(group):
            assert isinstance(registry.find(group, entry.name), type)
            assert entry.summary, f"{group}/{entry.name} has no docstring"


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(RecipeError, match=r"'cgg': unknown linear solver. Did you mean 'cg'"):
        registry.find("linear", "cgg")
    with pytest.raises(RecipeError, match=r"Known: cg, dense, gmres, .*neumann"):
        registry.find("linear", "zzzzzz")


@pytest.mark.parametrize(
    ("group", "name", "elsewhere"),
    [("estimators", "newton", "lower/newton"), ("lower", "cg", "linear/cg")],
)
def test_a_name_of_another_kind_is_told_where_it_is(group, name, elsewhere):
    with pytest.raises(RecipeError) as told:
        registry.find(group, name)
    assert str(told.value).endswith(f" Of another kind there is {elsewhere}.")
    assert "Did you mean" not in str(told.value), "a guess that is far off"
    with pytest.raises(RecipeError, match=r"proximal\.$"):
        registry.find("lower", "adamax")


def test_a_name_registered_twice_is_refused(monkeypatch):
    twice = [EntryPoint("cg", value, "bilevel.linear") for value in ("a:A", "b:B")]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: twice)
    with pytest.raises(RecipeError, match="registered twice: a:A and b:B"):
        registry.find("linear", "cg")


def test_a_missing_package_names_its_extra(tmp_path: Path):
    (tmp_path / "needs.py").write_text("import vl_convert_absent\nclass A: ...\n")
    with pytest.raises(RequirementError, match=r"vl_convert_absent\.py beside") as told:
        registry.find("problems", "needs.py:A", tmp_path)
    assert "pip install" not in str(told.value)  # anyone may register that name
    assert registry.extra_for("vl_convert") == "report"
    assert registry.extra_for("PIL") == "mllm"
    assert registry.extra_for("no_such_package") is None


def test_a_component_of_an_absent_extra_says_how_to_install_it(monkeypatch):
    point = EntryPoint("far", "json.absent:A", "bilevel.linear")
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [point])

    def absent(module: str) -> None:
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")

    monkeypatch.setattr("importlib.import_module", absent)
    with pytest.raises(RequirementError, match=r"pip install 'bilevel\[mllm\]'") as caught:
        registry.find("linear", "far")
    assert caught.value.exit_code == 3


def test_a_file_that_fails_to_import_says_why(tmp_path: Path):
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(RecipeError, match="ZeroDivisionError: division by zero"):
        registry.find("problems", "broken.py:A", tmp_path)
    with pytest.raises(RecipeError, match="there is no file"):
        registry.find("problems", "absent.py:A", tmp_path)


def test_a_module_that_says_what_it_needs_is_not_a_mistake_of_the_recipe(tmp_path, monkeypatch):
    text = "from bilevel.errors import RequirementError\nraise RequirementError('needs a disk')\n"
    (tmp_path / "needy_module.py").write_text(text)
    (tmp_path / "broken_module.py").write_text("from torch import nothing_of_this_name\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RequirementError, match=r"^needs a disk$"):
        registry.find("problems", "needy_module:A")
    with pytest.raises(RequirementError, match="needs a disk"):
        registry.find("problems", "needy_module.py:A", tmp_path)
    with pytest.raises(RecipeError, match="importing broken_module failed"):
        registry.find("problems", "broken_module:A")


def test_a_file_is_relative_to_its_base_and_loaded_once(toys: Path):
    first = registry.find("problems", "toys.py:Plain", toys.parent)
    assert registry.find("problems", str(toys) + ":Plain") is first
    with pytest.raises(RecipeError, match=r"'Plein': unknown class in .*Did you mean 'Plain'"):
        registry.find("problems", "toys.py:Plein", toys.parent)


def test_an_edited_file_is_loaded_again(toys: Path):
    before = registry.find("problems", f"{toys}:Plain")
    toys.write_text(TOYS.replace("n: int = 3, tag", "n: int = 4, tag"))
    after = registry.find("problems", f"{toys}:Plain")
    assert (before().size, after().size) == (3, 4)


def test_an_edit_of_the_same_size_in_the_same_second_too(toys: Path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    os.utime(toys, (1e9, 1e9))
    before = registry.find("problems", f"{toys}:Plain")
    toys.write_text(TOYS.replace("n: int = 3, tag", "n: int = 4, tag"))
    os.utime(toys, (1e9, 1e9))
    after = registry.find("problems", f"{toys}:Plain")
    assert (before().size, after().size) == (3, 4)


def test_listing_imports_no_component(tmp_path: Path):
    code = (
        "import sys; from bilevel import registry\n"
        "for group in registry.groups(): registry.entries(group)\n"
        "assert not {'torch', 'pydantic', 'numpy'} & sys.modules.keys()\n"
        "registry.find('linear', 'cg'); assert 'torch' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_outline_reads_options_from_source():
    found = source_docs.outline_of("bilevel.run.upper:Upper")
    assert found is not None
    steps, optimizer, *_ = found.options
    assert (steps.name, steps.type, steps.default) == ("steps", "PositiveInt", "100")
    assert (optimizer.type, optimizer.slot) == ("Optimizer", "optimizers")
    assert source_docs.outline_of("bilevel.run.upper:Absent") is None
    assert source_docs.outline_of("no_such_package.module:A") is None


def test_build_takes_a_name_a_mapping_or_options_of_the_default(toys: Path):
    assert build("linear", "cg") == CG()
    assert build("linear", {"name": "cg", "iterations": 3}) == CG(iterations=3)
    standard = build("problems", {"name": f"{toys}:Standard", "solver": {"tolerance": 1e-3}})
    assert standard.solver == CG(iterations=4, tolerance=1e-3)
    standard = build("problems", {"name": f"{toys}:Standard", "solver": {"name": "cg"}})
    assert standard.solver == CG()


def test_build_nests_to_any_depth(toys: Path):
    nested = build(
        "problems",
        {
            "name": f"{toys}:Nested",
            "need": 1,
            "many": ["dense", {"name": "cg", "iterations": 2}],
            "maybe": None,
            "pair": [1, 2.5],
            "path": "a/b",
        },
    )
    assert nested.need == 1.0
    assert isinstance(nested.need, float)
    assert nested.many == (Dense(), CG(iterations=2))
    assert nested.pair == (1.0, 2.5)
    assert nested.path == Path("a/b")


def test_an_empty_path_is_refused_and_not_the_current_folder(toys: Path):
    with pytest.raises(RecipeError, match=r"^p\.path = ''; must name a file or a folder"):
        build("problems", {"name": f"{toys}:Nested", "need": 1, "path": ""}, "p")


def test_build_shows_all_errors_at_their_places(toys: Path):
    spec = {
        "need": "1",
        "many": ["cg", {"name": "neuman"}, {"name": "cg", "iteratons": 1}],
        "maybe": 3,
        "pair": [1, "2"],
        "named": {"a": "q"},
        "nede": 1,
    }
    with pytest.raises(RecipeError) as caught:
        build("problems", {"name": f"{toys}:Nested", **spec}, where="p")
    text = str(caught.value)
    assert text.splitlines()[0] == "7 errors"
    for line in (
        "p.need = '1'; must be a number (remove the quotes)",
        "p.many.1.name: 'neuman': unknown linear solver. Did you mean 'neumann'?",
        "p.many.2.iteratons: unknown key. Did you mean 'iterations'?",
        "p.maybe = 3; must be a name or a mapping with a name",
        "p.pair.1 = '2'; must be a number",
        "p.named.a = 'q'; must be a number",
        "p.nede: unknown key. Did you mean 'need'",
    ):
        assert line in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": "3"}, "n = '3'; must be an integer"),
        ({"n": True}, "n = true; must be an integer"),
        ({"tga": "b"}, "tga: unknown key. Did you mean 'tag'?"),
        ({"n": 7}, "Plain refused its options: ValueError: seven is refused"),
    ],
)
def test_plain_classes_are_checked_by_their_signature(toys: Path, options, message):
    assert build("problems", {"name": f"{toys}:Plain", "n": 5}).size == 5
    with pytest.raises(RecipeError) as caught:
        build("problems", {"name": f"{toys}:Plain", **options})
    assert message in str(caught.value)


def test_a_class_with_open_options_takes_them(toys: Path):
    built = build("problems", {"name": f"{toys}:Anything", "a": 1, "b": [2]})
    assert built.options == {"a": 1, "b": [2]}


def test_components_validate_across_their_fields():
    assert build("optimizers", {"name": "sgd", "nesterov": True, "momentum": 0.9}) == SGD(
        nesterov=True, momentum=0.9
    )
    with pytest.raises(RecipeError, match="nesterov needs momentum > 0"):
        build("optimizers", {"name": "sgd", "nesterov": True}, "o")
    with pytest.raises(RecipeError, match=r"o.beta1 = 1; must be < 1"):
        build("optimizers", {"name": "adam", "beta1": 1}, "o")
    assert build("optimizers", {"name": "adam", "lr": 1}) == Adam(lr=1.0)


def test_a_file_without_a_class_is_told_which_it_has(tmp_path: Path):
    (tmp_path / "own.py").write_text("raise SystemExit\nclass A: ...\nclass B: ...\n")
    with pytest.raises(
        RecipeError, match=r"own.py' is a file; .* \(it has A, B\), as in own.py:B$"
    ):
        registry.find("problems", "own.py", tmp_path)
    (tmp_path / "broken.py").write_text("class")
    with pytest.raises(RecipeError, match=r"as in broken\.py:Name$"):
        registry.find("problems", "broken.py", tmp_path)
    with pytest.raises(RecipeError, match="there is no file"):
        registry.find("problems", "absent.py", tmp_path)
