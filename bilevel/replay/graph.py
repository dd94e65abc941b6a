"""The graph of a recorded step made shorter, to the same bits.

Operations that no result and no expectation needs go; so do detached aliases, since a replay has no
autograd, and products with 1; so does what is computed twice, such as the second derivatives that every Hessian product
of one point takes again. What is left is called by torch's own names where it has them, which cost
half as much from Python as the overloads of a dispatch mode.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Set
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from bilevel.replay.recorder import ABOVE, BELOW, expect_between, is_dynamic
from bilevel.scalars.scalar import LARGE

aten = torch.ops.aten
_OWN: Any = torch._C._VariableFunctions  # pyright: ignore[reportAttributeAccessIssue]
_RAISING = {operator.truediv, operator.floordiv, operator.mod, operator.pow, math.sqrt}
"""Of numbers: by zero, beyond the largest, of a negative one."""
_ALIASES = {aten.detach.default, aten.alias.default}


def shorten(graph: fx.Graph, written: Set[int]) -> list[Tensor]:
    """All of it, in place; what is computed once is returned, for placeholders at the front.

    `written` is memory that the step writes into, whose operations stay.
    """
    results = {id(node) for node in graph.output_node().all_input_nodes}
    _drop_aliases(graph, written)
    _join_products(graph)
    _drop_ones(graph, written)
    _merge(graph, written, results)
    _join_bounds(graph)
    drop_unused(graph)
    fixed = _take_out_fixed(graph, written, results)
    drop_unused(graph)
    for node in graph.nodes:
        if isinstance(node.target, OpOverload):
            node.meta["is_mutable"] = node.target._schema.is_mutable
            node.meta["has_effect"] = has_effect(node)
            is_own = node.target.namespace == "aten" and (
                "form" in node.meta or _gives_several(node)
            )
            node.meta["is_tensor"] = is_own and not _has_any_shape(node)
        elif node.target is operator.getitem and "form" in node.meta:
            node.meta["is_tensor"] = node.args[0].meta.get("is_tensor", False)
        node.target = _quick(node)
    return fixed


def _drop_aliases(graph: fx.Graph, written: Set[int]) -> None:
    for node in graph.nodes:
        if node.target in _ALIASES and node.meta["memory"] not in written:
            node.replace_all_uses_with(node.args[0])


def _join_products(graph: fx.Graph) -> None:
    """A vector times a matrix, which torch takes apart into three operations, as the one it was."""
    for node in graph.nodes:
        product = node.prev
        if node.target not in _SQUEEZES or node.args != (product, 0):
            continue
        row = product.args[0] if product.target is aten.mm.default else None
        if row is None or row.target is not aten.unsqueeze.default or row.args[1] != 0:
            continue
        with graph.inserting_before(product):
            joined = graph.call_function(aten.matmul.default, (row.args[0], product.args[1]))
        joined.meta.update(product.meta)
        for old in (node, product):  # the second is used where the first was in place
            old.replace_all_uses_with(joined)
            graph.erase_node(old)


def _drop_ones(graph: fx.Graph, written: Set[int]) -> None:
    """A product with 1, of which backward passes take many, unless somebody may write into it."""
    kept = written | {node.meta.get("memory") for node in graph.output_node().all_input_nodes}
    for node in graph.nodes:
        if node.target is not aten.mul.Tensor or node.meta["memory"] in kept:
            continue
        for one, other in (node.args, node.args[::-1]):
            if not isinstance(other, fx.Node):
                continue
            if _is_one(one, written) and _goes_on(node, other, written):
                node.replace_all_uses_with(other)
                break


def _is_one(node: Any, written: Set[int]) -> bool:
    value = node.meta.get("value") if isinstance(node, fx.Node) else None
    if value is None or value.dim() or node.meta["memory"] in written:
        return False
    return bool(value == 1)


def _goes_on(node: fx.Node, other: fx.Node, written: Set[int]) -> bool:
    """Whether a result of the dtype of what it was made of goes into tensor operations alone."""
    if other.meta.get("dtype") is not node.meta["dtype"] or other.meta["memory"] in written:
        return False
    return all(isinstance(user.target, OpOverload) for user in node.users)


_SQUEEZES = {aten.squeeze.dim, aten.squeeze_.dim}


def _merge(graph: fx.Graph, written: Set[int], results: Set[int]) -> None:
    """One of operations that are the same, unless it writes or reads what is written, or is large."""
    seen: dict[Any, fx.Node] = {}
    for node in graph.nodes:
        is_read = node.target is Tensor.item
        if not is_read and (
            not isinstance(node.target, OpOverload) or node.target._schema.is_mutable
        ):
            continue
        touched = {one.meta.get("memory") for one in (node, *node.all_input_nodes)}
        if touched & written or (not is_read and _is_result_or_large(node, results)):
            continue
        key = (node.target, _key((node.args, sorted(node.kwargs.items()))))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)


def _is_result_or_large(node: fx.Node, results: Set[int]) -> bool:
    return id(node) in results or node.meta.get("size", LARGE) >= LARGE


def _join_bounds(graph: fx.Graph) -> None:
    """Two expectations of one number at one line, that it is above and that it is below, as one."""
    for node in graph.nodes:
        last = node.prev
        if last.target is not ABOVE or node.target is not BELOW:
            continue
        (is_above, where, number, low), (is_below, there, other, high) = last.args, node.args
        if is_above and is_below and where == there and number is other:
            node.target, node.args = expect_between, (where, low, number, high)
            graph.erase_node(last)


def _key(value: Any) -> Any:
    """Equal where arguments are the same: 1 is not 1.0, and 0.0 not −0.0."""
    if isinstance(value, (list, tuple)):
        return tuple(_key(part) for part in value)
    return value if isinstance(value, fx.Node) else repr(value)


def _take_out_fixed(graph: fx.Graph, written: Set[int], results: Set[int]) -> list[Tensor]:
    """Operations of shapes alone, and of their results: computed when they were recorded."""
    values: list[Tensor] = []
    for node in list(graph.nodes):
        if "value" not in node.meta or node.meta["memory"] in written or id(node) in results:
            continue
        if all("value" in user.meta for user in node.users):
            continue  # which are taken out themselves
        with graph.inserting_before(next(iter(graph.nodes))):
            fixed = graph.placeholder(f"fixed_{len(values)}")
        fixed.meta.update({name: node.meta[name] for name in ("form", "device")})
        node.replace_all_uses_with(fixed)
        values.insert(0, node.meta["value"])
    return values


def drop_unused(graph: fx.Graph) -> None:
    """Erase what no result and no expectation needs."""
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users and not has_effect(node):
            graph.erase_node(node)


def has_effect(node: fx.Node) -> bool:
    """An expectation, a draw, an operation that writes or only checks, or arithmetic that may raise."""
    if isinstance(node.target, OpOverload):
        schema = node.target._schema
        return schema.is_mutable or (node.target.namespace == "aten" and not schema.returns)
    if node.target in _RAISING and "form" not in node.meta:
        return True
    noted = node.meta.get("writes", False) or node.meta.get("has_effect", False)
    return noted or getattr(node.target, "has_effect", False)


def _has_any_shape(node: Any) -> bool:
    """Whether the shape of a result depends on numbers: that of an index does only where it is a mask."""
    if node.target is not aten.index.Tensor:
        return is_dynamic(node.target)
    masks = (one.meta["dtype"] for one in node.args[1] if one is not None)
    return any(dtype in (torch.bool, torch.uint8) for dtype in masks)


def _gives_several(node: Any) -> bool:
    """Whether an operation gives several tensors, each in memory of its own."""
    returns = node.target._schema.returns
    apart = all(one.type.kind() == "TensorType" and one.alias_info is None for one in returns)
    return len(returns) > 1 and apart and all("form" in user.meta for user in node.users)


def _quick(node: fx.Node) -> Any:
    """torch's own function for an operation: the same by another way in."""
    if not isinstance(node.target, OpOverload) or node.target.namespace != "aten":
        return node.target
    name = node.target.overloadpacket.__name__
    if name.endswith("_"):  # which writes into its first argument: a method
        return getattr(torch._C.TensorBase, name, node.target)
    if node.target._overloadname == "out" or not node.target._schema.is_mutable:
        own = getattr(_OWN, name, None)
        # code of a graph calls it by its name in torch, which may be another function in Python
        return own if own is not None and getattr(torch, name, None) is own else node.target
    return node.target
