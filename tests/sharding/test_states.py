"""States of ranks that hold variables together: whole once saved, and each rank's part again."""

from dataclasses import replace

import pytest
import torch

from bilevel import tree
from bilevel.optimizers.clip import Clip
from bilevel.problem.spread import spread
from bilevel.ranks import ALONE
from bilevel.run import Setup, Upper, engine
from bilevel.run import setup as set_up
from bilevel.sharding.parts import collected, teams
from bilevel.sharding.states import parted, wholes
from tests.over_ranks import SGD, Started
from tests.ranks import on_ranks

D = torch.float64


def drawn():
    """x and y of the same names, a tree of lists, an optimizer's entries, a matrix, what is in no part."""
    y = {"w": torch.arange(10.0, dtype=D).reshape(5, 2), "b": torch.tensor(3.0, dtype=D)}
    x = {"w": torch.arange(3.0, dtype=D) + 1}
    rows = torch.arange(22.0, dtype=D).reshape(11, 2)
    state = {
        "x": x,
        "y": y,
        "upper": {"w": {"step": torch.tensor(4.0), "exp_avg": x["w"] * 2}},
        "estimator": {
            "past": [y, tree.scale(3.0, y)],
            f"{tree.ROWS}S": rows,
            "M": rows.T @ rows,
            "none": None,
            "w": 1,
        },
        "counts": torch.arange(5),
    }
    return x, y, state


def same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        assert [type(key) for key in a] == [type(key) for key in b]
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, list):
        for one, other in zip(a, b, strict=True):
            same(one, other)
    else:
        assert a == b


def test_a_state_is_cut_and_made_whole_again_on_the_first_rank_alone():
    def work(ranks):
        x, y, state = drawn()
        team = teams(ranks, shard=2).team
        mine_x, mine_y = team.cut(x), team.cut(y)
        mine = parted(state, mine_x, mine_y)
        shapes = {
            "y": [*mine["y"]["w"].shape],
            "past": [*mine["estimator"]["past"][1]["w"].shape],
            "moment": [*mine["upper"]["w"]["exp_avg"].shape],
            "rows": [*mine["estimator"][f"{tree.ROWS}S"].shape],
        }
        assert torch.equal(mine["y"]["w"], mine_y["w"])
        norm = tree.norm(mine["estimator"]["past"][1])  # its names are parts
        assert norm == pytest.approx(3 * tree.norm(y), rel=1e-15)
        again = wholes(mine, mine_y)
        if ranks.is_first:
            same(again, state)
        else:
            assert again["y"]["w"] is again["upper"]["w"]["exp_avg"] is None
        return shapes

    first, second = on_ranks(2, work)
    # of 5 rows three and two, of 3 two and one; 6 + 1 and 4 + 1 numbers of y
    assert first == {"y": [3, 2], "past": [3, 2], "moment": [2], "rows": [7, 2]}
    assert second == {"y": [2, 2], "past": [2, 2], "moment": [1], "rows": [5, 2]}


def test_whole_variables_have_their_state_as_it_is():
    x, y, state = drawn()
    assert wholes(state, y) is state
    assert parted(state, x, y) is state


def test_a_run_goes_on_bit_for_bit_from_a_state_that_was_saved(monkeypatch):
    """x and y have the same names."""
    monkeypatch.setattr(set_up, "X_FROM", 10**9)  # the names alone have x held in parts

    def ends(ranks, saved=None, steps=4):
        setup = Setup(
            spread(Started(), ranks),
            SGD,
            Upper(steps=steps),
            "unroll",
            dtype=D,
            ranks=ranks,
        )
        state = engine.restore(setup, saved) if saved else engine.start(setup)
        list(engine.run(setup, state))
        return state

    def work(ranks):
        ranks = teams(ranks, shard=2)
        assert isinstance(next(iter(ends(ranks, steps=1).x)), tree.Part)
        whole = collected(ends(ranks).x)
        saved = ranks.from_first(ends(ranks, steps=2).save())
        return whole, collected(ends(ranks, saved).x), saved

    for whole, again, saved in on_ranks(2, work):
        same(again, whole)
        alone = ends(replace(ALONE), saved).x  # a process without a group
        assert tree.norm(tree.sub(alone, whole)) <= 1e-12 * tree.norm(whole)


def test_clipping_is_by_the_norm_of_the_whole():
    def clipped(g):
        return Clip(norm=0.5, value=0.4).apply(g)

    given = {"w": torch.linspace(-1, 1, 10, dtype=D).reshape(5, 2), "b": torch.tensor(2.0, dtype=D)}

    def work(ranks):
        return collected(clipped(teams(ranks, shard=2).team.cut(given)))

    for found in on_ranks(2, work):
        truth = clipped(given)
        assert tree.norm(truth) < 0.51
        assert tree.norm(tree.sub(found, truth)) <= 1e-15
