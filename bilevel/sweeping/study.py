"""Optuna's side of a sweep: samplers, pruners, and the journal in which every trial stands.

The journal is one file that several processes and machines may write. Optuna's heartbeats are of databases
alone, so that a trial whose process died is known by its lock instead (`drive`).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilevel.errors import CheckpointError, RequirementError
from bilevel.sweeping.request import Request
from bilevel.sweeping.space import Dimension, Range

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

JOURNAL = "journal.log"
NAME = "sweep"


def require() -> None:
    """Raises `RequirementError` without the extra `sweep`."""
    from importlib.util import find_spec

    if find_spec("optuna") is None:
        raise RequirementError("a sweep needs optuna: pip install 'bilevel[sweep]'")


def storage(folder: Path) -> Any:
    """The journal in a folder."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(logging.ERROR)
    # absolute: Optuna's lock is a link to the file, which would point nowhere from another folder
    return optuna.storages.JournalStorage(JournalFileBackend(str((folder / JOURNAL).resolve())))


def mend(folder: Path) -> None:
    """Take away the end of a line that a kill or a full disk left in the journal, which all that follows would spoil.

    What it says was told to nobody yet. Raises `CheckpointError` where another line is damaged.
    """
    from optuna.storages.journal import JournalFileSymlinkLock

    path = (folder / JOURNAL).resolve()
    if not path.is_file():
        return
    lock = JournalFileSymlinkLock(str(path))
    lock.acquire()
    try:
        content = path.read_bytes()
        *lines, rest = content.split(b"\n")
        if rest:
            os.truncate(path, len(content) - len(rest))
    finally:
        lock.release()
    for number, line in enumerate(lines, 1):
        try:
            json.loads(line)
        except ValueError as error:
            raise CheckpointError(
                f"{path}:{number}: is damaged ({error}); take the line out, which loses what it says, or give "
                "the sweep another name: name=…"
            ) from error


def study(request: Request, folder: Path) -> optuna.Study:
    """The study in a folder, made where there is none.

    Its sampler stands where it would after the trials there are, had one process made them all:
    they are asked for again in memory.
    """
    import optuna

    mend(folder)
    store = storage(folder)
    chosen = sampler(request)
    direction = "maximize" if request.maximize else "minimize"
    found = optuna.create_study(
        study_name=NAME, storage=store, direction=direction, load_if_exists=True
    )
    replay = optuna.create_study(sampler=chosen, direction=direction)
    for past in found.get_trials(deepcopy=False):
        trial = replay.ask(distributions(request.space))
        for step, value in past.intermediate_values.items():
            trial.report(value, step)
        if past.state.is_finished():
            values = past.values if past.state == optuna.trial.TrialState.COMPLETE else None
            tell(replay, trial.number, values, past.state)
    return optuna.create_study(
        study_name=NAME,
        storage=store,
        direction=direction,
        sampler=chosen,
        pruner=pruner_of(request.pruner),
        load_if_exists=True,
    )


def tell(found: optuna.Study, number: int, value: Any, state: Any) -> None:
    """Keep how a trial ended. A grid that is at its end stops a loop of Optuna's own, and there is none here.

    https://github.com/optuna/optuna/issues/4121
    """
    try:
        found.tell(number, value, state=state)
    except RuntimeError:
        if found.get_trials(deepcopy=False)[number].state != state:
            raise


def sampler(request: Request) -> optuna.samplers.BaseSampler:
    """Optuna's own, with its defaults and the seed."""
    import optuna

    if request.sampler == "grid":
        return optuna.samplers.GridSampler(grid(request.space), seed=request.sampler_seed)
    if request.sampler == "random":
        return optuna.samplers.RandomSampler(seed=request.sampler_seed)
    return optuna.samplers.TPESampler(seed=request.sampler_seed)


def pruner_of(name: str) -> optuna.pruners.BasePruner:
    """`median` stops a trial that is worse than the median of those before it at the same step."""
    import optuna

    return optuna.pruners.MedianPruner() if name == "median" else optuna.pruners.NopPruner()


def grid(space: Sequence[Dimension]) -> Mapping[str, Sequence[Any]]:
    """The values of each key."""
    return {
        each.key: [int(v) for v in each.grid()]
        if isinstance(each, Range) and each.is_int
        else each.grid()
        for each in space
    }


def distributions(space: Sequence[Dimension]) -> dict[str, BaseDistribution]:
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    found: dict[str, BaseDistribution] = {}
    for each in space:
        if not isinstance(each, Range):
            found[each.key] = CategoricalDistribution(each.values)
        elif each.is_int:
            found[each.key] = IntDistribution(int(each.low), int(each.high), log=each.is_log)
        else:
            found[each.key] = FloatDistribution(each.low, each.high, log=each.is_log)
    return found


def importance(found: optuna.Study) -> dict[str, float]:
    """The share of the measure's variance that each setting accounts for (fANOVA); {} where it is not known.

    Hutter, Hoos and Leyton-Brown (2014), as Optuna has it.
    """
    import optuna

    done = found.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    if len(done) < 2 or len({trial.value for trial in done}) < 2:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return optuna.importance.get_param_importances(found, evaluator=evaluator)
