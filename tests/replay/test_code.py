"""The code of a record does what its graph does, operation by operation."""

import math
import operator
import weakref

import pytest
import torch
from torch import Tensor, fx

from bilevel.replay.code import function_of
from bilevel.replay.recorder import ABOVE, Departed, _answering, expect, expect_between

NUMBERS = (-2.5, -0.0, 0.0, 3.0, math.inf, -math.inf, math.nan)
BINARY = (operator.add, operator.sub, operator.mul, max, min)


def graph_of(write, *names):
    """The graph that `write(graph, placeholders)` makes, which returns its output."""
    graph = fx.Graph()
    found = write(graph, *(graph.placeholder(name) for name in names))
    graph.output(None if getattr(getattr(found, "target", None), "has_effect", False) else found)
    return graph


def both(graph, *given):
    """What the code gives, which is what fx gives."""
    found = function_of(graph)(*given)
    expected = fx.GraphModule(torch.nn.Module(), graph).forward(*given)
    assert repr(found) == repr(expected)
    return found


@pytest.mark.parametrize("function", BINARY)
def test_arithmetic_of_any_two_numbers(function):
    graph = graph_of(lambda g, a, b: g.call_function(function, (a, b)), "a", "b")
    for a in NUMBERS:
        for b in NUMBERS:
            both(graph, a, b)


def test_a_negative_constant_is_raised_as_a_whole():
    graph = graph_of(lambda g, a: g.call_function(operator.pow, (-2, a)), "a")
    assert function_of(graph)(2) == 4  # which fx writes as -2 ** a
    graph = graph_of(lambda g, a: g.call_function(operator.neg, (a,)), "a")
    assert both(graph, -3.5) == 3.5
    graph = graph_of(lambda g, a: g.call_function(operator.sub, (a, -1e-30)), "a")
    assert both(graph, 0.0) == 1e-30


def test_arguments_of_all_kinds():
    x = torch.arange(6.0)

    def write(graph, x):
        y = graph.call_function(operator.getitem, (x, (slice(1, None, 2),)))
        y = graph.call_function(torch.full, (torch.Size([3]), math.inf), {"dtype": torch.float64})
        z = graph.call_function(torch.stack, ([y, y],), {"dim": 0})
        n = graph.call_function(Tensor.item, (graph.call_function(torch.sum, (z,)),))
        m = graph.call_function(math.sqrt, (n,))
        return {"z": z, "of": (n, [m, None, "m", True, 3, torch.float16, (x,)])}

    found = both(graph_of(write, "x"), x)
    assert found["of"][1][5] is torch.float16
    assert found["of"][1][6][0] is x


@pytest.mark.parametrize("name", ["gt", "lt", "ge", "le", "eq", "ne"])
@pytest.mark.parametrize("answer", [True, False])
def test_what_is_expected_of_two_numbers(name, answer):
    function = getattr(operator, name)
    graph = graph_of(
        lambda g, a, b: g.call_function(_answering(function), (answer, "a.py:1", a, b)), "a", "b"
    )
    call = function_of(graph)
    for a in NUMBERS:
        for b in NUMBERS:
            if function(a, b) is answer:
                call(a, b)
            else:
                with pytest.raises(Departed, match=r"^a.py:1$"):
                    call(a, b)


@pytest.mark.parametrize(
    ("function", "args", "holds"),
    [
        (expect_between, ("w", -math.inf, "x", math.inf), lambda x: -math.inf < x < math.inf),
        (expect_between, ("w", 0.0, "x", 4), lambda x: 0 < x < 4),
        (ABOVE, (False, "w", "x", 0.0), lambda x: not x > 0),
        (_answering(bool), (True, "w", "x"), bool),
        (_answering(bool), (False, "w", "x"), lambda x: not x),
        (_answering(math.isnan), (True, "w", "x"), math.isnan),
        (expect, (math.nan, "w", "x"), math.isnan),
    ],
)
def test_what_is_expected_of_a_number(function, args, holds):
    graph = graph_of(
        lambda g, x: g.call_function(function, tuple(x if a == "x" else a for a in args)), "x"
    )
    call = function_of(graph)
    for x in NUMBERS:
        if holds(x):
            call(x)
        else:
            with pytest.raises(Departed):
                call(x)


def test_memory_is_given_back_after_the_last_use():
    kept = []

    def seen(value):
        kept.append(weakref.ref(value))
        return torch.ones(1)

    def write(graph, x):
        y = graph.call_function(torch.exp, (x,))
        first = graph.call_function(seen, (y,))
        last = graph.call_function(lambda one: torch.tensor(kept[0]() is None), (first,))
        return (first, last)

    assert function_of(graph_of(write, "x"))(torch.ones(3))[1]


def test_strings_are_literals_and_nothing_that_runs():
    text = '\'); raise SystemExit #\n"""'
    found = both(graph_of(lambda g, x: {text: (x, text)}, "x"), 1.0)
    assert found == {text: (1.0, text)}
    graph = graph_of(lambda g, x: g.call_function(dict, (), {"a=1, b": x}), "x")
    with pytest.raises(SyntaxError):  # torch.fx would write it as it is
        function_of(graph)


def test_what_is_no_literal_is_named():
    class Text(str):
        __slots__ = ()

        def __repr__(self):
            return "1 / 0"

    class Number(float):
        def __repr__(self):
            return "1 / 0"

    call = function_of(graph_of(lambda g, x: (x, Text("a"), Number(2.0)), "x"))
    assert call(1.0) == (1.0, "a", 2.0)
