"""The published layouts and our own, as small files: what is read from each."""

import json

import pytest
import torch

from bilevel.errors import ProblemError, RecipeError
from bilevel.registry.build import build
from bilevel.rng import stream
from bilevel_problems.mllm_hft.evaluation.questions import questions
from bilevel_problems.mllm_hft.evaluation.reports import Findings, report_captions
from bilevel_problems.mllm_hft.sources.amber import Amber
from bilevel_problems.mllm_hft.sources.by_split import BySplit
from bilevel_problems.mllm_hft.sources.coco import Coco
from bilevel_problems.mllm_hft.sources.coco_objects import NAMES, SYNONYMS
from bilevel_problems.mllm_hft.sources.files import read_synonyms
from bilevel_problems.mllm_hft.sources.jsonl import Jsonl
from bilevel_problems.mllm_hft.sources.llava import Llava
from bilevel_problems.mllm_hft.sources.mentions import Lexicon
from bilevel_problems.mllm_hft.sources.naming import united
from bilevel_problems.mllm_hft.sources.pictures import read_picture
from bilevel_problems.mllm_hft.sources.pope import Pope
from bilevel_problems.mllm_hft.sources.protocol import KINDS, Simulator, Source
from bilevel_problems.mllm_hft.sources.rlhf_v import RlhfV
from bilevel_problems.mllm_hft.sources.shapes import Shapes
from tests.problems.mllm_hft.sources import layouts
from tests.problems.mllm_hft.sources.layouts import name_of

COCO = Lexicon(NAMES, {name: words for name, words in SYNONYMS.items() if words})


def whole(source, split="test", size=100):
    """All pictures of a source of files."""
    return source.gather(source.reading.records, size, stream(0, "whole"), split)


def by_id(corpus):
    return {scene.id: scene for scene in corpus.scenes}


def own(folder, **changes):
    layouts.pictures(folder, ["a.png", "b.png"])
    rows = [
        {"image": "a.png", "caption": "A dog on a couch.", "objects": ["dog", "couch"]},
        {
            "id": "two", "image": "b.png", "caption": "Two cats.", "objects": {"cat": 2},
            "hallucinated": {"count": "Three cats."},
            "questions": [{"text": "Is there a dog?", "answer": "No", "name": "dog"}],
            "conversation": [["What is there?", "Two cats."]],
        },
    ]  # fmt: skip
    return Jsonl(path=layouts.lines(folder / "data.jsonl", rows), **changes)


def test_jsonl(tmp_path):
    source = own(tmp_path)
    corpus = whole(source)
    first, second = corpus.scenes
    assert (first.id, first.caption, first.names) == (
        "a.png", "A dog on a couch.", {"dog", "couch"}
    )  # fmt: skip
    assert set(source.vocabulary) == {"dog", "couch", "cat"}
    assert first.annotated
    assert second.hallucinated["count"] == "Three cats."  # its own, and others beside it
    assert second.hallucinated["object"] in ("Two dogs.", "Two couches.")
    assert second.turns == (("What is there?", "Two cats."),)
    (question,) = second.questions
    assert (question.answer, question.group, question.name) == (False, "own", "dog")
    assert first.instruction == "Describe this image."


def test_an_object_of_number_0_is_not_there(tmp_path):
    layouts.pictures(tmp_path, ["a.png"])
    row = {"image": "a.png", "caption": "A dog.", "objects": {"dog": 1, "cat": 0}}
    source = Jsonl(path=layouts.lines(tmp_path / "data.jsonl", [row]))
    (scene,) = whole(source).scenes
    assert scene.names == {"dog"}


@pytest.mark.parametrize("name", ["grey.png", "grey.tiff", "grey.pgm"])
def test_grey_of_16_bits(tmp_path, name):
    """Black, dark, middle, white."""
    from PIL import Image

    grey = torch.tensor([0, 257 * 3, 257 * 128, 65535], dtype=torch.int32)
    deep = Image.frombytes("I;16", (4, 1), grey.to(torch.uint16).numpy().tobytes())
    deep.save(tmp_path / name)
    seen = read_picture(str(tmp_path / name))
    assert seen[:, 0].tolist() == [[0, 3, 128, 255]] * 3


def test_pictures_are_read_when_asked_for_and_of_any_size(tmp_path):
    corpus = whole(own(tmp_path))
    assert [tuple(image.shape) for image in corpus.images] == [(3, 8, 10), (3, 10, 11)]
    assert corpus.images[0][:, 0, 0].tolist() == [0, 100, 200]
    assert [i.shape[2] for i in corpus.images[0:2]] == [10, 11]
    (tmp_path / "a.png").unlink()
    assert corpus.images[1].shape == (3, 10, 11)
    with pytest.raises(ProblemError, match=r"data\.jsonl:1: .*a\.png cannot be read"):
        corpus.images[0]


def test_pictures_of_one_size_are_one_tensor(tmp_path):
    images = whole(own(tmp_path, pixels=8)).images
    assert images.shape == (2, 3, 8, 8)
    assert images[0:2].shape == (2, 3, 8, 8)
    assert images[0:0].shape == (0, 3, 8, 8)
    with pytest.raises(ProblemError, match=r"source\.pixels"):
        _ = whole(own(tmp_path)).images.shape


def test_cached_features_follow_the_file(tmp_path):
    from bilevel_problems.mllm_hft.models.cache import path

    before = whole(own(tmp_path)).images
    again = whole(own(tmp_path)).images
    assert path("x", {"i": before}) != path("x", {"i": again})  # written anew by `own`
    same = whole(Jsonl(path=str(tmp_path / "data.jsonl"))).images
    assert path("x", {"i": again}) == path("x", {"i": same})


def test_coco_with_chairs_truth(tmp_path):
    files = layouts.coco(
        tmp_path,
        {1: [18, 18], 2: [3], 3: []},
        {1: ["A man walks two puppies.", "Dogs."], 2: ["An automobile."], 3: ["Nothing."]},
    )
    corpus = whole(Coco(**files))
    scenes = by_id(corpus)
    assert scenes["1"].names == {"dog", "person"}  # instances, and what captions name
    assert scenes["1"].caption == "A man walks two puppies."
    assert scenes["2"].names == {"car"}
    assert all(scene.annotated for scene in corpus.scenes)
    assert corpus.lexicon.names("a puppy and ladies") == ("dog", "person")
    assert "1 of 3 captions name no known object" in corpus.notes
    assert corpus.images.files[0].endswith(name_of(1))


def test_coco_without_captions_writes_them_and_without_instances_asks_nothing(tmp_path):
    files = layouts.coco(tmp_path, {1: [18, 18, 3]}, {1: ["A dog."]})
    (scene,) = whole(Coco(images=files["images"], instances=files["instances"])).scenes
    assert scene.caption == "There are two dogs and a car."
    (scene,) = whole(Coco(images=files["images"], captions=files["captions"])).scenes
    assert (scene.caption, scene.annotated, scene.names) == ("A dog.", False, {"dog"})
    with pytest.raises(RecipeError, match="instances, captions, or both"):
        Coco(images=files["images"])


def test_pope_alone_and_about_coco(tmp_path):
    files = layouts.coco(tmp_path, {1: [18], 2: [17], 3: [3]}, {1: ["A dog."], 2: ["A cat."]})
    asked = {
        "random": layouts.pope(tmp_path / "r.json", [(1, "dog", "yes"), (1, "fire hydrant", "no")]),
        "adversarial": layouts.pope(tmp_path / "a.json", [(1, "cat", "no"), (2, "cat", "yes")]),
    }
    source = Pope(**asked, about=Coco(**files), ask="{question} Answer yes or no.")
    scenes = by_id(whole(source))
    assert set(scenes) == {"1", "2"}  # the third is not asked about
    groups = [(q.group, q.name, q.answer) for q in scenes["1"].questions]
    assert groups == [
        ("pope_random", "dog", True),
        ("pope_random", "fire hydrant", False),
        ("pope_adversarial", "cat", False),
    ]
    assert scenes["1"].questions[0].text == "Is there a dog in the image? Answer yes or no."
    assert (scenes["1"].caption, scenes["1"].annotated) == ("A dog.", True)
    alone = Pope(**asked, images=files["images"])
    scene = by_id(whole(alone))[name_of(1)]
    assert (scene.annotated, scene.names, scene.caption) == (False, {"dog"}, "")
    with pytest.raises(RecipeError, match="random, popular or adversarial"):
        Pope()


def test_amber(tmp_path):
    source = Amber(**layouts.amber(tmp_path))
    corpus = whole(source)
    first, second = corpus.scenes
    assert (first.names, first.lures) == ({"sea", "beach"}, {"boat"})
    assert [(q.group, q.answer) for q in first.questions] == [
        ("amber_attribute", True), ("amber_existence", False)
    ]  # fmt: skip
    assert second.questions[0].group == "amber_relation"
    assert corpus.association.of("sea") == {"sea", "water"}
    assert corpus.association.safe == {"picture", "scene"}
    assert corpus.lexicon.names("Ships on the water.") == ("ship", "water")
    assert first.instruction == "Describe this image."


@pytest.mark.parametrize("form", ["text as json", "text as object", "flat"])
def test_rlhf_v(tmp_path, form):
    layouts.pictures(tmp_path, ["a.png"])
    pair = {"question": "Is it a dog?", "chosen": "Yes, a dog.", "rejected": "A cat."}
    text = {
        "text as json": {"text": json.dumps(pair), "image_path": "a.png"},
        "text as object": {"text": pair, "image": "a.png"},
        "flat": {**pair, "image": {"path": "a.png", "bytes": None}},
    }[form]
    path = layouts.document(tmp_path / "pairs.json", [{"idx": 7, **text}])
    source = RlhfV(path=path, alter=False)
    (scene,) = whole(source).scenes
    assert (scene.id, scene.caption, scene.hallucinated) == (
        "7", "Yes, a dog.", {"other": "A cat."}
    )  # fmt: skip
    assert scene.turns == (("Is it a dog?", "Yes, a dog."),)
    assert source.kinds == ("other",)
    assert RlhfV(path=path).kinds == (*KINDS, "other")


def test_llava(tmp_path):
    path = layouts.llava(
        tmp_path,
        [
            ("1", "a.png", ["<image>\nWhat is it?", "A dog.", "Describe the scene.", "It sleeps."]),
            ("1", "a.png", ["How many?\n<image>", "One of them, I believe."]),
        ],
    )
    entries = [*json.loads((tmp_path / "llava.json").read_text()), {"id": "t", "conversations": []}]
    layouts.document(tmp_path / "llava.json", entries)
    corpus = whole(Llava(path=path))
    first, second = corpus.scenes
    assert (first.id, second.id) == ("1", "1#2")
    assert first.turns[0] == ("What is it?", "A dog.")
    assert (first.instruction, first.caption) == ("Describe the scene.", "It sleeps.")
    assert second.caption == "One of them, I believe."
    assert not first.annotated
    assert "1 of 3 entries have no picture" in corpus.notes


def test_pictures_of_llava_come_from_their_folders(tmp_path):
    for folder in ("coco/train", "gqa"):
        (tmp_path / folder).mkdir(parents=True)
    said = [(str(i), name, ["What is it?", "A dog."]) for i, name in enumerate(FOLDERS)]
    path = layouts.llava(tmp_path, said)
    assert [s.origin for s in whole(Llava(path=path, by_folder=True)).scenes] == ["coco", "gqa", ""]
    assert [s.origin for s in whole(Llava(path=path)).scenes] == ["", "", ""]


FOLDERS = ("coco/train/1.png", "gqa/2.png", "3.png")


def test_a_line_says_its_origin(tmp_path):
    rows = [{"image": f"{i}.png", "caption": "A dog."} for i in range(2)]
    layouts.pictures(tmp_path, ["0.png", "1.png"])
    path = layouts.lines(tmp_path / "d.jsonl", [{**rows[0], "origin": "web"}, rows[1]])
    assert [s.origin for s in whole(Jsonl(path=path)).scenes] == ["web", ""]
    with pytest.raises(ProblemError, match=r"d\.jsonl:1: 'origin'"):
        whole(Jsonl(path=layouts.lines(tmp_path / "d.jsonl", [{**rows[0], "origin": 3}])))


def test_a_published_synonyms_file(tmp_path):
    (tmp_path / "synonyms.txt").write_text("person, girl, guy\n\ndog, puppy\ncell phone, phone\n")
    lexicon = read_synonyms(str(tmp_path / "synonyms.txt"))
    assert lexicon.vocabulary == ("person", "dog", "cell phone")
    assert lexicon.names("guys with phones and a cat") == ("person", "cell phone")
    files = layouts.coco(tmp_path, {1: [18]}, {1: ["A guy."]})
    corpus = whole(Coco(**files, synonyms=str(tmp_path / "synonyms.txt")))
    assert corpus.scenes[0].names == {"dog", "person"}


def parts(tmp_path):
    files = layouts.coco(tmp_path / "coco", {i: [18] for i in range(1, 5)}, {1: ["A dog."]})
    questions = layouts.pope(tmp_path / "pope.json", [(1, "dog", "yes"), (1, "cat", "no")])
    talk = layouts.llava(
        tmp_path / "llava",
        [("1", "x.png", ["Describe.", "A red car."]), ("2", "y.png", ["Q", "A"])],
    )
    return BySplit(
        train=Llava(path=talk),
        upper=own(tmp_path),
        test=Pope(random=questions, about=Coco(**files)),
    )


def test_layouts_are_combined_by_split(tmp_path):
    source = parts(tmp_path)
    assert isinstance(source, Source)
    assert not isinstance(source, Simulator)
    sizes = {s: len(source.corpus(s, 9, generator=stream(0, s)).scenes) for s in ("train", "upper")}
    assert sizes == {"train": 2, "upper": 2}
    corpus = source.corpus("test", 1, generator=stream(0, "t"))
    assert [q.group for q in corpus.scenes[0].questions] == ["pope_random", "pope_random"]
    assert {"car", "dog", "cat", "couch"} <= set(source.vocabulary)
    assert source.vocabulary[0] == "car"  # the most frequent of training data
    with pytest.raises(ProblemError, match="no development"):
        source.corpus("development", 1, generator=stream(0, "d"))
    with pytest.raises(RecipeError, match=r"by_split\.train = Shapes"):
        BySplit(train=Shapes(), upper=source.upper, test=source.test)


def test_a_recipe_names_layouts(tmp_path):
    files = layouts.coco(tmp_path, {1: [18]}, {1: ["A dog."]})
    layouts.lines(tmp_path / "unread.json", ["not what it should be"])
    files["instances"] = str(tmp_path / "unread.json")
    source = {"name": "by_split", "train": {"name": "coco", **files, "portion": [0.0, 0.5]}}
    source |= {"upper": {"name": "coco", **files, "portion": [0.5, 1.0]}}
    source |= {"test": {"name": "pope", "random": "r.json", "about": {"name": "coco", **files}}}
    built = build("mllm_sources", source)
    assert isinstance(built, BySplit)
    assert built.train.portion == (0.0, 0.5)
    assert isinstance(built.test.about, Coco)
    assert isinstance(built, Source)
    with pytest.raises(ProblemError, match=r"unread\.json:1"):  # only now is a file opened
        _ = built.vocabulary


def test_a_split_is_a_part_of_one_file_or_said_in_it(tmp_path):
    names = [f"{i}.png" for i in range(60)]
    layouts.pictures(tmp_path, names)
    path = layouts.lines(tmp_path / "d.jsonl", [{"image": n, "caption": "A dog."} for n in names])
    source = Jsonl(path=path)
    found = {
        split: {s.id for s in source.corpus(split, 100, generator=stream(0, "s")).scenes}
        for split in ("train", "upper", "development", "test")
    }
    assert set().union(*found.values()) == set(names)
    assert sum(map(len, found.values())) == 60
    assert len(found["train"]) > 30
    said = [{"image": n, "split": "test" if n < "3" else "train"} for n in names]
    source = Jsonl(path=layouts.lines(tmp_path / "said.jsonl", said))
    ids = {s.id for s in source.corpus("test", 100, generator=stream(0, "s")).scenes}
    assert ids == {n for n in names if n < "3"}


def test_fewer_pictures_than_asked_are_said_and_more_are_drawn_by_the_generator(tmp_path):
    names = [f"{i}.png" for i in range(20)]
    layouts.pictures(tmp_path, names)
    source = Jsonl(path=layouts.lines(tmp_path / "d.jsonl", [{"image": n} for n in names]))

    def drawn(seed):
        corpus = source.gather(source.reading.records, 5, stream(seed, "d"), "train")
        return [scene.id for scene in corpus.scenes]

    assert len(drawn(0)) == 5
    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)
    assert drawn(0) == sorted(drawn(0), key=names.index)
    assert "train: 30 pictures asked for, 20 are there" in whole(source, "train", 30).notes


def test_shapes_are_told_the_split_and_draw_as_before():
    source, generator = Shapes(), stream(0, "scenes.train")
    corpus = source.corpus("train", 5, generator=generator)
    generator = stream(0, "scenes.train")
    scenes = source.scenes(5, biased=True, generator=generator)
    expected = source.render(scenes, generator)
    assert corpus.scenes == expected.scenes
    assert torch.equal(torch.as_tensor(corpus.images), torch.as_tensor(expected.images))
    upper = source.corpus("upper", 5, generator=stream(0, "scenes.train")).scenes
    assert upper == source.scenes(5, biased=False, generator=stream(0, "scenes.train"))


def listing(folder, rows, **options):
    """Pictures with the objects and captions that rows give."""
    folder.mkdir(exist_ok=True)
    rows = [{"image": f"{i}.png", **row} for i, row in enumerate(rows)]
    layouts.pictures(folder, [row["image"] for row in rows])
    return Jsonl(path=layouts.lines(folder / "d.jsonl", rows), **options)


def chair_of(corpus, *said):
    found = Findings()
    texts = [*said]
    report_captions(found, texts, [True] * len(texts), corpus.scenes, corpus.lexicon)
    return found.metrics["chair/chair_i"], found.metrics["chair/coverage"]


def test_listed_objects_are_read_as_captions_are(tmp_path):
    (tmp_path / "words.txt").write_text("dog, puppy\ncat\n")
    rows = [{"objects": ["puppy"]}, {"objects": ["Cats", "dragon"]}]
    source = listing(tmp_path / "a", rows, synonyms=str(tmp_path / "words.txt"))
    corpus = whole(source)
    assert [scene.names for scene in corpus.scenes] == [{"dog"}, {"cat", "dragon"}]
    assert set(source.vocabulary) == {"dog", "cat", "dragon"}
    assert chair_of(corpus, "A puppy.", "A cat, a dragon.") == (0, 1)
    assert chair_of(corpus, "A cat.", "A puppy.") == (1, 0)  # negative control


def test_a_name_is_one_whatever_its_case_and_number(tmp_path):
    rows = [
        {"objects": ["Dog", "cats"]}, {"objects": ["dog", "dogs"]}, {"objects": ["cat", "TVs"]},
        {"objects": ["Forklift", "cell-phone"]}, {"objects": ["forklifts", "glasses"]},
    ]  # fmt: skip
    source = listing(tmp_path / "a", rows)
    corpus = whole(source)
    assert [scene.names for scene in corpus.scenes] == [
        {"dog", "cat"}, {"dog"}, {"cat", "tv"}, {"Forklift", "cell phone"}, {"Forklift", "glasses"},
    ]  # fmt: skip
    assert source.vocabulary == ("dog", "Forklift", "cat", "tv", "cell phone", "glasses")
    asked = questions(
        corpus.scenes, strategy="popular", vocabulary=source.vocabulary, per_scene=6,
        generator=stream(0, "q"),
    )  # fmt: skip
    texts = {(q.scene, q.name, q.answer): q.text for q in asked}
    assert texts[0, "cat", True] == "Is there a cat in the image?"
    assert not any(q.name == "cat" and not q.answer and q.scene in (0, 2) for q in asked)
    apart = listing(tmp_path / "b", [{"objects": ["glass"]}, {"objects": ["bus", "puppy", "dog"]}])
    assert apart.vocabulary == ("bus", "dog", "glass", "puppy")  # listed apart: a name each


def test_splits_are_read_with_the_words_of_all(tmp_path):
    train = listing(tmp_path / "a", [{"objects": ["car", "Dogs", "cab"]}])
    upper = listing(tmp_path / "b", [{"objects": ["zebra"], "caption": "A zebra."}])
    rows = [{"objects": ["cat", "dog"], "caption": "A cat by a car that is no bus."}]
    source = BySplit(train=train, upper=upper, test=listing(tmp_path / "c", rows))
    corpus = source.corpus("test", 9, generator=stream(0, "t"))
    assert corpus.scenes[0].names == {"cat", "dog", "car"}
    assert set(corpus.lexicon.vocabulary) == {"car", "cab", "dog", "zebra", "cat"}
    assert chair_of(corpus, "A cat, a dog, a van and a zebra.") == (1 / 4, 1)
    (scene,) = source.corpus("train", 9, generator=stream(0, "t")).scenes
    assert scene.names <= set(source.vocabulary)
    # the words of a file of synonyms are all that counts where it is given
    (tmp_path / "words.txt").write_text("cat\ndog\n")
    test = listing(tmp_path / "c", rows, synonyms=str(tmp_path / "words.txt"))
    corpus = BySplit(train=train, upper=upper, test=test).corpus(
        "test", 9, generator=stream(0, "t")
    )
    assert chair_of(corpus, "A cat, a dog, a van and a zebra.") == (0, 1)


def test_a_word_for_another_splits_name_is_that_name():
    one = Lexicon(("dog", "cat"), {"dog": ("puppy",)})
    other = Lexicon(("Puppy", "TV", "cats"), {"Puppy": ("pup",)})
    both = united([one, other])
    assert both.vocabulary == ("dog", "cat", "tv")
    assert both.names("a pup, puppies, cats and TVs") == ("dog", "dog", "cat", "tv")
    assert united([one, one]) == one  # negative control
    turned = Lexicon(("puppy",), {"puppy": ("dog",)})
    assert united([Lexicon(("dog",), {"dog": ("puppy",)}), turned]).names("puppy, dog") in (
        ("dog", "dog"), ("puppy", "puppy")
    )  # fmt: skip
    assert united([COCO, Lexicon(NAMES, SYNONYMS)]) == COCO


def test_amber_is_measured_with_its_own_words(tmp_path):
    train = listing(tmp_path / "a", [{"objects": ["car"]}])
    upper = listing(tmp_path / "b", [{"objects": ["zebra"]}])
    (tmp_path / "amber").mkdir()
    source = BySplit(train=train, upper=upper, test=Amber(**layouts.amber(tmp_path / "amber")))
    corpus = source.corpus("test", 9, generator=stream(0, "t"))
    assert corpus.lexicon.names("A car on the sea.") == ("sea",)
    lexicon = source.corpus("train", 9, generator=stream(0, "t")).lexicon
    assert lexicon.names("A car on the sea, a zebra.") == ("car", "zebra")


def test_what_reference_captions_deny_is_not_there(tmp_path):
    files = layouts.coco(
        tmp_path,
        {1: [17], 2: [17]},
        {1: ["A cat on a road with no car in sight."], 2: ["A cat by a car, without a dog."]},
    )
    corpus = whole(Coco(**files))
    scenes = by_id(corpus)
    assert scenes["1"].names == {"cat"}
    assert scenes["2"].names == {"cat", "car"}
    for scene in corpus.scenes:
        assert "no car" in scene.hallucinated.get("object", "no car") or scene.id == "2"
        assert "person" in scene.hallucinated["object"] or "dog" in scene.hallucinated["object"]
    assert chair_of(corpus, "no car", "")[0] == 1  # of what a model says every mention counts


def test_the_mark_for_the_picture_is_no_word(tmp_path):
    row = {
        "caption": "<image> A dog.",
        "captions": ["Dogs.<image>"],
        "hallucinated": {"object": "<image>\nA cat."},
        "questions": [{"text": "<image>\nIs it?", "answer": "yes"}],
        "conversation": [["<image>\nWhat is there?", "A dog. "]],
    }
    (scene,) = whole(listing(tmp_path / "a", [row])).scenes
    assert (scene.caption, scene.hallucinated["object"]) == ("A dog.", "A cat.")
    assert scene.turns == (("What is there?", "A dog. "),)  # else as it is written
    assert scene.questions[0].text == "Is it?"
    assert str(scene.at) == f"{tmp_path / 'a' / 'd.jsonl'}:1"
    pair = {"image": "0.png", "question": "<image>\nWhat?", "chosen": "A.", "rejected": "B."}
    path = layouts.lines(tmp_path / "a" / "pairs.jsonl", [pair])
    assert whole(RlhfV(path=path, alter=False)).scenes[0].turns == (("What?", "A."),)
