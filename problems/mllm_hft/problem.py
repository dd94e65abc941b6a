"""Hierarchical fine-tuning of a multimodal language model, as a bilevel problem.

A picture enters a language model through a projector. The lower level refines the embeddings by
contrast with hallucinated captions (HACL: Jiang et al., CVPR 2024, arXiv:2312.06968); the upper
level asks that the task be done well on data that the lower level did not see. What is upper and
what is lower is a choice: see `formulations`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from bilevel import rng, tree
from bilevel.components import Slot, component
from bilevel.errors import ProblemError
from bilevel.events import Progress, Tabulated, Warned
from bilevel.rng import Streams
from bilevel.types import Params

from . import formulations
from .batches import (
    Data,
    contrast_batch,
    joined,
    numbered,
    origin_numbers,
    origins,
    task_batch,
)
from .evaluation.captions_figure import Described, captions_figure
from .evaluation.evaluation_split import EvaluationSplit, captions, evaluation_split
from .evaluation.evaluator import Evaluator
from .evaluation.figure import Panel, embedding_figure
from .evaluation.measures import Metrics
from .evaluation.questions import cooccurrence
from .formulations import FORMS, SCALARS, ContrastLoss, Form, Formulation, Learned
from .losses import Choice
from .memory import Footprint, footprint, require_room
from .models.adapters import start_lora
from .models.cache import Tensors, cached
from .models.export import export
from .models.instructions import conversations
from .models.network import Backbone, Heads, LoadedModel, hacl_heads, parameters
from .models.pretrain import dialogues, warm_up
from .models.tiny import Tiny
from .preference_pairs import (
    CaptionPairs,
    caption_pairs,
    preference_batch,
    reference_shapes,
    spread,
    with_reference,
)
from .queue import StartStates
from .sources.protocol import Corpus, Encoder, Scene, Source, Split
from .sources.shapes import Shapes

VERSION = 1
"""Raised when code changes what a warmed-up projector is."""
DESCRIBED = 8
"""Pictures whose captions are shown."""
TRIPLES = 180
"""Triples in the figure."""


@dataclass
class Prepared:
    """What `prepare` makes; everything else of the problem is frozen."""

    loaded: LoadedModel
    train: Data
    upper: Data
    evaluation: EvaluationSplit
    constants: dict[str, Tensor]
    """Scalars of the losses at their start, for those that are not variables."""
    sources: tuple[str, ...] = ()
    """Names of the parts that training pictures come from, () where there is one."""
    reference: Params = field(default_factory=dict)
    pairs: CaptionPairs | None = None
    """Of the training pictures, where L_C is a preference."""
    noise_scale: Tensor | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32


@component
class HierarchicalFineTuning:
    """Align pictures and text in a multimodal language model so that it hallucinates less."""

    formulation: Formulation = "weighted"
    """Which variables are upper: weighted, two_variable, proximal; or none, an arm to compare with:
    task_only, joint."""
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
    questions: PositiveInt = 6
    """Questions a picture in each POPE split, half of them with yes; where pictures come with
    questions, those are asked."""
    generate_answers: bool = False
    """Also measure answers that the model writes out, and not its logits alone: slower."""
    caption_tokens: PositiveInt = 48
    """A caption that has not ended by then is cut, and counted in captions/cut_short."""
    warm_up: NonNegativeInt = 600
    """Steps of the projector alone on the task, before anything else."""
    warm_up_rate: PositiveFloat = 5e-3
    lower_batch: Annotated[int, Field(ge=2)] = 32
    """Conversations of a lower step."""
    contrast_batch: Annotated[int, Field(ge=2)] = 32
    """Pictures of a lower step's contrast, each with its caption and hallucinated captions."""
    upper_batch: PositiveInt = 32
    """Conversations of an upper step."""
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
    contrast: PositiveFloat = 0.5
    """λ of joint, and where that of weighted starts."""
    learned: tuple[Learned, ...] = ("lambda", "tau", "kinds", "sources")
    """Scalars of the lower loss that are upper variables, of those that the formulation has there;
    the others stay as they begin."""
    weights: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Weights of training sources by name, 1 where not named, scaled to their number: those of
    joint and task_only, and where those of weighted start."""
    clean: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of each task batch of task_only and joint that is drawn from the upper data: the
    baseline that a bilevel arm has to beat, since it sees those data too."""

    def __post_init__(self) -> None:
        if self.clean and self._form.upper:
            raise ProblemError(
                f"clean = {self.clean} with formulation {self.formulation}: its upper loss must be "
                "on data that the lower level does not see; use it with task_only or joint"
            )
        of_hacl = {"negatives": "own", "queue": 0, "heads": "orthonormal"}
        given = [name for name, default in of_hacl.items() if getattr(self, name) != default]
        if given and self.contrast_loss != "hacl":
            raise ProblemError(
                f"{' and '.join(given)} with contrast_loss {self.contrast_loss}: a preference has "
                "none; leave it out, or use contrast_loss=hacl"
            )

    @property
    def _form(self) -> Form:
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

    def prepare(self) -> Iterator[Progress]:
        """Model and language model, features, projector: cached, so only the first time is slow."""
        loaded = yield from self.model.open(self.source, self.encoder, self.seed)
        train, scenes = yield from self._data(loaded, "train", self.train)
        upper, _ = yield from self._data(loaded, "upper", self.upper)
        evaluation = yield from self._evaluation(loaded, scenes)
        yield from self._warm_up(loaded, train)
        if self.heads == "hacl":
            hacl_heads(loaded.network, rng.stream(self.seed, "heads"))
        sources = origins(scenes)
        scalars = formulations.start_scalars(
            self.contrast, len(self.source.kinds), self._weights_of(sources)
        )
        prepared = Prepared(
            loaded, train, upper, evaluation, {str(n): v for n, v in scalars.items()}, sources
        )
        if self._form.loss != "hacl":
            prepared.pairs = caption_pairs(
                scenes, self.source.kinds, loaded.tokenizer, loaded.template
            )
            prepared.noise_scale = spread(train.pictures)
        self._made[:] = [prepared]
        prepared.reference = tree.clone(parameters(loaded.network, "projector"))

    def _weights_of(self, sources: tuple[str, ...]) -> list[float]:
        """Weights at the start. Raises `ProblemError` for a name that no source has."""
        unknown = [name for name in self.weights if name not in sources]
        if unknown:
            raise ProblemError(
                f"problem.weights names {', '.join(unknown)}; training pictures come from "
                f"{', '.join(sources) or 'one source, which has no weight'}"
            )
        return [self.weights.get(name, 1.0) for name in sources]

    def place(self, device: torch.device | str, dtype: torch.dtype) -> list[Progress]:
        """Move the frozen model, and what losses compare with; says what a lower step will hold.

        Raises `RequirementError` where the device cannot hold the weights and one lower gradient.
        """
        prepared = self._prepared
        needed = self._footprint(dtype)
        require_room(
            needed,
            torch.device(device),
            "lower the batches (problem.lower_batch, problem.contrast_batch), keep frozen weights in "
            "bfloat16 (problem.model.weights=folder), or take a smaller model",
        )
        prepared.device, prepared.dtype = torch.device(device), dtype
        prepared.loaded.network.place(prepared.device, dtype)
        prepared.reference = tree.to(prepared.reference, prepared.device, dtype)
        prepared.constants = tree.to(prepared.constants, prepared.device, dtype)
        return [Progress("memory of a lower step", 1, 1, f"at least {needed}")]

    def _footprint(self, dtype: torch.dtype) -> Footprint:
        """Of the first lower step, without its queue, whose states are a constant of the batch."""
        prepared, network = self._prepared, self._prepared.loaded.network
        batch = next(self._drawn(torch.Generator().manual_seed(0), None))
        if self._form.loss != "hacl":
            words = network.mllm.lm_head.out_features
            batch["contrast"] = reference_shapes(batch["contrast"], words)
        x, y = self._start(prepared, None)
        own = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        precisions = dict.fromkeys((*x, *y), dtype) | network.precisions(dtype)
        at = {
            name: torch.empty_like(value, dtype=precisions.get(name), device="meta")
            for name, value in {**own, **prepared.constants, **x, **y}.items()
        }
        anchors = {name: at[name] for name in prepared.reference}

        def loss(at: Params, batch: dict[str, Any]) -> Tensor:
            return formulations.lower(
                self._form, network, at, batch, anchor=self.anchor, reference=anchors
            )

        frozen = {name: value for name, value in at.items() if name not in y}
        trained = {name: at[name] for name in y}
        return footprint(loss, frozen, trained, tree.to(batch, "meta", dtype))

    def init(self, streams: Streams) -> tuple[Params, Params]:
        """The warmed-up model: LoRA that changes nothing yet, λ and τ as given, kinds alike."""
        return self._start(self._prepared, streams["lora"])

    def upper_loss(self, x: Params, y: Params, batch: dict[str, Tensor]) -> Tensor:
        return formulations.task(self._prepared.loaded.network, {**x, **y}, batch)

    def lower_loss(self, x: Params, y: Params, batch: dict[str, Any]) -> Tensor:
        prepared = self._prepared
        return formulations.lower(
            self._form,
            prepared.loaded.network,
            {**prepared.constants, **x, **y},
            batch,
            anchor=self.anchor,
            reference=prepared.reference,
        )

    def upper_batches(self, stream: torch.Generator) -> Iterator[dict[str, Tensor]]:
        """Conversations about unbiased pictures."""
        while True:
            yield task_batch(self._prepared.upper, self.upper_batch, stream)

    def lower_batches(self, stream: torch.Generator) -> Iterator[dict[str, Any]]:
        """What the formulation's lower loss reads: conversations, captions, or both."""
        prepared = self._prepared
        for batch in self._drawn(stream, self._start_states() if self.queue else None):
            if self._form.loss != "hacl":
                batch["contrast"] = with_reference(
                    prepared.loaded.network, batch["contrast"], prepared.device, prepared.dtype
                )
            yield batch

    def _drawn(
        self, stream: torch.Generator, states: StartStates | None
    ) -> Iterator[dict[str, Any]]:
        """Batches without what a preference's reference says of them."""
        prepared = self._prepared
        while True:
            batch: dict[str, Any] = {}
            if self._form.task:
                clean = round(self.clean * self.lower_batch)
                shares = {"train": self.lower_batch - clean, "upper": clean}
                batch["task"] = joined(
                    [
                        task_batch(getattr(prepared, n), size, stream)
                        for n, size in shares.items()
                        if size
                    ]
                )
            if self._form.loss != "hacl":
                batch["contrast"] = self._preference_batch(stream)
            elif self._form.contrast:
                batch["contrast"] = contrast_batch(
                    prepared.train,
                    self.contrast_batch,
                    stream,
                    self.negatives,
                    self.queue,
                    states,
                )
            yield batch

    def _preference_batch(self, stream: torch.Generator) -> dict[str, Any]:
        prepared = self._prepared
        assert prepared.pairs is not None
        assert prepared.noise_scale is not None
        batch = preference_batch(
            prepared.pairs,
            prepared.train.pictures,
            prepared.noise_scale,
            self.contrast_batch,
            stream,
        )
        origin = prepared.train.origin
        return batch if origin is None else {**batch, "origin": origin[batch["scene"]]}

    def _start_states(self) -> StartStates:
        prepared = self._prepared
        train, network = prepared.train, prepared.loaded.network
        return StartStates(network, train.pictures, train.captions, prepared.device, prepared.dtype)

    def project_upper(self, x: Params) -> Params:
        return formulations.project(x)

    def project_lower(self, y: Params) -> Params:
        return formulations.project(y)

    def evaluate(
        self, x: Params, y: Params
    ) -> Generator[Progress | Warned | Tabulated, None, Metrics]:
        """Every measure on the evaluated split; yields its progress and tables, and returns them."""
        prepared = self._prepared
        found = yield from self._evaluator.measure({**x, **y}, prepared.evaluation)
        return {**found.metrics, **prepared.loaded.facts, **self._learned({**x, **y})}

    def figures(self, x: Params, y: Params) -> dict[str, Any]:
        """Embeddings before and after, in one projection; the first pictures with both captions."""
        prepared = self._prepared
        before = tree.to(
            dict(zip("xy", self._start(prepared, None), strict=True)),
            prepared.device,
            prepared.dtype,
        )
        evaluation, evaluator = prepared.evaluation, self._evaluator
        models = {"before": {**before["x"], **before["y"]}, "after": {**x, **y}}
        found = {"captions": self._captions_figure(models)}
        if evaluation.has_captions:
            present = evaluation.captions.present
            found["embeddings"] = embedding_figure(
                [
                    Panel.of(title, evaluator.embed(at, evaluation), present, TRIPLES)
                    for title, at in models.items()
                ]
            )
        return found

    def _captions_figure(self, models: dict[str, Params]) -> Any:
        """What each model says of the first pictures of the evaluated split."""
        evaluation = self._prepared.evaluation
        assert evaluation.images is not None
        size = min(DESCRIBED, len(evaluation.scenes))
        said = {
            title: self._evaluator.describe(formulations.split(at)[0], evaluation, size)[0]
            for title, at in models.items()
        }
        described = [
            Described(
                evaluation.images[i],
                evaluation.scenes[i].names,
                {title: captions[i] for title, captions in said.items()},
            )
            for i in range(size)
        ]
        note = f"The first {size} pictures of the {self.split} split, in their order."
        return captions_figure(described, evaluation.lexicon, note)

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

    def _start(self, prepared: Prepared, stream: torch.Generator | None) -> tuple[Params, Params]:
        """x and y to start from; without a stream LoRA is zero, which is the same function."""
        network = prepared.loaded.network
        parts: dict[str, Params] = {
            "projector": parameters(network, "projector"),
            "heads": parameters(network, "heads"),
            "lora": start_lora(network, stream),
            "source_scores": {},
            "anchor": formulations.anchors(parameters(network, "projector")),
            **{name: {name: value} for name, value in prepared.constants.items()},
        }
        fixed = {SCALARS[name] for name in SCALARS.keys() - set(self.learned)}
        x = {n: v for part in self._form.upper if part not in fixed for n, v in parts[part].items()}
        y = {n: v for part in self._form.lower for n, v in parts[part].items()}
        return x, y

    def _corpus(self, split: Split, size: int) -> Generator[Progress, None, Corpus]:
        yield Progress("pictures", 0, None, f"{size} for {split}")
        stream = rng.stream(self.seed, f"scenes.{split}")
        corpus = self.source.corpus(split, size, generator=stream)
        for note in corpus.notes:
            yield Progress("pictures", 1, 1, note)
        return corpus

    def _data(
        self, loaded: LoadedModel, split: Split, size: int
    ) -> Generator[Progress, None, tuple[Data, tuple[Scene, ...]]]:
        corpus = yield from self._corpus(split, size)
        pictures = yield from loaded.encode(corpus)
        stream = rng.stream(self.seed, f"dialogues.{split}")
        turns = dialogues(corpus.scenes, self.source, stream)
        rows = conversations(turns, loaded.tokenizer, loaded.template)
        lines = captions(corpus.scenes, self.source, loaded.tokenizer)
        origin = origin_numbers(corpus.scenes)
        return Data(pictures, rows, lines, numbered(corpus), origin), corpus.scenes

    def _evaluation(
        self, loaded: LoadedModel, training: tuple[Scene, ...]
    ) -> Generator[Progress, None, EvaluationSplit]:
        corpus = yield from self._corpus(self.split, self.test)
        pictures = yield from loaded.encode(corpus)
        return evaluation_split(
            corpus,
            pictures,
            self.source,
            loaded.tokenizer,
            loaded.template,
            per_scene=self.questions,
            cooccurrence=cooccurrence(training, self.source.vocabulary),
            generator=rng.stream(self.seed, f"questions.{self.split}"),
        )

    def _warm_up(self, loaded: LoadedModel, train: Data) -> Generator[Progress, None, None]:
        """Stage 1, cached; sets the network's projector."""
        projector = loaded.network.projector
        # A copy: training writes into these tensors, and the key is hashed again when it is kept.
        start = tree.clone(parameters(loaded.network, "projector"))

        def make() -> Generator[Progress, None, Tensors]:
            yield from warm_up(
                loaded.network,
                train.pictures,
                train.dialogues,
                steps=self.warm_up,
                batch=self.lower_batch,
                rate=self.warm_up_rate,
                seed=self.seed,
            )
            return projector.state_dict()

        frozen = {n: v for n, v in loaded.network.state_dict().items() if n not in start}
        key = {
            "version": VERSION,
            "start": start,
            "model": frozen,
            "pictures": train.pictures,
            "dialogues": train.dialogues,
            "steps": self.warm_up,
            "batch": self.lower_batch,
            "rate": self.warm_up_rate,
            "seed": self.seed,
        }
        projector.load_state_dict((yield from cached("projector", key, make)))
