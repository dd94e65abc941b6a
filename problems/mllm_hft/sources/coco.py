"""COCO: instances and captions as published (Lin et al., 2014, arXiv:1405.0312).

`instances_*.json`: {"images": [{"id", "file_name"}], "annotations": [{"image_id",
"category_id"}], "categories": [{"id", "name"}]}. `captions_*.json`: the same with "caption" in
place of "category_id" and no categories. CHAIR's truth is what either names.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from bilevel.components import PathName, component
from bilevel.errors import ProblemError

from . import coco_objects
from .altering import caption_of
from .files import FileSource, Reading, Record
from .json_files import Entry, json_lists
from .mentions import Lexicon


@component
class Coco(FileSource):
    """Pictures of COCO with objects from instances and captions from captions. A `Source`."""

    instances: PathName | None = None
    """`instances_*.json`; without it nothing is known to be absent, and CHAIR is not measured."""
    captions: PathName | None = None
    """`captions_*.json`; without it captions are written from the instances."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.instances is None and self.captions is None:
            raise ProblemError("coco needs instances, captions, or both")

    def read(self) -> Reading:
        records: dict[str, Record] = {}
        names: tuple[str, ...] = coco_objects.NAMES
        if self.instances is not None:
            names = self._instances(self.instances, records)
        if self.captions is not None:
            self._captions(self.captions, records)
        words = {name: coco_objects.SYNONYMS.get(name, ()) for name in names}
        return Reading(tuple(records.values()), Lexicon(names, words))

    def _instances(self, path: str, records: dict[str, Record]) -> tuple[str, ...]:
        lists = json_lists(path, ("images", "annotations", "categories"))
        categories = {e.id_of("id"): e.text_of("name") for e in lists["categories"]}
        _pictures(lists["images"], records, annotated=True)
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for entry in lists["annotations"]:
            category = entry.id_of("category_id")
            if category not in categories:
                entry.refuse(f"category_id {category} is not among the categories")
            counts[_about(entry, records).id][categories[category]] += 1
        for record in records.values():
            record.objects = set(counts[record.id])
            if self.captions is None and counts[record.id]:
                record.captions = [caption_of(counts[record.id])]
        return tuple(categories.values())

    def _captions(self, path: str, records: dict[str, Record]) -> None:
        lists = json_lists(path, ("images", "annotations"))
        _pictures(lists["images"], records, annotated=False)
        for entry in lists["annotations"]:
            _about(entry, records).captions.append(entry.text_of("caption").strip())


def _pictures(entries: Sequence[Entry], records: dict[str, Record], *, annotated: bool) -> None:
    """Add records of pictures; one that another file lists, too, is the same."""
    seen: dict[str, Any] = {}
    for entry in entries:
        name = entry.id_of("id")
        picture = entry.text_of("file_name")
        if name in seen:
            entry.refuse(f"image id {name} is taken; it is also at {seen[name]}")
        seen[name] = entry
        known = records.setdefault(name, Record(entry, name, picture, annotated=annotated))
        if known.picture != picture:
            entry.refuse(f"image id {name} is {known.picture} at {known.at}, and {picture} here")


def _about(entry: Entry, records: dict[str, Record]) -> Record:
    name = entry.id_of("image_id")
    if name not in records:
        entry.refuse(f"image_id {name} is about no picture of this file")
    return records[name]
