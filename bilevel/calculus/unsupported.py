"""What torch cannot differentiate, said with the remedy instead of in torch's own words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from bilevel.errors import BilevelError, ProblemError
from bilevel.types import Loss

_backward = getattr(torch.autograd.graph, "_engine_run_backward", None)
"""The backward pass alone, where this torch has it: what `torch.autograd.grad` does to its arguments
before takes as long as a small pass."""
_engine = getattr(torch.autograd.Variable, "_execution_engine", None)
_on_cpu = getattr(_engine, "run_backward", _backward)
"""The same of a graph on the CPU, where no thread of a device asks for the context that is else copied."""

_FIRST_ORDER = (
    "an estimator that takes no second derivative (penalty, one_step with finite_difference)"
)
_MISSING = ("is not implemented", "does not support", "not differentiable twice")
COMPILED = (
    "calls a function compiled by torch.compile, which has no second derivative; call the function "
    "itself (torch.compiler.set_stance('force_eager') while the loss is evaluated, or "
    f"backend='eager'), or use {_FIRST_ORDER}"
)
_REMEDIES = {
    "Inference tensors cannot be saved for backward": (
        "uses a tensor that was made under torch.inference_mode(), such as a batch or a frozen "
        "module's parameters; make it under torch.no_grad(), or .clone() it outside of inference mode"
    ),
    "does not currently support double backward": COMPILED,
    **dict.fromkeys(
        ("FlexAttention", "flex_attention"),
        "uses flex_attention, which cannot be differentiated here: it has no second derivative, on a "
        "CPU none at all; use attention that is computed by hand (attn_implementation='eager')",
    ),
    "use_reentrant=True": (
        "uses torch.utils.checkpoint with use_reentrant=True, which autograd.grad cannot enter; "
        "give it use_reentrant=False"
    ),
}


@contextmanager
def second_order(loss: Loss) -> Iterator[None]:
    """Turn torch's word for a missing derivative into a `ProblemError` with the remedy."""
    try:
        yield
    except RuntimeError as error:
        raise_known(loss, error)
        raise


def raise_known(loss: Loss, error: RuntimeError) -> None:
    """`second_order` where it costs nothing: to be called in an `except RuntimeError`."""
    said = _said(str(error))
    if said is not None:
        raise ProblemError(f"{loss.level}_loss {said}") from error


def _said(text: str) -> str | None:
    """What is wrong and what helps, where torch's words are known."""
    for words, said in _REMEDIES.items():
        if words in text:
            return said
    named = "derivative" in text and any(part in text for part in _MISSING)
    if not named or "forward AD" in text:  # what forward mode lacks is said where it is used
        return None
    kernel = text.split("derivative for ")[-1].split(" ")[0].removeprefix("aten::").strip("'")
    return (
        f"uses {kernel}, which has no second derivative. "
        "For attention: attn_implementation='eager', or evaluate the loss under "
        "torch.nn.attention.sdpa_kernel(SDPBackend.MATH); for cuDNN RNNs: "
        "torch.backends.cudnn.flags(enabled=False); for others: the same function written with "
        f"elementary operations; or {_FIRST_ORDER}"
    )


def grad(
    loss: Loss,
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    grad_outputs: Sequence[Tensor] | None = None,
    *,
    retain_graph: bool = False,
    create_graph: bool = False,
) -> list[Tensor | None]:
    """`torch.autograd.grad` with `allow_unused`, for outputs that have a graph.

    Raises:
        ProblemError: autograd cannot; or a gradient is sparse, which no method here computes with.
    """
    plain = not has_torch_function((*outputs, *inputs))
    for k, output in enumerate(outputs):
        if output.numel() != 1 if grad_outputs is None else grad_outputs[k].shape != output.shape:
            plain = False
    differentiate = backward if plain and _backward else torch.autograd.grad
    try:
        found = differentiate(
            outputs,
            inputs,
            grad_outputs,
            retain_graph=retain_graph or create_graph,
            create_graph=create_graph,
            allow_unused=True,
        )
    except RuntimeError as error:
        raise_known(loss, error)
        # memory, devices and other ranks are no loss's fault; a vector of another shape is the
        # caller's, whose state is of another problem
        foreign = isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError, BilevelError))
        if foreign or "Mismatch in shape: grad_output" in str(error):
            raise
        raise ProblemError(
            f"autograd cannot differentiate {loss.level}_loss: {str(error).strip().splitlines()[0]}"
        ) from error
    for gradient in found:
        if gradient is not None and gradient.layout != torch.strided:
            raise ProblemError(
                f"{loss.level}_loss has a sparse gradient, which cannot be computed with; give "
                "nn.Embedding, nn.EmbeddingBag or their functions sparse=False"
            )
    return list(found)


def backward(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    grad_outputs: Sequence[Tensor] | None = None,
    *,
    retain_graph: bool,
    create_graph: bool,
    allow_unused: bool,
) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad` of plain tensors that fit each other: the pass alone."""
    assert _backward is not None
    vectors = grad_outputs or map(torch.ones_like, outputs)
    roots, leaves = (tuple(outputs), tuple(vectors)), tuple(inputs)
    run: Any = _on_cpu if outputs[0].is_cpu else _backward
    return run(*roots, retain_graph, create_graph, leaves, allow_unused, accumulate_grad=False)
