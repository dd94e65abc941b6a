"""What somebody's own code raises: which method, at which step or event, on what batch, in their frames alone."""

from __future__ import annotations

import re
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import bilevel
from bilevel import registry
from bilevel.cli.options import settings
from bilevel.errors import BilevelError, UserCodeError

_LIBRARIES = tuple(
    str(Path(folder).resolve())
    for folder in (
        Path(bilevel.__file__).parent,
        Path(torch.__file__).parent.parent,
        sysconfig.get_path("stdlib"),
    )
)
_MISPLACED = re.compile(r"dtype|scalar type|same device|type \(.*\) and .* should be the same")
"""How torch says that two tensors of an operation do not go together."""
_PACKAGES = Path(sysconfig.get_path("purelib")).resolve()


@contextmanager
def explaining(when: Callable[[], str] = str) -> Iterator[None]:
    """Turn what somebody's own code raises into a `UserCodeError`; `when` says " in step 3".

    An error with no frame of the user's is passed on, but for one of too little memory. So is
    `SystemExit` from anywhere else than the user's code.
    """
    try:
        yield
    except BilevelError:
        raise
    except (Exception, SystemExit) as error:
        if settings.debug or (said := explained(error, when)) is None:
            raise
        raise UserCodeError(said) from error


def explained(error: BaseException, when: Callable[[], str] = str) -> str | None:
    """What is said of an error in somebody's own code; None of one that is not."""
    frames = [
        (frame, line) for frame, line in traceback.walk_tb(error.__traceback__) if _is_own(frame)
    ]
    return _said(error, frames, when()) if frames or is_memory(error) else None


def is_memory(error: BaseException) -> bool:
    """Whether an error is one of too little memory."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def _is_own(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    path = Path(file).resolve()
    if path.is_relative_to(_PACKAGES):
        return path.relative_to(_PACKAGES).parts[0].removesuffix(".py") in _plugged_in()
    return not file.startswith("<") and not str(path).startswith(_LIBRARIES)


def _plugged_in() -> set[str]:
    """The packages that register components: what is installed of somebody's own."""
    values = [v for group in registry.groups() for v in registry.references(group).values()]
    return {re.split("[.:]", value)[0] for value in values} - {"bilevel"}


def _said(error: BaseException, frames: list[tuple[FrameType, int]], when: str) -> str:
    kind = type(error).__name__
    reason = f"{kind}: {str(error).partition(chr(10))[0][:300]}"
    if is_memory(error):
        reason = f"too little memory ({reason}); take smaller batches, or runtime.dtype float32"
    if isinstance(error, SystemExit):
        reason = f"it calls sys.exit({error.code!r}), which would end the run"
    if not frames:
        return f"the run failed{when}: {reason}"
    first, _ = frames[0]
    owner = type(first.f_locals["self"]).__name__ + "." if "self" in first.f_locals else ""
    lines = [f"{owner}{first.f_code.co_name} failed{when}: {reason}"]
    if "batch" in first.f_locals:
        lines.append(f"  batch: {shape(first.f_locals['batch'])}")
    if isinstance(error, RuntimeError) and _MISPLACED.search(reason):
        lines.append(
            "  x, y and the batch have the run's dtype (float64 in bilevel check) and device; what else "
            "the loss holds, constants or modules, is moved there by the problem's place(device, dtype)"
        )
    for summary in traceback.StackSummary.extract(iter(frames)):
        lines.append(f"  {summary.filename}:{summary.lineno} in {summary.name}: {summary.line}")
    return "\n".join(lines)


def shape(batch: Any) -> str:
    """The shapes in a batch: `{image: (8, 3, 32, 32) float32, label: (8,) int64}`."""
    if hasattr(batch, "shape") and hasattr(batch, "dtype"):
        return f"{tuple(batch.shape)} {str(batch.dtype).removeprefix('torch.')}"
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{key}: {shape(part)}" for key, part in batch.items()) + "}"
    if isinstance(batch, (list, tuple)) and len(batch) <= 8:
        return "(" + ", ".join(map(shape, batch)) + ")"
    return type(batch).__name__
