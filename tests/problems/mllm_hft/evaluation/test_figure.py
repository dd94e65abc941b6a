"""The embedding figure: one plane for every panel, and the agreed signs."""

from __future__ import annotations

import pytest
import torch

from bilevel_problems.mllm_hft.evaluation.evaluator import Embeddings
from bilevel_problems.mllm_hft.evaluation.figure import Panel, embedding_figure, margins, plane

pytest.importorskip("matplotlib", reason="figures are drawn with matplotlib")


def panel(seed: int, shift: float = 0.0, n: int = 12) -> Panel:
    g = torch.Generator().manual_seed(seed)
    image, text, false = (torch.randn(n, 5, generator=g) for _ in range(3))
    return Panel(f"panel {seed}", image + shift, text, false)


def test_panels_share_one_projection():
    first, second = panel(0), panel(1, shift=4.0)
    together = plane([first, second])
    assert [points.shape for points in together] == [(3, 12, 2)] * 2
    # Normalised inner products between panels survive as one linear map: refit with the panels
    # swapped gives the same plane, refit of one alone does not.
    swapped = plane([second, first])
    torch.testing.assert_close(together[0], swapped[1])
    alone = plane([first])[0]
    assert not torch.allclose(together[0], alone, atol=1e-3)


def test_the_plane_holds_the_largest_variance():
    made = panel(2)
    points = plane([made])[0].flatten(0, 1)
    everything = torch.nn.functional.normalize(
        torch.cat([made.image, made.text, made.hallucinated]).double(), dim=-1
    )
    variances = torch.linalg.eigvalsh(torch.cov(everything.T, correction=0)).flip(0)
    torch.testing.assert_close(points.var(0, correction=0), variances[:2])


def test_triples_are_scenes_with_a_lie_and_kinds_take_turns():
    n, kinds = 10, 2
    found = Embeddings(
        torch.arange(n).float()[:, None].expand(n, 3),
        torch.randn(n, 3),
        torch.arange(n * kinds).float().reshape(n, kinds, 1).expand(n, kinds, 3),
    )
    present = torch.ones(n, kinds, dtype=torch.bool)
    present[0], present[3, 1] = False, False
    made = Panel.of("before", found, present, 5)
    assert made.image[:, 0].tolist() == [1, 2, 3, 4, 5]
    assert made.hallucinated[:, 0].tolist() == [3, 4, 6, 8, 11]
    assert "P(true > hallucinated)" in made.note


def test_pictures_without_a_lie_make_no_triple():
    found = Embeddings(torch.randn(4, 3), torch.randn(4, 3), torch.randn(4, 2, 3))
    none = Panel.of("before", found, torch.zeros(4, 2, dtype=torch.bool), 5)
    assert none.image.shape == none.text.shape == none.hallucinated.shape == (0, 3)
    kinds_none = Embeddings(*found[:2], torch.randn(4, 0, 3))
    assert len(Panel.of("before", kinds_none, torch.zeros(4, 0).bool(), 5).hallucinated) == 0


def test_signs_and_colours_are_the_agreed_ones(tmp_path):
    from matplotlib.colors import to_rgba

    figure = embedding_figure([panel(0), panel(1)])
    drawn = figure.axes[0].collections
    colours = [tuple(c.get_facecolor()[0][:3]) for c in drawn]
    assert colours == [to_rgba(c)[:3] for c in ("tab:blue", "tab:green", "tab:red")]
    labels = [c.get_label() for c in drawn]
    assert labels == ["image", "true caption", "hallucinated caption"]
    corners = [len(c.get_paths()[0].vertices) for c in drawn]
    assert corners[0] == 11  # a five-pointed star
    assert corners[2] == 4  # a triangle
    figure.savefig(tmp_path / "drawn.png")
    assert figure.axes[0].get_xlim() == figure.axes[1].get_xlim()


def test_margins_say_which_caption_is_nearer():
    image = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    true = torch.tensor([[3.0, 0.0], [1.0, 0.0], [2.0, 2.0]])
    false = torch.tensor([[0.0, 1.0], [0.0, 5.0], [-1.0, -1.0]])
    made = Panel("by hand", image, true, false)
    torch.testing.assert_close(margins(made), torch.tensor([1.0, -1.0, 2.0]))
    figure = embedding_figure([made])
    told = [text.get_text() for text in figure.axes[-1].texts]
    assert told == ["true caption nearer: 67%", "hallucinated caption nearer: 33%"]


@pytest.mark.parametrize("n", [1, 3, 8, 180])
def test_pictures_are_counted_in_whole_numbers_and_shares_stand_beside_the_bars(n):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = embedding_figure([panel(0, n=n), panel(1, n=n)])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    left, right = figure.axes[2:]
    low, high = left.get_ylim()
    ticks = [tick for tick in left.get_yticks() if low <= tick <= high]
    assert len(ticks) >= 2
    assert all(tick == round(tick) for tick in ticks)
    boxes = [text.get_window_extent() for axis in (left, right) for text in axis.texts]
    for axis in (left, right):
        assert not any(box.overlaps(axis.get_window_extent()) for box in boxes)
    assert sum(box.overlaps(other) for box in boxes for other in boxes) == len(
        boxes
    )  # itself alone
