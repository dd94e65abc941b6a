"""Which variable stands at which level, and what each level minimises: one row a formulation.

L_T is the task loss and L_C the contrastive loss (`losses`); F is always L_T on upper data. With
`contrast_loss: chip` L_C is a preference loss (`preferences`), and heads and log τ are no variables.

two_variable  x = LoRA, log τ, kind scores     y = projector, heads
              G = L_C + μ/2 ‖α − α_ref‖², α the projector
proximal      x = LoRA, log τ, kind scores, α_0  y = projector, heads
              G = L_C + μ/2 ‖α − α_0‖², the anchor α_0 begins at α_ref
weighted      x = log λ, log τ, kind scores,   y = projector, heads, LoRA
                  source scores
              G = Σ_s (w_s L_T,s(training data) + λ w_s L_C,s), sources s of weight w_s
task_weighted x = source scores                y = projector, LoRA
              G = Σ_s w_s L_T,s(training data)
task_only     x = nothing                      y = projector, LoRA
              G = L_T(training data)
joint         x = nothing                      y = projector, heads, LoRA, log τ
              G = L_T(training data) + λ L_C with λ fixed: HACL, arXiv:2312.06968
simple        x = nothing                      y = projector, heads, LoRA, at both levels
              G = L_C: min F over argmin G, by an estimator that moves y itself
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from bilevel.types import Params

from .losses import (
    LOG_TAU_RANGE,
    TAU_START,
    Queue,
    answer_losses,
    contrastive_loss,
    log_weights_of,
    mean_of_answers,
    row_weights,
    temperature,
)
from .micro_batches import in_chunks
from .models.network import Group, Network, call
from .preference_pairs import preference
from .preferences import chip, chip_released

Formulation = Literal[
    "weighted", "two_variable", "proximal", "task_weighted", "task_only", "joint", "simple"
]
ContrastLoss = Literal["hacl", "chip", "chip_released"]
Scalars = Literal["log_tau", "kind_scores", "log_lambda", "source_scores"]
Part = Group | Scalars | Literal["anchor"]
ANCHOR = "anchor."
"""Begins the name of what a parameter of the projector is held to, where that is a variable."""
Learned = Literal["lambda", "tau", "kinds", "sources"]
"""Scalars that may be upper variables, as a recipe names them."""
SCALARS: dict[Learned, Scalars] = {
    "lambda": "log_lambda",
    "tau": "log_tau",
    "kinds": "kind_scores",
    "sources": "source_scores",
}

LOG_LAMBDA_RANGE = (math.log(1e-3), math.log(10.0))
MOST = {"kind_scores": 10.0, "source_scores": 100.0}
"""No kind weighs more than ten times another, and no source more than a hundred times."""
RANGES = {"log_tau", "log_lambda", *MOST}
"""Scalars that `project` holds in a range."""


@dataclass(frozen=True)
class Form:
    """Where the parts stand and which terms the lower loss has."""

    upper: tuple[Part, ...]
    lower: tuple[Part, ...]
    task: bool
    contrast: bool
    anchored: bool = False
    loss: ContrastLoss = "hacl"
    """What L_C is."""

    def with_loss(self, loss: ContrastLoss) -> Form:
        """With another L_C: a preference is of captions alone, and has neither heads nor τ."""
        if loss == "hacl" or not self.contrast:
            return self
        upper, lower = (
            tuple(part for part in parts if part not in ("heads", "log_tau"))
            for parts in (self.upper, self.lower)
        )
        return replace(self, upper=upper, lower=lower, loss=loss)


FORMS: dict[Formulation, Form] = {
    "two_variable": Form(
        upper=("lora", "log_tau", "kind_scores"),
        lower=("projector", "heads"),
        task=False,
        contrast=True,
        anchored=True,
    ),
    "proximal": Form(
        upper=("lora", "log_tau", "kind_scores", "anchor"),
        lower=("projector", "heads"),
        task=False,
        contrast=True,
        anchored=True,
    ),
    "weighted": Form(
        upper=("log_lambda", "log_tau", "kind_scores", "source_scores"),
        lower=("projector", "heads", "lora"),
        task=True,
        contrast=True,
    ),
    "task_weighted": Form(
        upper=("source_scores",), lower=("projector", "lora"), task=True, contrast=False
    ),
    "task_only": Form(upper=(), lower=("projector", "lora"), task=True, contrast=False),
    "joint": Form(
        upper=(), lower=("projector", "heads", "lora", "log_tau"), task=True, contrast=True
    ),
    "simple": Form(upper=(), lower=("projector", "heads", "lora"), task=False, contrast=True),
}


def start_scalars(strength: float, kinds: int, sources: Sequence[float]) -> dict[Scalars, Tensor]:
    """log τ = log 0.07, all kinds alike, λ and the weights of sources as given; one has no scores."""
    found: dict[Scalars, Tensor] = {
        "log_tau": torch.tensor(math.log(TAU_START)),
        "kind_scores": torch.zeros(kinds),
        "log_lambda": torch.tensor(math.log(strength)),
    }
    if len(sources) > 1:
        scores = torch.tensor(sources).log()
        found["source_scores"] = scores - scores.mean()
    return found


def project(parameters: Params) -> Params:
    """Scalars held in their ranges; scores centred first, as only differences matter."""
    out = dict(parameters)
    if "log_tau" in out:
        out["log_tau"] = out["log_tau"].clamp(*LOG_TAU_RANGE)
    if "log_lambda" in out:
        out["log_lambda"] = out["log_lambda"].clamp(*LOG_LAMBDA_RANGE)
    for name, ratio in MOST.items():
        if name in out:
            scores = out[name] - out[name].mean()
            out[name] = scores.clamp(-math.log(ratio) / 2, math.log(ratio) / 2)
    return out


def split(parameters: Params) -> tuple[Params, Params]:
    """Parameters of the network, and the scalars of the losses; anchors are neither."""
    scalars = get_args(Scalars)
    rest = {n: p for n, p in parameters.items() if n not in scalars}
    network = {n: p for n, p in rest.items() if not n.startswith(ANCHOR)}
    return network, {n: p for n, p in parameters.items() if n in scalars}


def anchors(reference: Params) -> Params:
    """The reference as an upper variable."""
    return {f"{ANCHOR}{name}": value for name, value in reference.items()}


def by_source(scalars: Params, batch: dict[str, Tensor]) -> Tensor | None:
    """The weight of each row of a batch, None where rows are not weighed."""
    if "source_scores" not in scalars or "origin" not in batch:
        return None
    return row_weights(scalars["source_scores"], batch["origin"])


def task(
    network: Network, parameters: Params, batch: dict[str, Tensor], micro_batch: int | None = None
) -> Tensor:
    """L_T on a batch of conversations about pictures, weighed by source where there are several."""
    each = row_losses(network, parameters, batch, micro_batch)
    return mean_of_answers(each, batch["counted"], by_source(split(parameters)[1], batch))


def row_losses(
    network: Network, parameters: Params, batch: dict[str, Tensor], micro_batch: int | None = None
) -> Tensor:
    """[row]: what each conversation adds to L_T, the sum of −log p over its answer tokens."""
    weights, _ = split(parameters)
    trained, heads = network.heads_apart(weights)

    def answers(weights: Params, rows: dict[str, Tensor]) -> tuple[Tensor]:
        given = {name: value for name, value in rows.items() if name != "counted"}
        logits = call(network, {**weights, **heads}, "logits", **given)
        ids, counted = (rows[name].gather(1, rows["places"]) for name in ("ids", "counted"))
        return (answer_losses(logits, ids, counted),)

    rows = {name: batch[name] for name in ("ids", "mask", "prefix", "counted", "places")}
    (each,) = in_chunks(answers, trained, rows | seen(batch), micro_batch)
    return each


def seen(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What of a batch says what its pictures are."""
    return {name: batch[name] for name in ("features", "layout", "grid") if name in batch}


def contrast(
    network: Network, parameters: Params, batch: dict[str, Any], micro_batch: int | None = None
) -> Tensor:
    """L_C on a batch of pictures, each with its caption (first) and hallucinated captions."""
    weights, scalars = split(parameters)
    image, text = embeddings(network, weights, batch, micro_batch)
    queue = None
    if "queue" in batch:
        heads = (
            call(network, weights, f"{side}_head", input=batch["queue"][side])
            for side in ("image", "text")
        )
        queue = Queue(*heads)
    return contrastive_loss(
        image,
        text[:, 0],
        text[:, 1:],
        batch["against"],
        log_weights_of(scalars["kind_scores"]),
        temperature(scalars["log_tau"]),
        queue,
        by_source(scalars, batch),
    )


def embeddings(
    network: Network, weights: Params, batch: dict[str, Any], micro_batch: int | None
) -> tuple[Tensor, Tensor]:
    """ê_v of each picture, and ê_t of each of its captions: [pair, e] and [pair, line, e].

    Heads are applied to the states of the whole batch. Captions are a function of LoRA alone, so
    that where it is fixed no graph of them is made.
    """
    trained, heads = network.heads_apart(weights)

    def pictures(weights: Params, rows: dict[str, Tensor]) -> tuple[Tensor]:
        return (call(network, {**weights, **heads}, "image_states", **rows),)

    def captions(weights: Params, rows: dict[str, Tensor]) -> tuple[Tensor]:
        lines = rows["ids"].shape[:2]
        told = {name: value.flatten(0, 1) for name, value in rows.items()}
        states = call(network, {**weights, **heads}, "text_states", **told)
        return (states.unflatten(0, lines),)

    (image,) = in_chunks(pictures, trained, seen(batch), micro_batch)
    rows = {name: batch[name] for name in ("ids", "mask")}
    (text,) = in_chunks(captions, network.without_projector(trained), rows, micro_batch)
    return (
        call(network, weights, "image_head", input=image),
        call(network, weights, "text_head", input=text),
    )


def preferred(
    network: Network,
    parameters: Params,
    batch: dict[str, Any],
    loss: ContrastLoss,
    micro_batch: int | None = None,
) -> Tensor:
    """L_C as a preference, a pair's term times the weight of its kind and of its source."""
    weights, scalars = split(parameters)
    each = log_weights_of(scalars["kind_scores"]).exp()[batch["kind"]]
    source = by_source(scalars, batch)
    each = each if source is None else each * source
    pairs = preference(network, weights, batch, micro_batch)
    return chip(pairs, weights=each) if loss == "chip" else chip_released(pairs, weights=each)


def refinement(
    loss: ContrastLoss,
    network: Network,
    parameters: Params,
    batch: dict[str, Any],
    micro_batch: int | None = None,
) -> Tensor:
    """L_C."""
    if loss == "hacl":
        return contrast(network, parameters, batch, micro_batch)
    return preferred(network, parameters, batch, loss, micro_batch)


def lower(
    form: Form,
    network: Network,
    parameters: Params,
    batch: dict[str, Any],
    *,
    anchor: float,
    reference: Params,
    micro_batch: int | None = None,
) -> Tensor:
    """G of a form; `parameters` are those of both levels, with every scalar in place.

    `micro_batch` rows pass the language model at a time (`micro_batches`); None: all of them.
    """
    if not form.task:
        loss = refinement(form.loss, network, parameters, batch["contrast"], micro_batch)
    else:
        loss = task(network, parameters, batch["task"], micro_batch)
        if form.contrast:
            refined = refinement(form.loss, network, parameters, batch["contrast"], micro_batch)
            loss = loss + parameters["log_lambda"].exp() * refined
    if form.anchored:
        away = [
            (parameters[n] - parameters.get(f"{ANCHOR}{n}", value)).square().sum()
            for n, value in reference.items()
        ]
        loss = loss + anchor / 2 * torch.stack(away).sum()
    return loss
