"""Where errors become exit codes: one clear message, no traceback unless it is asked for."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from bilevel import registry
from bilevel.cli.answer import JSONAnswer, answering
from bilevel.cli.options import settings
from bilevel.errors import BilevelError, RecipeError, RequirementError, UserCodeError


class Stopped(BaseException):
    """The process was told to stop and there is nothing more to do; carries the exit code."""

    def __init__(self, code: int, message: str = "") -> None:
        super().__init__(message)
        self.code = code


@contextmanager
def boundary(as_json: bool = False) -> Iterator[JSONAnswer | None]:
    """Turn what goes wrong on purpose into a message on stderr and an exit code.

    With `as_json` there is an `JSONAnswer` to fill, printed at the end.
    """
    if as_json:
        with answering() as answer, boundary():
            yield answer
        return
    import typer

    try:
        yield None
    except BilevelError as error:
        if settings.debug:
            raise
        complain(str(error))
        raise typer.Exit(error.exit_code) from None
    except Stopped as stopped:
        if str(stopped):
            complain(str(stopped), kind="")
        raise typer.Exit(stopped.code) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except (Exception, SystemExit) as error:
        if (said := None if settings.debug else _explained(error)) is None:
            raise
        complain(said)
        raise typer.Exit(UserCodeError.exit_code) from None


@contextmanager
def computing(as_json: bool = False) -> Iterator[JSONAnswer | None]:
    """`boundary` of a command that is one process: none of several is begun.

    Each would do all of it, and write to the same places.
    """
    with boundary(as_json) as answer:
        if (size := announced()) > 1:
            raise RecipeError(
                f"the environment says WORLD_SIZE={size}, and this command is one process: each of "
                f"the {size} would do all of it, for itself. Start it without torchrun (or with "
                "WORLD_SIZE unset); `bilevel run` and `resume` compute with several ranks"
            )
        refuse_copies()
        yield answer


def announced() -> int:
    """How many ranks the environment says there are."""
    if not os.environ.get("WORLD_SIZE"):
        return 1
    from bilevel.ranks import announced  # with torch

    return announced()


COPIES = {
    "SLURM_STEP_NUM_TASKS": "srun -n",
    "OMPI_COMM_WORLD_SIZE": "mpirun -n",
    "PMI_SIZE": "mpirun -n",
}
"""What says how many copies of a command were started. A shell in an allocation of Slurm has only
SLURM_NTASKS, and a batch script too, whose step is one task."""


def refuse_copies() -> None:
    """Raise `RecipeError` where this process is one of several copies that do not know of each other."""
    if os.environ.get("WORLD_SIZE"):
        return
    for name, by in COPIES.items():
        size = os.environ.get(name, "")
        if size.isdigit() and int(size) > 1:
            raise RecipeError(
                f"{by} {size} has started this command {size} times ({name}={size}), each for itself, "
                f"with a folder of its own. Start one process, which starts the ranks: bilevel run … "
                f"--ranks {size}; or torchrun on each machine, see docs/many_devices.md"
            )


def outcome(error: BaseException) -> tuple[int, str]:
    """(the exit code that comes of an error, what is said of it)."""
    if isinstance(error, BilevelError):
        return error.exit_code, str(error)
    if isinstance(error, Stopped):
        return error.code, str(error) or "told to stop"
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if hasattr(error, "exit_code"):  # of typer
        return error.exit_code, "ended"  # pyright: ignore[reportAttributeAccessIssue]
    if (said := _explained(error)) is not None:
        return UserCodeError.exit_code, said
    return 1, "".join(traceback.format_exception(error)).rstrip()


def _explained(error: BaseException) -> str | None:
    """What is said of an error in somebody's own code that nothing nearer has told of: a property, say."""
    from bilevel.cli.user_code import explained  # with torch

    return explained(error)


@contextmanager
def requiring(what: str) -> Iterator[None]:
    """Turn a package or a file that somebody's own code misses into a `RequirementError`."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package:
            raise RequirementError(f"{what}: {error}; {_WHERE}") from error
        raise RequirementError(
            f"{what} needs the module {error.name!r}, which is not installed. "
            f"{registry.remedy_for(package)}; {_WHERE}"
        ) from error
    except FileNotFoundError as error:
        if error.filename is None:
            raise RequirementError(f"{what}: {error}; {_WHERE}") from error
        raise RequirementError(
            f"{what} needs {error.filename}, and there is no such file; put it there, or change "
            f"the option that names it; {_WHERE}"
        ) from error


_WHERE = "--debug before the command shows where it is asked for"


def complain(message: str, kind: str = "error: ") -> None:
    """Write a message to stderr as it is: no markup, no wrapping inside paths."""
    color = "\x1b[31m" if sys.stderr.isatty() and kind else ""
    end = "\x1b[0m" if color else ""
    sys.stderr.write(f"{color}{kind}{end}{message}\n")
    sys.stderr.flush()
