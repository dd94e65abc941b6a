"""Errors that a user can act on: what is wrong, where, what was expected, what to do.

Each is also the builtin that code around a call catches for this kind of failure. A `ValueError`
raised while a component is made becomes pydantic's `ValidationError`, itself a `ValueError`.
"""


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


class CheckpointError(BilevelError, RuntimeError):
    """A state could not be written or read."""

    exit_code = 1


class UntrustedWarning(UserWarning):
    """A hypergradient whose own evidence speaks against it; `Estimate.reasons` says the same.

    Off with `warnings.filterwarnings("ignore", category=UntrustedWarning)`.
    """
