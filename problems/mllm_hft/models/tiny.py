"""The embedded backbone: a small LLaVA whose language model is trained here, on text alone."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import nn

from bilevel import rng
from bilevel.components import component
from bilevel.events import Progress

from ..sources.language import words
from ..sources.protocol import CPU, Corpus, Encoder, Simulator, Source, simulator
from .adapters import add_lora
from .encoders import ViT
from .instructions import before
from .network import ATTENTION, Backbone, LoadedModel, Network, start_heads
from .pictures import Pictures
from .pretrain import TextTraining, learn_language, question_accuracy
from .template import Template
from .tokenizer import WordTokenizer

VERSION = 1
"""Raised when code changes what a pretrained language model is."""


@component
class Tiny:
    """A Llama of a few layers, pretrained on text-only scenes and cached. A `Backbone`."""

    hidden: PositiveInt = 96
    """Width of the language model; a multiple of twice `heads`."""
    layers: PositiveInt = 2
    heads: PositiveInt = 4
    rank: PositiveInt = 8
    """Rank of LoRA."""
    steps: PositiveInt = 1000
    """Pretraining steps of the language model."""
    batch: PositiveInt = 32
    rate: PositiveFloat = 4e-3
    scenes: PositiveInt = 6000
    """Text-only scenes it is pretrained on."""

    def open(
        self, source: Source, encoder: Encoder | None, seed: int, device: torch.device = CPU
    ) -> Generator[Progress, None, LoadedModel]:
        drawn = simulator(source, "model tiny", "model checkpoint")
        eyes = encoder or ViT()

        def encode(corpus: Corpus) -> Generator[Progress, None, Pictures]:
            return Pictures((yield from eyes.encode(corpus, source, device)))

        feature = (yield from encode(probe(drawn, seed))).features.shape[-1]
        tokenizer, template = WordTokenizer(words(source)), Template()
        network = Network(
            self._llava(tokenizer, feature, seed),
            before=before(tokenizer, template),
            end=tokenizer.end,
            embedding=self.hidden,
        ).to(device)
        text = TextTraining(
            drawn, tokenizer, template, seed, self.scenes, self.steps, self.batch, self.rate
        )
        language = nn.ModuleList([network.language, network.mllm.lm_head])
        model = {
            "version": VERSION,
            "sizes": [self.hidden, self.layers, self.heads],
            "words": tokenizer.words,
        }
        yield from learn_language(network, language, text, "language", model)
        accuracy = question_accuracy(network, text)
        yield Progress("language model on text", 1, 1, verdict(accuracy))
        add_lora(network, self.rank)
        start_heads(network, rng.stream(seed, "heads"))
        facts = {"language_model/question_accuracy": accuracy}
        return LoadedModel(
            network, tokenizer, template, encode, tokenizer.save_pretrained, base=None, facts=facts
        )

    def _llava(self, tokenizer: WordTokenizer, feature: int, seed: int) -> Any:
        sizes = {"hidden": self.hidden, "layers": self.layers, "heads": self.heads}
        return tiny_llava(
            words=tokenizer.size, end=tokenizer.end, feature=feature, seed=seed, **sizes
        )


def verdict(accuracy: float) -> str:
    """What a user should know of a language model that answers so."""
    note = f"held-out question accuracy {accuracy:.3f} (chance 0.5)"
    return note if accuracy > 0.6 else f"{note}: no better than chance; raise problem.model.steps"


def probe(source: Simulator, seed: int) -> Corpus:
    """One picture, to learn how wide the encoder's features are."""
    stream = rng.stream(seed, "probe")
    return source.render(source.scenes(1, biased=False, generator=stream), stream)


def tiny_llava(
    *, words: int, end: int, feature: int, hidden: int, layers: int, heads: int, seed: int
) -> Any:
    """A random `LlavaForConditionalGeneration` with a small Llama; see `around`."""
    from transformers import LlamaConfig

    text = LlamaConfig(
        vocab_size=words,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=512,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=end,
    )
    return around(text, feature=feature, picture=0, seed=seed)


def around(text: Any, *, feature: int, picture: int, seed: int) -> Any:
    """A random LLaVA with a language model of the config `text` and a vision tower of no layer.

    The tower is there so that plain transformers can read what is exported; features come from
    an `Encoder`, and enter at the projector. `picture` is the token that a picture is written with.
    """
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=feature, num_hidden_layers=0, num_attention_heads=1, image_size=8, patch_size=8
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=picture,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    config._attn_implementation = ATTENTION
    # transformers draws weights from the global generator; the fork leaves that as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlavaForConditionalGeneration(config)


_: type[Backbone] = Tiny
