"""No preconditioner: for asking that none be built."""

from __future__ import annotations

from bilevel.components import component
from bilevel.types import Matvec, Point, System


@component
class Nothing:
    """M = I, whatever would be used otherwise. No product."""

    def init(self, at: Point) -> dict[str, int]:
        return {}

    def prepare(
        self, system: System, state: dict[str, int]
    ) -> tuple[Matvec | None, dict[str, int]]:
        return None, state
