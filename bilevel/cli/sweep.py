"""`sweep`: many settings of one recipe, each a run; the best ones, what matters, and the recipe that wins."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bilevel import recipe as recipes
from bilevel.cli import sweep_trial
from bilevel.cli.answer import JSONAnswer
from bilevel.cli.boundary import Stopped, complain
from bilevel.cli.names import locate
from bilevel.cli.output import going_on
from bilevel.cli.signals import Signals
from bilevel.cli.sweep_trial import LOSSES
from bilevel.cli.tables import natural_width, print_fitted
from bilevel.cli.user_code import explaining
from bilevel.errors import CheckpointError, RecipeError, unknown
from bilevel.events import Evaluated
from bilevel.recipe.assemble import assemble
from bilevel.recipe.recipe import Recipe
from bilevel.run import engine
from bilevel.runfolder import RunFolder, environment, other_arithmetic
from bilevel.runfolder.files import parse
from bilevel.runfolder.folder import ENVIRONMENT
from bilevel.sinks.numbers import duration, significant
from bilevel.sweeping import figure, ray, result, space, study
from bilevel.sweeping import request as requests
from bilevel.sweeping.drive import Driver, Ended, Start
from bilevel.sweeping.request import Request
from bilevel.sweeping.result import Trial

FAILED = 6
"""Exit code where some trials failed."""
TRIALS = 20
"""Of a sampler that has no end."""
SHOWN = 10
ENGINES = ("local", "ray")


def sweep(
    console: Console,
    reference: str,
    words: Sequence[str],
    *,
    trials: int | None,
    seeds: str | None,
    measure: str,
    maximize: bool,
    sampler: str | None,
    pruner: str,
    sampler_seed: int,
    workers: int,
    on_error: str,
    engine_name: str,
    ray_address: str | None,
    runs: Path,
    quiet: bool = False,
    answer: JSONAnswer | None = None,
) -> None:
    """Run the trials that are missing, then show the best and write what was found.

    An `answer` is sweep.json, with its place as "file".
    """
    study.require()
    varied, fixed = space.parse(words)
    if not varied:
        raise RecipeError(
            "nothing is varied: write a range or a list, e.g. upper.optimizer.lr=1e-3..1e-1,log "
            "or estimator=implicit,unroll"
        )
    if seeds is not None:
        fixed = [*fixed, f"seeds={seeds}"]
    path = locate(reference)
    asked = Request(
        recipe=recipes.load(path, fixed),
        space=tuple(varied),
        measure=measure,
        maximize=maximize,
        sampler=_one_of("--sampler", sampler or _natural(varied), requests.SAMPLERS),
        pruner=_one_of("--pruner", pruner, requests.PRUNERS),
        sampler_seed=sampler_seed,
    )
    _one_of("--on-error", on_error, ("continue", "stop"))
    _one_of("--engine", engine_name, ENGINES)
    address = ray.require(ray_address) if engine_name == "ray" else None
    variants = asked.check()
    for variant in variants:
        engine.refuse_mismatch(assemble(variant))
    folder = runs / asked.name
    asked = _with_measure(asked, variants[0])
    requests.keep(asked, folder)
    most = _number_of_trials(asked, trials)
    given: dict[str, Any] = {
        "text": recipes.read(path),
        "overrides": fixed,
        "command": ("bilevel", "run", reference),
    }
    for other, number in _computed_otherwise(folder).items():
        complain(
            f"{number} of the runs that are there were computed with {other}: they compare with those to "
            "come to rounding, not to the bit",
            kind="warning: ",
        )
    with going_on(f"the sweep in {folder}"):
        found = study.study(asked, folder)
        start = _starter(asked, given, workers, address)
        driver = Driver(asked, folder, found, start, most, workers, on_error == "stop")
        _drive(Console(quiet=True) if quiet else console, driver)
        rows = _conclude(console, driver, answer, workers)
    if any(row.status == "failed" for row in rows):
        raise Stopped(FAILED)


def _computed_otherwise(folder: Path) -> Counter[str]:
    """Runs of a sweep that goes on, by what rounds otherwise here; threads are of the number of workers."""
    now, found = environment(), Counter[str]()
    for place in folder.glob(f"trial-*/{ENVIRONMENT}"):
        with suppress(CheckpointError):  # a damaged folder is told where its run goes on
            found[other_arithmetic(RunFolder(place.parent).environment(), now, threads=False)] += 1
    del found[""]
    return found


def _one_of(option: str, given: str, known: Sequence[Any]) -> Any:
    if given not in known:
        raise RecipeError(f"{option} {unknown(given, known, 'choice')}")
    return given


def _natural(varied: Sequence[space.Dimension]) -> str:
    """A grid where every key has a list of values, or points."""
    has_points = (not isinstance(e, space.Range) or e.points is not None for e in varied)
    return "grid" if all(has_points) else "tpe"


def _number_of_trials(asked: Request, trials: int | None) -> int:
    if asked.sampler != "grid":
        return TRIALS if trials is None else trials
    size = space.grid_size(asked.space)
    return size if trials is None else min(trials, size)


def _with_measure(asked: Request, recipe: Recipe) -> Request:
    """The request with the measure as the problem calls it; one evaluation where it is the problem's."""
    if _spelled(asked.measure) in LOSSES:
        return replace(asked, measure=_spelled(asked.measure))
    setup = assemble(recipe)
    with explaining():
        for _ in engine.prepare(setup):
            pass
        events = engine.evaluate(setup, engine.start(setup))
        names = [name for event in events if isinstance(event, Evaluated) for name in event.metrics]
    for name in names:
        if _spelled(name) == _spelled(asked.measure):
            if asked.pruner != "none" and not recipe.evaluate.every:
                raise RecipeError(
                    f"--pruner {asked.pruner} needs {name!r} along the run, which is measured at its "
                    "ends alone: add evaluate.every=10"
                )
            return replace(asked, measure=name)
    raise RecipeError(f"--measure {unknown(asked.measure, [*LOSSES, *names], 'measure')}")


def _spelled(name: str) -> str:
    return re.sub(r"[\s_-]+", "_", name.strip().lower())


def _starter(asked: Request, given: Mapping[str, Any], workers: int, address: str | None) -> Start:
    import torch

    threads = max(1, torch.get_num_threads() // max(1, workers))

    shared: dict[str, Any] = {
        **given,
        "recipe": asked.recipe.dump(),
        "title": asked.recipe.name,
        "measure": asked.measure,
        "pruner": asked.pruner,
        "threads": threads if workers > 1 or address else None,
    }
    device = asked.recipe.content["runtime"]["device"]
    on_ray = address and ray.starter(address, sweep_trial.on_a_cluster, threads, device)

    def start(spec: Mapping[str, Any]) -> Any:
        whole = {**shared, **spec, "assignments": asked.assignments(spec["values"])}
        if on_ray:
            return on_ray(whole)
        return sweep_trial.Process(whole) if workers else sweep_trial.in_this_process(whole)

    return start


def _drive(console: Console, driver: Driver) -> None:
    console.print(Text(f"{driver.folder}/", style="dim"), soft_wrap=True)
    view = Live(console=console, auto_refresh=False, transient=True)
    with Signals():
        try:
            with view:
                for ended in driver.run():
                    if ended is not None:
                        _tell(console, driver, ended)
                    if console.is_terminal:
                        view.update(_live(console, driver), refresh=True)
        except Stopped as stopped:
            over = len([row for row in _rows(driver) if row.status != "running"])
            raise Stopped(
                stopped.code,
                f"stopped; {over} of {driver.trials} trials are over: the same command goes on",
            ) from None


def _rows(driver: Driver) -> list[Trial]:
    return result.rows(driver.study, driver.request.maximize)


def _tell(console: Console, driver: Driver, ended: Ended) -> None:
    row = next(row for row in _rows(driver) if row.number == ended.number)
    over = len([row for row in _rows(driver) if row.status != "running"])
    said = row.said if row.status == "done" else f"{row.status} {row.reason or ''}".strip()
    took = f" ({duration(row.seconds)})" if row.seconds else ""
    text = (
        f"{over}/{driver.trials}  trial {row.number}: {_values(driver.request, row)}: {said}{took}"
    )
    console.print(text, markup=False, highlight=False, soft_wrap=not console.is_terminal)


def _values(asked: Request, row: Trial) -> str:
    names = result.short([each.key for each in asked.space])
    return " ".join(f"{names[key]}={_shown(value)}" for key, value in row.values.items())


def _shown(value: Any) -> str:
    return significant(value) if isinstance(value, (int, float)) else str(value)


def _live(console: Console, driver: Driver) -> Group:
    """What runs, and the best few."""
    found = _rows(driver)
    counts = {
        kind: sum(row.status == kind for row in found) for kind in ("done", "pruned", "failed")
    }
    said = ", ".join(f"{number} {kind}" for kind, number in counts.items() if number)
    over = sum(counts.values())
    head = Text(f"{over}/{driver.trials} trials" + (f": {said}" if said else ""), style="bold")
    chosen = [row for row in found if row.status == "running"] + [
        row for row in found if row.status == "done"
    ][:5]
    asked, spare = driver.request, _spare(driver.request)
    made = (_table(asked, chosen, spare[:n]) for n in range(len(spare) + 1))
    fits = (table for table in made if natural_width(console, table) <= console.width)
    return Group(head, next(fits, _table(asked, chosen, spare)))


def _spare(asked: Request) -> list[str]:
    """Columns that are left out where a terminal is narrow, the first first."""
    names = result.short([each.key for each in asked.space])
    return ["time", "status", *reversed(names.values())]


def _table(asked: Request, found: Sequence[Trial], left_out: Collection[str]) -> Table:
    names = result.short([each.key for each in asked.space])
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    made.add_column("trial", justify="right", no_wrap=True)
    made.add_column(asked.measure, justify="right", no_wrap=True)
    keys = [each.key for each in asked.space if names[each.key] not in left_out]
    for key in keys:
        made.add_column(names[key], no_wrap=True)
    for name in (name for name in ("status", "time") if name not in left_out):
        made.add_column(name, no_wrap=True)
    for row in found:
        cells = [
            f"{row.number}",
            row.said,
            *(Text(_shown(row.values.get(key, "–"))) for key in keys),
        ]
        if "status" not in left_out:
            style = {"done": "green", "failed": "bold red"}.get(row.status, "yellow")
            cells.append(Text(row.status, style=style))
        if "time" not in left_out:
            cells.append(duration(row.seconds) if row.seconds else "–")
        made.add_row(*cells)
    return made


def _conclude(
    console: Console, driver: Driver, answer: JSONAnswer | None, workers: int
) -> list[Trial]:
    asked, folder, found = driver.request, driver.folder, _rows(driver)
    shares = study.importance(driver.study)
    best = result.keep(asked, folder, found, shares)
    if answer:
        answer.data = parse((folder / result.TABLE).read_bytes()) | {
            "file": str(folder / result.TABLE)
        }
    counts = {
        kind: sum(row.status == kind for row in found) for kind in ("done", "pruned", "failed")
    }
    said = ", ".join(f"{number} {kind}" for kind, number in counts.items() if number)
    seeds = (
        f", mean ± 95 % interval over {len(asked.recipe.seeds)} seeds"
        if asked.recipe.is_ensemble
        else ""
    )
    way = "largest" if asked.maximize else "smallest"
    console.print()
    head = f"{asked.recipe.name}, {said or 'no trial is over'}; {way} {asked.measure} first{seeds}"
    console.print(head, markup=False, highlight=False)
    print_fitted(console, lambda left_out: _table(asked, found[:SHOWN], left_out), _spare(asked))
    if len(found) > SHOWN:
        text = f"and {len(found) - SHOWN} more: {folder / result.CSV}"
        console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)
    if shares:
        short = result.short([*shares])
        text = ", ".join(f"{short[key]} {share:.2f}" for key, share in shares.items())
        console.print(f"importance: {text}", markup=False, highlight=False)
    for row in found:
        if row.status == "failed":
            console.print(Text(f"trial {row.number} failed: {row.reason}"), soft_wrap=True)
    if left := driver.elsewhere():
        console.print(f"running in another process: {left}", highlight=False)
    if not figure.is_possible():
        complain("no figure: it needs matplotlib: pip install 'bilevel[report]'", kind="note: ")
    else:
        for path in figure.draw(asked, found, shares, folder)[:1]:
            console.print(Text(f"{path}"), soft_wrap=True)
    if best:
        console.print(Text(f"{_command(best, workers)}"), soft_wrap=True)
    return found


def _command(best: Path, workers: int) -> str:
    """What runs the best again, to the same bits: with as many threads as its trial had."""
    import torch

    number = torch.get_num_threads()
    threads = max(1, number // workers) if workers > 1 else number
    before = f"OMP_NUM_THREADS={threads} " if threads != number else ""
    return f"{before}bilevel run {shlex.quote(str(best))}"
