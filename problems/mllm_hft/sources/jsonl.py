"""Our own layout: JSON lines, one picture a line. What a file does not say is left out.

    {"image": "a.jpg", "caption": "A dog on a couch.",
     "objects": ["dog", "couch"]}
    {"id": "b", "image": "b.png", "split": "test", "origin": "web",
     "caption": "Two cats.", "objects": {"cat": 2},
     "hallucinated": {"count": "Three cats."},
     "questions": [{"text": "Is there a dog?", "answer": "no", "name": "dog"}],
     "conversation": [["What is there?", "Two cats."]]}

`objects` are all the objects that are there (one with the number 0 is not); without them nothing is asked of the picture but its
own questions, and CHAIR leaves it out. They are read by `synonyms`, whatever their case and number.
`<image>` in a text is left out: where the picture stands, the model's template says. `origin` says
where the picture comes from: origins are seen in equal numbers and weighed against each other. `id`
is the picture's name where it is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bilevel.components import PathName, component

from .files import FileSource, Reading, Record
from .json_files import Entry, json_lines
from .protocol import KINDS, Kind, OwnQuestion

KEYS = (
    "id", "image", "caption", "captions", "objects", "hallucinated", "questions", "conversation",
    "split", "origin",
)  # fmt: skip
ANSWERS = {"yes": True, "no": False}


@component
class Jsonl(FileSource):
    """One JSON object a line: picture, captions, objects, hallucinated captions, questions."""

    path: PathName
    """The file."""

    def read(self) -> Reading:
        return Reading(tuple(_record(entry) for entry in json_lines(self.path)))


def _record(entry: Entry) -> Record:
    entry.known_keys(KEYS)
    picture = entry.text_of("image")
    captions = list(_texts(entry, "captions"))
    if (caption := entry.text_of("caption", None)) is not None:
        captions.insert(0, entry.said(caption, "'caption'"))
    objects = entry.get("objects", (list, dict), None)
    if not all(isinstance(name, str) and name.strip() for name in objects or ()):
        entry.refuse("'objects' must be a list of names, or an object of names and numbers")
    if isinstance(objects, dict):
        objects = [name for name, number in objects.items() if _count(entry, name, number)]
    return Record(
        at=entry,
        id=entry.id_of("id", picture),
        picture=picture,
        captions=captions,
        hallucinated=_hallucinated(entry, captions),
        objects={name.strip() for name in objects or ()},
        annotated=objects is not None,
        questions=[_question(entry, q) for q in entry.get("questions", list, [])],
        turns=[_turn(entry, turn) for turn in entry.get("conversation", list, [])],
        split=entry.get("split", str, None),
        origin=entry.get("origin", str, ""),
    )


def _count(entry: Entry, name: str, number: Any) -> int:
    if type(number) is not int or number < 0:
        entry.refuse(
            f"objects[{name!r}] is {number!r}; must be a whole number, 0 where there is none"
        )
    return number


def _texts(entry: Entry, key: str) -> list[str]:
    texts = entry.get(key, list, [])
    if not all(isinstance(text, str) and text.strip() for text in texts):
        entry.refuse(f"{key!r} must be a list of texts")
    return [entry.said(text, f"a text of {key!r}") for text in texts]


def _hallucinated(entry: Entry, captions: Sequence[str]) -> dict[Kind, str]:
    known = (*KINDS, "other")
    found: dict[Kind, str] = {}
    for kind, text in entry.get("hallucinated", dict, {}).items():
        if kind not in known:
            entry.refuse(f"hallucinated has the kind {kind!r}; must be one of {', '.join(known)}")
        if not isinstance(text, str) or not text.strip():
            entry.refuse(f"hallucinated[{kind!r}] must be a text")
        found[kind] = entry.said(text, f"hallucinated[{kind!r}]")
        if any(found[kind].split() == caption.split() for caption in captions):
            entry.refuse(f"hallucinated[{kind!r}] is the caption, which is true")
    return found


def _question(entry: Entry, value: Any) -> OwnQuestion:
    part = _part(entry, value, "a question")
    part.known_keys(("text", "answer", "name", "group"))
    group = part.get("group", str, "own")
    text = part.said(part.text_of("text"), "'text'")
    return OwnQuestion(text, answer_of(part, "answer"), group, part.get("name", str, ""))


def answer_of(entry: Entry, key: str) -> bool:
    """A yes or no. Raises `ProblemError` for anything else."""
    said = entry.get(key, str)
    if said.strip().lower() not in ANSWERS:
        entry.refuse(f"{key!r} is {said!r}; must be 'yes' or 'no'")
    return ANSWERS[said.strip().lower()]


def _turn(entry: Entry, value: Any) -> tuple[str, str]:
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(t, str) for t in value):
        entry.refuse('conversation must be a list of ["prompt", "answer"]')
    return entry.said(value[0], "a prompt"), entry.said(value[1], "an answer")


def _part(entry: Entry, value: Any, what: str) -> Entry:
    if not isinstance(value, dict):
        entry.refuse(f"{what} must be an object with text and answer")
    return Entry(value, entry.text, entry.offset, what)
