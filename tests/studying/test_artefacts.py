"""What docs/ holds of the shipped studies: a cell is computed again, and pages are what the cells say."""

from importlib.metadata import version
from pathlib import Path

import pytest
from rich.console import Console

from bilevel.cli import study_cell
from bilevel.cli.names import shipped_studies
from bilevel.sinks import svg
from bilevel.studying import figure, page
from bilevel.studying import file as files
from bilevel.studying.drive import specification
from bilevel.studying.plan import StudyPlan
from bilevel.studying.results import Book, StudyCell
from bilevel.studying.summary import findings

ROOT = Path(__file__).parent.parent.parent
PINNED = f"matplotlib=={version('matplotlib')}" in (ROOT / "constraints.txt").read_text().split()


def plan_of(name):
    study = files.read(ROOT / "recipes" / "studies" / f"{name}.yaml")
    return StudyPlan(study, Book(study.results))


def test_a_seed_of_an_arm_is_computed_again(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    plan, cell = plan_of("condition"), StudyCell("c3", "implicit", "test", 0)
    kept = plan.book.get(cell)
    assert kept is not None
    spec = specification(plan.study.path, cell, plan.overrides(cell), tmp_path)
    monkeypatch.chdir(tmp_path)
    study_cell.run_cell(spec, Console(quiet=True))
    again = Book(plan.study.results).get(cell)
    assert again is not None
    assert again.assignments == kept.assignments
    assert again.totals == kept.totals
    assert again.measures == pytest.approx(kept.measures, rel=1e-6)
    other = Book(ROOT / "docs" / "studies" / "condition").get(
        StudyCell("c3", "implicit", "test", 1)
    )
    assert other is not None  # control: another seed is another number
    assert other.measures != pytest.approx(kept.measures, rel=1e-3)


@pytest.mark.parametrize("name", shipped_studies())
def test_pages_and_pictures_are_what_the_cells_say(name, monkeypatch, tmp_path):
    """Nothing is typed by hand: what the command would write is there."""
    monkeypatch.chdir(ROOT)
    plan = plan_of(name)
    assert [str(cell) for cell in plan.all() if plan.altered(cell) is not None] == []
    study = plan.study
    assert study.page is not None
    text, found = page.read(study.page), findings(plan)
    drawn = figure.composed(study, found, study.page.parent / study.page.stem)
    command = f"bilevel study {study.path.relative_to(ROOT)}"

    def filled(text):
        return page.filled(text, study, found, list(drawn), command)

    assert filled(text) == text
    for path, made in drawn.items():
        svg.save(made, tmp_path / path.name)
        assert path.is_file()
        if PINNED:  # another matplotlib draws other bytes
            assert (tmp_path / path.name).read_text("utf-8") == path.read_text("utf-8")
    assert filled(text.replace("known by now", "that are")) == text
