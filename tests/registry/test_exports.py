"""Components one import away: what is offered, when it is imported, what an editor sees."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import bilevel
from bilevel import registry
from bilevel.registry.exports import exports

GROUPS = {"problem": "problems"}
NOT_REGISTERED = {
    "optimizers": {"Clip", "Learned", "Schedule"},
    "problem": {"FromModules", "Levels", "Problem"},
    "run": {"Best", "EarlyStop", "Setup", "Upper"},
    "sinks": {"Receiver", "Sink"},
}
FOLDERS = ["directions", "estimators", "linear", "lower", "optimizers", "preconditioners"]
FOLDERS += ["problem", "run", "sinks"]


def registered(folder):
    """{class: module} of what the registry knows below a folder."""
    references = registry.references(GROUPS.get(folder, folder)).values()
    split = [reference.split(":") for reference in references]
    return {name: module for module, name in split if module.startswith(f"bilevel.{folder}.")}


def shown_to_an_editor(folder):
    """{class: module} of the imports in the `if TYPE_CHECKING:` block."""
    path = Path(bilevel.__file__).parent / folder / "__init__.py"
    blocks = [
        node
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    (block,) = blocks
    found = [(node.module, alias) for node in block.body for alias in node.names]
    return {alias.asname: module for module, alias in found if alias.asname == alias.name}


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_table_the_offer_and_the_editor_agree(folder):
    module = importlib.import_module(f"bilevel.{folder}")
    table, shown, extra = registered(folder), shown_to_an_editor(folder), NOT_REGISTERED.get(folder)
    assert table or folder == "run"
    assert table.items() <= shown.items()
    assert set(module.__all__) == table.keys() | (extra or set())
    assert set(module.__all__) <= set(dir(module))
    assert "exports" not in dir(module)
    for name in module.__all__:
        value = getattr(module, name)
        assert value.__name__ == name
        assert value.__module__ == shown.get(name, f"bilevel.{folder}")
        assert vars(module)[name] is value  # found once


def test_every_folder_with_registered_components_offers_them():
    offering = {
        reference.split(".")[1]
        for group in registry.groups()
        for reference in registry.references(group).values()
        if reference.startswith("bilevel.")
    }
    assert offering <= set(FOLDERS)


def test_all_is_what_a_star_imports():
    names = {}
    exec("from bilevel.linear import *", names)
    assert names.keys() - {"__builtins__"} == set(importlib.import_module("bilevel.linear").__all__)


def test_a_component_is_imported_when_it_is_used_and_no_other():
    code = """
import sys
import bilevel.linear, bilevel.lower
of = lambda: {m for m in sys.modules if m.startswith(("bilevel.linear.", "bilevel.lower."))}
assert "torch" not in sys.modules and not of(), of()
from bilevel.linear import Dense
assert "bilevel.linear.dense" in of() and "bilevel.linear.cg" not in of(), of()
assert bilevel.linear.dense.Dense is Dense
from bilevel.linear import cg
assert cg.CG is bilevel.linear.CG
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_an_unknown_name_is_an_error_as_of_any_module():
    module = importlib.import_module("bilevel.linear")
    with pytest.raises(AttributeError, match=r"module 'bilevel.linear' has no attribute 'Cg'"):
        module.Cg  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Cg'"):
        exec("from bilevel.linear import Cg")
    assert not hasattr(module, "__wrapped__")


def test_a_component_of_another_package_is_not_offered_here(monkeypatch):
    theirs = {"cg": "bilevel.linear.cg:CG", "fast": "elsewhere.fast:Fast", "x": "bilevel.linearx:X"}
    monkeypatch.setattr("bilevel.registry.exports.references", lambda group: theirs)
    _, listed = exports("bilevel.linear", "linear")
    assert "CG" in listed()
    assert not {"Fast", "X"} & set(listed())
