"""Solvers of A v = b that know v ↦ A v and nothing else: no loss, no x, no y.

A file is named as the solver that it registers. Beside them `guards` has what every solver refuses
and measures alike, `lanczos` the eigenvalues that coefficients hold, `quasi_newton` inverses made
of pairs (s, A s).
"""

from typing import TYPE_CHECKING

from bilevel.registry.exports import exports

if TYPE_CHECKING:
    from bilevel.linear.cg import CG as CG
    from bilevel.linear.dense import Dense as Dense
    from bilevel.linear.gmres import GMRES as GMRES
    from bilevel.linear.identity import Identity as Identity
    from bilevel.linear.minres import MINRES as MINRES
    from bilevel.linear.neumann import Neumann as Neumann
    from bilevel.linear.normal_cg import NormalCG as NormalCG
    from bilevel.linear.nystrom import Nystrom as Nystrom
    from bilevel.linear.task_cg import TaskCG as TaskCG
else:
    __getattr__, __dir__ = exports(__name__, "linear")
