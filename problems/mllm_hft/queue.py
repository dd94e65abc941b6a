"""More negatives than a batch holds: HACL's queue (arXiv:2312.06968), as a pure function of a batch.

The released code keeps the embeddings of the last 2,048 to 30,720 pictures and captions as constants.
Each is of the parameters at the step that made it, so that its loss depends on the run so far, and a
lower loss here may not. It differs in that

1. what is kept are the states of the model *as it starts*, before the heads, which are as they are at
   the present parameters: constants in projector and LoRA, differentiated in the heads;
2. the pictures are drawn beside those of the batch, and not the last ones seen: with constants of one
   model nothing tells them apart, and a batch depends on the stream alone.

States grow stale as projector and LoRA move; that bounds how long a run with a queue is a good
approximation of one with a larger batch, which it equals at the start.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from bilevel import tree

from .evaluation.evaluation_split import Captions
from .models.network import Network, chunks
from .models.pictures import Pictures


class StartStates:
    """States of a split's pictures and true captions, made without a gradient when first asked for.

    One forward for each picture and for each caption in a run; 2 × hidden numbers a picture on the
    CPU. The network's own parameters are those of the start, and never move.
    """

    def __init__(
        self,
        network: Network,
        pictures: Pictures,
        captions: Captions,
        device: torch.device,
        dtype: torch.dtype,
        chunk: int,
    ) -> None:
        self._network, self._pictures, self._captions = network, pictures, captions
        self._device, self._dtype, self._chunk = device, dtype, chunk
        size = len(pictures), network.image_head.in_features
        kind = network.image_head.weight.dtype
        self._image, self._text = torch.empty(size, dtype=kind), torch.empty(size, dtype=kind)
        self._is_made = torch.zeros(size[0], dtype=torch.bool)

    def of(self, index: Int[Tensor, "queued"]) -> dict[str, Tensor]:
        """The states of some scenes, as "image" and "text"."""
        missing = index[~self._is_made[index]]
        for part in chunks(len(missing), self._chunk):
            self._make(missing[part])
        return {"image": self._image[index], "text": self._text[index]}

    @torch.no_grad()
    def _make(self, index: Int[Tensor, "scene"]) -> None:
        pictures, lines = self._pictures.take(index), self._captions.take(index)
        true = {"ids": lines["ids"][:, 0], "mask": lines["mask"][:, 0]}
        image = self._network.image_states(**tree.to(pictures, self._device, self._dtype))
        text = self._network.text_states(**tree.to(true, self._device, self._dtype))
        self._image[index], self._text[index] = image.cpu(), text.cpu()
        self._is_made[index] = True
