"""How far a hypergradient may be from dΦ/dx, of known constants.

Ghadimi and Wang (2018), arXiv:1802.02246, lemma 2.2.
"""

from __future__ import annotations

from dataclasses import replace

from bilevel import tree
from bilevel.types import KNOWN_CONSTANTS, Params, Solve, Stats


def with_known_bound(
    solve: Solve,
    size: float,
    G_y: Params,
    *,
    damping: float,
    strong_convexity: float,
    cross_norm: float,
    sensitivity: float | None,
) -> Stats:
    """The statistics of a solve with A v = b and ‖b‖ = `size`, and a bound of ‖h − dΦ/dx‖ in them.

        cross_norm (‖r‖ + damping ‖v‖) / strong_convexity + sensitivity ‖∇y G‖ / strong_convexity

    The second term where `sensitivity` is given; else y is taken as solved, and said to be.
    """
    stats = solve.stats
    if stats.residual is None:
        return stats
    # A v = b − r − damping · v, and what is bounded is the error against A v = b
    left = stats.residual * size + damping * tree.norm(solve.solution)
    bound = cross_norm * left / strong_convexity
    if sensitivity is None:
        source = f"{KNOWN_CONSTANTS}, y taken as solved"
        return replace(stats, error_bound=bound, error_bound_from=source)
    bound += sensitivity * tree.norm(G_y) / strong_convexity
    return replace(stats, error_bound=bound, error_bound_from=KNOWN_CONSTANTS)
