"""Diagonal preconditioners: a diagonal that the problem knows, or Hutchinson's estimate of it.

Bekas, Kokiopoulou and Saad (2007), Appl. Numer. Math. 57, for the estimate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from bilevel import rng, tree
from bilevel.errors import ProblemError
from bilevel.types import Matvec, Params, Point, System, component


@component
class Diagonal:
    """M = diag(d) + damping · I with d = `lower_diagonal(x, y, batch)`, positive. No product.

    `lower_diagonal` is a method of the problem, found on the object that `lower_loss` is a method
    of, or the function given here: what is known of the diagonal of ∂²yy G, such as penalties
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
        owner = getattr(lower.function, "__self__", None)
        known = self.function or getattr(owner, "lower_diagonal", None)
        if known is None:
            raise ProblemError(
                "preconditioner diagonal: the problem has no lower_diagonal(x, y, batch); add it, "
                "pass Diagonal(function=...), or use preconditioner: hutchinson, which estimates it"
            )
        with torch.no_grad():
            d = tree.detach(known(at.x, at.y, lower.batch))
        got = {name: tuple(entry.shape) for name, entry in d.items()}
        expected = {name: tuple(entry.shape) for name, entry in at.y.items()}
        if got != expected or not all(bool((entry > 0).all()) for entry in d.values()):
            raise ProblemError(
                f"lower_diagonal must be positive and in the shapes of y, {expected}; got {got}"
                + (" with entries that are not positive" if got == expected else "")
            )
        d = {name: d[name] + system.damping for name in at.y}
        return lambda r: tree.div(r, d), state


@component
class Hutchinson:
    """M = diag(|d|), d the mean of z · A z over random signs z; entries at least `floor` of the largest.

    `probes` products when it is built, and again when the iterations spent beyond the fewest since
    then exceed what building costs. The estimate is unbiased; entry i has variance
    Σ_{j ≠ i} A_ij² / probes, exact for diagonal A.
    """

    probes: PositiveInt = 10
    floor: PositiveFloat = 1e-6
    seed: int = 0

    def init(self, at: Point) -> dict[str, Any]:
        return {"built": 0, **Patience().state()}

    def prepare(
        self, system: System, state: dict[str, Any]
    ) -> tuple[Matvec | None, dict[str, Any]]:
        patience = Patience(**{k: state[k] for k in ("fewest", "excess")}).after(system.spent)
        if not state["built"] or patience.excess > self.probes:
            d = self._estimate(system, state["built"])
            state = {"built": state["built"] + 1, "diagonal": d}
            patience = Patience()
        d = state["diagonal"]
        kept = {"built": state["built"], "diagonal": d, **patience.state()}
        return lambda r: tree.div(r, d), kept

    def _estimate(self, system: System, built: int) -> Params:
        stream, total = rng.stream(self.seed, f"hutchinson.{built}"), tree.zeros_like(system.b)
        for _ in range(self.probes):
            signs = tree.map(lambda p: _signs(p, stream), system.b)
            tree.axpy_(total, 1 / self.probes, tree.mul(signs, system.matvec(signs)))
        size = tree.map(torch.abs, total)
        largest = max((float(e.max()) for e in size.values() if e.numel()), default=0.0)
        least = self.floor * largest if largest > 0 else 1.0
        return tree.map(lambda entry: entry.clamp(min=least), size)


def _signs(like: Tensor, stream: torch.Generator) -> Tensor:
    return (torch.randint(0, 2, like.shape, generator=stream) * 2 - 1).to(like)


class Patience:
    """When to build again: once the iterations beyond the fewest seen exceed what building costs.

    The rule of ski rental: at most twice what the best decision in hindsight would have cost.
    """

    def __init__(self, fewest: int = -1, excess: int = 0) -> None:
        self.fewest, self.excess = fewest, excess

    def after(self, spent: int | None) -> Patience:
        """With one more solve seen; None where there was none."""
        if spent is None:
            return self
        fewest = spent if self.fewest < 0 else min(spent, self.fewest)
        return Patience(fewest, self.excess + spent - fewest)

    def state(self) -> dict[str, int]:
        return {"fewest": self.fewest, "excess": self.excess}
