"""Whether the ranks of a run agree on a step before it is taken.

x and y are the same bits on every rank as long as nothing in a run sees the rows of its own rank
alone. What does takes other steps on each, slowly or at once: it is found at the step that shows it,
and no rank keeps that step.
"""

from __future__ import annotations

import math
import struct

import torch

from bilevel.errors import RankError
from bilevel.ranks import OWN, Ranks
from bilevel.sharding.parts import team_of
from bilevel.types import Estimate, LowerSolution, Params

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(params: Params) -> int:
    """A number that differs where a bit differs, but for what cancels: the sum of the bits as integers."""
    total = 0
    for entry in params.values():
        seen = entry.detach().contiguous().view(_BITS[entry.element_size()])
        total += int(seen.sum(dtype=torch.int64))
    return (total + 2**63) % 2**64 - 2**63


def require_agreement(
    ranks: Ranks, step: int, solution: LowerSolution, estimate: Estimate, x: Params
) -> None:
    """One message of a few integers; raises `RankError` with the name of what differs first.

    Of what ranks hold in parts, those that have the same rows are compared. What was summed over
    parts, such as ‖∇y G‖, is every rank's: a component that takes such a sum by itself has another.
    """
    if ranks.is_alone:
        return
    lower, stats = solution.stats, estimate.stats
    own = {
        "the number of lower steps": lower.steps,
        "‖∇y G‖": _bits_of(lower.gradient_norm),
        "y": bits(solution.y),
        "the number of iterations of the adjoint solve": stats.iterations,
        "the residual of the adjoint solve": _bits_of(stats.residual),
        "the hypergradient": bits(estimate.hypergradient),
        "x": bits(x),
    }
    teams = {"y": solution.y, "the hypergradient": estimate.hypergradient, "x": x}
    every = ranks.beside([step, *own.values()])
    for k, name in enumerate(("the step", *own)):
        team = team_of(teams.get(name, {}))
        apart = 1 if team is None else team.within.size
        for rank, row in enumerate(every):
            if row[k] == every[first := rank % apart][k]:
                continue
            values = f": {every[first][k]} and {row[k]}" if "number" in name else ""
            raise RankError(
                f"step {step}: ranks {first} and {rank} of {ranks.size} disagree on {name}{values}. "
                f"{OWN}. The state is that of the step before"
            )


def _bits_of(value: float | None) -> int:
    return struct.unpack("<q", struct.pack("<d", math.nan if value is None else value))[0]
