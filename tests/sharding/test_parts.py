"""Gather and Scatter, Collect and Cut: closed forms, derivatives of every order, shards of unequal size."""

import copy
import itertools
import pickle
from dataclasses import replace

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from bilevel import tree
from bilevel.errors import ProblemError, RecipeError
from bilevel.ranks import ALONE, by_rows, leave
from bilevel.sharding import parts
from bilevel.sharding.parts import Collect, Cut, Gather, Scatter, collected, cut, gathered, teams
from bilevel.unrolling.forward_over_reverse import _load
from tests.ranks import on_ranks

D = torch.float64
SHAPES = {
    "even": (4, 3),
    "uneven": (5, 2),
    "fewer": (1, 3),
    "vector": (3,),
    "number": (),
    "none": (0, 2),
}
"""Rows that 2 and 3 ranks divide or not, fewer than ranks, no rows, none at all."""


def whole(seed=0):
    stream = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=stream, dtype=D) + 0.5 for n, s in SHAPES.items()}


def found(size, work):
    """What the ranks return; raises what one raised."""
    answers = on_ranks(size, work)
    for one in answers:
        if isinstance(one, Exception):
            raise one
    return answers


def same(a, b):
    assert list(a) == list(b)
    for name, entry in a.items():
        assert torch.equal(entry, b[name]), name


# who has what


@pytest.mark.parametrize("size", [2, 3])
def test_each_rank_has_its_rows_and_together_they_are_the_whole(size):
    def work(ranks):
        team = teams(ranks, shard=size).team
        mine = team.cut(whole())
        before = ranks.ledger.mark()
        return mine, collected(mine), ranks.ledger.since(before), tree.shapes(mine), tree.size(mine)

    answers = found(size, work)
    for name, entry in whole().items():
        if entry.dim():
            rows = [len(mine[name]) for mine, *_ in answers]
            assert rows == [len(piece) for piece in entry.tensor_split(size)]
            assert torch.equal(torch.cat([mine[name] for mine, *_ in answers]), entry)
    counted = sum(entry.numel() for n, entry in whole().items() if n != "number")
    for _, together, sent, shapes, numbers in answers:
        same(together, whole())
        assert all(type(name) is str for name in together)
        assert sent == (1, 8 * counted)  # one call; the bytes of the wholes
        assert shapes == SHAPES
        assert numbers == tree.size(whole())


def test_a_part_is_in_memory_of_its_own():
    def work(ranks):
        given = whole()
        mine = teams(ranks, shard=2).team.cut(given)
        return [mine[n].untyped_storage().nbytes() == mine[n].nbytes for n in mine]

    assert all(map(all, found(2, work)))


# sums over ranks that hold a tree together


def sums(a, b):
    square = tree.map(torch.square, tree.leaves(a))
    return {
        "dot": tree.dot(a, b),
        "self": tree.dot(a, a),
        "norm": tree.norm(a),
        "tiny": tree.dot(tree.scale(1e-30, a), tree.scale(1e-30, b)),
        "summed": float(tree.summed(square).detach()),
        "largest": tree.largest(a),
        "gram": tree.gram(tree.own(a)[:, None], tree.own(b), a).item(),
        "finite": tree.is_finite(a),
        "equal": tree.equal(a, a),
    }


@pytest.mark.parametrize(("size", "shard"), [(2, 2), (3, 3), (4, 2)])
def test_sums_over_entries_are_those_of_the_whole(size, shard):
    truth = sums(whole(), whole(1))

    def work(ranks):
        team = teams(ranks, shard=shard).team
        a, b = team.cut(whole()), team.cut(whole(1))
        broken, other = tree.clone(a), tree.clone(a)
        if ranks.rank == size - 1:
            broken["even"][0, 0] = torch.nan
            other["even"][0, 0] += 1
        return sums(a, b), tree.is_finite(broken), tree.equal(a, other)

    for got, *rest in found(size, work):
        assert got == pytest.approx(truth, rel=1e-13)
        # what one rank sees is everyone's, or they would go different ways
        assert rest == [False, False] if shard == size else True


def test_a_sum_by_oneself_is_another_on_each_rank():
    """Control: what a component finds that takes its sums past `tree`."""

    def work(ranks):
        mine = teams(ranks, shard=2).team.cut(whole())
        return sum(entry.square().sum().item() for entry in mine.values())

    a, b = found(2, work)
    truth = tree.dot(whole(), whole())
    assert min(abs(a - truth), abs(b - truth)) > 0.1 * truth
    assert a != b


def test_the_derivative_of_a_sum_of_squares_is_each_ranks_own():
    def work(ranks):
        mine = tree.leaves(teams(ranks, shard=2).team.cut(whole()))
        total = tree.summed(tree.map(lambda e: e**3, mine))
        first = torch.autograd.grad(total, list(mine.values()), create_graph=True)
        second = torch.autograd.grad(
            first, list(mine.values()), [torch.ones_like(g) for g in first]
        )
        return [
            collected(dict(zip(mine, map(torch.detach, g), strict=True))) for g in (first, second)
        ]

    for first, second in found(2, work):
        same(first, tree.map(lambda e: 3 * e.square(), whole()))
        same(second, tree.map(lambda e: 6 * e, whole()))


def test_random_numbers_are_those_of_one_rank():
    def draw(like):
        stream = torch.Generator().manual_seed(4)
        return tree.drawn(lambda p: torch.randn(p.shape, generator=stream, dtype=p.dtype), like)

    def work(ranks):
        return collected(draw(teams(ranks, shard=3).team.cut(whole())))

    for got in found(3, work):
        same(got, draw(whole()))


def test_one_vector_is_refused_and_names_stay_what_they_are():
    def work(ranks):
        mine = teams(ranks, shard=2).team.cut(whole())
        with pytest.raises(ProblemError, match=r"into one vector, .* set runtime.mesh.shard=1"):
            tree.flatten(mine)
        (name, *_), made = mine, tree.axpy(2.0, mine, tree.clone(mine))
        assert all(type(n) is tree.Part for n in made)
        assert name == "even"
        assert {name: 1}["even"] == 1
        assert (
            type(next(iter(copy.deepcopy(mine)))) is tree.Part
        )  # it goes with a tree that is copied
        return pickle.loads(pickle.dumps(name))

    assert found(2, work) == ["even", "even"]


# derivatives


A = torch.randn(7, 3, dtype=D, generator=torch.Generator().manual_seed(0))


def loss(y, rows):
    """A mean over rows and penalties, neither linear nor quadratic."""
    made = (rows @ y["even"].T).tanh() @ y["even"][:, :2] + y["uneven"].sum(0) * y["number"]
    rest = (y["fewer"] ** 3).sum() + (y["vector"] ** 4).sum() + y["none"].sum()
    return (made**2).mean() + 0.1 * rest


def orders(y, function):
    """Value, gradient, a Hessian product, and a product with third derivatives, in the shapes of y."""
    y = tree.leaves(y)
    names, entries = list(y), list(y.values())
    value = function(y)
    got = [value]
    for _ in range(3):
        along = got[-1] if got[-1] is value else sum((g * 0.7).sum() for g in got[-1])
        if got[-1] is not value and tree.holders(y) is not None:
            along = tree.summed(dict(zip(names, [g * 0.7 for g in got[-1]], strict=True)))
        got.append(torch.autograd.grad(along, entries, create_graph=True, materialize_grads=True))
    return [value.detach()] + [
        dict(zip(names, [g.detach() for g in part], strict=True)) for part in got[1:]
    ]


def over_ranks(ranks, gather=gathered):
    part, weight = by_rows({"A": A}, ranks.rank, ranks.size)
    return lambda y: leave(ranks, weight * loss(gather(y), part["A"]))


@pytest.mark.parametrize(("size", "shard"), [(2, 2), (3, 3), (4, 2)])
def test_derivatives_of_every_order_are_those_of_the_whole(size, shard):
    truth = orders(whole(), lambda y: loss(y, A))

    def work(ranks):
        ranks = teams(ranks, shard=shard)
        value, *more = orders(ranks.team.cut(whole()), over_ranks(ranks))
        return [value, *map(collected, more)]

    for got, *more in found(size, work):
        torch.testing.assert_close(got, truth[0], rtol=1e-13, atol=0)
        for part, expected in zip(more, truth[1:], strict=True):
            assert tree.norm(tree.sub(part, expected)) <= 1e-13 * tree.norm(expected)


def test_a_gather_whose_backward_does_not_sum_is_caught():
    """Control: `Collect`, which is for what every rank computes alike."""
    truth = orders(whole(), lambda y: loss(y, A))

    def work(ranks):
        ranks = teams(ranks, shard=2)
        _, *more = orders(ranks.team.cut(whole()), over_ranks(ranks, collected))
        return list(map(collected, more))

    for more in found(2, work):
        for part, expected in zip(more, truth[1:], strict=True):
            assert tree.norm(tree.sub(part, expected)) > 0.1 * tree.norm(expected)


def test_what_every_rank_computes_alike_needs_no_sum():
    """A projection of the whole, cut again, and its derivatives."""

    def project(y):
        return tree.map(lambda e: e**3 / (1 + sum((v**2).sum() for v in y.values())), y)

    def products(y, function):
        y = tree.leaves(y)
        after = function(y)
        first = torch.autograd.grad(
            list(after.values()), list(y.values()), list(tree.detach(y).values()), create_graph=True
        )
        second = torch.autograd.grad(first, list(y.values()), list(tree.detach(y).values()))
        return [
            tree.detach(after),
            *(dict(zip(y, map(torch.detach, g), strict=True)) for g in (first, second)),
        ]

    truth = products(whole(), project)

    def work(ranks):
        mine = teams(ranks, shard=3).team.cut(whole())
        return list(map(collected, products(mine, lambda y: cut(project(collected(y)), y))))

    for got in found(3, work):
        for part, expected in zip(got, truth, strict=True):
            assert tree.norm(tree.sub(part, expected)) <= 1e-13 * tree.norm(expected)


def test_forward_mode_and_traces_see_each_function():
    """All are linear: the tangent is the function of the tangent, and a trace has them."""
    _load()
    make_fx(torch.sin)(torch.ones(1))  # what torch imports then, once and not in each process

    def work(ranks):
        team = teams(ranks, shard=2).team
        answers = []
        for function in (Gather, Scatter, Collect, Cut):
            given = whole()["uneven"]
            given = team.cut({"w": given})["w"] if function in (Gather, Collect) else given

            def apply(value):
                return function.apply(team, (5,), value)[0]  # noqa: B023  # called in this turn

            with forward_ad.dual_level():
                dual = apply(forward_ad.make_dual(given, given + 1))
                tangent = forward_ad.unpack_dual(dual).tangent
            graph = make_fx(apply, tracing_mode="fake", _allow_non_fake_inputs=True)(given)
            answers += [(tangent, apply(given + 1)), (graph(given + 2), apply(given + 2))]
        return answers

    for answers in found(2, work):
        assert all(torch.equal(got, expected) for got, expected in answers)


def test_what_is_sent():
    """In bytes of wholes: gathered once forward, scattered once backward, and again for a product."""

    def work(ranks):
        ranks = teams(ranks, shard=2)
        y = tree.leaves(ranks.team.cut({"even": torch.ones(4, 3, dtype=D)}))
        marks = [ranks.ledger.mark()]
        value = gathered(y)["even"].pow(3).sum()
        marks.append(ranks.ledger.mark())
        (g,) = torch.autograd.grad(value, list(y.values()), create_graph=True)
        marks.append(ranks.ledger.mark())
        torch.autograd.grad(g, list(y.values()), torch.ones_like(g))
        marks.append(ranks.ledger.mark())
        return [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(marks)]

    for sent in found(2, work):
        assert sent == [(1, 96), (1, 96), (2, 192)]


# meshes


@pytest.mark.parametrize(
    ("size", "mesh", "said"),
    [
        (3, {"shard": 2}, "a multiple of 2 ranks, and there are 3: .*shard to 1 or 3"),
        (2, {"shard": 4}, "a multiple of 4 ranks, and there are 2"),
        (2, {"data": 2, "shard": 2}, "2 · 2 ranks, and there are 2"),
        (2, {"data": 3}, "3 · 1 ranks, and there are 2"),
    ],
)
def test_a_mesh_that_is_not_all_ranks_is_refused_with_what_fits(size, mesh, said):
    with pytest.raises(RecipeError, match=said):
        teams(replace(ALONE, size=size, group=object()), **mesh)


def test_one_process_is_no_team():
    with pytest.raises(RecipeError, match="and there is 1: start that many"):
        teams(ALONE, shard=2)
    assert teams(ALONE) is ALONE
    assert teams(ALONE).team is None


def test_teams_of_four():
    def work(ranks):
        team = teams(ranks, data=2, shard=2).team
        return team.within.rank, team.across.rank, team.is_first

    assert found(4, work) == [(0, 0, True), (1, 0, False), (0, 1, True), (1, 1, False)]
    assert parts.X_FROM == 2**20
