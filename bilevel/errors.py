"""Errors that a user can act on: what is wrong, where, what was expected, what to do.

Each is also the builtin that code around a call catches for this kind of failure. A `ValueError`
raised while a component is made becomes a `RecipeError`, itself a `ValueError`.
"""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable
from pathlib import Path

RENAMED = {
    "error": ("target_error",),
    "solver": ("lower",),
    "convexity": ("strong_convexity",),
    "slope": ("sensitivity",),
    "finest": ("min_accuracy",),
    "grow": ("step_growth",),
    "loosen": ("accuracy_growth",),
}
"""Options that were called otherwise: what took the place of each, suggested where one is given."""

ALIKE = 0.75
"""Likeness from which on a name is a slip of another: of four letters one is wrong."""
SHORTEST = 3
"""Letters of a beginning that stands for a name."""


class BilevelError(Exception):
    """Base of every error this package raises on purpose; `exit_code` is the command line's."""

    exit_code = 1


class RecipeError(BilevelError, ValueError):
    """The recipe, an override, a command-line argument or a component asked for is wrong."""

    exit_code = 2


class ProblemError(BilevelError, ValueError):
    """The problem cannot be differentiated as asked: wiring, shapes, kernels, module modes."""

    exit_code = 2


class RequirementError(BilevelError, ImportError):
    """A package, a data set or a device that the recipe needs is missing."""

    exit_code = 3


class CheckError(BilevelError, RuntimeError):
    """A component does not do what it claims, or what its protocol asks of it."""

    exit_code = 4


class ConvergenceError(BilevelError, ArithmeticError):
    """A loss, gradient or solve became non-finite or diverged."""

    exit_code = 5


class RankError(BilevelError, RuntimeError):
    """Ranks that compute one run together do not agree, or one of them is gone."""

    exit_code = 1


class LostRankError(RankError):
    """A rank waited for others in vain: one of them has failed, or is gone."""

    is_told = False
    """Whether it is what the other said last, with the exit code of that."""

    @classmethod
    def told(cls, code: int, said: str) -> LostRankError:
        """What another rank ended with."""
        error = cls(said)
        error.exit_code, error.is_told = code, True
        return error


class UserCodeError(BilevelError, RuntimeError):
    """The problem's own code raised, or returned what a run cannot use."""

    exit_code = 7


class CheckpointError(BilevelError, RuntimeError):
    """A state could not be written or read."""

    exit_code = 1


class TrackerError(BilevelError, RuntimeError):
    """A tracker, which has a copy of the record, fails. In the middle of a run it is left out from there on."""

    exit_code = 1


class UntrustedWarning(UserWarning):
    """A hypergradient whose own evidence speaks against it; `Estimate.reasons` says the same.

    Off with `warnings.filterwarnings("ignore", category=UntrustedWarning)`.
    """


def told(error: BaseException) -> str:
    """`KeyError: 'w' (mine.py:13 in estimate)`: an error that nobody foresaw, and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    where = [f" ({Path(last.filename).name}:{last.lineno} in {last.name})" for last in frames[-1:]]
    return f"{type(error).__name__}: {error}{''.join(where)}"


def reason_of(error: BaseException) -> str:
    """The first line of what an error says, or what it is called where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def require_kind(value: object, kind: type, what: str) -> None:
    """Raise `CheckError` unless `what`, of which a component is the author, is a `kind`."""
    if not isinstance(value, kind):
        expected = f"{kind.__module__}.{kind.__qualname__}"
        raise CheckError(f"{what} must be a {expected}; got a {type(value).__name__}")


def unknown(name: str, known: Iterable[str], what: str) -> str:
    """`'nmae': unknown <what>.` with its new name, the nearest known, or all where none is near."""
    known = sorted(known)
    near = [now for now in RENAMED.get(name, ()) if now in known] or nearest(name, known)
    if near:
        hint = f"Did you mean {' or '.join(map(repr, near))}?"
    else:
        hint = f"Known: {', '.join(known)}." if known else "None is known."
    return f"{name!r}: unknown {what}. {hint}"


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """The known names that `name` may be a slip of, the likest first; else those that it abbreviates."""
    known = [*known]
    likeness = {one: _likeness(name.lower(), one.lower()) for one in known}
    near = [one for one in known if likeness[one] >= ALIKE or _is_short_slip(name, one)]
    near.sort(key=lambda one: -likeness[one])
    return (near or [one for one in known if _abbreviates(name.lower(), one.lower())])[:2]


def _is_short_slip(name: str, other: str) -> bool:
    """Whether one letter of three or more is another: of so few letters it is too large a share."""
    wrong = sum(a != b for a, b in zip(name.lower(), other.lower(), strict=False))
    return len(name) == len(other) >= SHORTEST and wrong == 1


def _likeness(name: str, other: str) -> float:
    """Share of the letters that two names have in common in the same order; 1 where all but the order agrees."""
    if sorted(name) == sorted(other):
        return 1.0
    return difflib.SequenceMatcher(None, other, name).ratio()


def _abbreviates(name: str, other: str) -> bool:
    is_beginning = len(name) >= SHORTEST and other.startswith(name.removesuffix("s"))
    return is_beginning or name in other.split("_")
