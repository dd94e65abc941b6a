"""`keep: again`: graphs without wholes, their derivatives of every order, what is written into."""

import gc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from bilevel import calculus, tree
from bilevel.errors import ProblemError
from bilevel.problem.sharded import sharded
from bilevel.problem.spread import Spread
from bilevel.sharding import parts
from bilevel.sharding.again import gathering_again
from bilevel.sharding.parts import collected, teams
from bilevel.types import Counts, Loss, Point
from tests.ranks import on_ranks

D = torch.float64
WIDTH = 8


class Net:
    """A network of two layers, whose weights are most of what a graph of its loss keeps."""

    def lower_loss(self, x, y, batch):
        hidden = torch.nn.functional.linear(batch["a"], y["first"], y["bias"]).tanh()
        made = hidden @ y["second"].T
        penalty = sum((x["penalty"].exp() * entry.square()).sum() for entry in y.values())
        return (made - batch["b"]).square().mean() + penalty

    upper_loss = lower_loss


def drawn(seed):
    stream = torch.Generator().manual_seed(seed)
    shapes = {"first": (WIDTH, WIDTH), "bias": (WIDTH,), "second": (3, WIDTH)}
    y = {n: torch.randn(s, generator=stream, dtype=D) for n, s in shapes.items()}
    batch = {"a": torch.randn(6, WIDTH, generator=stream, dtype=D), "b": torch.ones(6, 3, dtype=D)}
    return {"penalty": torch.tensor(-1.0, dtype=D)}, y, batch


def products(problem, x, y, v, batch):
    """(∇y G, an HVP, a cross product), and what depends on third derivatives: ∇ of ⟨∇y G, ∇y G⟩."""
    loss = Loss(problem.lower_loss, batch, Counts(), "lower")
    lower = calculus.linearize(loss, Point(x, y))
    yield lower
    hvp, cross = lower.hvp_yy(v), lower.vjp_xy(v)
    leaves, x = tree.leaves(y), tree.leaves(x)
    _, g = calculus.gradient_with_value(loss, x, leaves)
    g = torch.autograd.grad(
        list(g.values()), list(leaves.values()), list(v.values()), create_graph=True
    )
    third = torch.autograd.grad(g, [*leaves.values(), x["penalty"]], list(v.values()))
    named = dict(zip(leaves, third[:-1], strict=True))
    yield lower.gradient, hvp, cross, named, {"x": third[-1]}


class Watch:
    """How many numbers of gathered wholes are still in memory."""

    def __init__(self, monkeypatch):
        self.made = []
        forward = parts.Gather.forward

        def noting(team, rows, *values):
            wholes = forward(team, rows, *values)
            self.made += [(StorageWeakRef(w.untyped_storage()), w.numel()) for w in wholes]
            return wholes

        monkeypatch.setattr(parts.Gather, "forward", staticmethod(noting))

    @property
    def alive(self):
        gc.collect()
        return sum(size for storage, size in self.made if not storage.expired())


@pytest.mark.parametrize("size", [2, 4])
def test_no_whole_is_kept_after_linearize_and_products_are_exact(size, monkeypatch):
    x, y, batch = drawn(0)
    v = drawn(1)[1]
    *_, truth = products(Net(), x, y, v, batch)

    def work(ranks):
        watch, found = Watch(monkeypatch), {}
        for keep in ("whole", "again"):
            mesh = teams(ranks, shard=2, keep=keep)
            team, problem = mesh.team, sharded(Spread(Net(), mesh), mesh.team)
            team.levels = {"y"}
            with gathering_again(mesh):
                stages = products(problem, x, team.cut(y), team.cut(v), batch)
                lower = next(stages)
                alive = watch.alive / tree.size(y)
                answers = [collected(tree.detach(part)) for part in next(stages)]
            del lower, stages
            found[keep] = alive, answers, watch.alive
        return found

    for one in on_ranks(size, work):
        assert not isinstance(one, Exception), one.__notes__
        # the weights of both layers, forward and in the graph of the gradient
        assert one["whole"][0] == 1.0
        assert one["again"][0] == 0
        for _, answers, after in one.values():
            assert after == 0
            for got, expected in zip(answers, truth, strict=True):
                assert tree.norm(tree.sub(got, expected)) <= 1e-12 * tree.norm(expected)


def test_a_part_that_was_written_into_is_told():
    x, y, batch = drawn(0)

    def work(ranks):
        mesh = teams(ranks, shard=2, keep="again")
        problem = sharded(Spread(Net(), mesh), mesh.team)
        mesh.team.levels = {"y"}
        mine, v = mesh.team.cut(y), mesh.team.cut(drawn(1)[1])
        with gathering_again(mesh):
            lower = calculus.linearize(
                Loss(problem.lower_loss, batch, Counts(), "lower"), Point(x, mine)
            )
            mine["first"].add_(1.0)
            with pytest.raises(ProblemError, match=r"written into .* set runtime.keep=whole"):
                lower.hvp_yy(v)
        return True

    assert on_ranks(2, work) == [True, True]
