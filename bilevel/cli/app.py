"""The commands and their options. What they do is in the other modules, imported when called.

`--help`, `ls`, `show` and completion answer without importing torch, which takes seconds.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from bilevel.cli.boundary import boundary, computing
from bilevel.cli.completion import (
    complete_estimators,
    complete_kind,
    complete_name,
    complete_override,
    complete_recipe,
    complete_run,
)
from bilevel.cli.importing import importing
from bilevel.cli.options import settings
from bilevel.cli.spreading import spreading

if TYPE_CHECKING:
    from rich.console import Console


class WholeSummaries(TyperGroup):
    """Says in `--help` what each command does without cutting it off."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        named = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [
            (name, each.get_short_help_str(UNCUT))
            for name, each in named
            if each and not each.hidden
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


class OptionalWatch(WholeSummaries):
    """`--watch` may stand without a run, for which there is no way to ask otherwise."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        at = args.index("--watch") + 1 if "--watch" in args else None
        if at is not None and (at == len(args) or args[at].startswith("-")):
            args = [*args[:at], "", *args[at:]]
        return super().parse_args(ctx, args)


class Remembering(WholeSummaries):
    """Keeps the words of the command line, which ranks are started with."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[WORDS] = [*args]
        return super().parse_args(ctx, args)


WORDS = "bilevel.words"
UNCUT = 1000
"""Characters of a summary at most: as many as any has."""

app = typer.Typer(
    cls=Remembering,
    help="Bilevel optimization: hypergradients that come with their evidence.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _path(given: str | Path) -> Path:
    """A path of the command line, with `~` where a shell leaves it, as in --runs-dir=~/runs.

    Empty it would stand for the current folder, which nobody has named.
    """
    if given == "":
        raise typer.BadParameter("got ''; must name a file or a folder (. is the current one)")
    return Path(os.path.expanduser(given))


RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A YAML file, or the name of a recipe that is shipped (bilevel ls recipes).",
        autocompletion=complete_recipe,
    ),
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Overrides, e.g. upper.steps=50 estimator=unroll.",
        autocompletion=complete_override,
    ),
]
RunArgument = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="A run folder, or a name: its newest run.", autocompletion=complete_run
    ),
]
ReportOption = Annotated[
    bool, typer.Option("--no-report", help="Write no report.html; bilevel report does so later.")
]
WhereOption = Annotated[
    list[str] | None,
    typer.Option(
        "--where",
        metavar="KEY=VALUE",
        help="Runs with this column, measure or setting; also != < <= > >=; all of several.",
    ),
]
RunsOption = Annotated[
    Path,
    typer.Option("--runs-dir", metavar="FOLDER", parser=_path, help="Where run folders are."),
]


JSONOption = Annotated[
    bool, typer.Option("--json", help="For machines: JSON alone on standard output, errors too.")
]
RanksOption = Annotated[
    int | None,
    typer.Option(
        "--ranks", metavar="N", min=1, help="Start so many processes here that compute it together."
    ),
]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="The result and errors, and nothing else.")
]


def _version(is_asked: bool) -> None:
    if is_asked:
        from importlib.metadata import version

        typer.echo(f"bilevel {version('bilevel')}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_version, is_eager=True),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks of errors (before the command).")
    ] = False,
) -> None:
    settings.debug = debug


@app.command("ls")
def list_(
    kind: Annotated[
        str | None,
        typer.Argument(
            metavar="KIND",
            help="problems, estimators, recipes, …",
            autocompletion=complete_kind,
        ),
    ] = None,
    json: JSONOption = False,
) -> None:
    """List problems, estimators, solvers and recipes."""
    from bilevel.cli.ls import list_all

    with boundary(json) as answer:
        list_all(_console(json), kind, answer)


@app.command()
def show(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="A component (cg, or linear/cg), or a recipe (ridge.yaml).",
            autocompletion=complete_name,
        ),
    ],
    resolved: Annotated[
        bool, typer.Option("--resolved", help="A recipe with all its defaults filled in.")
    ] = False,
) -> None:
    """Show a component and its options, or a recipe."""
    with boundary():
        from bilevel.cli.show import show as show_name
        from bilevel.cli.show import show_resolved

        (show_resolved if resolved else show_name)(_console(), name)


@app.command("cp")
def copy(
    recipe: RecipeArgument,
    destination: Annotated[
        Path, typer.Argument(metavar="DEST", parser=_path, help="A file or a folder.")
    ],
) -> None:
    """Copy a recipe, to change it."""
    from bilevel.cli.cp import copy as copy_recipe

    with boundary():
        copy_recipe(_console(), recipe, destination)


@app.command()
def new(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="problem, estimator or package.")],
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="As a module of Python is called: my_problem.")
    ],
    to: Annotated[
        Path, typer.Option("--to", metavar="FOLDER", parser=_path, help="Where to write.")
    ] = Path(),
) -> None:
    """Write a problem, an estimator or a package to begin with: it runs and passes its test."""
    with boundary():
        from bilevel.cli.new import new as write_new

        write_new(_console(), kind, name, to)


@app.command()
def validate(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    quiet: QuietOption = False,
    json: JSONOption = False,
) -> None:
    """Check a recipe and show all that is wrong with it."""
    with boundary(json) as answer:
        with importing():
            from bilevel.cli.validate import validate as validate_recipe

        validate_recipe(_console(json or quiet), recipe, overrides or [], answer)


@app.command()
def run(
    context: typer.Context,
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    runs_dir: RunsOption = Path("runs"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, show the recipe, write nothing.")
    ] = False,
    no_report: ReportOption = False,
    ranks: RanksOption = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Show where the time of a step goes; write a trace.")
    ] = False,
    quiet: QuietOption = False,
    json: JSONOption = False,
) -> None:
    """Run a recipe; Ctrl-C finishes the step and saves."""
    with spreading(json, ranks, context.meta[WORDS]) as (answer, member):
        with importing():
            from bilevel.cli.run import run as run_recipe

        run_recipe(
            _console(json),
            recipe,
            overrides or [],
            runs_dir,
            dry=dry_run,
            with_report=not no_report,
            quiet=quiet,
            profile=profile,
            answer=answer,
            member=member,
        )


@app.command()
def resume(
    context: typer.Context,
    run: RunArgument,
    runs_dir: RunsOption = Path("runs"),
    no_report: ReportOption = False,
    ranks: RanksOption = None,
    quiet: QuietOption = False,
    json: JSONOption = False,
) -> None:
    """Resume a run as if it had never been stopped."""
    with spreading(json, ranks, context.meta[WORDS]) as (answer, member):
        with importing():
            from bilevel.cli.resume import resume as resume_run

        resume_run(
            _console(json),
            run,
            runs_dir,
            with_report=not no_report,
            quiet=quiet,
            answer=answer,
            member=member,
        )


@app.command()
def check(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    estimators: Annotated[
        str | None,
        typer.Option(
            "--estimators",
            metavar="A,B",
            help="Which ones; `all` takes the presets too; every component if not given.",
            autocompletion=complete_estimators,
        ),
    ] = None,
    path: Annotated[
        bool,
        typer.Option(
            "--path",
            help="Compare with differences of the lower steps that are really run, by upper variable.",
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", parser=_path, help="An HTML page of what was found."
        ),
    ] = None,
    quiet: QuietOption = False,
    json: JSONOption = False,
) -> None:
    """Compare estimators with the true hypergradient."""
    with computing(json) as answer:
        with importing():
            from bilevel.cli.check import check as check_recipe
            from bilevel.cli.check import check_path

        (check_path if path else check_recipe)(
            _console(json),
            recipe,
            overrides or [],
            estimators,
            quiet=quiet,
            answer=answer,
            page=output,
        )


@app.command()
def compare(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    estimators: Annotated[
        str | None,
        typer.Option(
            "--estimators",
            metavar="A,B",
            help="Names, file.py:Class, labels of --labels, or all.",
            autocompletion=complete_estimators,
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            "--labels", metavar="FILE", parser=_path, help="YAML or JSON: label to estimator."
        ),
    ] = None,
    with_: Annotated[Path | None, typer.Option("--with", parser=_path, hidden=True)] = None,
    seeds: Annotated[
        str | None,
        typer.Option("--seeds", metavar="0..4", help="Seeds; the recipe's if not given."),
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option(
            "--budget",
            metavar="N",
            min=1,
            help="Gradients + HVPs + cross products of a run; else as many as the recipe's run.",
        ),
    ] = None,
    runs_dir: RunsOption = Path("runs"),
    quiet: QuietOption = False,
    json: JSONOption = False,
) -> None:
    """Compare estimators: error, cost, memory, result."""
    with computing(json) as answer:
        with importing():
            from bilevel.cli.compare import compare as compare_estimators
            from bilevel.errors import RecipeError

        if with_ is not None:
            raise RecipeError(f"--with is now --labels; write --labels {with_}")
        compare_estimators(
            _console(json),
            recipe,
            overrides or [],
            estimators=estimators,
            given=labels,
            seeds=seeds,
            budget=budget,
            runs=runs_dir,
            quiet=quiet,
            answer=answer,
        )


@app.command()
def sweep(
    recipe: RecipeArgument,
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUES",
            help="What varies: key=1e-3..1e-1,log, key=5..50,int, key=a,b,c; and overrides.",
            autocompletion=complete_override,
        ),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(
            "--trials", metavar="N", min=1, help="In all; a grid's size, or 20, if not given."
        ),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option("--seeds", metavar="0..4", help="Of each trial; the recipe's if not given."),
    ] = None,
    measure: Annotated[
        str, typer.Option("--measure", metavar="NAME", help="upper_loss, or one of the problem's.")
    ] = "upper_loss",
    maximize: Annotated[bool, typer.Option("--maximize", help="Larger is better.")] = False,
    sampler: Annotated[
        str | None,
        typer.Option(
            "--sampler", help="grid, random or tpe; grid if every key has a list, else tpe."
        ),
    ] = None,
    pruner: Annotated[
        str, typer.Option("--pruner", help="none, or median: stop what is worse than the median.")
    ] = "none",
    sampler_seed: Annotated[
        int, typer.Option("--sampler-seed", metavar="N", min=0, help="Of the sampler.")
    ] = 0,
    workers: Annotated[
        int,
        typer.Option(
            "--workers", metavar="N", min=0, help="Trials at a time; 0: within this process."
        ),
    ] = 1,
    on_error: Annotated[
        str, typer.Option("--on-error", help="continue, or stop: begin no trial after one failed.")
    ] = "continue",
    engine: Annotated[
        str, typer.Option("--engine", help="local, or ray: trials are tasks of a Ray cluster.")
    ] = "local",
    ray_address: Annotated[
        str | None,
        typer.Option("--ray-address", metavar="HOST:PORT", help="auto, or $RAY_ADDRESS."),
    ] = None,
    runs_dir: RunsOption = Path("runs"),
    quiet: QuietOption = False,
    json: JSONOption = False,
) -> None:
    """Try many settings: grid, random or Optuna's TPE; the best is ready to run."""
    with computing(json) as answer:
        with importing():
            from bilevel.cli.sweep import sweep as sweep_settings

        sweep_settings(
            _console(json),
            recipe,
            settings or [],
            trials=trials,
            seeds=seeds,
            measure=measure,
            maximize=maximize,
            sampler=sampler,
            pruner=pruner,
            sampler_seed=sampler_seed,
            workers=workers,
            on_error=on_error,
            engine_name=engine,
            ray_address=ray_address,
            runs=runs_dir,
            quiet=quiet,
            answer=answer,
        )


@app.command()
def study(
    file: Annotated[
        str,
        typer.Argument(metavar="STUDY", help="A YAML file, or the name of one that is shipped."),
    ],
    regime: Annotated[
        str | None, typer.Option("--regime", metavar="A,B", help="These alone; all if not given.")
    ] = None,
    arm: Annotated[str | None, typer.Option("--arm", metavar="A,B", help="These alone.")] = None,
    seeds: Annotated[
        str | None, typer.Option("--seeds", metavar="0..4", help="These alone.")
    ] = None,
    phase: Annotated[
        str | None, typer.Option("--phase", help="tune: development seeds alone; test: test seeds.")
    ] = None,
    again: Annotated[
        str | None,
        typer.Option(
            "--again",
            help="Compute again what failed, or what was run with other settings: altered.",
        ),
    ] = None,
    workers: Annotated[
        int,
        typer.Option(
            "--workers", metavar="N", min=0, help="Cells at a time; 0: within this process."
        ),
    ] = 1,
    without_headroom: Annotated[
        bool,
        typer.Option(
            "--without-headroom",
            help="Run test seeds though the study's headroom is not met; the page then says so.",
        ),
    ] = False,
    no_run: Annotated[
        bool, typer.Option("--no-run", help="Run nothing: show what is there, and write the page.")
    ] = False,
    runs_dir: RunsOption = Path("runs"),
    quiet: QuietOption = False,
    json: JSONOption = False,
) -> None:
    """Compare arms over seeds: tune each alike, run what is missing, show intervals and verdicts."""
    with computing(json) as answer:
        from bilevel.cli.names import locate
        from bilevel.studying import before_torch

        before_torch.choose_arithmetic(locate(file, "study"))
        with importing():
            from bilevel.cli.study import study as run_study

        run_study(
            _console(json),
            file,
            regimes=regime,
            arms=arm,
            seeds=seeds,
            phase=phase,
            again=again,
            workers=workers,
            runs=runs_dir,
            only_show=no_run,
            insist=without_headroom,
            quiet=quiet,
            answer=answer,
        )


@app.command()
def report(
    run: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN",
            help="A run folder, or a name: its newest run; with -o all of a name, or of a pattern.",
            autocompletion=complete_run,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", parser=_path, help="One page of all these runs."
        ),
    ] = None,
    where: WhereOption = None,
    runs_dir: RunsOption = Path("runs"),
) -> None:
    """Write the report of a run, or one page of many: HTML, offline."""
    with computing():
        from bilevel.cli.report import report as write_report

        typer.echo(write_report(run or [], runs_dir, output, where or []))


@app.command()
def export(
    run: RunArgument,
    to: Annotated[
        Path, typer.Option("--to", metavar="FOLDER", parser=_path, help="A new or empty folder.")
    ],
    merged: Annotated[
        bool, typer.Option("--merged", help="One whole model, not adapters on top of its base.")
    ] = False,
    best: Annotated[
        bool, typer.Option("--best", help="The checkpoint that checkpoint.best has kept.")
    ] = False,
    runs_dir: RunsOption = Path("runs"),
) -> None:
    """Write what a run learned in a form that other programs read."""
    with computing():
        with importing():
            from bilevel.cli.export import export as export_run

        export_run(_console(), run, runs_dir, to, merged, best)


runs_app = typer.Typer(
    help="List runs and what became of them.",
    cls=OptionalWatch,
    invoke_without_command=True,
    rich_markup_mode=None,
)
app.add_typer(runs_app, name="runs")


@runs_app.callback()
def runs(
    context: typer.Context,
    where: WhereOption = None,
    sort: Annotated[
        str | None,
        typer.Option(
            "--sort",
            metavar="KEY",
            help="By a column, measure or setting; -KEY: the largest first.",
        ),
    ] = None,
    descending: Annotated[bool, typer.Option("--descending", help="The largest first.")] = False,
    show: Annotated[
        str | None,
        typer.Option("--show", metavar="A,B", help="Measures and settings, as columns."),
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Every run of a sweep too, which is one row else.")
    ] = False,
    watch: Annotated[
        str | None,
        typer.Option(
            "--watch",
            metavar="[RUN]",
            help="Follow a run until it ends; the newest that is running.",
        ),
    ] = None,
    runs_dir: RunsOption = Path("runs"),
    json: JSONOption = False,
) -> None:
    if context.invoked_subcommand:
        return
    with boundary(json) as answer:
        from bilevel.cli.names import names_in
        from bilevel.cli.runs import list_runs
        from bilevel.errors import RecipeError

        if watch is not None:
            from bilevel.cli.watch import watch as watch_run

            if json:
                raise RecipeError("--watch is for people; `bilevel run --json` says each event")
            watch_run(_console(), watch, runs_dir, where or [])
            return
        list_runs(
            _console(json),
            runs_dir,
            where or [],
            sort,
            descending,
            [] if show is None else names_in(show, "--show"),
            every,
            answer,
        )


@runs_app.command("rm")
def remove_runs(
    run: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN",
            help="A run folder, or all of a name or of a pattern.",
            autocompletion=complete_run,
        ),
    ] = None,
    where: WhereOption = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Without the question.")] = False,
    runs_dir: RunsOption = Path("runs"),
) -> None:
    """Delete runs, with a question."""
    with boundary():
        from bilevel.cli.remove import remove

        remove(_console(), run or [], runs_dir, where or [], without_question=yes)


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    with boundary():
        from bilevel.cli.schema import recipe_schema

        typer.echo(recipe_schema())


@app.command()
def doctor(
    ranks: Annotated[
        int | None,
        typer.Option(
            "--ranks",
            metavar="N",
            min=2,
            help="Also start so many ranks on this machine, and compare sums.",
        ),
    ] = None,
) -> None:
    """Check this installation: devices, extras, data."""
    with boundary():
        from bilevel.cli.doctor import examine

        examine(_console(), ranks)


def _console(is_silent: bool = False) -> Console:
    """A console on standard output, 80 columns wide where the width is not known, or one without output."""
    import sys

    from rich.console import Console

    wide = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if wide else 80, emoji=False, quiet=is_silent)
