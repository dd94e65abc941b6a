"""When a preconditioner that costs products is built again."""

from __future__ import annotations


class RebuildRule:
    """When to build again: once the iterations beyond the fewest seen exceed what building costs.

    The rule of ski rental: at most twice what the best decision in hindsight would have cost.
    """

    def __init__(self, fewest: int = -1, excess: int = 0) -> None:
        self.fewest, self.excess = fewest, excess

    def after(self, spent: int | None) -> RebuildRule:
        """With one more solve seen; None where there was none."""
        if spent is None:
            return self
        fewest = spent if self.fewest < 0 else min(spent, self.fewest)
        return RebuildRule(fewest, self.excess + spent - fewest)

    def state(self) -> dict[str, int]:
        return {"fewest": self.fewest, "excess": self.excess}
