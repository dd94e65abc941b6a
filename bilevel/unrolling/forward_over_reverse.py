"""The adjoint of one lower step, forward over reverse. MixFlow-MG, Kemaev et al. (2025), arXiv:2505.00793.

Reverse over reverse builds a graph of ∇y G and goes back through it. Its product with u is as well
the derivative of the gradient along u, because second derivatives are symmetric,

    d/dε ∇x G(x, y + ε u) = (∂²xy G)ᵀ u,    d/dε ∇y G(x, y + ε u) = (∂²yy G) u    at ε = 0,

which forward mode takes while the gradient is being computed, and no graph of it is kept.

torch registers some of its forward-mode formulas (those of softmax and of the normalisations) with
`torch.jit`, whose deprecation it warns of when they are first loaded. They are loaded here, and that
one warning is ignored, because nobody but torch can do anything about it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from bilevel import calculus, tree
from bilevel.errors import ProblemError
from bilevel.optimizers.learned import upper_entries
from bilevel.types import Loss, Params, Path
from bilevel.unrolling.nested import flat, rebuild
from bilevel.unrolling.path import bound, projected
from bilevel.unrolling.traced import Adjoint


def pull(one: Path, loss: Loss, x: Params, adjoint: Adjoint) -> tuple[Params, Adjoint]:
    """(contribution to the hypergradient, adjoint before the step) of a path of one step.

    1 gradient, forward over reverse; 1 more to know ∇y G beforehand, unless the step is affine in
    it, not projected, and has no learned option.

    Raises:
        ProblemError: the loss does something that forward mode cannot.
    """
    loss = loss.on(one.batches[0])
    taken = upper_entries(one.optimizer, x)
    if getattr(one.optimizer, "affine", False) and loss.structure.project is None and not taken:
        g = tree.zeros_like(one.start)  # any will do: the derivative of the step does not see it
    else:
        _, g = calculus.gradient_y(loss, x, one.start)
    at_x, at_y, at_g, at_state = _through_the_update(one, loss, taken, g, adjoint)
    contribution, product = along(loss, x, one.start, at_g)
    for name, part in at_x.items():
        contribution[name] = contribution[name] + part
    return contribution, (tree.add(at_y, product), at_state)


def _through_the_update(
    one: Path, loss: Loss, taken: Params, g: Params, adjoint: Adjoint
) -> tuple[Params, Params, Params, Any]:
    """The adjoint of (x, y, ∇y G, state) as the optimizer and the projection are given them.

    Of x there are the entries that are `taken` as options of the optimizer.
    """
    parts = taken, one.start, g, one.state
    inputs = [leaf.detach().requires_grad_() for part in parts for leaf in flat(part)]
    leaves = iter(inputs)
    with torch.enable_grad():
        options, y, g, state = (rebuild(part, leaves) for part in parts)
        y, state = bound(one, loss, options, y).step(y, g, state)
        y = projected(loss, y)
    pairs = zip([*flat(y), *flat(state)], [*flat(adjoint[0]), *flat(adjoint[1])], strict=True)
    live = [(out, cotangent) for out, cotangent in pairs if out.requires_grad]
    outputs, cotangents = [out for out, _ in live], [cotangent for _, cotangent in live]
    found = torch.autograd.grad(
        outputs, inputs, cotangents, allow_unused=True, materialize_grads=True
    )
    leaves = iter(found)
    at_x, at_y, at_g, at_state = (rebuild(part, leaves) for part in parts)
    return at_x, at_y, at_g, at_state


def along(loss: Loss, x: Params, y: Params, u: Params) -> tuple[Params, Params]:
    """((∂²xy G)ᵀ u, (∂²yy G) u), forward over reverse. 1 gradient; the products are not counted."""
    # a tangent is written into memory shaped like y's, which an expanded y has less of
    x, y = tree.leaves(x), tree.leaves(tree.contiguous(y))
    loss.counts.gradients += 1
    _load()
    with (
        calculus.second_order(loss),
        _refused(loss),
        torch.enable_grad(),
        forward_ad.dual_level(),
    ):
        moving = {n: forward_ad.make_dual(entry, u[n].to(entry.dtype)) for n, entry in y.items()}
        with _Constants():
            value = calculus.scalar(loss, x, moving)
        if not value.requires_grad:
            calculus.require_y(loss, ())
        found = torch.autograd.grad(value, [*x.values(), *y.values()], allow_unused=True)
        tangents = [None if g is None else forward_ad.unpack_dual(g).tangent for g in found]
    if all(tangent is None for tangent in tangents):
        calculus.require_graph(loss, ())
    for name, g in zip(x, found, strict=False):
        if g is not None:
            loss.counts.reached.add(name)
    filled = [
        torch.zeros_like(leaf) if tangent is None else tangent
        for leaf, tangent in zip([*x.values(), *y.values()], tangents, strict=True)
    ]
    leaves: Iterator[Tensor] = iter(filled)
    return rebuild(x, leaves), rebuild(y, leaves)


class _Constants(TorchFunctionMode):
    """What the loss computes under `torch.no_grad` is a constant, as it is in reverse mode.

    To forward mode alone no_grad is nothing, and the products would be others than `store` takes.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch._C._set_grad_enabled:
            torch._C._set_fwd_grad_enabled(*args)
        return func(*args, **(kwargs or {}))


def _load() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.", DeprecationWarning)
        forward_ad._maybe_load_decompositions()


@contextmanager
def _refused(loss: Loss) -> Iterator[None]:
    """Turn torch's word for a missing forward-mode formula into a `ProblemError` with the remedy."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        text = str(error)
        if not any(word in text for word in ("forward AD", "forward mode AD", "jvp")):
            raise
        raise ProblemError(
            f"memory: mixed: {loss.level}_loss does something that forward mode cannot "
            f"({text.splitlines()[0]}); write it with other operations (attention: "
            "attn_implementation='eager'; an autograd.Function: give it a jvp), or set "
            "memory: recompute"
        ) from error
