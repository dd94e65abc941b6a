"""Standard output and error that no reader can break: a closed pipe, a full disk, a lost terminal, ASCII.

What a stream takes no more is dropped. A run goes on without its console, since its folder is what it
is for; a command whose output is its product ends.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import select
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from bilevel.cli.boundary import complain

BROKEN_PIPE = 141
"""Exit code of a command whose reader has seen enough, as of one that SIGPIPE ends: `bilevel ls | head -1`."""
UNWRITTEN = 1
ERRORS = "bilevel.spelled"
SPELLED = {
    "‖": "|",
    "∇": "grad ",
    "∂": "d",
    "λ": "lambda",
    "·": "*",
    "×": "x",
    "−": "-",
    "–": "-",
    "±": "+-",
    "←": "<-",
    "→": "->",
    "↦": "->",
    "≤": "<=",
    "≥": ">=",
    "≠": "!=",
    "≈": "~",
    "∈": "in",
    "√": "sqrt ",
    "⟨": "<",
    "⟩": ">",
    "∞": "inf",
    "½": "1/2",
    "²": "^2",
    "ᵀ": "^T",
}
"""What stands for a sign that the encoding of a stream lacks; Greek letters are named."""


class OutputLost(BaseException):
    """Standard output takes nothing more, and it was what the command is for."""


class Unbroken(io.FileIO):
    """A descriptor that is written to until it fails; `lost` is called once, later writes go nowhere."""

    def __init__(self, descriptor: int, lost: Callable[[OSError], None]) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._lost = lost
        self._failed = False

    def write(self, data: Any, /) -> int:
        size = memoryview(data).nbytes
        try:
            while not self._failed:
                written = super().write(data)
                if written is not None:
                    return written
                select.select([], [self], [])  # full, and somebody made it non-blocking
        except OSError as error:
            self._failed = True
            self._lost(error)
        return size


_without: list[str] = []
"""What goes on where standard output is lost."""


@contextmanager
def going_on(what: str) -> Iterator[None]:
    """Within this, a lost standard output is said on stderr, and no more than that."""
    _without.append(what)
    try:
        yield
    finally:
        _without.pop()


@contextmanager
def unbroken() -> Iterator[None]:
    """Guard the process's standard streams, and turn a lost output into an exit code."""
    codecs.register_error(ERRORS, _spelled)
    _occupy()
    before = sys.stdout, sys.stderr
    sys.stdout = _guarded(sys.stdout, _output_lost)
    sys.stderr = _guarded(sys.stderr, lambda error: None)
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OutputLost as lost:
        error = lost.__cause__
        if isinstance(error, BrokenPipeError):
            raise SystemExit(BROKEN_PIPE) from None
        complain(f"standard output cannot be written: {_reason(error)}")
        raise SystemExit(UNWRITTEN) from None
    finally:
        with suppress(OSError, ValueError):
            sys.stderr.flush()
        sys.stdout, sys.stderr = before


def _output_lost(error: OSError) -> None:
    if not _without:
        raise OutputLost from error
    complain(f"standard output: {_reason(error)}; {_without[-1]} goes on", kind="warning: ")


def _reason(error: BaseException | None) -> str:
    return getattr(error, "strerror", None) or str(error)


def _occupy() -> None:
    """Have no file that the command opens take the number of a standard stream that is closed."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError as error:
            if error.errno == errno.EBADF:
                os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def _guarded(stream: Any, lost: Callable[[OSError], None]) -> Any:
    """A stream like the given one that cannot fail; one that is closed is as /dev/null."""
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    try:
        descriptor = stream.fileno()
    except OSError:  # of a program that runs the command within itself
        return stream
    if sys.platform == "win32":  # where a console is no file
        stream.reconfigure(errors=ERRORS)
        return stream
    return io.TextIOWrapper(
        io.BufferedWriter(Unbroken(descriptor, lost)),
        encoding=stream.encoding,
        errors=ERRORS,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _spelled(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(map(_in_ascii, lacking)), error.end


def _in_ascii(letter: str) -> str:
    if letter in SPELLED:
        return SPELLED[letter]
    name = unicodedata.name(letter, "")
    if name.startswith("GREEK"):
        word = name.split()[-1]
        return word.lower() if "SMALL" in name else word.capitalize()
    return unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode() or "?"
