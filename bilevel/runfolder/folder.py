"""Where a run lives: runs/<name>/<time>-<hash6>/ with all that is needed to read or resume it.

recipe.yaml       the recipe as it was written        checkpoints/   see bilevel.runfolder.checkpoint
resolved.yaml     overrides applied, defaults filled  figures/       PNG and SVG
environment.json  versions, platform, hash            report.html
events.jsonl      see bilevel.runfolder.record
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path
from typing import Any

from bilevel.errors import CheckpointError, RecipeError
from bilevel.runfolder import files, record

RECIPE, RESOLVED, ENVIRONMENT, LOCK = "recipe.yaml", "resolved.yaml", "environment.json", ".lock"
ENSEMBLE = "ensemble.yaml"
"""In the place of resolved.yaml in the folder of an ensemble, beside which those of its runs lie."""
_TIME = re.compile(r"\d{8}-\d{6}")
_ESTIMATOR = re.compile(r"^estimator:\n  name: (.+)$", re.MULTILINE)
_WITHOUT_RECORD = re.compile(r"^sinks:(?!.*\bjsonl\b)", re.MULTILINE | re.DOTALL)
_SAVED = re.compile(r"step-(\d{8,18})")
_REMEDY = f"put it back, or run {RESOLVED}, which lies beside it, again"
_PACKAGES = ("bilevel", "torch", "numpy", "scipy", "scikit-learn", "transformers", "peft")


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        """Where the checkpoint stays at which a measure was best (`checkpoint.best`)."""
        return self.checkpoints / "best"

    @property
    def figures(self) -> Path:
        return self.path / "figures"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def resolved(self) -> Path:
        return self.path / RESOLVED

    def environment(self) -> dict[str, Any]:
        """What the run was begun with; raises `CheckpointError` where that cannot be read."""
        path = self.path / ENVIRONMENT
        try:
            about = files.parse(path.read_bytes())
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}; {_REMEDY}") from error
        except ValueError as error:
            raise CheckpointError(f"{path}: is cut off or altered: {error}; {_REMEDY}") from error
        if not isinstance(about, dict) or not isinstance(about.get("hash"), str):
            raise CheckpointError(f"{path}: holds no hash of the recipe: altered; {_REMEDY}")
        if not isinstance(about.get("settings", {}), dict):
            raise CheckpointError(f"{path}: its settings are not a mapping: altered; {_REMEDY}")
        return about

    def finished(self) -> dict[str, Any] | None:
        """The `finished` event that ends the record, None where something else does."""
        event = record.last(self.path)
        return event if event and event["event"] == "finished" else None

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder; raises `CheckpointError` where another process holds it."""
        path = self.path / LOCK
        try:
            file = path.open("wb")
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be written: {error.strerror}; a run needs a folder to write to"
            ) from error
        with file:
            if not _acquire(file.fileno()):
                raise CheckpointError(f"{self.path}: another process is at this run; wait for it")
            files.remove_temporaries(self.path)
            yield

    def is_locked(self) -> bool:
        """Whether a process is at this run now."""
        path = self.path / LOCK
        if not path.is_file():
            return False
        try:
            with path.open("rb") as file:
                return not _acquire(file.fileno())
        except OSError:
            return False


@dataclass(frozen=True)
class Summary:
    """One line about a run."""

    folder: RunFolder
    name: str
    status: str
    """How `Finished` calls it, or running, stopped (without a word), unrecorded (no sink jsonl), damaged."""
    step: int
    steps: int
    upper_loss: float | None
    """F at the y of the run itself, before its last step."""
    estimator: str = "-"


def create(
    runs: Path,
    name: str,
    digest: str,
    *,
    text: str,
    resolved: str,
    overrides: Sequence[str],
    environment: Mapping[str, Any],
    stem: str | None = None,
    kind: str = RESOLVED,
) -> RunFolder:
    """A new folder below `runs` with the recipe as written and resolved, and the environment.

    It is made whole or not at all: raises `CheckpointError` where it cannot be. `stem` is its name in
    the place of the time, and `kind` that of the resolved recipe, by which it is known as what it is.
    """
    stem = stem or f"{datetime.now():%Y%m%d-%H%M%S}-{digest[:6]}"
    about = {"hash": digest, "overrides": list(overrides), **environment}
    try:
        path = _make_new(runs / name, stem)
        try:
            # by which a folder is known as a run comes last
            content = {RECIPE: text, ENVIRONMENT: json.dumps(about, indent=2) + "\n"}
            for file, written in (content | {kind: resolved}).items():
                with files.replacing(path / file) as temporary:
                    temporary.write_text(written, encoding="utf-8")
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise
    except OSError as error:
        raise CheckpointError(
            f"{runs}: no run folder can be made: {error.strerror}; name another with --runs-dir"
        ) from error
    return RunFolder(path)


def find(reference: str, runs: Path) -> RunFolder:
    """The run at the path `reference`, or the newest run of that name below `runs`."""
    for path in _places(reference, runs):
        if _is_run(path):
            return RunFolder(path)
        below = _folders(path)
        if below:
            return RunFolder(max(below, key=_age))
    raise RecipeError(
        f"{reference or repr(reference)}: is not a run: neither a folder with {RESOLVED} nor the name of a run below "
        f"{runs}/; `bilevel runs` lists them"
    )


def find_all(reference: str, runs: Path) -> list[RunFolder]:
    """Every run that `reference` stands for, the newest last: a run, all of a name, or a pattern of these.

    Patterns are those of the shell, of `name` or `name/run`. Raises `RecipeError` where there is none.
    """
    for path in _places(reference, runs):
        if _is_run(path):
            return [RunFolder(path)]
        if below := _folders(path):
            return [RunFolder(run) for run in sorted(below, key=_age)]
    found = []
    if any(sign in reference for sign in "*?["):
        name, _, stem = reference.strip("/").partition("/")
        found = [
            summary.folder
            for summary in summaries(runs)
            if fnmatchcase(summary.name, name)
            and fnmatchcase(summary.folder.path.name, stem or "*")
        ]
    if not found:
        raise RecipeError(
            f"{reference or repr(reference)}: is not a run: neither a folder with {RESOLVED} nor a name, or a pattern of "
            f"names, of runs below {runs}/; `bilevel runs` lists them"
        )
    return found


def _places(reference: str, runs: Path) -> tuple[Path, ...]:
    """Where a run may be; nothing is none, and not the current folder."""
    return (Path(reference), runs / reference) if reference else ()


def _age(run: Path) -> tuple[str, int]:
    """Orders runs by when they began; names tell seconds only, so the file's own time decides."""
    try:
        written = (run / RESOLVED).stat().st_mtime_ns
    except OSError:
        written = 0
    if _TIME.match(run.name):
        return run.name[:15], written
    return f"{datetime.fromtimestamp(written / 1e9):%Y%m%d-%H%M%S}", written  # a trial of a sweep


def summaries(runs: Path) -> list[Summary]:
    """All runs below `runs`, the newest last."""
    try:
        names = sorted(runs.iterdir()) if os.path.lexists(runs) else []
    except OSError as error:
        raise CheckpointError(f"{runs}: cannot be read: {error.strerror}") from error
    found = [summary_of(RunFolder(path)) for name in names for path in _folders(name)]
    return sorted(found, key=lambda summary: _age(summary.folder.path))


def environment() -> dict[str, Any]:
    """Versions, platform and threads: what a result can depend on besides the recipe."""
    import torch

    return {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES if _version(name)},
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cpus": os.cpu_count(),
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def other_arithmetic(
    begun: Mapping[str, Any], now: Mapping[str, Any], *, threads: bool = True
) -> str:
    """In what two environments round otherwise, as "torch 2.12, here 2.13"; "" where in nothing that is known."""
    pairs = {
        "torch": [about.get("packages", {}).get("torch") for about in (begun, now)],
        "instructions": [about.get("instructions") for about in (begun, now)],
    }
    if threads:
        pairs["threads"] = [about.get("threads") for about in (begun, now)]
    return " and ".join(
        f"{what} {before}, here {here}"
        for what, (before, here) in pairs.items()
        if before is not None and before != here
    )


def summary_of(folder: RunFolder) -> Summary:
    try:
        return _read_summary(folder)
    except CheckpointError:  # one damaged record does not hide the other runs
        return Summary(folder, folder.path.parent.name, "damaged", 0, 0, None)


def _read_summary(folder: RunFolder) -> Summary:
    first = next(record.read(folder.path), None)
    last = record.last(folder.path)
    stepped = record.last(folder.path, "stepped")
    finished = folder.finished()
    unfinished = "running" if folder.is_locked() else "stopped"
    estimator, is_recorded = _resolved(folder)
    if not is_recorded and unfinished == "stopped":
        step = max(_saved_steps(folder), default=0)
        return Summary(folder, folder.path.parent.name, "unrecorded", step, 0, None, estimator)
    return Summary(
        folder,
        folder.path.parent.name,
        finished["reason"] if finished else unfinished,
        last["step"] if last else 0,
        first["steps"] if first and first["event"] == "started" else 0,
        record.number(stepped["upper_loss"]) if stepped else None,
        estimator,
    )


def _saved_steps(folder: RunFolder) -> list[int]:
    names = [path.name for path in folder.checkpoints.glob("step-*")]
    return [int(match[1]) for match in map(_SAVED.match, names) if match]


def _resolved(folder: RunFolder) -> tuple[str, bool]:
    """From resolved.yaml, which `Recipe.dump` wrote: the estimator, or its class; whether there is a record."""
    try:
        text = folder.resolved.read_text(encoding="utf-8")
        found = _ESTIMATOR.search(text)
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder.resolved}: cannot be read: {error}") from error
    if not found:
        raise CheckpointError(f"{folder.resolved}: names no estimator: it was cut off or altered")
    return found[1].rpartition(":")[2], not _WITHOUT_RECORD.search(text)


def _folders(path: Path) -> list[Path]:
    """The runs in a folder; none in one that cannot be read, as those of other users in /proc."""
    try:
        return sorted(filter(_is_run, path.iterdir()))
    except OSError:
        return []


def _is_run(path: Path) -> bool:
    return os.path.isfile(path / RESOLVED)  # False, and no error, for what may not be looked at


def _make_new(parent: Path, stem: str) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    again = 1
    path = parent / stem
    while True:
        try:
            path.mkdir()
        except FileExistsError:
            again += 1
            path = parent / f"{stem}-{again}"
        else:
            return path


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _acquire(descriptor: int) -> bool:
    """Take the lock of an open file until it is closed; always granted where there is no flock."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
