"""The network, its tokenizers, and checkpoints of transformers written and read back."""

from __future__ import annotations

import pytest
import torch

from bilevel.errors import ProblemError, RequirementError
from bilevel_problems.mllm_hft.models.adapters import add_lora, start_lora
from bilevel_problems.mllm_hft.models.instructions import before, conversations, prompts, texts
from bilevel_problems.mllm_hft.models.network import (
    Network,
    call,
    hacl_heads,
    parameters,
    start_heads,
)
from bilevel_problems.mllm_hft.models.template import Template
from bilevel_problems.mllm_hft.models.tiny import tiny_llava
from bilevel_problems.mllm_hft.models.tokenizer import PretrainedTokenizer, WordTokenizer

pytest.importorskip("transformers", reason="the model is transformers' own")
pytest.importorskip("peft", reason="LoRA goes through peft")

WORDS = [
    "describe",
    "the",
    "picture",
    ".",
    "is",
    "there",
    "a",
    "cat",
    "dog",
    "?",
    "yes",
    "no",
    "one",
]
TEMPLATE = "USER: <image>\n{prompt} ASSISTANT:"


def network(*, lora: bool = True, dtype: torch.dtype = torch.float64) -> Network:
    tokenizer = WordTokenizer(WORDS)
    mllm = tiny_llava(
        words=tokenizer.size, end=tokenizer.end, feature=6, hidden=16, layers=2, heads=2, seed=0
    )
    made = Network(mllm, before=before(tokenizer, Template()), end=tokenizer.end, embedding=16)
    if lora:
        add_lora(made, 2)
    start_heads(made, torch.Generator().manual_seed(0))
    return made.to(dtype)


@pytest.fixture
def pictures() -> torch.Tensor:
    return torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_words_go_to_ids_and_back():
    tokenizer = WordTokenizer(WORDS)
    ids = tokenizer.encode("is there a cat ?")
    assert tokenizer.decode([*tokenizer.start, *ids, tokenizer.end, tokenizer.pad]) == (
        "is there a cat ?"
    )
    with pytest.raises(ProblemError, match=r"'catt'.*Did the source mean 'cat'\?"):
        tokenizer.encode("is there a catt ?")


def test_rows_count_answers_and_their_end():
    tokenizer = WordTokenizer(WORDS)
    rows = conversations(
        [[("is there a cat ?", "yes"), ("is there a dog ?", "no")], [("one ?", "cat")]],
        tokenizer,
        Template(),
    )
    counted = rows.ids[0][rows.counted[0]]
    assert counted.tolist() == [
        *tokenizer.encode("yes"), tokenizer.end, *tokenizer.encode("no"), tokenizer.end,
    ]  # fmt: skip
    assert rows.mask.sum(1).tolist() == [14, 4]
    assert not (rows.counted & ~rows.mask).any()


def test_padding_changes_nothing(pictures):
    made, tokenizer = network(), WordTokenizer(WORDS)
    alone = prompts(["one ?"], tokenizer, Template())
    padded = prompts(["one ?", "is there a cat ?"], tokenizer, Template())
    first = made.logits(alone.ids, alone.mask, pictures[:1])
    second = made.logits(padded.ids, padded.mask, pictures[:2])
    width = alone.ids.shape[1]
    # RMSNorm and softmax of transformers compute in float32 whatever the dtype.
    torch.testing.assert_close(first[0], second[0, :width], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(first[0], second[1, :width], rtol=1e-3)


def test_logits_are_those_of_transformers_own_forward(pictures):
    """Own concatenation against `LlavaForConditionalGeneration.forward` with `inputs_embeds`."""
    made, tokenizer = network(), WordTokenizer(WORDS)
    rows = prompts(["is there a cat ?"], tokenizer, Template())
    words = made.mllm.get_input_embeddings()
    picture = made.mllm.model.multi_modal_projector(pictures[:1])
    joined = torch.cat([words(made.before)[None], picture, words(rows.ids)], dim=1)
    theirs = made.mllm(inputs_embeds=joined, use_cache=False).logits
    ours = made.logits(rows.ids, rows.mask, pictures[:1])
    torch.testing.assert_close(ours, theirs[:, 4:-1], rtol=1e-6, atol=1e-8)
    assert not torch.allclose(ours, theirs[:, 5:], rtol=1e-3)


def test_text_is_read_at_the_last_counted_token_even_where_pad_is_end():
    made, tokenizer = network(), WordTokenizer(WORDS)
    rows = texts(["one cat", "one cat and".replace(" and", " . one dog .")], tokenizer)
    as_end = torch.where(rows.mask, rows.ids, tokenizer.end)
    first = made.text(rows.ids, rows.mask)
    torch.testing.assert_close(made.text(as_end, rows.mask), first, rtol=1e-6, atol=1e-8)
    alone = texts(["one cat"], tokenizer)
    torch.testing.assert_close(first[:1], made.text(alone.ids, alone.mask), rtol=1e-5, atol=1e-6)
    wrong = made.text(as_end, torch.ones_like(rows.mask))
    assert not torch.allclose(wrong[0], first[0], rtol=1e-3)


def test_parameters_are_replaced_without_being_written(pictures):
    made = network()
    saved = {n: p.clone() for n, p in made.named_parameters()}
    projector = parameters(made, "projector")
    moved = {n: p + 0.5 for n, p in projector.items()}
    same = call(made, projector, "image", features=pictures)
    other = call(made, moved, "image", features=pictures)
    torch.testing.assert_close(same, made.image(pictures))
    assert not torch.allclose(same, other, rtol=1e-3)
    for name, value in made.named_parameters():
        assert torch.equal(value, saved[name])


def test_a_part_under_two_names_keeps_its_parameters(pictures):
    """And is replaced under both."""
    made = network()
    made.mllm.again = made.projector
    before = {n: id(p) for n, p in made.named_parameters(remove_duplicate=False)}
    assert len({*before.values()}) < len(before)
    moved = {n: p + 0.5 for n, p in parameters(made, "projector").items()}
    expected = call(network(), moved, "image", features=pictures)
    torch.testing.assert_close(call(made, moved, "image", features=pictures), expected)
    assert {n: id(p) for n, p in made.named_parameters(remove_duplicate=False)} == before
    assert all(isinstance(p, torch.nn.Parameter) for p in made.projector.parameters())


def test_groups_are_disjoint_and_complete():
    made = network()
    groups = {g: set(parameters(made, g)) for g in ("lora", "projector", "heads")}
    assert groups["heads"] == {"image_head.weight", "text_head.weight"}
    assert len(groups["projector"]) == 4
    assert len(groups["lora"]) == 2 * 2 * 7  # layers, A and B, linear maps of a layer
    assert not groups["lora"] & groups["projector"]


def test_lora_starts_as_the_same_function(pictures):
    plain, made = network(lora=False), network()
    start = start_lora(made, torch.Generator().manual_seed(5))
    torch.testing.assert_close(
        call(made, {n: v.double() for n, v in start.items()}, "image", features=pictures),
        plain.image(pictures),
        rtol=1e-6,
        atol=1e-8,
    )
    moved = {n: v.double() + 0.3 for n, v in start.items()}
    assert not torch.allclose(
        call(made, moved, "image", features=pictures), plain.image(pictures), rtol=1e-3
    )


def test_both_heads_start_as_one_isometry():
    made = network()
    rows = made.image_head.weight
    assert torch.equal(rows, made.text_head.weight)
    torch.testing.assert_close(rows @ rows.T, torch.eye(16).double(), rtol=0, atol=1e-6)


def test_hacls_heads_are_a_quarter_wide_with_bias_and_drawn_apart(pictures):
    made = network()
    before, start = made.image(pictures), torch.random.get_rng_state()
    hacl_heads(made, torch.Generator().manual_seed(0))
    names = {f"{side}_head.{kind}" for side in ("image", "text") for kind in ("weight", "bias")}
    heads = parameters(made, "heads")
    assert heads.keys() == names
    assert {tuple(heads[name].shape) for name in names} == {(4, 16), (4,)}
    assert not torch.equal(heads["image_head.weight"], heads["text_head.weight"])
    for name in names:
        assert 0.1 < float(heads[name].abs().max()) <= 16**-0.5
        assert not heads[name].requires_grad
    assert before.shape == (3, 16)
    assert made.image(pictures).shape == (3, 4)
    assert made.image(pictures).dtype == torch.float64
    # The bias is added: what the weight gives, and the bias.
    bare = call(made, {"image_head.bias": torch.zeros(4).double()}, "image", features=pictures)
    torch.testing.assert_close(made.image(pictures), bare + heads["image_head.bias"])
    assert torch.equal(torch.random.get_rng_state(), start)


def test_greedy_captions_are_the_argmax_without_a_cache(pictures):
    made, tokenizer = network(), WordTokenizer(WORDS)
    asked = torch.tensor(tokenizer.encode("describe the picture ."))
    got = made.captions(pictures, asked, 6)
    row: list[int] = []
    for _ in range(got.shape[1]):
        ids = torch.tensor([[*asked.tolist(), *row, tokenizer.pad]])
        row.append(int(made.logits(ids, torch.ones_like(ids).bool(), pictures[:1])[0, -1].argmax()))
        if row[-1] == tokenizer.end:
            break
    assert got[0, : len(row)].tolist() == row
    assert (got[0, len(row) :] == tokenizer.end).all()


def test_second_derivatives_exist_and_are_right(pictures):
    """A Hessian product of the image embedding's energy against a difference of gradients."""
    made = network()
    g = torch.Generator().manual_seed(7)
    # Inputs of unit size: fresh projections are so small that the norm after them is very curved.
    at = {n: (20 * p).requires_grad_() for n, p in parameters(made, "projector").items()}
    direction = {n: torch.randn(p.shape, generator=g).double() for n, p in at.items()}

    def gradient(parts):
        loss = call(made, parts, "image", features=pictures).square().mean()
        return torch.autograd.grad(loss, list(parts.values()), create_graph=True)

    product = torch.autograd.grad(gradient(at), list(at.values()), list(direction.values()))
    step = 1e-2  # transformers' norms are float32: a smaller step drowns in rounding
    sides = [
        gradient(
            {n: (p + s * step * direction[n]).detach().requires_grad_() for n, p in at.items()}
        )
        for s in (1, -1)
    ]
    numeric = torch.cat(
        [((a - b).detach() / (2 * step)).flatten() for a, b in zip(*sides, strict=True)]
    )
    exact = torch.cat([p.flatten() for p in product]).detach()
    assert float((numeric - exact).norm() / exact.norm()) < 1e-2
    assert float((numeric + exact).norm() / exact.norm()) > 1


def test_a_model_of_another_family_is_refused():
    with pytest.raises(ProblemError, match="known are llava, llava_next"):
        Network(torch.nn.Linear(2, 2), before=(), end=0, embedding=2)


def _finish(generator):
    """What a generator returns."""
    while True:
        try:
            next(generator)
        except StopIteration as stop:
            return stop.value


def test_a_checkpoint_sees_as_transformers_does(checkpoint, tmp_path, monkeypatch):
    from bilevel_problems.mllm_hft.models.checkpoint import Checkpoint
    from bilevel_problems.mllm_hft.sources.shapes import Shapes

    monkeypatch.setenv("BILEVEL_CACHE", str(tmp_path))
    source, g = Shapes(), torch.Generator().manual_seed(0)
    corpus = source.render(source.scenes(3, biased=False, generator=g), g)
    loaded = _finish(
        Checkpoint(path=checkpoint, template=TEMPLATE, rank=2, embedding=8).open(source, None, 0)
    )
    features = _finish(loaded.encode(corpus))
    assert features.features.shape == (3, 9, 8)
    assert features.layout is None
    transformers = pytest.importorskip("transformers")
    pictures = transformers.AutoImageProcessor.from_pretrained(checkpoint)
    pixels = pictures(images=list(corpus.images), return_tensors="pt")["pixel_values"]
    theirs = torch.stack(
        list(loaded.network.mllm.get_image_features(pixel_values=pixels).pooler_output)
    )
    ours = loaded.network.projector(features.features)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ours[0], theirs[1], rtol=1e-3)
    assert isinstance(loaded.tokenizer, PretrainedTokenizer)
    assert loaded.tokenizer.pad == loaded.tokenizer.end  # no pad token: masks decide


def test_a_missing_checkpoint_names_the_remedy(tmp_path):
    from bilevel_problems.mllm_hft.models.checkpoint import Checkpoint
    from bilevel_problems.mllm_hft.sources.shapes import Shapes

    missing = Checkpoint(path=str(tmp_path / "nothing"))
    with pytest.raises(RequirementError, match=r"model.path.*save_pretrained") as caught:
        _finish(missing.open(Shapes(), None, 0))
    assert caught.value.exit_code == 3


def test_a_checkpoint_takes_no_other_encoder(checkpoint):
    from bilevel_problems.mllm_hft.models.checkpoint import Checkpoint
    from bilevel_problems.mllm_hft.models.encoders import ViT
    from bilevel_problems.mllm_hft.sources.shapes import Shapes

    with pytest.raises(ProblemError, match="own vision tower"):
        _finish(Checkpoint(path=checkpoint).open(Shapes(), ViT(), 0))
