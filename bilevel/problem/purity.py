"""What a loss must not do, looked for once, before its derivatives are trusted.

A loss is a function of (x, y, batch): it changes no buffers, draws no random numbers, and autograd
differentiates it twice. Where it does otherwise hypergradients are wrong and nothing shows it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode

from bilevel import calculus, rng, tree
from bilevel.errors import ProblemError
from bilevel.problem.writes import refuse_writes
from bilevel.types import Counts, Loss, Params, Point

LOST = 0.1
"""The part of a Hessian product that has to be missing for a loss to be refused."""

_REMEDY = (
    "call module.eval() (dropout), or draw the noise in {0}_batches and pass it in the batch, so "
    "that {0}_loss is a function of (x, y, batch) alone"
)


def refuse_impure(loss: Loss, x: Params, y: Params) -> None:
    """Raise `ProblemError` if the loss is no function of (x, y, batch).

    It would update the running statistics of a normalisation; that is stopped before it does. Or it
    draws from torch's random state, so that every gradient would be that of another function: a loss
    that seeds the state itself is none such. Or its value differs between two calls by more than the
    square root of the rounding, as with a generator of its own. Costs two evaluations of the loss,
    a third one where the random state moved; random states are put back.
    """
    apart, x, y = replace(loss, counts=Counts()), tree.detach(x), tree.detach(y)
    devices = {entry.device for entry in (*x.values(), *y.values()) if entry.is_cuda}
    with torch.no_grad(), torch.random.fork_rng(devices=list(devices)), _NoStatistics(loss.level):
        before = _random_states(devices)
        with refuse_writes(loss, x, y):
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


def _random_states(devices: set[torch.device]) -> list[bytes]:
    states = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]
    return [bytes(state.numpy()) for state in states]


def refuse_cut(loss: Loss, at: Point) -> None:
    """Raise `ProblemError` if a custom autograd.Function loses part of the second derivative.

    torch is silent where the backward of one is `once_differentiable`, or leaves its graph: as one
    term of several it gives a Hessian without that term. Looked for where a custom function is in
    the graph of the loss alone, and in float32 or wider: is a central difference of ∇y G along a
    random direction, at two step sizes, another vector than the Hessian product? Refused only where
    the difference can be trusted: it is the same at both step sizes and on both sides (no kinks, no
    rounding), and ∇y G is the slope of G (no gradient that is meant to be another, such as a
    straight-through one). Costs one evaluation; with a custom function 3 gradients, 1 HVP and 2
    evaluations, and 2 gradients more before it is refused.
    """
    apart = replace(loss, counts=Counts())
    x, y = tree.leaves(at.x), tree.leaves(at.y)
    with torch.enable_grad(), calculus.second_order(loss):
        names = sorted({_name(node) for node in _nodes(calculus.value(apart, x, y)) if _own(node)})
    eps = max(tree.eps(x), tree.eps(y))
    if names and eps <= torch.finfo(torch.float32).eps and _loses(apart, at, eps):
        raise ProblemError(
            f"{loss.level}_loss loses part of its second derivative in a custom autograd.Function, "
            f"one of: {', '.join(names)}. Its backward is once_differentiable, or leaves the graph "
            "(.detach(), .data, numpy): write it with differentiable operations of torch on "
            "ctx.saved_tensors, or use an estimator that takes no second derivative "
            "(estimator=penalty, one_step with finite_difference)"
        )


def _loses(loss: Loss, at: Point, eps: float) -> bool:
    stream = rng.stream(0, "second derivative")
    v = tree.map(lambda p: torch.randn(p.shape, generator=stream).to(p), at.y)
    size = tree.norm(v)
    if size == 0:
        return False
    v = tree.scale(1 / size, v)
    h = eps ** (1 / 3) * (1 + tree.norm(at.y))
    lower = calculus.linearize(loss, at)
    Hv = lower.hvp_yy(v)
    wide, _, _ = _difference(loss, at, v, h, lower.gradient)
    lost = tree.norm(tree.sub(wide, Hv))
    if lost <= LOST * max(tree.norm(wide), tree.norm(Hv)):
        return False
    narrow, bend, slope = _difference(loss, at, v, h / 2, lower.gradient)
    expected = tree.dot(lower.gradient, v)
    return (
        tree.norm(tree.sub(wide, narrow)) <= 1e-2 * lost
        and bend <= 0.1 * lost
        and abs(slope - expected) <= max(1e-2 * abs(expected), 0.1 * h * lost)
    )


def _difference(
    loss: Loss, at: Point, v: Params, h: float, gradient: Params
) -> tuple[Params, float, float]:
    """((g₊ − g₋) / 2h, ‖g₊ − 2g + g₋‖ / h, (G₊ − G₋) / 2h) of g = ∇y G and G at y ± h v."""
    (above, g_above), (below, g_below) = (
        calculus.gradient_y(loss, at.x, tree.axpy(s * h, v, at.y)) for s in (1, -1)
    )
    middle = tree.scale(1 / (2 * h), tree.sub(g_above, g_below))
    bend = tree.norm(tree.axpy(-2.0, gradient, tree.add(g_above, g_below))) / h
    return middle, bend, float(above - below) / (2 * h)


def _nodes(output: Tensor) -> Iterator[Any]:
    """The functions in the graph of a tensor."""
    seen, left = set(), [output.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        left += [before for before, _ in node.next_functions]
        yield node


def _own(node: Any) -> bool:
    return isinstance(node, BackwardCFunction)


def _name(node: Any) -> str:
    return type(node).__name__.removesuffix("Backward")


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
