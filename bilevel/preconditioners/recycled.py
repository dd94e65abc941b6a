"""Conjugate gradient's own directions as the preconditioner of the next solves.

Automatic preconditioning: Morales and Nocedal (2000), SIAM J. Optim. 10(4); all pairs at once, as
in the limited memory preconditioners of Gratton, Sartenaer and Tshimanga (2011), SIAM J. Optim.
21(3).

Differs from the papers in:

1. The pairs of several solves are kept, so A is another for the older ones: SᵀC is then not
   symmetric, and its symmetric part is inverted.
2. Eigenvalues of it below √eps of the largest, or not positive, are left out: such combinations of
   pairs are rounding, or curvature that A no longer has. M⁻¹ stays positive definite.
3. The pairs are an even selection of a long solve's, not its first or last: `memory` is in bytes.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from bilevel import tree
from bilevel.components import component
from bilevel.linear.quasi_newton import block_inverse, columns
from bilevel.types import Matvec, Params, Point, System


@component
class Recycled:
    """M⁻¹ = S W Sᵀ + scale · (I − S W Cᵀ)(I − C W Sᵀ), W = (SᵀC)⁻¹, from pairs (s, c = A s) at no product.

    The pairs are directions p and products A p that conjugate gradient made in this and earlier
    solves, the newest `pairs` of them: at most `memory` bytes, an even selection of those of a
    long solve. M⁻¹ A s = s for pairs of the present A, so what they span costs no iteration again;
    as x moves the products are those of a nearby A, and SᵀC is made symmetric. Symmetric positive
    definite always. `scale` is the curvature along the newest pair, inverted. 4 products of an
    [dim(y), pairs] matrix with a vector an iteration, no HVP.
    """

    learns: ClassVar[bool] = True
    pairs: PositiveInt = 300
    memory: PositiveFloat = 64e6

    def init(self, at: Point) -> dict[str, Any]:
        return {}

    def prepare(
        self, system: System, state: dict[str, Any]
    ) -> tuple[Matvec | None, dict[str, Any]]:
        return (block_inverse(*_known(state), system.b) if state else None), state

    def room(self, b: Params) -> int:
        """How many pairs of the next solve to keep."""
        each = sum(tree.size({n: e}) * tree.wide(e).element_size() for n, e in b.items())
        return max(1, min(self.pairs, int(self.memory / (2 * each))))

    def learn(self, state: dict[str, Any], pairs: list[tuple[Params, Params]]) -> dict[str, Any]:
        """The state with the pairs of one more solve, and the oldest beyond `room` left out."""
        if not pairs:
            return state
        room = self.room(pairs[0][0])
        S, C = columns(pairs)
        like = pairs[0][0]
        if not state:
            return {_S: S, _C: C, _M: tree.gram(S, C, like)}
        old_S, old_C, old_M = _known(state)
        known = old_S.shape[1]
        first = known - max(0, min(known, room - S.shape[1]))
        old_S, old_C = old_S[:, first:], old_C[:, first:]
        above = torch.cat([old_M[first:, first:], tree.gram(old_S, C, like)], 1)
        below = torch.cat([tree.gram(S, old_C, like), tree.gram(S, C, like)], 1)
        M = torch.cat([above, below])
        return {_S: torch.cat([old_S, S], 1), _C: torch.cat([old_C, C], 1), _M: M}


_S, _C, _M = f"{tree.ROWS}S", f"{tree.ROWS}C", "M"


def _known(state: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    return state[_S], state[_C], state[_M]
