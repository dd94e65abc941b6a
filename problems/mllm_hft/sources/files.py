"""What every source of files shares: pictures in a folder, splits, captions read and altered.

A layout (`jsonl`, `coco`, `pope`, …) reads its files into records; `FileSource` does the rest.
Sources are otherwise composed and not inherited; here six layouts share their options and four
methods word for word.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field

from bilevel.components import PathName, component
from bilevel.errors import ProblemError, RequirementError

from .json_files import Entry, read
from .mentions import Association, Lexicon
from .naming import Naming, lexicon_of, listed_by, with_names
from .pictures import PictureFiles
from .protocol import KINDS, SPLITS, Corpus, Kind, OwnQuestion, Scene, Split

SHARES: dict[Split, tuple[float, float]] = {
    "train": (0.0, 0.7), "upper": (0.7, 0.8), "development": (0.8, 0.9), "test": (0.9, 1.0)
}  # fmt: skip
"""Which part of the pictures is which split, where a file does not say."""
INSTRUCTION = "Describe this image."


@dataclass
class Record:
    """What a file says of one picture."""

    at: Entry
    id: str
    picture: str
    """Below the folder of pictures."""
    captions: list[str] = field(default_factory=list)
    hallucinated: dict[Kind, str] = field(default_factory=dict)
    objects: set[str] = field(default_factory=set)
    annotated: bool = False
    """Whether `objects` are all that is there, beside what the captions name."""
    questions: list[OwnQuestion] = field(default_factory=list)
    turns: list[tuple[str, str]] = field(default_factory=list)
    lures: frozenset[str] = frozenset()
    split: str | None = None
    instruction: str = ""
    origin: str = ""

    @property
    def place(self) -> float:
        """A number in [0, 1) that is the picture's, whatever file and folder it is named in."""
        digest = hashlib.sha256(Path(self.picture).name.encode()).digest()
        return int.from_bytes(digest[:6], "big") / 2**48


@dataclass(frozen=True)
class Reading:
    """All that a layout's files say."""

    records: tuple[Record, ...]
    lexicon: Lexicon | None = None
    """None: the objects that records name, or COCO's classes where none does."""
    association: Association | None = None
    notes: tuple[str, ...] = ()
    is_final: bool = False
    """Whether the lexicon is all that counts here, whatever other splits name (`by_split`)."""


@component
class FileSource:
    """Options and methods of every layout; not registered by itself."""

    images: str = ""
    """Folder that picture names begin at; empty: the folder of the file that names them."""
    pixels: Annotated[int | None, Field(ge=8)] = None
    """Cut every picture to this height and width; None: as they come, for models that resize."""
    synonyms: PathName | None = None
    """File of object names, one a line, each with its other words: "dog, puppy, pup" """
    ask: str = "{question}"
    """How questions are put: "{question}\\nAnswer the question using a single word." """
    instruction: str = INSTRUCTION
    """What asks for a caption, where the file does not say."""
    alter: bool = True
    """Make hallucinated captions of the kinds that the file has none of."""
    portion: tuple[float, float] = (0.0, 1.0)
    """Which part of the pictures, by a fixed hash of their names: to divide a file among splits."""
    seed: int = 0
    """Of the hallucinated captions."""

    def __post_init__(self) -> None:
        low, high = self.portion
        if not 0 <= low < high <= 1:
            raise ProblemError(f"portion = {list(self.portion)}; must be 0 ≤ from < to ≤ 1")
        if "{question}" not in self.ask:
            raise ProblemError(f"ask = {self.ask!r}; must hold '{{question}}'")

    def read(self) -> Reading:
        """What the files say. Raises `ProblemError` with file and line for what is wrong in them."""
        raise NotImplementedError

    @cached_property
    def reading(self) -> Reading:
        """Read once: records with distinct ids, in this source's portion, and how text is read."""
        found = self.read()
        refuse_twice(found.records)
        low, high = self.portion
        kept = tuple(record for record in found.records if low <= record.place < high)
        if not kept:
            raise ProblemError(f"{found.records[0].at.text.path}: no picture lies in portion")
        listed = listed_by(kept)
        if self.synonyms is not None:
            lexicon = with_names(read_synonyms(self.synonyms), listed)
        else:
            lexicon = found.lexicon or lexicon_of(listed)
        is_final = found.is_final or self.synonyms is not None
        return Reading(kept, lexicon, found.association, found.notes, is_final)

    @property
    def lexicon(self) -> Lexicon:
        lexicon = self.reading.lexicon
        assert lexicon is not None
        return lexicon

    @cached_property
    def naming(self) -> Naming:
        """The records as its own lexicon reads them."""
        return Naming(self.reading.records, self.lexicon, self.seed)

    @property
    def vocabulary(self) -> tuple[str, ...]:
        return self.naming.vocabulary

    @property
    def colours(self) -> tuple[str, ...]:
        return ()

    @cached_property
    def kinds(self) -> tuple[Kind, ...]:
        own = {kind for record in self.reading.records for kind in record.hallucinated}
        made = KINDS if self.alter else ()
        return tuple(kind for kind in (*KINDS, "other") if kind in own or kind in made)

    def corpus(self, split: Split, size: int, *, generator: torch.Generator) -> Corpus:
        return self.gather(self.of_split(split), size, generator, split)

    def of_split(self, split: Split) -> tuple[Record, ...]:
        """Records of a split: as they say, or by the hash of the picture's name (`SHARES`)."""
        records = self.reading.records
        if any(record.split for record in records):
            for record in records:
                if record.split not in SPLITS:
                    got = (
                        "has no 'split', which other records have"
                        if record.split is None
                        else f"'split' is {record.split!r}"
                    )
                    record.at.refuse(f"{got}; must be one of {', '.join(SPLITS)}")
            refuse_shared({s: (self, [r for r in records if r.split == s]) for s in SPLITS})
            return tuple(record for record in records if record.split == split)
        low, high = SHARES[split]
        at = [(r.place - self.portion[0]) / (self.portion[1] - self.portion[0]) for r in records]
        return tuple(r for r, place in zip(records, at, strict=True) if low <= place < high)

    def gather(
        self,
        records: Sequence[Record],
        size: int,
        generator: torch.Generator,
        split: Split,
        naming: Naming | None = None,
    ) -> Corpus:
        """At most `size` of the records, drawn at random, in the file's order.

        `naming` has the records' names where they are not read with the source's own lexicon.
        """
        naming = naming or self.naming
        if not records:
            raise ProblemError(
                f"{self.reading.records[0].at.text.path}: no picture is in split {split!r} of "
                f"{len(self.reading.records)}; say a split in each record, or name files by split "
                "(source by_split)"
            )
        notes = list(self.reading.notes)
        if len(records) < size:
            notes.append(f"{split}: {size} pictures asked for, {len(records)} are there")
        chosen = torch.randperm(len(records), generator=generator)[:size].sort().values.tolist()
        kept = [records[i] for i in chosen]
        scenes, said = self._scenes(kept, naming)
        files = [self.file(record) for record in kept]
        refuse_missing(kept, files)
        pictures = PictureFiles.of(files, self.pixels, [record.at for record in kept])
        return Corpus(scenes, pictures, naming.lexicon, self.reading.association, (*notes, *said))

    def file(self, record: Record) -> Path:
        """Where a record's picture is."""
        folder = self.images or Path(record.at.text.path).parent
        return Path(os.path.expanduser(folder)) / record.picture

    def _scenes(
        self, records: Sequence[Record], naming: Naming
    ) -> tuple[tuple[Scene, ...], list[str]]:
        names = [naming.of(record) for record in records]
        captions = [record.captions[0] if record.captions else "" for record in records]
        lies: list[dict[Kind, str]] = [{} for _ in records]
        notes = []
        if self.alter:
            altered = naming.altering.all(captions, names, [record.id for record in records])
            lies = altered.captions
            notes += [note] if (note := altered.note(KINDS)) else []
        silent = sum(bool(c) and not naming.lexicon.mentions(c) for c in captions)
        if silent:
            notes.append(f"{silent} of {len(captions)} captions name no known object")
        scenes = tuple(
            Scene(
                things=(),
                caption=caption,
                hallucinated={**made, **record.hallucinated},
                id=record.id,
                objects=objects,
                annotated=record.annotated,
                lures=frozenset(map(naming.lexicon.name_of, record.lures)),
                questions=tuple(self._put(question) for question in record.questions),
                turns=tuple(record.turns),
                instruction=record.instruction or self.instruction,
                ask=self.ask,
                at=record.at,
                origin=record.origin,
            )
            for record, objects, caption, made in zip(records, names, captions, lies, strict=True)
        )
        return scenes, notes

    def _put(self, question: OwnQuestion) -> OwnQuestion:
        text = self.ask.replace("{question}", question.text)
        return OwnQuestion(text, question.answer, question.group, question.name or question.text)


def read_synonyms(path: str) -> Lexicon:
    """Names with their other words, in the layout of CHAIR's `synonyms.txt`: "dog, puppy, pup"."""
    rows: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(read(path).content.splitlines(), 1):
        words = [word.strip() for word in line.split(",") if word.strip()]
        if not words:
            continue
        if words[0] in rows:
            raise ProblemError(f"{path}:{number}: {words[0]!r} has a line already")
        rows[words[0]] = tuple(words[1:])
    return Lexicon(tuple(rows), rows)


def refuse_twice(records: Sequence[Record]) -> None:
    """Raises `ProblemError` for two records of one id."""
    first: dict[str, Record] = {}
    for record in records:
        if record.id in first:
            record.at.refuse(f"id {record.id!r} is taken; it is also at {first[record.id].at}")
        first[record.id] = record


def refuse_missing(records: Sequence[Record], files: Sequence[Path]) -> None:
    """Raises `RequirementError` for the first picture that is not there."""
    missing = [i for i, file in enumerate(files) if not file.is_file()]
    if missing:
        more = f" ({len(missing)} of {len(files)} are missing)" if len(missing) > 1 else ""
        raise RequirementError(
            f"{records[missing[0]].at}: the picture {files[missing[0]]} is not there{more}; "
            "set images to the folder that picture names begin at"
        )


def refuse_shared(splits: Mapping[Split, tuple[FileSource, Sequence[Record]]]) -> None:
    """Raises `ProblemError` for a picture that two splits have."""
    seen: dict[Path, tuple[Split, Record]] = {}
    for split, (source, records) in splits.items():
        for record in records:
            file = source.file(record).absolute()
            other, earlier = seen.setdefault(file, (split, record))
            if other != split:
                record.at.refuse(
                    f"the picture {record.picture} of split {split!r} is also in split {other!r} "
                    f"({earlier.at}); a split must not see another's pictures"
                )
