"""The recipe of the middle tier, as shipped but for sizes: what `make gpu-check` runs, on the CPU."""

from __future__ import annotations

import pytest

from tests.problems.mllm_hft.middle_tier import lacks, measured

SMALL = [
    "problem.model.layers=2",
    "problem.model.steps=1",
    "problem.model.batch=2",
    "problem.model.scenes=4",
    "problem.model.held_out=2",
    "problem.train=12",
    "problem.upper=4",
    "problem.test=4",
    "problem.caption_tokens=4",
    "problem.warm_up=1",
    "problem.lower_batch=4",
    "problem.contrast_batch=4",
    "problem.upper_batch=2",
    "lower.steps=1",
    "upper.steps=2",
]


@pytest.mark.skipif(bool(lacks()), reason=lacks())
def test_two_steps_move_the_model_and_the_weights_of_sources(tmp_path, monkeypatch):
    monkeypatch.setenv("BILEVEL_CACHE", str(tmp_path))
    found = measured("cpu", SMALL)
    assert found.steps == 2
    assert found.before["task_loss"] != found.after["task_loss"]
    weights = {name: found.after[f"learned/weight_{name}"] for name in ("annotated", "machine")}
    assert weights["annotated"] != weights["machine"]
    assert sum(v for n, v in found.after.items() if "weight_" in n) == pytest.approx(4)
    assert 0 <= found.after["language_model/question_accuracy"] <= 1
    assert found.peak == 0
    assert "2 steps and both evaluations" in str(found)
