"""A loss that writes into what it was given, or into a module that it holds: stopped, and undone.

Every operation of torch says in its schema which arguments it writes into. While a loss is looked at,
those are compared with the memory that is not its own: x, y, the batch, and the parameters, buffers
and tensors that can be found from its function (closure, globals, `self`, partial). So a write through
`.data`, a view or `torch.no_grad()` is seen, and is refused before it happens. What torch does not see,
numpy and changes of a dictionary, is found by comparing with a copy, and undone: of x, y, the batch, and
of the first 16 MiB of arrays and CPU tensors that the function holds.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_leaves

from bilevel import tree
from bilevel.errors import ProblemError
from bilevel.problem.dispatch import HiddenMode
from bilevel.types import Loss, Params

MOST = 10_000
"""Objects looked at in search of modules: enough for a problem, too few for a data set in a list."""

COPIED = 2**24
"""Bytes of what a function holds that are compared with a copy, for writes through numpy."""

_HARMLESS = {torch.ops.aten.detach_.default, torch.ops.aten.record_stream.default}


@contextmanager
def refuse_writes(loss: Loss, x: Params, y: Params) -> Iterator[None]:
    """Raise `ProblemError` if what is evaluated within writes into x, y, the batch or a module.

    They are as before afterwards, whatever is raised. Costs one copy of x, y and the batch and of up to
    `COPIED` bytes of what the function holds, kept within, and 10 to 20 µs of every operation.
    """
    given = {"x": x, "y": y, "the batch": loss.batch}
    kept = [_kept(value, name) for name, value in given.items()]
    owned: dict[int, str] = {}
    tensors = [found for name, value in given.items() for found in _tensors(value, name)]
    for where, tensor in tensors:
        owned.setdefault(_memory(tensor), where)
    held = list(reachable(loss.function))
    for where, tensor in held:
        owned.setdefault(_memory(tensor), where)
    owned.pop(0, None)
    kept.append(_compared(_small(held), []))
    done = False
    try:
        with _uncompiled(), _Watch(loss.level, owned, {id(t) for _, t in tensors}):
            yield
        done = True
    finally:
        changed = [where for one in kept for where in one()]
        if changed and done:
            raise _refusal(loss.level, changed[0])


def _uncompiled() -> AbstractContextManager[Any]:
    """Where functions compiled by torch.compile run as they were written.

    Met under a `_Watch` they would be left uncompiled for good.
    """
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes seconds
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def batch_norm_refusal(level: str) -> ProblemError:
    """What is said of a normalisation that updates its running statistics."""
    return ProblemError(
        f"{level}_loss runs BatchNorm in training mode, which changes its buffers at every "
        "evaluation; call module.eval(), or build it with track_running_stats=False, or use GroupNorm"
    )


def _refusal(level: str, where: str, operation: str = "") -> ProblemError:
    if where.endswith("of BatchNorm"):
        return batch_norm_refusal(level)
    by = f" ({operation})" if operation else ""
    if "embedding_renorm" in operation:
        remedy = (
            "max_norm scales rows of the weight itself; scale what was looked up "
            "(e / (e.norm(dim=-1, keepdim=True) / max_norm).clamp(min=1)), or keep y in the set by "
            "project_lower"
        )
    elif where.startswith("buffer"):
        remedy = "call module.eval(), or compute what it holds from what the loss is given"
    else:
        remedy = f"compute a new one ({_out_of_place(operation)}), or .clone() it first"
    return ProblemError(
        f"{level}_loss writes into {where}{by}. A loss is evaluated as often as a method asks, and "
        f"must leave what it is given as it is: {remedy}"
    )


def _out_of_place(operation: str) -> str:
    name = operation.removeprefix("aten.").split(".")[0]
    if name in ("copy_", "fill_", "zero_", "") or not name.endswith("_"):
        return "torch.where, torch.cat, {**y, name: value}"
    return f"{name.removesuffix('_')} for {name}"


class _Watch(HiddenMode):
    """Raises before an operation writes into memory that is owned by others."""

    supports_higher_order_operators = True

    def __init__(self, level: str, owned: dict[int, str], given: set[int]) -> None:
        super().__init__()
        self._level, self._owned, self._given = level, owned, given

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, OpOverload) and func._schema.is_mutable and func not in _HARMLESS:
            # t_ and its like change the shape of one tensor object, and no memory
            reshapes = torch.Tag.inplace_view in func.tags
            for tensor in _written(func, args, kwargs):
                where = self._owned.get(_memory(tensor))
                if where is not None and (not reshapes or id(tensor) in self._given):
                    raise _refusal(self._level, where, str(func))
        return func(*args, **kwargs)


def _written(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors that an operation writes into."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _memory(tensor: Tensor) -> int:
    """The address of the storage; 0 where there is none (sparse, meta, empty)."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


# what was given, compared and put back


def _kept(value: Any, name: str) -> Callable[[], list[str]]:
    """A function that puts a nested value back as it is now, and says where it was not."""
    return _compared(_tensors(value, name), _containers(value, name))


def _small(held: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Those that numpy may write into, as long as a copy of all of them is small."""
    room = COPIED
    for where, tensor in held:
        if tensor.device.type == "cpu" and tensor.layout == torch.strided:
            room -= tensor.numel() * tensor.element_size()
            if room >= 0:
                yield where, tensor


def _compared(
    named: Iterable[tuple[str, Tensor]], lists: Iterable[tuple[str, Any]]
) -> Callable[[], list[str]]:
    tensors = [(where, t, t.detach().clone()) for where, t in named]
    containers = [(where, c, c.copy()) for where, c in lists]

    def restore() -> list[str]:
        changed = []
        for where, container, before in containers:
            if not _same_entries(container, before):
                changed.append(where)
                container.clear()
                container.update(before) if isinstance(before, dict) else container.extend(before)
        for where, tensor, before in tensors:
            if tensor.shape == before.shape and not _same(tensor, before):
                changed.append(where)
                with torch.no_grad():
                    tensor.copy_(before)
        return changed

    return restore


def _same_entries(a: Any, b: Any) -> bool:
    if len(a) != len(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(a[key] is b[key] for key in a)
    return all(p is q for p, q in zip(a, b, strict=True))


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, NaN being equal to NaN."""
    if a.layout != torch.strided or torch.equal(a, b):
        return True
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    return ((where, leaf) for where, leaf in tree.named(value, name) if isinstance(leaf, Tensor))


def _containers(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The dicts and lists in a nested value, which can be written into."""
    if type(value) in (dict, list):
        yield name, value
    for where, part in tree.parts(value, name):
        yield from _containers(part, where)


# what a function holds


def reachable(function: Any) -> Iterator[tuple[str, Tensor]]:
    """(what it is, tensor) of what a function can reach by name: parameters, buffers, tensors, arrays.

    An array of numpy is the tensor that shares its memory, where there is one.
    """
    numpy = sys.modules.get("numpy")
    for name, value in _held(function):
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, nn.Module):
            yield from _module(value)
        elif numpy is not None and isinstance(value, numpy.ndarray):
            yield from _array(value, name)


def refuse_wrapped(loss: Loss) -> None:
    """Raise `ProblemError` for a module that others have prepared to be trained by several ranks.

    Its sums over ranks are taken in hooks of `.backward()`, which `torch.autograd.grad` does not call:
    every derivative would be that of a rank's own rows, and nothing would show it.
    """
    for _, value in _held(loss.function):
        for name, owner in value.named_modules() if isinstance(value, nn.Module) else ():
            for kind in type(owner).__mro__:
                if kind.__name__ in _WRAPPERS:
                    raise ProblemError(
                        f"{loss.level}_loss holds a module wrapped by {_WRAPPERS[kind.__name__]}"
                        f"{f' ({name})' if name else ''}, which torch.autograd.grad silently does not "
                        "see: every derivative would be that of this rank's rows alone. Give the plain "
                        "module, and let the run have the ranks: a problem over ranks needs no wrapper"
                    )


_WRAPPERS = {
    "DistributedDataParallel": "DistributedDataParallel",
    "FullyShardedDataParallel": "FullyShardedDataParallel",
    "FSDPModule": "fully_shard",
}
"""By the name of the class: none of them is imported where nobody uses it."""


def _held(function: Any) -> Iterator[tuple[str, Any]]:
    """(name, value) of the tensors, arrays and modules that a function can reach."""
    numpy = sys.modules.get("numpy")
    left, seen = [("", function)], {}
    while left and len(seen) < MOST:
        name, value = left.pop()
        if id(value) in seen or isinstance(value, (str, bytes, int, float, type, types.ModuleType)):
            continue
        seen[id(value)] = value  # held on to, so that no other object is given its id
        is_array = numpy is not None and isinstance(value, numpy.ndarray)
        if is_array or isinstance(value, (Tensor, nn.Module)):
            yield name, value
        else:
            left += _reached(value, name)


def _array(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if value.flags.writeable:  # what is not, nothing writes into
        with suppress(TypeError, ValueError):  # a dtype or strides that torch has not
            yield name, torch.from_numpy(value)


def _module(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, owner in module.named_modules():
        for name, buffer in owner.named_buffers(recurse=False):
            kind = "BatchNorm" if isinstance(owner, _NormBase) else type(module).__name__
            yield f"buffer {'.'.join(filter(None, (prefix, name)))} of {kind}", buffer
    for name, parameter in module.named_parameters():
        yield f"parameter {name} of {type(module).__name__}", parameter


def _reached(value: Any, name: str) -> list[tuple[str, Any]]:
    """What a function, a method or an object refers to, by name."""
    if isinstance(value, functools.partial):
        return [(name, part) for part in (value.func, *value.args, *value.keywords.values())]
    if isinstance(value, types.MethodType):
        return [("", value.__self__), (name, value.__func__)]
    if isinstance(value, types.FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        found = [(free, cell.cell_contents) for free, cell in cells if _is_filled(cell)]
        found += [(n, value.__globals__[n]) for n in _names(value.__code__) & {*value.__globals__}]
        wrapped = getattr(value, "__wrapped__", None)
        return [*found, ("", wrapped)] if wrapped is not None else found
    if isinstance(value, (Mapping, list, tuple)):
        return list(tree.parts(value, name))
    home = type(value).__module__.split(".")[0]
    if home in ("torch", "numpy", "builtins", "typing"):
        return []
    prefix = f"{name}." if name else ""
    entries = getattr(value, "__dict__", {})
    return [(f"{prefix}{key}", part) for key, part in entries.items()]


def _names(code: types.CodeType) -> set[str]:
    """Global names that code uses, and code within it."""
    inner = [const for const in code.co_consts if isinstance(const, types.CodeType)]
    return {*code.co_names}.union(*map(_names, inner))


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a name that is bound later
        return False
