"""A mode that sees each operation, hidden from torch's compiler without importing that, which takes seconds."""

from __future__ import annotations

from typing import Any

from torch._C._dynamo import eval_frame
from torch.utils._python_dispatch import TorchDispatchMode

_HIDES = all(
    hasattr(eval_frame, name)
    for name in ("set_code_exec_strategy", "_FrameExecStrategy", "_FrameAction")
)
"""Not public in torch: where a version has no such names, a mode is hidden as torch does it."""


class HiddenMode(TorchDispatchMode):
    """A `TorchDispatchMode` whose `__torch_dispatch__` is never compiled."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Whether torch is to hide it, for which it imports its compiler."""
        return not _HIDES

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if _HIDES:
            skipped = eval_frame._FrameExecStrategy(*[eval_frame._FrameAction.SKIP] * 2)
            method: Any = cls.__torch_dispatch__
            eval_frame.set_code_exec_strategy(method.__code__, skipped)
