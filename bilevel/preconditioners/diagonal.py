"""The diagonal of the lower Hessian that a problem knows, as a preconditioner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bilevel import tree
from bilevel.components import component
from bilevel.errors import ProblemError
from bilevel.types import Matvec, Params, Point, System


@component
class Diagonal:
    """M = diag(d) + damping · I with d = `lower_diagonal(x, y, batch)`, positive. No product.

    `lower_diagonal` is a method of the problem (`Structure.diagonal`), or the function given here: what is known of the diagonal of ∂²yy G, such as penalties
    exp(x) on each feature plus a constant for the data term. In the shapes of y. M = A, and one
    step is left, where A is diagonal; whatever M, what the solve converges to is the same.

    Raises:
        ProblemError: there is no `lower_diagonal`, or it is not positive or of other shapes.
    """

    function: Callable[[Params, Params, Any], Params] | None = None

    def init(self, at: Point) -> dict[str, int]:
        return {}

    def prepare(
        self, system: System, state: dict[str, int]
    ) -> tuple[Matvec | None, dict[str, int]]:
        lower, at = system.losses.lower, system.at
        known = self.function or lower.structure.diagonal
        if known is None:
            raise ProblemError(
                "preconditioner diagonal: the problem has no lower_diagonal(x, y, batch); add it, "
                "pass Diagonal(function=...), or use preconditioner: hutchinson, which estimates it"
            )
        with torch.no_grad():
            d = tree.detach(known(at.x, at.y, lower.one_batch))
        got = {name: tuple(entry.shape) for name, entry in d.items()}
        expected = {name: tuple(entry.shape) for name, entry in at.y.items()}
        positive = all(bool((entry > 0).all()) for entry in d.values())
        if got != expected or not tree.everywhere(at.y, positive):
            raise ProblemError(
                f"lower_diagonal must be positive and in the shapes of y, {expected}; got {got}"
                + (" with entries that are not positive" if got == expected else "")
            )
        d = {name: d[name] + system.damping for name in at.y}
        return lambda r: tree.div(r, d), state
