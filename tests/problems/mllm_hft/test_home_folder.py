"""Every option that names a file or a folder may begin at the home folder."""

import pytest
import torch
from PIL import Image

from bilevel.errors import RequirementError
from bilevel.rng import stream
from bilevel_problems.mllm_hft.models.checkpoint import Checkpoint
from bilevel_problems.mllm_hft.models.smollm2 import SmolLM2
from bilevel_problems.mllm_hft.sources.jsonl import Jsonl
from bilevel_problems.mllm_hft.sources.photos import Photos
from bilevel_problems.mllm_hft.sources.shapes import Shapes


def test_what_is_looked_for_is_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert SmolLM2(file="~/mine")._file == tmp_path / "mine"
    with pytest.raises(RequirementError, match=f"{tmp_path}/mine"):
        _ = Photos(folder="~/mine")._cutouts
    pytest.importorskip("transformers")
    with pytest.raises(RequirementError, match=f"{tmp_path}/mine: there is no such folder"):
        list(Checkpoint(path="~/mine").open(Shapes(), None, 0))


def test_files_of_pictures_are_read_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "mine" / "a.png")
    (tmp_path / "d.jsonl").write_text('{"image": "a.png", "caption": "A dog."}\n')
    (tmp_path / "words.txt").write_text("dog, puppy\n")
    source = Jsonl(path="~/d.jsonl", images="~/mine", synonyms="~/words.txt")
    found = source.gather(source.reading.records, 1, stream(0, "r"), "test")
    assert torch.equal(found.images[0], torch.zeros(3, 8, 8, dtype=torch.uint8))


def test_a_user_who_is_not_there_is_a_missing_file(tmp_path):
    with pytest.raises(RequirementError, match=r"~nobody-of-this-name/d\.jsonl: cannot be read"):
        _ = Jsonl(path="~nobody-of-this-name/d.jsonl").reading
