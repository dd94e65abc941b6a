"""A problem over ranks: the losses of the whole, or a refusal before they are used."""

import itertools
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from bilevel import calculus, registry, tree
from bilevel import ranks as over
from bilevel import recipe as recipes
from bilevel.components import component
from bilevel.errors import ConvergenceError, ProblemError, RankError
from bilevel.estimators import Implicit
from bilevel.linear import CG
from bilevel.lower import Gradient
from bilevel.optimizers import SGD
from bilevel.problem.levels import Levels
from bilevel.problem.spread import spread
from bilevel.ranks import ALONE
from bilevel.recipe.assemble import assemble
from bilevel.run import Setup, Upper, engine
from bilevel.types import Point
from bilevel_problems.ridge import Ridge
from tests.ranks import on_ranks


def run(problem, ranks, steps=2, **options):
    """The state and events of a run."""
    setup = Setup(
        spread(problem, ranks),
        options.pop("lower", Gradient(steps=4, optimizer=SGD(lr=0.1))),
        Upper(steps=steps),
        options.pop("estimator", Implicit(solver=CG(tolerance=1e-13))),
        dtype=torch.float64,
        ranks=ranks,
        **options,
    )
    early = list(engine.prepare(setup))
    state = engine.start(setup)
    return state, [*early, *engine.run(setup, state)]


def off(got, expected):
    return tree.norm(tree.sub(got, expected)) / tree.norm(expected)


def ends(problem, ranks, **options):
    state, _ = run(problem, ranks, **options)
    return {"x": state.x, "y": state.y}


def same_bits(a, b):
    return all(torch.equal(a[level][n], entry) for level in b for n, entry in b[level].items())


# one more sample in the upper batch than there are in each half: 8 and 7 rows of 15
UNEQUAL = Ridge(data="synthetic")


@pytest.mark.parametrize("size", [2, 3])
def test_a_run_is_that_of_one_rank_on_the_whole_also_of_unequal_rows(size):
    assert len(UNEQUAL.splits["upper"]["b"]) % 2
    truth = ends(UNEQUAL, ALONE)
    found = on_ranks(size, lambda ranks: ends(UNEQUAL, ranks))
    for one in found:
        assert max(off(one[level], truth[level]) for level in "xy") < 1e-13
        assert same_bits(one, found[0])


class Uneven(Ridge):
    """Parts of other numbers of rows, each with the same weight."""

    def part(self, batch, rank, ranks):
        return over.by_rows(batch, rank, ranks)[0], 1 / ranks


class OneForAll(Ridge):
    """Every rank computes all of it."""

    def part(self, batch, rank, ranks):
        return batch, 1 / ranks


class Summed(Ridge):
    def upper_loss(self, x, y, batch):
        return super().upper_loss(x, y, batch) * len(batch["b"])


class AtTheStart(Ridge):
    """A mean over the rows with a target above zero, which at y = 0 is 1 whatever the rows are."""

    def upper_loss(self, x, y, batch):
        chosen = (batch["b"] > 0).double()
        return ((batch["A"] @ y["w"]).exp() * chosen).sum() / chosen.sum()


class Apart(Ridge):
    def upper_loss(self, x, y, batch):
        if len(batch["b"]) == 7:
            raise IndexError("rows are numbered")
        return super().upper_loss(x, y, batch)


def refusal(kind, **options):
    """What each of two ranks says; in the words of the first."""
    problem = kind(data="synthetic")
    said = on_ranks(2, lambda ranks: ends(problem, ranks, **options))
    assert [type(one) for one in said] == [ProblemError] * 2
    assert str(said[0]) == str(said[1])
    return str(said[0])


def test_a_problem_says_itself_what_the_part_of_a_rank_is():
    problem = OneForAll(data="synthetic")
    truth = ends(UNEQUAL, ALONE)
    for one in on_ranks(2, lambda ranks: ends(problem, ranks)):
        assert max(off(one[level], truth[level]) for level in "xy") < 1e-13


@pytest.mark.parametrize("kind", [Uneven, Summed, AtTheStart])
def test_parts_that_do_not_make_the_whole_are_refused_before_the_first_step(kind):
    said = refusal(kind)
    assert said.startswith(f"upper_loss of {kind.__name__} is ")
    whole, parts = (float(word.split()[0]) for word in said.split(" is ")[1].split(" and "))
    problem = kind(data="synthetic")
    x, y = problem.init(None)
    batch = problem.splits["upper"]
    values = []
    for rank in range(2):
        part, weight = getattr(problem, "part", over.by_rows)(batch, rank, 2)
        values.append(weight * float(problem.upper_loss(x, y, part)))
    if kind is AtTheStart:  # refused for a point beside it
        assert sum(values) == pytest.approx(float(problem.upper_loss(x, y, batch)), rel=1e-12)
        assert whole != pytest.approx(parts, rel=1e-4)
    else:
        assert whole == pytest.approx(float(problem.upper_loss(x, y, batch)), rel=1e-8)
        assert parts == pytest.approx(sum(values), rel=1e-8)
    for remedy in ("bilevel.ranks.share", "bilevel.ranks.rows", "part(batch, rank, ranks)"):
        assert remedy in said


class OwnStart(Ridge):
    """Draws where it starts from numbers of its own rank."""

    by = 1.0

    def init(self, streams):
        x, y = super().init(streams)
        far = self.by * int(os.environ.get("LOCAL_RANK", "0"))
        return {name: entry + far for name, entry in x.items()}, {n: e + 0.1 for n, e in y.items()}


def test_ranks_that_start_apart_are_told_so_rather_than_of_rows():
    problem = OwnStart(data="synthetic")
    said = on_ranks(2, lambda ranks: ends(problem, ranks))
    assert [type(one) for one in said] == [RankError] * 2
    assert str(said[0]) == str(said[1])
    assert str(said[0]).startswith("lower_loss of OwnStart is ")
    assert "they have other x, y or batches than each other" in str(said[0])
    problem.by = 0.0  # control: from the same point it runs
    one, other = on_ranks(2, lambda ranks: ends(problem, ranks))
    assert same_bits(one, other)


class Infinite(Ridge):
    def upper_loss(self, x, y, batch):
        return super().upper_loss(x, y, batch) + torch.inf


def test_a_loss_that_is_infinite_is_a_divergence_as_on_one_rank():
    problem = Infinite(data="synthetic")
    with pytest.raises(ConvergenceError, match="upper_loss = inf") as alone:
        ends(problem, ALONE)
    for said in on_ranks(2, lambda ranks: ends(problem, ranks)):
        assert isinstance(said, ConvergenceError)
        assert str(said) == str(alone.value)


def test_a_loss_that_fails_on_one_part_alone_is_refused_by_both_ranks():
    said = refusal(Apart)
    assert "part of rank 1 of 2 (IndexError: rows are numbered)" in said


def test_fewer_rows_than_ranks():
    problem = Ridge(data="synthetic")
    problem.splits["upper"] = {n: p[:1] for n, p in problem.splits["upper"].items()}
    for said in on_ranks(2, lambda ranks: ends(problem, ranks)):
        assert isinstance(said, ProblemError)
        assert "has 1 row, and 2 ranks are to have a part" in str(said)


# what is the first rank's


class Measured(Ridge):
    """`evaluate` and `figures` write down who called them, `prepare` in what order."""

    called: ClassVar[list] = []

    def prepare(self):
        self.called.append(over.here().rank)
        return iter(())

    def evaluate(self, x, y):
        self.called.append("evaluate")
        return {"loss": float(over.share(self.upper_loss(x, y, self.splits["upper"])))}

    def figures(self, x, y):
        self.called.append("figures")
        return {"one": object()}


def test_measures_and_figures_are_the_first_ranks():
    def work(ranks):
        problem = Measured(data="synthetic")
        _, events = run(problem, ranks)
        measured = [e.metrics for e in events if type(e).__name__ == "Evaluated"]
        return problem.called, measured, [type(e).__name__ for e in events].count("Drawn")

    one, two = on_ranks(2, work)
    assert one[0] == [0, "evaluate", "evaluate", "figures"]
    assert two[0] == [0]  # prepares after the first, and for itself too
    assert one[1] == two[1]
    assert (one[2], two[2]) == (1, 0)


class Unmeasured(Ridge):
    def evaluate(self, x, y):
        raise OSError("no such picture")


def test_measures_that_fail_end_every_rank():
    problem = Unmeasured(data="synthetic")
    one, two = on_ranks(2, lambda ranks: ends(problem, ranks))
    assert isinstance(one, OSError)
    assert isinstance(two, RankError)
    assert str(two) == "rank 0 failed in evaluate: OSError: no such picture"


# what it offers


def test_it_has_the_optional_methods_of_the_problem_and_no_others():
    def work(ranks):
        return sorted(Levels(spread(Ridge(), ranks)).optional)

    assert on_ranks(2, work) == [sorted({*Levels(Ridge()).optional, "part"})] * 2
    assert spread(UNEQUAL, ALONE) is UNEQUAL


# ranks that do not agree


class OwnRows:
    """An estimator that looks at rows of its own: on rank 1 its answer is another."""

    def __init__(self, ranks, after, by):
        self.inner, self.ranks, self.after, self.by = Implicit(), ranks, after, by
        self.needs, self.claim = self.inner.needs, None
        self.asked = 0

    def init(self, at):
        return self.inner.init(at)

    def estimate(self, losses, at, state):
        self.asked += 1
        found = self.inner.estimate(losses, at, state)
        if self.ranks.rank == 1 and self.asked > self.after:
            for entry in found.hypergradient.values():
                entry += self.by
        return found


def test_ranks_that_drift_apart_stop_before_the_step_with_the_name_of_what_differs():
    def work(ranks):
        estimator = OwnRows(ranks, after=2, by=1e-15)
        setup = Setup(
            spread(UNEQUAL, ranks), Gradient(steps=3), Upper(steps=9), estimator,
            dtype=torch.float64, ranks=ranks,
        )  # fmt: skip
        state = engine.start(setup)
        try:
            list(engine.run(setup, state))
        except RankError as error:
            return str(error), state.step, state.x

    one, two = on_ranks(2, work)
    assert one[0] == two[0]
    assert one[0].startswith("step 3: ranks 0 and 1 of 2 disagree on the hypergradient. ")
    assert one[1] == two[1] == 2
    assert torch.equal(one[2]["log_penalty"], two[2]["log_penalty"])


def test_where_they_agree_nothing_is_said():
    def work(ranks):
        return len(run(UNEQUAL, ranks, estimator=OwnRows(ranks, after=99, by=1.0))[1])

    assert on_ranks(2, work)[0] > 2


# nested variables and plain batches


class Nested:
    """A problem without components: x and y in containers, a batch that is a tensor."""

    rows = torch.linspace(0.0, 1.0, 10, dtype=torch.float64).reshape(5, 2)

    def init(self, streams):
        return {"a": [torch.ones(2)]}, (torch.zeros(2), {"b": torch.zeros(())})

    def upper_loss(self, x, y, batch):
        return ((batch @ y[0] + y[1]["b"] - 1) ** 2).mean()

    def lower_loss(self, x, y, batch):
        return self.upper_loss(x, y, batch) + (x["a"][0].exp() * y[0] ** 2).sum() + y[1]["b"] ** 2

    def upper_batches(self, stream):
        return itertools.repeat(self.rows)

    lower_batches = upper_batches


def test_nested_variables():
    truth = ends(Nested(), ALONE)
    for one in on_ranks(2, lambda ranks: ends(Nested(), ranks)):
        assert max(off(one[level], truth[level]) for level in "xy") < 1e-13


def test_a_problem_that_is_none_is_refused_by_its_name():
    def work(ranks):
        with pytest.raises(ProblemError, match="SimpleNamespace is not a Problem: it lacks init"):
            Levels(spread(SimpleNamespace(upper_loss=None, lower_loss=None), ranks))

    assert on_ranks(2, work) == [None, None]


@component
class Rowwise:
    """A preconditioner that looks inside the loss."""

    own_rows: ClassVar[bool] = True

    def init(self, at):
        return {}

    def prepare(self, system, state):
        return None, state


def test_a_component_that_sees_its_own_rows_is_refused_by_name_over_ranks_alone():
    def work(ranks):
        estimator = Implicit(preconditioner=Rowwise())
        setup = Setup(spread(UNEQUAL, ranks), Gradient(), Upper(), estimator, ranks=ranks)
        engine.refuse_mismatch(setup)

    assert work(ALONE) is None
    for said in on_ranks(2, work):
        assert isinstance(said, ProblemError)
        assert str(said).startswith("Rowwise sees the rows of its own rank alone")


# the shipped problems, as the page on many devices has them

PAGE = Path(__file__).parents[2] / "docs" / "many_devices.md"
ROWS = re.findall(r"^\| `(\w+)` \| (right|refused)[,:]", PAGE.read_text("utf-8"), re.MULTILINE)


def slopes(reference, ranks):
    """Both losses and their gradients in x and y where a recipe begins."""
    setup = assemble(recipes.load(reference, ["runtime.dtype=float64"]), ranks)
    state = engine.start(setup)
    losses = setup.levels.losses(next(state.upper_batches), next(state.lower_batches))
    y = tree.map(lambda entry: entry + 0.1, state.y)
    return [calculus.gradients(loss, Point(state.x, y)) for loss in (losses.upper, losses.lower)]


def test_the_page_has_every_shipped_problem():
    assert sorted(name for name, _ in ROWS) == sorted({*registry.references("problems")} - MADE_OF)


MADE_OF = {"learned_start", "over_tasks"}
ELSEWHERE = {"mllm_hft"}
"""Takes minutes to prepare; tests/problems/mllm_hft/test_over_ranks.py has a small one."""


@pytest.mark.parametrize("name", [name for name, _ in ROWS if name not in ELSEWHERE])
def test_each_is_right_or_refused_as_the_page_says(name):
    path = Path(__file__).parents[2] / "recipes" / f"{name}.yaml"
    truth = slopes(path, ALONE)
    for found in on_ranks(2, lambda ranks: slopes(path, ranks)):
        if dict(ROWS)[name] == "refused":
            assert isinstance(found, ProblemError)
            assert "part(batch, rank, ranks)" in str(found)
            continue
        for (value, *got), (expected, *wanted) in zip(found, truth, strict=True):
            assert float(value) == pytest.approx(float(expected), rel=1e-12)
            for one, other in zip(got, wanted, strict=True):
                assert tree.norm(tree.sub(one, other)) <= 1e-12 * tree.norm(other)
