"""Tensors that two names of x or y stand for: one variable each, whatever the loss calls them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bilevel.composed import Composed
from bilevel.types import Counts, Function, Loss, Losses, Pairs, Params, Structure


class Ties:
    """Names that stand for one and the same tensor, and the way there and back."""

    def __init__(self, params: Params) -> None:
        first: dict[int, str] = {}
        self._home = {name: first.setdefault(id(entry), name) for name, entry in params.items()}
        self.unique = {home: params[home] for home in first.values()}

    def expand(self, unique: Params) -> Params:
        """The same with every name."""
        return {name: unique[home] for name, home in self._home.items()}

    def shrunk(
        self, given: Ties, function: Callable[[Params], Params]
    ) -> Callable[[Params], Params]:
        """A function from and to dicts with every name, as one of the unique entries alone."""

        def unique(params: Params) -> Params:
            full = function(given.expand(params))
            return {home: full[home] for home in self.unique}

        return unique

    def restrict(self, pairs: Pairs | None) -> Pairs | None:
        """Pairs in the names of `unique`: one entry for each variable, however many its names."""
        if pairs is None or self.trivial:
            return pairs
        return tuple(
            ({n: s[n] for n in self.unique}, {n: c[n] for n in self.unique}) for s, c in pairs
        )

    def expand_pairs(self, pairs: Pairs | None) -> Pairs | None:
        """The inverse of `restrict`."""
        if pairs is None or self.trivial:
            return pairs
        return tuple((self.expand(s), self.expand(c)) for s, c in pairs)

    @property
    def trivial(self) -> bool:
        """Whether each name has a tensor of its own."""
        return len(self.unique) == len(self._home)


def bind(
    upper: Function,
    lower: Function,
    upper_batch: Any,
    lower_batch: Any,
    tied: tuple[Ties, Ties],
    structure: Structure | None = None,
) -> Losses:
    """F and G of the unique variables, with their batches and one ledger."""
    structure = structure or Structure()
    if not all(ties.trivial for ties in tied):
        upper, lower = _expanding(upper, tied), _expanding(lower, tied)
        structure = _structured(structure, tied)
    counts = Counts()
    return Losses(
        Loss(upper, upper_batch, counts, "upper"),
        Loss(lower, lower_batch, counts, "lower", structure=structure),
    )


def _structured(structure: Structure, tied: tuple[Ties, Ties]) -> Structure:
    """The same for the variables without their second names."""
    x_ties, y_ties = tied

    def unique(function: Any, inward: bool) -> Any:
        def call(x: Params, y: Params, third: Any) -> Params:
            found = function(x_ties.expand(x), y_ties.expand(y), third)
            return {home: found[home] for home in y_ties.unique} if inward else found

        return function and call

    return Structure(
        prox=unique(structure.prox, True),
        map=unique(structure.map, True),
        constraints=unique(structure.constraints, False),
    )


def _expanding(function: Function, tied: tuple[Ties, Ties]) -> Function:
    if isinstance(function, Composed):
        return function.through(lambda x, y: (tied[0].expand(x), tied[1].expand(y)))
    return lambda x, y, batch: function(tied[0].expand(x), tied[1].expand(y), batch)
