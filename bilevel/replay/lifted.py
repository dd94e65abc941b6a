"""Numbers of a record that go into tensor operations, as tensors: what is compiled need not wait for them.

A step of conjugate gradient reads ‖r‖² and pᵀA p, and scales vectors by their quotient: each number read
ends a region that could be compiled. Here the quotient is computed from tensors as well, in float64 as in
Python. What Python decides on the numbers is looked at as before, when the region has been computed.
"""

# The foreach functions are what torch.optim itself is built on; torch exports no other name.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from bilevel.replay.graph import drop_unused

_ARITHMETIC: dict[Any, Callable[..., Tensor]] = {
    operator.add: torch.add,
    operator.sub: torch.sub,
    operator.mul: torch.mul,
    operator.truediv: torch.div,
    operator.pow: torch.pow,
    operator.neg: torch.neg,
    operator.abs: torch.abs,
    math.sqrt: torch.sqrt,
    max: torch.maximum,
    min: torch.minimum,
}
_LISTS: dict[Any, Callable[..., Tensor]] = {
    torch._foreach_add: torch.add,
    torch._foreach_sub: torch.sub,
    torch._foreach_mul: torch.mul,
    torch._foreach_div: torch.div,
}
_TAKEN = {
    *_LISTS.values(),
    operator.add,
    operator.sub,
    operator.mul,
    operator.truediv,
}
"""Functions of two that may have a tensor and a number."""


def lift(graph: fx.Graph) -> None:
    """Have it come to the same results, but for rounding, in fewer steps that wait for a number.

    A quotient of numbers is still taken, after the tensors: where it is one by zero the replay departs.
    """
    put = _Lift(graph)
    for node in list(graph.nodes):
        if node.op == "call_function":
            put(node)
    drop_unused(graph)


class _Lift:
    """Puts tensor operations in the place of those that take a number, or lists of tensors."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._numbers: dict[fx.Node, fx.Node | None] = {}
        """A number as a tensor; None where it is not read from tensors alone."""

    def __call__(self, node: fx.Node) -> None:
        with self._graph.inserting_before(node):
            if node.target in _LISTS:
                self._apart(node)
            elif (
                _is_tensor(node)
                and node.target in _TAKEN
                and len(node.args) == 2
                and node.kwargs.keys() <= {"alpha", "out"}
            ):
                made = self._made(node.target, *node.args, **node.kwargs)
                if made is not None:
                    self._replace(node, made)

    def _made(self, function: Any, *given: Any, alpha: Any = 1, out: Any = None) -> fx.Node | None:
        """function(*given) of tensors alone; None where it is so, or cannot be made so."""
        function = _ARITHMETIC.get(function, function)
        one, other = (self._as_tensor(part) for part in given)
        scale = self._as_tensor(alpha)
        if not any(_is_number(part) for part in (*given, alpha)) or None in (one, other, scale):
            return None
        if alpha != 1:
            other = self._call(torch.mul, other, self._fitted(scale, other))
        if _is_number(given[0]):
            one = self._fitted(one, other)
        if _is_number(given[1]):
            other = self._fitted(other, one)
        return self._call(function, one, other)

    def _apart(self, node: Any) -> None:
        """A function of lists as one of each entry."""
        first, *others = node.args
        function = _LISTS[node.target]
        made = []
        for k, entry in enumerate(first):
            given = [other[k] if isinstance(other, (list, tuple)) else other for other in others]
            one = self._made(function, entry, *given, **node.kwargs)
            if one is None and any(_is_number(part) for part in (*given, *node.kwargs.values())):
                return  # a number that stays one
            made.append(one or self._call(function, entry, *given, **node.kwargs))
        for user in list(node.users):
            assert user.target is operator.getitem
            self._replace(user, made[user.args[1]])

    def _as_tensor(self, value: Any) -> Any:
        """A number that is read as the tensor that it is read from, or is computed of such; others as they are."""
        if not _is_number(value):
            return value
        if value not in self._numbers:
            self._numbers[value] = self._computed(value)
        return self._numbers[value]

    def _computed(self, node: Any) -> fx.Node | None:
        if node.target is Tensor.item:
            (value,) = node.args
            if not value.meta["form"][2].is_floating_point:
                return None
            if value.meta["form"][0] != ():
                value = self._call(torch.reshape, value, ())
            return self._cast(value, torch.float64)
        function = _ARITHMETIC.get(node.target)
        if function is None or node.kwargs:
            return None
        given = [self._as_tensor(part) for part in node.args]
        if None in given:
            return None
        like = next((part for part in given if isinstance(part, fx.Node)), None)
        if like is None:
            return None
        # which is where torch takes no number of Python
        needed = len(given) if function in (torch.maximum, torch.minimum) else 1
        for k in range(needed):
            if not isinstance(given[k], fx.Node):
                given[k] = self._call(torch.full_like, like, given[k])
        return self._call(function, *given)

    def _fitted(self, number: Any, entry: Any) -> Any:
        """A number beside a tensor, whose dtype a result has, also where that has no dimensions."""
        if isinstance(number, fx.Node) and not entry.meta["form"][0]:
            return self._cast(number, entry.meta["form"][2])
        return number

    def _cast(self, value: fx.Node, dtype: torch.dtype) -> fx.Node:
        if value.meta["form"][2] is dtype:
            return value
        return self._call(torch.ops.aten._to_copy.default, value, dtype=dtype)

    def _call(self, function: Any, *given: Any, **options: Any) -> fx.Node:
        """An operation on tensors, which knows the form of its result."""
        node = self._graph.call_function(function, given, options)
        found = function(*map_arg(given, _formed), **options)
        form, device = (
            (found.shape, found.stride(), found.dtype),
            next(one.meta["device"] for one in node.all_input_nodes),
        )
        node.meta.update(form=form, device=device, is_tensor=True)
        return node

    def _replace(self, node: fx.Node, made: fx.Node) -> None:
        if made.meta["form"] == node.meta["form"] and made.meta["device"] == node.meta["device"]:
            node.replace_all_uses_with(made)


def _is_tensor(node: Any) -> bool:
    return "form" in node.meta


def _is_number(value: Any) -> bool:
    """Whether an argument is a number that is computed in a replay."""
    return isinstance(value, fx.Node) and not _is_tensor(value)


def _formed(node: fx.Node) -> Tensor:
    shape, stride, dtype = node.meta["form"]
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
