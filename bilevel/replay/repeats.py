"""What a region does again and again, as the lower steps of a long solve: parts that are alike are compiled once.

What a compiler takes grows with the operations that it is given, and faster than they do. A run of like
parts is found by its period, cut into blocks of a few of them, and blocks that do the same to what they are
given share one function.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np
from torch import fx
from torch.fx.node import map_aggregate

WHOLE = 256
"""Operations of a region that is compiled as it is, which fuses most."""
BLOCK = 64
"""Operations of a block, about: of many more a compiler gains nothing, of fewer a call costs too much."""
LONGEST = 2048
"""Operations of a part, at most."""
TIMES = 4
"""How often a part is met, at least."""


def blocks(region: Sequence[fx.Node]) -> Iterator[list[fx.Node]]:
    """The region cut, in its order, where that lets parts of it share a function."""
    if len(region) <= WHOLE:
        yield list(region)
        return
    start, period, count = _repeated([_operation(node) for node in region])
    if not count:
        yield list(region)
        return
    start = _whole(region, start)
    if start:
        yield from blocks(region[:start])
    length, end = period * max(1, BLOCK // period), start + period * count
    first = start
    while first < end:
        last = _whole(region, min(first + length, end))
        yield list(region[first:last])
        first = last
    if first < len(region):
        yield from blocks(region[first:])


def _whole(region: Sequence[fx.Node], end: int) -> int:
    """`end`, or where all the tensors that one operation gives have been taken out of its result."""
    while 0 < end < len(region) and region[end].target is operator.getitem:
        end += 1
    return end


def alike(block: Sequence[fx.Node]) -> Hashable:
    """Equal for blocks that do the same to what they are given, in the order of `given`."""
    inside = {node: k for k, node in enumerate(block)}
    outside = {node: k for k, node in enumerate(given(block))}

    def place(one: Any) -> Any:
        if isinstance(one, fx.Node):
            return ("own", inside[one]) if one in inside else ("given", outside[one], _form(one))
        return type(one).__name__, repr(one)

    return tuple(
        (id(node.target), repr(map_aggregate((node.args, node.kwargs), place))) for node in block
    )


def given(block: Sequence[fx.Node]) -> list[fx.Node]:
    """What is computed elsewhere, in the order in which a block meets it."""
    inside = set(block)
    return list(dict.fromkeys(n for node in block for n in node.all_input_nodes if n not in inside))


def _operation(node: fx.Node) -> Hashable:
    """Of like operations the same, whatever they are given."""
    plain = map_aggregate((node.args, node.kwargs), lambda one: _form(one) or repr(one))
    return id(node.target), repr(plain)


def _form(value: Any) -> str:
    return (
        f"{value.meta.get('form')} {value.meta.get('device')}" if isinstance(value, fx.Node) else ""
    )


def _repeated(operations: Sequence[Hashable]) -> tuple[int, int, int]:
    """(start, period, count) of the run of like parts that covers most; a count of 0 where there is none."""
    numbers: dict[Hashable, int] = {}
    kinds = np.array([numbers.setdefault(one, len(numbers)) for one in operations])
    best, covered = (0, 0, 0), 0
    for period in range(1, min(LONGEST, len(kinds) // TIMES) + 1):
        differs = np.flatnonzero(kinds[period:] != kinds[:-period])
        edges = np.concatenate(([-1], differs, [len(kinds) - period]))
        lengths = np.diff(edges) - 1
        longest = int(lengths.argmax())
        count = int(lengths[longest]) // period + 1
        if count >= TIMES and count * period > covered:
            best, covered = (int(edges[longest]) + 1, period, count), count * period
    return best if covered >= BLOCK else (0, 0, 0)
