"""How the CPU adds: with which instructions and on how many threads, on which the last digits of every result depend.

Sums in another order round otherwise. Of a convex problem that is seen in the last digits; a training of some hundred
steps that is stopped early can make another model of it. What is to be compared pair by pair is therefore computed alike.
"""

from __future__ import annotations

import hashlib
import os
from typing import Literal

from bilevel.errors import RequirementError

Instructions = Literal["default", "avx2", "avx512"]
NAMED = "BILEVEL_ARITHMETIC"
"""Environment variable by which a process knows what is asked for."""
_READ_BY = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR")
"""By torch, oneDNN and MKL, each when it computes for the first time."""
_VARIABLES: dict[Instructions, tuple[str, str, str]] = {
    "default": ("default", "SSE41", "COMPATIBLE"),
    "avx2": ("avx2", "AVX2", "AVX2"),
    "avx512": ("avx512", "AVX512_CORE", "AVX512"),
}


def ask_for(instructions: Instructions) -> None:
    """Have this process, and those that it starts, compute with `instructions`; too late once torch is imported."""
    os.environ.update(_variables(instructions))


def require(instructions: Instructions, threads: int) -> None:
    """Compute on `threads`, and tell the processes that this one starts what is asked for.

    Raises `RequirementError` where torch computes with other instructions.
    """
    import torch

    found = torch.backends.cpu.get_cpu_capability()
    if found != instructions.upper():
        settings = " ".join(f"{name}={value}" for name, value in _variables(instructions).items())
        raise RequirementError(
            f"{instructions.upper()} is asked for, and torch computes with {found}. Where the CPU has both, set "
            f"{settings} before torch is imported; else use another machine"
        )
    torch.set_num_threads(threads)
    os.environ[NAMED] = f"{instructions}, {_threads(threads)}"


def required() -> str | None:
    """What is asked for, by this process or by the one that began it; None where nothing is."""
    return os.environ.get(NAMED)


def here() -> str:
    """Instructions, threads and a digest of the bits that some float32 operations come to: `AVX2, 1 thread, 3f2a9c01`.

    Where two machines say the same, training is expected to come to the same bits; no list of operations proves it.
    """
    import torch

    found = torch.backends.cpu.get_cpu_capability()
    return f"{found}, {_threads(torch.get_num_threads())}, {_digest()}"


def _variables(instructions: Instructions) -> dict[str, str]:
    return dict(zip(_READ_BY, _VARIABLES[instructions], strict=True))


def _threads(number: int) -> str:
    return f"{number} thread{'s' if number > 1 else ''}"


def _digest() -> str:
    import torch
    from torch.nn import functional as F

    stream = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=stream)

    states = drawn(2, 4, 17, 16)
    results = [
        drawn(7, 61) @ drawn(61, 33),
        drawn(64, 256) @ drawn(256, 128),
        torch.bmm(drawn(4, 17, 32), drawn(4, 32, 17)),
        F.conv2d(drawn(2, 3, 32, 32), drawn(8, 3, 4, 4), stride=4),
        F.scaled_dot_product_attention(states, states, states),
        F.layer_norm(drawn(9, 65), (65,)),
        F.gelu(drawn(1001)),
        drawn(9, 65).softmax(-1),
        drawn(1001).exp(),
        drawn(1001).tanh(),
        drawn(1001).abs().log(),
        drawn(10_007).sum(),
        drawn(10_007).norm(),
        drawn(33, 65).mean(1),
    ]
    digest = hashlib.sha256()
    for result in results:
        digest.update(result.contiguous().numpy().tobytes())
    return digest.hexdigest()[:8]
