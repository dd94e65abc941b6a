"""A record cut into regions of tensor operations, each of which something else makes one call of.

A region is what nothing in Python lies between: a draw, a number that is read and goes into an
operation, an operation given by a function of Python. What a region decides is looked at as soon as it
has been computed, so that a replay departs where the record does; a draw waits for every expectation
that stood before it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.fx import GraphModule

from bilevel.replay.graph import has_effect
from bilevel.replay.lifted import lift
from bilevel.replay.repeats import alike, blocks, given

Called = Callable[[list[Tensor]], list[Tensor]]
Compile = Callable[[GraphModule, list[Tensor]], Called]
"""(region, what it may be given) ↦ the same, of a list that it may empty. Of placeholders whose meta says
`is_constant` it is given the very tensor, in every call."""
LEAST = 4
"""Operations of a region that is compiled."""


class CannotCompile(Exception):
    """Why a record is replayed operation by operation."""


def is_tensor(node: fx.Node) -> bool:
    """Whether an operation is one of tensors alone."""
    return node.meta.get("is_tensor", False)


@dataclass(frozen=True)
class Compiler:
    """What makes one call of a region."""

    kind: str
    """Of its warning."""
    name: str
    """As the warning begins."""
    compile: Compile
    done: str
    """What was done to a record, as an event has it."""
    is_exact: bool = False
    """Whether results are the same bits; else they are to rounding."""
    takes: Callable[[fx.Node], bool] = is_tensor
    """Operations that a region may have."""


def compiled(record: fx.Graph, by: Compiler, constants: list[Tensor]) -> fx.Graph:
    """A record whose regions are functions of their own; its first arguments are these constants.

    Raises:
        CannotCompile: it writes into tensors, has no region worth it, or the compiler cannot.
    """
    if any(_writes(node) for node in record.nodes):
        raise CannotCompile(
            "a step writes into its own tensors (sums in place, as of several batches)"
        )
    graph = _copied(record)
    if not by.is_exact:
        try:
            lift(graph)
        except Exception as error:  # a form of an operation that it does not know
            raise CannotCompile(_said(error)) from error
    _part_views(graph)
    nodes = list(graph.nodes)
    taken = {node for node in nodes if by.takes(node)}
    for node in nodes:  # what gives several tensors is taken with each of them
        if node in taken and "form" not in node.meta and not taken.issuperset(node.users):
            taken -= {node, *node.users}
    levels = _levels(nodes, taken)
    made = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    functions = _Functions(by, made, new, dict(zip(nodes, constants, strict=False)))
    for node in nodes:
        if node.op == "placeholder":
            new[node] = made.node_copy(node)
    count = 0
    for level in range(max(levels.values()) + 1):
        here = [node for node in nodes if node.op == "call_function" and levels[node] == level]
        for node in here:
            if node not in taken:
                new[node] = made.node_copy(node, lambda one: new[one])
        region = [node for node in here if node in taken]
        if len(region) < LEAST:
            for node in region:
                new[node] = made.node_copy(node, lambda one: new[one])
            continue
        functions.put(region)
        count += len(region)
    if not count:
        raise CannotCompile(
            f"no {LEAST} operations follow each other without a number read between them"
        )
    made.node_copy(graph.output_node(), lambda one: new[one])
    return made


def _copied(graph: fx.Graph) -> fx.Graph:
    made = fx.Graph()
    made.output(made.graph_copy(graph, {}))
    return made


def _part_views(graph: fx.Graph) -> None:
    """A view of its own for each operation that wants one: so none is a result of a region, which is copied."""
    for node in reversed(graph.nodes):
        if not _is_view(node):
            continue
        for user in list(node.users)[1:]:
            with graph.inserting_before(user):
                user.replace_input_with(node, graph.node_copy(node))


def _is_view(node: fx.Node) -> bool:
    """Whether the result of an operation on tensors is a part of what it is given."""
    memory = node.meta.get("memory")
    given = [one.meta.get("memory") for one in node.all_input_nodes]
    return is_tensor(node) and memory is not None and memory in given


def _writes(node: fx.Node) -> bool:
    return node.meta.get("writes", False) or node.meta.get("is_mutable", False)


def _levels(nodes: list[fx.Node], taken: set[fx.Node]) -> dict[fx.Node, int]:
    """When each is done: at a level first what no region takes, in its order, and then the regions."""
    levels: dict[fx.Node, int] = {}
    effects = latest = 0
    for node in nodes:
        of = node.all_input_nodes
        level = max((levels[one] + (node not in taken and one in taken) for one in of), default=0)
        if not of and node.op == "call_function":  # a clock
            level = latest
        if node.op == "call_function" and has_effect(node):
            is_draw = "feed" in (one.name for one in of)
            level = max(level, effects) if is_draw else level
            effects = max(effects, level)
        levels[node] = level
        latest = max(latest, level + (node in taken))
    for node in reversed(nodes):
        if _is_view(node) and node in taken:
            # where it is wanted
            levels[node] = min(levels[user] - (user not in taken) for user in node.users)
    return levels


class _Functions:
    """Functions in the places of regions; blocks that are alike share one."""

    def __init__(
        self,
        by: Compiler,
        made: fx.Graph,
        new: dict[fx.Node, fx.Node],
        constants: dict[fx.Node, Tensor],
    ) -> None:
        self._by, self._made, self._new, self._constants = by, made, new, constants
        self._known: dict[Hashable, _Function] = {}

    def put(self, region: list[fx.Node]) -> None:
        if self._by.is_exact:  # a function that reads data and weights where they are
            outer = _results(region)
            self._call(self._function(region, outer), region, outer)
            return
        parts = list(blocks(region))
        kinds = [alike(part) for part in parts]
        results: dict[Hashable, set[int]] = {}
        for part, kind in zip(parts, kinds, strict=True):
            results.setdefault(kind, set()).update(_results(part))
        for part, kind in zip(parts, kinds, strict=True):
            outer = sorted(results[kind])
            key = (kind, *outer)
            if key not in self._known:
                self._known[key] = self._function(part, outer)
            self._call(self._known[key], part, outer)

    def _function(self, block: list[fx.Node], outer: list[int]) -> _Function:
        if not all("form" in block[k].meta for k in outer):
            raise CannotCompile("a region gives something that is no tensor")
        graph, outside = fx.Graph(), given(block)
        own = {node: graph.placeholder(node.name) for node in outside}
        for node in outside:
            own[node].meta["is_constant"] = node in self._constants
        for node in block:
            own[node] = graph.node_copy(node, lambda one: own[one])
        graph.output([own[block[k]] for k in outer])
        try:
            known = self._constants
            example = [known[n] if n in known else _example(n) for n in outside]
            call = self._by.compile(GraphModule(torch.nn.Module(), graph), example)
            found = call(list(example))
        except CannotCompile:
            raise
        except Exception as error:  # whatever a compiler may raise
            raise CannotCompile(_said(error)) from error
        taken, shared = {one.untyped_storage().data_ptr() for one in example}, []
        for k, one in zip(outer, found, strict=True):
            memory = one.untyped_storage().data_ptr()
            shared.append(memory in taken)
            taken.add(memory)
            if (one.shape, one.stride(), one.dtype) != block[k].meta["form"]:
                raise CannotCompile("a result is laid out in another way")
        return _Function(_called(call), shared)

    def _call(self, function: _Function, block: list[fx.Node], outer: list[int]) -> None:
        made, new = self._made, self._new
        result = made.call_function(function.call, tuple(new[node] for node in given(block)))
        for place, (k, is_shared) in enumerate(zip(outer, function.shared, strict=True)):
            node = block[k]
            new[node] = made.call_function(operator.getitem, (result, place))
            if is_shared:  # a result is one of its own, which a caller may write into
                new[node] = made.call_function(torch.clone, (new[node],))


@dataclass(frozen=True)
class _Function:
    call: Callable[..., list[Tensor]]
    shared: list[bool]
    """Of each result, whether it lies in what it is given, or in a result before it."""


def _results(block: list[fx.Node]) -> list[int]:
    """The places of what is wanted elsewhere."""
    inside = set(block)
    return [k for k, node in enumerate(block) if any(user not in inside for user in node.users)]


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _called(call: Called) -> Callable[..., list[Tensor]]:
    def region(*given: Tensor) -> list[Tensor]:
        return call(list(given))

    return region


def _example(node: fx.Node) -> Tensor:
    if "form" not in node.meta:
        raise CannotCompile("a region is given something that is no tensor")
    shape, stride, dtype = node.meta["form"]
    return torch.empty_strided(shape, stride, dtype=dtype, device=node.meta["device"]).fill_(0.5)
