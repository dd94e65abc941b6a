"""Small files in our own layout and in the published ones, and the tiny pictures they name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

COCO_NAMES = {1: "person", 3: "car", 17: "cat", 18: "dog"}


def picture(path: Path, colour: tuple[int, int, int] = (200, 30, 30), size=(12, 9)) -> Path:
    """A PNG of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def pictures(folder: Path, names: list[str]) -> None:
    for i, name in enumerate(names):
        picture(folder / name, (20 * i % 256, 100, 200), size=(10 + i, 8 + 2 * i))


def lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def document(path: Path, value: Any) -> str:
    """JSON with a line an entry, so that lines in messages mean something."""
    path.write_text(json.dumps(value, indent=1))
    return str(path)


def name_of(number: int) -> str:
    return f"COCO_val2014_{number:012d}.jpg"


def coco(folder: Path, objects: dict[int, list[int]], captions: dict[int, list[str]]) -> dict:
    """Files of COCO: categories of each picture's objects, and its captions."""
    listed = [{"id": i, "file_name": name_of(i), "width": 10, "height": 8} for i in objects]
    pictures(folder / "val2014", [name_of(i) for i in objects])
    boxes = [
        {"id": 100 * i + j, "image_id": i, "category_id": category, "bbox": [0, 0, 2, 2]}
        for i, categories in objects.items()
        for j, category in enumerate(categories)
    ]
    categories = [{"id": i, "name": n, "supercategory": "x"} for i, n in COCO_NAMES.items()]
    said = [
        {"id": 100 * i + j, "image_id": i, "caption": text}
        for i, texts in captions.items()
        for j, text in enumerate(texts)
    ]
    instances = {"info": {}, "images": listed, "annotations": boxes, "categories": categories}
    return {
        "images": str(folder / "val2014"),
        "instances": document(folder / "instances_val2014.json", instances),
        "captions": document(
            folder / "captions_val2014.json", {"images": listed, "annotations": said}
        ),
    }


def pope(path: Path, asked: list[tuple[int, str, str]]) -> str:
    """One of POPE's files: picture, name, label."""
    rows = [
        {
            "question_id": i + 1,
            "image": name_of(number),
            "text": f"Is there a {name} in the image?",
            "label": label,
        }
        for i, (number, name, label) in enumerate(asked)
    ]
    return lines(path, rows)


def amber(folder: Path) -> dict:
    """AMBER's files: one picture described, two asked about."""
    pictures(folder / "image", ["AMBER_1.jpg", "AMBER_2.jpg"])
    queries = [
        {"id": 1, "image": "AMBER_1.jpg", "query": "Describe this image."},
        {"id": 2, "image": "AMBER_2.jpg", "query": "Describe this image."},
        {"id": 1005, "image": "AMBER_1.jpg", "query": "Is the sea calm in this image?"},
        {"id": 1006, "image": "AMBER_1.jpg", "query": "Is there a boat in this image?"},
        {"id": 1007, "image": "AMBER_2.jpg", "query": "Is the dog on the sofa?"},
    ]
    annotations = [
        {"id": 1, "type": "generative", "truth": ["sea", "beach"], "hallu": ["boat"]},
        {"id": 2, "type": "generative", "truth": ["dog"], "hallu": ["cat", "ball"]},
        {"id": 1005, "type": "discriminative-attribute-state", "truth": "yes"},
        {"id": 1006, "type": "discriminative-hallucination", "truth": "no"},
        {"id": 1007, "type": "discriminative-relation", "truth": "no"},
    ]
    words = {"sea": ["water"], "beach": ["sand"], "boat": ["ship"], "dog": ["puppy"], "cat": []}
    (folder / "safe_words.txt").write_text("picture\nscene\n")
    return {
        "images": str(folder / "image"),
        "queries": document(folder / "query_all.json", queries),
        "annotations": document(folder / "annotations.json", annotations),
        "relation": document(folder / "relation.json", words),
        "safe_words": str(folder / "safe_words.txt"),
    }


def llava(folder: Path, entries: list[tuple[str, str, list[str]]]) -> str:
    """Conversations: id, picture, what is said in turns."""
    rows = [
        {
            "id": name,
            "image": image,
            "conversations": [
                {"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)
            ],
        }
        for name, image, said in entries
    ]
    pictures(folder, [image for _, image, _ in entries])
    return document(folder / "llava.json", rows)
