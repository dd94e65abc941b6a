"""How near a step is to a kink."""

import pytest
import torch

from bilevel import tree
from bilevel.calculus.fixed_point_maps import linearize_map
from bilevel.types import Counts, Loss, Point, Structure


@pytest.mark.parametrize(("share", "kinks"), [(0.99, 1), (1.01, 0)])
@pytest.mark.parametrize("lr", [0.25, 1.0, 4.0])
def test_how_near_to_a_kink_is_near_goes_with_the_step_and_the_size_of_y(share, kinks, lr):
    """‖y − x‖² / 2 lr over y ≤ 1000: the step leads to x, a `share` of the margin from the bound."""
    margin = 1e-6 * min(1.0, lr) * 1001
    x = torch.tensor([1000.0 + share * margin], dtype=torch.float64)
    y = torch.tensor([1000.0], dtype=torch.float64)
    loss = Loss(
        lambda x, y, b: (y["y"] - x["x"]).square().sum() / (2 * lr),
        None,
        Counts(),
        "lower",
        structure=Structure(project=lambda z: tree.map(lambda p: p.clamp(max=1000.0), z)),
    )
    at = Point({"x": x}, {"y": y})
    step = linearize_map(loss, at, lr)
    assert not step.shift["y"].any(), "y is the fixed point"
    assert step.kinks(1e-6) == kinks
