"""Task loss, and hallucination-augmented contrast (HACL).

Jiang et al., Hallucination Augmented Contrastive Learning for Multimodal Large Language Model,
CVPR 2024, arXiv:2312.06968. Here the hallucinated captions of a picture are negatives of that
picture alone, because another's may be true of it, and each kind has a weight w, which enters as
+ log w on its logit: a negative of weight w counts as w copies of it would.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

TAU_START = 0.07
TAU_RANGE = (0.001, 0.5)
LOG_TAU_RANGE = (math.log(TAU_RANGE[0]), math.log(TAU_RANGE[1]))


def temperature(log_tau: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """τ = exp(log τ) held in [0.001, 0.5]."""
    return log_tau.clamp(*LOG_TAU_RANGE).exp()


def log_kind_weights(scores: Float[Tensor, "kind"]) -> Float[Tensor, "kind"]:
    """log w with w = K softmax(scores): weights sum to K, the number of kinds, whatever the scores.

    The fixed total leaves λ and τ alone to say how strong the contrast is; raw weights would grow
    and act as a larger λ.
    """
    return scores.log_softmax(0) + math.log(scores.numel())


def contrastive_loss(
    image: Float[Tensor, "pair embedding"],
    text: Float[Tensor, "pair embedding"],
    hallucinated: Float[Tensor, "pair kind embedding"],
    present: Bool[Tensor, "pair kind"],
    log_weights: Float[Tensor, "kind"],
    tau: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """L_C, the mean of both directions of InfoNCE over the batch; s is the cosine.

    text → image  −log exp(s(v_i,t_i)/τ) / Σ_j exp(s(v_j,t_i)/τ)
    image → text  −log exp(s(v_i,t_i)/τ) / (Σ_j exp(s(v_i,t_j)/τ) + Σ_k w_k exp(s(v_i,h_ik)/τ))

    A kind that a scene does not allow (`present` false) is no negative.
    """
    image, text = functional.normalize(image, dim=-1), functional.normalize(text, dim=-1)
    hallucinated = functional.normalize(hallucinated, dim=-1)
    pairs = image @ text.T / tau
    hard = torch.einsum("ie,ike->ik", image, hallucinated) / tau + log_weights
    hard = hard.masked_fill(~present, -math.inf)
    right = torch.arange(len(image), device=image.device)
    to_image = functional.cross_entropy(pairs.T, right)
    to_text = functional.cross_entropy(torch.cat([pairs, hard], dim=1), right)
    return (to_image + to_text) / 2


def task_loss(
    logits: Float[Tensor, "row token word"],
    ids: Int[Tensor, "row token"],
    counted: Bool[Tensor, "row token"] | Float[Tensor, "row token"],
) -> Float[Tensor, ""]:
    """L_T, the mean of −log p(ids) over the counted (answer) tokens; logits[:, j] predict ids[:, j].

    `counted` may hold weights; the mean is then the weighted one.
    """
    each = functional.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
    return (each * counted).sum() / counted.sum()
