"""The middle tier on a GPU, with the time and memory it took; the same code runs on the CPU in
tests/problems/mllm_hft/test_middle_tier.py."""

from __future__ import annotations

import math

import pytest
import torch

from tests.problems.mllm_hft.middle_tier import lacks, measured

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(bool(lacks()), reason=lacks()),
]


def test_the_recipe_runs_as_shipped(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BILEVEL_CACHE", str(tmp_path))
    found = measured("cuda", [])
    with capsys.disabled():
        print(f"\nmllm_hft_smol on {torch.cuda.get_device_name()}: {found}")
    assert all(math.isfinite(value) for value in found.after.values())
    assert found.before["task_loss"] != found.after["task_loss"]
    assert found.peak > 0
