"""A run of two upper steps on a folder of each family, and of one in bfloat16."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch

from bilevel.cli.app import app
from bilevel.errors import ProblemError
from bilevel.events import Evaluated, Stepped, Tabulated, Warned
from bilevel.rng import Streams, stream
from bilevel.run import engine
from bilevel_problems.mllm_hft.models.checkpoint import Checkpoint
from bilevel_problems.mllm_hft.models.families import FAMILIES
from bilevel_problems.mllm_hft.sources.jsonl import Jsonl
from tests.problems.mllm_hft.miniature import miniature, prepared, setup
from tests.problems.mllm_hft.sources import layouts
from tests.problems.mllm_hft.sources.layouts import lines, pictures

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


def own(folder: Path, caption: str = "A dog by a cat.", **more: object) -> Jsonl:
    """Twelve pictures of a file, of each split four; the last one of each has another caption."""
    names = [f"{split}{i}.png" for split in ("train", "upper", "test") for i in range(4)]
    pictures(folder, names)
    rows = [
        {
            "image": name,
            "split": name[:-5],
            "objects": [("dog", "cat", "kite", "hour")[i % 4], "cat"],
            "caption": f"A {('dog', 'cat', 'kite')[i % 3]} by a cat.",
            "hallucinated": {"object": f"A {('kite', 'dog', 'car')[i % 3]} by a cat."},
        }
        for i, name in enumerate(names)
    ]
    for row in rows[3::4]:
        row |= {"caption": caption, **more}
        if not caption:
            del row["caption"]
    return Jsonl(path=lines(folder / "d.jsonl", rows), ask="{question} Yes or no?", alter=False)


def notes(problem) -> list[str]:
    return [note for event in problem.prepare() if (note := event.note)]


def without_caption(folder, tmp_path, caption):
    model = Checkpoint(path=str(folder("llava")), rank=2, embedding=8)
    options = {"encoder": None, "model": model, "train": 4, "upper": 4, "test": 4, "warm_up": 0}
    problem = miniature(source=own(tmp_path, caption), **options)
    said = notes(problem)
    problem.place("cpu", torch.float32)
    *events, metrics = _all(problem.evaluate(*problem.init(Streams(0))))
    return problem, said, events, metrics


def _all(steps):
    while True:
        try:
            yield next(steps)
        except StopIteration as stop:
            yield stop.value
            return


def test_a_picture_without_a_caption_is_left_out_of_contrast_and_gap(folder, tmp_path):
    problem, said, events, metrics = without_caption(folder, tmp_path, "")
    missing = "train: 1 of 4 pictures have no caption, and are in no contrast"
    assert missing in said
    batch = next(problem.lower_batches(stream(0, "l")))["contrast"]
    assert sorted(set(batch["picture"].tolist())) == [0, 1, 2]
    warned = [event.message for event in events if isinstance(event, Warned)]
    assert "1 of 4 evaluated pictures have no caption, so gap/… leaves them out" in warned
    rows = {event.name: event.rows for event in events if isinstance(event, Tabulated)}
    assert (len(rows["pictures"]), len(rows["captions"])) == (3, 4)
    assert "embeddings" in problem.figures(*problem.init(Streams(0)))
    whole, said, events, others = without_caption(folder, tmp_path, "A cat.")  # negative control
    assert missing not in said
    assert not any("no caption" in e.message for e in events if isinstance(e, Warned))
    assert metrics.keys() == others.keys()
    assert sum(name.startswith("gap/") for name in metrics) == 9
    assert metrics["gap/alignment"] != others["gap/alignment"]
    kept = whole._evaluator.embed(whole.before(), whole._prepared.evaluation)
    some = problem._evaluator.embed(problem.before(), problem._prepared.evaluation)
    for ours, theirs in zip(some, kept, strict=True):
        assert torch.allclose(ours, theirs[:3], atol=1e-6)


def test_a_checkpoint_is_asked_as_pope_asks_in_training_and_in_tests(folder, tmp_path):
    problem, *_ = without_caption(folder, tmp_path, "A cat.")
    asked = problem._prepared.evaluation.asked["pope_random"].questions
    form = r"Is there an? (dog|cat|kite|hour) in the image\? Yes or no\?"
    assert asked
    assert all(re.fullmatch(form, question.text) for question in asked)
    assert all("an hour" in question.text for question in asked if question.name == "hour")
    rows = problem._prepared.train.dialogues
    decode = problem._prepared.loaded.tokenizer.decode
    said = [decode(ids[m].tolist()) for ids, m in zip(rows.ids, rows.mask, strict=True)]
    assert sum(bool(re.search(form + r".*\b(Yes|No)\b", text)) for text in said) >= 2
    assert not any(re.search("is there|yes$|no$", text) for text in said)


@pytest.mark.parametrize(
    ("row", "mark"),
    [
        ({"caption": "A dog.</s> More."}, "</s>"),
        ({"caption": "A dog.", "conversation": [["Q <pad>", "A"]]}, "<pad>"),
        ({"caption": "A dog.", "hallucinated": {"count": "Two<|im_end|> dogs."}}, r"<\|im_end\|>"),
        ({"caption": "A dog.", "questions": [{"text": "<s>Is it?", "answer": "no"}]}, "<s>"),
    ],
)
def test_a_special_token_in_a_text_is_refused_with_its_line(folder, tmp_path, row, mark):
    model = Checkpoint(path=str(folder("llava")), rank=2, embedding=8)
    problem = miniature(source=own(tmp_path, **row), encoder=None, model=model)
    with pytest.raises(ProblemError, match=rf"d\.jsonl:4: the text .* holds '{mark}'"):
        notes(problem)


def test_other_marks_are_words(folder, tmp_path):  # negative control
    problem, *_ = without_caption(folder, tmp_path, "A <b>dog</b> < 3 | <smile>")
    assert problem._prepared.train.captions.described.all()
