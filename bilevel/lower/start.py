"""What a lower solve meets that is not finite: at its start, which no step can mend, or later."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from bilevel.calculus.products import OF_ITS_BATCH, first_not_finite
from bilevel.errors import ConvergenceError
from bilevel.types import Loss, Params

BEGIN_ELSEWHERE = (
    "give another start (solve_lower's y, the problem's init or lower_start) or, where earlier "
    "steps of a run led here, smaller ones (upper.optimizer.lr, lower.optimizer.lr); and look for NaN "
    "in the problem's own data"
)


@contextmanager
def at_start(taken: int) -> Iterator[None]:
    """Says of a loss that is not finite before the first step that the start is to blame."""
    try:
        yield
    except ConvergenceError as error:
        if taken or OF_ITS_BATCH in str(error):
            raise
        raise blaming_the_start(error) from error


def blaming_the_start(error: ConvergenceError) -> ConvergenceError:
    """The error of a loss that is not finite before the first step."""
    cause = str(error).partition(";")[0]
    return ConvergenceError(f"{cause}, before the first lower step; {BEGIN_ELSEWHERE}")


def require_finite(loss: Loss, x: Params, y: Params, gradient: Params, taken: int) -> None:
    """Raise `ConvergenceError` where ∇y G is not finite: it names the entry, and start or step."""
    at_fault = first_not_finite({"gradient": gradient})
    if at_fault is None:
        return
    _, name, what = at_fault
    blamed = first_not_finite({"x": x, "y": y})
    where = (
        "at finite x and y"
        if blamed is None
        else f"where {blamed[0]}[{blamed[1]!r}] has {blamed[2]}"
    )
    which = f"the gradient of {loss.level}_loss in y[{name!r}] has {what} {where}"
    if taken:
        raise ConvergenceError(
            f"{which}, after {taken} lower steps; take a smaller step (lower.optimizer.lr), or a "
            "loss whose derivative is finite there"
        )
    raise ConvergenceError(
        f"{which}, before the first lower step; {BEGIN_ELSEWHERE}; or write a loss that has a "
        "derivative there: y.square().sum().sqrt() has none at 0, (… + eps).sqrt() has"
    )
