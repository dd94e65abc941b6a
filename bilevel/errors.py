"""Errors that a user can act on: what is wrong, where, what was expected, what to do."""


class BilevelError(Exception):
    """Base of every error this package raises on purpose; `exit_code` is the command line's."""

    exit_code = 1


class RecipeError(BilevelError):
    """The recipe, an override, a command-line argument or a component asked for is wrong."""

    exit_code = 2


class ProblemError(BilevelError):
    """The problem cannot be differentiated as asked: wiring, shapes, kernels, module modes."""

    exit_code = 2


class RequirementError(BilevelError):
    """A package, a data set or a device that the recipe needs is missing."""

    exit_code = 3


class CheckError(BilevelError):
    """A component does not do what it claims, or what its protocol asks of it."""

    exit_code = 4


class ConvergenceError(BilevelError):
    """A loss, gradient or solve became non-finite or diverged."""

    exit_code = 5


class CheckpointError(BilevelError):
    """A state could not be written or read."""

    exit_code = 1
