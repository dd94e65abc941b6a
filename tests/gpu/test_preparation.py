"""What comes before the first step is computed on the GPU, and is what the CPU computes, to rounding."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch

from bilevel.events import Stepped
from bilevel.run import engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CASES: list[dict[str, Any]] = [
    {"micro_batch": "auto", "contrast_first": 2, "queue": 3},
    {"micro_batch": 2, "contrast_first": 2, "contrast_loss": "chip"},
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_a_run_is_prepared_where_it_runs(options, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from tests.problems.mllm_hft.miniature import miniature, setup

    found, encoders = {}, tmp_path / "cpu" / "vit"
    for device in ("cpu", "cuda"):
        monkeypatch.setenv("BILEVEL_CACHE", str(tmp_path / device))
        if encoders.is_dir():  # the same encoder: training one magnifies rounding
            shutil.copytree(encoders, tmp_path / device / "vit")
        problem = miniature(formulation="weighted", **options)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in problem.prepare(device):
            pass
        assert (torch.cuda.max_memory_allocated() > before) == (device == "cuda")
        made = problem._prepared
        assert {p.device.type for p in made.loaded.network.parameters()} == {device}
        assert made.train.pictures.features.device.type == "cpu"
        found[device] = problem
    features = [problem._prepared.train.pictures.features for problem in found.values()]
    torch.testing.assert_close(features[1], features[0], rtol=1e-2, atol=1e-2)
    scene = replace(setup(found["cuda"]), device=torch.device("cuda"))
    list(engine.prepare(scene))
    events = list(engine.run(scene, engine.start(scene)))
    assert sum(isinstance(event, Stepped) for event in events) == 2
