"""From what a model answered to measures, rows to keep, and what a user should be warned of.

Rows are plain data, one a question, caption or picture, with the picture's id: enough to compute
every measure again on resampled pictures, as a paired bootstrap of two runs does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..sources.mentions import Association, Lexicon
from ..sources.protocol import Kind, Scene
from .answers import amber_discriminative, blind, parse_answer, pope, pope_parsed, refuse_nan
from .captioning import (
    Metrics,
    Row,
    amber_generative,
    amber_row,
    amber_score,
    chair,
    chair_rows,
    without_object,
)
from .geometry import similarities
from .questions import Question

WORTH_SAYING = 0.1
"""A larger share of captions that were cut short, or name no known object, is a warning."""


@dataclass
class Findings:
    """All that an evaluation found."""

    metrics: Metrics = field(default_factory=dict)
    """By "group/name"."""
    rows: dict[str, list[Row]] = field(default_factory=lambda: defaultdict(list))
    """Tables "questions", "captions" and "pictures"."""
    warnings: dict[str, str] = field(default_factory=dict)
    """By kind."""

    def add(self, group: str, metrics: Metrics) -> None:
        """Measures of a group; "" for those that stand alone."""
        prefix = f"{group}/" if group else ""
        self.metrics |= {f"{prefix}{name}": value for name, value in metrics.items()}

    def finish(self) -> Findings:
        """With what needs several groups: AMBER's discriminative part as a whole, and its score."""
        rows = [row for row in self.rows["questions"] if row["group"].startswith("amber_")]
        if rows:
            said = torch.tensor([row["score"] > 0 for row in rows])
            whole = amber_discriminative(said, torch.tensor([row["answer"] for row in rows]))
            self.add("amber_discriminative", whole)
            if "amber/chair" in self.metrics:
                score = amber_score(self.metrics["amber/chair"], whole["f1"])
                self.add("amber", {"score": score})
        return self


def report_questions(
    findings: Findings,
    group: str,
    asked: Sequence[Question],
    scenes: Sequence[Scene],
    scores: Float[Tensor, "question"],
    said: Sequence[str] | None = None,
) -> None:
    """Measures of one group from scores (yes where > 0) and, where given, from generated answers.

    A group "amber_…" is measured as AMBER does; any other as POPE, with the blind rule beside it.
    """
    answers = torch.tensor([question.answer for question in asked], dtype=torch.bool)
    if group.startswith("amber_"):
        refuse_nan(group, scores, "scores")
        findings.add(group, amber_discriminative(scores > 0, answers))
    else:
        names, pictures = [q.name for q in asked], [q.scene for q in asked]
        findings.add(group, {**pope(scores, answers), **blind(names, answers, pictures)})
    if said is not None:
        parsed = pope_parsed(said, answers)
        findings.add(group, {f"parsed_{name}": value for name, value in parsed.items()})
    for i, question in enumerate(asked):
        row: Row = {
            "id": scenes[question.scene].id or str(question.scene),
            "group": group,
            "question": question.text,
            "name": question.name,
            "answer": question.answer,
            "score": float(scores[i]),
        }
        if said is not None:
            row |= {"said": said[i], "parsed": parse_answer(said[i])}
        findings.rows["questions"].append(row)


def report_endings(findings: Findings, ended: Sequence[bool], allowed: int) -> None:
    """The share of captions that were cut after `allowed` tokens; a large one is a warning."""
    if not ended:
        return
    cut = 1 - sum(ended) / len(ended)
    findings.add("captions", {"cut_short": cut})
    if cut > WORTH_SAYING:
        findings.warnings["captions_cut_short"] = (
            f"{cut:.0%} of {len(ended)} captions were cut after {allowed} tokens, before they ended; "
            "coverage is too low and CHAIR may be, too: raise problem.caption_tokens"
        )


def report_captions(
    findings: Findings,
    captions: Sequence[str],
    ended: Sequence[bool],
    scenes: Sequence[Scene],
    lexicon: Lexicon,
    association: Association | None = None,
) -> None:
    """CHAIR with coverage, or AMBER's generative measures where `association` is given.

    Of scenes whose objects are all known; captions that name no known object are counted and said.
    """
    known = [i for i, scene in enumerate(scenes) if scene.annotated]
    if len(known) < len(scenes):
        findings.warnings["annotations"] = (
            f"{len(scenes) - len(known)} of {len(scenes)} evaluated pictures have no list of their "
            "objects, so CHAIR leaves them out; give annotations (objects, instances)"
        )
    if not known:
        return
    captions, ended = [captions[i] for i in known], [ended[i] for i in known]
    kept = [scenes[i] for i in known]
    said = [lexicon.names(caption) for caption in captions]
    present, lures = [scene.names for scene in kept], [scene.lures for scene in kept]
    silent = without_object(said)
    counted = {"without_object": silent}
    if association is None:
        rows = chair_rows(said, present)
        findings.add("chair", {**chair(said, present), **counted})
    else:
        rows = [amber_row(*parts, association) for parts in zip(said, present, lures, strict=True)]
        findings.add("amber", {**amber_generative(said, present, lures, association), **counted})
    for i, caption, end, row in zip(known, captions, ended, rows, strict=True):
        about = {"id": scenes[i].id or str(i), "caption": caption, "ended": end}
        findings.rows["captions"].append({**about, **row})
    if silent > WORTH_SAYING:
        findings.warnings["captions_without_object"] = (
            f"{silent:.0%} of {len(kept)} captions name none of the known objects, so CHAIR says "
            "nothing of them and looks better than it is; read some in the rows, and give other "
            "words for the objects (source.synonyms)"
        )


def report_undescribed(findings: Findings, described: int, size: int) -> None:
    """A warning where some of the pictures have no true caption, and so no part in the gap.

    None where no picture has one: that is what the benchmark is (POPE's questions alone, AMBER).
    """
    if 0 < described < size:
        findings.warnings["captions_missing"] = (
            f"{size - described} of {size} evaluated pictures have no caption, so "
            + ("gap/… leaves them out" if described > 1 else "gap/… is not measured")
        )


def report_pictures(
    findings: Findings,
    image: Float[Tensor, "n e"],
    text: Float[Tensor, "n e"],
    hallucinated: Float[Tensor, "n k e"],
    present: Bool[Tensor, "n k"],
    kinds: Sequence[Kind],
    scenes: Sequence[Scene],
) -> None:
    """Cosines of each picture with its true caption and its hallucinated ones."""
    true, false = similarities(image, text, hallucinated)
    for i, scene in enumerate(scenes):
        cosines = {kind: float(false[i, k]) for k, kind in enumerate(kinds) if present[i, k]}
        row = {"id": scene.id or str(i), "true": float(true[i]), "hallucinated": cosines}
        findings.rows["pictures"].append(row)
