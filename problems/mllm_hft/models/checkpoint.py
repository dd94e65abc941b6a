"""A real multimodal model from a local folder or the hub, through transformers' own classes."""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Literal

import torch
from pydantic import PositiveInt

from bilevel import rng
from bilevel.components import PathName, component
from bilevel.errors import ProblemError
from bilevel.events import Progress

from ..memory import nbytes
from ..sources.protocol import CPU, Corpus, Encoder, Source
from .adapters import Adapter, adapted, add_lora
from .features import encoded
from .instructions import before
from .loading import Folder, read
from .network import LoadedModel, Network, start_heads
from .pictures import Picture, Pictures

VERSION = 2
"""Raised when code changes what the features of a checkpoint are."""


@component
class Checkpoint:
    """A trained model of a known family, which sees with its own vision tower. A `Backbone`.

    llava, llava_next, qwen2_vl, qwen2_5_vl, paligemma, idefics3, smolvlm. What its folder says is
    honoured: chat template and white space, end tokens, the precision of its weights, an adapter.
    What it lacks is refused. The language model is not trained on text here: it comes trained.
    """

    path: PathName
    """A folder written by `save_pretrained`, or an id of the Hugging Face hub."""
    template: str | None = None
    """How a turn is written, such as "USER: <image>\\n{prompt} ASSISTANT:"; None: the folder's own
    chat template."""
    adapter: Adapter = "merge"
    """What becomes of LoRA that the folder holds: merged, with new LoRA on top, or continued."""
    weights: Literal["folder", "float32"] = "folder"
    """Precision of the frozen weights: bfloat16 and float16 are kept, or widened."""
    rank: PositiveInt = 8
    """Rank of LoRA, unless an adapter is continued."""
    embedding: PositiveInt = 256
    """Width of the heads' embeddings."""
    batch: PositiveInt = 16
    """Pictures the vision tower encodes at once, at most: fewer where memory has no room for them."""

    def open(
        self, source: Source, encoder: Encoder | None, seed: int, device: torch.device = CPU
    ) -> Generator[Progress, None, LoadedModel]:
        if encoder is not None:
            raise ProblemError(
                f"encoder = {type(encoder).__name__} with model checkpoint: a checkpoint sees with "
                "its own vision tower; remove problem.encoder"
            )
        yield Progress("model", 0, None, self.path)
        dtype = "auto" if self.weights == "folder" else torch.float32
        path = os.path.expanduser(self.path)
        found = read(path, template=self.template, adapter=self.adapter, dtype=dtype)
        tokenizer = found.tokenizer
        network = Network(
            found.mllm,
            before=before(tokenizer, found.template),
            end=tokenizer.end,
            ends=tokenizer.ends,
            embedding=self.embedding,
        ).to(device)
        covered = self._lora(network, found)
        start_heads(network, rng.stream(seed, "heads"))
        for note in (covered, *found.notes):
            yield Progress("model", 1, 1, note)

        def encode(corpus: Corpus) -> Generator[Progress, None, Pictures]:
            return self._encode(found, network, corpus, device)

        return LoadedModel(
            network, tokenizer, found.template, encode, found.companions, found.base, facts={}
        )

    def _lora(self, network: Network, found: Folder) -> str:
        if found.adapter is None:
            return str(add_lora(network, self.rank))
        network.continued, network.adapter = True, found.adapter
        return f"{adapted(network)}, continued from the folder"

    def _encode(
        self, found: Folder, network: Network, corpus: Corpus, device: torch.device
    ) -> Generator[Progress, None, Pictures]:
        """Blocks of pictures; cached."""

        def encode(part: slice) -> list[Picture]:
            images = list(corpus.images[part])
            return found.family.encode(found.mllm, found.processor, found.tokenizer, images)

        apart = (f"{found.family.language}.", f"{found.family.projector}.", "lm_head.")
        key = {
            "version": VERSION,
            "tower": {n: p for n, p in found.mllm.state_dict().items() if not n.startswith(apart)},
            "config": found.mllm.config.to_json_string(),
            "processor": found.processor.to_json_string(),
            "images": corpus.images,
        }
        held = nbytes(network.parameters())
        total = len(corpus.images)
        blocks = encoded(key, total, encode, most=self.batch, held=held, device=device)
        return (yield from blocks)
