"""A function of tensors, recorded once as the operations that it comes to, and replayed.

`torch.func.vmap` finds the batched form of every operation each time that a loss is evaluated, which
takes as long as the operations of a small network. What it comes to is the same each time: the
record is those operations, called from a `torch.fx` graph, which autograd differentiates as it would
have differentiated them.

What Python decided on the way (branches, numbers) is frozen in a record, so it is not trusted by
its form alone:

1. When it is made, its values, first and second derivatives must be those of the function, bit for
   bit; so a run that is resumed, and records again, goes on as one that was not.
2. Its first use, and every `EVERY`-th after that, evaluates the function as well, and must agree bit for
   bit. One that does not at first is given up; one that does not later is an error, since the uses
   between may have been wrong.
3. Records are dropped where an attribute of the function's owner, or of what that holds, is another than
   before (`bilevel.replay.python_state`), and given up for good where that happens `RENEWED` times.

What is in no attribute (a global, an entry of a list) and changes in the uses after the last comparison of
a run is not seen.

`make_fx` would record too; it imports torch's compiler, which takes as long as torch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import BuiltinFunctionType, MethodDescriptorType
from typing import Any

import torch
from torch import Tensor, fx
from torch._C._functorch import peek_interpreter_stack
from torch._ops import OpOverload
from torch.utils._pytree import tree_map

from bilevel import tree
from bilevel.errors import ProblemError
from bilevel.problem.dispatch import HiddenMode
from bilevel.replay.python_state import PythonState

aten = torch.ops.aten

AFTER = 2
"""Evaluations of a form before it is recorded: a single call pays for nothing."""
EVERY = 64
"""Uses of a record from one comparison with the function to the next."""
OTHER = "it gives other values for arguments that it was given before"
RENEWED = 4
"""Times that records are dropped for an attribute before none is made any more."""
MOST = 16
"""Records kept; other forms are evaluated as they are."""

Function = Callable[[Sequence[Tensor]], Any]
"""Of tensors; returns a tensor, or several in containers."""
Graph = Callable[..., list[Tensor]]


class Unrecordable(Exception):
    """Why a function cannot be replayed, as the end of a sentence."""


@dataclass
class _Record:
    seen: int = 0
    graph: Graph | None = None
    like: Any = None
    """What the function returns, with None for each tensor."""
    unseen: int = -1
    """Uses since the last comparison with the function; -1 where there was none."""


class Replayed:
    """The records of the functions of one owner."""

    # so that it has no attributes that `PythonState` of who holds it would take for those of a problem
    __slots__ = ("_memory", "_owner", "_records", "_renewed", "reasons")

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        self._memory = PythonState(owner)
        self._records: dict[Any, _Record] = {}
        self._renewed = 0
        self.reasons: dict[str, str] = {}
        """Why a function, by its name, is not replayed."""

    def __reduce__(self) -> Any:
        return Replayed, (self._owner,)

    def __call__(self, name: str, form: Any, function: Function, inputs: list[Tensor]) -> Any:
        """`function(inputs)`; `form` is what it depends on beside the tensors."""
        if name in self.reasons or _is_watched():
            return function(inputs)
        self._refresh(name)
        record = self._record(name, form, inputs)
        if record is None:
            return function(inputs)
        if record.graph is None:
            record.seen += 1
            if record.seen > AFTER:
                self._make(name, record, function, inputs)
            return function(inputs)
        if 0 <= record.unseen < EVERY - 1:
            record.unseen += 1
            found = iter(record.graph(*inputs))
            return tree.map_nested(lambda _: next(found), record.like)
        return self._compared(name, record, function, inputs)

    def _record(self, name: str, form: Any, inputs: list[Tensor]) -> _Record | None:
        key = name, form, _modes(inputs), tuple(map(_form, inputs))
        try:
            record = self._records.get(key)
        except TypeError:  # something in a batch that has no hash
            return None
        if record is None and len(self._records) < MOST:
            record = self._records[key] = _Record()
        return record

    def _refresh(self, name: str) -> None:
        """Drop all records where what the owner remembers is not what it was when they were made."""
        changed = self._memory.changed()
        if changed is None:
            return
        self._memory = PythonState(self._owner)
        if any(record.graph for record in self._records.values()):
            self._renewed += 1
            if self._renewed >= RENEWED:
                self.reasons[name] = (
                    f"attributes of the problem change between its evaluations ({changed})"
                )
        self._records.clear()

    def _make(self, name: str, record: _Record, function: Function, inputs: list[Tensor]) -> None:
        try:
            record.graph, record.like = recorded(function, inputs)
        except Unrecordable as error:
            self.reasons[name] = str(error)

    def _compared(
        self, name: str, record: _Record, function: Function, inputs: list[Tensor]
    ) -> Any:
        assert record.graph is not None
        values = function(inputs)
        with torch.no_grad():
            agrees = _agree(record.graph(*inputs), _flat(values))
            repeats = agrees or _agree(_flat(function(inputs)), _flat(values))
        if not agrees and repeats and record.unseen > 0:
            raise ProblemError(
                f"{name} of {type(self._owner).__name__} gives other values than it was recorded with, and "
                f"up to {record.unseen} uses of that record before this one may be wrong: make it a "
                "function of (x, y, batch), keep what changes beside them in an attribute of the problem, "
                "or say problem.replayed: false"
            )
        if not agrees:
            self.reasons[name] = OTHER
        record.unseen = 0
        return values


def _form(leaf: Tensor) -> Any:
    return leaf.shape, leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad


def _modes(inputs: list[Tensor]) -> Any:
    """What torch is set to that changes the operations which a function comes to."""
    kind = inputs[0].device.type if inputs else "cpu"
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return torch.is_grad_enabled(), cast


def _is_watched() -> bool:
    """Whether something looks at, or transforms, each operation: that is to see the function itself."""
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return True
    return peek_interpreter_stack() is not None


def recorded(function: Function, inputs: Sequence[Tensor]) -> tuple[Graph, Any]:
    """(`function` of inputs like these as its operations, its result with None for each tensor).

    Raises:
        Unrecordable: it does what a record cannot, or the record has not the same derivatives.
    """
    # under aliases of their own: one tensor may be two inputs
    given = [leaf.detach().requires_grad_(leaf.requires_grad) for leaf in inputs]
    recorder = _Recorder(given)
    with recorder:
        result = function(given)
    outputs = _flat(result)
    plain = recorder.finish(outputs)
    truth = _derivatives(lambda leaves: _flat(function(leaves)), inputs)
    for redundant in _REDUNDANT:
        made = fx.GraphModule(recorder.constants, _without(plain, redundant))
        if _agree(_derivatives(lambda leaves, made=made: made.forward(*leaves), inputs), truth):
            return made.forward, tree.map_nested(lambda _: None, result)
    raise Unrecordable("its derivatives are not those of the operations that it calls")


def _flat(result: Any) -> list[Tensor]:
    return [leaf for _, leaf in tree.named(result)]


class _Recorder(HiddenMode):
    """Notes each operation in a graph, at the level below autograd and vmap."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self._graph = fx.Graph()
        self._kept: list[Any] = list(inputs)  # so that an id stays that of one tensor
        self._nodes = {id(t): self._graph.placeholder(f"t{k}") for k, t in enumerate(inputs)}
        self._with_grad = torch.is_grad_enabled()
        self.constants: dict[str, Tensor] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self._refuse(func)
        arguments, options = tree_map(self._node, (args, kwargs or {}))
        out = func(*args, **(kwargs or {}))
        node = self._graph.call_function(func, arguments, options)
        if isinstance(out, Tensor):
            self._note(out, node)
        elif isinstance(out, (tuple, list)):
            for k, part in enumerate(out):
                if isinstance(part, Tensor):
                    self._note(part, self._graph.call_function(operator.getitem, (node, k)))
        else:
            raise Unrecordable(f"it turns a tensor into a {type(out).__name__} of Python ({func})")
        return out

    def finish(self, outputs: list[Tensor]) -> fx.Graph:
        """The graph of what these depend on."""
        self._graph.output([self._node(output) for output in outputs])
        self._graph.eliminate_dead_code()
        return self._graph

    def _refuse(self, func: Any) -> None:
        if not isinstance(func, OpOverload):
            raise Unrecordable(f"it calls {func}, which is no operation on tensors alone")
        if func._schema.is_mutable:
            raise Unrecordable(f"it writes into a tensor ({func})")
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise Unrecordable(f"it draws random numbers ({func})")
        if torch.Tag.dynamic_output_shape in func.tags:
            raise Unrecordable(f"it makes tensors whose shape depends on values ({func})")
        if torch.is_grad_enabled() != self._with_grad:
            raise Unrecordable(
                "it turns gradients off or on (torch.no_grad(), or an autograd.Function)"
            )

    def _note(self, tensor: Tensor, node: fx.Node) -> None:
        node.meta["form"] = tensor.shape, tensor.stride()
        self._nodes[id(tensor)] = node
        self._kept.append(tensor)

    def _node(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in self._nodes:
            name = f"constant{len(self.constants)}"
            self.constants[name] = leaf
            self._note(leaf, self._graph.get_attr(name))
        return self._nodes[id(leaf)]


_VIEWS = (aten.view.default, aten._unsafe_view.default)
_REDUNDANT = ((*_VIEWS, aten.expand.default), _VIEWS, ())
"""Operations that often give a tensor the shape that it has, each a node of autograd's too. Without
the first the terms of a derivative may be summed in another order, so fewer are tried then."""


def _without(plain: fx.Graph, redundant: tuple[OpOverload, ...]) -> fx.Graph:
    """A copy without those of these operations that change nothing, by torch's own names of the others."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(plain, {}))
    for node in graph.nodes:
        if node.target in redundant and node.args[0].meta.get("form") == node.meta["form"]:
            node.replace_all_uses_with(node.args[0])
    graph.eliminate_dead_code()
    for node in graph.nodes:
        if isinstance(node.target, OpOverload):
            node.target = _quick(node.target)
    return graph


def _quick(operation: OpOverload) -> Any:
    """torch's own function or method for an operation, which costs half as much to call."""
    name = operation.overloadpacket.__name__
    for place in (torch, Tensor):
        found = getattr(place, name, None)
        if isinstance(found, (BuiltinFunctionType, MethodDescriptorType)):
            return found
    return operation


def _derivatives(
    function: Callable[[Sequence[Tensor]], list[Tensor]], inputs: Sequence[Tensor]
) -> list[Tensor | None]:
    """Values, the gradient of their sum, and the product of its Hessian with that gradient."""
    leaves = [leaf.detach().requires_grad_(leaf.is_floating_point()) for leaf in inputs]
    live = [leaf for leaf in leaves if leaf.requires_grad]
    with torch.enable_grad():
        outputs = function(leaves)
        total = [output.sum() for output in outputs if output.requires_grad]
        if not total:
            return [*outputs]
        first = torch.autograd.grad(total, live, create_graph=True, allow_unused=True)
        slopes = [g for g in first if g is not None and g.requires_grad]
        vectors = [g.detach() for g in slopes]
        try:
            second = torch.autograd.grad(slopes, live, vectors, allow_unused=True) if slopes else ()
        except (
            RuntimeError
        ):  # a kernel without a second derivative, which is said where one is asked
            second = ()
    return [*outputs, *first, *second]


def _agree(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None]) -> bool:
    return len(ours) == len(theirs) and all(map(_same, ours, theirs))


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    """Bit for bit, NaN where NaN is."""
    if one is None or other is None:
        return one is other
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one, other) or torch.equal(one.nan_to_num(1.0), other.nan_to_num(1.0))
