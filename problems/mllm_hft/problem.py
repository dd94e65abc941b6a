"""Hierarchical fine-tuning of a multimodal language model, as a bilevel problem.

A picture enters a language model through a projector. The lower level refines the embeddings by
contrast with hallucinated captions (HACL: Jiang et al., CVPR 2024, arXiv:2312.06968); the upper
level asks that the task be done well on data that the lower level did not see. What is upper and
what is lower is a choice: see `formulations`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from bilevel import tree
from bilevel.components import Slot, component
from bilevel.errors import ProblemError
from bilevel.events import Progress, Tabulated, Warned
from bilevel.ranks import by_rows
from bilevel.rng import Streams
from bilevel.types import Params

from . import formulations
from .batches import task_batch
from .evaluation.before_after import figures
from .evaluation.evaluator import Evaluator
from .evaluation.measures import Metrics
from .formulations import FORMS, ContrastLoss, Form, Formulation, Learned
from .losses import Choice
from .lower_batches import lower_batches
from .memory import require_room, second_order_room
from .models.export import export
from .models.network import Backbone, Heads, TextHead
from .models.tiny import Tiny
from .options import SOMETIMES, refuse_unread
from .planning import plan
from .preference_pairs import with_reference
from .preparation import Prepared, prepare, start
from .queue import StartStates
from .sources.protocol import Encoder, Source
from .sources.shapes import Shapes

ROOM = (
    "let fewer rows pass at a time (problem.micro_batch=1, or auto), lower the batches "
    "(problem.lower_batch, problem.contrast_batch), keep frozen weights in bfloat16 "
    "(problem.model.weights=folder), or take a smaller model"
)
"""What makes a run smaller."""


@component
class HierarchicalFineTuning:
    """Align pictures and text in a multimodal language model so that it hallucinates less."""

    formulation: Formulation = "weighted"
    """Which variables are upper: weighted, task_weighted, two_variable, proximal; none, and all at both
    levels: simple; or none, an arm to compare with: task_only, joint."""
    source: Annotated[Source, Slot("mllm_sources")] = Field(default_factory=Shapes)
    encoder: Annotated[Encoder | None, Slot("mllm_encoders")] = None
    """Frozen vision encoder; None: what comes with the model (vit for tiny)."""
    model: Annotated[Backbone, Slot("mllm_models")] = Field(default_factory=Tiny)
    seed: int = 0
    """Of the data and of everything pretrained; the run's seed draws LoRA and batches."""
    train: PositiveInt = 1500
    """Pictures of the lower level, whose objects co-occur with bias."""
    upper: PositiveInt = 300
    """Pictures of the upper level, without bias, unseen by the lower level."""
    test: Annotated[int, Field(ge=2)] = 400
    """Pictures that are evaluated on, without bias."""
    split: Literal["test", "development"] = "test"
    """What is evaluated on: choose settings on development, report test."""
    questions: Annotated[int, Field(ge=2, multiple_of=2)] = 6
    """Questions a picture in each POPE split, half of them with yes; where pictures come with
    questions, those are asked."""
    generate_answers: bool = False
    """Also measure answers that the model writes out, and not its logits alone: slower."""
    caption_tokens: PositiveInt = 48
    """A caption that has not ended by then is cut, and counted in captions/cut_short."""
    warm_up: NonNegativeInt = 600
    """Steps of the projector alone on the task, before anything else."""
    warm_up_rate: PositiveFloat = 5e-3
    contrast_first: NonNegativeInt = 0
    """Steps of L_C alone on projector, heads and LoRA before the first lower step, at
    `warm_up_rate`: with task_only the arm that contrasts first and then learns the task."""
    kept: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the training pictures that are drawn: those whose answers a model of the upper data alone
    finds likeliest, from whatever source; a baseline for weights of sources."""
    lower_batch: Annotated[int, Field(ge=2)] = 32
    """Conversations of a lower step."""
    contrast_batch: Annotated[int, Field(ge=2)] = 32
    """Pictures of a lower step's contrast, each with its caption and hallucinated captions."""
    upper_batch: PositiveInt = 32
    """Conversations of an upper step."""
    upper_turns: Literal["all", "questions"] = "all"
    """What the upper loss is of: whole conversations, with descriptions; or questions and their answers
    alone, as POPE asks them, so that it does not punish who describes a picture less surely."""
    micro_batch: PositiveInt | Literal["auto"] | None = None
    """Conversations, or pictures with their captions, that pass the language model at a time, none of
    whose graph is kept: the same losses to rounding, in the memory of so many. None: all of a batch;
    auto: as many as the device's memory allows, which the run says before it starts."""
    anchor: NonNegativeFloat = 2.0
    """μ of two_variable and proximal, which hold the projector to the warmed-up one, or to one that
    is learned."""
    contrast_loss: ContrastLoss = "hacl"
    """What L_C is: hacl; chip, CHiP's preference losses as its paper sums them; chip_released, as its
    code has them. The last two know neither heads nor τ, which are then no variables."""
    negatives: Choice = "own"
    """Hallucinated captions that a picture is contrasted with: its own, or those of the whole batch,
    as HACL's code has it."""
    queue: NonNegativeInt = 0
    """Training pictures beside the batch that are negatives too, with their captions: constants, but
    for the heads."""
    heads: Heads = "orthonormal"
    """Heads that embeddings are read through: orthonormal rows, the same for pictures and text, of the
    model's width; hacl: two linear maps to a quarter of it, with bias, each drawn on its own."""
    text_head: TextHead = "linear"
    """What refines text below: linear, its head alone; residual, a small network before the head too,
    which begins as the identity."""
    contrast: PositiveFloat = 0.5
    """λ of joint, and where that of weighted starts."""
    learned: tuple[Learned, ...] = ("lambda", "tau", "kinds", "sources")
    """Scalars of the lower loss that are upper variables, of those that the formulation has there;
    the others stay as they begin."""
    weights: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Weights of training sources by name, 1 where not named, scaled to their number: fixed, but in
    weighted, where they start so."""
    clean: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of each task batch of task_only and joint that is drawn from the upper data: the
    baseline that a bilevel arm has to beat, since it sees those data too."""

    def __post_init__(self) -> None:
        given = [
            option.name
            for option in fields(self)
            if option.name in SOMETIMES and getattr(self, option.name) != option.default
        ]
        refuse_unread(
            self.formulation,
            self.contrast_loss,
            given,
            self.learned,
            contrast_first=self.contrast_first > 0,
        )
        if self.kept < 1 and (self.queue or self.contrast_loss != "hacl"):
            raise ProblemError(
                "kept below 1 with a queue, or with a preference: these draw from all training pictures; leave "
                "one of them out"
            )

    @property
    def form(self) -> Form:
        """Where the parts stand and which terms the lower loss has."""
        return FORMS[self.formulation].with_loss(self.contrast_loss)

    @cached_property
    def _made(self) -> list[Prepared]:
        return []

    @property
    def _prepared(self) -> Prepared:
        if not self._made:
            raise ProblemError(
                "mllm_hft is not prepared; run through `prepare()` first: "
                "`for progress in problem.prepare(): ...`"
            )
        return self._made[0]

    def prepare(self, device: torch.device | str = "cpu") -> Iterator[Progress]:
        """Model and language model, features, projector, computed on `device`.

        They are cached, so that only the first time is slow.
        """
        self._made[:] = [(yield from prepare(self, torch.device(device)))]

    def place(self, device: torch.device | str, dtype: torch.dtype) -> list[Progress | Warned]:
        """Move the frozen model, and what losses compare with; says what the run will hold.

        Raises `RequirementError` where the device cannot hold the weights and one lower gradient,
        and warns where it cannot hold the derivative of that gradient, and of what is odd in the data.
        """
        prepared, device = self._prepared, torch.device(device)
        made = plan(self, prepared, device, dtype)
        require_room(made.step, device, ROOM)
        prepared.plan, prepared.device, prepared.dtype = made, device, dtype
        prepared.loaded.network.place(device, dtype)
        prepared.reference = tree.to(prepared.reference, device, dtype)
        prepared.constants = tree.to(prepared.constants, device, dtype)
        room = second_order_room(made.step, device, ROOM)
        return [*made.told(), *room, *prepared.warnings]

    def init(self, streams: Streams) -> tuple[Params, Params]:
        """The warmed-up model: LoRA that changes nothing yet, λ and τ as given, kinds alike."""
        return start(self, self._prepared, streams["lora"])

    def upper_loss(self, x: Params, y: Params, batch: dict[str, Tensor]) -> Tensor:
        prepared = self._prepared
        network = prepared.loaded.network
        return formulations.task(network, {**x, **y}, batch, self._micro_batch)

    def lower_loss(self, x: Params, y: Params, batch: dict[str, Any]) -> Tensor:
        prepared = self._prepared
        return formulations.lower(
            self.form,
            prepared.loaded.network,
            {**prepared.constants, **x, **y},
            batch,
            anchor=self.anchor,
            reference=prepared.reference,
            micro_batch=self._micro_batch,
        )

    @property
    def _micro_batch(self) -> int | None:
        made = self._prepared.plan
        return made.micro_batch if made else None

    def upper_batches(self, stream: torch.Generator) -> Iterator[dict[str, Tensor]]:
        """Conversations about unbiased pictures."""
        while True:
            yield task_batch(self._prepared.upper, self.upper_batch, stream)

    def lower_batches(self, stream: torch.Generator) -> Iterator[dict[str, Any]]:
        """What the formulation's lower loss reads: conversations, captions, or both."""
        prepared = self._prepared
        states = self._start_states() if self.queue else None
        for batch in lower_batches(self, prepared, stream, states):
            if self.form.loss != "hacl":
                batch["contrast"] = with_reference(
                    prepared.loaded.network,
                    batch["contrast"],
                    prepared.device,
                    prepared.dtype,
                    self._micro_batch,
                )
            yield batch

    def _start_states(self) -> StartStates:
        prepared = self._prepared
        train, network = prepared.train, prepared.loaded.network
        return StartStates(
            network,
            train.pictures,
            train.captions,
            prepared.device,
            prepared.dtype,
            prepared.rows,
        )

    def part(self, batch: dict[str, Any], rank: int, ranks: int) -> tuple[dict[str, Any], float]:
        """A rank's conversations, pictures and pairs; each counts for 1 / ranks.

        The losses divide by what all ranks count. Whole stay who is a negative of whom, and the queue.
        """

        def own(rows: dict[str, Any]) -> dict[str, Any]:
            kept = {name: rows[name] for name in ("against", "queue") if name in rows}
            cut = {name: value for name, value in rows.items() if name not in kept}
            return {**by_rows(cut, rank, ranks)[0], **kept}

        if "ids" in batch:
            return own(batch), 1 / ranks
        return {name: own(rows) for name, rows in batch.items()}, 1 / ranks

    def project_upper(self, x: Params) -> Params:
        return formulations.project(x)

    @property
    def project_lower(self) -> Callable[[Params], Params] | None:
        """None where no variable of y has a range, as it has only where τ is learned below."""
        return formulations.project if formulations.RANGES & {*self.form.lower} else None

    def evaluate(
        self, x: Params, y: Params
    ) -> Generator[Progress | Warned | Tabulated, None, Metrics]:
        """Every measure on the evaluated split; yields its progress and tables, and returns them."""
        prepared = self._prepared
        found = yield from self._evaluator.measure({**x, **y}, prepared.evaluation)
        return {**found.metrics, **prepared.loaded.facts, **self._learned({**x, **y})}

    def figures(self, x: Params, y: Params) -> dict[str, Any]:
        """Embeddings before and after, in one projection; the first pictures with both captions."""
        return self.side_by_side({"before": self.before(), "after": {**x, **y}})

    def before(self) -> Params:
        """x and y of the warmed-up model, as one."""
        prepared = self._prepared
        x, y = start(self, prepared, None)
        return tree.to({**x, **y}, prepared.device, prepared.dtype)

    def side_by_side(self, models: dict[str, Params]) -> dict[str, Any]:
        """`figures` of several models by title, x and y of each as one: arms, or runs of other seeds.

        Embeddings are those of this problem's evaluated split, on the principal axes of all models
        together.
        """
        return figures(self._evaluator, self._prepared.evaluation, models, self.split)

    def export(self, x: Params, y: Params, folder: Path, merged: bool) -> None:
        """Write the model at (x, y) for transformers and peft; see `models.export`."""
        export(self._prepared.loaded, {**x, **y}, folder, merged=merged)

    @property
    def _evaluator(self) -> Evaluator:
        prepared = self._prepared
        loaded = prepared.loaded
        return Evaluator(
            loaded.network,
            loaded.tokenizer,
            loaded.template,
            self.source.kinds,
            prepared.device,
            prepared.dtype,
            self.generate_answers,
            self.caption_tokens,
            prepared.rows,
        )

    def _learned(self, at: Params) -> Metrics:
        """Scalars of the losses that are variables, in words."""
        found = {}
        if "log_tau" in at:
            found["learned/tau"] = float(at["log_tau"].exp())
        if "log_lambda" in at:
            found["learned/lambda"] = float(at["log_lambda"].exp())
        named = {"kind_scores": self.source.kinds, "source_scores": self._prepared.sources}
        for scores, names in named.items():
            if scores in at:
                weights = formulations.log_weights_of(at[scores]).exp().tolist()
                found |= {f"learned/weight_{n}": w for n, w in zip(names, weights, strict=True)}
        return found
