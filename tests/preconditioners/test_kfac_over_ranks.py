"""K-FAC over ranks is that of one rank: its factors are sums over the rows of all."""

import pytest
import torch

from bilevel import calculus, tree
from bilevel import ranks as over
from bilevel.preconditioners import KFAC
from bilevel.problem.levels import Levels
from bilevel.problem.spread import spread
from bilevel.ranks import ALONE
from bilevel.types import Point, System
from tests.over_ranks import Whole
from tests.ranks import on_ranks


def made(ranks, **options):
    """(the layers, M⁻¹ y) at a point."""
    levels = Levels(spread(Whole(), ranks))
    x, y = (tree.map(torch.Tensor.double, params) for params in Whole().init(None))
    batch = Whole().blocks[1]
    losses, at = levels.losses(batch, batch), Point(x, y)
    system = System(calculus.linearize(losses.lower, at).hvp_yy, y, losses, at, 0.0, None)
    kfac = KFAC(**options)
    apply, state = kfac.prepare(system, kfac.init(at))
    return state["layers"], apply(y)


@pytest.mark.parametrize("eigenvalues", ["product", "diagonal"])
def test_it_is_that_of_the_whole(eigenvalues, monkeypatch):
    layers, truth = made(ALONE, eigenvalues=eigenvalues)
    assert layers["weight"]["bias"] == "bias"

    def work(ranks):
        return made(ranks, eigenvalues=eigenvalues)

    for found, solved in on_ranks(3, work):
        assert found.keys() == layers.keys()
        torch.testing.assert_close(
            found["weight"]["values"], layers["weight"]["values"], rtol=1e-11, atol=0
        )
        assert tree.norm(tree.sub(solved, truth)) <= 1e-11 * tree.norm(truth)
    # control: of the rows of one's own it is another on each rank
    monkeypatch.setattr("bilevel.preconditioners.kfac.ranks.here", lambda: over.ALONE)
    own = [solved for _, solved in on_ranks(3, work)]
    assert all(tree.norm(tree.sub(one, truth)) > 1e-2 * tree.norm(truth) for one in own)
    assert tree.norm(tree.sub(own[0], own[1])) > 1e-2 * tree.norm(truth)
