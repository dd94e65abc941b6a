"""The one call of an optimizer's step where variables move, with the check of what it returns."""

from __future__ import annotations

from typing import Any

from bilevel import tree
from bilevel.errors import CheckError
from bilevel.types import Optimizer, Params


def stepped(optimizer: Optimizer, y: Params, gradient: Params, state: Any) -> tuple[Params, Any]:
    """The variables after one step of an optimizer, which may be somebody's own, and its state.

    Raises:
        CheckError: it returns no such pair, or other names, shapes or dtypes than those of y.
    """
    found = optimizer.step(y, gradient, state)
    if isinstance(found, tuple) and len(found) == 2 and tree.is_like(found[0], y):
        return found
    name = f"{type(optimizer).__name__}.step"
    if not isinstance(found, tuple) or len(found) != 2:
        raise CheckError(
            f"{name} must return (the variables, its state); got a {type(found).__name__}"
        )
    raise tree.unlike(found[0], y, f"{name} must return the variables")
