"""A LLaVA of transformers seen from its features: projector, language model with LoRA, two heads.

LLaVA: Liu et al., 2023, arXiv:2304.08485; LoRA: Hu et al., 2021, arXiv:2106.09685. The vision
encoder is frozen, so pictures arrive as features computed once. Image and text embeddings are
concatenated here and given as `inputs_embeds`: the `masked_scatter` of transformers' own forward
has no forward-over-reverse derivative, and needs placeholder tokens for nothing. Attention is
"eager", because fused attention has no second derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from bilevel.errors import ProblemError
from bilevel.events import Progress
from bilevel.types import Params

from ..sources.protocol import Corpus, Encoder, Source
from .instructions import Template
from .tokenizer import Tokenizer

Group = Literal["lora", "projector", "heads"]

ATTENTION = "eager"
LORA_TARGETS = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
_MARKS: dict[Group, str] = {
    "lora": ".lora_",
    "projector": ".multi_modal_projector.",
    "heads": "_head.",
}


class Network(nn.Module):
    """Logits, embeddings and captions of a LLaVA whose pictures are already encoded.

    A sequence is [before][picture][ids]; `before` begins every sequence, with a picture or not.
    """

    before: Tensor

    def __init__(self, llava: Any, *, before: tuple[int, ...], end: int, embedding: int) -> None:
        super().__init__()
        self.llava = _checked(llava)
        hidden = llava.lm_head.in_features
        self.image_head = nn.Linear(hidden, embedding, bias=False)
        self.text_head = nn.Linear(hidden, embedding, bias=False)
        self.end = end
        self.register_buffer("before", torch.tensor(before, dtype=torch.long), persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, of: Literal["logits", "image", "text", "captions"], **inputs: Any) -> Tensor:
        """The method named `of`; one door, so that `functional_call` reaches every one."""
        return getattr(self, of)(**inputs)

    def logits(
        self,
        ids: Int[Tensor, "row token"],
        mask: Bool[Tensor, "row token"],
        features: Float[Tensor, "row patch feature"] | None = None,
    ) -> Float[Tensor, "row token word"]:
        """logits[:, j] predict ids[:, j] from all that stands before it."""
        states = self._states(ids, mask, features)
        return self.llava.lm_head(states[:, -ids.shape[1] - 1 : -1])

    def image(self, features: Float[Tensor, "row patch feature"]) -> Float[Tensor, "row embedding"]:
        """ê_v: the last-layer state at an end token put after the picture alone, through a head."""
        ids = self.before.new_full((len(features), 1), self.end)
        return self.image_head(self._states(ids, torch.ones_like(ids).bool(), features)[:, -1])

    def text(
        self, ids: Int[Tensor, "row token"], mask: Bool[Tensor, "row token"]
    ) -> Float[Tensor, "row embedding"]:
        """ê_t: the same for text alone; `ids` hold the end token as the last that `mask` counts.

        The place comes from the mask: `ids == end` also finds padding where pad and end agree.
        """
        states = self._states(ids, mask)
        last = len(self.before) + mask.sum(1) - 1
        return self.text_head(states[torch.arange(len(ids), device=ids.device), last])

    def captions(
        self,
        features: Float[Tensor, "row patch feature"],
        ids: Int[Tensor, "token"],
        length: int,
    ) -> Int[Tensor, "row length"]:
        """Greedy continuation of [before][picture][ids], at most `length` tokens, end-padded."""
        rows = ids.expand(len(features), -1)
        embeddings, cache = self._embed(rows, features), None
        tokens: list[Tensor] = []
        ended = torch.zeros(len(features), dtype=torch.bool, device=features.device)
        while len(tokens) < length and not ended.all():
            out = self.llava.model.language_model(
                inputs_embeds=embeddings, past_key_values=cache, use_cache=True
            )
            cache = out.past_key_values
            token = self.llava.lm_head(out.last_hidden_state[:, -1]).argmax(-1)
            tokens.append(token.masked_fill(ended, self.end))
            ended = ended | (token == self.end)
            embeddings = self._words(tokens[-1][:, None])
        return torch.stack(tokens, dim=1)

    def _states(self, ids: Tensor, mask: Tensor, features: Tensor | None = None) -> Tensor:
        embeddings = self._embed(ids, features)
        before = mask.new_ones(len(ids), embeddings.shape[1] - ids.shape[1])
        return self.llava.model.language_model(
            inputs_embeds=embeddings,
            attention_mask=torch.cat([before, mask], dim=1).long(),
            use_cache=False,
        ).last_hidden_state

    def _embed(self, ids: Tensor, features: Tensor | None) -> Tensor:
        parts = [self._words(self.before.expand(len(ids), -1))]
        if features is not None:
            parts.append(self.llava.model.multi_modal_projector(features))
        return torch.cat([*parts, self._words(ids)], dim=1)

    def _words(self, ids: Tensor) -> Tensor:
        return self.llava.model.language_model.get_input_embeddings()(ids)


def call(network: Network, parameters: Params, of: str, **inputs: Any) -> Tensor:
    """`network.<of>(**inputs)` with `parameters` in the place of its own: pure in them."""
    return functional_call(network, parameters, (of,), inputs)


def parameters(network: Network, group: Group) -> Params:
    """The network's own parameters of a group, by in-memory name; they share its memory."""
    mark = _MARKS[group]
    found = {n: p.detach() for n, p in network.named_parameters() if mark in n}
    return {n: p for n, p in found.items() if group != "heads" or not n.startswith("llava.")}


def add_lora(network: Network, rank: int) -> None:
    """Put LoRA on every linear map of the language model's layers, through peft; no dropout.

    Names gain `base_layer` and `lora_A.default`, `lora_B.default`; the function stays the same,
    because B starts at 0.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=LORA_TARGETS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # peft draws A from the global generator; `start_lora` draws it anew
        inject_adapter_in_model(config, network.llava)
    network.requires_grad_(False).eval()


def start_lora(network: Network, generator: torch.Generator) -> Params:
    """LoRA to start from: A normal with variance 1 / inputs, B = 0."""
    return {
        name: torch.randn(value.shape, generator=generator) / value.shape[1] ** 0.5
        if ".lora_A." in name
        else torch.zeros(value.shape)
        for name, value in parameters(network, "lora").items()
    }


def start_heads(network: Network, generator: torch.Generator) -> None:
    """Set both heads to the same orthonormal rows: at first cosines are those of the states.

    Exactly so where embedding = hidden; a random projection of them where it is smaller.
    """
    rows = torch.empty(network.image_head.weight.shape)
    nn.init.orthogonal_(rows, generator=generator)
    for head in (network.image_head, network.text_head):
        head.weight.copy_(rows)


@dataclass(frozen=True)
class Opened:
    """A backbone ready for use: frozen network, LoRA in place, and how text and pictures enter it."""

    network: Network
    tokenizer: Tokenizer
    template: Template
    encode: Callable[[Corpus], Generator[Progress, None, Tensor]]
    """Features per picture, what the network's projector takes."""
    facts: Mapping[str, float]
    """What was measured on the way, shown with every evaluation."""


@runtime_checkable
class Backbone(Protocol):
    """Where the model comes from: a component, so nothing is kept in it between calls."""

    def open(
        self, source: Source, encoder: Encoder | None, seed: int
    ) -> Generator[Progress, None, Opened]:
        """Make or load the model, yielding progress; `encoder` None is the backbone's choice."""
        ...


def _checked(llava: Any) -> Any:
    for path in ("model.multi_modal_projector", "model.language_model", "lm_head"):
        if not _reaches(llava, path.split(".")):
            raise ProblemError(
                f"{type(llava).__name__} has no `{path}`; expected a model of the LLaVA family, "
                "such as LlavaForConditionalGeneration"
            )
    return llava


def _reaches(value: Any, names: Sequence[str]) -> bool:
    for name in names:
        value = getattr(value, name, None)
    return value is not None


def chunks(size: int, chunk: int) -> Iterator[slice]:
    """Consecutive slices that cover range(size)."""
    return (slice(i, i + chunk) for i in range(0, size, chunk))
