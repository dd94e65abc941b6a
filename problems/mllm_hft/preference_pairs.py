"""Pairs of captions for CHiP's losses (`preferences`): rows, batches, and a batch's loss.

Preferred is a picture's caption, rejected one of its hallucinated captions, both as answers to what
asks for a caption. The reference is the model as the run begins, the network's own parameters; what
it says of a batch is computed once, when the batch is drawn, and not at every use of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bilevel import tree
from bilevel.errors import ProblemError
from bilevel.types import Params

from .batches import drawn
from .micro_batches import in_chunks
from .models.instructions import Rows, conversations
from .models.network import Network, call, chunks
from .models.pictures import FEATURE, Pictures
from .models.template import Template
from .models.tokenizer import Tokenizer
from .preferences import (
    Preference,
    Response,
    changed_tokens,
    diffused,
    log_probabilities,
    sequence_kl,
)
from .sources.protocol import Kind, Scene

SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class CaptionPairs:
    """Every pair of a split: scene i and kind k stand in row i K + k of the rejected."""

    chosen: Rows
    rejected: Rows
    chosen_changed: Bool[Tensor, "pair token"]
    rejected_changed: Bool[Tensor, "pair token"]
    present: Bool[Tensor, "scene kind"]
    """Which pairs there are; where there is none, the caption stands on both sides."""

    def draw(self, size: int, stream: torch.Generator) -> tuple[Tensor, Tensor]:
        """Scenes and, for each, one of its kinds; different scenes where there are enough."""
        usable = self.present.any(1).nonzero()[:, 0]
        if not len(usable):
            raise ProblemError(
                "no training picture has both a caption and a hallucinated one, which a preference "
                "is about; give hallucinated captions, or use problem.contrast_loss=hacl"
            )
        scene = usable[drawn(len(usable), size, stream)]
        kind = torch.multinomial(self.present[scene].float(), 1, generator=stream)[:, 0]
        return scene, kind

    def take(self, scene: Int[Tensor, "batch"], kind: Int[Tensor, "batch"]) -> dict[str, Any]:
        """Both sides of some pairs, each cut to its longest row."""
        pair = scene * self.present.shape[1] + kind
        sides = {"chosen": self.chosen.take(scene), "rejected": self.rejected.take(pair)}
        for name, marks in (("chosen", self.chosen_changed), ("rejected", self.rejected_changed)):
            sides[name]["changed"] = marks[pair, : sides[name]["ids"].shape[1]]
        return sides


def caption_pairs(
    scenes: Sequence[Scene], kinds: Sequence[Kind], tokenizer: Tokenizer, template: Template
) -> CaptionPairs:
    """Rows of captions as answers, and which of their tokens differ."""
    said = [[(scene.instruction, scene.caption)] for scene in scenes]
    false = [
        [(scene.instruction, scene.hallucinated.get(kind, scene.caption))]
        for scene in scenes
        for kind in kinds
    ]
    chosen, rejected = (conversations(rows, tokenizer, template) for rows in (said, false))
    mine, theirs = marks = [
        torch.zeros(len(false), rows.ids.shape[1], dtype=torch.bool) for rows in (chosen, rejected)
    ]
    for pair in range(len(false)):
        places = chosen.counted[pair // len(kinds)], rejected.counted[pair]
        rows = chosen.ids[pair // len(kinds)], rejected.ids[pair]
        answers = (ids[place].tolist() for ids, place in zip(rows, places, strict=True))
        for mark, place, found in zip(marks, places, changed_tokens(*answers), strict=True):
            mark[pair, place] = torch.tensor(found, dtype=torch.bool)
    present = [[bool(s.caption) and kind in s.hallucinated for kind in kinds] for s in scenes]
    return CaptionPairs(chosen, rejected, mine, theirs, torch.tensor(present, dtype=torch.bool))


def spread(pictures: Pictures) -> Float[Tensor, "feature"]:
    """The standard deviation of each feature over all places of all pictures, read in parts."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for part in chunks(len(pictures), 64):
        places = pictures.features[part].flatten(0, 1).double()
        if pictures.layout is not None:
            places = places[pictures.layout[part].flatten() == FEATURE]
        count += len(places)
        total, squares = total + places.sum(0), squares + places.square().sum(0)
    mean = total / count
    variance = (squares - count * mean.square()) / (count - 1)
    return variance.clamp_min(0).sqrt().to(pictures.features)


def preference_batch(
    pairs: CaptionPairs,
    pictures: Pictures,
    noise_scale: Float[Tensor, "feature"],
    size: int,
    stream: torch.Generator,
) -> dict[str, Any]:
    """Pairs with their scenes and pictures, and a noisy version of each (`diffused`).

    Without a reference: see `with_reference`.
    """
    scene, kind = pairs.draw(size, stream)
    seen = pictures.take(scene)
    noise = torch.randn(seen["features"].shape, generator=stream)
    noisy = diffused(seen["features"], noise.to(seen["features"]), noise_scale)
    sides = pairs.take(scene, kind)
    return {**sides, "pictures": seen, "noisy": noisy, "kind": kind, "scene": scene}


def reference_shapes(batch: dict[str, Any], words: int, device: str) -> dict[str, Any]:
    """The batch with a reference of the right shapes that says nothing."""
    shapes = {side: batch[side]["places"].shape for side in SIDES}
    known = {side: torch.zeros(*shapes[side], words, device=device) for side in SIDES}
    noisy = torch.zeros(shapes["chosen"], device=device)
    return {**batch, "reference": {**known, "noisy": noisy}}


def with_reference(
    network: Network,
    batch: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    micro_batch: int | None = None,
) -> dict[str, Any]:
    """The batch with what the network's own parameters say of it: three forwards, no gradient.

    `micro_batch` pairs pass the model at a time, and only they are on the device.
    """
    parts = []
    for part in chunks(len(batch["kind"]), micro_batch or len(batch["kind"])):
        rows = tree.map_nested(lambda value, part=part: value[part], _rows(batch))
        with torch.no_grad():
            found = _logits(network, {}, tree.to(rows, device, dtype))
        noisy = log_probabilities(found["noisy"].cpu(), _said(rows["chosen"], "ids"))
        parts.append({**{side: found[side].cpu() for side in SIDES}, "noisy": noisy})
    known = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return {**batch, "reference": known}


def _rows(batch: dict[str, Any]) -> dict[str, Any]:
    """What of a batch has a row a pair, and passes the model."""
    row = ("ids", "mask", "prefix", "counted", "places")
    sides = {side: {name: batch[side][name] for name in row} for side in SIDES}
    return {**sides, "pictures": batch["pictures"], "noisy": batch["noisy"]}


def preference(
    network: Network, weights: Params, batch: dict[str, Any], micro_batch: int | None = None
) -> Preference:
    """Of a batch with a reference, under the network's parameters `weights`. Three forwards."""
    known = batch["reference"]
    trained, heads = network.heads_apart(weights)

    def told(weights: Params, rows: dict[str, Any]) -> tuple[Tensor, ...]:
        """Token by token log-probabilities of chosen, rejected and noisy, and both divergences."""
        logits = _logits(network, {**weights, **heads}, rows)
        policy = (
            log_probabilities(logits[name], _said(rows[side], "ids"))
            for name, side, _ in _forwards(rows)
        )
        kl = (
            sequence_kl(rows["reference"][side], logits[side], _said(rows[side], "counted"))
            for side in SIDES
        )
        return *policy, *kl

    rows = {**_rows(batch), "reference": {side: known[side] for side in SIDES}}
    found = in_chunks(told, trained, rows, micro_batch)

    def response(side: str, policy: Tensor, reference: Tensor) -> Response:
        marks = (_said(batch[side], name) for name in ("counted", "changed"))
        return Response(policy, reference, *marks)

    sides = {
        side: response(side, policy, log_probabilities(known[side], _said(batch[side], "ids")))
        for side, policy in zip(SIDES, found, strict=False)
    }
    noisy = response("chosen", found[2], known["noisy"])
    return Preference(sides["chosen"], sides["rejected"], noisy, *found[3:])


def _forwards(batch: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Tensor]]]:
    """(name, which response, of which pictures)."""
    seen = batch["pictures"]
    yield from ((side, side, seen) for side in SIDES)
    yield "noisy", "chosen", {**seen, "features": batch["noisy"]}


def _said(side: dict[str, Tensor], name: str) -> Tensor:
    """What `side` holds of the places of its response, where alone there are logits."""
    return side[name].gather(1, side["places"])


def _logits(network: Network, weights: Params, batch: dict[str, Any]) -> dict[str, Tensor]:
    found = {}
    for name, side, pictures in _forwards(batch):
        row = {key: batch[side][key] for key in ("ids", "mask", "prefix", "places")}
        found[name] = call(network, weights, "logits", **row, **pictures)
    return found
