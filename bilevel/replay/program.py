"""A recorded step as something to call: from its inputs and the next batches to its result.

Raises `Departed` in the place of a result where the step takes another way than the one recorded.
The batches that it has drawn by then are those that the step itself draws first, and are given again.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from bilevel import tree
from bilevel.replay.code import function_of
from bilevel.replay.graph import shorten
from bilevel.replay.layout import GIVEN, Rebuild, Take, given_leaves, is_given, rebuilder, taker
from bilevel.replay.recorder import Departed, NotReplayable, Recorder
from bilevel.replay.regions import Compiler, compiled
from bilevel.scalars.scalar import Scalar
from bilevel.scalars.table import RowTable

__all__ = ["OTHERS", "Departed", "Draws", "Feed", "NotReplayable", "Program", "record"]

OTHERS = "other tensors in"
"""How the reason begins where two draws of a record were the same tensors, and those of a replay are not."""
Draws = dict[str, Iterator[Any]]
"""Where batches come from, by level."""
Step = Callable[[Any, Draws], Any]
"""(inputs, draws) ↦ result: nested values of tensors and numbers."""


class Feed:
    """Batches that a replay draws, kept for the step that is taken again where it departs.

    With `copies` they are kept as they were drawn, also where their memory is written into afterwards.
    """

    def __init__(self, draws: Draws, *, copies: bool = False) -> None:
        self.draws, self._copies = draws, copies
        self._copied: list[tuple[Any, Any]] = []
        """Batches, and their copies."""
        self._copies_of: dict[int, Tensor] = {}
        """The last copy of a tensor, by its id, which stays its own while its batch is kept."""
        self._taken: dict[str, list[Any]] = {level: [] for level in draws}
        self.has_failed = False
        """Whether a batch could not be drawn."""

    def draw(self, level: str) -> Any:
        self.has_failed = True
        batch = next(self.draws[level])
        self.has_failed = False
        kept = tree.map_nested(self._copy, batch) if self._copies else batch
        self._taken[level].append(kept)
        if self._copies:
            self._copied.append((batch, kept))
        return batch

    def _copy(self, leaf: Any) -> Any:
        """A copy of a tensor; the same one where it is drawn again as it was, as data in one batch are."""
        if not isinstance(leaf, Tensor):
            return leaf
        known = self._copies_of.get(id(leaf))
        if known is None or not _is_still(leaf, known):
            known = self._copies_of[id(leaf)] = leaf.clone()
        return known

    def count(self) -> int:
        """Batches that were drawn."""
        return sum(len(kept) for kept in self._taken.values())

    def is_rewritten(self) -> bool:
        """Whether the memory of one, kept as a copy, holds something else by now."""
        return not all(
            _is_still(now, before)
            for pair in self._copied
            for now, before in zip(*map(given_leaves, pair), strict=True)
        )

    def iterators(self) -> Draws:
        """Batches that are kept as they are drawn."""

        def endless(level: str) -> Iterator[Any]:
            while True:
                yield self.draw(level)

        return {level: endless(level) for level in self.draws}

    def taken(self) -> Draws:
        """The same batches, and no others."""
        return {level: iter(kept) for level, kept in self._taken.items()}

    def again(self) -> Draws:
        """The same batches from the first on, and then the next ones."""
        return {
            level: itertools.chain(kept, self.draws[level]) for level, kept in self._taken.items()
        }


def _is_still(now: Any, before: Any) -> bool:
    """Whether a leaf of a batch is what it was; NaN is."""
    if not isinstance(now, Tensor):
        return True
    if torch.equal(now, before):
        return True
    return now.is_floating_point() and torch.allclose(now, before, 0.0, 0.0, equal_nan=True)


class Program:
    """A step that was recorded: how its inputs look, its operations, and its result."""

    def __init__(
        self, take: Take, graph: fx.Graph, constants: list[Tensor], rebuild: Rebuild
    ) -> None:
        self._take, self._rebuild, self._constants = take, rebuild, constants
        self._recorded = self.graph = graph
        self._forward = function_of(graph)
        self._without_grad = torch.no_grad()
        self.by: Compiler | None = None
        """What compiled its operations, where something did."""
        self.operations = sum(node.op == "call_function" for node in graph.nodes)

    @property
    def is_compiled(self) -> bool:
        return self.by is not None

    @property
    def is_single(self) -> bool:
        """Whether it computes something in float32 but counts."""
        metas = (node.meta for node in self._recorded.nodes)
        return any(one.get("dtype") is torch.float32 and one["size"] > 1 for one in metas)

    def compile(self, by: Compiler) -> None:
        """Have its operations compiled: results are then as the compiler says.

        Raises:
            CannotCompile: it cannot be, and stays as it is.
        """
        self._run(compiled(self._recorded, by, self._constants), by)

    def restore(self) -> None:
        """Undo `compile`."""
        self._run(self._recorded, None)

    def _run(self, graph: fx.Graph, by: Compiler | None) -> None:
        self.graph, self._forward, self.by = graph, function_of(graph), by

    def __call__(self, inputs: Any, feed: Feed) -> Any:
        """Raises `Departed` where the step is another one, and says at which line of code."""
        leaves = self._take(inputs)
        if leaves is None:
            raise Departed("shapes or settings of what it begins with")
        try:
            with self._without_grad:
                return self._rebuild(self._forward(*self._constants, feed, *leaves))
        except Departed:
            raise
        except Exception as error:  # whatever an operation raises the step itself says better
            if feed.has_failed:
                raise
            raise Departed(f"{type(error).__name__} in an operation") from error


def record(step: Step, inputs: Any, draws: Draws, *, apart: bool = False) -> tuple[Any, Program]:
    """The result of a step that is taken now, and the record of it.

    A tensor that is drawn twice is to be drawn twice in a replay, and what is computed of it is
    computed once; `apart` has each draw be one of its own.

    Raises:
        NotReplayable: it does what no replay could do again.
        Exception: what the step raises; also where it is not made for `bilevel.scalars.scalar.Scalar`.
    """
    recorder = Recorder()
    feed = recorder.graph.placeholder("feed")
    take = taker(inputs)
    names = (f"input_{k}" for k in itertools.count())
    given = tree.map_nested(
        lambda leaf: recorder.input(leaf, next(names)) if is_given(leaf) else leaf,
        inputs,
        whole=(RowTable,),
    )
    drawn: Draws = {
        level: _Recorded(level, source, recorder, feed, apart) for level, source in draws.items()
    }
    with recorder:
        found = step(given, drawn)
    nodes: list[Any] = []

    def held(leaf: Any) -> Any:
        if not isinstance(leaf, (Tensor, Scalar, RowTable)):
            return leaf
        nodes.append(recorder.node_of(leaf))
        return GIVEN

    rebuild = rebuilder(tree.map_nested(held, found, whole=(RowTable,)))
    recorder.graph.output(tuple(nodes))
    constants = [*shorten(recorder.graph, recorder.written), *recorder.constants[::-1]]
    return _plain(found), Program(take, recorder.graph, constants, rebuild)


def _plain(value: Any) -> Any:
    """The same with numbers in the places of scalars."""
    return tree.map_nested(
        lambda leaf: leaf.value if isinstance(leaf, Scalar) else leaf, value, whole=(RowTable,)
    )


class _Recorded:
    """An iterator of batches whose draws are recorded."""

    def __init__(
        self, level: str, source: Iterator[Any], recorder: Recorder, feed: Any, apart: bool
    ) -> None:
        self._level, self._source, self._recorder, self._feed = level, source, recorder, feed
        self._apart = apart
        self._seen: dict[int, Tensor] = {}
        self._kept: list[Tensor] = []

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        recorder = self._recorder
        batch = recorder.apart(lambda: next(self._source))
        known = [self._seen.get(id(leaf)) for leaf in given_leaves(batch)]
        same = {k: recorder.node_of(one) for k, one in enumerate(known) if one is not None}
        draw = _drawing(self._level, taker(batch), list(same))
        node = recorder.graph.call_function(draw, (self._feed, *same.values()))
        places = itertools.count()
        return tree.map_nested(
            lambda leaf: self._given(leaf, node, next(places)) if is_given(leaf) else leaf, batch
        )

    def gather(self, function: Callable[..., Any], first: Any, *given: Any) -> Any:
        """`bilevel.scalars.functions.gathered`: batches that function(self, first, *given) draws."""
        recorder = self._recorder
        found = recorder.apart(lambda: function(self._source, _plain(first), *given))
        draw = _gathering(self._level, taker(found), function, first, given)
        nodes = [recorder.node_of(leaf) for _, leaf in tree.named(first) if _is_followed(leaf)]
        node = recorder.graph.call_function(draw, (self._feed, *nodes))
        places = itertools.count()

        def bound(leaf: Any) -> Any:
            if not is_given(leaf):
                return leaf
            return recorder.result(
                recorder.graph.call_function(operator.getitem, (node, next(places))), leaf
            )

        return tree.map_nested(bound, found)

    def _given(self, leaf: Any, node: Any, place: int) -> Any:
        """What the step is given: the same tensor where it was given that before."""
        known = self._seen.get(id(leaf))
        if known is not None:
            return known
        given = self._recorder.result(
            self._recorder.graph.call_function(operator.getitem, (node, place)), leaf
        )
        if isinstance(leaf, Tensor) and not self._apart:
            self._seen[id(leaf)] = given
            self._kept.append(leaf)  # so that the id stays its own
        return given


def _drawing(level: str, take: Take, same: list[int]) -> Callable[..., list[Any]]:
    """What draws a batch in a replay, and gives its tensors and numbers.

    Those at the places `same` are given to it: they were drawn before, and are to be drawn again.
    """

    def draw(feed: Feed, *before: Tensor) -> list[Any]:
        leaves = take(feed.draw(level))
        if leaves is None:
            raise Departed(f"another shape of {level} batches")
        for place, one in zip(same, before, strict=True):
            if leaves[place] is not one:
                raise Departed(f"{OTHERS} {level} batches")
        return leaves

    draw.has_effect = True  # pyright: ignore[reportFunctionMemberAccess]
    return draw


def _is_followed(leaf: Any) -> bool:
    return isinstance(leaf, (Tensor, Scalar))


def _gathering(
    level: str, take: Take, function: Callable[..., Any], first: Any, given: tuple[Any, ...]
) -> Callable[..., list[Any]]:
    """What has a function draw batches in a replay, and gives their tensors and numbers.

    `first` is one that was drawn before, whose tensors and numbers are given to it.
    """
    again = rebuilder(tree.map_nested(lambda leaf: GIVEN if _is_followed(leaf) else leaf, first))

    def draw(feed: Feed, *parts: Any) -> list[Any]:
        leaves = take(function(feed.iterators()[level], again(parts), *given))
        if leaves is None:
            raise Departed(f"another shape of {level} batches")
        return leaves

    draw.has_effect = True  # pyright: ignore[reportFunctionMemberAccess]
    return draw
