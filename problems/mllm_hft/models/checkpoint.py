"""A real LLaVA from a local folder or the hub, through transformers' own classes."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor

from bilevel import rng
from bilevel.components import component
from bilevel.errors import ProblemError, RequirementError
from bilevel.events import Progress

from ..sources.protocol import Corpus, Encoder, Source
from .cache import Tensors, cached
from .instructions import Template, before
from .network import ATTENTION, Network, Opened, add_lora, start_heads
from .tokenizer import PretrainedTokenizer

VERSION = 1
"""Raised when code changes what the features of a checkpoint are."""


@component
class Checkpoint:
    """A trained model of the LLaVA family, which sees with its own vision tower. A `Backbone`.

    The language model is not trained on text here: it comes trained.
    """

    path: str
    """A folder written by `save_pretrained`, or an id of the Hugging Face hub."""
    template: str = "USER: <image>\n{prompt} ASSISTANT:"
    """How a turn is written, with the picture and the prompt in their places."""
    rank: PositiveInt = 8
    """Rank of LoRA."""
    embedding: PositiveInt = 256
    """Width of the heads' embeddings."""
    batch: PositiveInt = 16
    """Pictures the vision tower encodes at once."""

    def open(
        self, source: Source, encoder: Encoder | None, seed: int
    ) -> Generator[Progress, None, Opened]:
        if encoder is not None:
            raise ProblemError(
                f"encoder = {type(encoder).__name__} with model checkpoint: a checkpoint sees with "
                "its own vision tower; remove problem.encoder"
            )
        yield Progress("model", 0, None, self.path)
        llava, tokens, pictures = self._load()
        template, tokenizer = Template(self.template), PretrainedTokenizer(tokens)
        network = Network(
            llava, before=before(tokenizer, template), end=tokenizer.end, embedding=self.embedding
        )
        add_lora(network, self.rank)
        start_heads(network, rng.stream(seed, "heads"))

        def encode(corpus: Corpus) -> Generator[Progress, None, Tensor]:
            return self._encode(llava, pictures, corpus)

        return Opened(network, tokenizer, template, encode, {})

    def _load(self) -> tuple[Any, Any, Any]:
        """Model, tokenizer and picture processor."""
        try:
            from transformers import (
                AutoImageProcessor,
                AutoModelForImageTextToText,
                AutoTokenizer,
            )
        except ImportError as error:
            raise RequirementError(
                "model: checkpoint needs the package transformers, which is not installed; "
                "pip install 'bilevel[mllm]'"
            ) from error
        try:
            llava = AutoModelForImageTextToText.from_pretrained(
                self.path, attn_implementation=ATTENTION, dtype=torch.float32
            )
            parts = [
                kind.from_pretrained(self.path) for kind in (AutoTokenizer, AutoImageProcessor)
            ]
        except (OSError, ValueError) as error:
            raise RequirementError(
                f"problem.model.path = {self.path!r}: cannot be loaded ({_first_line(error)}); give "
                "a folder with config.json, weights, tokenizer and preprocessor_config.json (all "
                "that `save_pretrained` of the model and of its processor writes), or a hub id and "
                "a network"
            ) from error
        return llava, *parts

    def _encode(
        self, llava: Any, pictures: Any, corpus: Corpus
    ) -> Generator[Progress, None, Tensor]:
        """What the projector takes: the tower's states at the layer that the config names; cached."""

        def make() -> Generator[Progress, None, Tensors]:
            total, parts = len(corpus.images), []
            for start in range(0, total, self.batch):
                images = list(corpus.images[start : start + self.batch])
                pixels = pictures(images=images, return_tensors="pt")["pixel_values"]
                with torch.no_grad():
                    parts.append(vision_features(llava, pixels))
                yield Progress("picture features", min(start + self.batch, total), total)
            return {"features": torch.cat(parts)}

        key = {
            "version": VERSION,
            "tower": llava.model.vision_tower.state_dict(),
            "config": _selection(llava.config),
            "processor": pictures.to_json_string(),
            "images": corpus.images,
        }
        return (yield from cached("features", key, make))["features"]


def vision_features(llava: Any, pixels: Tensor) -> Tensor:
    """States of the vision tower as `LlavaModel.get_image_features` gives them to the projector."""
    layers, strategy = _selection(llava.config)
    tower = llava.model.vision_tower
    states = tower(pixels.to(tower.device, tower.dtype), output_hidden_states=True).hidden_states
    chosen = [states[layer] for layer in layers]
    # "default" leaves out the class token.
    return torch.cat([s[:, 1:] if strategy == "default" else s for s in chosen], dim=-1).cpu()


def _selection(config: Any) -> tuple[list[int], str]:
    layers = config.vision_feature_layer
    return [layers] if isinstance(layers, int) else list(layers), (
        config.vision_feature_select_strategy
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
