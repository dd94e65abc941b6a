"""`resume`: a run, or an ensemble of them, as if it had never been stopped."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from bilevel import runfolder
from bilevel.cli import ensemble
from bilevel.cli.answer import JSONAnswer
from bilevel.cli.member import Member
from bilevel.cli.one_run import resume_in
from bilevel.cli.shown import showing
from bilevel.errors import RecipeError
from bilevel.events import COMPLETE, EARLY
from bilevel.runfolder import RunFolder


def resume(
    console: Console,
    reference: str,
    runs: Path,
    with_report: bool = True,
    quiet: bool = False,
    answer: JSONAnswer | None = None,
    member: Member | None = None,
) -> None:
    """Resume a run from its newest whole checkpoint, or from the start if it has none.

    As a `member` of several ranks, of which the first finds it; their number may be another than before.

    An `answer` is that of `run`; the events are those from the checkpoint on.
    """
    if answer:
        answer.data = {"event": "result", "runs": []}
    member = member or Member()
    if member.notices is None and (whole := ensemble.find(reference, runs)):
        ensemble.resume(console, whole, with_report, quiet, answer)
        return
    path = member.from_first(lambda: str(_unfinished(reference, runs).path.resolve()))
    resume_in(
        console,
        RunFolder(Path(path)),
        with_report,
        showing(quiet, answer),
        answer,
        member.signals,
        member,
    )


def _unfinished(reference: str, runs: Path) -> RunFolder:
    """The run that is named. Raises `RecipeError` where it is done, or none that ranks can resume."""
    folder = runfolder.find(reference, runs)
    finished = folder.finished()
    if finished and finished["reason"] in COMPLETE:
        early = finished["reason"] == EARLY
        raise RecipeError(
            f"{folder.path}: this run {'has stopped early' if early else 'is done'} "
            f"({finished['step']} steps). For more steps, run its recipe again: bilevel run "
            f"{folder.resolved} {'evaluate.stop=null' if early else 'upper.steps=…'}"
        )
    return folder
