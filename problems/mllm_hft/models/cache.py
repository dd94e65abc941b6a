"""Results on disk under a hash of all that determines them: made once, checked when read.

A file lies at `folder() / kind / <hash of the key>.safetensors`, with the key and a digest of the
tensors in its header. It is written beside its place and renamed, so that no reader sees half of
it; one that is cut short or altered is made again. Tensors that are loaded are maps of the file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import safetensors
import torch
from torch import Tensor

from bilevel.errors import RequirementError
from bilevel.events import Progress
from bilevel.runfolder import arithmetic, files

Tensors = dict[str, Tensor]
FORMATS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""How safetensors calls a dtype."""


@dataclass(frozen=True)
class Streamed:
    """A tensor that is written part by part, in order along its first axis, and never held."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Iterable[Tensor]


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
    return _place(kind, _key(key))


def load(kind: str, key: Mapping[str, Any]) -> Tensors | None:
    """The tensors kept under (kind, key), mapped on CPU; None if there are none or they are damaged.

    All of the file is read once for its digest, and none of it is held.
    """
    text = _key(key)
    try:
        with safetensors.safe_open(_place(kind, text), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            said = file.metadata() or {}
    except (FileNotFoundError, safetensors.SafetensorError):
        return None
    is_whole = said == {"key": text, "digest": _hash(tensors)}
    return tensors if is_whole else None


def save(kind: str, key: Mapping[str, Any], tensors: Mapping[str, Tensor | Streamed]) -> Path:
    """Keep the tensors under (kind, key), in one rename.

    Raises `RequirementError` if the folder cannot be written.
    """
    target = path(kind, key)
    whole = {
        name: Streamed(value.dtype, tuple(value.shape), [value])
        if isinstance(value, Tensor)
        else value
        for name, value in tensors.items()
    }
    with room_for(kind, key), files.replacing(target) as temporary, temporary.open("wb") as file:
        _write(file, _key(key), whole)
    return target


@contextmanager
def room_for(kind: str, key: Mapping[str, Any]) -> Iterator[Path]:
    """The folder that (kind, key) is written into, made if need be.

    Raises `RequirementError` where the system refuses to write there, then or within.
    """
    folder = path(kind, key).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    except OSError as error:
        raise RequirementError(
            f"{folder}: the cache cannot be written ({error}); "
            "make the folder writable or set BILEVEL_CACHE to one that is"
        ) from error


def content(value: Tensor) -> memoryview:
    """The bytes of a tensor."""
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write(file: IO[bytes], key: str, tensors: Mapping[str, Streamed]) -> None:
    """A safetensors file. Its header says the digest, which is known once all parts have passed."""
    # As safetensors orders them: the widest entries first, which aligns each to its width.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    places, end, found = dict[str, Any](), 0, dict[str, Any]()
    for name in order:
        kind, shape = tensors[name].dtype, tensors[name].shape
        begin, end = end, end + math.prod(shape) * kind.itemsize
        places[name] = {"dtype": FORMATS[kind], "shape": shape, "data_offsets": [begin, end]}

    def header(digest: str) -> bytes:
        text = json.dumps({"__metadata__": {"key": key, "digest": digest}, **places}).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    file.write(header(_hash(None)))
    for name in order:
        digest = hashlib.sha256()
        for part in tensors[name].parts:
            digest.update(content(part))
            file.write(content(part))
        found[name] = _described(tensors[name], digest.hexdigest())
    file.seek(0)
    file.write(header(_hash(found)))


def _described(value: Tensor | Streamed, digest: str) -> dict[str, Any]:
    return {"shape": list(value.shape), "dtype": str(value.dtype), "sha256": digest}


def _place(kind: str, text: str) -> Path:
    return folder() / kind / f"{_short(text)}.safetensors"


def _hash(value: Any) -> str:
    return _short(_text(value))


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _key(key: Mapping[str, Any]) -> str:
    """A key as text. What a study asks to be computed alike is not taken from what was computed otherwise."""
    required = arithmetic.required()
    return _text({**key, "arithmetic": required} if required else key)


def _text(value: Any) -> str:
    return json.dumps(_plain(value), sort_keys=True)


def _plain(value: Any) -> Any:
    """What JSON can write of a value, the same in every process; tensors as a digest."""
    if isinstance(value, Tensor):
        return _described(value, hashlib.sha256(content(value)).hexdigest())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        told = [field.name for field in dataclasses.fields(value) if field.compare]
        parts = {name: getattr(value, name) for name in told}
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
