"""How often autograd goes through a loss, seen from inside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from bilevel.types import Params


@dataclass
class Passes:
    """What autograd was asked for, seen from inside the losses."""

    first: int = 0
    """Backward passes from a value of F or G."""
    second: int = 0
    """Backward passes through a gradient of F or G."""
    graphs: int = 0
    """Gradients whose own graph was built."""
    _hooks: list[Any] = field(default_factory=list)

    def watch(self, function: Any) -> Any:
        def watched(x: Params, y: Params, batch: Any) -> Tensor:
            value = function(self._inputs(x), self._inputs(y), batch)
            if value.requires_grad:
                value.register_hook(self._one)
            return value

        return watched

    def _one(self, gradient: Tensor) -> None:
        self.first += 1

    def _two(self, gradient: Tensor) -> None:
        self.second += 1

    def _meet(self, gradient: Tensor) -> None:
        if gradient.requires_grad:
            self.graphs += 1
            gradient.register_hook(self._two)

    def _inputs(self, params: Params) -> Params:
        """Views, the first of them watched: one entry is enough to see a pass."""
        views = {n: p.view_as(p) if p.requires_grad else p for n, p in params.items()}
        for entry in views.values():
            if entry.requires_grad:
                entry.register_hook(self._meet)
                break
        return views
