"""Solvers of the lower level, min over y of G(x, y): a file is named as what it registers.

`solved` calls one and checks what it returns. `auxiliary` solves the problems beside the lower one that first-order estimators pose. What
differentiates through steps is in `unrolling`, optimizers are in `optimizers`; none is here.
"""

from typing import TYPE_CHECKING

from bilevel.registry.exports import exports

if TYPE_CHECKING:
    from bilevel.lower.augmented_lagrangian import AugmentedLagrangian as AugmentedLagrangian
    from bilevel.lower.gradient import Gradient as Gradient
    from bilevel.lower.iterate import Iterate as Iterate
    from bilevel.lower.lbfgs import LBFGS as LBFGS
    from bilevel.lower.newton import Newton as Newton
    from bilevel.lower.proximal import Proximal as Proximal
else:
    __getattr__, __dir__ = exports(__name__, "lower")
