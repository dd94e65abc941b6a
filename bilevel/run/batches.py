"""Batches on the run's device and dtype, that resume exactly where they were."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor

from bilevel import rng, tree
from bilevel.errors import CheckpointError, ProblemError
from bilevel.problem.answers import require_pair
from bilevel.problem.unwritten import LOOKED_AT, Unwritten, glimpse


class Draws(Protocol):
    """Where a run takes the batches of one level from."""

    def __iter__(self) -> Iterator[Any]: ...
    def __next__(self) -> Any: ...
    def renew(self) -> None:
        """An upper step has ended, and the next begins."""
        ...

    def next_round(self) -> None:
        """Within a step: what is drawn now is for another hypergradient."""
        ...

    def save(self) -> dict[str, Any]:
        """What `restore` needs."""
        ...

    def rewind(self) -> None:
        """Have `save` say where the present upper step began; nothing is drawn afterwards."""
        ...

    @property
    def is_one_batch(self) -> bool:
        """Whether all draws are known to be of one batch."""
        ...

    def restore(self, saved: dict[str, Any]) -> None:
        """Go to where `save` was called; for fresh ones only."""
        ...


class Sampler:
    """A problem's batch iterator with its random stream, counted.

    An iterator with `state_dict` and `load_state_dict` is resumed by them. Any other is drawn
    from again as often as it had been, must leave its stream where it was, and must end at the
    batch it ended at: one that draws from a global random state does not.

    Where a step began is told by a place that was noted before and the number of draws from there: a `state_dict`
    may take longer than a step.
    """

    def __init__(
        self,
        make: Callable[[torch.Generator], Iterator[Any]],
        seed: int,
        name: str,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._name, self._device, self._dtype = name, device, dtype
        self._stream = rng.stream(seed, name)
        batches = make(self._stream)
        if not hasattr(batches, "__iter__"):
            raise ProblemError(
                f"{name} must be an iterator of batches; got a {type(batches).__name__}: "
                "itertools.repeat(None) where the losses need none"
            )
        if isinstance(
            batches, (Tensor, Mapping, tuple)
        ):  # each can be iterated: rows, keys, fields
            raise ProblemError(
                f"{name} must be an iterator of batches; got a {type(batches).__name__}, which reads as one "
                "batch: itertools.repeat(batch)"
            )
        self._batches = iter(batches)
        self._position = getattr(self._batches, "state_dict", None)
        self.drawn = 0
        self._last: Any = None
        self._seen: Unwritten | None = Unwritten(name)
        self._place: dict[str, Any]
        """Where it was at some step before."""
        self._begun: int
        """Batches drawn before the present upper step."""
        self._is_rewound = False
        self._settle()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            batch = next(self._batches)
        except StopIteration:
            raise ProblemError(
                f"{self._name} ended after {self.drawn} batches; batch iterators must be "
                "infinite: itertools.repeat(batch) for one batch, a `while True:` for epochs"
            ) from None
        self.drawn, self._last = self.drawn + 1, batch
        placed = tree.to(batch, self._device, self._dtype)
        if self._seen is not None:
            self._seen.look(placed)
            if self.drawn >= LOOKED_AT:
                self._seen = None
        return placed

    def renew(self) -> None:
        """Note where an upper step begins; each draw is a batch of its own."""
        self._begun = self.drawn
        if self._begun - self._place["drawn"] >= COUNTED:
            self._settle()

    def _settle(self) -> None:
        """Begin to count here."""
        self._place, self._begun = self._here(), self.drawn
        self._place["last"] = glimpse(self._last)
        with suppress(Exception):  # what cannot be copied no checkpoint could hold either
            # it may be what the iterator itself goes on to write into
            self._place["position"] = copy.deepcopy(self._place["position"])

    def next_round(self) -> None:
        """Each draw is a batch of its own."""

    def rewind(self) -> None:
        """Have `save` say where the present upper step began; nothing is drawn afterwards."""
        self._is_rewound = True

    @property
    def is_one_batch(self) -> bool:
        """Whether its iterator is `itertools.repeat`, which alone says so."""
        return isinstance(self._batches, itertools.repeat)

    def save(self) -> dict[str, Any]:
        """What `restore` needs."""
        if self._is_rewound:
            return self._place | {"since": self._begun - self._place["drawn"]}
        return self._here() | {"last": glimpse(self._last), "since": 0}

    def _here(self) -> dict[str, Any]:
        return {
            "drawn": self.drawn,
            "stream": self._stream.get_state(),
            "position": self._position() if self._position else None,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Go to where `save` was called; for a fresh sampler only.

        Raises:
            CheckpointError: drawing again did not lead to the same random state and batch.
        """
        if saved["position"] is not None:
            self._batches.load_state_dict(saved["position"])  # pyright: ignore[reportAttributeAccessIssue]
            self._stream.set_state(saved["stream"])
        else:
            for _ in range(saved["drawn"]):
                self._last = next(self._batches)
            self._require_same(saved)
        if not torch.equal(self._stream.get_state(), saved["stream"]):
            raise CheckpointError(
                f"{self._name} cannot be resumed: drawing {saved['drawn']} batches again left its "
                "random stream elsewhere. Draw from the given stream only, or give the iterator "
                "state_dict and load_state_dict"
            )
        self.drawn = saved["drawn"]
        since = saved.get("since", 0)
        if type(since) is not int or since < 0:
            raise CheckpointError(
                f"the saved state holds {str(since)[:40]!r} as {self._name}.since: it was altered"
            )
        for _ in range(since):
            next(self)
        self._settle()

    def _require_same(self, saved: dict[str, Any]) -> None:
        now = glimpse(self._last)
        before = saved.get("last", now)
        if before.shape == now.shape and torch.isclose(before, now, RTOL, 0.0, True).all():
            return
        raise CheckpointError(
            f"{self._name} cannot be resumed: drawing {saved['drawn']} batches again ended at "
            "another batch. Draw from the given stream, not from the global random state of torch, "
            "numpy or random (a DataLoader that shuffles takes generator=stream), or give the "
            "iterator state_dict and load_state_dict; and leave the data as they were"
        )


def first_batch(
    make: Callable[[torch.Generator], Iterator[Any]], stream: torch.Generator
) -> tuple[Any, bool]:
    """A first batch, and whether it is of the stream alone: else of a global random state."""
    before = stream.get_state()
    batch, draws = rng.inspected(lambda: next(iter(make(stream)), None))
    if not draws:
        return batch, True
    same = torch.Generator().set_state(before)
    again, _ = rng.inspected(lambda: next(iter(make(same)), None), seed=1)
    return batch, torch.equal(glimpse(batch), glimpse(again))


COUNTED = 64
"""Draws from which on a place is noted anew: those are drawn again where a step that failed is resumed."""
RTOL = 0.02
"""Batches may have been moved to another dtype; bfloat16 rounds by 0.4 %."""


class Paired:
    """One half of the pairs of a sampler; the two halves give the same pair until `renew`."""

    def __init__(self, pairs: Sampler, half: int, present: list[Any], said: str) -> None:
        self._pairs, self._half, self._present, self._said = pairs, half, present, said

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if not self._present:
            pair = next(self._pairs)
            require_pair(pair, self._said)
            self._present.append(pair)
        return self._present[0][self._half]

    def renew(self) -> None:
        """The next draw is of the next pair."""
        self._present.clear()
        self._pairs.renew()

    def next_round(self) -> None:
        """The next draw is of the next pair, of the same upper step."""
        self._present.clear()

    def rewind(self) -> None:
        """Have `save` say where the present upper step began; nothing is drawn afterwards."""
        self._pairs.rewind()

    @property
    def is_one_batch(self) -> bool:
        """Whether all draws are known to be of one pair."""
        return self._pairs.is_one_batch

    def save(self) -> dict[str, Any]:
        """What `restore` needs; the present pair is not kept, an upper step begins with a new one."""
        return self._pairs.save()

    def restore(self, saved: dict[str, Any]) -> None:
        """Go to where `save` was called; the first half to be asked takes the other along."""
        if not self._pairs.drawn:
            self._pairs.restore(saved)


def paired(episodes: Sampler, said: str) -> tuple[Draws, Draws]:
    """The (upper, lower) halves of `episodes`, which yields (lower batch, upper batch).

    `said` begins the message where it does not: "MyProblem.episodes".
    """
    present: list[Any] = []
    return Paired(episodes, 1, present, said), Paired(episodes, 0, present, said)
