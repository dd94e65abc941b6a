"""What was measured, as it is kept: one JSON a row of the benchmark, and one line a run of history."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from tests.benchmarks.environments import ROOT
from tests.benchmarks.rows import is_by_hand

KEPT = ROOT / "docs" / "benchmarks"
HISTORY = "history.jsonl"
MEASURED = ("bilevel", "problems", "recipes")
"""Folders of the repository."""
TOLERANCE = 1e-2
"""Relative error above which a value counts as wrong; float32 rounding stays below 1e-4."""


@dataclass(frozen=True)
class Method:
    """One method of a row: what each round cost, and how far off its value was."""

    name: str
    seconds: list[float]
    bytes: int | None = None
    error: float | None = None
    """Relative, against the truth; None where a method computes no value to compare."""

    @property
    def is_wrong(self) -> bool:
        return self.error is not None and not self.error <= TOLERANCE

    @property
    def is_ours(self) -> bool:
        return self.name.startswith("bilevel")


@dataclass(frozen=True)
class Measured:
    """A row of the benchmark: its methods, measured in turn, beside the floor."""

    row: str
    floor: str
    methods: list[Method]
    absent: dict[str, str] = field(default_factory=dict)
    """Why a library has no part in it."""
    per: int = 1
    """Iterations a call, where an iteration is what the page speaks of."""
    unit: str = "seconds"
    commit: str = ""
    date: str = ""
    machine: dict[str, Any] = field(default_factory=dict)

    def method(self, name: str) -> Method:
        return next(method for method in self.methods if method.name == name)

    @property
    def ours(self) -> Method:
        """The fastest of this library that is right."""
        return min((m for m in self.methods if m.is_ours and not m.is_wrong), key=_typical)

    @property
    def best_peer(self) -> Method | None:
        """The fastest other library that is right; None where there is none."""
        others = [m for m in self.methods if not m.is_ours and not is_by_hand(m.name)]
        return min((m for m in others if not m.is_wrong), key=_typical, default=None)

    def ratio(self, name: str, other: str) -> tuple[float, float, float]:
        """(lower quartile, median, upper quartile) over the rounds of the ratio within one."""
        pairs = zip(self.method(name).seconds, self.method(other).seconds, strict=True)
        ratios = [one / two for one, two in pairs]
        if len(ratios) == 1:
            return ratios[0], ratios[0], ratios[0]
        low, _, high = quantiles(ratios, n=4, method="inclusive")
        return low, median(ratios), high

    def ratios(self) -> dict[str, Any]:
        """What history keeps of a row."""
        ours, peer = self.ours, self.best_peer
        found: dict[str, Any] = {"floor": _short(self.ratio(ours.name, self.floor)[1])}
        if peer is not None:
            found |= {"peer": _short(self.ratio(ours.name, peer.name)[1]), "best": peer.name}
        return found


def _typical(method: Method) -> float:
    return median(method.seconds)


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def slug(row: str) -> str:
    return row.replace(",", "").replace(" ", "_")


def save(found: Measured, kept: Path = KEPT) -> None:
    kept.mkdir(parents=True, exist_ok=True)
    data = asdict(found)
    for method in data["methods"]:
        method["seconds"] = [_short(value) for value in method["seconds"]]
        method["error"] = method["error"] and _short(method["error"])
    text = json.dumps(data, ensure_ascii=False, indent=1)
    (kept / f"{slug(found.row)}.json").write_text(text + "\n", encoding="utf-8")


def load(row: str, kept: Path = KEPT) -> Measured | None:
    """A row as it was last measured."""
    path = kept / f"{slug(row)}.json"
    if not path.exists():
        return None
    data = json.loads(path.read_text(encoding="utf-8"))
    return Measured(**data | {"methods": [Method(**each) for each in data["methods"]]})


def append(found: Measured, kept: Path = KEPT) -> None:
    """The row into the last line of history; into a new line where that has it, or is of another state."""
    path = kept / HISTORY
    lines = history(kept)
    here = {"commit": found.commit, "machine": found.machine}
    last = lines[-1] if lines else {}
    if {k: last.get(k) for k in here} != here or found.row in last["rows"]:
        lines.append({"date": found.date, **here, "rows": {}})
    lines[-1]["rows"][found.row] = found.ratios()
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")


def history(kept: Path = KEPT) -> list[dict[str, Any]]:
    path = kept / HISTORY
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def machine() -> dict[str, Any]:
    """What the numbers of a run depend on beside the commit."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit(root: Path = ROOT) -> str:
    """The last that changed what is measured; with a + where the tree differs, "" outside of one."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=root, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", *MEASURED)
    return git("log", "-1", "--format=%h", "--abbrev=10", "--", *MEASURED) + (
        "+" if changed else ""
    )


def today() -> str:
    return datetime.now(UTC).date().isoformat()
