"""What is wrong in a file is one clear message, with the file and the line."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from bilevel.errors import ProblemError, RecipeError, RequirementError
from bilevel.rng import stream
from bilevel_problems.mllm_hft.models import cache
from bilevel_problems.mllm_hft.sources.amber import Amber
from bilevel_problems.mllm_hft.sources.by_split import BySplit
from bilevel_problems.mllm_hft.sources.coco import Coco
from bilevel_problems.mllm_hft.sources.json_files import json_list, json_lists
from bilevel_problems.mllm_hft.sources.jsonl import Jsonl
from bilevel_problems.mllm_hft.sources.llava import Llava
from bilevel_problems.mllm_hft.sources.pictures import PictureFiles
from bilevel_problems.mllm_hft.sources.pope import Pope
from bilevel_problems.mllm_hft.sources.rlhf_v import RlhfV
from tests.problems.mllm_hft.sources import layouts


def read(source, split="test"):
    return source.gather(source.reading.records, 100, stream(0, "r"), split)


def jsonl(folder, text):
    layouts.pictures(folder, ["a.png", "b.png"])
    (folder / "d.jsonl").write_text(text)
    return Jsonl(path=str(folder / "d.jsonl"))


GOOD = '{"image": "a.png", "caption": "A dog."}\n'


def test_the_good_line_is_good(tmp_path):  # negative control of all below
    assert len(read(jsonl(tmp_path, GOOD)).scenes) == 1


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ('{"image": "b.png", "caption": }', r"d\.jsonl:3: malformed JSON: .* column 31"),
        ('{"image": "b.png", ', r"d\.jsonl:3: malformed JSON"),
        ('["b.png"]', r"d\.jsonl:3: must be an object"),
        ('{"caption": "x"}', r"d\.jsonl:3: has no 'image', only 'caption'"),
        ('{"image": 3}', r"d\.jsonl:3: 'image' is 3; must be a text"),
        ('{"image": "b.png", "caption": " "}', r"d\.jsonl:3: 'caption' is blank"),
        ('{"image": "b.png", "captoin": "x"}', r"unknown key 'captoin'; did you mean 'caption'"),
        ('{"image": "a.png"}', r"d\.jsonl:3: id 'a\.png' is taken; .*d\.jsonl:1"),
        ('{"image": "b.png", "id": "a.png"}', r"d\.jsonl:3: id 'a\.png' is taken"),
        ('{"image": "b.png", "objects": [1]}', r"d\.jsonl:3: 'objects' must be a list of names"),
        (
            '{"image": "b.png", "objects": {"cat": -1}}',
            r"d\.jsonl:3: objects\['cat'\] is -1; must be",
        ),
        ('{"image": "b.png", "objects": {"cat": true}}', r"d\.jsonl:3: objects\['cat'\] is True"),
        ('{"image": "b.png", "hallucinated": {"colour": "x"}}', r"kind 'colour'; must be one of"),
        (
            '{"image": "b.png", "questions": [{"text": "Is it?", "answer": "maybe"}]}',
            r"d\.jsonl:3 \(a question\): 'answer' is 'maybe'; must be 'yes' or 'no'",
        ),
        ('{"image": "b.png", "questions": [{"text": "Is it?", "answer": true}]}', "must be a text"),
        ('{"image": "b.png", "conversation": [["only a prompt"]]}', r"d\.jsonl:3: conversation"),
        ('{"image": "b.png", "conversation": [["Q", " "]]}', r"d\.jsonl:3: an answer is blank"),
        (
            '{"image": "b.png", "conversation": [["Q", "<image>"]]}',
            r"d\.jsonl:3: an answer is blank",
        ),
        ('{"image": "b.png", "conversation": [["", "A"]]}', r"d\.jsonl:3: a prompt is blank"),
        ('{"image": "b.png", "caption": "<image>"}', r"d\.jsonl:3: 'caption' is blank"),
        ('{"image": "b.png", "objects": [" "]}', r"d\.jsonl:3: 'objects' must be a list of names"),
        (
            '{"image": "b.png", "caption": "A dog.", "hallucinated": {"object": " A  dog."}}',
            r"d\.jsonl:3: hallucinated\['object'\] is the caption",
        ),
        (
            '{"image": "b.png", "captions": ["A dog.", "Dogs."], "hallucinated": {"count": "Dogs."}}',
            r"d\.jsonl:3: hallucinated\['count'\] is the caption",
        ),
    ],
)
def test_a_wrong_line(tmp_path, second, message):
    with pytest.raises(ProblemError, match=message):
        read(jsonl(tmp_path, GOOD + "\n" + second))


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_an_empty_file(tmp_path, text):
    with pytest.raises(ProblemError, match=r"d\.jsonl: the file is empty"):
        read(jsonl(tmp_path, text))


def test_no_file_and_no_text(tmp_path):
    with pytest.raises(RequirementError, match=r"gone\.jsonl: cannot be read"):
        read(Jsonl(path=str(tmp_path / "gone.jsonl")))
    (tmp_path / "latin.jsonl").write_bytes('{"image": "é"}'.encode("latin-1"))
    with pytest.raises(ProblemError, match="is not UTF-8"):
        read(Jsonl(path=str(tmp_path / "latin.jsonl")))


def test_a_missing_picture(tmp_path):
    source = jsonl(tmp_path, GOOD + '{"image": "gone.png"}\n{"image": "too.png"}\n')
    with pytest.raises(RequirementError, match=r"d\.jsonl:2: .*gone\.png is not there") as raised:
        read(source)
    assert "2 of 3 are missing" in str(raised.value)
    assert "images" in str(raised.value)


def test_a_file_that_is_no_picture(tmp_path):
    source = jsonl(tmp_path, GOOD + '{"image": "bad.png"}\n')
    (tmp_path / "bad.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    files = read(source).images
    said = r"d\.jsonl:2: the file .*bad\.png cannot be read as a picture"
    for index in (1, slice(0, 2)):
        with pytest.raises(ProblemError, match=said):
            _ = files[index]
    with pytest.raises(
        ProblemError, match=rf"^{re.escape(str(tmp_path))}/bad\.png: cannot be read as a picture"
    ):
        _ = PictureFiles.of([tmp_path / "bad.png"])[0]


def test_where_a_picture_is_named_is_no_part_of_what_is_cached(tmp_path):
    one, two = read(jsonl(tmp_path, GOOD)).images, str(tmp_path / "two.jsonl")
    Path(two).write_text("\n\n" + GOOD)
    other = replace(one, at=read(Jsonl(path=two, images=str(tmp_path))).images.at)
    assert [str(at).rpartition(":")[2] for at in (*one.at, *other.at)] == ["1", "3"]
    assert one == other
    assert cache.path("a", {"pictures": one}) == cache.path("a", {"pictures": other})
    assert cache.path("a", {"pictures": one}) != cache.path(
        "a", {"pictures": replace(one, pixels=8)}
    )


def test_pictures_of_many_pixels(tmp_path, monkeypatch):
    """Pillow warns of one above a number of pixels, and refuses one above twice that."""
    from PIL import Image

    source = jsonl(tmp_path, GOOD)
    files = read(source).images
    pixels = files[0].shape[1] * files[0].shape[2]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels - 1)
    with pytest.warns(Image.DecompressionBombWarning):  # negative control: it is too large
        Image.open(files.files[0]).close()
    assert files[0].shape[1] * files[0].shape[2] == pixels
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels // 2 - 1)
    with pytest.raises(
        ProblemError, match=rf"d\.jsonl:1: .*a\.png is too large a picture .*{pixels}"
    ):
        _ = files[0]


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pictures_of_32_bit_numbers(tmp_path, mode):
    from PIL import Image

    source = jsonl(tmp_path, '{"image": "deep.tiff"}')
    Image.new(mode, (4, 3)).save(tmp_path / "deep.tiff")
    with pytest.raises(
        ProblemError, match=r"d\.jsonl:1: .*deep\.tiff has 32-bit numbers.* 8 or 16 bits"
    ):
        _ = read(source).images[0]


def test_splits_that_share_a_picture(tmp_path):
    rows = [
        {"image": "a.png", "id": "1", "split": "train"},
        {"image": "b.png", "id": "2", "split": "test"},
        {"image": "./a.png", "id": "3", "split": "test"},
    ]
    source = jsonl(tmp_path, "".join(json.dumps(row) + "\n" for row in rows[:2]))
    assert source.corpus("test", 9, generator=stream(0, "s")).scenes[0].id == "2"
    source = jsonl(tmp_path, "".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ProblemError, match=r"d\.jsonl:3: the picture .* split 'test' is also"):
        source.corpus("test", 9, generator=stream(0, "s"))
    one, other = (jsonl(tmp_path / n, GOOD) for n in _folders(tmp_path, "one", "other"))
    same = Jsonl(path=str(tmp_path / "more.jsonl"), images=str(tmp_path / "one"))
    Path(same.path).write_text(GOOD)
    assert BySplit(train=one, upper=other, test=jsonl(tmp_path, GOOD)).vocabulary
    with pytest.raises(ProblemError, match=r"more\.jsonl:1: .*'test' is also in split 'train'"):
        _ = BySplit(train=one, upper=other, test=same).vocabulary


def _folders(tmp_path, *names):
    for name in names:
        (tmp_path / name).mkdir()
    return names


def test_a_record_without_a_split_among_others_that_have_one(tmp_path):
    source = jsonl(tmp_path, '{"image": "a.png", "split": "test"}\n{"image": "b.png"}\n')
    message = r"d\.jsonl:2: has no 'split', which other records have; must be one of train"
    with pytest.raises(ProblemError, match=message):
        source.corpus("test", 9, generator=stream(0, "s"))
    source = jsonl(tmp_path, '{"image": "a.png", "split": "tset"}\n')
    with pytest.raises(ProblemError, match=r"d\.jsonl:1: 'split' is 'tset'; must be one of train"):
        source.corpus("test", 9, generator=stream(0, "s"))


def test_a_split_without_pictures(tmp_path):
    source = jsonl(tmp_path, '{"image": "a.png", "split": "test"}\n')
    with pytest.raises(ProblemError, match=r"no picture is in split 'train' of 1"):
        source.corpus("train", 9, generator=stream(0, "s"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"portion": (0.5, 0.5)}, "portion"),
        ({"portion": (0.0, 1.5)}, "portion"),
        ({"ask": "Answer."}, "question"),
    ],
)
def test_options_that_cannot_be_met(options, message):
    with pytest.raises(RecipeError, match=message):
        Jsonl(path="x", **options)


def coco(folder, change):
    """COCO's files with one thing changed."""
    files = layouts.coco(folder, {1: [18], 2: [3]}, {1: ["A dog."], 2: ["A car."]})
    for key in ("instances", "captions"):
        value = json.loads(Path(files[key]).read_text())
        change(key, value)
        layouts.document(Path(files[key]), value)
    return Coco(**files)


def _unknown_picture(key, value):
    if key == "captions":
        value["annotations"][1]["image_id"] = 99


def _unknown_category(key, value):
    if key == "instances":
        value["annotations"][0]["category_id"] = 99


def _twice(key, value):
    if key == "instances":
        value["images"].append(value["images"][0])


def _other_name(key, value):
    if key == "captions":
        value["images"][0]["file_name"] = "other.jpg"


def _no_list(key, value):
    if key == "instances":
        del value["categories"]


def _no_caption(key, value):
    if key == "captions":
        del value["annotations"][0]["caption"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _unknown_picture,
            r"captions_val2014\.json:\d+ \(annotations\[1\]\): image_id 99 is about",
        ),
        (_unknown_category, r"instances_val2014\.json:\d+ \(annotations\[0\]\): category_id 99"),
        (_twice, r"instances_val2014\.json:\d+ \(images\[2\]\): image id 1 is taken"),
        (_other_name, r"captions_val2014\.json:\d+ \(images\[0\]\): image id 1 is COCO_val"),
        (_no_list, r"instances_val2014\.json: has no list 'categories'"),
        (_no_caption, r"annotations\[0\]\): has no 'caption'"),
    ],
)
def test_coco_files_that_do_not_fit(tmp_path, change, message):
    assert len(read(coco(tmp_path, lambda key, value: None)).scenes) == 2
    with pytest.raises(ProblemError, match=message):
        read(coco(tmp_path, change))


def test_pope_files_that_do_not_fit(tmp_path):
    files = layouts.coco(tmp_path, {1: [18], 2: [3]}, {1: ["A dog."]})
    about = Coco(**files)

    def pope(rows):
        return Pope(popular=layouts.pope(tmp_path / "p.json", rows), about=about)

    assert len(read(pope([(1, "dog", "yes"), (2, "dog", "no")])).scenes) == 2
    with pytest.raises(ProblemError, match=r"p\.json:2: asks about the picture COCO_val2014_0+9"):
        read(pope([(1, "dog", "yes"), (9, "dog", "no")]))
    with pytest.raises(ProblemError, match=r"p\.json:1: 'label' is 'Y'; must be 'yes' or 'no'"):
        read(pope([(1, "dog", "Y")]))
    rows = [{"question_id": 1, "image": layouts.name_of(1), "text": "t", "label": "no"}] * 2
    source = Pope(random=layouts.lines(tmp_path / "q.json", rows), about=about)
    with pytest.raises(ProblemError, match=r"q\.json:2: question_id 1 is taken; .*q\.json:1"):
        read(source)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("query_all", lambda v: v.append(dict(v[0])), r"query_all\.json:\d+ .*id 1 is taken"),
        ("query_all", lambda v: v[0].update(id=77), r"id 77 has no annotation"),
        (
            "annotations",
            lambda v: v[2].update(truth="y"),
            r"annotations\.json:\d+ .*'truth' is 'y'",
        ),
        ("annotations", lambda v: v[0].update(truth="sea"), r"'truth' is \"sea\"; must be a list"),
        ("relation", lambda v: v.update(sea="water"), r"relation\.json:1: 'sea' is \"water\""),
    ],
)
def test_amber_files_that_do_not_fit(tmp_path, name, change, message):
    files = layouts.amber(tmp_path)
    assert len(read(Amber(**files)).scenes) == 2
    path = tmp_path / f"{name}.json"
    value = json.loads(path.read_text())
    change(value)
    layouts.document(path, value)
    with pytest.raises(ProblemError, match=message):
        read(Amber(**files))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (["Q"], "in pairs"),
        ([], "in pairs"),
        (["Q", "  "], "'value' is blank"),
        (["Q", "<image>"], "'value' is blank"),
    ],
)
def test_llava_conversations_that_do_not_fit(tmp_path, said, message):
    path = layouts.llava(tmp_path, [("1", "a.png", ["Q", "A"]), ("2", "b.png", said)])
    with pytest.raises(ProblemError, match=rf"llava\.json:\d+ \(.*\[1\].*\): .*{message}"):
        read(Llava(path=path))


def test_llava_ids_and_speakers(tmp_path):
    path = layouts.llava(tmp_path, [("1", "a.png", ["Q", "A"]), ("1", "b.png", ["Q", "A"])])
    with pytest.raises(ProblemError, match=r"id '1' is taken by another picture"):
        read(Llava(path=path))
    value = json.loads(Path(path).read_text())[:1]
    value[0]["conversations"].reverse()
    layouts.document(Path(path), value)
    with pytest.raises(ProblemError, match="'from' is 'gpt'; must be 'human'"):
        read(Llava(path=path))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "a.png", "text": "{"}, "'text' is malformed JSON"),
        ({"image": "a.png", "question": "q", "chosen": "c"}, "has no 'rejected'"),
        ({"question": "q", "chosen": "c", "rejected": "r"}, "has no picture"),
        (
            {"image": "a.png", "question": "q", "chosen": "c", "rejected": "c"},
            "the chosen answer is the rejected",
        ),
        (
            {"image": "a.png", "question": "q", "chosen": "c", "rejected": "c "},
            "the chosen answer is the rejected",
        ),
    ],
)
def test_pairs_that_do_not_fit(tmp_path, row, message):
    layouts.pictures(tmp_path, ["a.png"])
    path = layouts.lines(tmp_path / "pairs.jsonl", [row])
    with pytest.raises(ProblemError, match=rf"pairs\.jsonl:1: {message}"):
        read(RlhfV(path=path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1},\n{"a": 2}', r"x\.json:2: malformed JSON: ',' or '\]' expected"),
        ('[{"a": 1}\n{"a": 2}]', r"x\.json:2: malformed JSON"),
        ('[\n3]', r"x\.json:2 \(\[0\]\): must be an object, got 3"),
        ("[]", r"x\.json: holds no entry"),
        ('[{"a": 1},\n', r"x\.json:\d: malformed JSON"),
    ],
)  # fmt: skip
def test_lists_that_are_cut_short(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ProblemError, match=message):
        json_list(str(tmp_path / "x.json"))


@pytest.mark.parametrize(
    "text", ['{"images": [{"id": 1}', '{"images": [{"id": 1}], ', '{"images" [', "[]", "{"]
)
def test_objects_of_lists_that_are_cut_short(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ProblemError, match=r"x\.json:1: "):
        json_lists(str(tmp_path / "x.json"), ["images"])


def test_lists_are_read_whatever_the_spacing(tmp_path):
    value = {"info": {"a": [1, {"b": "]"}]}, "images": [], "annotations": [{"id": 1}, {"id": 2}]}
    for indent in (None, 2):
        (tmp_path / "x.json").write_text("\ufeff" + json.dumps(value, indent=indent) + "\n")
        found = json_lists(str(tmp_path / "x.json"), ["images", "annotations"])
        assert [entry.value["id"] for entry in found["annotations"]] == [1, 2]
        assert found["images"] == []
    assert str(found["annotations"][1]).endswith("x.json:15 (annotations[1])")
