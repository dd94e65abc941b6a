"""Preconditioners M⁻¹ ≈ A⁻¹ of the adjoint system, symmetric positive definite.

A file is named as what it registers; `rebuild` says when one is made again. They build M⁻¹;
`linear` applies it, and no solver is here.
"""

from typing import TYPE_CHECKING

from bilevel.registry.exports import exports

if TYPE_CHECKING:
    from bilevel.preconditioners.diagonal import Diagonal as Diagonal
    from bilevel.preconditioners.hutchinson import Hutchinson as Hutchinson
    from bilevel.preconditioners.kfac import KFAC as KFAC
    from bilevel.preconditioners.lbfgs_pairs import LBFGSPairs as LBFGSPairs
    from bilevel.preconditioners.none import Nothing as Nothing
    from bilevel.preconditioners.nystrom import Nystrom as Nystrom
    from bilevel.preconditioners.recycled import Recycled as Recycled
else:
    __getattr__, __dir__ = exports(__name__, "preconditioners")
