"""Algebra on `dict[str, Tensor]`, fused over the entries with `torch._foreach_*`.

Functions that end in an underscore write into their first argument, as in torch; while a step is
recorded they put new tensors into it where they are small. Sums are accumulated in float32 or wider, so
16-bit parameters lose nothing but their own rounding.

Where several ranks hold a tree together, each its rows of every entry, the names are `Part`s and the
tensors a rank's own. What is taken entry by entry is then the same as ever; sums over entries, and what
else sees a tree as one, are taken here over those ranks, so that whoever goes through these functions
does not see the difference.
"""

# The foreach functions are what torch.optim itself is built on; torch exports no other name.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from bilevel.errors import CheckError, ProblemError
from bilevel.scalars.functions import sqrt
from bilevel.scalars.scalar import Recording, Scalar
from bilevel.scalars.table import RowTable
from bilevel.types import Params


class Holders(Protocol):
    """The ranks that hold a tree together."""

    @property
    def is_first(self) -> bool: ...

    def total(self, value: Tensor) -> Tensor:
        """The sum over them of what each has, without a derivative."""
        ...

    def leave(self, value: Tensor) -> Tensor:
        """The sum over them of a number; its gradient goes to each as it is."""
        ...

    def most(self, value: float) -> float:
        """The largest of the numbers that they have."""
        ...


class Part(str):
    """The name of an entry that several ranks hold together, each some rows; as text it is that name.

    A tree has such names for all of its entries or for none. Whoever makes a tree of another takes
    its names, not copies of them as text.
    """

    __slots__ = ("holders", "rows", "shape")

    holders: Holders
    shape: torch.Size
    """Of the whole."""
    rows: slice | None
    """Which rows this rank has; None for an entry that each has whole, as one without rows."""

    @property
    def is_counted(self) -> bool:
        """Whether this rank is the one whose numbers count in a sum: each of its rows, or the first."""
        return self.rows is not None or self.holders.is_first

    def __new__(cls, name: str, holders: Holders, shape: torch.Size, rows: slice | None) -> Part:
        made = super().__new__(cls, name)
        made.holders, made.shape, made.rows = holders, shape, rows
        return made

    def __copy__(self) -> Part:
        return self

    def __deepcopy__(self, memo: Any) -> Part:
        return self

    def __reduce__(self) -> Any:
        return str, (str(self),)


def holders(a: Params) -> Holders | None:
    """The ranks that hold a tree together; None where it is whole."""
    name = next(iter(a), None)
    return name.holders if isinstance(name, Part) else None


def _like(a: Params, values: Iterable[Tensor]) -> Params:
    return dict(zip(a, values, strict=True))


def _pair(a: Params, b: Params) -> tuple[list[Tensor], list[Tensor]]:
    _require_same(a, b)
    return list(a.values()), [b[name] for name in a]


def _require_same(a: Params, b: Params) -> None:
    if a.keys() != b.keys():
        raise KeyError(f"trees differ: {sorted(a.keys() ^ b.keys())}")


def _recorded(*trees: Params) -> bool:
    """Whether autograd records. It keeps the inputs of a foreach sum, and none of torch.add."""
    return torch.is_grad_enabled() and any(
        entry.requires_grad for params in trees for entry in params.values()
    )


def map(function: Callable[[Tensor], Tensor], a: Params) -> Params:
    """function applied to every entry."""
    return {name: function(value) for name, value in a.items()}


def zeros_like(a: Params) -> Params:
    """0 in the shapes, dtypes and devices of a."""
    return map(torch.zeros_like, a)


def clone(a: Params) -> Params:
    """A copy that shares no memory with a and is cut from its graph."""
    return map(lambda value: value.detach().clone(), a)


def leaves(a: Params) -> Params:
    """The entries of a as fresh autograd leaves that share its memory; nothing is copied."""
    return {name: value.detach().requires_grad_() for name, value in a.items()}


def detach(a: Params) -> Params:
    """The entries of a, cut from the graph."""
    return {name: value.detach() for name, value in a.items()}


def add(a: Params, b: Params) -> Params:
    """a + b."""
    return axpy(1.0, b, a)


def sub(a: Params, b: Params) -> Params:
    """a − b."""
    return axpy(-1.0, b, a)


def scale(alpha: float, a: Params) -> Params:
    """alpha · a."""
    if len(a) == 1 or _recorded(a):
        mul = torch.mul if not isinstance(alpha, Scalar) else alpha.of(torch.mul)
        return {name: mul(entry, alpha) for name, entry in a.items()}
    mul = torch._foreach_mul if not isinstance(alpha, Scalar) else alpha.of(torch._foreach_mul)
    return _like(a, mul(list(a.values()), alpha)) if a else {}


def axpy(alpha: float, a: Params, b: Params) -> Params:
    """alpha · a + b; b itself when alpha = 0."""
    if alpha == 0 or not a:
        return b
    # one entry gains nothing from a foreach function, which takes twice as long to call
    if len(b) == 1 and a.keys() == b.keys() and type(alpha) is float and abs(alpha) <= HALF_MAX:
        ((name, entry),) = b.items()
        return {name: torch.add(entry, a[name], alpha=alpha)}
    if len(b) == 1 or _recorded(a, b) or _exceeds(alpha, b):
        _require_same(b, a)
        return {name: add_scaled(entry, alpha, a[name]) for name, entry in b.items()}
    add = torch._foreach_add if not isinstance(alpha, Scalar) else alpha.of(torch._foreach_add)
    return _like(b, add(*_pair(b, a), alpha=alpha))


def add_scaled(entry: Tensor, alpha: float, other: Tensor, out: Tensor | None = None) -> Tensor:
    """entry + alpha · other, into `out` where there is one and it is none to be made anew, for an alpha of any size.

    torch refuses one beyond the dtype's largest number (65,504 in float16), though alpha · other
    may well be below it: the sum is then taken in float64.
    """
    if out is not None and Recording.tape and Recording.tape.makes_anew([out]):
        out = None
    if -HALF_MAX <= alpha <= HALF_MAX or not _exceeds(alpha, {"": entry}):
        add = torch.add if not isinstance(alpha, Scalar) else alpha.of(torch.add)
        return add(entry, other, alpha=alpha, out=out)
    result = (entry.double() + alpha * other.double()).to(entry.dtype)
    return result if out is None else out.copy_(result)


HALF_MAX = torch.finfo(torch.float16).max


def _exceeds(alpha: float, a: Params) -> bool:
    """Whether a finite alpha is beyond the largest number of a dtype in a."""
    size = abs(alpha)
    if not HALF_MAX < size < math.inf:
        return False
    return any(size > torch.finfo(entry.dtype).max for entry in a.values())


def mul(a: Params, b: Params) -> Params:
    """a · b, entry by entry."""
    return _like(a, torch._foreach_mul(*_pair(a, b))) if a else {}


def div(a: Params, b: Params) -> Params:
    """a / b, entry by entry."""
    return _like(a, torch._foreach_div(*_pair(a, b))) if a else {}


def axpy_(y: Params, alpha: float, a: Params) -> Params:
    """y ← y + alpha · a."""
    if _exceeds(alpha, y):
        for name, entry in y.items():
            entry.copy_(add_scaled(entry, alpha, a[name]))
    elif y and Recording.tape and Recording.tape.makes_anew(y.values()):
        _require_same(y, a)
        y.update({name: add_scaled(entry, alpha, a[name]) for name, entry in y.items()})
    elif y:
        add_ = (
            torch._foreach_add_ if not isinstance(alpha, Scalar) else alpha.of(torch._foreach_add_)
        )
        add_(*_pair(y, a), alpha=alpha)
    return y


def scale_(y: Params, alpha: float) -> Params:
    """y ← alpha · y."""
    tape = Recording.tape
    # 16-bit numbers are rounded in another way where they are scaled in place
    if y and tape and tape.makes_anew(y.values()) and not any(e.dtype in HALF for e in y.values()):
        y.update(scale(alpha, y))
    elif y:
        mul_ = (
            torch._foreach_mul_ if not isinstance(alpha, Scalar) else alpha.of(torch._foreach_mul_)
        )
        mul_(list(y.values()), alpha)
    return y


def wide(value: Tensor) -> Tensor:
    """The value in float32 where it is narrower: sums and factorisations want that."""
    return value.float() if value.dtype in HALF else value


def summed_in(value: Tensor) -> torch.dtype:
    """The dtype that `wide` gives a value."""
    return torch.float32 if value.dtype in HALF else value.dtype


HALF = (torch.bfloat16, torch.float16)


def dot(a: Params, b: Params) -> float:
    """⟨a, b⟩ over all entries, as a Python float (one synchronisation)."""
    if len(a) == 1 and len(b) == 1:  # as most are: the ways of several cost as much as the product
        ((name, p),) = a.items()
        if type(name) is Part:
            return _dot_of_parts(a, b)
        if name not in b:
            _require_same(a, b)
        q = b[name]
        if p.dim() == 1 and p.dtype not in HALF:
            found = torch.dot(p, q).item()
        else:
            found = _dot_of_two(p, q).item()
        is_double = p.dtype is torch.float64
    elif not a:
        return 0.0
    elif type(next(iter(a))) is Part:
        return _dot_of_parts(a, b)
    else:
        _require_same(a, b)
        found = total([_dot_of_two(p, b[name]) for name, p in a.items()])
        is_double = all(p.dtype is torch.float64 for p in a.values())
    if not is_double and not 1e-30 < (found if a is b else abs(found)) < math.inf:
        # float32 may have lost what makes up the sum: to 0, or to infinity
        found = total(
            [torch.dot(flat_wide(p).double(), flat_wide(b[name]).double()) for name, p in a.items()]
        )
    return found


def _dot_of_two(p: Tensor, q: Tensor) -> Tensor:
    flat = flat_wide(p)  # a copy where memory is in another order, as slopes of weights often are
    return torch.dot(flat, flat if q is p else flat_wide(q))


def _dot_of_parts(a: Params, b: Params) -> float:
    """`dot` of what several ranks hold together: one sum over them, of one number."""
    _require_same(a, b)

    def found(taken: Callable[[Tensor], Tensor]) -> float:
        return _joined({n: torch.dot(taken(p), taken(b[n])).double() for n, p in a.items()}).item()

    value = found(flat_wide)
    if any(p.dtype is not torch.float64 for p in a.values()) and not 1e-30 < abs(value) < math.inf:
        value = found(lambda entry: flat_wide(entry).double())
    return value


def _joined(sums: Params, *, recorded: bool = False) -> Tensor:
    """The sum over entries, and over the ranks of what each has a part of, of one number an entry."""
    over, zero = holders(sums), next(iter(sums.values())).new_zeros(())
    own = sum((v for n, v in sums.items() if isinstance(n, Part) and n.rows), zero)
    rest = sum((v for n, v in sums.items() if not (isinstance(n, Part) and n.rows)), zero)
    if over is None:
        return rest
    return (over.leave(own) if recorded else over.total(own)) + rest


def summed(a: Params) -> Tensor:
    """The sum of all the numbers in a, as a tensor that can be differentiated.

    For what is added to a loss beside the losses of a problem: Σ y² of a penalty.
    """
    sums = map(torch.sum, a)
    if holders(a) is not None:
        return _joined(sums, recorded=True)
    parts = list(sums.values())
    return torch.stack([part.to(parts[0].device) for part in parts]).sum()


def largest(a: Params) -> float:
    """The largest number in a; 0 where there is none."""
    here = max((entry.max().item() for entry in a.values() if entry.numel()), default=-math.inf)
    over = holders(a)
    found = here if over is None else over.most(here)
    return 0.0 if found == -math.inf else found


def drawn(draw: Callable[[Tensor], Tensor], like: Params) -> Params:
    """draw applied to every entry, as `map`; of what ranks hold together to the whole, for its rows.

    So that random numbers are those of one rank. `draw` may look at shape, dtype and device alone.
    """
    found = {}
    for name, entry in like.items():
        if isinstance(name, Part) and name.rows:
            found[name] = draw(entry.new_empty(()).expand(name.shape))[name.rows].clone()
        else:
            found[name] = draw(entry)
    return found


def equal(a: Params, b: Params) -> bool:
    """Whether all entries are the same numbers."""
    _require_same(a, b)
    return everywhere(a, all(torch.equal(value, b[name]) for name, value in a.items()))


def everywhere(a: Params, here: bool) -> bool:
    """Whether something holds on each of the ranks that hold a tree together."""
    over = holders(a)
    if over is None:
        return here
    return over.total(next(iter(a.values())).new_full((), not here)).item() == 0


def flat_wide(value: Tensor) -> Tensor:
    """`wide`, in one dimension."""
    if value.dtype in HALF:
        value = value.float()
    return value if value.dim() == 1 else value.reshape(-1)


def total(parts: list[Tensor]) -> float:
    """The sum of scalars, in float64 where there are several (one synchronisation)."""
    if len(parts) == 1:
        return parts[0].item()
    return torch.stack(parts).double().sum().item()


def norm(a: Params) -> float:
    """‖a‖₂ over all entries, as a Python float."""
    square = dot(a, a)
    return math.sqrt(square) if not isinstance(square, Scalar) else sqrt(square)


def eps(a: Params) -> float:
    """The largest eps of the dtypes in a; 0 where it is empty."""
    return max((torch.finfo(value.dtype).eps for value in a.values()), default=0.0)


def or_wider(a: Params) -> str:
    """What a message ends in that float64 may help with: nothing where all of a is float64."""
    return "" if all(value.dtype == torch.float64 for value in a.values()) else ", or use float64"


def size(a: Params) -> int:
    """Number of scalars in a."""
    return sum(
        name.shape.numel() if isinstance(name, Part) else value.numel() for name, value in a.items()
    )


def is_finite(a: Params) -> bool:
    """Whether no entry holds NaN or an infinity."""
    here = True
    for value in a.values():
        # a sum, in one pass, has any that there is; finite entries may have an infinite one. That of
        # squares is the quicker one of a vector
        is_vector = value.dim() == 1 and value.is_floating_point()
        total = torch.dot(value, value) if is_vector else value.sum()
        if not -math.inf < total.item() < math.inf and not torch.isfinite(value).all():
            here = False
            break
    return everywhere(a, here)


def shapes(a: Params) -> dict[str, tuple[int, ...]]:
    """The shape of every entry, as a whole."""
    return {
        name: tuple(name.shape if isinstance(name, Part) else value.shape)
        for name, value in a.items()
    }


def flatten(a: Params) -> Tensor:
    """All entries in one vector, in the order of the names.

    Raises:
        ProblemError: several ranks hold a together, and the vector would be that of one of them.
    """
    if holders(a) is not None:
        raise ProblemError(
            "a component puts variables into one vector, of which each rank has its part alone "
            "(runtime.mesh.shard); use a component that does not, or set runtime.mesh.shard=1"
        )
    return torch.cat([value.reshape(-1) for value in a.values()])


ROWS = "rows of "
"""How the name of a matrix in a state begins whose rows are those of `own(y)`: saved, it is whole."""


def own(a: Params) -> Tensor:
    """`flatten` of what this rank has of a tree; sums over it are those of `gram`."""
    return torch.cat([value.reshape(-1) for value in a.values()])


def gram(S: Tensor, C: Tensor, like: Params) -> Tensor:
    """Sᵀ C for a matrix S, and a matrix or vector C, whose rows are those of `own(like)`: the same on every rank."""
    over = holders(like)
    if over is None:
        return S.T @ C
    # of what every rank has whole, the first one's counts
    counts = [
        torch.full((entry.numel(),), isinstance(name, Part) and name.is_counted, device=S.device)
        for name, entry in like.items()
    ]
    return over.total(S[torch.cat(counts)].T @ C[torch.cat(counts)])


def unflatten(vector: Tensor, like: Params) -> Params:
    """The inverse of `flatten`, and of `own`, in the shapes of `like`."""
    parts = vector.split([value.numel() for value in like.values()])
    return {n: p.reshape(v.shape) for (n, v), p in zip(like.items(), parts, strict=True)}


def cast(vector: Tensor, like: Params) -> Params:
    """`unflatten`, in the dtypes of `like` too."""
    parts = unflatten(vector, like)
    return {name: part.to(like[name].dtype) for name, part in parts.items()}


def contiguous(value: Any, known: Any = None) -> Any:
    """Tensors inside nested dicts and lists in plain row-major memory; copied only if they are not.

    `known` is what this returned before: those of its parts that are in `value` are not looked at again.
    """
    if value is known:
        return value
    if isinstance(value, Tensor):
        return value if value.is_contiguous() else value.contiguous()
    if type(value) is RowTable:  # whose trees were made so as they were put into it
        return value
    if isinstance(value, dict):
        before, made = known if isinstance(known, dict) else {}, {}
        for key, item in value.items():
            if type(item) is Tensor:  # as most are: no call for each
                made[key] = item if item.is_contiguous() else item.contiguous()
            else:
                made[key] = contiguous(item, before.get(key))
        return made
    if isinstance(value, list):
        return [contiguous(item) for item in value]
    return value


def to(value: Any, device: torch.device | str, dtype: torch.dtype) -> Any:
    """The tensors of a nested value on `device`; floating ones in `dtype`, others as they are."""

    if type(value) is dict and _stands(value, device, dtype):
        return dict(value)  # as most batches are, each of which comes here

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(device, dtype if leaf.is_floating_point() else leaf.dtype)

    return map_nested(move, value)


def _stands(values: dict[Any, Any], device: torch.device | str, dtype: torch.dtype) -> bool:
    """Whether all are numbers, or tensors that are where `to` would put them."""
    for leaf in values.values():
        if isinstance(leaf, Tensor):
            if leaf.device != device or (leaf.dtype != dtype and leaf.is_floating_point()):
                return False
        elif not isinstance(leaf, (int, float)):
            return False
    return True


def map_nested(
    function: Callable[..., Any], value: Any, *others: Any, whole: tuple[type, ...] = ()
) -> Any:
    """function applied to the leaves of nested values of one structure, as a batch may be.

    Nested are mappings, lists, tuples, named tuples and dataclasses, each of which comes back as
    what it was; a leaf is anything else, and what is `whole`.
    """
    if isinstance(value, whole):
        return function(value, *others)
    if isinstance(value, Mapping):
        entries = {
            key: map_nested(function, part, *(other[key] for other in others), whole=whole)
            for key, part in value.items()
        }
        return entries if type(value) is dict else _refilled(value, entries)
    if isinstance(value, (list, tuple)):
        rows = zip(value, *others, strict=True)
        mapped = [map_nested(function, *row, whole=whole) for row in rows]
        return type(value)(*mapped) if hasattr(value, "_fields") else type(value)(mapped)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # neither __init__ nor __post_init__ is run again: they need not take what they made
        made = copy.copy(value)
        for field in dataclasses.fields(value):
            row = (getattr(one, field.name) for one in (value, *others))
            object.__setattr__(made, field.name, map_nested(function, *row, whole=whole))
        return made
    return function(value, *others)


def _refilled(value: Any, entries: dict[Any, Any]) -> Any:
    """A mapping of another kind than dict with other values."""
    made = copy.copy(value)
    for key, entry in entries.items():
        made[key] = entry
    return made


def parts(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(where, part) of what a nested value is made of: nothing for a leaf."""
    if isinstance(value, Mapping):
        yield from ((f"{name}[{key!r}]", part) for key, part in value.items())
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        fields = getattr(value, "_fields")  # noqa: B009
        yield from ((f"{name}.{key}", part) for key, part in zip(fields, value, strict=True))
    elif isinstance(value, (list, tuple)):
        yield from ((f"{name}[{i}]", part) for i, part in enumerate(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        yield from ((f"{name}.{f.name}", getattr(value, f.name)) for f in fields)


def is_floating(leaf: Any) -> bool:
    """Whether a leaf is a tensor of floating-point numbers."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def named(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(where, leaf) of a nested value: ("batch['a'][0]", tensor)."""
    if not is_nested(value):
        yield name, value
    for where, part in parts(value, name):
        yield from named(part, where)


def flat(value: Any, name: str) -> Params:
    """The leaves of a nested value under dotted names, {"layer.weight": tensor}; a flat dict itself.

    Raises:
        ProblemError: it is not a container, or two of its leaves have one dotted name.
    """
    if isinstance(value, dict) and not any(is_nested(part) for part in value.values()):
        return value
    if not is_nested(value):
        kind = type(value).__name__
        raise ProblemError(
            f"{name} must be a dict[str, Tensor], or tensors in nested dicts, lists, tuples or "
            f"dataclasses, got {kind}"
        )
    found: Params = {}
    for key, leaf in _dotted(value, ""):
        if key in found:
            raise ProblemError(f"{name} has two entries of the dotted name {key!r}; rename one")
        found[key] = leaf
    return found


def nest(flat: Params, like: Any) -> Any:
    """The inverse of `flat`, in the containers of `like`."""
    names = iter([key for key, _ in _dotted(like, "")])
    return map_nested(lambda _: flat[next(names)], like)


def _dotted(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if not is_nested(value):
        yield prefix, value
        return
    if isinstance(value, Mapping):
        keys: Iterable[Any] = value
    elif isinstance(value, (list, tuple)):
        keys = getattr(value, "_fields", range(len(value)))
    else:
        keys = [field.name for field in dataclasses.fields(value)]
    for key, (_, part) in zip(keys, parts(value), strict=True):
        yield from _dotted(part, f"{prefix}.{key}" if prefix else str(key))


def is_nested(value: Any) -> bool:
    """Whether a value is a container that batches may be, rather than a leaf."""
    if isinstance(value, (Mapping, list, tuple)):
        return True
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def require_like(value: object, like: Params, what: str) -> None:
    """Raise `CheckError` unless `value` is a dict of tensors with the names, shapes and dtypes of `like`.

    `what` begins the message: "Mine.step must return y".
    """
    if not is_like(value, like):
        raise unlike(value, like, what)


def unlike(value: object, like: Params, what: str) -> CheckError:
    """What `require_like` raises."""
    return CheckError(f"{what} as {formed(like)}; got {formed(value)}")


def is_like(value: object, like: Params) -> bool:
    """Whether a value is a dict of tensors with the names, shapes and dtypes of `like`."""
    if not isinstance(value, dict) or value.keys() != like.keys():
        return False
    for name, entry in value.items():
        if not isinstance(entry, Tensor):
            return False
        if entry.shape != like[name].shape or entry.dtype != like[name].dtype:
            return False
    return True


def formed(value: object) -> str:
    """`{'w': (3, 2) float32}`, or the type of what is no dict of tensors."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {formed(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return f"a {type(value).__name__}"


def require(value: object, name: str) -> None:
    """Raise `ProblemError` unless `value` is a dict of names to floating-point tensors.

    Tensors made under `torch.inference_mode()` are refused too: autograd takes none of them.
    """
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise ProblemError(f"{name} must be a dict[str, Tensor], got {kind}")
    for key, entry in value.items():
        if not isinstance(key, str):
            raise ProblemError(
                f"{name} has the name {key!r}, a {type(key).__name__}; names are texts, since checkpoints "
                f"hold no others: use {str(key)!r}"
            )
        if not isinstance(entry, Tensor) or not entry.is_floating_point():
            got = entry.dtype if isinstance(entry, Tensor) else type(entry).__name__
            raise ProblemError(
                f"{name}[{key!r}] must be a floating-point tensor, got {got}; "
                "integers and buffers belong in the batch or the loss"
            )
        if entry.is_meta or entry.layout is not torch.strided:
            what = "has no data (device meta)" if entry.is_meta else "is sparse; take .to_dense()"
            raise ProblemError(f"{name}[{key!r}] {what}")
        if entry.is_inference():
            raise ProblemError(
                f"{name}[{key!r}] was made under torch.inference_mode(), and autograd takes no such "
                f"tensor; make it under torch.no_grad(), or pass {name}[{key!r}].clone(), taken "
                "outside of inference mode"
            )
