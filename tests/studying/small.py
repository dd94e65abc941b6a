"""A study of the quadratic problem, of seconds, and cells of it that nobody ran."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bilevel.cli.names import shipped
from bilevel.studying import file as files
from bilevel.studying.plan import StudyPlan
from bilevel.studying.results import Book, Kept, StudyCell
from bilevel.studying.summary import StudySummary, Table

DEVELOPMENT = (100, 101)
TEXT = """\
name: small
recipe: quadratic.yaml
results: results
page: page.md
measure: upper value
margin: 0.5
axis: condition
seeds: {sets: [seed, problem.data_seed], development: 100..101, test: 0..2}
trials: 2
settings: {upper.steps: 2, lower.steps: 5, evaluate: {every: 0, held: false}, sinks: [jsonl]}
development: {problem.num_upper: 4}
regimes:
  easy: {title: well conditioned, settings: {problem.condition: 3}, at: 3}
  hard: {settings: {problem.condition: 30}, tuned: easy, arms: [ours, baseline], at: 30}
arms:
  direct:
    title: no implicit term
    group: baseline
    settings: {estimator: alternating}
    vary: ["upper.optimizer.lr=0.1,0.5"]
  rates:
    hidden: true
    settings: {estimator: alternating}
    mixtures: {over: upper.optimizer, names: [lr, eps], points: 2}
  mixed:
    group: baseline
    settings: {estimator: alternating}
    after: {arm: rates, choose: best}
  implicit:
    group: ours
    settings: {estimator: implicit}
    vary: ["upper.optimizer.lr=0.1,0.5"]
  again:
    title: ρ is what the other came to
    settings: {estimator: implicit}
    tuned: implicit
    after: {arm: implicit, take: {uppe* value: problem.*ho}}
"""
"""The last arm makes no sense, and is what one that takes weights of another has: measures as settings."""


def lay(folder: Path, text: str = TEXT) -> Path:
    """The study's file with its recipe beside it."""
    (folder / "quadratic.yaml").write_text(shipped()["quadratic"].read_text("utf-8"), "utf-8")
    path = folder / "small.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def made(folder: Path, text: str = TEXT) -> StudyPlan:
    """A plan of which nothing is kept."""
    study = files.read(lay(folder, text))
    return StudyPlan(study, Book(folder / "results"))


def plan_of(path: Path) -> StudyPlan:
    """A plan of which nothing is kept, of a file that is there."""
    return StudyPlan(files.read(path), Book(Path("nowhere")))


def keep(plan: StudyPlan, cell: StudyCell, value: float | None, **measures: float) -> None:
    """Keep a cell that came to `value`, None for one that failed."""
    status = "failed" if value is None else "done"
    found = {} if value is None else {"upper value": value, **measures}
    reason = "it diverged" if value is None else None
    overrides = tuple(plan.overrides(cell))
    plan.book.keep(cell, Kept(status, overrides, found, {"gradients": 10.0}, 1.5, reason))


def tune(plan: StudyPlan, arm: str, *means: float | None) -> None:
    """Keep development cells of these means, a quarter above and below; None for a setting that failed."""
    for trial, mean in enumerate(means):
        for seed in DEVELOPMENT:
            away = 0.25 if seed == DEVELOPMENT[0] else -0.25
            value = None if mean is None else mean + away
            keep(plan, StudyCell("easy", arm, "tune", seed, trial), value)


def tune_all(plan: StudyPlan, implicit: Sequence[float] = (3.0, 2.0)) -> None:
    """Keep all development cells: the best baseline is `direct` at 6, `implicit` comes to 2, `again` to 2.5."""
    tune(plan, "direct", 7.0, 6.0)
    for point in (0, 1):
        for seed in DEVELOPMENT:
            cell = StudyCell("easy", "rates", "tune", seed, point=point)
            keep(plan, cell, 1.0, upper_loss=5.0 - point)
    tune(plan, "mixed", 6.5)
    for trial, mean in enumerate(implicit):
        for seed in DEVELOPMENT:
            keep(plan, StudyCell("easy", "implicit", "tune", seed, trial), mean)
    tune(plan, "again", 2.5)


def tables(plan: StudyPlan) -> list[Table]:
    """What the kept cells say, nothing of it remembered."""
    return StudySummary(StudyPlan(plan.study, Book(plan.book.folder))).tables()
