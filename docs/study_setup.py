"""How the flagship's study is set up, in a figure drawn from its file: `python -m docs.study_setup`.

Above: pictures of each kind of source in R1, and how often two shapes stand together in them. Below: what learns
from which of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bilevel_problems.mllm_hft.evaluation.questions import cooccurrence
from bilevel_problems.mllm_hft.sources.shapes import Shapes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bilevel.studying.file import StudyFile

HERE = Path(__file__).parent
FILE = HERE / "study" / "setup.svg"
STUDY = HERE.parent / "recipes" / "studies" / "mllm_hft.yaml"
SCENES = 2000
"""Of which the pairs are counted."""
SHOWN = 3
"""Pictures of a kind."""
BLUE, ORANGE = "#0072B2", "#D55E00"


@dataclass(frozen=True)
class Group:
    """Pictures that are alike."""

    title: str
    source: Shapes
    is_biased: bool


def groups(content: StudyFile) -> list[Group]:
    """Sources of the common pairing, those with one of their own, and the clean pictures, as R1 has them."""
    source: Mapping[str, Any] = content.regimes["R1"].settings["problem.source"]
    parts = [dict(part) for part in source["parts"].values()]
    own = [part for part in parts if part.get("pairing")]
    common = [part for part in parts if not part.get("pairing")]
    low, high = min(p["bias"] for p in common), max(p["bias"] for p in common)
    each = int(content.settings["problem.train"]) // len(parts)
    return [
        Group(
            f"{len(common)} sources of {each:,} pictures\none pairing of shapes, of strength {low:g} to {high:g}",
            Shapes(bias=0.9),
            True,
        ),
        Group(
            f"{len(own)} sources of {each:,}\neach with a pairing of its own",
            Shapes(bias=own[0]["bias"], pairing=own[0]["pairing"]),
            True,
        ),
        Group(f"{content.settings['problem.upper']} clean pictures\nno pairs", Shapes(), False),
    ]


def composed(content: StudyFile, scenes: int = SCENES) -> Figure:
    """The figure, of pairs counted over so many scenes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 5.4))
    for k, group in enumerate(groups(content)):
        left = 0.03 + 0.34 * k
        figure.text(left + 0.13, 0.945, group.title, ha="center", va="center", fontsize=9)
        _pictures(figure, group, left, scenes)
    _flow(figure, content)
    return figure


def _pictures(figure: Figure, group: Group, left: float, scenes: int) -> None:
    stream = torch.Generator().manual_seed(4)
    drawn = group.source.scenes(scenes, biased=group.is_biased, generator=stream)
    shown = group.source.render(drawn[:SHOWN], stream).images
    for k, picture in enumerate(shown):
        axes = figure.add_axes((left + 0.09 * k, 0.755, 0.084, 0.131))
        axes.imshow(picture.permute(1, 2, 0).numpy())
        axes.set_axis_off()
    counts = cooccurrence(drawn, Shapes().vocabulary)
    counts.fill_diagonal_(0)
    axes = figure.add_axes((left + 0.06, 0.49, 0.145, 0.225))
    axes.imshow((counts / scenes).numpy(), cmap="Greys", vmin=0, vmax=0.3)
    axes.set_xticks([])
    axes.set_yticks([])
    if left < 0.1:
        axes.set_ylabel("shapes", fontsize=8)
    axes.set_xlabel("how often two stand together", fontsize=8)


def _flow(figure: Figure, content: StudyFile) -> None:
    axes = figure.add_axes((0, 0, 1, 0.46))
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_axis_off()
    count = len(content.regimes["R1"].settings["problem.source"]["parts"])
    test = content.test["problem.test"]
    _box(
        axes, 0.03, 0.42, 0.36, f"lower level: a small LLaVA learns the task,\neach of {count} sources at its weight",
        BLUE,
    )  # fmt: skip
    _box(
        axes,
        0.62,
        0.42,
        0.35,
        "upper level: the task loss of\nthat model on clean pictures",
        ORANGE,
    )
    _box(
        axes, 0.2, 0.03, 0.6,
        f"asked on {test:,} unbiased test pictures: is there a shape that the bias leads\n"
        "to expect? The measure is the AUC of its answers (POPE, adversarial)",
        "0.35",
    )  # fmt: skip
    _arrow(axes, (0.13, 0.95), (0.13, 0.73), BLUE)
    _arrow(axes, (0.47, 0.95), (0.37, 0.73), BLUE)
    _arrow(axes, (0.84, 0.95), (0.82, 0.73), ORANGE)
    _arrow(axes, (0.39, 0.63), (0.62, 0.63), BLUE)
    _arrow(axes, (0.62, 0.5), (0.39, 0.5), ORANGE)
    axes.text(0.505, 0.675, "model", ha="center", fontsize=9, color=BLUE)
    axes.text(
        0.505,
        0.455,
        "hypergradient\nof the weights",
        ha="center",
        va="top",
        fontsize=9,
        color=ORANGE,
    )
    _arrow(axes, (0.25, 0.42), (0.3, 0.28), "0.35")


def _box(axes: Axes, left: float, low: float, width: float, text: str, colour: str) -> None:
    from matplotlib.patches import FancyBboxPatch

    height = 0.3 if low > 0.2 else 0.24
    box = FancyBboxPatch(
        (left, low), width, height, boxstyle="round,pad=0,rounding_size=0.02", fill=False, ec=colour
    )
    axes.add_patch(box)
    axes.text(left + width / 2, low + height / 2, text, ha="center", va="center", fontsize=9)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": colour, "lw": 1.4})


def main() -> None:
    from bilevel.sinks import svg
    from bilevel.studying import file as files

    svg.save(composed(files.read(STUDY).content), FILE)


if __name__ == "__main__":
    main()
