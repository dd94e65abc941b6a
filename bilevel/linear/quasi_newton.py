"""Inverse Hessians that pairs of steps and gradient changes determine, at no product.

L-BFGS: Nocedal (1980), Math. Comp. 35(151); the two-loop recursion as in Nocedal and Wright
(2006), algorithm 7.4. All pairs at once: the block BFGS update, Schnabel (1983), "Quasi-Newton
methods using multiple secant equations".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel import tree
from bilevel.types import Matvec, Params

Pair = tuple[Params, Params]
"""(s, c) with c ≈ A s and ⟨s, c⟩ > 0; in a sequence, oldest first."""


def newest(
    state: dict[str, Any], pairs: Sequence[Pair], memory: int
) -> tuple[list[Pair], dict[str, Any]]:
    """The last `memory` pairs, those given after those of earlier calls; and the state to keep."""
    earlier = zip(state["steps"], state["changes"], strict=True)
    kept = [*earlier, *pairs][-memory:]
    return kept, {"steps": [s for s, _ in kept], "changes": [c for _, c in kept]}


NO_PAIRS: dict[str, Any] = {"steps": [], "changes": []}
"""The state of `newest` before the first call."""


def bfgs(pairs: Sequence[Pair]) -> Matvec:
    """b ↦ B⁻¹ b with the BFGS matrix B of the pairs; b itself without any.

    Symmetric positive definite, and B s = c for the last pair; for all of them, and so B = A once
    they span, only where the steps are conjugate. 4 dot products a pair.
    """

    def apply(b: Params) -> Params:
        v, weights = tree.clone(b), []
        for s, c in reversed(pairs):
            weights.append(tree.dot(s, v) / tree.dot(s, c))
            tree.axpy_(v, -weights[-1], c)
        tree.scale_(v, _scale(pairs))
        for (s, c), weight in zip(pairs, reversed(weights), strict=True):
            tree.axpy_(v, weight - tree.dot(c, v) / tree.dot(s, c), s)
        return v

    return apply


def block(pairs: Sequence[Pair]) -> Matvec:
    """b ↦ B⁻¹ b with B s = c for all pairs at once, where A is symmetric; b itself without any.

        B⁻¹ = S M⁻¹ Sᵀ + scale · (I − S M⁻¹ Cᵀ)(I − C M⁻¹ Sᵀ),    M = SᵀC made symmetric

    Symmetric positive definite; equal to A⁻¹ once the steps span the space. Directions in which M
    is below √eps of its largest eigenvalue are left to the second term: rounding fills them.
    """
    if not pairs:
        return tree.clone
    S, C = columns(pairs)
    return block_inverse(S, C, tree.gram(S, C, pairs[0][0]), pairs[0][0])


def columns(pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """[dim, pairs] each, this rank's rows: the steps at length 1, and the changes with them."""
    S, C = (
        torch.stack([tree.wide(tree.own(p[side])) / tree.norm(p[0]) for p in pairs], dim=1)
        for side in (0, 1)
    )
    return S, C


def block_inverse(S: Tensor, C: Tensor, M: Tensor, like: Params) -> Matvec:
    """b ↦ B⁻¹ b of `block`, from steps S, changes C and M = SᵀC; scale is that of the last pair.

    `like` is a tree as those that S and C are columns of.
    """
    W, last = _pseudo_inverse((M + M.T) / 2), C[:, -1:]
    scale = float(M[-1, -1]) / float(tree.gram(last, last, like))

    def apply(b: Params) -> Params:
        flat = tree.own(b).to(S)
        weights = W @ tree.gram(S, flat, b)
        rest = scale * (flat - C @ weights)
        return tree.cast(rest + S @ (weights - W @ tree.gram(C, rest, b)), b)

    return apply


def _pseudo_inverse(M: Tensor) -> Tensor:
    """The inverse on the eigenvectors that stand clear of rounding; the others are left out."""
    values, vectors = torch.linalg.eigh(M)
    kept = values > values[-1] * torch.finfo(values.dtype).eps ** 0.5
    return (vectors[:, kept] / values[kept]) @ vectors[:, kept].T


def _scale(pairs: Sequence[Pair]) -> float:
    """1 / curvature along the last change: what B⁻¹ is where the pairs say nothing."""
    return tree.dot(*pairs[-1]) / tree.dot(pairs[-1][1], pairs[-1][1]) if pairs else 1.0
