"""The picture of the modality gap: image, true and hallucinated caption embeddings in a plane.

After Liang et al., NeurIPS 2022, arXiv:2203.02053, and HACL, arXiv:2312.06968. Image = blue stars,
true caption = green circles, hallucinated caption = red triangles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from .evaluator import Embeddings
from .measures import centroid_distance, preference


class Marker(NamedTuple):
    """How a kind of embedding is drawn."""

    label: str
    colour: str
    shape: str
    size: float


IMAGE = Marker("image", "tab:blue", "*", 46)
TRUE = Marker("true caption", "tab:green", "o", 17)
FALSE = Marker("hallucinated caption", "tab:red", "^", 19)


@dataclass(frozen=True)
class Panel:
    """Triples of one model, and what is written above them."""

    title: str
    image: Float[Tensor, "n e"]
    text: Float[Tensor, "n e"]
    hallucinated: Float[Tensor, "n e"]
    note: str = ""

    @classmethod
    def of(
        cls, title: str, found: Embeddings, present: Bool[Tensor, "n kind"], triples: int
    ) -> Panel:
        """The first scenes that have a hallucinated caption; kinds take turns."""
        rows, kinds = _choose(present, triples)
        note = (
            f"centroid distance {centroid_distance(found.image, found.text):.2f}, "
            f"P(true > hallucinated) {preference(*found, present):.2f}"
        )
        return cls(
            title, found.image[rows], found.text[rows], found.hallucinated[rows, kinds], note
        )


def _choose(present: Bool[Tensor, "n kind"], triples: int) -> tuple[Tensor, Tensor]:
    rows, kinds = [], []
    for row, allowed in enumerate(present.tolist()):
        options = [kind for kind, there in enumerate(allowed) if there]
        if options and len(rows) < triples:
            rows.append(row)
            kinds.append(options[row % len(options)])
    return torch.tensor(rows, dtype=torch.long), torch.tensor(kinds, dtype=torch.long)


def plane(panels: Sequence[Panel]) -> list[Float[Tensor, "3 n 2"]]:
    """Every panel's normalised embeddings on the first two principal axes of all of them together.

    One fit for all panels, so that the same place means the same embedding in each.
    """
    stacks = [
        functional.normalize(torch.stack([p.image, p.text, p.hallucinated]).double(), dim=-1)
        for p in panels
    ]
    everything = torch.cat([stack.flatten(0, 1) for stack in stacks])
    centre = everything.mean(0)
    axes = torch.linalg.svd(everything - centre, full_matrices=False).Vh[:2]
    # The sign of an axis is arbitrary; fixing it makes two runs' figures comparable.
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    return [(stack - centre) @ axes.T for stack in stacks]


def embedding_figure(panels: Sequence[Panel]) -> Any:
    """A `matplotlib.figure.Figure`, one panel beside the other on the same axes.

    Below each plane, how much nearer the true caption is to its picture than the hallucinated one:
    they are told apart by that and not by where they lie, as what is true of one picture is false
    of another.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(panels), 7.4), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(5.2, 2.2))
    planes, below = parts
    axes = planes.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    _margins(below.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0], panels)
    for axis, panel, points in zip(axes, panels, plane(panels), strict=True):
        for marker, cloud in zip((IMAGE, TRUE, FALSE), points, strict=True):
            _scatter(axis, cloud, marker)
        axis.set_title(f"{panel.title}\n", fontsize=13)
        axis.text(
            0.5, 1.015, panel.note, transform=axis.transAxes, ha="center", fontsize=9, color="0.3"
        )
        axis.set_xlabel("principal axis 1")
        axis.set_box_aspect(1)
        axis.grid(color="0.93")
        axis.set_axisbelow(True)
    axes[0].set_ylabel("principal axis 2")
    handles, labels = axes[0].get_legend_handles_labels()
    planes.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def margins(panel: Panel) -> Float[Tensor, "n"]:
    """s(image, true caption) − s(image, hallucinated caption), s the cosine: above 0, told apart."""
    true, false = (
        functional.cosine_similarity(panel.image, text, dim=-1)
        for text in (panel.text, panel.hallucinated)
    )
    return true - false


def _margins(axes: Sequence[Any], panels: Sequence[Panel]) -> None:
    """Histograms of `margins`, of which 0 is the edge of a bar; what a side comes to stands above it."""
    from matplotlib.ticker import MaxNLocator

    found = [margins(panel) for panel in panels]
    most = max(float(margin.abs().max()) for margin in found) or 1.0
    bins = [most * i / 20 for i in range(-20, 21)]
    for axis, margin in zip(axes, found, strict=True):
        sides = ((margin > 0, TRUE, "", 1.0, "right"), (margin <= 0, FALSE, "//", 0.0, "left"))
        for of, marker, hatch, x, align in sides:
            axis.hist(
                margin[of].numpy(),
                bins=bins,
                facecolor=(marker.colour, 0.5),
                edgecolor=marker.colour,
                histtype="stepfilled",
                hatch=hatch,
            )
            share = f"{marker.label} nearer: {float(of.double().mean()):.0%}"
            axis.text(x, 1.03, share, transform=axis.transAxes, ha=align, va="bottom", fontsize=8)
        axis.axvline(0, color="0.3", linewidth=0.8)
        axis.set_xlabel("cosine to the picture: true − hallucinated caption")
        axis.grid(color="0.93")
        axis.set_axisbelow(True)
    axes[0].set_ylabel("pictures")
    axes[0].yaxis.set_major_locator(MaxNLocator("auto", integer=True))


def _scatter(axis: Any, cloud: Float[Tensor, "n 2"], marker: Marker) -> None:
    axis.scatter(
        cloud[:, 0].numpy(),
        cloud[:, 1].numpy(),
        s=marker.size,
        c=marker.colour,
        marker=marker.shape,
        label=marker.label,
        alpha=0.65,
        linewidths=0.3,
        edgecolors="white",
    )
