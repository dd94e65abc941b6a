"""What an L-BFGS lower solve learned of the Hessian, as a preconditioner.

Morales and Nocedal (2000), "Automatic preconditioning by limited memory quasi-Newton updating",
SIAM J. Optim. 10(4), for CG's own pairs.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import PositiveInt

from bilevel import tree
from bilevel.components import component
from bilevel.errors import ProblemError
from bilevel.linear.quasi_newton import NO_PAIRS, bfgs, block, newest
from bilevel.types import Matvec, Point, System


@component
class LBFGSPairs:
    """M⁻¹ = B⁻¹ of the last `memory` pairs of the lower solver (lbfgs). No product; M > 0.

    `update: block` maps all steps as A does at once, `bfgs` only the last (see `shine`). Pairs of
    earlier lower solves fill up `memory`; without any nothing is preconditioned. Keeps 2 · memory
    vectors of the size of y, and works on as many more. For quadratic G M = A, and one step is
    left, once `block` has steps that span the space of y; whatever M, what the solve converges to
    is the same.

    Raises:
        ProblemError: the lower solver gives no pairs.
    """

    needs_pairs: ClassVar[bool] = True
    memory: PositiveInt = 20
    update: Literal["bfgs", "block"] = "block"

    def init(self, at: Point) -> dict[str, Any]:
        return NO_PAIRS

    def prepare(
        self, system: System, state: dict[str, Any]
    ) -> tuple[Matvec | None, dict[str, Any]]:
        if system.at.pairs is None:
            raise ProblemError(
                "preconditioner lbfgs_pairs: the lower solver gives no pairs; use lower: lbfgs in "
                "a recipe; of bilevel.hypergradient pass as y what "
                "bilevel.solve_lower(..., solver=LBFGS()) returns"
            )
        pairs, kept = newest(state, system.at.pairs, self.memory)
        if not pairs:
            return None, kept
        invert = bfgs if self.update == "bfgs" else block
        return invert([(s, tree.axpy(system.damping, s, c)) for s, c in pairs]), kept
