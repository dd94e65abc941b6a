"""Families of models that a folder may hold: one file each, found by the `model_type` of its config.

`family` is what they all say; a family is a value of it, not a class.
"""

from __future__ import annotations

from bilevel.errors import ProblemError

from .family import Family
from .idefics3 import IDEFICS3
from .llava import LLAVA
from .llava_next import LLAVA_NEXT
from .paligemma import PALIGEMMA
from .qwen2_vl import QWEN2_5_VL, QWEN2_VL

FAMILIES: dict[str, Family] = {
    "llava": LLAVA,
    "llava_next": LLAVA_NEXT,
    "qwen2_vl": QWEN2_VL,
    "qwen2_5_vl": QWEN2_5_VL,
    "paligemma": PALIGEMMA,
    "idefics3": IDEFICS3,
    "smolvlm": IDEFICS3,
}


def family_of(model_type: str) -> Family:
    """Raises `ProblemError` with the list of those known."""
    if model_type not in FAMILIES:
        raise ProblemError(
            f"a model of the family {model_type!r} is not known here; known are "
            f"{', '.join(FAMILIES)}. Another is a `Family` of its own: see "
            "bilevel_problems/mllm_hft/models/families"
        )
    return FAMILIES[model_type]
