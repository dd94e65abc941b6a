"""The record of a step while it is taken: its tensor operations, its numbers, and what they decide.

A dispatch mode sees every operation, those of autograd's backward passes included, on the real
tensors. It notes them in a graph of `torch.fx`, holds none of the tensors, and changes none. Differs
from `make_fx` in:

1. Numbers read from tensors (`bilevel.scalars`) stay variable, and go into later operations as such.
2. What Python decides on a number is noted as an expectation. One that a replay does not find again
   says that this step takes another way, from which on nothing of the record holds.
3. Numbers that leave in another way are expected to be the same: so a branch on `x.sum() > 0` is safe.
4. Batches are drawn by the replay, where the step drew them.
"""

from __future__ import annotations

import itertools
import operator
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.node import map_aggregate
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from bilevel.scalars.scalar import LARGE, Recording, Scalar
from bilevel.scalars.table import RowTable

aten = torch.ops.aten
_PACKAGE = Path(__file__).parents[1]
_PASSED_OVER = tuple(
    str(path)
    for path in (
        Path(__file__).parent,
        _PACKAGE / "scalars",
        _PACKAGE / "tree.py",
        Path(torch.__file__).parent,
    )
)
_PRODUCTS = {aten.prod.default, aten.prod.dim_int, aten.cumprod.default}
_UNSEEN = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__}
"""They read a tensor's numbers past every dispatch."""
_SPLITS = {torch.tensor_split, Tensor.tensor_split}
"""They do where they are told by a tensor where to split."""


_ARITHMETIC = {operator.add, operator.sub, operator.mul, operator.truediv}
_OF_SHAPES = {"ones_like", "zeros_like", "full_like", "new_zeros", "new_ones", "new_full"}


class Departed(Exception):
    """A replay does not find what its record expects."""


class NotReplayable(Exception):
    """A step does what no replay could do again."""


def expect(value: Any, where: str, found: Any) -> None:
    """Raise `Departed` where a replay finds another number than the record has."""
    if found is not value and found != value and (found == found or value == value):
        raise Departed(where)


expect.has_effect = True  # pyright: ignore[reportFunctionMemberAccess]


def expect_shape(shape: torch.Size, where: str, found: Tensor) -> None:
    """Raise `Departed` where a mask or `nonzero` leaves another number of entries than the record has."""
    if found.shape != shape:
        raise Departed(where)


expect_shape.has_effect = True  # pyright: ignore[reportFunctionMemberAccess]


@cache
def _answering(function: Callable[..., bool]) -> Callable[..., None]:
    """What raises `Departed` where a replay finds another answer of a function than the record has."""

    def expect_answer(value: bool, where: str, *given: Any) -> None:
        if function(*given) is not value:
            raise Departed(where)

    expect_answer.has_effect = True  # pyright: ignore[reportFunctionMemberAccess]
    expect_answer.answers = function  # pyright: ignore[reportFunctionMemberAccess]
    return expect_answer


def expect_between(where: str, low: float, found: Any, high: float) -> None:
    """`expect_answer` of found > low and of found < high, at once."""
    if not low < found < high:
        raise Departed(where)


expect_between.has_effect = True  # pyright: ignore[reportFunctionMemberAccess]
ABOVE, BELOW = _answering(operator.gt), _answering(operator.lt)


class Recorder(TorchDispatchMode):
    """A tape (`bilevel.scalars.scalar.Tape`) that is a dispatch mode: what is done within it is recorded."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch imports its compiler with the first operation, which takes a second

    def __init__(self) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.written: set[int] = set()
        """Memory that the step writes into, by its number."""
        self.constants: list[Tensor] = []
        """Tensors that the step finds, and that are none of its inputs: data, weights."""
        self._constant_nodes: dict[int, fx.Node] = {}
        self._given: set[int] = set()
        self._known = WeakTensorKeyDictionary()
        self._tables: dict[int, tuple[fx.Node, RowTable]] = {}
        """By their ids, which stay theirs as long as they are kept."""
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        """By address: what lies there, and its number."""
        self._count = itertools.count()
        self._is_paused = False
        self._reads = _Reads(self)

    def __enter__(self) -> Recorder:
        super().__enter__()
        self._reads.__enter__()
        Recording.tape = self
        return self

    def __exit__(self, *raised: Any) -> None:
        Recording.tape = None
        self._reads.__exit__(*raised)
        super().__exit__(*raised)

    def input(self, leaf: Any, name: str) -> Any:
        """What the step is to take for a leaf of its inputs: a tensor or a number."""
        return self.result(self.graph.placeholder(name), leaf)

    def result(self, node: fx.Node, leaf: Any) -> Any:
        """What the step is to take for a leaf that a node of the graph gives."""
        if isinstance(leaf, RowTable):
            self._tables[id(leaf)] = node, leaf
            return leaf
        if isinstance(leaf, Tensor):  # another object: the step may find the same one elsewhere
            leaf = self.apart(leaf.detach)
            self._given.add(self._memory(leaf))
        return self._bound(node, leaf)

    def node_of(self, leaf: Any) -> Any:
        """The node that gives a tensor or scalar; anything else is itself."""
        if isinstance(leaf, Scalar):
            return leaf.node
        if isinstance(leaf, RowTable):
            return self._node_of_table(leaf)
        if not isinstance(leaf, Tensor):
            return leaf
        known = self._known.get(leaf)
        return self._constant(leaf) if known is None else known

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self._is_paused:
            return func(*args, **kwargs)
        if func in _PRODUCTS:
            raise NotReplayable(
                f"{where()} takes a product over entries ({func}), whose derivative torch computes in "
                "another way while it is recorded"
            )
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise NotReplayable(f"{where()} draws random numbers ({func})")
        if func is torch.ops.aten.lift_fresh.default:  # numbers of Python, new in each step
            given = self.node_of(args[0].clone())  # which the step may write into
            return self._bound(self.graph.call_function(aten.clone.default, (given,)), func(*args))
        for changed in _written(func, args, kwargs):
            self._note_written(changed)
        node = self.graph.call_function(func, *map_aggregate((args, kwargs), self.node_of))
        found = func(*args, **kwargs)
        if isinstance(found, (bool, int, float)):  # .item(), bool(...), torch.equal
            self._expect(node, found)
            return found
        if isinstance(found, Tensor) and found.numel() < LARGE and self._is_fixed(node):
            node.meta["value"] = found.detach()
        bound = self._bound(node, found)
        if is_dynamic(func):
            for leaf in _leaves(found):
                self.graph.call_function(expect_shape, (leaf.shape, where(), self.node_of(leaf)))
        return bound

    def read(self, value: Tensor) -> Any:
        """The number that a tensor holds."""
        node = self.graph.call_function(Tensor.item, (self.node_of(value),))
        found = self.apart(value.item)
        if not isinstance(found, (int, float)) or isinstance(found, bool):
            self._expect(node, found)
        return self._bound(node, found)

    def call(self, function: Callable[..., Any], *given: Any, **options: Any) -> Any:
        plain = map_aggregate((given, options), _plain)
        tensors = [leaf for leaf in _leaves((given, options)) if isinstance(leaf, Tensor)]
        if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in tensors):
            dtype = tensors[0].dtype  # a narrow one would round the number before it is used
            if function in _ARITHMETIC and dtype in (torch.float32, torch.float64):
                if function is operator.truediv and isinstance(given[0], Scalar):
                    function, given = operator.mul, (tensors[0].reciprocal(), given[0])  # as torch
                given = tuple(self._as_tensor(one, dtype) for one in given)
            return function(*map_aggregate(given, _fixed), **map_aggregate(options, _fixed))
        written = [] if options.get("out") is None else [options["out"]]
        if function.__name__.endswith("_"):  # as torch calls what writes into its first argument
            written += _leaves(given[0])
        for changed in written:
            self._note_written(changed)
        node = self.graph.call_function(function, *map_aggregate((given, options), self.node_of))
        node.meta["writes"] = bool(written)
        # within a mode torch computes some operations in another way
        with _disable_current_modes():
            found = self.apart(lambda: function(*plain[0], **plain[1]))
        return self._bound(node, found)

    def _as_tensor(self, leaf: Any, dtype: torch.dtype) -> Any:
        """A number as a tensor of its own, whose product with another autograd records."""
        if not isinstance(leaf, Scalar):
            return leaf
        node = self.graph.call_function(torch.tensor, (leaf.node,), {"dtype": dtype})
        return self._bound(node, self.apart(lambda: torch.tensor(leaf.value, dtype=dtype)))

    def expect(self, function: Callable[..., bool], *given: Any) -> bool:
        found = function(*(_plain(one) for one in given))
        nodes = (self.node_of(one) for one in given)
        self.graph.call_function(_answering(function), (found, where(), *nodes))
        return found

    def table(self, rows: Any, like: dict[str, Tensor]) -> RowTable:
        node = self.graph.call_function(RowTable, map_aggregate((rows, like), self.node_of))
        return self.result(node, self.apart(lambda: RowTable(rows, like)))

    def row(self, table: RowTable, number: Scalar) -> dict[str, Tensor]:
        node = self.graph.call_function(RowTable.row, (self.node_of(table), number.node))
        return {
            name: self.result(self.graph.call_function(operator.getitem, (node, name)), entry)
            for name, entry in table.row(number.value).items()
        }

    def put(self, table: RowTable, number: Scalar, tree: dict[str, Tensor]) -> RowTable:
        given = {name: self.node_of(entry) for name, entry in tree.items()}
        node = self.graph.call_function(RowTable.put, (self.node_of(table), number.node, given))
        return self.result(node, self.apart(lambda: table.put(number.value, tree)))

    def _node_of_table(self, table: RowTable) -> fx.Node:
        if id(table) not in self._tables:
            raise NotReplayable(f"{where()} looks into a table that it was not given")
        return self._tables[id(table)][0]

    def specialise(self, scalar: Scalar) -> Any:
        self._expect(scalar.node, scalar.value)
        return scalar.value

    def _expect(self, node: fx.Node, found: Any) -> None:
        self.graph.call_function(expect, (found, where(), node))

    def makes_anew(self, entries: Iterable[Tensor]) -> bool:
        sizes = []
        for entry in entries:
            self._refuse_kept(entry)
            sizes.append(entry.numel())
        return all(size < LARGE for size in sizes)

    def _note_written(self, changed: Tensor) -> None:
        self._refuse_kept(changed)
        self.written.add(self._memory(changed))

    def _describe(self, node: fx.Node, found: Tensor) -> None:
        """What is known of the tensor that a node gives."""
        node.meta.update(memory=self._memory(found), size=found.numel(), dtype=found.dtype)
        node.meta.update(form=(found.shape, found.stride(), found.dtype), device=found.device)

    def _memory(self, value: Tensor) -> int:
        """A number of a tensor's memory: that of no other, though a later one may lie at its address."""
        storage = value.untyped_storage()
        known = self._storages.get(storage.data_ptr())
        if known is None or known[0].expired():
            known = self._storages[storage.data_ptr()] = StorageWeakRef(storage), next(self._count)
        return known[1]

    def _refuse_kept(self, changed: Tensor) -> None:
        if self._known.get(changed) is None or self._memory(changed) in self._given:
            raise NotReplayable(f"{where()} writes into a tensor that is kept from step to step")

    def _is_fixed(self, node: fx.Node) -> bool:
        """Whether a pure operation gives the same in every replay: of shapes alone, or of what is fixed."""
        assert isinstance(node.target, OpOverload)
        if node.target._schema.is_mutable:
            return False
        if node.target.overloadpacket.__name__ in _OF_SHAPES:
            return True
        given = node.all_input_nodes
        # what was written into by now holds something else than it was made with
        return all("value" in one.meta and one.meta["memory"] not in self.written for one in given)

    def apart(self, call: Callable[[], Any]) -> Any:
        """What a call gives that is none of the step's operations."""
        before, self._is_paused, Recording.tape = Recording.tape, True, None
        try:
            return call()
        finally:
            self._is_paused, Recording.tape = False, before

    def _bound(self, node: fx.Node, found: Any) -> Any:
        """Notes which node gives a result; numbers come back as scalars."""
        if isinstance(found, Tensor):
            self._describe(node, found)
            if self._known.get(found) is None:  # what is written into in place stays who it is
                self._known[found] = node
            return found
        if isinstance(found, (list, tuple)):
            parts = [
                self._bound(self.graph.call_function(operator.getitem, (node, k)), part)
                for k, part in enumerate(found)
            ]
            return type(found)(parts)
        if isinstance(found, dict):
            return {
                key: self._bound(self.graph.call_function(operator.getitem, (node, key)), part)
                for key, part in found.items()
            }
        if type(found) in (int, float):
            return Scalar(found, node, self)
        return found

    def _constant(self, leaf: Tensor) -> fx.Node:
        if id(leaf) not in self._constant_nodes:
            first = next(iter(self.graph.nodes))
            with self.graph.inserting_before(first):
                node = self.graph.placeholder(f"constant_{len(self.constants)}")
            self._describe(node, leaf)
            self._constant_nodes[id(leaf)] = node
            self.constants.append(leaf)  # kept, so that the id stays its own
        return self._constant_nodes[id(leaf)]


class _Reads(TorchFunctionMode):
    """Makes scalars of numbers that are read, and refuses what reads them unseen by a dispatch mode."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if Recording.tape and func is Tensor.item:
            return self._recorder.read(args[0])
        kwargs = kwargs or {}
        told = (*args[1:], *kwargs.values()) if func in _SPLITS else ()
        if Recording.tape and (func in _UNSEEN or any(isinstance(one, Tensor) for one in told)):
            raise NotReplayable(f"{where()} reads numbers by {func.__name__}")
        return func(*args, **kwargs)


def is_dynamic(func: OpOverload) -> bool:
    """Whether the shape of a result depends on numbers: of what a mask chooses, for one."""
    return torch.Tag.dynamic_output_shape in func.tags or func is aten._pack_padded_sequence.default


def _plain(leaf: Any) -> Any:
    return leaf.value if isinstance(leaf, Scalar) else leaf


def _fixed(leaf: Any) -> Any:
    return float(leaf) if isinstance(leaf, Scalar) else leaf


def _leaves(value: Any) -> Iterator[Any]:
    parts = value.values() if isinstance(value, dict) else value
    if not isinstance(value, (dict, list, tuple)):
        yield value
        return
    for part in parts:
        yield from _leaves(part)


def _written(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that an operation writes into."""
    if not func._schema.is_mutable:
        return []
    found = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[place] if place < len(args) else kwargs.get(argument.name)
            found += [leaf for leaf in _leaves(given) if isinstance(leaf, Tensor)]
    return found


def where() -> str:
    """The line of code that is being run: file and number, those of tensors' own code left out."""
    frame = sys._getframe(1)
    while frame.f_back and frame.f_code.co_filename.startswith(_PASSED_OVER):
        frame = frame.f_back
    return _short(frame.f_code.co_filename, frame.f_lineno)


@cache
def _short(name: str, line: int) -> str:
    path = Path(name)
    return f"{path.parent.name}/{path.name}:{line}"
