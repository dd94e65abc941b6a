"""The upper level: how many steps, by which optimizer, at which rate, from what of the hypergradient."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt

from bilevel.components import Slot, component
from bilevel.optimizers.clip import Clip
from bilevel.optimizers.differentiable import Adam
from bilevel.optimizers.learned import Learned
from bilevel.optimizers.schedule import Schedule, lr_of, with_lr
from bilevel.optimizers.stepped import stepped
from bilevel.types import Optimizer, Params


@component
class Upper:
    """`steps` steps of an optimizer along the hypergradient, each followed by `project_upper`."""

    steps: PositiveInt = 100
    optimizer: Annotated[Optimizer, Slot("optimizers")] = Field(
        default_factory=lambda: Adam(lr=1e-2)
    )
    schedule: Schedule | None = None
    """The learning rate of each step; that of the optimizer throughout where there is none."""
    clip: Clip | None = None
    """What of the hypergradient reaches the optimizer. Events and reports have it as it was."""
    accumulate: PositiveInt = 1
    """Hypergradients that a step takes the mean of, each on batches of its own."""
    nonfinite: Literal["halt", "skip", "halve"] = "halt"
    """What a loss or a derivative that is not finite does: end the run; leave the step out; or go
    half the way back to the x before, up to ten times."""

    def step(self, x: Params, hypergradient: Params, state: Any, taken: int) -> tuple[Params, Any]:
        """Step `taken` + 1 of the optimizer: x and its state. Raises `ProblemError` as `Schedule` does."""
        if self.clip is not None:
            hypergradient = self.clip.apply(hypergradient)
        return stepped(self.scheduled(taken), x, hypergradient, state)

    def scheduled(self, taken: int) -> Optimizer:
        """The optimizer at the rate that it has after `taken` steps."""
        if self.schedule is None:
            return self.optimizer
        lr = lr_of(self.optimizer)
        assert not isinstance(lr, Learned)  # refused: x is not one of its own upper variables
        (rate,) = self.schedule.rates(taken, taken + 1, lr)
        return with_lr(self.optimizer, rate)
