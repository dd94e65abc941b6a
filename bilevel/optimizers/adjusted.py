"""An optimizer whose gradient is clipped and whose rate follows a schedule, as pure as it was.

How many steps were taken, and the rates of those to come, are part of the state: a step can be replayed and
differentiated from (y, gradient, state) alone, wherever it is in a schedule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.optimizers.clip import Clip
from bilevel.optimizers.differentiable import SGD, Adam, AdamW, RMSprop
from bilevel.optimizers.learned import Learned
from bilevel.optimizers.schedule import Schedule, lr_of, with_lr
from bilevel.optimizers.stepped import stepped
from bilevel.types import Optimizer, Params


@dataclass(frozen=True)
class Adjusted:
    """`wrapped`, given clip(gradient) at the rate of the schedule.

    Where the rate is `Learned`, the schedule is that of lr 1, and what it gives is a factor.
    """

    wrapped: Optimizer
    clip: Clip | None = None
    schedule: Schedule | None = None

    @property
    def differentiable(self) -> bool:
        return self.wrapped.differentiable

    def init(self, y: Params) -> Any:
        state = self.wrapped.init(y)
        if self.schedule is None:
            return state
        return {"optimizer": state, "schedule": {"before": _count(0), **self._rates(0, 0)}}

    def ahead(self, state: Any, steps: int, *, again: bool = False) -> Any:
        """The state with the rates of the next `steps` steps; `again` begins the schedule anew.

        Raises:
            ProblemError: the schedule has no rate for one of them.
        """
        if self.schedule is None:
            return state
        at = state["schedule"]
        before = 0 if again else int(at["before"] + at["taken"])
        found = self._rates(before, before + steps)
        return {**state, "schedule": {"before": _count(before), **found}}

    def step(self, y: Params, gradient: Params, state: Any) -> tuple[Params, Any]:
        if self.clip is not None:
            gradient = self.clip.apply(gradient)
        if self.schedule is None:
            return stepped(self.wrapped, y, gradient, state)
        at = state["schedule"]
        # gathered, not indexed: a trace must not freeze which of them it was
        index = at["taken"].detach().long().reshape(1)
        rate = at["rates"].detach().gather(0, index).reshape(())
        optimizer = with_lr(self.wrapped, self._lr(rate, y))
        y, inner = stepped(optimizer, y, gradient, state["optimizer"])
        return y, {"optimizer": inner, "schedule": {**at, "taken": at["taken"] + 1}}

    def foresee(self, steps: int) -> None:
        """Raise `ProblemError` where the schedule has no rate for one of the first `steps` steps."""
        self._rates(0, steps)

    def _rates(self, begin: int, end: int) -> dict[str, Tensor]:
        assert self.schedule is not None
        lr = lr_of(self.wrapped)
        found = self.schedule.rates(begin, end, 1.0 if isinstance(lr, Learned) else lr)
        return {"taken": _count(0), "rates": torch.tensor(found, dtype=torch.float64)}

    def _lr(self, rate: Tensor, y: Params) -> Any:
        lr: Any = getattr(self.wrapped, "lr", None)
        if isinstance(lr, dict):  # learned, and bound at x
            return {name: rate * value for name, value in lr.items()}
        if isinstance(self.wrapped, (SGD, Adam, AdamW, RMSprop)):
            return dict.fromkeys(y, rate)
        return float(rate)


def _count(number: int) -> Tensor:
    return torch.tensor(float(number), dtype=torch.float64)
