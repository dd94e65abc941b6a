"""What a sweep has found: trials, the best first, and the recipe that wins, ready to run."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilevel.runfolder import record
from bilevel.runfolder.files import write_text
from bilevel.sinks.numbers import interval
from bilevel.sweeping.request import REMEDY, Request

if TYPE_CHECKING:
    import optuna

TABLE, CSV, BEST = "sweep.json", "trials.csv", "best.yaml"


@dataclass(frozen=True)
class Trial:
    """A trial."""

    number: int
    status: str
    """done, pruned, failed or running."""
    value: float | None
    """The measure, the mean over seeds; of one that is not done, where it stood last."""
    half: float | None
    """Of its 95 % interval over seeds."""
    seeds: tuple[float, ...]
    values: Mapping[str, Any]
    seconds: float | None
    reason: str | None

    @property
    def said(self) -> str:
        return "–" if self.value is None else interval(self.value, self.half)


def rows(study: optuna.Study, maximize: bool) -> list[Trial]:
    """The trials: done, the best first, of equal ones the earlier; then pruned, running and failed."""
    found = [_row(trial) for trial in study.get_trials(deepcopy=False)]
    order = ("done", "pruned", "running", "failed")

    def rank(row: Trial) -> tuple[int, float, int]:
        value = math.inf if row.value is None else -row.value if maximize else row.value
        return order.index(row.status), value, row.number

    return sorted(found, key=rank)


def _row(trial: optuna.trial.FrozenTrial) -> Trial:
    names = {"COMPLETE": "done", "PRUNED": "pruned", "FAIL": "failed"}
    status = names.get(trial.state.name, "running")
    about, so_far = trial.user_attrs, trial.intermediate_values
    value = trial.value if status == "done" else so_far[max(so_far)] if so_far else None
    return Trial(
        trial.number,
        status,
        value,
        about.get("half") if status == "done" else None,
        tuple(about.get("seeds", ())),
        dict(trial.params),
        about.get("seconds"),
        about.get("reason"),
    )


def keep(
    request: Request, folder: Path, found: Sequence[Trial], importance: Mapping[str, float]
) -> Path | None:
    """Write sweep.json, trials.csv and best.yaml; returns the last one's path, None without a trial."""
    document = {
        "measure": request.measure,
        "maximize": request.maximize,
        "sampler": request.sampler,
        "seeds": list(request.recipe.seeds),
        "importance": dict(importance),
        "trials": [asdict(row) for row in found],
    }
    text = json.dumps(record.strict(document, lambda _: None), indent=2, ensure_ascii=False)
    write_text(folder / TABLE, text + "\n", remedy=REMEDY)
    write_text(folder / CSV, _csv(request, found), remedy=REMEDY)
    if not found or found[0].status != "done":
        return None
    best = found[0]
    recipe = request.variant(best.values)
    seeds = f", {len(recipe.seeds)} seeds" if recipe.is_ensemble else ""
    note = f"# The best of a sweep: trial {best.number}, {request.measure} {best.value!r}{seeds}.\n"
    write_text(folder / BEST, note + recipe.dump(), remedy=REMEDY)
    return folder / BEST


def _csv(request: Request, found: Sequence[Trial]) -> str:
    out = io.StringIO()
    keys = [each.key for each in request.space]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["trial", "status", request.measure, "half", *keys, "seconds", "reason"])
    for row in found:
        chosen = [row.values.get(key) for key in keys]
        writer.writerow(
            [row.number, row.status, row.value, row.half, *chosen, row.seconds, row.reason]
        )
    return out.getvalue()


def short(keys: Sequence[str]) -> dict[str, str]:
    """What each key is called where room is short: its last word, where no two are called so."""
    names = {key: key.rpartition(".")[2] for key in keys}
    return {key: name if [*names.values()].count(name) == 1 else key for key, name in names.items()}
