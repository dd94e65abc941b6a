"""What the checks of a component have in common: one report of all that is wrong."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilevel.errors import CheckError
from bilevel.runfolder import checkpoint


def report(name: str, parts: Mapping[str, Callable[[], Iterator[str]]]) -> None:
    """Do every part and raise `CheckError` with what they found; an exception is a finding too."""
    found: list[str] = []
    for part, complaints in parts.items():
        try:
            found += [f"{part}: {text}" for text in complaints()]
        except Exception as error:
            found.append(f"{part}: raised {type(error).__name__}: {error}")
    if found:
        lines = "\n".join(f"  - {line}" for line in found)
        raise CheckError(f"{name}: {len(found)} of its checks failed:\n{lines}")


def difference(a: Any, b: Any, where: str = "") -> str | None:
    """Where two nested states differ, to the bit; None if they do not."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        alike = (a.shape, a.dtype) == (b.shape, b.dtype)
        same = alike and torch.equal(a.nan_to_num(), b.nan_to_num())
        return None if same else f"{where or 'it'} differs"
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        if a.keys() != b.keys():
            return f"{where or 'it'} has other names: {sorted(map(str, a.keys() ^ b.keys()))}"
        return _first(difference(a[key], b[key], f"{where}[{key!r}]") for key in a)
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return _first(
            difference(p, q, f"{where}[{i}]") for i, (p, q) in enumerate(zip(a, b, strict=True))
        )
    return None if type(a) is type(b) and a == b else f"{where or 'it'}: {a!r} is not {b!r}"


def _first(found: Iterator[str | None]) -> str | None:
    return next((text for text in found if text), None)


def through_a_checkpoint(state: Any) -> Any:
    """The state, written to disk and read again."""
    with tempfile.TemporaryDirectory() as folder:
        return checkpoint.load(checkpoint.save(Path(folder), {"state": state}, step=0))["state"]


def copied(value: Any) -> Any:
    """Nested containers with the tensors in memory of their own."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(copied, value))
    return type(value)(map(copied, value)) if isinstance(value, (list, tuple)) else value
