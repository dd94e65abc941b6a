"""A multimodal model seen from its encoded pictures: projector, language model with LoRA, two heads.

LLaVA: Liu et al., 2023, arXiv:2304.08485; LoRA: Hu et al., 2021, arXiv:2106.09685. The vision
encoder is frozen, so pictures arrive as features computed once. Image and text embeddings are
concatenated here and given as `inputs_embeds`: the `masked_scatter` of transformers' own forward
has no forward-over-reverse derivative, and needs placeholder tokens for nothing. Attention is
"eager", because fused attention has no second derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bilevel.events import Progress
from bilevel.problem.from_modules import Bound
from bilevel.types import Params

from ..sources.protocol import CPU, Corpus, Encoder, Source
from .families import family_of
from .pictures import FEATURE, NEWLINE, PADDING, Pictures
from .template import Template
from .tokenizer import Tokenizer

Group = Literal["lora", "projector", "heads"]
Heads = Literal["orthonormal", "hacl"]
TextHead = Literal["linear", "residual"]

ATTENTION = "eager"
HEADS = ("image_head.", "text_head.")
HALF = (torch.bfloat16, torch.float16)


class Network(nn.Module):
    """Logits, embeddings and captions of a multimodal model whose pictures are already encoded.

    A sequence is [before][picture][ids]; `before` begins every sequence, with a picture or not.
    `layout` and `grid` are those of `Pictures`, `prefix` that of `Rows`.
    """

    before: Tensor

    def __init__(
        self,
        mllm: Any,
        *,
        before: tuple[int, ...],
        end: int,
        embedding: int,
        ends: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.family = family_of(getattr(getattr(mllm, "config", None), "model_type", "none"))
        self.mllm = mllm
        hidden = mllm.lm_head.in_features
        self.image_head = nn.Linear(hidden, embedding, bias=False)
        self.text_head = nn.Linear(hidden, embedding, bias=False)
        self.end, self.ends = end, ends or (end,)
        self.adapter: Any = None
        """peft's config of the LoRA that is in place."""
        self.continued = False
        self.register_buffer("before", torch.tensor(before, dtype=torch.long), persistent=False)
        self.requires_grad_(False).eval()

    @property
    def projector(self) -> nn.Module:
        """What maps a picture's features into the language model."""
        return self.mllm.get_submodule(self.family.projector)

    @property
    def language(self) -> nn.Module:
        """The decoder."""
        return self.mllm.get_submodule(self.family.language)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.before.device

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move to a device, in `precisions`."""
        precisions = self.precisions(dtype)
        for name, value in self.named_parameters():
            value.data = value.data.to(device, precisions[name])
        for value in self.buffers():
            value.data = value.data.to(device)

    def precisions(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """Of each parameter: trained parts in `dtype`, and the frozen rest too unless it is half.

        Weights that came in bfloat16 or float16 stay so: what is trained through them is not.
        """
        trained = {n for g in ("lora", "projector", "heads") for n in parameters(self, g)}
        return {
            name: value.dtype if value.dtype in HALF and name not in trained else dtype
            for name, value in self.named_parameters()
        }

    def decoding_bytes(self, tokens: int) -> tuple[int, int]:
        """(KV cache, attention of one layer) of a sequence of so many tokens.

        The cache holds a key and a value of each token a layer; eager attention, scores, their
        softmax in float32, and both in the model's precision.
        """
        config: Any = self.language.config
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        kept = getattr(config, "num_key_value_heads", None) or heads
        each = self._words(self.before[:0]).element_size()
        cache = 2 * config.num_hidden_layers * kept * width * tokens * each
        return cache, heads * tokens**2 * (4 + 2 * each)

    def heads_apart(self, weights: Params) -> tuple[Params, Params]:
        """(what states and logits depend on, the heads as constants, whose precision they take)."""
        heads = {n: v.detach() for n, v in weights.items() if n.startswith(HEADS)}
        return {n: v for n, v in weights.items() if n not in heads}, heads

    def without_projector(self, weights: Params) -> Params:
        """What states of text depend on."""
        start = f"mllm.{self.family.projector}."
        return {n: v for n, v in weights.items() if not n.startswith(start)}

    def forward(self, of: str, **inputs: Any) -> Tensor:
        """The method or head named `of`; one door, so that every call takes other parameters."""
        return getattr(self, of)(**inputs)

    def logits(
        self,
        ids: Int[Tensor, "row token"],
        mask: Bool[Tensor, "row token"],
        features: Float[Tensor, "row place feature"] | None = None,
        layout: Int[Tensor, "row place"] | None = None,
        grid: Int[Tensor, "row place 3"] | None = None,
        prefix: Int[Tensor, "row"] | None = None,
        places: Int[Tensor, "row answer"] | None = None,
    ) -> Float[Tensor, "row token word"]:
        """logits[:, j] predict ids[:, j] from all that stands before it.

        With `places`, logits[i, j] predict ids[i, places[i, j]] and there are no others: the output
        layer, which costs hidden × words multiplications a place, is evaluated at these alone.
        """
        sequence = self._sequence(ids, mask, features, layout, grid, prefix)
        states = self._states(sequence)
        front = states.shape[1] - ids.shape[1]
        if places is None:
            places = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
        # What precedes ids[:, 0] is the last place of the picture, not the padding behind it.
        count = sequence.mask[:, :front].sum(1, keepdim=True)
        before = torch.where(places == 0, count, front + places) - 1
        states = states.gather(1, before[..., None].expand(-1, -1, states.shape[2]))
        logits = self.family.head(self.mllm, states)
        return logits.to(self.image_head.weight.dtype)

    def image(
        self,
        features: Float[Tensor, "row place feature"],
        layout: Int[Tensor, "row place"] | None = None,
        grid: Int[Tensor, "row place 3"] | None = None,
    ) -> Float[Tensor, "row embedding"]:
        """ê_v: the last-layer state at an end token put after the picture alone, through a head."""
        return self.image_head(self.image_states(features, layout, grid))

    def image_states(
        self,
        features: Float[Tensor, "row place feature"],
        layout: Int[Tensor, "row place"] | None = None,
        grid: Int[Tensor, "row place 3"] | None = None,
    ) -> Float[Tensor, "row hidden"]:
        """What `image` puts through its head."""
        ids = self.before.new_full((len(features), 1), self.end)
        sequence = self._sequence(ids, torch.ones_like(ids).bool(), features, layout, grid)
        return self._states(sequence)[:, -1].to(self.image_head.weight.dtype)

    def text(
        self, ids: Int[Tensor, "row token"], mask: Bool[Tensor, "row token"]
    ) -> Float[Tensor, "row embedding"]:
        """ê_t: the same for text alone; `ids` hold the end token as the last that `mask` counts.

        The place comes from the mask: `ids == end` also finds padding where pad and end agree.
        """
        return self.text_head(self.text_states(ids, mask))

    def text_states(
        self, ids: Int[Tensor, "row token"], mask: Bool[Tensor, "row token"]
    ) -> Float[Tensor, "row hidden"]:
        """What `text` puts through its head."""
        states = self._states(self._sequence(ids, mask))
        last = len(self.before) + mask.sum(1) - 1
        states = states[torch.arange(len(ids), device=ids.device), last]
        return states.to(self.text_head.weight.dtype)

    def captions(
        self,
        features: Float[Tensor, "row place feature"],
        ids: Int[Tensor, "token"],
        length: int,
        layout: Int[Tensor, "row place"] | None = None,
        grid: Int[Tensor, "row place 3"] | None = None,
    ) -> Int[Tensor, "row length"]:
        """Greedy continuation of [before][picture][ids], at most `length` tokens.

        A row is over at any of `ends` and filled with `end` behind it; one without an end token
        was cut.
        """
        rows = ids.expand(len(features), -1)
        prefix = torch.full((len(rows),), len(ids), device=ids.device)
        sequence = self._sequence(
            rows, torch.ones_like(rows).bool(), features, layout, grid, prefix
        )
        mask, place = sequence.mask, sequence.positions[..., -1:]
        ends = torch.tensor(self.ends, device=features.device)
        ended = torch.zeros(len(features), dtype=torch.bool, device=features.device)
        tokens: list[Tensor] = []
        out = self._decode(sequence, use_cache=True)
        while True:
            token = self.family.head(self.mllm, out.last_hidden_state[:, -1]).argmax(-1)
            tokens.append(token.masked_fill(ended, self.end))
            ended = ended | torch.isin(token, ends)
            if len(tokens) == length or ended.all():
                return torch.stack(tokens, dim=1)
            mask, place = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1), place + 1
            out = self.language(
                inputs_embeds=self._words(tokens[-1][:, None]),
                attention_mask=mask.long(),
                position_ids=place,
                past_key_values=out.past_key_values,
                use_cache=True,
            )

    def _states(self, sequence: _Sequence) -> Tensor:
        return self._decode(sequence, use_cache=False).last_hidden_state

    def _decode(self, sequence: _Sequence, *, use_cache: bool) -> Any:
        embeddings, mask = sequence.embeddings, sequence.mask
        return self.language(
            inputs_embeds=embeddings,
            attention_mask=self.family.attention(self.mllm, embeddings, mask, sequence.prefix),
            position_ids=sequence.positions,
            use_cache=use_cache,
        )

    def _sequence(
        self,
        ids: Tensor,
        mask: Tensor,
        features: Tensor | None = None,
        layout: Tensor | None = None,
        grid: Tensor | None = None,
        prefix: Tensor | None = None,
    ) -> _Sequence:
        front, rows = len(self.before), len(ids)
        embeddings = [self._words(self.before.expand(rows, -1)), self._words(ids)]
        masks = [mask.new_ones(rows, front), mask]
        width = 0
        if features is not None:
            embeddings.insert(1, self._picture(features, layout))
            width = features.shape[1]
            masks.insert(1, mask.new_ones(rows, width) if layout is None else layout != PADDING)
        whole, end = torch.cat(masks, dim=1), front + width
        both_ways = None
        if features is not None:
            seen = end if prefix is None else (end + prefix)[:, None]
            both_ways = whole & (torch.arange(whole.shape[1], device=whole.device) < seen)
        positions = self.family.positions(whole, slice(front, end), grid)
        return _Sequence(torch.cat(embeddings, dim=1), whole, positions, both_ways)

    def _picture(self, features: Tensor, layout: Tensor | None) -> Tensor:
        """Embeddings of a picture's block: projected features, tokens and newlines in between."""
        words = self._words(self.before[:0])
        dtype = next(self.projector.parameters()).dtype
        seen = self.family.project(self.projector, features.to(dtype)).to(words.dtype)
        if layout is None:
            return seen
        others = self._words(layout.clamp_min(0))
        seen = torch.where((layout == FEATURE)[..., None], seen, others)
        if (newline := getattr(self.mllm.model, "image_newline", None)) is not None:
            seen = torch.where((layout == NEWLINE)[..., None], newline.to(words.dtype), seen)
        return seen

    def _words(self, ids: Tensor) -> Tensor:
        return self.mllm.get_input_embeddings()(ids)


@dataclass(frozen=True)
class _Sequence:
    """What the decoder reads: `prefix` marks what is seen both ways where a family does so."""

    embeddings: Float[Tensor, "row place hidden"]
    mask: Bool[Tensor, "row place"]
    positions: Int[Tensor, "*axis row place"]
    prefix: Bool[Tensor, "row place"] | None


def call(network: Network, parameters: Params, of: str, **inputs: Any) -> Tensor:
    """`network.<of>(**inputs)` with `parameters` in the place of its own: pure in them.

    Not by `torch.func.functional_call`, after which a part that stands under two names, as tied
    embeddings in some families do, holds plain tensors.
    """
    return Bound(network, parameters)(of, **inputs)


def parameters(network: Network, group: Group) -> Params:
    """The network's own parameters of a group, by in-memory name; they share its memory."""
    projector = f"mllm.{network.family.projector}."
    is_in: dict[Group, Callable[[str], bool]] = {
        "lora": lambda name: ".lora_" in name,
        "projector": lambda name: name.startswith(projector),
        "heads": lambda name: name.startswith(HEADS),
    }
    return {n: p.detach() for n, p in network.named_parameters() if is_in[group](n)}


def start_heads(network: Network, generator: torch.Generator) -> None:
    """Set both heads to the same orthonormal rows: at first cosines are those of the states.

    Exactly so where embedding = hidden; a random projection of them where it is smaller.
    """
    rows = torch.empty(network.image_head.weight.shape)
    nn.init.orthogonal_(rows, generator=generator)
    for head in (network.image_head, network.text_head):
        head.weight.copy_(rows)


def hacl_heads(network: Network, generator: torch.Generator) -> None:
    """Put HACL's heads in the place of those that are there, as its released code draws them.

    arXiv:2312.06968: two linear maps h → h/4 with bias, one for pictures and one for text, drawn
    apart and uniformly in ±1/√h. At first cosines are those of unrelated random projections.
    """
    hidden = network.image_head.in_features
    bound, like = hidden**-0.5, network.image_head.weight
    for name in ("image_head", "text_head"):
        head = nn.utils.skip_init(nn.Linear, hidden, hidden // 4, device=like.device)
        for value in head.parameters():
            drawn = torch.empty(value.shape).uniform_(-bound, bound, generator=generator)
            value.data = drawn.to(like)
        setattr(network, name, head.requires_grad_(False))


class ResidualHead(nn.Linear):
    """W (h + B gelu(A h)) + b: a linear head after a residual network as wide as its states."""

    def __init__(self, head: nn.Linear) -> None:
        hidden, size, has_bias = head.in_features, head.out_features, head.bias is not None
        super().__init__(
            hidden, size, bias=has_bias, device="meta"
        )  # draws no global random number
        self.weight, self.bias = head.weight, head.bias
        device, dtype = head.weight.device, head.weight.dtype
        inner = nn.Linear(hidden, hidden, device="meta", dtype=dtype)
        outer = nn.Linear(hidden, hidden, bias=False, device="meta", dtype=dtype)
        self.inner, self.outer = (made.to_empty(device=device) for made in (inner, outer))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input + self.outer(nn.functional.gelu(self.inner(input))))


def residual_head(network: Network, generator: torch.Generator) -> None:
    """Put a `ResidualHead` in the place of the text head: the same function, as B is 0 at first.

    A and its bias are drawn uniformly in ±1/√h.
    """
    head = ResidualHead(network.text_head)
    with torch.no_grad():
        for value in head.inner.parameters():
            bound = head.in_features**-0.5
            value.copy_(torch.empty(value.shape).uniform_(-bound, bound, generator=generator))
        head.outer.weight.zero_()
    network.text_head = head.requires_grad_(False)


@dataclass(frozen=True)
class LoadedModel:
    """A backbone ready for use: frozen network, LoRA in place, and how text and pictures enter it."""

    network: Network
    tokenizer: Tokenizer
    template: Template
    encode: Callable[[Corpus], Generator[Progress, None, Pictures]]
    """Pictures as the network's projector takes them."""
    companions: Callable[[Path], None]
    """Writes tokenizer and processor into a folder."""
    base: str | None
    """Where the frozen weights are, None where they are in no folder."""
    facts: Mapping[str, float]
    """What was measured on the way, shown with every evaluation."""


@runtime_checkable
class Backbone(Protocol):
    """Where the model comes from: a component, so nothing is kept in it between calls."""

    def open(
        self, source: Source, encoder: Encoder | None, seed: int, device: torch.device = CPU
    ) -> Generator[Progress, None, LoadedModel]:
        """Make or load the model, yielding progress; `encoder` None is the backbone's choice.

        It is trained on `device` where it is trained here, encodes pictures there, and stays there.
        """
        ...


def chunks(size: int, chunk: int) -> Iterator[slice]:
    """Consecutive slices that cover range(size)."""
    return (slice(i, i + chunk) for i in range(0, size, chunk))
