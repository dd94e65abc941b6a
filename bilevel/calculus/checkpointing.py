"""Checkpoints that can be differentiated any number of times: a function keeps its inputs, not its graph.

Chen et al. (2016), arXiv:1604.06174, recompute the forward in the backward. Here the backward is a
checkpoint too: the pullback (inputs, cotangents) ↦ cotangents is once more a function of tensors, which
keeps those alone and is recomputed when it is differentiated. Hessian products and paths that are unrolled
thus hold the graph of one call at a time, whatever the order.

`torch.utils.checkpoint` does not serve here: `autograd.grad` cannot enter it with use_reentrant=True, and
with False it recomputes with what a module holds by then, not with the parameters of the call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from bilevel.errors import ProblemError

Outputs = Tensor | tuple[Tensor | None, ...]


def checkpointed(function: Callable[..., Outputs]) -> Callable[..., Any]:
    """`function` of tensors, whose graph is its inputs; exact derivatives of every order.

    `function` takes tensors and returns one or a tuple of them; it is pure, for it is called again at
    every derivative: no dropout, nothing written. All that it is differentiated in must be an argument.
    What needs no gradient, such as frozen weights, may be closed over: it is neither copied nor kept.
    Where an output does not depend on an input, the gradient is None, as without.

    Cost: a gradient is 2 evaluations and 1 gradient of `function`; a Hessian product that follows is
    1 evaluation and 1 gradient with its graph, and 1 pass back through both. Held between: the inputs
    and, once the gradient is to be differentiated, the cotangents.

    Raises:
        ProblemError: `function` closes over a tensor that requires a gradient; or it is called in
            forward mode or within a transform of torch.func, where there is no graph to save.
    """

    def call(*tensors: Tensor) -> Any:
        _refuse_transforms(tensors)
        return _Checkpoint.apply(function, *tensors)

    return call


class _Checkpoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Outputs], *tensors: Tensor) -> Outputs:
        ctx.function = function
        ctx.set_materialize_grads(False)  # an output that nothing used costs no pass back
        ctx.save_for_backward(*tensors)
        return function(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        wanted = [i for i in range(len(tensors)) if ctx.needs_input_grad[1 + i]]
        used = [i for i, cotangent in enumerate(cotangents) if cotangent is not None]
        found: list[Tensor | None] = [None] * (1 + len(tensors))
        if used:
            pullback = checkpointed(_pullback(ctx.function, len(tensors), wanted, used))
            given = [c for c in cotangents if c is not None]
            for i, cotangent in zip(wanted, pullback(*tensors, *given), strict=True):
                found[1 + i] = cotangent
        return tuple(found)


def _pullback(
    function: Callable[..., Outputs], count: int, wanted: Sequence[int], used: Sequence[int]
) -> Callable[..., tuple[Tensor | None, ...]]:
    """(inputs, cotangents of the outputs `used`) ↦ cotangents of the inputs `wanted`."""

    def pullback(*arguments: Tensor) -> tuple[Tensor | None, ...]:
        differentiated = torch.is_grad_enabled()
        inputs, cotangents = list(arguments[:count]), arguments[count:]
        for i in wanted:
            if not differentiated or not inputs[i].requires_grad:
                inputs[i] = inputs[i].detach().requires_grad_()
        with torch.enable_grad():
            outputs = function(*inputs)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        pairs = zip((outputs[i] for i in used), cotangents, strict=True)
        live = [(out, given) for out, given in pairs if out is not None and out.requires_grad]
        if not live:
            return (None,) * len(wanted)
        _refuse_captured([out for out, _ in live], [*inputs, *arguments])
        return torch.autograd.grad(
            [out for out, _ in live],
            [inputs[i] for i in wanted],
            [given for _, given in live],
            create_graph=differentiated,
            allow_unused=True,
        )

    return pullback


def _refuse_transforms(tensors: Sequence[Tensor]) -> None:
    transformed = any(is_functorch_wrapped_tensor(tensor) for tensor in tensors)
    dual = forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )
    if transformed or dual:
        what = "a transform of torch.func" if transformed else "forward mode"
        raise ProblemError(
            f"a checkpointed function is called within {what}, where there is no graph that it could "
            "do without; call the function itself there (without micro-batches), or differentiate in "
            "reverse mode (unroll: memory=recompute or checkpoint instead of mixed)"
        )


def _refuse_captured(outputs: Sequence[Tensor], arguments: Sequence[Tensor]) -> None:
    """Raise `ProblemError` if the graph of a function ends elsewhere than in its arguments.

    Its gradient in such a tensor would be lost without a word, since autograd never sees it.
    """
    known = {torch.autograd.graph.get_gradient_edge(a).node for a in arguments if a.requires_grad}
    seen: set[Any] = set(known)
    nodes: list[Any] = [output.grad_fn for output in outputs]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            raise ProblemError(
                f"a checkpointed function closes over a tensor of shape {tuple(node.variable.shape)} "
                "that requires a gradient, which would be lost; make it an argument, or detach it"
            )
        nodes += [after for after, _ in node.next_functions]
