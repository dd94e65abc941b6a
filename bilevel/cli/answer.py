"""Answers for machines: standard output holds JSON alone, one document on one line, also on error.

Every document is a mapping with `error`: null, or {"kind", "message", "exit_code"}. Numbers are as in the
record of a run: NaN and infinities are strings. What would be printed for people is not; what the user's
own code prints goes to standard error, where messages go too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from typing import IO, Any

from bilevel.runfolder import record

_given: list[JSONAnswer] = []


@dataclass
class JSONAnswer:
    """What a command has found; filled while it works, so that an error leaves what came before."""

    stream: IO[str]
    """Standard output as it was before `answering`."""
    data: dict[str, Any] = field(default_factory=dict)


@contextmanager
def answering() -> Iterator[JSONAnswer]:
    """Print an `JSONAnswer` at the end, whatever ends the command; within, standard output is stderr."""
    answer = JSONAnswer(sys.stdout)
    error: dict[str, Any] | None = None
    try:
        with redirect_stdout(sys.stderr):
            yield answer
    except BaseException as raised:
        error = _told(raised)
        raise
    finally:
        _given.append(answer)
        answer.stream.write(record.line(answer.data | {"error": error}))
        answer.stream.flush()


def answer_usage(code: object, words: Sequence[str]) -> None:
    """Where a command line with `--json` was not understood, so that no command answered: do so."""
    if code and not _given and "--json" in words:
        error = {"kind": "UsageError", "message": "see standard error", "exit_code": code}
        sys.stdout.write(record.line({"error": error}))


def _told(error: BaseException) -> dict[str, Any]:
    """The cause of a `typer.Exit` by which the boundary ends a command, or any other error."""
    code = getattr(error, "exit_code", 1)
    cause = error.__context__ if type(error).__name__ == "Exit" and error.__context__ else error
    return {"kind": type(cause).__name__, "message": str(cause), "exit_code": code}
