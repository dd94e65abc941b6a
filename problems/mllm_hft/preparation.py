"""What is made before the first step: model, pictures, conversations, questions, a warmed-up projector.

What takes long is cached, so only the first run with the same settings waits for it.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bilevel import rng, tree
from bilevel.errors import ProblemError
from bilevel.events import Progress, Warned
from bilevel.types import Params

from . import formulations
from .batches import Data, numbered, origin_numbers, origins
from .contrast_first import contrast_first
from .evaluation.evaluation_split import Captions, EvaluationSplit, captions, evaluation_split
from .evaluation.questions import cooccurrence
from .filtering import filtered
from .formulations import SCALARS
from .lengths import too_long
from .models import cache
from .models.adapters import start_lora
from .models.encoders import ViT
from .models.instructions import conversations
from .models.network import LoadedModel, hacl_heads, parameters, residual_head
from .models.pretrain import dialogues
from .models.tiny import Tiny
from .models.tokenizer import Tokenizer
from .preference_pairs import CaptionPairs, caption_pairs, spread
from .sources.mixture import Mixture
from .sources.protocol import Corpus, Scene, Split
from .sources.shapes import Shapes
from .warm_up import WarmUp, warm_up

if TYPE_CHECKING:
    from .planning import Plan
    from .problem import HierarchicalFineTuning

_LAST: dict[Split, tuple[tuple[Any, ...], tuple[Data, tuple[Scene, ...]]]] = {}
"""What a split was drawn from and what was made of it, the last one in this process: a sweep, a study or a notebook
runs many times on the same pictures, and 16,000 take longer to draw than a short run takes."""


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
    """The projector as it was warmed up."""
    pairs: CaptionPairs | None = None
    """Of the training pictures, where L_C is a preference."""
    noise_scale: Tensor | None = None
    first: Params = field(default_factory=dict)
    """Where projector, heads and LoRA start after `contrast_first`; without it, nothing."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    warnings: tuple[Warned, ...] = ()
    """What a user should know of the data."""
    plan: Plan | None = None
    """Of the run's device, once it is known."""

    @property
    def rows(self) -> int:
        """That pass the model at a time where no graph is made."""
        return self.plan.rows if self.plan else 1


def prepare(
    problem: HierarchicalFineTuning, device: torch.device
) -> Generator[Progress, None, Prepared]:
    """Everything that `problem` needs, by its options, computed on `device`.

    Raises `ProblemError` for a weight of a source that training pictures do not come from, and where
    weights of sources are all that the formulation learns and there is one source.
    """
    loaded = yield from problem.model.open(problem.source, problem.encoder, problem.seed, device)
    train, scenes = yield from _data(problem, loaded, "train", problem.train, device)
    upper, clean = yield from _data(problem, loaded, "upper", problem.upper, device)
    evaluation = yield from _evaluation(problem, loaded, scenes)
    long = [
        *_too_long(loaded, "train", scenes, train),
        *_too_long(loaded, "upper", clean, upper),
        *_too_long(loaded, problem.split, evaluation.scenes, evaluation, evaluation.talked),
    ]
    # Half precision is for weights that stay: an update is lost in it.
    loaded.network.place(device, torch.float32)
    how = WarmUp(
        problem.warm_up,
        problem.lower_batch,
        problem.warm_up_rate,
        problem.seed,
        problem.micro_batch,
    )
    yield from warm_up(loaded.network, train.pictures, train.dialogues, how)
    if problem.kept < 1:
        train = yield from filtered(problem, loaded.network, train, upper, device)
    if problem.heads == "hacl":
        hacl_heads(loaded.network, rng.stream(problem.seed, "heads"))
    if problem.text_head == "residual":
        residual_head(loaded.network, rng.stream(problem.seed, "text_head"))
    sources = origins(scenes) if train.drawn_from is None else ()
    kinds = problem.source.kinds
    if problem.form.upper == ("source_scores",) and not sources:
        raise ProblemError(
            f"formulation {problem.formulation} learns weights of sources, and all training pictures come "
            "from one; use source: mixture, or files of several origins, and kept: 1"
        )
    scalars = formulations.start_scalars(
        problem.contrast, len(kinds), _weights_of(problem.weights, sources)
    )
    constants = tree.to({str(n): v for n, v in scalars.items()}, device, torch.float32)
    made = Prepared(loaded, train, upper, evaluation, constants, sources, device=device)
    made.warnings = (*long, *without_hallucinated(problem, made))
    if problem.contrast_loss != "hacl":
        made.pairs = caption_pairs(scenes, kinds, loaded.tokenizer, loaded.template)
        made.noise_scale = spread(train.pictures)
    made.reference = tree.clone(parameters(loaded.network, "projector"))
    if problem.contrast_first:
        made.first = yield from contrast_first(problem, made)
    return made


def start(
    problem: HierarchicalFineTuning, prepared: Prepared, stream: torch.Generator | None
) -> tuple[Params, Params]:
    """x and y to start from; without a stream LoRA is zero, which is the same function.

    After `contrast_first` projector, heads and LoRA are what it made, whatever the stream.
    """
    network = prepared.loaded.network
    parts: dict[str, Params] = {
        "projector": parameters(network, "projector"),
        "heads": parameters(network, "heads"),
        "lora": start_lora(network, stream),
        "source_scores": {},
        "anchor": formulations.anchors(parameters(network, "projector")),
        **{name: {name: value} for name, value in prepared.constants.items()},
    }
    if prepared.first:
        parts = {
            part: {name: prepared.first.get(name, value) for name, value in values.items()}
            for part, values in parts.items()
        }
    fixed = {SCALARS[name] for name in SCALARS.keys() - set(problem.learned)}
    x = {n: v for part in problem.form.upper if part not in fixed for n, v in parts[part].items()}
    y = {n: v for part in problem.form.lower for n, v in parts[part].items()}
    return x, y


def _too_long(
    loaded: LoadedModel,
    split: Split,
    scenes: tuple[Scene, ...],
    data: Data | EvaluationSplit,
    talked: Tensor | None = None,
) -> list[Warned]:
    rows = data.pictures, data.dialogues, data.captions
    return too_long(loaded.network, split, scenes, *rows, talked)


def without_hallucinated(problem: HierarchicalFineTuning, prepared: Prepared) -> list[Warned]:
    """A warning where L_C is trained and no training picture has a hallucinated caption to contrast with.

    A preference says so itself, as it cannot be trained then.
    """
    trained = problem.form.contrast or problem.contrast_first
    present = prepared.train.captions.present
    if not trained or problem.contrast_loss != "hacl" or present.any():
        return []
    return [
        Warned(
            0,
            "hallucinated",
            f"none of {len(present)} training pictures has a hallucinated caption, so L_C contrasts pictures "
            "with the captions of other pictures alone; give hallucinated captions, or let the source make "
            "them (source.alter, and source.synonyms for the objects that captions name)",
        )
    ]


def _weights_of(weights: dict[str, float], sources: tuple[str, ...]) -> list[float]:
    """Weights at the start. Raises `ProblemError` for a name that no source has."""
    unknown = [name for name in weights if name not in sources]
    if unknown:
        raise ProblemError(
            f"problem.weights names {', '.join(unknown)}; training pictures come from "
            f"{', '.join(sources) or 'one source, which has no weight'}"
        )
    return [weights.get(name, 1.0) for name in sources]


def _corpus(
    problem: HierarchicalFineTuning, split: Split, size: int
) -> Generator[Progress, None, Corpus]:
    yield Progress("pictures", 0, None, f"{size} for {split}")
    stream = rng.stream(problem.seed, f"scenes.{split}")
    corpus = problem.source.corpus(split, size, generator=stream)
    for note in corpus.notes:
        yield Progress("pictures", 1, 1, note)
    return corpus


def _data(
    problem: HierarchicalFineTuning,
    loaded: LoadedModel,
    split: Split,
    size: int,
    device: torch.device,
) -> Generator[Progress, None, tuple[Data, tuple[Scene, ...]]]:
    """A split with its scenes; where the options alone determine them, those of the run before if they are the same."""
    options = problem.source, problem.encoder, problem.model, problem.seed, problem.upper_turns
    drawn_from = (*options, size, device, cache.folder())
    is_drawn = _is_drawn(problem)
    if is_drawn and split in _LAST and _LAST[split][0] == drawn_from:
        return _LAST[split][1]
    _LAST.pop(split, None)
    corpus = yield from _corpus(problem, split, size)
    refuse_marks(corpus.scenes, loaded.tokenizer)
    pictures = yield from loaded.encode(corpus)
    stream = rng.stream(problem.seed, f"dialogues.{split}")
    alone = split == "upper" and problem.upper_turns == "questions"
    scenes = _undescribed(corpus.scenes) if alone else corpus.scenes
    turns = dialogues(scenes, problem.source, stream)
    rows = conversations(turns, loaded.tokenizer, loaded.template)
    lines = captions(corpus.scenes, problem.source, loaded.tokenizer)
    origin = origin_numbers(corpus.scenes)
    made = Data(pictures, rows, lines, numbered(corpus), origin), corpus.scenes
    if split == "train" and (problem.form.contrast or problem.contrast_first):
        yield from _undescribed_note(lines)
    if is_drawn:
        _LAST[split] = drawn_from, made
    return made


def refuse_marks(scenes: Sequence[Scene], tokenizer: Tokenizer) -> None:
    """Raises `ProblemError` where a text holds a special token, which would end or pad it as one."""
    marks = re.compile("|".join(re.escape(mark) for mark in tokenizer.marks) or r"\Z.")
    for scene in scenes:
        said = (
            scene.caption,
            scene.instruction,
            scene.ask or "",
            *scene.hallucinated.values(),
            *(question.text for question in scene.questions),
            *(text for turn in scene.turns for text in turn),
        )
        for text in said:
            if found := marks.search(text):
                raise ProblemError(
                    f"{str(scene.at) or scene.id}: the text {_short(text)} holds {found[0]!r}, which is a "
                    "special token of the model and no word; write it otherwise, or leave it out"
                )


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _undescribed_note(lines: Captions) -> Iterator[Progress]:
    """Says how many pictures the contrast leaves out, where it leaves out some."""
    total, missing = len(lines.described), int((~lines.described).sum())
    if missing:
        note = f"train: {missing} of {total} pictures have no caption, and are in no contrast"
        yield Progress("pictures", 1, 1, note)


def _undescribed(scenes: tuple[Scene, ...]) -> tuple[Scene, ...]:
    """The same to be asked about and not described."""
    if any(scene.turns for scene in scenes):
        raise ProblemError(
            "problem.upper_turns=questions, and upper pictures come with conversations of their own, of which "
            "nothing says what are questions; use upper_turns: all"
        )
    return tuple(replace(scene, caption="") for scene in scenes)


def _is_drawn(problem: HierarchicalFineTuning) -> bool:
    """Whether the options alone determine pictures, features and words: no file is read that may be another later."""
    source = problem.source
    sources = [source.clean, *source.parts.values()] if isinstance(source, Mixture) else [source]
    kinds = {type(problem.model), type(problem.encoder), *map(type, sources)}
    return kinds <= {Tiny, ViT, Shapes, type(None)}


def _evaluation(
    problem: HierarchicalFineTuning, loaded: LoadedModel, training: tuple[Scene, ...]
) -> Generator[Progress, None, EvaluationSplit]:
    corpus = yield from _corpus(problem, problem.split, problem.test)
    refuse_marks(corpus.scenes, loaded.tokenizer)
    pictures = yield from loaded.encode(corpus)
    return evaluation_split(
        corpus,
        pictures,
        problem.source,
        loaded.tokenizer,
        loaded.template,
        per_scene=problem.questions,
        cooccurrence=cooccurrence(training, problem.source.vocabulary),
        generator=rng.stream(problem.seed, f"questions.{problem.split}"),
    )
