"""Sums over ranks: their derivatives of every order, what is theirs and what is everyone's."""

import ast
import builtins
import os
import re
import signal
from datetime import timedelta

import pytest
import torch
from torch.autograd import forward_ad
from torch.distributed import HashStore
from torch.fx.experimental.proxy_tensor import make_fx
from torch.multiprocessing import ProcessExitedException

from bilevel import minimize
from bilevel import ranks as over
from bilevel.errors import ProblemError, RankError, RecipeError, RequirementError
from bilevel.ranks import ALONE, Ranks, apart, by_rows, enter, leave
from bilevel.run.placement import device
from bilevel.unrolling.forward_over_reverse import _load
from tests.imports import PACKAGE
from tests.ranks import on_ranks

A = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def loss(w, b, rows):
    """A mean over rows and a penalty, neither linear nor quadratic."""
    return ((rows @ w).tanh() ** 2).mean() + b * (w**4).sum()


def orders(function):
    """The value, the gradients, a Hessian product, and a product with third derivatives."""
    w = torch.linspace(0.5, 1.5, 3, dtype=torch.float64).requires_grad_()
    b = torch.tensor(0.01, dtype=torch.float64).requires_grad_()
    value = function(w, b)
    first = torch.autograd.grad(value, [w, b], create_graph=True)
    second = torch.autograd.grad(first[0].sum(), [w, b], create_graph=True)
    third = torch.autograd.grad(second[0].sum() + second[1], [w, b])
    return [part.detach() for part in (value, *first, *second, *third)]


def on_parts(ranks, w, b, enters=True, leaves=True, weight=None):
    part, share = by_rows({"A": A}, ranks.rank, ranks.size)
    w, b = enter(ranks, [w, b]) if enters else (w, b)
    own = (share if weight is None else weight) * loss(w, b, part["A"])
    return leave(ranks, own) if leaves else own


@pytest.mark.parametrize("size", [2, 3])
def test_every_order_is_that_of_the_whole_and_the_same_bits_on_each_rank(size):
    truth = orders(lambda w, b: loss(w, b, A))
    found = on_ranks(size, lambda ranks: orders(lambda w, b: on_parts(ranks, w, b)))
    for one in found:
        for got, expected in zip(one, truth, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)
    assert all(torch.equal(a, b) for one in found for a, b in zip(one, found[0], strict=True))


def test_none_of_it_is_there_for_nothing():
    """Controls: without Leave, without Enter, and with equal weights of 4 and 3 rows."""
    truth = orders(lambda w, b: loss(w, b, A))

    def work(ranks):
        changes = {"leaves": False}, {"enters": False}, {"weight": 0.5}
        return [orders(lambda w, b, c=change: on_parts(ranks, w, b, **c)) for change in changes]

    for one in on_ranks(2, work):
        for found in one:
            off = [abs(float((g - t).norm() / t.norm())) for g, t in zip(found, truth, strict=True)]
            assert max(off) > 1e-2


def test_forward_mode_and_traces_see_the_sums():
    direction = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    w, b = torch.ones(3, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)

    def along(function):
        """(the derivative of the loss, and of its gradient), along a direction by forward mode."""
        _load()
        leaf = w.clone().requires_grad_()
        with forward_ad.dual_level():
            # b has a gradient and no tangent
            moving, still = forward_ad.make_dual(leaf, direction), b.clone().requires_grad_()
            value = function(moving, still)
            (gradient,) = torch.autograd.grad(value, [moving], create_graph=True)
            parts = (value, gradient)
            return [forward_ad.unpack_dual(part).tangent.detach() for part in parts]

    def work(ranks):
        def gradient(w):
            w = w.detach().requires_grad_()
            return torch.autograd.grad(on_parts(ranks, w, b), w)[0]

        graph = make_fx(gradient, tracing_mode="fake", _allow_non_fake_inputs=True)(w)
        before = ranks.ledger.calls
        return along(lambda w, b: on_parts(ranks, w, b)), graph(w), ranks.ledger.calls - before

    truth = along(lambda w, b: loss(w, b, A))
    leaf = w.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(leaf, b, A), leaf)
    for tangents, traced, calls in on_ranks(2, work):
        for got, expected in zip(tangents, truth, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)
        torch.testing.assert_close(traced, slope, rtol=1e-13, atol=0)
        assert calls >= 1  # a trace that is replayed is counted


def contrast(w, rows):
    """InfoNCE: each row against all; the mean over this part's rows."""
    made = rows @ torch.outer(w, w)
    everyone = over.rows(made)
    own = over.own_rows(len(rows))
    logits = made @ everyone.T
    return torch.nn.functional.cross_entropy(logits, torch.arange(own.start, own.stop))


def by_tokens(w, rows):
    """A mean over the entries above zero, of which each row has another number."""
    counted = (rows > 0).to(rows.dtype)
    per_row = over.share(counted.sum()) / over.share(torch.tensor(float(len(rows))))
    return ((rows * w).tanh() * counted).sum() / len(rows) / per_row


@pytest.mark.parametrize("function", [contrast, by_tokens])
def test_losses_that_need_other_rows_than_their_own(function):
    def all_of(evaluate):
        w = torch.linspace(0.5, 1.5, 3, dtype=torch.float64).requires_grad_()
        value = evaluate(w)
        (first,) = torch.autograd.grad(value, w, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), w)
        return [value.detach(), first.detach(), second]

    def work(ranks):
        part, weight = by_rows(A, ranks.rank, ranks.size)

        def spread(w):
            return leave(ranks, weight * function(*enter(ranks, [w]), part))

        with apart():  # and one process alone has the whole
            whole = all_of(lambda w: function(w, A))
        return all_of(spread), whole

    truth = all_of(lambda w: function(w, A))
    for got, whole in on_ranks(3, work):
        assert all(torch.equal(a, b) for a, b in zip(whole, truth, strict=True))
        for one, expected in zip(got, truth, strict=True):
            torch.testing.assert_close(one, expected, rtol=1e-12, atol=0)


def test_alone_each_is_the_identity():
    value = torch.ones(3)
    same = leave(ALONE, value), enter(ALONE, [value])[0], over.share(value), over.rows(value)
    assert all(one is value for one in same)
    assert over.own_rows(3) == slice(0, 3)
    assert over.join() is ALONE
    assert ALONE.most(4) == 4


def test_rows_of_a_batch():
    batch = {"a": torch.arange(5), "label": [torch.arange(10).reshape(5, 2)], "scale": 3.0}
    parts = [by_rows(batch, rank, 2) for rank in range(2)]
    assert [weight for _, weight in parts] == [0.6, 0.4]
    assert torch.cat([part["a"] for part, _ in parts]).equal(batch["a"])
    assert torch.cat([part["label"][0] for part, _ in parts]).equal(batch["label"][0])
    assert by_rows({"scale": torch.tensor(2.0)}, 1, 4) == ({"scale": torch.tensor(2.0)}, 0.25)
    assert by_rows(None, 0, 2) == (None, 0.5)
    with pytest.raises(ProblemError, match=r"batch\['a'\] has 5 rows and batch\['b'\] has 4"):
        by_rows({"a": torch.ones(5), "b": torch.ones(4)}, 0, 2)
    with pytest.raises(ProblemError, match="has 2 rows, and 3 ranks are to have a part"):
        by_rows(torch.ones(2), 0, 3)


def test_what_ranks_tell_each_other():
    def work(ranks):
        told = ranks.most(ranks.rank), ranks.every(10 * ranks.rank), ranks.gather(ranks.rank)
        first = ranks.from_first("found" if ranks.is_first else None)
        try:
            with ranks.telling("its work"):
                if ranks.rank == 1:
                    raise ValueError("wrong there")
        except (ValueError, RankError) as error:
            return told, first, type(error), str(error)

    zero, one = on_ranks(2, work)
    assert zero[:2] == one[:2] == ((1, [0, 10], [0, 1]), "found")
    assert zero[2:] == (RankError, "rank 1 failed in its work: ValueError: wrong there")
    assert one[2:] == (ValueError, "wrong there")


def test_a_rank_counts_its_calls_and_bytes():
    def work(ranks):
        ranks.sum([torch.ones(3, dtype=torch.float64), torch.ones(2, dtype=torch.float64)])
        one = ranks.ledger.calls, ranks.ledger.bytes
        ranks.sum([torch.ones(3), torch.ones((), dtype=torch.float64)])  # two kinds, two calls
        return one, (ranks.ledger.calls, ranks.ledger.bytes)

    assert on_ranks(2, work) == [((1, 40), (3, 60))] * 2


def test_ranks_that_sum_other_things_than_each_other_are_told_so():
    """gloo ends the process where sizes differ, so that nothing could be said."""

    def work(ranks):
        ranks.sum([torch.ones(3), torch.ones(2)])
        ranks.sum([torch.ones(4 + ranks.rank)])

    for found in on_ranks(2, work):
        assert isinstance(found, RankError)
        assert str(found).startswith(
            "rank 0 of 2 sums 4 numbers in 1 tensors where rank 1 sums 5 numbers in 1 tensors: they "
            "do not take the same steps. A component sees"
        )


def test_it_is_watched_at_first_and_costs_nothing_later(monkeypatch):
    monkeypatch.setattr(over, "WATCHED", 2)

    def work(ranks):
        asked = []
        true = ranks.require_same
        ranks.require_same = lambda values: (asked.append(len(values)), true(values))
        for _ in range(4):
            ranks.sum([torch.ones(3)])
        return asked, ranks.ledger.calls

    assert on_ranks(2, work) == [([1, 1], 4)] * 2


def test_a_rank_that_waits_for_one_that_has_ended_says_so():
    def work(ranks):
        if ranks.rank == 0:
            ranks.sum([torch.ones(3)])

    waited, ended = on_ranks(2, work)
    assert ended is None
    assert isinstance(waited, RankError)
    assert str(waited).startswith("rank 0 of 2 waited in vain: ")


@pytest.mark.parametrize("asked", ["cuda:1", "mps"])
def test_one_device_for_several_ranks_is_refused(asked):
    two = Ranks(rank=1, size=2, local=1, group=object())
    said = (
        f"runtime.device = '{asked}' is one device, and there are 2 ranks; set runtime.device=cuda"
    )
    with pytest.raises(RecipeError, match=re.escape(said)):
        device(asked, ranks=two)
    assert device("cpu", ranks=two) == torch.device("cpu")
    assert device("cpu") == torch.device("cpu")


def test_of_several_ranks_each_has_the_device_of_its_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    at = [Ranks(rank=r, size=3, local=r, group=object()) for r in range(3)]
    assert [device(name, ranks=at[1]) for name in ("auto", "cuda")] == [torch.device("cuda", 1)] * 2
    assert device("cuda", ranks=at[0]) == device("cuda") == torch.device("cuda", 0)
    with pytest.raises(
        RequirementError, match=r"for rank 2 of this machine, but .* 2 CUDA devices"
    ):
        device("cuda", ranks=at[2])


# a process alone does without


def test_torch_distributed_is_imported_by_ranks_alone_and_there_when_used():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text("utf-8")
        if path.name != "ranks.py":
            # what starts ranks sends nothing
            sends = re.sub(r"torch\.distributed(,|\.(elastic|launcher)\b)", "", text)
            assert "torch.distributed" not in sends, path
            continue
        top = [
            node for node in ast.parse(text).body if isinstance(node, (ast.Import, ast.ImportFrom))
        ]
        assert not [node for node in top if "distributed" in ast.unparse(node)]


def test_a_run_of_one_rank_asks_for_none_of_it(monkeypatch):
    asked, real = [], builtins.__import__

    def note(name, given=None, *rest):
        if name.startswith("torch.distributed") or (
            name == "torch" and "distributed" in (rest[1] or ())
        ):
            asked.append((given or {}).get("__name__", ""))
        return real(name, given, *rest)

    monkeypatch.setattr(builtins, "__import__", note)
    minimize("quadratic", steps=1, progress=False)
    assert [name for name in asked if name.startswith("bilevel")] == []
    monkeypatch.setenv("WORLD_SIZE", "2")  # control: what joins a group is seen
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(
        RankError, match=r"rank \? of 2 finds no others at \(MASTER_ADDR is not set\)"
    ):
        over.join()
    assert "bilevel.ranks" in asked


@pytest.mark.parametrize("said", ["", " ", "1", "01"])
def test_one_rank_is_alone(said, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", said)
    assert over.announced() == 1
    assert over.join() is ALONE


@pytest.mark.parametrize("said", ["0", "-2", "two", "2.0", "²"])
def test_what_is_no_number_of_ranks_is_refused(said, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", said)
    with pytest.raises(RankError, match=f"WORLD_SIZE='{said}'; expected how many ranks"):
        over.join()


def test_a_signal_is_heard_while_ranks_connect():
    """One that connects waits in torch's C++, for ever where another was killed before it connected."""
    store = HashStore()
    wait = lambda seconds: store.wait(["heard"], timedelta(seconds=seconds))  # noqa: E731
    before = signal.signal(signal.SIGALRM, lambda number, frame: store.set("heard", ""))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        assert over.heedful(lambda: (wait(60.0), 7)) == (None, 7)
        store.delete_key("heard")
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(RuntimeError, match="timeout"):  # control: what waits in the main thread
            wait(0.5)
    finally:
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(KeyError, match="mine"):  # and what the work raises is raised here
        over.heedful(lambda: {}["mine"])


@pytest.mark.parametrize(
    ("number", "times"), [(signal.SIGSEGV, 1), (signal.SIGSEGV, 2), (signal.SIGKILL, 1)]
)
def test_a_test_on_ranks_is_begun_again_after_one_crash_of_torch_and_after_nothing_else(
    number, times, tmp_path
):
    def work(ranks):
        done = len([*tmp_path.iterdir()])
        ranks.every(0)
        if ranks.rank == 1 and done < times:
            (tmp_path / str(done)).touch()
            signal.signal(number, signal.SIG_DFL) if number != signal.SIGKILL else None
            os.kill(os.getpid(), number)
        return done

    if (number, times) == (signal.SIGSEGV, 1):
        assert on_ranks(2, work) == [1, 1]
    else:
        with pytest.raises(ProcessExitedException, match=number.name):
            on_ranks(2, work)
