"""Tables in narrow terminals: columns are left out, and no name is broken in two."""

import shutil

import pytest
from rich.console import Console

from bilevel.cli.check import _print
from bilevel.cli.names import shipped
from bilevel.recipe import load
from bilevel.testing import CheckRow
from bilevel.types import Stats
from tests.cli.commands import invoke, run

NAME = "a_recipe_with_a_name_of_my_own"


@pytest.mark.parametrize(
    ("columns", "left_out"),
    [(None, ""), (120, ""), (80, "estimator"), (70, "estimator, upper loss")],
)
def test_runs_breaks_no_name(columns, left_out, runs, monkeypatch):
    shutil.move(run(runs).parent, runs / NAME)
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", str(columns))
    text = invoke("runs", "--runs-dir", runs).output
    (folder,) = runs.glob("*/*")
    (row,) = (line for line in text.splitlines() if line.startswith(NAME))
    assert row.startswith(f"{NAME}/{folder.name}  done")
    assert len(row) <= (columns or 999)
    assert ("implicit" in row) == (not left_out)
    assert (f"left out, for want of width: {left_out}\n" in text) == bool(left_out)


@pytest.mark.parametrize(("columns", "left_out"), [(100, ""), (62, "HVPs, cosine")])
def test_check_is_legible(columns, left_out, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    names = ("implicit", "averaged_multipliers")
    rows = [
        CheckRow(name, "closed form", 0.25, 0.999, "solution", 1e-9, "as claimed", "", Stats())
        for name in names
    ]
    _print(Console(width=columns), load(shipped()["quadratic"]), rows)
    text = capsys.readouterr().out
    assert all(f"\n{name} " in text for name in names)
    assert text.count(" as claimed") == 2
    assert ("0.999" in text) == (not left_out)
    assert (f"for want of width: {left_out}\n" in text) == bool(left_out)
    assert max(map(len, text.splitlines())) <= columns
