"""The flagship's tables are those of its artefacts, and say what the numbers say."""

from __future__ import annotations

import statistics

import pytest

from docs import mllm_results as results


def cell(arm: str, seed: int, **changed: float) -> results.Cell:
    values = dict.fromkeys(results.MEASURES, 0.5)
    after = {**values, **changed, "learned/weight_web": 0.25 + seed}
    return {
        "arm": arm,
        "seed": seed,
        "before": values,
        "after": after,
        "seconds": 1.0,
        "warned": [],
    }


def test_the_page_is_what_the_artefacts_give():
    text = results.PAGE.read_text(encoding="utf-8")
    cells = results.read()
    assert results.page(text, cells) == text
    rows = results.read(results.PATH)
    assert results.path_table(rows) in text
    assert [row["estimator"] for row in rows] == list(results.ESTIMATORS)
    assert {(c["arm"], c["seed"]) for c in cells} >= {
        (arm, seed) for arm in ("bilevel", "alternating") for seed in range(5)
    }
    assert results.page(text, results.read(results.SMOL.file), results.SMOL.place) == text
    changed = [{**c, "after": {**c["after"], "task_loss": 9.0}} for c in cells]
    assert results.page(text, changed) != text  # negative control


def test_means_and_deviations_of_each_arm():
    cells = [cell("bilevel", s, task_loss=v) for s, v in enumerate((0.1, 0.2, 0.6))]
    cells += [cell("alternating", 0, task_loss=0.7)]
    (row,) = [line for line in results.table(cells).splitlines() if line.startswith("| task loss")]
    deviation = statistics.stdev((0.1, 0.2, 0.6))
    assert row == f"| task loss ↓ | 0.500 | 0.300 ± {deviation:.3f} | 0.700 |"
    assert "| before | bilevel (3) | alternating (1) |" in results.table(cells)


def test_differences_are_paired_by_seed_and_know_which_way_is_better():
    cells = [cell("bilevel", s, task_loss=0.1 + s, **{"chair/coverage": 0.6}) for s in range(3)]
    cells += [cell("alternating", s, task_loss=0.3 + s) for s in (0, 1)]
    cells += [cell("joint, clean .3", 1, task_loss=0.6)]
    rows = {line.split(" | ")[0]: line for line in results.paired(cells).splitlines()}
    assert rows["| bilevel −"] == "| bilevel − | alternating | joint, clean .3 |"
    beaten = "-0.200 ± 0.000 (2 of 2)"
    assert rows["| task loss ↓"] == f"| task loss ↓ | {beaten} | +0.500 (0 of 1) |"
    assert rows["| coverage ↑"].startswith("| coverage ↑ | +0.100 ± 0.000 (2 of 2) |")
    assert rows["| CHAIR_s, of captions ↓"].startswith(
        "| CHAIR_s, of captions ↓ | +0.000 ± 0.000 (0 of 2)"
    )


def test_arms_that_began_from_other_models_are_no_pairs():
    """What is pre-trained depends on the machine's last digits; a seed does not say so."""
    cells = [cell("bilevel", 0), cell("alternating", 0)]
    assert results.paired(cells)
    cells[1]["before"] = cells[1]["before"] | {"task_loss": 0.5000001}
    with pytest.raises(ValueError, match="began at 2 different measures"):
        results.paired(cells)


def test_agreements_with_the_path_stand_by_variable():
    row = {"estimator": "a", "of": {"log_tau": [-1.0, 0.123]}, "all": None, "note": ""}
    assert results.path_table([row]).splitlines()[-1] == "| `a` | - | - | - | -1.00 ×0.12 | - |"


def test_learned_weights_stand_by_seed():
    lines = results.weights([cell("bilevel", 1), cell("bilevel", 0), cell("alternating", 0)])
    assert lines.splitlines() == ["| seed | web |", "|---|---|", "| 0 | 0.25 |", "| 1 | 1.25 |"]


@pytest.mark.parametrize("there", [0, 3])
def test_what_is_missing_goes_seed_by_seed(there):
    every = [(arm, seed) for seed in range(2) for arm in results.ARMS]
    cells = [cell(arm, seed) for arm, seed in every[:there]]
    assert list(results.missing(cells, range(2))) == every[there:]
