"""Named random streams: one CPU generator a name, derived from the recipe's seed."""

import hashlib
import random
import sys
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


def stream(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on (seed, name) alone, independent of every other name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class Seeded:
    """Within `with`, the global random states of torch, numpy and Python are as (seed, name) says.

    Afterwards they are as before; entered again, they go on where they were left. For code that takes
    no generator, as the constructor of an `nn.Linear`. Of the devices it is the CPU and `device`.
    """

    def __init__(self, seed: int, name: str, device: torch.device | None = None) -> None:
        self._number = stream(seed, name).initial_seed()
        self._sources = _sources(device)
        self._own: list[Any] = []
        self._outer: list[Any] = []

    def __enter__(self) -> None:
        self._outer = [source.get() for source in self._sources]
        for number, source in enumerate(self._sources):
            if self._own:
                source.set(self._own[number])
            else:
                source.seed(self._number)

    def __exit__(self, *raised: object) -> None:
        self._own = [source.get() for source in self._sources]
        for source, state in zip(self._sources, self._outer, strict=True):
            source.set(state)

    def each(self, steps: Generator[Any, None, Any] | Iterator[Any]) -> Generator[Any, None, Any]:
        """A generator whose steps are taken within; whoever takes them has their own states."""
        try:
            while True:
                with self:
                    try:
                        step = next(steps)
                    except StopIteration as end:
                        return end.value
                yield step
        finally:
            if close := getattr(steps, "close", None):
                close()


def inspected(call: Callable[[], Any], seed: int = 0) -> tuple[Any, bool]:
    """What a call gives where the global random states are of `seed`, and whether it draws from one of them."""
    with Seeded(seed, "inspection"):
        untouched = _next()
    with Seeded(seed, "inspection"):
        return call(), _next() != untouched


def _next() -> list[float]:
    numbers, numpy = [float(torch.rand(())), random.random()], sys.modules.get("numpy")
    return [*numbers, numpy.random.random()] if numpy else numbers


class _Source(NamedTuple):
    """A global random state: how it is read, written and seeded."""

    get: Callable[[], Any]
    set: Callable[[Any], Any]
    seed: Callable[[int], Any]


def _sources(device: torch.device | None) -> list[_Source]:
    cpu = torch.default_generator
    found = [
        _Source(cpu.get_state, cpu.set_state, cpu.manual_seed),
        _Source(random.getstate, random.setstate, random.seed),
    ]
    if numpy := sys.modules.get("numpy"):
        arrays = numpy.random
        found.append(_Source(arrays.get_state, arrays.set_state, lambda n: arrays.seed(n % 2**32)))
    if device is not None and device.type == "cuda":
        torch.cuda.init()
        index = torch.cuda.current_device() if device.index is None else device.index
        cuda = torch.cuda.default_generators[index]
        found.append(_Source(cuda.get_state, cuda.set_state, cuda.manual_seed))
    if device is not None and device.type == "mps":
        mps = torch.mps
        found.append(_Source(mps.get_rng_state, mps.set_rng_state, mps.manual_seed))
    return found


def signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """±1 with equal chance, in the shape, dtype and device of `like`."""
    return (2 * torch.randint(0, 2, like.shape, generator=generator) - 1).to(like)


class Streams:
    """Streams by name, made on first use: `streams["lower.batches"]`. No global seeding."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._made: dict[str, torch.Generator] = {}

    def __getitem__(self, name: str) -> torch.Generator:
        if name not in self._made:
            self._made[name] = stream(self.seed, name)
        return self._made[name]
