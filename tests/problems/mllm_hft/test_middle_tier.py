"""The recipe of the middle tier, as shipped but for sizes: what `make gpu-check` runs, on the CPU."""

from __future__ import annotations

import pytest
import torch

from bilevel_problems.mllm_hft.models.instructions import prompt_ids
from bilevel_problems.mllm_hft.models.network import call
from tests.problems.mllm_hft.middle_tier import Measured, lacks, measured

SMALL = [
    "problem.model.layers=1",
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
    "problem.contrast_batch=2",
    "problem.upper_batch=2",
    "lower.steps=1",
    "upper.steps=1",
]
LENGTH = 6

pytestmark = pytest.mark.skipif(bool(lacks()), reason=lacks())


@pytest.fixture(scope="module")
def found(smollm2_cache) -> Measured:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BILEVEL_CACHE", str(smollm2_cache))
        return measured("cpu", SMALL)


def test_a_step_moves_the_model_and_the_weights_of_sources(found):
    assert found.steps == 1
    assert found.before["task_loss"] != found.after["task_loss"]
    weights = {name: found.after[f"learned/weight_{name}"] for name in ("annotated", "machine")}
    assert weights["annotated"] != weights["machine"]
    assert sum(v for n, v in found.after.items() if "weight_" in n) == pytest.approx(4)
    assert 0 <= found.after["language_model/question_accuracy"] <= 1
    assert found.peak == 0
    assert "1 steps and both evaluations" in str(found)


@torch.no_grad()
def test_what_is_exported_says_the_same_in_plain_transformers(found, tmp_path):
    """Its own chat template, features in the place of `<image>`, every trained part moved."""
    transformers = pytest.importorskip("transformers")
    problem, x = found.setup.problem, found.state.x
    g = torch.Generator().manual_seed(3)
    y = {n: v + 0.3 * torch.randn(v.shape, generator=g) for n, v in found.state.y.items()}
    loaded, pictures = problem._prepared.loaded, problem._prepared.evaluation.pictures
    asked = torch.tensor(prompt_ids("what is there ?", loaded.tokenizer, loaded.template))
    given = {"ids": asked, "length": LENGTH, **pictures.take(slice(0, 1))}
    ours = call(loaded.network, y, "captions", **given)[0].tolist()
    assert ours != loaded.network.captions(**given)[0].tolist()  # else it proves nothing
    problem.export(x, y, tmp_path / "out", True)

    theirs = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "<image>\nwhat is there ?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    words = theirs.get_input_embeddings()(torch.tensor(ids))
    place = ids.index(theirs.config.image_token_id)
    seen = theirs.model.multi_modal_projector(given["features"][0])
    said = theirs.generate(
        inputs_embeds=torch.cat([words[:place], seen, words[place + 1 :]])[None],
        do_sample=False,
        max_new_tokens=LENGTH,
    )[0].tolist()
    assert said == ours[: len(said)]
