"""Encoded features lie in a file that is whole or not there, and what a run reads is a map of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bilevel.errors import RequirementError
from bilevel.rng import stream
from bilevel_problems.mllm_hft import memory
from bilevel_problems.mllm_hft.memory import SHARE
from bilevel_problems.mllm_hft.models import cache
from bilevel_problems.mllm_hft.models.features import KIND, encoded
from bilevel_problems.mllm_hft.models.pictures import Picture, Pictures, stack

KEY = {"pictures": "five"}
CPU = torch.device("cpu")
MAPS = Path("/proc/self/maps")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("BILEVEL_CACHE", str(tmp_path))
    return tmp_path


def five(dtype: torch.dtype = torch.float32, widths=(3, 1, 4, 2, 4)) -> list[Picture]:
    """Pictures of different widths, with layout and grid where they have one."""
    generator = stream(0, "features")
    return [
        Picture(
            torch.randn(width, 6, generator=generator).to(dtype),
            torch.arange(width) - 1,
            torch.arange(3 * width).reshape(width, 3),
        )
        for width in widths
    ]


class Encoder:
    """Pictures of a part, and which parts were asked for; stops before the picture `until`."""

    def __init__(self, pictures: list[Picture], until: int = 99) -> None:
        self.pictures, self.until, self.parts = pictures, until, []

    def __call__(self, part: slice) -> list[Picture]:
        self.parts.append((part.start, part.stop))
        if part.stop > self.until:
            raise InterruptedError("stopped")
        return [
            Picture(p.features.clone(), p.layout, p.grid)  # made here, so that they are measured
            for p in self.pictures[part]
        ]


def drain(encode: Encoder, most: int = 2, held: int = 0) -> Pictures:
    work = encoded(KEY, len(encode.pictures), encode, most=most, held=held, device=CPU)
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


def is_map_of(value: Tensor, file: Path) -> bool:
    """Whether the memory of a tensor is mapped from the file."""
    for line in MAPS.read_text().splitlines():
        low, high = (int(end, 16) for end in line.split()[0].split("-"))
        if low <= value.data_ptr() < high:
            return line.endswith(str(file))
    raise AssertionError("no memory at all")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("widths", [(3, 1, 4, 2, 4), (4, 4, 4, 4, 4)])
def test_features_in_the_file_are_those_in_memory(dtype, widths):
    pictures = five(dtype, widths)
    expected, found = stack(pictures), drain(Encoder(pictures))
    assert found.tensors().keys() == expected.tensors().keys()
    for name, value in expected.tensors().items():
        assert torch.equal(found.tensors()[name], value), name
        assert found.tensors()[name].dtype == value.dtype
    index = torch.tensor([4, 1, 0])
    for name, value in expected.take(index).items():
        assert torch.equal(found.take(index)[name], value)


@pytest.mark.skipif(not MAPS.exists(), reason="this system does not list a process's mappings")
def test_features_are_a_map_of_the_file():
    pictures = five()
    found, file = drain(Encoder(pictures)), cache.path(KIND, KEY)
    assert is_map_of(found.features, file)
    assert is_map_of(drain(Encoder(pictures)).features, file)  # a resumed run reads the same
    assert not is_map_of(found.take(torch.tensor([0, 1]))["features"], file)  # a batch is a copy
    assert not is_map_of(stack(pictures).features, file)
    before = file.read_bytes()
    found.features.zero_()
    assert file.read_bytes() == before  # what is written into them stays in the process


def test_they_are_encoded_once(folder):
    first, again = Encoder(five()), Encoder(five())
    drain(first)
    drain(again)
    assert first.parts == [(0, 1), (0, 2), (2, 4), (4, 5)]  # the first is measured beforehand
    assert again.parts == []
    assert [path.suffix for path in folder.rglob("*") if path.is_file()] == [".safetensors"]


def test_an_interrupted_write_is_not_taken_for_whole(folder, monkeypatch):
    with pytest.raises(InterruptedError):
        drain(Encoder(five(), until=3))
    assert not [path for path in folder.rglob("*") if path.is_file()]

    def full(*args: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(cache, "content", full)
        with pytest.raises(
            RequirementError, match=r"features: the cache cannot be written \(no space"
        ):
            drain(Encoder(five()))
    assert not [path for path in folder.rglob("*") if path.is_file()]
    encode = Encoder(five())
    assert torch.equal(drain(encode).features, stack(five()).features)
    assert encode.parts[-1] == (4, 5)


@pytest.mark.parametrize("damage", ["cut", "altered"])
def test_a_damaged_file_is_made_again(damage):
    drain(Encoder(five()))
    file = cache.path(KIND, KEY)
    content = bytearray(file.read_bytes())
    if damage == "cut":
        content = content[:-7]
    else:
        content[-40] ^= 1
    file.write_bytes(content)
    encode = Encoder(five())
    assert torch.equal(drain(encode).features, stack(five()).features)
    assert encode.parts
    assert cache.load(KIND, KEY) is not None


def test_as_many_pictures_at_a_time_as_memory_has_room_for(monkeypatch):
    """A picture of 4 places takes 96 bytes: 250 hold two of them, and one beside weights of 100."""
    pictures = five(widths=(4,) * 5)
    for room, held, size in ((250, 0, 2), (250, 100, 1), (1, 0, 1), (10_000, 0, 4), (None, 0, 4)):
        scaled = None if room is None else round(room / SHARE)
        monkeypatch.setattr(memory, "capacity", lambda device, scaled=scaled: scaled)
        cache.path(KIND, KEY).unlink(missing_ok=True)
        encode = Encoder(pictures)
        assert torch.equal(drain(encode, most=4, held=held).features, stack(pictures).features)
        assert encode.parts[1] == (0, size), room
    # a picture that turns out wider than the first makes the parts behind it smaller
    monkeypatch.setattr(memory, "capacity", lambda device: round(200 / SHARE))
    cache.path(KIND, KEY).unlink()
    encode = Encoder(five(widths=(4, 8, 4, 4, 4)))
    drain(encode, most=4)
    assert encode.parts == [(0, 1), (0, 2), (2, 3), (3, 4), (4, 5)]
