"""Task loss, and hallucination-augmented contrast (HACL).

Jiang et al., Hallucination Augmented Contrastive Learning for Multimodal Large Language Model,
CVPR 2024, arXiv:2312.06968. It differs from the released code in that

1. what is known to be true of a picture is never its negative: another drawing of the same picture,
   and a caption, true or hallucinated, that reads as the picture's own (`Negatives`);
2. a picture's negatives are by default its own hallucinated captions, because another's may be
   true of it without reading the same; "batch" takes those of all pictures, as the code does;
3. each kind of hallucination has a weight w, which enters as + log w on its logit: a negative of
   weight w counts as w copies of it would.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from bilevel import ranks
from bilevel.errors import ProblemError

Choice = Literal["own", "batch"]
"""Whose hallucinated captions are a picture's negatives."""
TAU_START = 0.07
TAU_RANGE = (0.001, 0.5)
LOG_TAU_RANGE = (math.log(TAU_RANGE[0]), math.log(TAU_RANGE[1]))


def temperature(log_tau: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """τ = exp(log τ) held in [0.001, 0.5]."""
    return log_tau.clamp(*LOG_TAU_RANGE).exp()


def log_weights_of(scores: Float[Tensor, "kind"]) -> Float[Tensor, "kind"]:
    """log w with w = K softmax(scores): weights sum to K, how many there are, whatever the scores.

    The fixed total leaves λ and τ alone to say how strong the contrast is; raw weights would grow
    and act as a larger λ.
    """
    return scores.log_softmax(0) + math.log(max(1, scores.numel()))  # of no kinds none


def row_weights(
    scores: Float[Tensor, "source"], origin: Int[Tensor, "row"]
) -> Float[Tensor, "row"]:
    """The weight of each row's source, of a total of S as in `log_weights_of`; 1 where origin is −1."""
    each = log_weights_of(scores).exp()[origin.clamp_min(0)]
    return torch.where(origin < 0, 1.0, each)


@dataclass(frozen=True)
class Negatives:
    """What each picture of a batch is contrasted with."""

    pairs: Bool[Tensor, "pair pair"]
    """[i, j]: picture and true caption j are negatives of i; false on the diagonal."""
    hallucinated: Bool[Tensor, "pair pair kind"] | Bool[Tensor, "pair kind"]
    """[i, j, k]: hallucinated caption k of j is a negative of i; [i, k]: of its own alone."""
    queue: Bool[Tensor, "pair queued"] | None = None
    """[i, j]: picture and true caption j of the queue are negatives of i."""


class Queue(NamedTuple):
    """Embeddings of pictures and true captions that are no rows of the batch."""

    image: Float[Tensor, "queued embedding"]
    text: Float[Tensor, "queued embedding"]


def negatives(
    picture: Int[Tensor, "pair"],
    line: Int[Tensor, "pair line"],
    present: Bool[Tensor, "pair kind"],
    choice: Choice,
) -> Negatives:
    """All that is not known to be true of a picture.

    `picture` numbers the pictures; `line` numbers the captions, the true one first, equal ones
    alike. Pair j is a negative of i unless it is of the same picture or its true caption reads the
    same. A hallucinated caption counts where the scene has it (`present`) and it does not read as
    the picture's own true caption; under "batch" those of another drawing of the picture are left
    out, as they are the same ones.
    """
    again = picture[:, None] == picture
    true, false = line[:, 0], line[:, 1:]
    pairs = ~again & (true[:, None] != true)
    if choice == "own":
        return Negatives(pairs, present & (false != true[:, None]))
    itself = torch.eye(len(picture), dtype=torch.bool, device=picture.device)
    whose = ~again | itself
    return Negatives(pairs, whose[..., None] & present & (false != true[:, None, None]))


def contrastive_loss(
    image: Float[Tensor, "pair embedding"],
    text: Float[Tensor, "pair embedding"],
    hallucinated: Float[Tensor, "pair kind embedding"],
    against: Negatives,
    log_weights: Float[Tensor, "kind"],
    tau: Float[Tensor, ""],
    queue: Queue | None = None,
    weights: Float[Tensor, "pair"] | None = None,
) -> Float[Tensor, ""]:
    """L_C, the mean of both directions of InfoNCE over the batch; s is the cosine.

    text → image  −log exp(s(v_i,t_i)/τ) / Σ_j exp(s(v_j,t_i)/τ)
    image → text  −log exp(s(v_i,t_i)/τ) / (Σ_j exp(s(v_i,t_j)/τ) + Σ_jk w_k exp(s(v_i,h_jk)/τ))

    j runs over i and its negatives (`against`), those in the `queue` included; in the last sum over
    the pictures whose hallucinated captions count. A row without a negative adds −log 1 = 0. With
    `weights` v the mean is (1/n) Σ_i v_i (…)_i. Raises `ProblemError` where no row of the batch
    has a negative.
    """
    image, text = functional.normalize(image, dim=-1), functional.normalize(text, dim=-1)
    hallucinated = functional.normalize(hallucinated, dim=-1)
    own = ranks.own_rows(len(image))
    to_text, to_image = _similarities(image, text, against.pairs, own, tau)
    if against.hallucinated.ndim == 2:
        hard = torch.einsum("ie,ike->ik", image, hallucinated)
    else:
        hard = torch.einsum("ie,jke->ijk", image, ranks.rows(hallucinated))
    counted = against.hallucinated[own]
    hard = (hard / tau + log_weights).masked_fill(~counted, -math.inf).flatten(1)
    _require_some(
        torch.cat([mask.flatten() for mask in vars(against).values() if mask is not None]),
        f"a contrast batch of {len(image)} pairs has no negative: every pair is of one picture or "
        "reads the same, and there is no hallucinated caption; draw larger batches "
        "(problem.contrast_batch), or give hallucinated captions",
    )
    right = torch.arange(own.start, own.stop, device=image.device)
    columns = {"image": [to_image], "text": [to_text, hard]}
    if queue is not None and against.queue is not None:
        for side, rows, more in (("image", text, queue.image), ("text", image, queue.text)):
            kept = rows @ functional.normalize(more, dim=-1).T / tau
            columns[side].append(kept.masked_fill(~against.queue[own], -math.inf))
    by_image, by_text = (
        functional.cross_entropy(torch.cat(columns[side], dim=1), right, reduction="none")
        for side in ("image", "text")
    )
    return mean((by_image + by_text) / 2, weights)


def _similarities(
    image: Float[Tensor, "pair embedding"],
    text: Float[Tensor, "pair embedding"],
    negative: Bool[Tensor, "batch batch"],
    own: slice,
    tau: Float[Tensor, ""],
) -> tuple[Float[Tensor, "pair batch"], Float[Tensor, "pair batch"]]:
    """Of each picture with every true caption and each caption with every picture, over τ.

    −∞ where they are no negatives. `own` says which rows of the batch these are: all of them, where
    no other rank has others.
    """
    counted = negative | torch.eye(len(negative), dtype=torch.bool, device=image.device)
    to_text = (image @ ranks.rows(text).T / tau).masked_fill(~counted[own], -math.inf)
    if len(image) == len(negative):
        return to_text, to_text.T
    return to_text, (text @ ranks.rows(image).T / tau).masked_fill(~counted.T[own], -math.inf)


def mean(
    each: Float[Tensor, "pair"], weights: Float[Tensor, "pair"] | None = None
) -> Float[Tensor, ""]:
    """(1/n) Σ_i v_i each_i, with weights v; not divided by their sum, which the weights decide.

    Over the pairs of all ranks, where each has a part of the batch with the same weight.
    """
    told = each if weights is None else weights * each
    return told.mean() if ranks.here().is_alone else ranks.mean(told.sum(), float(len(told)))


def task_loss(
    logits: Float[Tensor, "row token word"],
    ids: Int[Tensor, "row token"],
    counted: Bool[Tensor, "row token"] | Float[Tensor, "row token"],
    weights: Float[Tensor, "row"] | None = None,
) -> Float[Tensor, ""]:
    """L_T, the mean of −log p(ids) over the counted (answer) tokens; logits[:, j] predict ids[:, j].

    `counted` may hold weights; the mean is then the weighted one. `weights` multiply the terms of a
    row and not the total they are divided by: Σ_ij v_i c_ij (−log p_ij) / Σ_ij c_ij. A row may have
    no answer; raises `ProblemError` where the whole batch has none.
    """
    _require_answers(counted)
    each = functional.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
    told = counted if weights is None else counted * weights[:, None]
    return (each * told).sum() / counted.sum()


def answer_losses(
    logits: Float[Tensor, "row token word"],
    ids: Int[Tensor, "row token"],
    counted: Bool[Tensor, "row token"] | Float[Tensor, "row token"],
) -> Float[Tensor, "row"]:
    """Σ_j c_ij (−log p_ij): what a row adds to `task_loss`, which needs no other row."""
    return (functional.cross_entropy(logits.transpose(1, 2), ids, reduction="none") * counted).sum(
        1
    )


def mean_of_answers(
    each: Float[Tensor, "row"],
    counted: Bool[Tensor, "row token"] | Float[Tensor, "row token"],
    weights: Float[Tensor, "row"] | None = None,
) -> Float[Tensor, ""]:
    """`task_loss` from the `answer_losses` of its rows: over the counted tokens of the whole batch.

    Of that of all ranks, where each has a part of it with the same weight.
    """
    _require_answers(counted)
    told = each if weights is None else each * weights
    return ranks.mean(told.sum(), counted.sum())


def _require_answers(counted: Tensor) -> None:
    _require_some(
        ranks.share(counted.sum()),
        f"a task batch of {len(counted)} conversations has no answer to count, so its loss is 0 / 0; "
        "give the pictures captions, questions or conversations, or draw larger batches",
    )


def _require_some(counted: Tensor, message: str) -> None:
    """Raise `ProblemError` where nothing counts; without values (meta device) nothing is known."""
    if not counted.is_meta and not counted.any():
        raise ProblemError(message)
