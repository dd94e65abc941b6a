"""Named random streams: one CPU generator a name, derived from the recipe's seed."""

import hashlib
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def stream(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on (seed, name) alone, independent of every other name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@contextmanager
def seeded(seed: int, name: str) -> Iterator[None]:
    """The global random states of torch on the CPU, numpy and Python as (seed, name) says; put back at the end.

    For code that takes no generator, as the constructor of an `nn.Linear`.
    """
    number, numpy = stream(seed, name).initial_seed(), sys.modules.get("numpy")
    python, arrays = random.getstate(), numpy and numpy.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            torch.default_generator.manual_seed(number)
            random.seed(number)
            if numpy:
                numpy.random.seed(number % 2**32)
            yield
        finally:
            random.setstate(python)
            if numpy:
                numpy.random.set_state(arrays)


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
