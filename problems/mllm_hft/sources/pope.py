"""POPE's questions as published (Li et al., EMNLP 2023, arXiv:2305.10355).

`coco_pope_{random,popular,adversarial}.json`, JSON lines:
{"question_id": 1, "image": "COCO_val2014_000000310196.jpg", "text": "Is there a snowboard in the
image?", "label": "yes"}. Other POPE files (A-OKVQA, GQA) have the same keys.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from bilevel.components import PathName, Slot, component
from bilevel.errors import ProblemError

from .files import FileSource, Reading, Record
from .json_files import Entry, json_list
from .jsonl import answer_of
from .protocol import OwnQuestion, Source

ASKED = re.compile(
    r"is there (?:an?|any|the) (.+?)(?: in the (?:image|picture|photo|imange))?\s*\?"
)


@component
class Pope(FileSource):
    """POPE's three question files, and what is known of their pictures. A `Source`.

    Measures are named `pope_random`, `pope_popular`, `pope_adversarial`.
    """

    random: PathName | None = None
    popular: PathName | None = None
    adversarial: PathName | None = None
    about: Annotated[Source | None, Slot("mllm_sources")] = None
    """Captions and objects of the same pictures, by their names (`coco`): for CHAIR, the task loss
    and the gap, which questions alone do not give."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self._files:
            raise ProblemError("pope needs a file: random, popular or adversarial")
        if self.about is not None and not isinstance(self.about, FileSource):
            raise ProblemError(
                f"pope.about = {type(self.about).__name__}; must read files, such as coco"
            )

    @property
    def _files(self) -> dict[str, str]:
        files = {"random": self.random, "popular": self.popular, "adversarial": self.adversarial}
        return {group: path for group, path in files.items() if path is not None}

    def read(self) -> Reading:
        known = self._known()
        asked: dict[str, Record] = {}
        for group, path in self._files.items():
            ids: dict[str, Entry] = {}
            for entry in json_list(path):
                name = entry.id_of("question_id")
                if name in ids:
                    entry.refuse(f"question_id {name} is taken; it is also at {ids[name]}")
                ids[name] = entry
                picture = entry.text_of("image")
                if picture not in asked:
                    asked[picture] = self._picture(entry, picture, known)
                asked[picture].questions.append(_question(entry, f"pope_{group}"))
        if known is None:
            for record in asked.values():
                record.objects = {q.name for q in record.questions if q.answer and q.name}
            return Reading(tuple(asked.values()))
        assert isinstance(self.about, FileSource)
        known_by = self.about.reading
        return Reading(tuple(asked.values()), known_by.lexicon, is_final=known_by.is_final)

    def file(self, record: Record) -> Path:
        if self.images or not isinstance(self.about, FileSource):
            return super().file(record)
        return self.about.file(record)

    def _known(self) -> dict[str, Record] | None:
        if not isinstance(self.about, FileSource):
            return None
        return {Path(record.picture).name: record for record in self.about.reading.records}

    def _picture(self, entry: Entry, picture: str, known: dict[str, Record] | None) -> Record:
        if known is None:
            return Record(entry, picture, picture)
        if (found := known.get(Path(picture).name)) is None:
            entry.refuse(f"asks about the picture {picture}, which pope.about does not have")
        return Record(
            at=found.at, id=found.id, picture=found.picture, captions=found.captions,
            hallucinated=found.hallucinated, objects=found.objects, annotated=found.annotated,
            instruction=found.instruction,
        )  # fmt: skip


def _question(entry: Entry, group: str) -> OwnQuestion:
    text = entry.text_of("text")
    asked = ASKED.match(text.strip().lower())
    return OwnQuestion(text, answer_of(entry, "label"), group, asked[1] if asked else "")
