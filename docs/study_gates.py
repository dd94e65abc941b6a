"""Gate 1 of docs/study.md: hypergradients of the source scores against the path that is run, in R1.

`python -m docs.study_gates 5 10 40` computes the rows of these numbers of lower steps (at forty 11 minutes of a core) and keeps them in
docs/study/gates.json; without a number only the page is written again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bilevel.studying.file import OURS, StudyFile
from docs.pages import put

HERE = Path(__file__).parent
PAGE, FILE = HERE / "study.md", HERE / "study" / "gates.json"
STUDY = HERE.parent / "recipes" / "studies" / "mllm_hft.yaml"
ESTIMATORS: dict[str, dict[str, Any]] = {
    "unroll": {"name": "unroll", "memory": "recompute"},  # the graphs of 40 steps took over 12 GB
    "one_step": {"name": "one_step"},
    "implicit, damping 0.1": {"name": "implicit", "damping": 0.1},
    "implicit, damping 1": {"name": "implicit", "damping": 1.0},
    "implicit, damping 10": {"name": "implicit", "damping": 10.0},
}
STEPS = (5, 10, 40)
"""Five are those of the arms, ten and forty the protocol's other paths."""
ENOUGH = 0.8
"""Cosine from which on an estimator may be an arm."""
SEED = 1000


def rows(steps: int) -> list[dict[str, Any]]:
    """A row an estimator, where the lower level takes so many steps."""
    from bilevel import recipe
    from bilevel.recipe.assemble import assemble
    from bilevel.registry.build import build
    from bilevel.studying import file as files
    from bilevel.testing import PathRow, path_agreement

    study = files.read(STUDY)
    parts = (
        study.content.settings,
        study.content.regimes["R1"].settings,
        study.content.development,
    )
    own = {
        "problem.formulation": "task_weighted",
        "problem.test": 20,
        "lower.steps": steps,
        **dict.fromkeys(study.content.seeds.sets, SEED),
    }
    settings = {key: value for part in (*parts, own) for key, value in files.words(part).items()}
    setup = assemble(recipe.load(study.recipe, [f"{k}={v}" for k, v in settings.items()]))
    chosen = {name: build("estimators", spec) for name, spec in ESTIMATORS.items()}
    return [
        {
            "steps": steps,
            "estimator": row.name,
            "cosine": row.whole and row.whole.cosine,
            "ratio": row.whole and row.whole.ratio,
            "note": row.note,
        }
        for row in path_agreement(setup, chosen)
        if isinstance(row, PathRow)
    ]


def table(found: list[dict[str, Any]]) -> str:
    """A row an estimator, a column a number of lower steps: cosine and ratio of lengths, in bold where it may be an arm."""
    steps = sorted({row["steps"] for row in found})
    cells = {(row["estimator"], row["steps"]): row for row in found}
    lines = [
        f"| cosine, ×ratio of lengths | {' | '.join(f'{n} lower steps' for n in steps)} |",
        "|---" * (len(steps) + 1) + "|",
    ]
    for name in ESTIMATORS:
        shown = [_shown(cells.get((name, n))) for n in steps]
        lines.append(f"| `{name}` | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def verdict(found: list[dict[str, Any]]) -> str:
    """Which estimators may be arms of ours, by what was computed; and what is not computed yet."""
    steps = sorted({row["steps"] for row in found})
    cosines = {(row["estimator"], row["steps"]): row["cosine"] or 0.0 for row in found}
    lines = []
    for name in ESTIMATORS:
        known = [n for n in steps if (name, n) in cosines]
        enough = [n for n in known if cosines[name, n] >= ENOUGH]
        said = f"at {', '.join(map(str, enough))}" if enough else "nowhere"
        lines.append(f"- `{name}`: {ENOUGH:g} or more {said}")
    missing = [str(n) for n in STEPS if n not in steps]
    if missing:
        lines.append(f"- not yet computed: {', '.join(missing)} lower steps")
    return "\n".join(lines) + "\n"


def refused(found: list[dict[str, Any]], content: StudyFile) -> list[str]:
    """Arms of the group `ours` whose weights come from an estimator that is below, at their number of lower steps.

    An arm's estimators are its own and those of the stages that it comes after; one that is frozen and retrained has
    no implicit term to be right about.
    """
    enough = {(row["estimator"], row["steps"]) for row in found if (row["cosine"] or 0.0) >= ENOUGH}
    below = []
    for name, arm in content.arms.items():
        stage, used = arm, set()
        while True:
            settings = {**content.settings, **stage.settings}
            used.add((settings.get("estimator"), settings["lower.steps"]))
            if stage.after is None:
                break
            stage = content.arms[stage.after.arm]
        wrong = {each for each in used if each[0] != "alternating"} - enough
        if arm.group == OURS and wrong:
            below.append(name)
    return below


def part(found: list[dict[str, Any]]) -> str:
    """What the page has of the gate."""
    return f"{table(found)}\n{verdict(found)}".rstrip("\n")


def _shown(row: dict[str, Any] | None) -> str:
    if row is None or row["cosine"] is None:
        return "–"
    said = f"{row['cosine']:.2f} ×{row['ratio']:.2g}"
    return f"**{said}**" if row["cosine"] >= ENOUGH else said


def read() -> list[dict[str, Any]]:
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else []


def write(found: list[dict[str, Any]]) -> None:
    lines = ",\n".join(json.dumps(row, sort_keys=True) for row in found)
    FILE.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("steps", nargs="*", type=int)
    for steps in parser.parse_args().steps:
        made = rows(steps)  # before the file is read: another call may write meanwhile
        others = [row for row in read() if row["steps"] != steps]
        write(sorted([*others, *made], key=lambda row: row["steps"]))
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(put(text, "gates", part(read())), encoding="utf-8")


if __name__ == "__main__":
    main()
