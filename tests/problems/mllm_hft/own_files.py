"""What docs/your_llava.md speaks of, small: a LLaVA's folder, COCO, POPE's questions, instructions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.problems.mllm_hft.models.folders import BUILDERS
from tests.problems.mllm_hft.sources.layouts import COCO_NAMES, document, lines, pictures

MODEL = "llava-1.5-7b-hf"
TRAIN, VAL = range(1, 25), range(101, 109)
PLURAL = {"person": "two people", "car": "two cars", "cat": "three cats", "dog": "two dogs"}


def lay(folder: Path) -> None:
    """Write all of it below `folder`."""
    BUILDERS["llava"](folder / MODEL)
    _coco(folder / "coco", "train2014", TRAIN)
    _coco(folder / "coco", "val2014", VAL)
    _pope(folder / "POPE" / "output" / "coco")
    _instructions(folder)


def _seen(number: int) -> tuple[int, int]:
    """Categories of a picture."""
    known = list(COCO_NAMES)
    return known[number % 4], known[(number + 1 + number // 4 % 3) % 4]


def _caption(number: int) -> str:
    first, second = (COCO_NAMES[i] for i in _seen(number))
    return f"A brown {first} left of {PLURAL[second]}."


def _coco(folder: Path, part: str, numbers: range) -> None:
    listed = [{"id": i, "file_name": f"COCO_{part}_{i:012d}.jpg"} for i in numbers]
    pictures(folder / part, [str(entry["file_name"]) for entry in listed])
    boxes = [{"image_id": i, "category_id": category} for i in numbers for category in _seen(i)]
    said = [{"image_id": i, "caption": _caption(i)} for i in numbers]
    categories = [{"id": i, "name": name} for i, name in COCO_NAMES.items()]
    (folder / "annotations").mkdir(exist_ok=True)
    instances: dict[str, Any] = {"images": listed, "annotations": boxes, "categories": categories}
    document(folder / "annotations" / f"instances_{part}.json", instances)
    captions = {"images": listed, "annotations": said}
    document(folder / "annotations" / f"captions_{part}.json", captions)


def _pope(folder: Path) -> None:
    folder.mkdir(parents=True)
    for offset, group in enumerate(("random", "popular", "adversarial")):
        rows = []
        for number in VAL:
            there = COCO_NAMES[_seen(number)[offset % 2]]
            absent = [n for i, n in COCO_NAMES.items() if i not in _seen(number)][offset % 2]
            for name, label in ((there, "yes"), (absent, "no")):
                rows.append(
                    {
                        "question_id": len(rows) + 1,
                        "image": f"COCO_val2014_{number:012d}.jpg",
                        "text": f"Is there a {name} in the image?",
                        "label": label,
                    }
                )
        lines(folder / f"coco_pope_{group}.json", rows)


def _instructions(folder: Path) -> None:
    """Of the first 16 pictures of COCO's training part, and of eight of another folder."""
    names = [f"coco/train2014/COCO_train2014_{i:012d}.jpg" for i in TRAIN[:16]]
    others = [f"vg/VG_100K/{i}.jpg" for i in range(1, 9)]
    pictures(folder, others)
    rows = [
        {
            "id": str(place),
            "image": name,
            "conversations": [
                {"from": "human", "value": "<image>\nWhat do you see in this picture?"},
                {"from": "gpt", "value": _caption(place)},
                {"from": "human", "value": "Is there a dog?"},
                {"from": "gpt", "value": "Yes." if 18 in _seen(place) else "No."},
            ],
        }
        for place, name in enumerate([*names, *others], 1)
    ]
    document(folder / "llava_instruct.json", rows)
