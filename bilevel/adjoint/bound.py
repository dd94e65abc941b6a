"""How far a hypergradient may be from dΦ/dx, of known constants.

Ghadimi and Wang (2018), arXiv:1802.02246, lemma 2.2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from bilevel import tree
from bilevel.types import KNOWN_CONSTANTS, Params, Solve, Stats


@dataclass(frozen=True)
class KnownBound:
    """A bound of ‖h − dΦ/dx‖ from constants that the user knows.

        cross_norm (‖r‖ + damping ‖v‖) / strong_convexity + sensitivity ‖∇y G‖ / strong_convexity

    The second term where `sensitivity` is given; else y is taken as solved, and said to be.
    """

    damping: float
    strong_convexity: float
    cross_norm: float
    sensitivity: float | None

    def stats(self, solve: Solve, size: float, G_y: Params) -> Stats:
        """The statistics of a solve with A v = b and ‖b‖ = `size`, with the bound in them."""
        stats = solve.stats
        if stats.residual is None:
            return stats
        # A v = b − r − damping · v, and what is bounded is the error against A v = b
        left = stats.residual * size + self.damping * tree.norm(solve.solution)
        bound, source = self.cross_norm * left / self.strong_convexity, KNOWN_CONSTANTS
        if self.sensitivity is None:
            source = f"{KNOWN_CONSTANTS}, y taken as solved"
        else:
            bound += self.sensitivity * tree.norm(G_y) / self.strong_convexity
        return replace(stats, error_bound=bound, error_bound_from=source)
