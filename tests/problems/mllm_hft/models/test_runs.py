"""A run of two upper steps on a folder of each family, and of one in bfloat16."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from bilevel.cli.app import app
from bilevel.events import Evaluated, Stepped
from bilevel.run import engine
from bilevel_problems.mllm_hft.models.checkpoint import Checkpoint
from bilevel_problems.mllm_hft.models.families import FAMILIES
from tests.problems.mllm_hft.miniature import prepared, setup
from tests.problems.mllm_hft.sources import layouts

pytest.importorskip("transformers", reason="the models are transformers' own")
pytest.importorskip("peft", reason="LoRA goes through peft")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BILEVEL_CACHE", str(tmp_path / "cache"))


def run(path: Path, formulation: str) -> tuple[dict[str, float], dict[str, float]]:
    """First and last measures of two steps."""
    model = Checkpoint(path=str(path), rank=2, embedding=8)
    made = setup(prepared(encoder=None, model=model, formulation=formulation))
    events = list(engine.run(made, engine.start(made)))
    steps = [event for event in events if isinstance(event, Stepped)]
    assert len(steps) == 2
    assert all(math.isfinite(event.upper_loss + event.lower_loss) for event in steps)
    assert all(event.hypergradient_norm > 0 for event in steps)
    first, last = [event.metrics for event in events if isinstance(event, Evaluated)]
    return first, last


@pytest.mark.parametrize("family", FAMILIES)
def test_two_steps_move_the_model(family, folder):
    first, last = run(folder(family), "weighted")
    assert first["task_loss"] != last["task_loss"]
    assert first["gap/centroid_distance"] != last["gap/centroid_distance"]


def test_a_bfloat16_folder_runs_and_is_evaluated(folder, tmp_path):
    import transformers

    path = Path(shutil.copytree(folder("llava"), tmp_path / "half"))
    kind = transformers.AutoModelForImageTextToText
    kind.from_pretrained(path, dtype=torch.bfloat16).save_pretrained(path)
    assert json.loads((path / "config.json").read_text())["dtype"] == "bfloat16"
    half, _ = run(path, "two_variable")
    full, _ = run(folder("llava"), "two_variable")
    assert half["task_loss"] == pytest.approx(full["task_loss"], rel=5e-2)
    assert half["task_loss"] != full["task_loss"]


FILES = """\
version: 1
name: files
problem:
  name: mllm_hft
  model: {{name: checkpoint, path: {path}, rank: 2, embedding: 8}}
  source: {{name: jsonl, path: data.jsonl, alter: {alter}}}
  train: 6
  upper: 4
  test: 4
  questions: 2
  caption_tokens: 4
  warm_up: 1
  lower_batch: 2
  contrast_batch: 3
  upper_batch: 2
lower: {{name: gradient, steps: 1, optimizer: {{name: adam, lr: 1e-3}}}}
upper: {{steps: 2, optimizer: {{name: adam, lr: 0.1}}}}
estimator: {{name: unroll}}
runtime: {{device: cpu, dtype: {dtype}}}
evaluate: {{held: false}}
sinks: [jsonl, figures]
"""


def run_on_files(
    path: Path, *, alter: bool, dtype: str = "float32", repeats: int = 1
) -> tuple[Path, str]:
    """The folder of a run of two steps on pictures with true captions alone, and what it said."""
    from typer.testing import CliRunner

    things = ["dog", "cat", "car", "person"]
    rows = [
        {
            "image": f"{i}.png",
            "caption": f"A red {things[i % 4]} left of two {things[(i + 1 + i // 4) % 4]}s.",
            "objects": [things[i % 4], things[(i + 1 + i // 4) % 4]],
            "split": split,
        }
        for i, split in enumerate([*["train"] * 6, *["upper"] * 4, *["test"] * 4])
    ]
    rows[2]["caption"] += " It is red." * (repeats - 1)
    layouts.pictures(Path(), [row["image"] for row in rows])
    layouts.lines(Path("data.jsonl"), rows)
    Path("files.yaml").write_text(FILES.format(path=path, alter=str(alter).lower(), dtype=dtype))
    result = CliRunner().invoke(app, ["run", "files.yaml"])
    assert result.exit_code == 0, result.output
    (made,) = Path("runs/files").iterdir()
    return made, " ".join(result.output.split())


def measures(made: Path) -> list[dict[str, float]]:
    """What was measured, in order."""
    events = map(json.loads, (made / "events.jsonl").read_text().splitlines())
    return [event["metrics"] for event in events if "metrics" in event]


@pytest.mark.parametrize("alter", [False, True])
def test_a_run_without_a_hallucinated_caption_ends_and_says_so(
    alter, folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    made, said = run_on_files(folder("llava"), alter=alter)
    first, last = measures(made)
    assert first["task_loss"] != last["task_loss"]
    assert first["gap/centroid_distance"] != last["gap/centroid_distance"]
    told_apart = {name for name in last if name.endswith("hallucinated")}
    drawn = {path.stem for path in (made / "figures").iterdir()}
    warning = "none of 6 training pictures has a hallucinated caption"
    if alter:  # negative control: the same pictures with hallucinated captions made
        assert len(told_apart) == 4
        assert "embeddings" in drawn
        assert warning not in said
    else:
        assert not told_apart
        assert "captions" in drawn
        assert "embeddings" not in drawn
        assert warning in said


@pytest.mark.parametrize("repeats", [1, 200])
def test_a_caption_beyond_the_models_positions_is_warned_of(repeats, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, said = run_on_files(folder("llava"), alter=False, repeats=repeats)
    warning = (
        "1 of 6 train pictures have more tokens, with what is said of them, than the 512 positions"
    )
    assert (warning in said) == (repeats > 1)
    assert ("has '2.png': shorten" in said) == (repeats > 1)
    assert "upper pictures have more tokens" not in said


def test_a_run_whose_variables_are_bfloat16_ends(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made, _ = run_on_files(folder("llava"), alter=True, dtype="bfloat16")
    first, last = measures(made)
    assert all(math.isfinite(value) for value in (*first.values(), *last.values()))
    assert first["gap/centroid_distance"] != last["gap/centroid_distance"]
    assert "embeddings" in {path.stem for path in (made / "figures").iterdir()}


RECIPE = """\
version: 1
name: exported
problem:
  name: mllm_hft
  formulation: task_only
  model: {{name: checkpoint, path: {path}, rank: 2, embedding: 8}}
  train: 4
  upper: 4
  test: 4
  questions: 2
  warm_up: 1
  lower_batch: 2
  upper_batch: 2
lower: {{name: gradient, steps: 1}}
upper: {{steps: 1}}
estimator: {{name: none}}
"""


def test_export_of_a_run_from_the_command_line(folder, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE.format(path=folder("llava")))
    for command in (["run", "recipe.yaml"], ["export", "exported", "--to", "out"]):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
    said = json.loads(Path("out/adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(folder("llava"))
    names = {path.name for path in Path("out").iterdir()}
    assert {"adapter_model.safetensors", "tokenizer.json", "preprocessor_config.json"} <= names
    again = CliRunner().invoke(app, ["export", "exported", "--to", "out"])
    assert again.exit_code == 1
    assert "not an empty folder" in again.output


def test_a_problem_without_export_says_where_its_variables_are(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(app, ["run", "quadratic", "upper.steps=1"]).exit_code == 0
    result = CliRunner().invoke(app, ["export", "quadratic", "--to", "out"])
    assert result.exit_code == 2
    assert "tensors.safetensors" in result.output
