"""What is exported says the same as the model in the run, read by transformers and peft alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bilevel.errors import CheckpointError
from bilevel_problems.mllm_hft.models.adapters import start_lora
from bilevel_problems.mllm_hft.models.checkpoint import Checkpoint
from bilevel_problems.mllm_hft.models.export import export
from bilevel_problems.mllm_hft.models.families import FAMILIES
from bilevel_problems.mllm_hft.models.instructions import prompt_ids
from bilevel_problems.mllm_hft.models.loading import JOINT
from bilevel_problems.mllm_hft.models.network import LoadedModel, call, parameters
from bilevel_problems.mllm_hft.sources.protocol import Corpus
from bilevel_problems.mllm_hft.sources.shapes import Shapes
from tests.problems.mllm_hft.miniature import prepared

pytest.importorskip("transformers", reason="the models are transformers' own")
pytest.importorskip("peft", reason="LoRA goes through peft")
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"  # peft asks transformers by its old name
)

LENGTH = 6


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BILEVEL_CACHE", str(tmp_path / "cache"))


def finish(generator: Any) -> Any:
    while True:
        try:
            next(generator)
        except StopIteration as stop:
            return stop.value


def moved(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    """Every trained part away from where it began, as after a run."""
    g = torch.Generator().manual_seed(3)
    at = start_lora(loaded.network, g) | parameters(loaded.network, "projector")
    at |= parameters(loaded.network, "heads")
    return {n: v + 0.1 * torch.randn(v.shape, generator=g) for n, v in at.items()}


def reloaded(to: Path, *, merged: bool) -> Any:
    """By transformers and peft alone."""
    import transformers
    from peft import PeftConfig, PeftModel

    kind = transformers.AutoModelForImageTextToText
    if merged:
        return kind.from_pretrained(to)
    base = PeftConfig.from_pretrained(str(to)).base_model_name_or_path
    return PeftModel.from_pretrained(kind.from_pretrained(base), str(to))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_checkpoint_says_the_same_after_export(family, merged, folder, tmp_path):
    loaded = finish(
        Checkpoint(path=str(folder(family)), rank=2, embedding=8).open(Shapes(), None, 0)
    )
    g = torch.Generator().manual_seed(1)
    image = torch.randint(256, (1, 3, 60, 100), generator=g, dtype=torch.uint8)
    pictures = finish(loaded.encode(Corpus((), image)))
    asked = prompt_ids("What do you see?", loaded.tokenizer, loaded.template)
    values = moved(loaded)
    given = {"ids": torch.tensor(asked), "length": LENGTH, **pictures.take(slice(0, 1))}
    ours = call(loaded.network, values, "captions", **given)[0].tolist()
    assert ours != loaded.network.captions(**given)[0].tolist()  # else it proves nothing
    before = {n: v.clone() for n, v in loaded.network.state_dict().items()}
    export(loaded, values, tmp_path / "out", merged=merged)
    assert all(torch.equal(v, before[n]) for n, v in loaded.network.state_dict().items())

    theirs = reloaded(tmp_path / "out", merged=merged)
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out", backend="pil")
    picture = tokenizer.convert_tokens_to_ids("<image>")
    layout = pictures.layout
    block = [picture] * pictures.features.shape[1] if layout is None else [
        picture if code < 0 else code for code in layout[0].tolist()
    ]  # fmt: skip
    ids = torch.tensor([[*loaded.network.before.tolist(), *block, *asked]])
    nested = [[image[0]]] if family in ("idefics3", "smolvlm") else [image[0]]
    extra = {}
    if family.startswith("qwen"):
        extra = {"mm_token_type_ids": (ids == picture).int()}
    if family == "paligemma":
        extra = {"token_type_ids": torch.zeros_like(ids)}
    said = theirs.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=LENGTH,
        pad_token_id=loaded.tokenizer.end, **processor(images=nested, return_tensors="pt"), **extra,
    )[0, ids.shape[1] :]  # fmt: skip
    assert said.tolist() == ours[: len(said)]


PROCESSORS = {
    "llava": {
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    },
    "llava_next": {
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    },
}


def with_processor(family: str, source: Path, to: Path) -> Path:
    """A copy of a folder, as `save_pretrained` of its whole processor writes it."""
    import transformers

    shutil.copytree(source, to)
    tokenizer = transformers.AutoTokenizer.from_pretrained(to)
    pictures = transformers.AutoImageProcessor.from_pretrained(to, backend="pil")
    kind = {"llava": "Llava", "llava_next": "LlavaNext"}[family]
    given = {**PROCESSORS[family], "chat_template": tokenizer.chat_template}
    whole = getattr(transformers, f"{kind}Processor")(pictures, tokenizer, **given)
    (to / "preprocessor_config.json").unlink()
    whole.save_pretrained(to)
    return to


def exported(path: Path, to: Path, *, merged: bool = True) -> Path:
    loaded = finish(Checkpoint(path=str(path), rank=2, embedding=8).open(Shapes(), None, 0))
    export(loaded, moved(loaded), to, merged=merged)
    return to


@pytest.mark.parametrize("family", PROCESSORS)
def test_the_processor_says_the_same_after_export(family, folder, tmp_path):
    import transformers

    source = with_processor(family, folder(family), tmp_path / "source")
    ours, theirs = (
        transformers.AutoProcessor.from_pretrained(path, backend="pil")
        for path in (exported(source, tmp_path / "out"), source)
    )
    assert ours.chat_template == theirs.chat_template
    assert type(ours) is type(theirs)
    g = torch.Generator().manual_seed(1)
    image = torch.randint(256, (3, 60, 100), generator=g, dtype=torch.uint8)
    given = {"images": image, "text": "<image>What do you see?", "return_tensors": "pt"}
    said, expected = ours(**given), theirs(**given)
    assert said.keys() == expected.keys() >= {"input_ids", "pixel_values"}
    assert all(torch.equal(said[name], expected[name]) for name in expected)
    picture = ours.tokenizer.convert_tokens_to_ids("<image>")
    assert (
        int((said["input_ids"] == picture).sum()) > 1
    )  # negative control: as many as it has patches


def test_what_a_folder_says_of_a_processor_is_kept_as_it_is_and_not_invented(folder, tmp_path):
    """qwen2_vl, whose whole processor needs torchvision to be read."""
    source = Path(shutil.copytree(folder("qwen2_vl"), tmp_path / "source"))
    plain = exported(source, tmp_path / "plain")
    assert not any((plain / name).exists() for name in JOINT)
    for name in JOINT:
        (source / name).write_text(f'{{"said":  "in {name}"}}')
    for merged in (False, True):
        out = exported(source, tmp_path / f"out_{merged}", merged=merged)
        assert all((out / n).read_bytes() == (source / n).read_bytes() for n in JOINT)


@pytest.mark.parametrize("merged", [False, True])
def test_the_embedded_model_says_the_same_after_export(merged, tmp_path):
    problem = prepared(formulation="weighted")
    with torch.no_grad():
        _says_the_same(problem, merged, tmp_path)


def _says_the_same(problem, merged, tmp_path):
    loaded, evaluation = problem._prepared.loaded, problem._prepared.evaluation
    values = moved(loaded)
    x = {n: v for n, v in values.items() if ".lora_" in n}
    y = {n: v for n, v in values.items() if n not in x}
    asked = torch.tensor(prompt_ids("describe the picture .", loaded.tokenizer, loaded.template))
    batch = evaluation.pictures.take(slice(0, 1))
    ours = call(loaded.network, values, "captions", ids=asked, length=LENGTH, **batch)[0].tolist()
    problem.export(x, y, tmp_path / "out", merged)
    theirs = reloaded(tmp_path / "out", merged=merged)
    plain = theirs if merged else theirs.get_base_model()
    words = plain.get_input_embeddings()
    seen = plain.model.multi_modal_projector(batch["features"])
    parts = [words(loaded.network.before)[None], seen, words(asked)[None]]
    joined = torch.cat(parts, dim=1)
    mask = torch.ones(joined.shape[:2], dtype=torch.long)
    said = theirs.generate(
        inputs_embeds=joined, attention_mask=mask, do_sample=False, max_new_tokens=LENGTH,
        pad_token_id=loaded.tokenizer.pad,
    )[0].tolist()  # fmt: skip
    assert said == ours[: len(said)]
    import transformers

    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert words.encode("describe the picture .", add_special_tokens=False) == asked.tolist()


@pytest.mark.parametrize("kept", [None, "someone/a-model"])
def test_an_adapter_names_its_base_wherever_it_is_loaded_from(kept, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder("llava").parent)
    loaded = finish(
        Checkpoint(path=folder("llava").name, rank=2, embedding=8).open(Shapes(), None, 0)
    )
    loaded = replace(loaded, base=kept or loaded.base)
    export(loaded, moved(loaded), tmp_path / "out", merged=False)
    monkeypatch.chdir(tmp_path)
    said = json.loads(Path("out/adapter_config.json").read_text())["base_model_name_or_path"]
    assert said == (kept or str(folder("llava")))
    if kept is None:
        assert reloaded(Path("out"), merged=False)


@pytest.mark.parametrize("merged", [False, True])
def test_nothing_of_transformers_is_printed(merged, folder, tmp_path, capfd):
    import transformers

    source = folder("llava")
    loaded = finish(Checkpoint(path=str(source), rank=2, embedding=8).open(Shapes(), None, 0))
    capfd.readouterr()
    export(replace(loaded, base=None), moved(loaded), tmp_path / "out", merged=merged)
    assert capfd.readouterr() == ("", "")
    # negative control: what is written by hand has a bar
    transformers.AutoModelForImageTextToText.from_pretrained(source).save_pretrained(tmp_path / "x")
    assert "Writing model shards" in capfd.readouterr().err


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    problem = prepared(formulation="task_only")
    with pytest.raises(CheckpointError, match="nothing is overwritten"):
        problem.export({}, {}, tmp_path / "out", False)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]
