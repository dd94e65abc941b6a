"""The one way a file or a folder is put in place: written beside it, synced, then renamed.

A process that is killed at any moment, or a disk that is full, leaves what was there or all of what is
new. A killed one leaves its temporary, which `remove_temporaries` takes away.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from bilevel.errors import CheckpointError

TEMPORARY = ".writing-"
DEPTH = 200
"""Lists and mappings in one another that a file of a run may have; none that is written has so many."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` for a file or a folder to be written; it takes the place of `path` at the end.

    Where anything is raised within, `path` is as it was and nothing is left beside it. A folder can
    only take the place of nothing or of an empty one. Raises `OSError` where the system refuses.
    """
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        yield temporary
        for written in (*temporary.rglob("*"), temporary):
            _sync(written)
        temporary.replace(path)
    except BaseException:
        remove(temporary)
        raise
    _sync(path.parent)


def write_text(path: Path, text: str, *, remedy: str, make_folder: bool = False) -> None:
    """Write a whole file of text; raises `CheckpointError`, which ends in `remedy`, where it cannot be."""
    try:
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}; {remedy}") from error


def parse(text: str | bytes) -> Any:
    """The value of strict JSON; raises `ValueError` where it is none, also for too deep nesting."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("lists and mappings are too deep in one another") from None
    opened = text.count(b"[") + text.count(b"{") if isinstance(text, bytes) else DEPTH
    level = [value] if opened >= DEPTH else []
    for _ in range(DEPTH):
        level = [part for each in level for part in _parts(each)]
    if level:
        raise ValueError("lists and mappings are too deep in one another")
    return value


def _parts(value: Any) -> list[Any]:
    return (
        value if isinstance(value, list) else [*value.values()] if isinstance(value, dict) else []
    )


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def remove_temporaries(folder: Path) -> None:
    """Remove what killed processes were writing; for who is the one writer of the folder."""
    for path in folder.glob(f"{TEMPORARY}*"):
        remove(path)


def remove(path: Path) -> None:
    """Take away a file or a folder; nothing where it is not there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Have the disk hold a file's content, or a folder's names."""
    if path.is_dir() and sys.platform == "win32":  # which opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold the lock of a file, once whoever has it lets go; at once where the system has no flock."""
    with path.open("wb") as file:
        if sys.platform != "win32":
            import fcntl

            fcntl.flock(file.fileno(), fcntl.LOCK_EX)
        yield
