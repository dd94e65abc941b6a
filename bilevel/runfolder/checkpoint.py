"""Checkpoints: a nested state as safetensors + JSON, checksummed, written all or not at all.

checkpoints/step-00000050/{tensors.safetensors, state.json}. A process killed at any moment leaves the
old ones or the old ones and the new one (`files.replacing`); older ones are removed only after.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file as save_tensors
from torch import Tensor

from bilevel.errors import CheckpointError
from bilevel.runfolder import files

VERSION = 1
TENSORS, STATE = "tensors.safetensors", "state.json"
_NAME = re.compile(r"^step-(\d{8,})(?:\.(\d+))?$")


@dataclass(frozen=True)
class FoundCheckpoint:
    """The newest checkpoint that is whole, and why newer ones were passed over."""

    path: Path
    step: int
    skipped: tuple[str, ...] = ()
    settings: Mapping[str, str] | None = None
    """What was given to `save`."""


def save(
    folder: Path,
    saved: Mapping[str, Any],
    *,
    step: int,
    keep: int = 2,
    settings: Mapping[str, str] | None = None,
) -> Path:
    """Write `saved` as the checkpoint at `step`, then remove all but the `keep` newest.

    `settings` are what made the state, to be compared by whoever goes on with it.
    Checkpoints of later steps are removed too: the run has gone back behind them. Raises
    `CheckpointError` if it cannot be written; the checkpoints before it are then as they were.
    """
    tensors: dict[str, Tensor] = {}
    structure = _encode(saved, (), tensors)
    path = _free_name(folder, step)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.remove_temporaries(folder)  # a run folder has one writer at a time
        with files.replacing(path) as temporary:
            temporary.mkdir()
            _write(temporary, structure, _unshared(tensors), step, settings)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise CheckpointError(
            f"{folder}: the checkpoint at step {step} could not be written: {reason}. Earlier "
            "checkpoints are untouched; make room or choose another folder, then resume the run"
        ) from error
    _prune(folder, step, keep)
    return path


def require_savable(saved: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` where `save` could not write this, before there is work to lose."""
    _encode(saved, (), {})


def load(path: Path) -> dict[str, Any]:
    """The state in one checkpoint, bit for bit; tensors on the CPU.

    Raises `CheckpointError` where anything in it was altered or cut off, naming an older
    checkpoint that can be used.
    """
    try:
        return _load(path)
    except CheckpointError as error:
        older = _newest_valid(_checkpoints(path.parent, below=_order(path)))
        remedy = f"; the older {older.path} is whole" if older else "; no older one is whole"
        raise CheckpointError(f"{error}{remedy}") from error


def latest(folder: Path) -> FoundCheckpoint | None:
    """The newest whole checkpoint in `folder`, None where there is none at all.

    Raises `CheckpointError` if there are checkpoints and none is whole.
    """
    candidates = list(_checkpoints(folder))
    found = _newest_valid(candidates)
    if found is None and candidates:
        reasons = "; ".join(_fault(path) for path in candidates)
        raise CheckpointError(f"no checkpoint is whole: {reasons}. Start the run again")
    return found


def step_of(path: Path) -> int:
    """The step that the name of a checkpoint says."""
    return _order(path)[0]


def _newest_valid(candidates: Iterator[Path] | list[Path]) -> FoundCheckpoint | None:
    skipped = []
    for path in candidates:
        try:
            body, _ = _read(path)
        except CheckpointError as error:
            skipped.append(str(error))
        else:
            return FoundCheckpoint(path, step_of(path), tuple(skipped), body.get("settings"))
    return None


def _fault(path: Path) -> str:
    try:
        _read(path)
    except CheckpointError as error:
        return str(error)
    return ""


def _load(path: Path) -> dict[str, Any]:
    body, content = _read(path)
    try:
        state = _decode(body["state"], load_tensors(content))
    except (SafetensorError, KeyError) as error:
        raise CheckpointError(f"{path}: its two files do not belong together: {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path / STATE}: holds no state: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path / STATE}: holds no state, but a {type(state).__name__}")
    return state


def _read(path: Path) -> tuple[dict[str, Any], bytes]:
    """The two files of a checkpoint, checked against their checksums."""
    try:
        document = files.parse((path / STATE).read_bytes())
        content = (path / TENSORS).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path / STATE}: is cut off or altered: {error}") from error
    if not isinstance(document, dict) or document.keys() != {"checksum", "body"}:
        raise CheckpointError(f"{path / STATE}: is not a checkpoint, or was altered")
    body = document["body"]
    if document["checksum"] != _digest(_text(body).encode()):
        raise CheckpointError(f"{path / STATE}: does not match its checksum: it was altered")
    is_body = isinstance(body, dict) and {"version", "step", "tensors", "state"} <= body.keys()
    if not is_body or not isinstance(body.get("settings", {}), dict):
        raise CheckpointError(f"{path / STATE}: is not a checkpoint, or was altered")
    if body["version"] != VERSION:
        raise CheckpointError(
            f"{path}: has version {str(body['version'])[:40]}, this release reads version {VERSION}"
        )
    if body["step"] != step_of(path):
        raise CheckpointError(
            f"{path}: holds step {str(body['step'])[:40]}, not that of its name: it was altered"
        )
    if body["tensors"] != _digest(content):
        raise CheckpointError(
            f"{path / TENSORS}: does not match its checksum: it was cut off or altered"
        )
    return body, content


def _write(
    folder: Path,
    structure: Any,
    tensors: dict[str, Tensor],
    step: int,
    settings: Mapping[str, str] | None,
) -> None:
    save_tensors(tensors, folder / TENSORS)
    with (folder / TENSORS).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    body: dict[str, Any] = {"version": VERSION, "step": step, "tensors": digest}
    if settings is not None:
        body["settings"] = dict(settings)
    body["state"] = structure
    document = _text({"checksum": _digest(_text(body).encode()), "body": body})
    (folder / STATE).write_text(document, encoding="utf-8")


def _free_name(folder: Path, step: int) -> Path:
    """A new name even where the step was saved before: nothing is overwritten."""
    path, again = folder / f"step-{step:08d}", 0
    while path.exists():
        again += 1
        path = folder / f"step-{step:08d}.{again}"
    return path


def _order(path: Path) -> tuple[int, int]:
    match = _NAME.match(path.name)
    return (int(match[1]), int(match[2] or 0)) if match else (-1, 0)


def _checkpoints(folder: Path, below: tuple[int, int] | None = None) -> Iterator[Path]:
    """Checkpoints in a folder, the newest first."""
    if not folder.is_dir():
        return
    paths = [path for path in folder.iterdir() if _NAME.match(path.name)]
    for path in sorted(paths, key=_order, reverse=True):
        if below is None or _order(path) < below:
            yield path


def _prune(folder: Path, step: int, keep: int) -> None:
    paths = list(_checkpoints(folder))
    later = [path for path in paths if _order(path)[0] > step]
    past = [path for path in paths if _order(path)[0] <= step]
    for path in [*later, *past[keep:]]:
        shutil.rmtree(path, ignore_errors=True)


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, each with memory of its own, as safetensors needs them."""
    seen: set[int] = set()
    own = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != value.nbytes:
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        own[name] = value
    return own


def _encode(value: Any, where: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    """JSON of a nested state; what JSON does not have is {"$kind": …}."""
    if isinstance(value, Tensor):
        name = "/".join(where)
        while name in tensors:
            name += "'"
        tensors[name] = value
        return {"$tensor": name}
    if value is None or isinstance(value, (bool, str)) or type(value) is int:
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, list):
        return [_encode(item, (*where, str(i)), tensors) for i, item in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        entries = {key: _encode(item, (*where, key), tensors) for key, item in value.items()}
        return {"$dict": entries} if any(key.startswith("$") for key in entries) else entries
    raise CheckpointError(
        f"state.{'.'.join(where)}: a {type(value).__name__} cannot be saved; states are nested "
        "dicts (text keys) and lists of tensors, numbers, text, booleans and None"
    )


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]]
    if "$float" in value:
        return float(value["$float"])
    return {key: _decode(item, tensors) for key, item in value.get("$dict", value).items()}


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
