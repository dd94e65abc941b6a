"""Peak memory of a stretch of code, above what the process held just before it.

On a CUDA device: the allocator's own peak. On Linux: the high-water mark of resident memory
(VmHWM), which the kernel sets back on request, so that what happened earlier does not count.
Elsewhere: the high-water mark of the whole process, which misses all that stays below an earlier
peak; `how` says which of them it was.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Peak:
    """Bytes above the start, known once the stretch has ended, and how they were read."""

    bytes: int = 0
    how: str = ""


@contextmanager
def peak(device: torch.device) -> Iterator[Peak]:
    """The peak of what runs inside."""
    found = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        torch.cuda.synchronize(device)
        found.bytes = torch.cuda.max_memory_allocated(device) - before
        found.how = "peak of CUDA allocations"
    elif _can_reset():
        _return_free_memory()
        _CLEAR.write_text("5")
        before = _resident("VmRSS")
        yield found
        found.bytes = max(0, _resident("VmHWM") - before)
        found.how = "peak resident memory"
    else:
        before = _high_water()
        yield found
        found.bytes = _high_water() - before
        found.how = "growth of the process's peak resident memory: a lower bound"


def _can_reset() -> bool:
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _return_free_memory() -> None:
    """Give back what malloc keeps for reuse: memory taken from there would not be seen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident(key: str) -> int:
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return 0


def _high_water() -> int:
    if sys.platform == "win32":
        return 0
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
