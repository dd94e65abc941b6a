"""Numbers that go into tensor operations, as tensors: what is compiled does not wait for them."""

import math

import pytest
import torch

from bilevel import tree
from bilevel.linear.cg import CG
from bilevel.replay import regions
from bilevel.replay.program import Departed, Feed, record
from bilevel.replay.regions import CannotCompile, Compiler
from bilevel.scalars.functions import call, larger, smaller, sqrt
from tests.replay.steps import X, long

A = torch.diag(torch.linspace(1, 4, 3, dtype=torch.float64)) + 0.1


def regions_of(step, given=X, draws=None):
    """(result of the step, program, how many operations each compiled region has)."""
    lengths = []

    def stand_in(region, _):
        lengths.append(sum(node.op == "call_function" for node in region.graph.nodes))
        return lambda args: list(region(*args))

    found, program = record(step, given, Feed(draws or {}).iterators())
    program.compile(Compiler("some", "some", stand_in, "done"))
    return found, program, lengths


def scaled(number, entry=lambda x: x):
    """A step that is one region if the number needs not be read."""

    def step(x, _):
        y = long(x)
        return long(number(y.sum().item(), y.max().item(), entry(y)))

    return step


@pytest.mark.parametrize(
    "number",
    [
        lambda a, b, y: tree.add_scaled(y, a / b, y),
        lambda a, b, y: tree.add_scaled(y, -abs(a) * 0.5, y),
        lambda a, b, y: tree.scale(2.0 - a, {"y": y})["y"],
        lambda a, b, y: tree.scale(sqrt(a * a + 1.0), {"y": y})["y"],
        lambda a, b, y: y * larger(a, b) + smaller(a, 0.25) * y,
        lambda a, b, y: (1.0 / (3.0 + a)) * y - y / (b**2 + 1),
        lambda a, b, y: tree.add(*[tree.axpy(a, {"y": y, "z": y}, {"y": y, "z": y})] * 2)["z"],
        lambda a, b, y: tree.scale(a, {"y": y, "z": y})["z"],
        lambda a, b, y: tree.mul({"y": y * a, "z": y}, {"y": y, "z": y})["y"],
        lambda a, b, y: a - y,
    ],
)
def test_one_region_whatever_is_computed_of_numbers(number):
    step = scaled(number)
    found, program, lengths = regions_of(step)
    assert len(lengths) == 1
    for x in (X, X.flip(0) * 2):
        torch.testing.assert_close(program(x, Feed({})), step(x, None), rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(found, step(X, None), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entry", [lambda y: y, lambda y: y.sum()])
def test_the_dtype_of_a_result_is_that_of_the_tensor(dtype, entry):
    step = scaled(lambda a, b, y: tree.add_scaled(y, a / b, y), entry)
    x = X.to(dtype)
    _, program, lengths = regions_of(step, x)
    assert len(lengths) == 1
    found, expected = program(x, Feed({})), step(x, None)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected)


def test_a_number_that_is_not_read_from_a_tensor_stays_one():
    """Of an integer tensor, of a batch, and of a function that torch has not under its name."""

    def step(x, draws):
        y = long(x * next(draws["lower"])["weight"])
        return long(y * y.argmax().item()), long(y * call(math.exp, y.max().item()))

    batches = [{"weight": 0.5}, {"weight": 0.7}]
    found, program, lengths = regions_of(step, draws={"lower": iter(batches)})
    assert len(lengths) == 2
    again = program(X, Feed({"lower": iter(batches[:1])}))
    assert all(torch.equal(one, other) for one, other in zip(again, found, strict=True))
    other = program(X, Feed({"lower": iter(batches[1:])}))
    expected = step(X, {"lower": iter(batches[1:])})
    assert all(torch.equal(one, two) for one, two in zip(other, expected, strict=True))


@pytest.mark.parametrize(
    "number",
    [
        lambda z: 1 / (1 / z + 1),
        lambda z: 1 / (1 + (1 / (z + 1e-300)) ** 300.0),
        lambda z: sqrt(z - 1) * 0,
    ],
)
def test_where_arithmetic_of_numbers_raises_it_departs(number):
    """Though what is lifted comes to a finite tensor, or to one that is masked."""

    def step(x, _):
        return long(long(x) * (1 + number(x[0].item())))

    _, program, lengths = regions_of(step, X + 1.5)
    assert len(lengths) == 1
    with pytest.raises((ArithmeticError, ValueError)):
        step(X - X[0], None)
    with pytest.raises(Departed):
        program(X - X[0], Feed({}))


def test_numbers_that_stay_numbers_keep_lists_of_tensors():
    """A count of steps scales several entries at once."""

    def step(x, draws):
        y = {"a": long(x), "b": long(x + 1)}
        return tree.axpy(1 / next(draws["lower"])["count"], y, y), tree.scale(
            x.argmax().item() + 1, y
        )

    counts = [{"count": 3}, {"count": 7}]
    _, program, _ = regions_of(step, draws={"lower": iter(counts)})
    found = program(X, Feed({"lower": iter(counts[1:])}))
    expected = step(X, {"lower": iter(counts[1:])})
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in other)


def test_what_cannot_be_lifted_is_replayed_uncompiled(monkeypatch):
    monkeypatch.setattr(regions, "lift", lambda graph: {}["form"])
    with pytest.raises(CannotCompile, match="KeyError"):
        regions_of(lambda x, _: long(x))


def test_conjugate_gradient_is_one_region_and_departs_where_it_ends_earlier():
    def step(b, _):
        solver = CG(iterations=3, tolerance=1e-6)
        return solver.solve(
            lambda p: {"v": A @ p["v"]}, {"v": b}, {"v": torch.zeros(3).double()}
        ).solution

    _, program, lengths = regions_of(step)
    assert len(lengths) == 1
    for b in (X, X.flip(0) - 3):
        found = program(b, Feed({}))["v"]
        torch.testing.assert_close(found, torch.linalg.solve(A, b), rtol=1e-5, atol=0)
    with pytest.raises(Departed, match=r"linear/cg\.py"):  # an eigenvector: one step
        program(torch.linalg.eigh(A).eigenvectors[:, 0].contiguous(), Feed({}))


def test_a_view_is_made_where_it_is_wanted():
    """As a result of a region it would be copied, with the data that it is a view of."""

    def step(x, draws):
        data = next(draws["upper"])
        y = long(data.T @ long(x))
        if y.sum().item() > 100:
            return y
        return long(data.T @ long(y + next(draws["upper"])[0]))

    found, program, lengths = regions_of(step, draws={"upper": iter([A, A + 1])})
    assert len(lengths) == 2
    called = {node.target for node in program.graph.nodes}
    assert torch.clone not in called
    assert torch.equal(program(X, Feed({"upper": iter([A, A + 1])})), found)
