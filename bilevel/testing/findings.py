"""What the checks of a component have in common: one report of all that is wrong."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel import tree
from bilevel.errors import CheckError, told
from bilevel.runfolder import checkpoint


def report(name: str, parts: Mapping[str, Callable[[], Iterator[str]]]) -> None:
    """Do every part and raise `CheckError` with what they found; an exception is a finding too."""
    found: list[str] = []
    for part, complaints in parts.items():
        try:
            found += [f"{part}: {text}" for text in complaints()]
        except Exception as error:
            found.append(f"{part}: raised {told(error)}")
    if found:
        lines = "\n".join(f"  - {line}" for line in found)
        raise CheckError(f"{name}: {len(found)} of its checks failed:\n{lines}")


def difference(a: Any, b: Any, where: str = "") -> str | None:
    """Where two nested values differ, to the bit; None if they do not."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        alike = (a.shape, a.dtype) == (b.shape, b.dtype)
        same = alike and torch.equal(a.nan_to_num(), b.nan_to_num())
        return None if same else f"{where or 'it'} differs"
    if not tree.is_nested(a):
        return (
            None if type(a) is type(b) and _equal(a, b) else f"{where or 'it'}: {a!r} is not {b!r}"
        )
    if type(a) is not type(b) and not (isinstance(a, Mapping) and isinstance(b, Mapping)):
        return f"{where or 'it'} is {type(b).__name__}, and was {type(a).__name__}"
    ours, theirs = dict(tree.parts(a, where)), dict(tree.parts(b, where))
    if ours.keys() != theirs.keys():
        return f"{where or 'it'} has other names: {sorted(ours.keys() ^ theirs.keys())}"
    return _first(difference(part, theirs[name], name) for name, part in ours.items())


def _equal(a: Any, b: Any) -> bool:
    """a == b, also for arrays, which say it for each entry; an object of its own kind is not judged."""
    try:
        return (
            bool(np.array_equal(a, b, equal_nan=True))
            if isinstance(a, np.ndarray)
            else bool(a == b)
        )
    except (TypeError, ValueError, RuntimeError):
        return True


def _first(found: Iterator[str | None]) -> str | None:
    return next((text for text in found if text), None)


def through_a_checkpoint(state: Any) -> Any:
    """The state, written to disk and read again."""
    with tempfile.TemporaryDirectory() as folder:
        return checkpoint.load(checkpoint.save(Path(folder), {"state": state}, step=0))["state"]


def copied(value: Any) -> Any:
    """Nested containers with the tensors in memory of their own."""
    return tree.map_nested(
        lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, value
    )
