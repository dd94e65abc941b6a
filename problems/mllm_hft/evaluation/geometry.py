"""Measures of embeddings: how far pictures and text lie apart, and true from hallucinated text.

Gap: Liang et al., NeurIPS 2022, arXiv:2203.02053. Alignment and uniformity: Wang and Isola,
ICML 2020, arXiv:2005.10242. Silhouette: Rousseeuw, 1987. All are computed in float64 whatever the
dtype of the embeddings, a block of rows at a time, so that memory grows with n and not with n².
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from bilevel.errors import ConvergenceError

from .answers import Metrics, auc

BLOCK = 512
"""Rows of a distance matrix in memory at once."""
SAME = 1e-12
"""Squared distances on the unit sphere below this are rounding: the points are the same."""
FOLDS = 5


def centroid_distance(image: Float[Tensor, "n e"], text: Float[Tensor, "m e"]) -> float:
    """‖mean of v/‖v‖ − mean of t/‖t‖‖, the modality gap; on its own it misleads (0 for a collapse).

    0 where a side is empty.
    """
    image, text = _unit(image), _unit(text)
    if not len(image) or not len(text):
        return 0.0
    return float((image.mean(0) - text.mean(0)).norm())


def alignment(image: Float[Tensor, "n e"], text: Float[Tensor, "n e"]) -> float:
    """Mean of ‖v_i/‖v_i‖ − t_i/‖t_i‖‖² over the pairs; 0 is perfect, 2 is orthogonal."""
    if not len(image):
        return 0.0
    return float((_unit(image) - _unit(text)).square().sum(-1).mean())


def uniformity(embeddings: Float[Tensor, "n e"]) -> float:
    """log of the mean over pairs i < j of exp(−2 ‖a_i − a_j‖²), normalised; 0 is collapsed.

    0 where there is no pair.
    """
    points, n = _unit(embeddings), len(embeddings)
    if n < 2:
        return 0.0
    total = sum(float((-2 * squared).exp().sum()) for _, squared in _blocks(points, points))
    return float(torch.tensor((total - n) / (n * (n - 1)), dtype=torch.float64).log())


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
    image = _unit(image)
    # One formula for both, so that equal captions have equal cosines: a tie, not rounding.
    lines = torch.cat([_unit(text)[:, None], _unit(hallucinated)], dim=1)
    cosines = (image[:, None] * lines).sum(-1)
    return cosines[:, 0], cosines[:, 1:]


def recall_at_1(
    image: Float[Tensor, "n e"], text: Float[Tensor, "n e"], captions: Sequence[str]
) -> float:
    """Share of pictures whose nearest caption by cosine reads as their own; chance is ~1/n.

    Of captions equally near the first is taken; 0 where there is no picture.
    """
    if not len(image):
        return 0.0
    image, text = _unit(image), _unit(text)
    nearest = [int(j) for rows in image.split(BLOCK) for j in (rows @ text.T).argmax(1)]
    right = sum(captions[i] == captions[j] for i, j in enumerate(nearest))
    return right / len(captions)


def silhouette(first: Float[Tensor, "n e"], second: Float[Tensor, "m e"]) -> float:
    """Mean of (b − a) / max(a, b): a, b mean distances to the own and the other cluster.

    1 is two tight clusters far apart, 0 is entangled. Embeddings are normalised first. A point
    alone in its cluster counts as 0, and so does everything where one cluster is empty.
    Memory O((n + m) e); time O((n + m)² e).
    """
    points, n, m = _unit(torch.cat([first, second])), len(first), len(second)
    if not n or not m:
        return 0.0
    total = 0.0
    for rows, squared in _blocks(points, points):
        distances = squared.sqrt()
        sums = torch.stack([distances[:, :n].sum(1), distances[:, n:].sum(1)])
        is_first = (rows < n).long()
        own, other = (sums.gather(0, which[None])[0] for which in (1 - is_first, is_first))
        sizes = torch.tensor([m, n], dtype=points.dtype)
        own_size = sizes[is_first]
        own, other = own / (own_size - 1).clamp_min(1), other / sizes[1 - is_first]
        widest = torch.maximum(own, other).clamp_min(torch.finfo(points.dtype).tiny)
        total += float(((other - own) / widest)[own_size > 1].sum())
    return total / (n + m)


def linear_probe(
    text: Float[Tensor, "n e"],
    hallucinated: Float[Tensor, "n k e"],
    present: Bool[Tensor, "n k"],
    folds: int = FOLDS,
) -> float:
    """Balanced accuracy of a linear rule that tells true from hallucinated captions; ½ is chance.

    Ridge regression on ±1 (penalty 1 on embeddings normalised, centred and scaled to a mean square
    length of 1, so that no width is fitted at will), each class of half the weight. It is
    fitted on all folds but one and scored on that one; a picture's captions share a fold. ½ where
    there are fewer than two pictures with a hallucinated caption.
    """
    has = present.any(1)
    folds = min(folds, int(has.sum()))
    if folds < 2:
        return 0.5
    text, hallucinated, present = text[has], hallucinated[has], present[has]
    fold = torch.arange(len(text)) % folds
    points = torch.cat([_unit(text), _unit(hallucinated)[present]])
    labels = torch.cat([torch.ones(len(text)), -torch.ones(int(present.sum()))]).double()
    folds_of = torch.cat([fold, fold[:, None].expand_as(present)[present]])
    right = torch.zeros(len(points), dtype=torch.bool)
    for held_out in range(folds):
        out = folds_of == held_out
        right[out] = _ridge(points[~out], labels[~out], points[out]).sign() == labels[out]
    return float(sum(right[labels == side].double().mean() for side in (1, -1)) / 2)


def _ridge(points: Tensor, labels: Tensor, asked: Tensor) -> Tensor:
    """Scores of `asked`, from points and labels weighted so that both classes weigh the same."""
    weights = torch.where(labels > 0, 0.5 / (labels > 0).sum(), 0.5 / (labels < 0).sum())
    weights = weights * len(labels)
    centre = (weights[:, None] * points).mean(0)
    spread = (weights * (points - centre).square().sum(1)).mean().sqrt()
    spread = spread.clamp_min(torch.finfo(points.dtype).eps)
    inputs, asked = (points - centre) / spread, (asked - centre) / spread
    rooted = weights.sqrt()[:, None] * inputs
    right_side = (weights.sqrt() * labels)[:, None]
    small = min(rooted.shape)
    eye = torch.eye(small, dtype=points.dtype)
    if small == rooted.shape[1]:
        slope = torch.linalg.solve(rooted.T @ rooted + eye, rooted.T @ right_side)
    else:
        slope = rooted.T @ torch.linalg.solve(rooted @ rooted.T + eye, right_side)
    return (asked @ slope)[:, 0]


def gap(
    image: Float[Tensor, "n e"],
    text: Float[Tensor, "n e"],
    hallucinated: Float[Tensor, "n k e"],
    present: Bool[Tensor, "n k"],
    captions: Sequence[str],
) -> Metrics:
    """Every measure of the embeddings, by name; see the functions of this file.

    Without those of true against hallucinated captions where no picture has one: nothing was measured.
    """
    found = {
        "centroid_distance": centroid_distance(image, text),
        "alignment": alignment(image, text),
        "uniformity_image": uniformity(image),
        "uniformity_text": uniformity(text),
        "recall_at_1": recall_at_1(image, text, captions),
    }
    if not present.any():
        return found
    true, false = similarities(image, text, hallucinated)
    return {
        **found,
        "p_true_over_hallucinated": preference(image, text, hallucinated, present),
        "auc_true_vs_hallucinated": auc(true, false[present]),
        "silhouette_true_vs_hallucinated": silhouette(text, hallucinated[present]),
        "probe_true_vs_hallucinated": linear_probe(text, hallucinated, present),
    }


def _unit(embeddings: Float[Tensor, "*n e"]) -> Float[Tensor, "*n e"]:
    """Of length 1, in float64 on CPU. Raises `ConvergenceError` where an entry is not finite."""
    if bad := int((~embeddings.isfinite()).any(-1).sum()):
        raise ConvergenceError(
            f"{bad} of {embeddings[..., 0].numel()} embeddings hold NaN or infinity; lower the "
            "step sizes, or compute in a wider dtype"
        )
    return functional.normalize(embeddings.detach().cpu().double(), dim=-1)


def _blocks(points: Tensor, others: Tensor) -> Iterator[tuple[Int[Tensor, "b"], Tensor]]:
    """Row numbers and squared distances of unit vectors to all others, `BLOCK` rows at a time."""
    for rows in torch.arange(len(points)).split(BLOCK):
        near, lengths = points[rows], others.square().sum(1)
        squared = near.square().sum(1, keepdim=True) + lengths - 2 * near @ others.T
        yield rows, squared.masked_fill(squared < SAME, 0.0)
