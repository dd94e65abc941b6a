"""Results on disk under a hash of all that determines them: made once, checked when read.

A file lies at `folder() / kind / <hash of the key>.safetensors`, with the key and a digest of the
tensors in its header. It is written beside its place and renamed, so that no reader sees half of
it; one that is cut short or altered is made again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from bilevel.errors import RequirementError
from bilevel.events import Progress
from bilevel.runfolder import files

Tensors = dict[str, Tensor]


def folder() -> Path:
    """`$BILEVEL_CACHE`, else `$XDG_CACHE_HOME/bilevel`, else `~/.cache/bilevel`."""
    if chosen := os.environ.get("BILEVEL_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "bilevel"


def cached(
    kind: str, key: Mapping[str, Any], make: Callable[[], Generator[Progress, None, Tensors]]
) -> Generator[Progress, None, Tensors]:
    """The tensors kept under (kind, key); if there are none, those that `make` returns, now kept.

    Use as `tensors = yield from cached("vit", key, make)`. `make` yields its progress and returns
    the tensors. `key` must hold everything that determines them: options, seeds, data (tensors
    are hashed by content) and a version number to raise when the code that makes them changes.
    """
    found = load(kind, key)
    if found is None:
        found = yield from make()
        save(kind, key, found)
    return found


def path(kind: str, key: Mapping[str, Any]) -> Path:
    """Where the tensors of (kind, key) lie, whether they are there or not."""
    return folder() / kind / f"{_hash(key)}.safetensors"


def load(kind: str, key: Mapping[str, Any]) -> Tensors | None:
    """The tensors kept under (kind, key), on CPU; None if there are none or they are damaged."""
    try:
        with safetensors.safe_open(path(kind, key), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            expected = (file.metadata() or {}).get("digest")
    except (FileNotFoundError, safetensors.SafetensorError):
        return None
    return tensors if _hash(tensors) == expected else None


def save(kind: str, key: Mapping[str, Any], tensors: Tensors) -> Path:
    """Keep the tensors under (kind, key), in one rename.

    Raises `RequirementError` if the folder cannot be written.
    """
    target = path(kind, key)
    # Clones, because safetensors refuses tied weights, which share memory.
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    header = {"key": json.dumps(_plain(key), sort_keys=True), "digest": _hash(plain)}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(target) as temporary:
            save_file(plain, temporary, metadata=header)
    except OSError as error:
        raise RequirementError(
            f"{target.parent}: the cache cannot be written ({error}); "
            "make the folder writable or set BILEVEL_CACHE to one that is"
        ) from error
    return target


def _hash(value: Any) -> str:
    text = json.dumps(_plain(value), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _plain(value: Any) -> Any:
    """What JSON can write of a value, the same in every process; tensors as a digest."""
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest = hashlib.sha256(content.data).hexdigest()
        return {"shape": list(value.shape), "dtype": str(value.dtype), "sha256": digest}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {"class": type(value).__qualname__, **_plain(parts)}
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(part) for part in value)
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise TypeError(f"a cache key holds text, numbers, tensors and containers, got {value!r}")
