"""Batches on the run's device and dtype, that resume exactly where they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from bilevel import rng, tree
from bilevel.errors import CheckpointError, ProblemError


class Sampler:
    """A problem's batch iterator with its random stream, counted.

    An iterator with `state_dict` and `load_state_dict` is resumed by them. Any other is drawn
    from again as often as it had been, and must leave its stream where it was.
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
        self._batches = iter(make(self._stream))
        self._drawn = 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            batch = next(self._batches)
        except StopIteration:
            raise ProblemError(
                f"{self._name} ended after {self._drawn} batches; batch iterators must be "
                "infinite: itertools.repeat(batch) for one batch, a `while True:` for epochs"
            ) from None
        self._drawn += 1
        return tree.to(batch, self._device, self._dtype)

    def save(self) -> dict[str, Any]:
        """What `restore` needs."""
        position = getattr(self._batches, "state_dict", None)
        return {
            "drawn": self._drawn,
            "stream": self._stream.get_state(),
            "position": position() if position else None,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Go to where `save` was called; for a fresh sampler only.

        Raises:
            CheckpointError: drawing again did not lead to the same random state.
        """
        if saved["position"] is not None:
            self._batches.load_state_dict(saved["position"])  # pyright: ignore[reportAttributeAccessIssue]
            self._stream.set_state(saved["stream"])
        else:
            for _ in range(saved["drawn"]):
                next(self._batches)
        if not torch.equal(self._stream.get_state(), saved["stream"]):
            raise CheckpointError(
                f"{self._name} cannot be resumed: drawing {saved['drawn']} batches again left its "
                "random stream elsewhere. Draw from the given stream only, or give the iterator "
                "state_dict and load_state_dict"
            )
        self._drawn = saved["drawn"]
