"""`resume`: a run, or an ensemble of them, as if it had never been stopped."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from bilevel import runfolder
from bilevel.cli import ensemble
from bilevel.cli.answer import JSONAnswer
from bilevel.cli.one_run import resume_in
from bilevel.cli.shown import showing
from bilevel.errors import RecipeError
from bilevel.events import COMPLETE, EARLY


def resume(
    console: Console,
    reference: str,
    runs: Path,
    with_report: bool = True,
    quiet: bool = False,
    answer: JSONAnswer | None = None,
) -> None:
    """Resume a run from its newest whole checkpoint, or from the start if it has none.

    An `answer` is that of `run`; the events are those from the checkpoint on.
    """
    if answer:
        answer.data = {"event": "result", "runs": []}
    if whole := ensemble.find(reference, runs):
        ensemble.resume(console, whole, with_report, quiet, answer)
        return
    folder = runfolder.find(reference, runs)
    finished = folder.finished()
    if finished and finished["reason"] in COMPLETE:
        early = finished["reason"] == EARLY
        raise RecipeError(
            f"{folder.path}: this run {'has stopped early' if early else 'is done'} "
            f"({finished['step']} steps). For more steps, run its recipe again: bilevel run "
            f"{folder.resolved} {'evaluate.stop=null' if early else 'upper.steps=…'}"
        )
    resume_in(console, folder, with_report, showing(quiet, answer), answer)
