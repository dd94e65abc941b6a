"""Losses that say what they are made of, and the Gauss-Newton products that this allows.

Schraudolph (2002), "Fast curvature matrix-vector products for second-order gradient descent",
Neural Computation 14(7).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel import tree
from bilevel.calculus.unsupported import grad, second_order
from bilevel.errors import ProblemError
from bilevel.types import Loss, Matvec, Params, Point


@dataclass(frozen=True)
class Composed:
    """G(x, y, batch) = loss(x, y, z, batch) with z = outputs(x, y, batch): itself a loss.

    `outputs` is the model, whose curvature Gauss-Newton leaves out; `loss` is all the rest, whose
    second derivatives in y and z are kept, a penalty on y among them.

        def lower_loss(...): ...                       # becomes
        lower_loss = Composed(outputs=predict, loss=cross_entropy_with_penalty)
    """

    outputs: Callable[[Params, Params, Any], Tensor]
    loss: Callable[[Params, Params, Tensor, Any], Tensor]

    def __call__(self, x: Params, y: Params, batch: Any) -> Tensor:
        return self.loss(x, y, self.outputs(x, y, batch), batch)

    def through(self, rename: Callable[[Params, Params], tuple[Params, Params]]) -> Composed:
        """The same loss of other variables, from which `rename` makes (x, y)."""
        return Composed(
            outputs=lambda x, y, batch: self.outputs(*rename(x, y), batch),
            loss=lambda x, y, z, batch: self.loss(*rename(x, y), z, batch),
        )


def gauss_newton(loss: Loss, at: Point) -> Matvec:
    """u ↦ [I Jᵀ] ∇²loss [u; J u] with J = ∂z/∂y and ∇² in (y, z): ∂²yy G without Σᵢ ∂loss/∂zᵢ ∂²yy zᵢ.

    Positive semidefinite where `loss` is convex in (y, z); equal to ∂²yy G where z is linear in y,
    or where ∂loss/∂z = 0. A product costs about as much as one with ∂²yy G and counts as 1 HVP;
    building it counts as 1 gradient.

    Raises:
        ProblemError: the loss is not a `Composed`.
    """
    made = loss.function
    if not isinstance(made, Composed):
        raise ProblemError(
            f"Gauss-Newton products need to know what {loss.level}_loss makes its outputs of; "
            f"give {loss.level}_loss = bilevel.calculus.gauss_newton.Composed(outputs=..., loss=...), or take "
            "curvature: hessian"
        )
    x, y = tree.detach(at.x), tree.leaves(at.y)
    names, entries = list(y), list(y.values())
    with torch.enable_grad(), second_order(loss):
        z = made.outputs(x, y, loss.one_batch)
        dual = torch.zeros_like(z, requires_grad=True)
        pulled = grad(loss, [z], entries, grad_outputs=[dual], create_graph=True)
        inputs = [*tree.leaves(at.y).values(), z.detach().requires_grad_()]
        output = made.loss(x, dict(zip(names, inputs, strict=False)), inputs[-1], loss.one_batch)
        slopes = grad(loss, [output], inputs, create_graph=True)
    loss.counts.gradients += 1

    def product(u: Params) -> Params:
        loss.counts.hvps += 1
        Ju = _zip_grad(loss, pulled, [dual], [u[name] for name in names])[0]
        bent = _zip_grad(loss, slopes, inputs, [*(u[name] for name in names), Ju])
        back = grad(loss, [z], entries, grad_outputs=[bent[-1]], retain_graph=True)
        return {
            name: (direct if part is None else direct + part).detach()
            for name, direct, part in zip(names, bent, back, strict=False)
        }

    return product


def _zip_grad(
    loss: Loss, outputs: Sequence[Tensor | None], inputs: list[Tensor], vectors: list[Tensor]
) -> list[Tensor]:
    """Σ over outputs of (∂output/∂input)ᵀ vector; zeros where nothing depends on the input."""
    live = [
        (o, v) for o, v in zip(outputs, vectors, strict=True) if o is not None and o.requires_grad
    ]
    if not live:
        return [torch.zeros_like(entry) for entry in inputs]
    found = grad(
        loss,
        [o for o, _ in live],
        inputs,
        grad_outputs=[v.to(o.dtype) for o, v in live],
        retain_graph=True,
    )
    return [
        torch.zeros_like(entry) if part is None else part
        for entry, part in zip(inputs, found, strict=True)
    ]
