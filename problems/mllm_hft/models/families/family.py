"""What a family of models has to say before pictures can enter its language model.

A picture passes the vision tower once; what the projector then takes is kept, and the projector
itself, whose parameters are variables, is applied at every step. This works where the last part of
the projector maps each place alone, which is so in all the families here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..pictures import Picture
from ..tokenizer import Tokenizer


class Arrange(Protocol):
    """What the projector took for a batch of pictures, cut into a block for each of them."""

    def __call__(
        self, mllm: Any, taken: Tensor, inputs: Mapping[str, Any], tokenizer: Tokenizer
    ) -> Sequence[Picture]: ...


def causal(
    mllm: Any, embeddings: Tensor, mask: Bool[Tensor, "row place"], prefix: Tensor | None
) -> Any:
    """Each place sees what stands before it."""
    return mask.long()


def counted(
    mask: Bool[Tensor, "row place"], picture: slice, grid: Int[Tensor, "row place 3"] | None
) -> Int[Tensor, "row place"]:
    """Places that are not padding, numbered from 0."""
    return mask.long().cumsum(1).sub(1).clamp_min(0)


def linear_head(mllm: Any, states: Tensor) -> Tensor:
    """Logits."""
    return mllm.lm_head(states)


def pointwise(projector: Any, features: Tensor) -> Tensor:
    """A projector that is one map of each place."""
    return projector(features)


@dataclass(frozen=True)
class Family:
    """Where the parts of a model are, and what is its own about pictures, order and attention."""

    language: str
    """Path of the decoder that takes `inputs_embeds`."""
    projector: str
    """Path of the module whose parameters are those of the projector."""
    arrange: Arrange
    last: str = ""
    """The part of the projector that maps each place alone, as a path below it; "": all of it."""
    project: Callable[[Any, Float[Tensor, "row place feature"]], Tensor] = pointwise
    positions: Callable[[Tensor, slice, Tensor | None], Tensor] = counted
    """Position ids, from the mask, where the picture is in it, and its grid."""
    attention: Callable[[Any, Tensor, Tensor, Tensor | None], Any] = causal
    """The decoder's `attention_mask`; the last argument marks what is seen both ways."""
    head: Callable[[Any, Tensor], Tensor] = linear_head
    template: str | None = None
    """The template of a family whose processor writes one without a chat template."""
    options: Mapping[str, Any] | None = None
    """What the picture processor is called with."""
    nested: bool = False
    """Whether the picture processor takes a list of pictures for each text."""

    @property
    def mapped(self) -> str:
        """Path of what maps each place alone."""
        return f"{self.projector}.{self.last}" if self.last else self.projector

    def encode(
        self, mllm: Any, processor: Any, tokenizer: Tokenizer, images: Sequence[Tensor]
    ) -> list[Picture]:
        """Blocks of pictures, through the model's own `get_image_features`.

        What its projector takes on the way is caught, and put in order by `arrange`.
        """
        given = [[image] for image in images] if self.nested else list(images)
        inputs = processor(images=given, return_tensors="pt", **(self.options or {}))
        caught: list[Tensor] = []
        module = mllm.get_submodule(self.mapped)
        hook = module.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
        known = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        try:
            with torch.no_grad():
                mllm.get_image_features(**_placed(known, mllm))
        finally:
            hook.remove()
        (taken,) = caught
        return [_on_cpu(p) for p in self.arrange(mllm, taken, inputs, tokenizer)]


def _placed(inputs: Mapping[str, Tensor], mllm: Any) -> dict[str, Tensor]:
    """Where the model is, pixels in its precision."""
    return {
        name: value.to(mllm.device, mllm.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }


def _on_cpu(picture: Picture) -> Picture:
    parts = (picture.features, picture.layout, picture.grid)
    features, layout, grid = (None if part is None else part.cpu() for part in parts)
    assert features is not None
    return Picture(features, layout, grid)
