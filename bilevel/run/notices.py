"""What the ranks of a run leave for each other in a store: that one has failed and why, that all is done.

A rank leaves its last word before its connections close, so whoever finds them closed finds the word.
The first word is the cause of the others, and a rank without one was killed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bilevel.errors import LostRankError

PERIOD = 0.02
"""Seconds between two looks."""
GRACE = 1.0
"""Seconds in which a rank that lives has noticed that another is gone."""


@dataclass(frozen=True)
class Word:
    """What a rank said last, and its exit code."""

    rank: int
    code: int
    said: str


class Notices:
    """A store of keys and values that the ranks share, as one of them writes to it and reads from it."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.rank, self.size, self._store = rank, size, store

    def leave(self, code: int, said: str, *, is_cause: bool = True) -> None:
        """This rank's last word, once; as the cause of what follows unless another was first."""
        if self._has(f"word {self.rank}"):
            return
        word = json.dumps([self.rank, code, said])
        if is_cause:
            self._try(lambda: self._store.compare_set("cause", "", word))
        self._try(lambda: self._store.set(f"word {self.rank}", word))

    def cause(self) -> Word | None:
        """The first word that a rank left."""
        return self._word("cause")

    def word(self, rank: int) -> Word | None:
        """The last word of a rank."""
        return self._word(f"word {rank}")

    def tell(self, value: Any) -> None:
        """What the first rank tells all, before they are a group."""
        self._store.set("told", json.dumps(value))

    def told(self, seconds: float) -> Any:
        """What the first rank tells. Raises `LostRankError` where it does not."""
        self._await(lambda: self._has("told"), seconds, lambda: "rank 0")
        return json.loads(self._store.get("told"))

    def meet(self, seconds: float) -> None:
        """Wait until every rank is here. Raises `LostRankError` where one has failed, or does not come."""
        self._store.set(f"here {self.rank}", "")
        ranks = [*range(self.size)]
        keys = [f"here {rank}" for rank in ranks]
        late = lambda: _named([rank for rank in ranks if not self._has(keys[rank])])  # noqa: E731
        self._await(lambda: self._has(*keys), seconds, late)

    def end(self, code: int) -> None:
        """The first rank has written and said all, and ends with this code."""
        self._try(lambda: self._store.set("end", str(code)))

    def begin(self) -> None:
        """This rank hears signals from here on, and ends with the code of the first."""
        self._try(lambda: self._store.set(f"began {self.rank}", ""))

    def have_begun(self) -> bool:
        """Whether all ranks have."""
        return self._has(*(f"began {rank}" for rank in range(self.size)))

    def ended(self) -> int | None:
        """The code that the first rank ends with, None before that.

        Raises:
            LostRankError: the store is gone, and with it the rank or the launcher that began it.
        """
        try:
            return int(self._store.get("end")) if self._store.check(["end"]) else None
        except RuntimeError as error:
            raise LostRankError("the store of the ranks is gone") from error

    def lost(self, why: str) -> LostRankError:
        """The error of a rank that waited for others in vain: another's last word, or who was killed."""
        word = self.cause()
        if word and word.rank != self.rank:
            return LostRankError.told(word.code, f"rank {word.rank}: {word.said}")
        missing = self._missing()
        if not missing:
            return LostRankError(f"rank {self.rank} of {self.size} waited in vain: {why}")
        who = f"rank {' or '.join(map(str, missing))} of {self.size}"
        if "timed out" in why.lower():
            return LostRankError(
                f"{who} does not come to a sum: it hangs, or its work takes longer than runtime.timeout "
                f"({why})"
            )
        return LostRankError(
            f"{who} is gone without a word: killed, as the system does where memory runs out, or "
            "stopped from outside"
        )

    def _missing(self) -> list[int]:
        """The ranks that do not say that they live, after they were given time to.

        Of several some may live and wait for this one, which they hear of once it ends.
        """
        self._try(lambda: self._store.set(f"lives {self.rank}", ""))
        others = [rank for rank in range(self.size) if rank != self.rank]
        until = time.monotonic() + GRACE
        while True:
            missing = [rank for rank in others if not self._has(f"lives {rank}")]
            if len(missing) <= 1 or time.monotonic() > until:
                return missing
            time.sleep(PERIOD)

    def _await(self, is_there: Callable[[], bool], seconds: float, who: Callable[[], str]) -> None:
        until = time.monotonic() + seconds
        while not is_there():
            word = self.cause()
            if word and word.rank != self.rank:
                raise LostRankError.told(word.code, f"rank {word.rank}: {word.said}")
            if time.monotonic() > until:
                raise LostRankError(f"{who()} of {self.size} did not come within {seconds:.0f} s")
            time.sleep(PERIOD)

    def _word(self, key: str) -> Word | None:
        if not self._has(key):
            return None
        found = self._try(lambda: self._store.get(key))
        return Word(*json.loads(found)) if found else None

    def _has(self, *keys: str) -> bool:
        return bool(self._try(lambda: self._store.check([*keys])))

    def _try(self, ask: Callable[[], Any]) -> Any:
        """None where the store is gone, and with it the process that began it."""
        try:
            return ask()
        except RuntimeError:
            return None


def _named(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
