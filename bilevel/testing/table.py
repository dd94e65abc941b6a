"""What `check` found of several estimators as one table, in a terminal and in a notebook."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

from bilevel import notebook
from bilevel.errors import RecipeError
from bilevel.problem.protocol import Problem
from bilevel.registry.build import resolve
from bilevel.run.setup import Setup
from bilevel.run.upper import Upper
from bilevel.sinks.numbers import small
from bilevel.testing.verdicts import CheckRow, check
from bilevel.types import Estimator, LowerSolver, Named

COLUMNS: Mapping[str, Callable[[CheckRow], str]] = {
    "estimator": lambda row: row.name,
    "differentiates": lambda row: row.claim or "-",
    "claim\nerr": lambda row: small(row.claim_error),
    "err vs\ndΦ/dx": lambda row: small(row.error),
    "cosine": lambda row: small(row.cosine, ".3f"),
    "HVPs": lambda row: f"{row.stats.hvps}",
    "verdict": lambda row: f"{row.verdict}{'*' * row.is_claim_alone}",
}
"""Cells by their head; a * is explained by `CLAIM_ALONE`."""
CLAIM_ALONE = "*: of the claim alone; what the recipe itself would get was not measured"
WORDS = ("estimator", "differentiates", "verdict")
"""Those that hold no numbers."""


class CheckTable(tuple[CheckRow, ...]):
    """Rows of `check`; printed, and in a notebook, they are one table with the notes below it."""

    def __repr__(self) -> str:
        shown = notebook.aligned(*self._cells(), words=WORDS)
        return "\n".join([self._reference(), *shown, *self._notes()])

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        above, below = notebook.lines(self._reference()), notebook.lines(*self._notes())
        return above + notebook.table(*self._cells(), words=WORDS) + below

    def _cells(self) -> tuple[list[str], list[tuple[str, list[str]]]]:
        """(heads, rows with their name)."""
        others = [*COLUMNS.values()][1:]
        rows = [(row.name, [cell(row) for cell in others]) for row in self]
        return [head.replace("\n", " ") for head in COLUMNS], rows

    def _reference(self) -> str:
        return f"reference: {', '.join(dict.fromkeys(row.reference for row in self))}"

    def _notes(self) -> list[str]:
        alone = [CLAIM_ALONE] if any(row.is_claim_alone for row in self) else []
        return [*alone, *(f"{row.name}: {row.note}" for row in self if row.note)]


def check_table(
    problem: Problem | Named,
    estimators: Sequence[str] | Mapping[str, Estimator | Named] = ("implicit",),
    *,
    lower: LowerSolver | Named = "gradient",
    seed: int = 0,
    perturb: float = 0.1,
) -> CheckTable:
    """`check` of estimators by name, or by label, as one table: `bilevel check` from Python.

    Args:
        problem: a problem, its name, or a mapping of name and options, as `lower` is.
        estimators: names; or a mapping of labels to estimators, names or options.
        lower: the lower solver; 20 steps of SGD by default.
        seed: of the initial x and y, the batches, and the noise on x.
        perturb: how much noise is added to the initial x.

    Raises:
        RecipeError: an unknown name or option, or no estimator.
        ProblemError: the problem itself cannot be differentiated.
    """
    asked = estimators if isinstance(estimators, Mapping) else {name: name for name in estimators}
    if not asked:
        raise RecipeError("estimators: none is given; name at least one, such as implicit")
    chosen = {
        label: resolve("estimators", given, f"estimators.{label}") for label, given in asked.items()
    }
    first, solver = next(iter(chosen.values())), cast("LowerSolver", lower)
    setup = Setup(cast("Problem", problem), solver, Upper(), first, seed=seed)
    found = check(setup, chosen, perturb=perturb)
    return CheckTable(row for row in found if isinstance(row, CheckRow))
