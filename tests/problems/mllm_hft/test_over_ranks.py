"""The alignment problem over ranks: counted tokens, and negatives among the pictures of all ranks."""

import pytest
import torch

from bilevel import tree
from bilevel.errors import ProblemError
from bilevel.estimators import OneStep
from bilevel.lower import Gradient
from bilevel.optimizers import SGD
from bilevel.problem.spread import spread
from bilevel.ranks import ALONE
from bilevel.run import Setup, Upper, engine
from bilevel.run.upper_step import advance
from bilevel_problems.mllm_hft import losses
from tests.problems.mllm_hft.miniature import prepared
from tests.ranks import on_ranks

pytest.importorskip("transformers", reason="the model is transformers' own")
pytest.importorskip("peft", reason="LoRA goes through peft")

pytestmark = pytest.mark.usefixtures("cache")

OPTIONS = {
    "tokens and own negatives": {
        "formulation": "weighted",
        "lower_batch": 5,
        "contrast_batch": 3,
    },
    "negatives of the batch, and a queue": {
        "formulation": "two_variable",
        "negatives": "batch",
        "contrast_batch": 5,
        "queue": 4,
    },
    "a preference": {"formulation": "joint", "contrast_loss": "chip", "contrast_batch": 3},
}


def ends(problem, ranks):
    """x and y after a step, in float64, and both losses there."""
    setup = Setup(
        spread(problem, ranks), Gradient(steps=1, optimizer=SGD(lr=1e-2)), Upper(steps=1),
        OneStep(lr=0.1), dtype=torch.float64, ranks=ranks,
    )  # fmt: skip
    setup.levels.optional["place"](setup.device, setup.dtype)
    state = engine.start(setup)
    list(advance(setup, state))
    both = setup.levels.losses(next(state.upper_batches), next(state.lower_batches))
    values = [float(loss(state.x, state.y)) for loss in (both.upper, both.lower)]
    return state.x, state.y, *values


@pytest.mark.parametrize("name", OPTIONS)
def test_it_is_that_of_one_rank(name, monkeypatch):
    problem = prepared(**OPTIONS[name])
    truth = ends(problem, ALONE)
    for found in on_ranks(2, lambda ranks: ends(problem, ranks)):
        for got, expected in zip(found[:2], truth[:2], strict=True):
            assert tree.norm(tree.sub(got, expected)) <= 1e-12 * tree.norm(expected)
        assert found[2:] == pytest.approx(truth[2:], rel=1e-12)
    # control: divided by what a rank counts for itself, which is refused with both values
    monkeypatch.setattr(losses.ranks, "mean", lambda total, count: total / count)
    said = on_ranks(2, lambda ranks: ends(problem, ranks))
    assert [type(one) for one in said] == [ProblemError] * 2
    assert "as the weighted sum of its parts on 2 ranks" in str(said[0])
