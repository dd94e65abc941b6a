"""Where a lower solve stops: at an absolute ‖∇y G‖, or at one relative to where solves began."""

from __future__ import annotations

from typing import Any


def limit(
    tolerance: float, relative: float | None, state: Any, start: float
) -> tuple[float, float]:
    """(‖∇y G‖ to stop at, the reference to keep), `start` being ‖∇y G‖ where this solve begins.

    The reference is the largest of all starts so far, kept in the state: a warm start, whose own
    gradient is small, does not tighten it, and a G of another scale neither meets it at once nor
    never. A new state begins again.
    """
    reference = max((state or {}).get("reference", 0.0), start)
    return (tolerance if relative is None else relative * reference), reference
