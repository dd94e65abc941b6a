"""AMBER as published (Wang et al., 2023, arXiv:2311.07397).

`query_*.json`: [{"id": 1, "image": "AMBER_1.jpg", "query": "Describe this image."}].
`annotations.json`: [{"id": 1, "type": "generative", "truth": ["sky"], "hallu": ["bird"]},
{"id": 1005, "type": "discriminative-attribute-state", "truth": "yes"}]. `relation.json`: {"sky":
["cloud"]}, words that the object allows. `safe_words.txt`: words never wrong, one a line.
"""

from __future__ import annotations

from typing import Any

from bilevel.components import PathName, component

from .files import FileSource, Reading, Record
from .json_files import Entry, json_list, json_object, read
from .jsonl import answer_of
from .mentions import Association, Lexicon
from .protocol import OwnQuestion


@component
class Amber(FileSource):
    """AMBER's pictures with its lists of true and expected objects, and its questions. A `Source`.

    Captions are measured by AMBER's CHAIR, Cover, Hal and Cog, questions by its accuracy,
    precision, recall and F1: `amber_existence`, `amber_attribute`, `amber_relation`.
    """

    queries: PathName
    """`query_all.json`, or any part of it."""
    annotations: PathName
    """`annotations.json`."""
    relation: PathName
    """`relation.json`."""
    safe_words: PathName | None = None
    """`safe_words.txt`."""

    def read(self) -> Reading:
        truths = _by_id(json_list(self.annotations))
        records: dict[str, Record] = {}
        for entry in _by_id(json_list(self.queries)).values():
            name, picture = entry.id_of("id"), entry.text_of("image")
            if name not in truths:
                entry.refuse(f"id {name} has no annotation in {self.annotations}")
            record = records.setdefault(picture, Record(entry, picture, picture))
            self._add(record, entry, truths[name])
        association = self._association()
        words = Lexicon(association.words())
        return Reading(tuple(records.values()), words, association, is_final=True)

    def _add(self, record: Record, query: Entry, truth: Entry) -> None:
        kind = truth.text_of("type")
        if kind == "generative":
            if record.annotated:
                query.refuse(f"a second generative query about {record.picture}")
            record.objects = set(_names(truth, "truth"))
            record.lures = frozenset(_names(truth, "hallu"))
            record.annotated, record.instruction = True, query.text_of("query")
        else:
            answer = answer_of(truth, "truth")
            question = OwnQuestion(query.text_of("query"), answer, f"amber_{_group(kind)}")
            record.questions.append(question)

    def _association(self) -> Association:
        entry = json_object(self.relation)
        for name in entry.value:
            _names(entry, name)
        related = {name: tuple(words) for name, words in entry.value.items()}
        safe = read(self.safe_words).content.split("\n") if self.safe_words else []
        return Association(related, frozenset(word.strip() for word in safe if word.strip()))


def _group(kind: str) -> str:
    if "hallucination" in kind or "existence" in kind:
        return "existence"
    return "attribute" if "attribute" in kind else "relation"


def _by_id(entries: list[Entry]) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for entry in entries:
        name = entry.id_of("id")
        if name in found:
            entry.refuse(f"id {name} is taken; it is also at {found[name]}")
        found[name] = entry
    return found


def _names(entry: Entry, key: str) -> list[Any]:
    names = entry.get(key, list)
    if not all(isinstance(name, str) for name in names):
        entry.refuse(f"{key!r} must be a list of words")
    return names
