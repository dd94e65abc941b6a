"""The cache returns what was kept, under a key that sees every difference, or nothing at all."""

import json

import pytest
import torch

from bilevel.errors import RequirementError
from bilevel.events import Progress
from bilevel.runfolder import arithmetic
from bilevel_problems.mllm_hft.models import cache
from bilevel_problems.mllm_hft.sources.protocol import Thing

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(7, dtype=torch.int64)}
KEY = {"layers": 2, "data": torch.ones(3), "thing": Thing("ring", None, 0.5, 0.5)}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("BILEVEL_CACHE", str(tmp_path))
    return tmp_path


class Maker:
    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        yield Progress("making", 1, 1)
        return TENSORS


def drain(generator):
    events = []
    while True:
        try:
            events.append(next(generator))
        except StopIteration as end:
            return events, end.value


def assert_same(got):
    assert got.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert torch.equal(got[name], value)
        assert got[name].dtype == value.dtype


def test_makes_once_and_reads_the_same_bits_afterwards():
    make = Maker()
    events, first = drain(cache.cached("kind", KEY, make))
    again, second = drain(cache.cached("kind", KEY, make))
    assert (len(events), len(again), make.calls) == (1, 0, 1)
    assert_same(first)
    assert_same(second)


def test_what_a_study_asks_to_be_computed_alike_is_not_taken_from_elsewhere(monkeypatch):
    """What pre-training comes to depends on the last digits, of which no option of a recipe tells."""
    make = Maker()
    for asked in (None, "avx2, 1 thread", "avx2, 2 threads", "avx2, 1 thread"):
        if asked:
            monkeypatch.setenv(arithmetic.NAMED, asked)
        drain(cache.cached("kind", KEY, make))
    assert make.calls == 3
    monkeypatch.delenv(arithmetic.NAMED)
    assert cache.load("kind", KEY) is not None  # what was there before is found as before


@pytest.mark.parametrize(
    "other",
    [
        {"layers": 3},
        {"layers": 2.5},
        {"data": torch.tensor([1.0, 1.0, 1.0 + 1e-6])},
        {"data": torch.ones(3, 1)},
        {"data": torch.ones(3, dtype=torch.float64)},
        {"thing": Thing("ring", "red", 0.5, 0.5)},
        {"more": None},
    ],
)
def test_a_different_key_finds_nothing(other):
    cache.save("kind", KEY, TENSORS)
    assert cache.load("kind", KEY | other) is None
    assert cache.load("other", KEY) is None
    assert cache.load("kind", dict(reversed(KEY.items()))) is not None  # order says nothing


@pytest.mark.parametrize("position", [-1, -9, 40])
def test_an_altered_byte_is_seen_and_the_file_made_again(position):
    make = Maker()
    drain(cache.cached("kind", KEY, make))
    file = cache.path("kind", KEY)
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)
    _, got = drain(cache.cached("kind", KEY, make))
    assert make.calls == 2
    assert_same(got)
    assert cache.load("kind", KEY) is not None


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_file_cut_short_is_made_again(kept):
    make = Maker()
    drain(cache.cached("kind", KEY, make))
    file = cache.path("kind", KEY)
    file.write_bytes(file.read_bytes()[:kept])
    drain(cache.cached("kind", KEY, make))
    assert make.calls == 2


def test_a_maker_that_fails_leaves_nothing_behind(folder):
    def broken():
        yield Progress("making", 0, 1)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        drain(cache.cached("kind", KEY, broken))
    assert not [path for path in folder.rglob("*") if path.is_file()]


def test_only_the_finished_file_stays_and_it_says_what_it_is(folder):
    cache.save("kind", KEY, TENSORS)
    (file,) = [path for path in folder.rglob("*") if path.is_file()]
    size = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + size])["__metadata__"]
    assert json.loads(header["key"])["layers"] == 2


def test_tied_weights_are_kept():
    weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    cache.save("kind", KEY, {"a": weight, "b": weight})
    found = cache.load("kind", KEY)
    assert found is not None
    assert torch.equal(found["a"], found["b"])


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("BILEVEL_CACHE", str(blocked))
    with pytest.raises(RequirementError, match="BILEVEL_CACHE"):
        cache.save("kind", KEY, TENSORS)


def test_a_key_that_cannot_be_hashed_is_refused():
    with pytest.raises(TypeError, match="cache key"):
        cache.path("kind", {"f": object()})


def test_where_the_folder_is(monkeypatch, tmp_path):
    assert cache.folder() == tmp_path
    monkeypatch.delenv("BILEVEL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.folder() == tmp_path / "xdg" / "bilevel"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.folder() == tmp_path / "home" / ".cache" / "bilevel"
