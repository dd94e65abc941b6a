"""A problem whose y ranks hold together: what its methods see, nested variables, components that sum by themselves."""

from dataclasses import replace

import pytest
import torch

from bilevel import tree
from bilevel.errors import RankError
from bilevel.estimators.one_step import OneStep
from bilevel.events import Evaluated
from bilevel.problem.spread import spread
from bilevel.ranks import ALONE
from bilevel.run import Setup, Upper, engine
from bilevel.sharding.parts import collected, teams
from tests.over_ranks import SGD, Whole
from tests.ranks import on_ranks


class Nested(Whole):
    """y in containers, measured as a whole; it says what it was given."""

    def init(self, streams):
        x, y = super().init(streams)
        return x, {"layer": [y["weight"], y["bias"]]}

    def scores(self, x, y, batch):
        weight, bias = y["layer"]
        assert weight.shape == (3, 4)
        return super().scores(x, {"weight": weight, "bias": bias}, batch)

    def penalised(self, x, y, scores, batch):
        weight, bias = y["layer"]
        return super().penalised(x, {"weight": weight, "bias": bias}, scores, batch)

    def evaluate(self, x, y):
        return {"size": float(y["layer"][0].square().sum())}

    def figures(self, x, y):
        return {"rows": [*y["layer"][0].shape]}


def ended(ranks, problem, estimator="implicit", **options):
    setup = Setup(
        spread(problem, ranks),
        SGD,
        Upper(steps=2),
        estimator,
        ranks=ranks,
        **{"dtype": torch.float64, **options},
    )
    state = engine.start(setup)
    return setup, state, list(engine.run(setup, state))


@pytest.mark.parametrize(
    ("options", "most"),
    [({}, 1e-12), ({"dtype": torch.float32, "autocast": torch.bfloat16}, 1e-2)],
    ids=["float64", "autocast"],
)
def test_nested_variables_and_losses_under_autocast(options, most):
    _, state, _ = ended(ALONE, Nested(), **options)
    truth = state.x | state.y

    def work(ranks):
        setup, state, events = ended(teams(ranks, shard=2, keep="again"), Nested(), **options)
        shapes = [[*part.shape] for part in state.y.values()]
        measured = [event.metrics["size"] for event in events if isinstance(event, Evaluated)]
        figures = setup.problem.figures(state.x, state.y)
        kind = type(setup.problem).__name__
        return state.x | collected(state.y), shapes, measured[-1], figures, kind

    answers = on_ranks(2, work)
    for found, _, measured, _, kind in answers:
        assert tree.norm(tree.sub(found, truth)) <= most * tree.norm(truth)
        assert measured == pytest.approx(float(truth["layer.0"].square().sum()), rel=2 * most)
        assert kind == "NestedVariables"  # whose name messages begin with
    assert [shapes for _, shapes, *_ in answers] == [[[2, 4], [2]], [[1, 4], [1]]]
    assert [figures for *_, figures, _ in answers] == [
        {"rows": [3, 4]},
        {},
    ]  # the first rank's alone


class ByItself(OneStep):
    """Scales by a norm that it takes of its own rows."""

    def estimate(self, losses, at, state):
        found = super().estimate(losses, at, state)
        own = sum(float(entry.square().sum()) for entry in at.y.values())
        return replace(found, hypergradient=tree.scale(1 / own, found.hypergradient))


class ByTree(OneStep):
    """The same by `tree`."""

    def estimate(self, losses, at, state):
        found = super().estimate(losses, at, state)
        return replace(
            found, hypergradient=tree.scale(1 / tree.dot(at.y, at.y), found.hypergradient)
        )


def test_a_component_that_sums_by_itself_ends_the_run_and_one_that_does_by_tree_is_right():
    truth = ended(ALONE, Whole(), ByTree())[1].x
    assert tree.norm(tree.sub(ended(ALONE, Whole(), ByItself())[1].x, truth)) <= 1e-12

    def work(ranks):
        ranks = teams(ranks, shard=2)
        with pytest.raises(RankError, match=r"disagree on the hypergradient.* in bilevel\.tree"):
            ended(ranks, Whole(), ByItself())
        return ended(ranks, Whole(), ByTree())[1].x

    for found in on_ranks(2, work):
        assert tree.norm(tree.sub(found, truth)) <= 1e-12 * tree.norm(truth)
