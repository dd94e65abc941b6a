"""The tables of docs/mllm_hft.md from runs of the shipped recipe: `python -m docs.mllm_results`.

With `--run` first makes the runs that docs/mllm_hft.json does not hold yet, a process each, and
writes every one as it ends, so that a stopped call goes on where it was; with `--path` compares
estimators with the path that is run; with `--draw` draws arms of seed 0 side by side; `--smol` makes the
runs of the middle tier instead. Without them only the page is written again, from the files alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bilevel.events import Stepped
from docs.pages import put

HERE = Path(__file__).parent
PAGE, PATH = HERE / "mllm_hft.md", HERE / "mllm_hft_path.json"
RECIPE = HERE.parent / "recipes" / "mllm_hft.yaml"
NONE = "estimator={name: alternating}"
ARMS: dict[str, tuple[str, ...]] = {
    "bilevel": (),
    "alternating": (NONE,),
    "joint": ("problem.formulation=joint", NONE),
    "joint, clean .3": ("problem.formulation=joint", "problem.clean=0.3", NONE),
    "contrast first, then task, clean .3": (
        "problem.formulation=task_only",
        "problem.contrast_first=300",
        "problem.clean=0.3",
        NONE,
    ),
    "task_only, clean .3": ("problem.formulation=task_only", "problem.clean=0.3", NONE),
}
"""Overrides of the recipe."""


class Study(NamedTuple):
    """Runs of a recipe, the file they are kept in, and where on the page they stand."""

    recipe: Path
    file: Path
    arms: tuple[str, ...]
    place: str


MAIN = Study(RECIPE, HERE / "mllm_hft.json", tuple(ARMS), "measured")
SMOL = Study(
    HERE.parent / "recipes" / "mllm_hft_smol.yaml",
    HERE / "mllm_hft_smol.json",
    ("bilevel", "alternating"),
    "smol",
)
AGAINST = ("alternating", "joint, clean .3", "task_only, clean .3")
"""Arms that the bilevel one is compared with seed by seed."""
DRAWN = ("bilevel", "alternating", "task_only, clean .3")
"""Arms of the figures."""
MEASURES = {
    "pope_adversarial/auc": ("POPE adversarial, AUC ↑", True),
    "pope_adversarial/accuracy": ("POPE adversarial, accuracy ↑", True),
    "pope_popular/auc": ("POPE popular, AUC ↑", True),
    "pope_random/auc": ("POPE random, AUC ↑", True),
    "chair/chair_i": ("CHAIR_i, of mentions ↓", False),
    "chair/chair_s": ("CHAIR_s, of captions ↓", False),
    "chair/coverage": ("coverage ↑", True),
    "captions/cut_short": ("captions cut short ↓", False),
    "task_loss": ("task loss ↓", False),
    "gap/auc_true_vs_hallucinated": ("AUC true / hallucinated caption ↑", True),
    "gap/recall_at_1": ("R@1 ↑", True),
}
"""What is shown of a metric, and whether more is better."""
ESTIMATORS: dict[str, dict[str, Any]] = {
    "unroll": {"name": "unroll"},
    "unroll, the last 2 of 5 steps": {"name": "unroll", "last": 2},
    "one_step": {"name": "one_step"},
    "implicit, damping 1": {"name": "implicit", "damping": 1.0},
    "implicit, damping 10": {"name": "implicit", "damping": 10.0},
    "alternating": {"name": "alternating"},
}
"""What is compared with the path."""
Cell = dict[str, Any]


def run(arm: str, seed: int, recipe: Path = RECIPE) -> Cell:
    """One run of a recipe in a process of its own: measures before and after, and seconds."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["run", str(recipe), f"seed={seed}", *ARMS[arm], "--runs-dir", folder]
        code = "from bilevel.cli import main; main()"
        subprocess.run(
            [sys.executable, "-c", code, *command], check=True, stdout=subprocess.DEVNULL
        )
        (path,) = Path(folder).rglob("events.jsonl")
        return cell(arm, seed, path)


def cell(arm: str, seed: int, path: Path) -> Cell:
    """What the table needs of the record of a run."""
    events = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    before, after = (e["metrics"] for e in events if e["event"] == "evaluated")
    (end,) = [e for e in events if e["event"] == "finished"]
    kept = {name: value for name, value in after.items() if name.startswith("learned/")}
    return {
        "arm": arm,
        "seed": seed,
        "before": {name: before[name] for name in MEASURES},
        "after": {name: after[name] for name in MEASURES} | kept,
        "seconds": round(end["seconds"], 1),
        "warned": sorted(end["warned"]),
    }


def agreements() -> list[Cell]:
    """Estimators against central differences of the path that the recipe runs."""
    from bilevel import recipe
    from bilevel.recipe.assemble import assemble
    from bilevel.registry.build import build
    from bilevel.testing import PathRow, path_agreement

    setup = assemble(recipe.load(RECIPE))
    chosen = {name: build("estimators", spec) for name, spec in ESTIMATORS.items()}
    return [
        {
            "estimator": row.name,
            "of": {n: [a.cosine, a.ratio] for n, a in row.agreements.items()},
            "all": [row.whole.cosine, row.whole.ratio] if row.whole else None,
            "note": row.note,
        }
        for row in path_agreement(setup, chosen)
        if isinstance(row, PathRow)
    ]


def path_table(rows: list[Cell]) -> str:
    """A row an estimator: cosine and ratio of lengths, by upper variable."""
    heads = ["source_scores", "kind_scores", "log_lambda", "log_tau"]
    lines = [
        "| cosine, ×ratio of lengths | sources | kinds | log λ | log τ | all |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["of"].get(head) for head in heads] + [row["all"]]
        shown = ["-" if cell is None else f"{cell[0]:.2f} ×{cell[1]:.2g}" for cell in cells]
        lines.append(f"| `{row['estimator']}` | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def draw(folder: Path) -> None:
    """Embeddings and captions of some arms of seed 0 in one figure each, as PNG. A run an arm."""
    from bilevel import recipe
    from bilevel.recipe.assemble import assemble
    from bilevel.run import engine

    models: dict[str, Any] = {}
    problem: Any = None
    for arm in DRAWN:
        setup = assemble(recipe.load(RECIPE, ARMS[arm]))
        for _ in engine.prepare(setup):
            pass
        problem, state = setup.problem, engine.start(setup)
        models.setdefault("before", problem.before())
        for event in engine.run(setup, state):
            if isinstance(event, Stepped):
                print(f"{arm}, step {event.step}", flush=True)
        models[arm] = {**state.x, **state.y}
    for name, figure in problem.side_by_side(models).items():
        figure.savefig(folder / f"mllm_hft_{name}.png", dpi=80)


def missing(
    cells: list[Cell], seeds: range, arms: Sequence[str] = tuple(ARMS)
) -> Iterator[tuple[str, int]]:
    """Seeds in turn, so that what is there at any time can be compared."""
    there = {(cell["arm"], cell["seed"]) for cell in cells}
    return ((arm, seed) for seed in seeds for arm in arms if (arm, seed) not in there)


def spread(values: list[float]) -> str:
    """Mean ± standard deviation over seeds, three digits."""
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.3f}"


def table(cells: list[Cell]) -> str:
    """A row a measure, a column an arm; before as the first arm begins."""
    arms = [arm for arm in ARMS if any(cell["arm"] == arm for cell in cells)]
    of = {arm: [cell for cell in cells if cell["arm"] == arm] for arm in arms}
    heads = ["before", *(f"{arm} ({len(of[arm])})" for arm in arms)]
    rows = [f"| (seeds) | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, (label, _) in MEASURES.items():
        before = statistics.mean(cell["before"][name] for cell in of[arms[0]])
        shown = [spread([cell["after"][name] for cell in of[arm]]) for arm in arms]
        rows.append(f"| {label} | {before:.3f} | {' | '.join(shown)} |")
    return "\n".join(rows) + "\n"


def paired(cells: list[Cell], others: Sequence[str] = AGAINST, of: str = "bilevel") -> str:
    """A row a measure, a column an arm: `of` − the arm, seed by seed, mean ± standard error (wins).

    Raises `ValueError` where two arms began at other measures: from models that other machines pre-trained.
    """
    begun = {tuple(cell["before"].values()) for cell in cells if cell["arm"] in (of, *others)}
    if len(begun) > 1:
        raise ValueError(
            f"{of} and {others}: began at {len(begun)} different measures, so are no pairs"
        )
    by = {(cell["arm"], cell["seed"]): cell["after"] for cell in cells}
    seeds = {
        other: sorted(seed for arm, seed in by if arm == of and (other, seed) in by)
        for other in others
    }
    there = [other for other in others if seeds[other]]
    rows = [f"| {of} − | {' | '.join(there)} |", "|---" * (len(there) + 1) + "|"]
    for name, (label, more) in MEASURES.items():
        gains = {o: [by[of, seed][name] - by[o, seed][name] for seed in seeds[o]] for o in there}
        shown = " | ".join(_difference(gains[other], more) for other in there)
        rows.append(f"| {label} | {shown} |")
    return "\n".join(rows) + "\n"


def _difference(gains: list[float], more: bool) -> str:
    error = f" ± {statistics.stdev(gains) / len(gains) ** 0.5:.3f}" if len(gains) > 1 else ""
    wins = sum((gain > 0) == more and gain != 0 for gain in gains)
    return f"{statistics.mean(gains):+.3f}{error} ({wins} of {len(gains)})"


def weights(cells: list[Cell]) -> str:
    """What the bilevel arm learned, a row a seed."""
    learned = [cell for cell in cells if cell["arm"] == "bilevel"]
    names = [name for name in learned[0]["after"] if name.startswith("learned/weight_")]
    heads = [name.removeprefix("learned/weight_") for name in names]
    rows = [f"| seed | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for cell in sorted(learned, key=lambda cell: cell["seed"]):
        shown = " | ".join(f"{cell['after'][name]:.2f}" for name in names)
        rows.append(f"| {cell['seed']} | {shown} |")
    return "\n".join(rows) + "\n"


def page(text: str, cells: list[Cell], place: str = MAIN.place) -> str:
    """The page with the measured part of a study made anew."""
    compared = any(cell["arm"] in AGAINST for cell in cells)
    parts = [table(cells), *([paired(cells)] if compared else [])]
    told = "\n".join([*parts, "Weights that were learned:\n", weights(cells)])
    return put(text, place, told.rstrip("\n"))


def read(path: Path = MAIN.file) -> list[Cell]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def write(path: Path, cells: list[Cell]) -> None:
    lines = ",\n".join(json.dumps(cell, sort_keys=True) for cell in cells)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", action="store_true", help="make the runs that are missing")
    parser.add_argument("--path", action="store_true", help="compare estimators with the path")
    parser.add_argument("--draw", action="store_true", help="draw arms of seed 0 side by side")
    parser.add_argument("--smol", action="store_true", help="of the middle tier's recipe")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    given = parser.parse_args()
    study = SMOL if given.smol else MAIN
    if given.run:
        for arm, seed in missing(read(study.file), range(given.seeds), study.arms):
            if arm in given.arms:
                print(f"{arm}, seed {seed}", flush=True)
                made = run(arm, seed, study.recipe)
                write(
                    study.file, [*read(study.file), made]
                )  # read again: another call may have written meanwhile
    if given.path:
        write(PATH, agreements())
    if given.draw:
        draw(HERE)
    text = PAGE.read_text(encoding="utf-8")
    for place in (MAIN, SMOL):
        if cells := read(place.file):
            text = page(text, cells, place.place)
    text = put(text, "path", path_table(read(PATH)).rstrip("\n"))
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
