"""What is measured, as pure functions: POPE, CHAIR with coverage, and the gap between modalities.

POPE: Li et al., EMNLP 2023, arXiv:2305.10355. CHAIR: Rohrbach et al., EMNLP 2018, arXiv:1809.02156.
Coverage as in AMBER: Wang et al., 2023, arXiv:2311.07397. Gap: Liang et al., NeurIPS 2022,
arXiv:2203.02053. Alignment and uniformity: Wang and Isola, ICML 2020, arXiv:2005.10242.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

Metrics = dict[str, float]


def pope(scores: Float[Tensor, "question"], answers: Bool[Tensor, "question"]) -> Metrics:
    """Yes/no answers, yes where score > 0; "yes" is the positive class.

    accuracy (TP + TN) / n; precision TP / (TP + FP); recall TP / (TP + FN); F1 their harmonic
    mean; yes-ratio (TP + FP) / n; AUC of the score, which does not move with the yes-ratio.
    A fraction 0 / 0 is 0.
    """
    said = scores > 0
    hits = float((said & answers).sum())
    precision, recall = _share(hits, float(said.sum())), _share(hits, float(answers.sum()))
    return {
        "accuracy": float((said == answers).double().mean()),
        "precision": precision,
        "recall": recall,
        "f1": _share(2 * precision * recall, precision + recall),
        "yes_ratio": float(said.double().mean()),
        "auc": auc(scores[answers], scores[~answers]),
    }


def chair(
    mentioned: Sequence[Collection[str]], present: Sequence[Collection[str]]
) -> dict[str, float]:
    """Objects named by captions against objects in the pictures, each counted once a caption.

    CHAIR_i = named and absent / named; CHAIR_s = captions with one absent / captions;
    coverage = named and present / present. CHAIR falls when a caption says less: read coverage
    beside it. A fraction 0 / 0 is 0.
    """
    pairs = [(set(said), set(there)) for said, there in zip(mentioned, present, strict=True)]
    named = sum(len(said) for said, _ in pairs)
    absent = [len(said - there) for said, there in pairs]
    return {
        "chair_i": _share(sum(absent), named),
        "chair_s": _share(sum(n > 0 for n in absent), len(pairs)),
        "coverage": _share(named - sum(absent), sum(len(there) for _, there in pairs)),
    }


def auc(positive: Float[Tensor, "p"], negative: Float[Tensor, "n"]) -> float:
    """P(positive > negative) + P(equal) / 2 over all pairs: the area under the ROC curve.

    0.5, what chance gives, where one side is empty. By ranks: O(n log n).
    """
    if not len(positive) or not len(negative):
        return 0.5
    _, places, counts = torch.cat([positive, negative]).unique(
        return_inverse=True, return_counts=True
    )
    ends = counts.cumsum(0).double()
    ranks = ends - (counts.double() - 1) / 2
    total = ranks[places[: len(positive)]].sum()
    p, n = len(positive), len(negative)
    return float((total - p * (p + 1) / 2) / (p * n))


def centroid_distance(image: Float[Tensor, "n e"], text: Float[Tensor, "m e"]) -> float:
    """‖mean of v/‖v‖ − mean of t/‖t‖‖, the modality gap; on its own it misleads (0 for a collapse)."""
    image, text = functional.normalize(image, dim=-1), functional.normalize(text, dim=-1)
    return float((image.mean(0) - text.mean(0)).norm())


def alignment(image: Float[Tensor, "n e"], text: Float[Tensor, "n e"]) -> float:
    """Mean of ‖v_i/‖v_i‖ − t_i/‖t_i‖‖² over the pairs; 0 is perfect, 2 is orthogonal."""
    image, text = functional.normalize(image, dim=-1), functional.normalize(text, dim=-1)
    return float((image - text).square().sum(-1).mean())


def uniformity(embeddings: Float[Tensor, "n e"]) -> float:
    """log of the mean over pairs i < j of exp(−2 ‖a_i − a_j‖²), normalised; 0 is collapsed."""
    return float(
        (-2 * functional.pdist(functional.normalize(embeddings, dim=-1)).square())
        .exp()
        .mean()
        .log()
    )


def preference(
    image: Float[Tensor, "n e"],
    text: Float[Tensor, "n e"],
    hallucinated: Float[Tensor, "n k e"],
    present: Bool[Tensor, "n k"],
) -> float:
    """P(s(v_i, t_i) > s(v_i, h_ik)) over present k, ties half; s is the cosine, 0.5 is chance."""
    true, false = similarities(image, text, hallucinated)
    wins = (true[:, None] > false).double() + (true[:, None] == false).double() / 2
    return float(wins[present].mean()) if present.any() else 0.5


def similarities(
    image: Float[Tensor, "n e"], text: Float[Tensor, "n e"], hallucinated: Float[Tensor, "n k e"]
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n k"]]:
    """Cosines of each picture with its true caption and with its hallucinated ones."""
    image = functional.normalize(image, dim=-1)
    true = (image * functional.normalize(text, dim=-1)).sum(-1)
    return true, torch.einsum("ne,nke->nk", image, functional.normalize(hallucinated, dim=-1))


def recall_at_1(
    image: Float[Tensor, "n e"], text: Float[Tensor, "n e"], captions: Sequence[str]
) -> float:
    """Share of pictures whose nearest caption by cosine reads as their own; chance is ~1/n."""
    nearest = (functional.normalize(image, dim=-1) @ functional.normalize(text, dim=-1).T).argmax(1)
    return sum(captions[i] == captions[j] for i, j in enumerate(nearest.tolist())) / len(captions)


def silhouette(first: Float[Tensor, "n e"], second: Float[Tensor, "m e"]) -> float:
    """Mean of (b − a) / max(a, b): a, b mean distances to the own and the other cluster.

    1 is two tight clusters far apart, 0 is entangled. Embeddings are normalised first. Both
    clusters need at least two members.
    """
    points = functional.normalize(torch.cat([first, second]), dim=-1).double()
    # cdist by matmul gives tiny non-zero distances of a point to itself.
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    n, m = len(first), len(second)
    to_first, to_second = distances[:, :n].sum(1), distances[:, n:].sum(1)
    own = torch.cat([to_first[:n] / (n - 1), to_second[n:] / (m - 1)])
    other = torch.cat([to_second[:n] / m, to_first[n:] / n])
    widest = torch.maximum(own, other).clamp_min(torch.finfo(points.dtype).tiny)
    return float(((other - own) / widest).mean())


def gap(
    image: Float[Tensor, "n e"],
    text: Float[Tensor, "n e"],
    hallucinated: Float[Tensor, "n k e"],
    present: Bool[Tensor, "n k"],
    captions: Sequence[str],
) -> Metrics:
    """Every measure of the embeddings, by name; see the functions of this file."""
    true, false = similarities(image, text, hallucinated)
    return {
        "centroid_distance": centroid_distance(image, text),
        "alignment": alignment(image, text),
        "uniformity_image": uniformity(image),
        "uniformity_text": uniformity(text),
        "p_true_over_hallucinated": preference(image, text, hallucinated, present),
        "auc_true_vs_hallucinated": auc(true, false[present]),
        "silhouette_true_vs_hallucinated": silhouette(text, hallucinated[present]),
        "recall_at_1": recall_at_1(image, text, captions),
    }


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
