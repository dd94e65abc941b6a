"""Records with their regions compiled: what is cut where, and what still departs. The compiler is a stand-in."""

import itertools
import shutil

import pytest
import torch

from bilevel.replay.inductor import MATRIX, by_inductor
from bilevel.replay.program import Departed, Feed, record
from bilevel.replay.regions import CannotCompile
from tests.replay.steps import StandIn, X, compiler, long


def recorded(function, draws=None):
    return record(function, X, Feed(draws or {}).iterators())


def test_what_nothing_lies_between_is_one_region():
    found, program = recorded(lambda x, _: [long(x), x.sin()])
    by = StandIn()
    program.compile(compiler(by))
    assert by.regions == [["sin", "add", "exp", "sub", "cos", "sin"]]
    assert all(torch.equal(a, b) for a, b in zip(program(X, Feed({})), found, strict=True))
    program.restore()
    assert not program.is_compiled


def reading(x, _):
    y = long(x) + x
    size = y.sum().item()
    return long(y * size) if size < 50 else y


@pytest.mark.parametrize(("is_exact", "lengths"), [(True, [7, 5]), (False, [13])])
def test_a_number_that_is_read_ends_a_region_where_bits_are_to_be_the_same(is_exact, lengths):
    found, program = recorded(reading)
    by = StandIn()
    program.compile(compiler(by, is_exact=is_exact))
    assert [len(names) for names in by.regions] == lengths
    torch.testing.assert_close(program(X, Feed({})), found, rtol=0 if is_exact else 1e-15, atol=0)
    with pytest.raises(Departed):  # which is still looked at
        program(X + 40.0, Feed({}))


def test_a_draw_waits_for_what_was_decided_before_it():

    def step(x, draws):
        for k in range(2):
            batch = next(draws["lower"])
            x = long(x + batch) + batch * (2 + k)
            if x.sum().item() > 100:
                break
        return x

    found, program = record(step, X, {"lower": iter([X, X])}, apart=True)
    by = StandIn()
    program.compile(compiler(by))
    assert [len(names) for names in by.regions] == [9, 9]
    assert torch.equal(program(X, Feed({"lower": iter([X, X])})), found)
    drawn = itertools.count()
    feed = Feed({"lower": ((next(drawn), b)[1] for b in [torch.full_like(X, 40.9), X])})
    with pytest.raises(Departed):
        program(X, feed)
    assert next(drawn) == 1  # the second batch is left to the step that is taken by itself


def test_regions_that_are_alike_share_a_function():
    def step(x, draws):
        for _ in range(4):
            x = long(x) + next(draws["lower"])
            if x.sum().item() > 100:
                break
        return x

    batches = [X, X + 1, X + 2, X + 3]
    found, program = record(step, X, {"lower": iter(batches)}, apart=True)
    by = StandIn()
    program.compile(compiler(by))
    assert [len(names) for names in by.regions] == [12, 7]
    assert torch.equal(program(X, Feed({"lower": iter(batches)})), found)
    program.restore()
    by = StandIn()
    program.compile(compiler(by, is_exact=True))  # what reads data and weights where they are
    assert [len(names) for names in by.regions] == [12, 7, 7]
    assert torch.equal(program(X, Feed({"lower": iter(batches)})), found)


def test_results_are_tensors_of_their_own():
    def merging(region, given):
        return lambda args: [region(*args)[0]] * 2

    _, program = recorded(lambda x, _: [long(x), long(x)])
    program.compile(compiler(merging))
    a, b = program(X, Feed({}))
    assert torch.equal(a, b)
    assert a.data_ptr() != b.data_ptr()


def broken(region, given):
    raise RuntimeError("no compiler\nat all")


def transposed(region, given):
    return lambda args: [one.T.contiguous().T for one in region(*args)]


@pytest.mark.parametrize(
    ("step", "by", "reason"),
    [
        (lambda x, _: long(x.clone().add_(1.0)), StandIn(), "writes into its own tensors"),
        (lambda x, _: x + 1, StandIn(), "no 4 operations follow each other"),
        (lambda x, _: long(x), broken, "^RuntimeError: no compiler$"),
        (lambda x, _: long(x * torch.ones(2, 1)), transposed, "in another way"),
    ],
)
def test_what_cannot_be_compiled_is_replayed_as_it_is(step, by, reason):
    found, program = recorded(step)
    with pytest.raises(CannotCompile, match=reason):
        program.compile(compiler(by))
    assert not program.is_compiled
    assert torch.equal(program(X, Feed({})), found)


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")),
    reason="needs a C++ compiler: g++ or clang++",
)
def test_the_compiler_itself():
    """Fused operations and products, with a number that is read between them and still looked at."""
    A = torch.linspace(-1, 1, 9, dtype=torch.float64).reshape(3, 3)
    tall = torch.linspace(-1, 1, 2 * MATRIX, dtype=torch.float64)[: 3 * (MATRIX // 2)].reshape(
        -1, 3
    )

    def step(x, _):
        y = x + A @ long(A @ long(x)) + tall.T @ long(tall @ x) / MATRIX
        row, column = y.unsqueeze(0), y.unsqueeze(1)
        y = y + (row @ A)[0] + (A.T @ column)[:, 0] + (column @ row).sum(0) + (A @ A @ column)[:, 0]
        low, at = (row.sin() + column).min(
            1
        )  # what gives several tensors, and what they are used for
        y = y + low + at + torch.nn.functional.layer_norm(y, (3,))
        y = y + torch.nn.functional.cross_entropy(row.cos() + column, torch.tensor([0, 2, 1]))
        return long(y) if y.sum().item() < 50 else y

    found, program = recorded(step)
    program.compile(compiler(by_inductor))
    for x in (X, X.flip(0) * 2):
        torch.testing.assert_close(program(x, Feed({})), step(x, None), rtol=1e-12, atol=1e-13)
    with pytest.raises(Departed):
        program(X + 40, Feed({}))
    program.restore()
    assert torch.equal(program(X, Feed({})), found)
