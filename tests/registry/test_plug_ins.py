"""A broken plug-in costs its own row: no other command ends, and `doctor` names it."""

import importlib.metadata
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest

from bilevel import registry
from bilevel.cli import schema
from bilevel.errors import RecipeError
from tests.cli.commands import invoke

BROKEN = {
    "syntax": ("class A:\n    def (\n", "SyntaxError"),
    "raises": ("1 / 0\n", "ZeroDivisionError"),
    "exits": ("import sys\nsys.exit(0)\n", "SystemExit: 0"),
    "bytes": (b"a = '\xff'\nclass A: ...\n", "SyntaxError"),
}


@pytest.fixture
def plug_in(request, tmp_path, monkeypatch) -> str:
    """The one other package registers the solver `far`, which is broken; what importing it raises."""
    text, kind = BROKEN[request.param]
    path = tmp_path / f"far_{request.param}.py"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.syspath_prepend(tmp_path)
    register(monkeypatch, EntryPoint("far", f"far_{request.param}:A", "bilevel.linear"))
    return kind


def register(monkeypatch, *added: EntryPoint) -> None:
    real = importlib.metadata.entry_points

    def patched(**by: str):
        if not by:
            return SimpleNamespace(groups=real().groups)
        return [*real(**by), *(point for point in added if point.group == by["group"])]

    monkeypatch.setattr("importlib.metadata.entry_points", patched)


@pytest.mark.parametrize("plug_in", BROKEN, indirect=True)
def test_it_costs_its_own_row(plug_in):
    rows = invoke("ls", "linear").output
    assert "cg" in rows
    assert "far" in rows
    invoke("show", "cg")
    assert schema._registered("linear", "far")["properties"] == {"name": {"const": "far"}}
    assert "tolerance" in schema._registered("linear", "cg")["properties"]
    with pytest.raises(RecipeError, match=f"'far': importing far_.* failed: {plug_in}"):
        registry.find("linear", "far")
    assert registry.find("linear", "cg")


def test_doctor_names_it_and_the_sound_one(tmp_path, monkeypatch):
    (tmp_path / "far_broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "plug-ins" not in invoke("doctor").output  # negative control: none is there
    far = EntryPoint("far", "far_broken:A", "bilevel.estimators")
    near = EntryPoint("near", "bilevel_not_ours:B", "bilevel.linear")
    (tmp_path / "bilevel_not_ours.py").write_text("class B: ...\n")
    register(monkeypatch, far, near)
    said = " ".join(invoke("doctor").output.split())
    assert "-- estimators/far 'far': importing far_broken failed: ZeroDivisionError" in said
    assert "ok linear/near bilevel_not_ours:B" in said
    asked = invoke("check", "quadratic", "upper.steps=1")
    assert "left out: far: " in asked.stderr


def test_a_name_registered_twice_costs_its_own_row_too(monkeypatch):
    register(monkeypatch, EntryPoint("minres", "elsewhere:A", "bilevel.linear"))
    assert "registered twice" in invoke("ls", "linear").output
    assert registry.find("linear", "cg")
    with pytest.raises(RecipeError, match="registered twice"):
        registry.find("linear", "minres")
