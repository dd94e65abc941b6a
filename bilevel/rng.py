"""Named random streams: one CPU generator a name, derived from the recipe's seed, checkpointed."""

import hashlib

import torch
from torch import Tensor


def stream(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on (seed, name) alone, independent of every other name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class Streams:
    """Streams by name, made on first use: `streams["lower.batches"]`. No global seeding."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._made: dict[str, torch.Generator] = {}

    def __getitem__(self, name: str) -> torch.Generator:
        if name not in self._made:
            self._made[name] = stream(self.seed, name)
        return self._made[name]

    def state(self) -> dict[str, Tensor]:
        """The state of every stream made so far, for a checkpoint."""
        return {name: made.get_state() for name, made in self._made.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Put every stream back to where `state` found it."""
        for name, saved in state.items():
            self[name].set_state(saved)
