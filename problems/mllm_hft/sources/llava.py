"""Conversations in LLaVA's layout (Liu et al., 2023, arXiv:2304.08485).

[{"id": "000000033471", "image": "train2017/000000033471.jpg", "conversations": [{"from":
"human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A bus."}]}]. Entries
without a picture are left out and counted. One picture may have several conversations.
"""

from __future__ import annotations

import re

from bilevel.components import PathName, component
from bilevel.errors import ProblemError

from .files import FileSource, Reading, Record
from .json_files import Entry, json_list, without_mark

DESCRIBES = re.compile(
    r"\b(describe|description|caption|summar|what (is|do you see) in (the|this))", re.I
)
"""A prompt that asks for a caption."""


@component
class Llava(FileSource):
    """Instruction data about pictures; the caption is the answer that describes. A `Source`.

    That is the answer to the first prompt that asks for a description, else the longest one.
    Objects that a caption does not name may be there: nothing else is asked, CHAIR is not
    measured.
    """

    path: PathName
    """The file."""
    by_folder: bool = False
    """Whether the first folder in a picture's path ("coco" of "coco/train2017/1.jpg") is its origin:
    origins are seen in equal numbers and weighed against each other."""

    def read(self) -> Reading:
        records: list[Record] = []
        pictures: dict[str, Record] = {}
        times: dict[str, int] = {}
        entries = json_list(self.path)
        for number, entry in enumerate(entries):
            if "image" not in entry.value:
                continue
            record = _record(entry, number)
            first = pictures.setdefault(record.id, record)
            if first.picture != record.picture:
                entry.refuse(f"id {record.id!r} is taken by another picture at {first.at}")
            times[record.id] = times.get(record.id, 0) + 1
            if times[record.id] > 1:
                record.id = f"{record.id}#{times[record.id]}"
            if self.by_folder:
                folder, slash, _ = record.picture.partition("/")
                record.origin = folder if slash else ""
            records.append(record)
        if not records:
            raise ProblemError(f"{self.path}: no entry has a picture")
        without = len(entries) - len(records)
        notes = (f"{without} of {len(entries)} entries have no picture",) if without else ()
        return Reading(tuple(records), notes=notes)


def _record(entry: Entry, number: int) -> Record:
    turns = _turns(entry)
    asked = [turn for turn in turns if DESCRIBES.search(turn[0])]
    prompt, caption = asked[0] if asked else max(turns, key=lambda turn: len(turn[1]))
    return Record(
        at=entry,
        id=entry.id_of("id", f"#{number}"),
        picture=entry.text_of("image"),
        captions=[caption],
        turns=turns,
        instruction=prompt,
    )


def _turns(entry: Entry) -> list[tuple[str, str]]:
    said = []
    for i, value in enumerate(entry.get("conversations", list)):
        if not isinstance(value, dict):
            entry.refuse(f"conversations[{i}] must be an object with from and value")
        part = Entry(value, entry.text, entry.offset, f"conversations[{i}]")
        speaker = ("human", "gpt")[i % 2]
        if part.text_of("from") != speaker:
            part.refuse(f"'from' is {part.value['from']!r}; must be {speaker!r}: they take turns")
        value = part.text_of("value").strip()
        said.append(part.said(value, "'value'") if i % 2 else without_mark(value))
    if not said or len(said) % 2:
        entry.refuse("conversations must be prompts and answers, in pairs")
    return list(zip(said[::2], said[1::2], strict=True))
