"""What a loss must not do, looked for once, before its derivatives are trusted.

A loss is a function of (x, y, batch): it writes into nothing and draws no random numbers. Where it
does otherwise hypergradients are wrong and nothing shows it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.overrides import TorchFunctionMode

from bilevel import calculus, tree
from bilevel.errors import ProblemError
from bilevel.problem.writes import batch_norm_refusal, refuse_wrapped, refuse_writes
from bilevel.types import Counts, Loss, Params

_REMEDY = (
    "call module.eval() (dropout), or draw the noise in {0}_batches and pass it in the batch, so "
    "that {0}_loss is a function of (x, y, batch) alone"
)


def refuse_impure(loss: Loss, x: Params, y: Params) -> None:
    """Raise `ProblemError` if the loss is not a function of (x, y, batch).

    It holds a module whose derivatives torch hides (`refuse_wrapped`). It writes into its arguments or
    a module (`refuse_writes`). It would update the running statistics of a normalisation; that is stopped before it does. Or it
    draws from torch's random state, so that every gradient would be that of another function: a loss
    that seeds the state itself is none such. Or its value differs between two calls by more than the
    square root of the rounding, as with a generator of its own. Costs two evaluations of the loss,
    a third one where the random state moved, and one copy of x, y and the batch; random states are
    put back. Does nothing inside a transform of torch.func, whose tensors have no values.
    """
    if is_transformed(x, y):
        return
    refuse_wrapped(loss)
    apart, x, y = _noting_cuts(loss), tree.detach(x), tree.detach(y)
    devices = {entry.device for entry in (*x.values(), *y.values()) if entry.is_cuda}
    with torch.no_grad(), torch.random.fork_rng(devices=list(devices)), _NoStatistics(loss.level):
        before = _random_states(devices)
        with calculus.second_order(loss), refuse_writes(loss, x, y):
            first = calculus.value(apart, x, y)
        moved = _random_states(devices)
        second = calculus.value(apart, x, y)
        if moved != before and _random_states(devices) != moved:
            raise ProblemError(
                f"{loss.level}_loss draws random numbers, so that each evaluation is of another "
                f"function: {_REMEDY.format(loss.level)}"
            )
    rough = torch.finfo(first.dtype).eps ** 0.5
    if float((first - second).abs()) > rough * float(first.abs() + second.abs()):
        raise ProblemError(
            f"{loss.level}_loss gave {float(first):.6g} and then {float(second):.6g} for the same "
            "(x, y, batch): it is random, or keeps something between calls; "
            + _REMEDY.format(loss.level)
        )


def is_transformed(*trees: Params) -> bool:
    """Whether a tensor is one of `torch.func.vmap`, `grad` and their like."""
    return any(is_functorch_wrapped_tensor(entry) for params in trees for entry in params.values())


def _random_states(devices: set[torch.device]) -> list[bytes]:
    states = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]
    return [bytes(state.numpy()) for state in states]


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
                raise batch_norm_refusal(self._level)
        return func(*args, **(kwargs or {}))


_UPDATES = {
    torch.nn.functional.batch_norm: "training",
    torch.nn.functional.instance_norm: "use_input_stats",
}


_GRAD_MODE = torch._C._set_grad_enabled
CUTS: frozenset[Callable[..., Any]] = frozenset(
    {
        torch.Tensor.detach,
        torch.Tensor.detach_,
        torch.detach,
        torch.Tensor.data.__get__,  # pyright: ignore[reportAttributeAccessIssue]
        torch.Tensor.item,
        torch.Tensor.tolist,
        torch.Tensor.numpy,
        torch.Tensor.__array__,
        torch.Tensor.__float__,
        torch.tensor,
        _GRAD_MODE,
    }
)
"""What takes a tensor, or all that follows, out of autograd's graph."""


class _Cuts(TorchFunctionMode):
    """Notes in the counts of a loss that it may be cut."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self._loss = loss

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in CUTS and args and (isinstance(args[0], Tensor) or func is _GRAD_MODE):
            self._loss.counts.cut.add(self._loss.level)
        return func(*args, **(kwargs or {}))


def _noting_cuts(loss: Loss) -> Loss:
    """The loss with counts of its own; that it may be cut is noted in those of `loss`."""

    def function(x: Params, y: Params, batch: Any) -> Tensor:
        with _Cuts(loss):
            return loss.function(x, y, batch)

    return replace(loss, counts=Counts(), function=function)
