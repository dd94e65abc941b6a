"""A problem whose losses are evaluated under `torch.autocast`: products in bfloat16, the rest in float32.

x, y, their gradients, the adjoint, every state and every dot product stay in float32: autocast converts
what enters a product, and the conversion is differentiated like any other operation, also twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bilevel.types import Function

NEEDS_FLOAT32 = (
    "autocast keeps x, y and all sums in float32: set dtype to float32, or take autocast out"
)


class Autocast:
    """The problem, with both losses under autocast and their values in float32; all else as it is."""

    def __init__(self, problem: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.problem = problem
        self.upper_loss = _under(problem.upper_loss, device, dtype)
        self.lower_loss = _under(problem.lower_loss, device, dtype)

    def __getattr__(self, name: str) -> Any:
        inner = vars(self).get("problem")  # none yet while it is being copied
        if inner is None:
            raise AttributeError(name)
        return getattr(inner, name)


def under_autocast(problem: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """The problem under autocast, once; as it was where there is no dtype."""
    inner = problem.problem if isinstance(problem, Autocast) else problem
    if dtype is None:
        return inner
    # of the same name, which messages begin with
    kind = type(type(inner).__name__, (Autocast,), {"__doc__": Autocast.__doc__})
    return kind(inner, device, dtype)


def _under(loss: Function, device: torch.device, dtype: torch.dtype) -> Callable[..., Any]:
    def evaluated(x: Any, y: Any, batch: Any) -> Any:
        # a converted weight that was kept would have the graph of another call
        with torch.autocast(device.type, dtype, cache_enabled=False):
            value = loss(x, y, batch)
        return value.float() if isinstance(value, Tensor) and value.dtype == dtype else value

    return evaluated
