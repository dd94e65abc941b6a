"""Preference pairs in RLHF-V's layout (Yu et al., CVPR 2024, arXiv:2312.00849), as JSON.

{"idx": 0, "image_path": "llava1/0.jpg", "text": "{\\"question\\": …, \\"chosen\\": …,
\\"rejected\\": …}"}, `text` as an object or as a text that holds one; or "question", "chosen" and
"rejected" beside the picture, as in RLAIF-V. A list, or one object a line. The published parquet
files hold pictures as bytes: write them out first.
"""

from __future__ import annotations

import json

from bilevel.components import PathName, component

from .files import FileSource, Reading, Record
from .json_files import Entry, json_list


@component
class RlhfV(FileSource):
    """The chosen answer as a picture's caption, the rejected one as hallucinated. A `Source`.

    What the rejected answer gets wrong is not said: its kind is "other".
    """

    path: PathName
    """The file."""

    def read(self) -> Reading:
        return Reading(tuple(_record(e, i) for i, e in enumerate(json_list(self.path))))


def _record(entry: Entry, number: int) -> Record:
    pair = _pair(entry)
    question, chosen, rejected = (
        pair.said(pair.text_of(key), repr(key)) for key in ("question", "chosen", "rejected")
    )
    if chosen.split() == rejected.split():
        entry.refuse("the chosen answer is the rejected one")
    return Record(
        at=entry,
        id=entry.id_of("idx", f"#{number}"),
        picture=_picture(entry),
        captions=[chosen],
        hallucinated={"other": rejected},
        turns=[(question, chosen)],
        instruction=question,
    )


def _picture(entry: Entry) -> str:
    value = entry.value.get("image_path", entry.value.get("image"))
    if isinstance(value, dict):
        value = value.get("path")
    if not isinstance(value, str) or not value.strip():
        entry.refuse("has no picture: 'image_path' or 'image' must be the name of a file")
    return value


def _pair(entry: Entry) -> Entry:
    text = entry.value.get("text", entry.value)
    if isinstance(text, str):
        try:
            text = json.loads(text)
        except json.JSONDecodeError as error:
            entry.refuse(f"'text' is malformed JSON: {error.msg}")
    if not isinstance(text, dict):
        entry.refuse("'text' must hold an object with question, chosen and rejected")
    return Entry(text, entry.text, entry.offset, entry.label)
