"""Whether a loss is a function of (x, y, batch), asked before anything depends on it."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from bilevel import tree
from bilevel.calculus import value
from bilevel.errors import ProblemError
from bilevel.types import Counts, Loss, Params


def refuse_impure(loss: Loss, x: Params, y: Params) -> None:
    """Raise `ProblemError` if the loss runs a normalisation that would update its buffers.

    In training mode every evaluation changes the running statistics, so that a loss is no longer
    a function of (x, y, batch). It is stopped before it changes them. Costs one evaluation of the
    loss; random states are put back.
    """
    apart = replace(loss, counts=Counts())
    with torch.no_grad(), torch.random.fork_rng(devices=[]), _NoStatistics(loss.level):
        value(apart, tree.detach(x), tree.detach(y))


class _NoStatistics(TorchFunctionMode):
    """Refuses batch and instance normalisation that keep running statistics of this very input."""

    def __init__(self, level: str) -> None:
        super().__init__()
        self._level = level

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        flag = _UPDATES.get(func)
        if flag:
            given = inspect.signature(func).bind(*args, **(kwargs or {}))
            given.apply_defaults()
            if given.arguments[flag] and given.arguments["running_mean"] is not None:
                raise ProblemError(
                    f"{self._level}_loss runs BatchNorm in training mode, which changes its "
                    "buffers at every evaluation; call module.eval(), or build it with "
                    "track_running_stats=False, or use GroupNorm"
                )
        return func(*args, **(kwargs or {}))


_UPDATES = {
    torch.nn.functional.batch_norm: "training",
    torch.nn.functional.instance_norm: "use_input_stats",
}
