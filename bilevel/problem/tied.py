"""Variables as they are counted: one for each tensor, whatever a loss calls it and keeps it in.

Two names may stand for one tensor, and x and y may be nested: inside, both are flat dicts of the
tensors that there are, and the losses and the results have what the caller gave.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor

from bilevel import tree
from bilevel.calculus.gauss_newton import Composed
from bilevel.errors import ProblemError
from bilevel.problem.signatures import takes
from bilevel.types import Counts, Function, Loss, Losses, Pairs, Params, Structure

Plain = Callable[[Params, Params], Tensor]
"""A loss without a batch: pure in (x, y), returns a scalar."""


class Ties:
    """Names that stand for one and the same tensor, and the way there and back.

    Nested values (dicts, lists, tuples, named tuples, dataclasses of tensors) are variables under
    dotted names, `layer.weight`; "with every name" is then in the containers that were given.

    The same memory seen through one shape is the same tensor, as in a `state_dict()`, which makes
    an object of its own for every name.

    Raises:
        ProblemError: two entries share a part of their memory, or see it in different shapes.
    """

    def __init__(self, given: Any, level: str = "") -> None:
        params = tree.flat(given, level)
        self._nested = None if params is given else given
        first: dict[Hashable, str] = {}
        self._home = {name: first.setdefault(_place(p), name) for name, p in params.items()}
        self.unique = {home: params[home] for home in first.values()}
        if len(params) > 1:
            _refuse_overlap(self.unique)

    def expand(self, unique: Params) -> Params:
        """The same with every name."""
        full = {name: unique[home] for name, home in self._home.items()}
        return full if self._nested is None else tree.nest(full, self._nested)

    def shrink(self, full: Any) -> Params:
        """The inverse of `expand`."""
        flat = full if self._nested is None else tree.flat(full, "the result")
        return {home: flat[home] for home in self.unique}

    def shrunk(
        self, given: Ties, function: Callable[[Params], Params]
    ) -> Callable[[Params], Params]:
        """A function from and to dicts with every name, as one of the unique entries alone."""

        def unique(params: Params) -> Params:
            return self.shrink(function(given.expand(params)))

        return unique

    def restrict(self, pairs: Pairs | None) -> Pairs | None:
        """Pairs in the names of `unique`: one entry for each variable, however many its names."""
        if pairs is None or self.trivial:
            return pairs
        return tuple((self.shrink(s), self.shrink(c)) for s, c in pairs)

    def expand_pairs(self, pairs: Pairs | None) -> Pairs | None:
        """The inverse of `restrict`."""
        if pairs is None or self.trivial:
            return pairs
        return tuple((self.expand(s), self.expand(c)) for s, c in pairs)

    @property
    def tied(self) -> bool:
        """Whether two names stand for one tensor."""
        return len(self.unique) < len(self._home)

    @property
    def trivial(self) -> bool:
        """Whether each name has a tensor of its own, in a flat dict."""
        return self._nested is None and not self.tied


def _place(entry: Tensor) -> Hashable:
    """Where a tensor lies; itself where it has no memory of its own (empty, expanded, traced)."""
    start = _start(entry)
    if start is None:
        return id(entry)
    return start, entry.shape, entry.stride(), entry.dtype, entry.device


def _start(entry: Tensor) -> int | None:
    expanded = any(n > 1 and not step for n, step in zip(entry.shape, entry.stride(), strict=True))
    if expanded or not entry.numel():
        return None
    try:
        return entry.data_ptr() or None
    except RuntimeError:  # inside a transform of torch.func
        return None


def _refuse_overlap(params: Params) -> None:
    """Raise `ProblemError` if a step of one entry would move a part of another."""
    placed = sorted(
        (start, start + _extent(entry) * entry.element_size(), name)
        for name, entry in params.items()
        if (start := _start(entry)) is not None
    )
    reach = placed[:1]
    for here in placed[1:]:
        for other in (o for o in reach if here[0] < o[1]):
            a, b = params[other[2]], params[here[2]]
            if a.device == b.device and _overlap(a, b, here[0] - other[0]):
                raise ProblemError(
                    f"{other[2]} and {here[2]} share a part of their memory, so that they are "
                    "neither one variable nor two; keep one of them and take the other from it in "
                    f"the loss, or give {here[2]} memory of its own: .clone()"
                )
        reach = [o for o in reach if here[0] < o[1]] + [here]


def _extent(entry: Tensor) -> int:
    """From the first to behind the last element, in elements."""
    steps = zip(entry.shape, entry.stride(), strict=True)
    return 1 + sum((size - 1) * step for size, step in steps)


def _overlap(a: Tensor, b: Tensor, offset: int) -> bool:
    """Whether two entries share an element, b beginning `offset` bytes behind a."""
    if a.dtype != b.dtype or offset % a.element_size():
        return True
    lead = offset // a.element_size()
    seen = torch.zeros(max(_extent(a), lead + _extent(b)), dtype=torch.bool)
    seen.as_strided(a.shape, a.stride()).fill_(True)
    return bool(seen.as_strided(b.shape, b.stride(), lead).any())


def bind(
    upper: Function | Plain,
    lower: Function | Plain,
    upper_batch: Any,
    lower_batch: Any,
    tied: tuple[Ties, Ties],
    structure: Structure | None = None,
) -> Losses:
    """F and G of the unique variables, with their batches and one ledger."""
    structure = structure or Structure()
    F, G = with_batch(upper, "upper"), with_batch(lower, "lower")
    if not all(ties.trivial for ties in tied):
        F, G = expanding(F, tied), expanding(G, tied)
        structure = _structured(structure, tied)
    counts = Counts()
    return Losses(
        Loss(F, upper_batch, counts, "upper"),
        Loss(G, lower_batch, counts, "lower", structure=structure),
    )


def with_batch(function: Function | Plain, level: str) -> Function:
    """A loss as a function of (x, y, batch), also one that takes (x, y) alone.

    That one raises `ProblemError` where there is a batch, which it would ignore.
    """
    if not _takes_no_batch(function):
        return cast("Function", function)
    plain = cast("Plain", function)

    def loss(x: Params, y: Params, batch: Any) -> Tensor:
        if batch is not None:
            raise ProblemError(
                f"{level}_loss takes (x, y) alone and would ignore the batch that was given; "
                f"write it as {level}_loss(x, y, batch), or give it no batch"
            )
        return plain(x, y)

    return loss


def _takes_no_batch(function: Callable[..., Any]) -> bool:
    """Whether a function takes two arguments and not three."""
    if isinstance(function, FunctionType) and function.__code__.co_argcount == 3:
        return False  # as most do: a signature takes longer than a step of CG
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # one written in C
        return False
    return takes(signature, 2) and not takes(signature, 3)


def _structured(structure: Structure, tied: tuple[Ties, Ties]) -> Structure:
    """The same for the variables without their second names."""
    x_ties, y_ties = tied

    def unique(function: Any, inward: bool) -> Any:
        def call(x: Params, y: Params, third: Any) -> Params:
            found = function(x_ties.expand(x), y_ties.expand(y), third)
            return y_ties.shrink(found) if inward else found

        return function and call

    project = structure.project
    return Structure(
        project=project and y_ties.shrunk(y_ties, project),
        prox=unique(structure.prox, True),
        map=unique(structure.map, True),
        constraints=unique(structure.constraints, False),
        diagonal=unique(structure.diagonal, True),
    )


def expanding(function: Function, tied: tuple[Ties, Ties]) -> Function:
    """A loss of the variables that a caller gave, as one of the unique entries alone."""
    if isinstance(function, Composed):
        return function.through(lambda x, y: (tied[0].expand(x), tied[1].expand(y)))
    return lambda x, y, batch: function(tied[0].expand(x), tied[1].expand(y), batch)
