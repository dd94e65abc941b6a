"""What is counted without data is what autograd saves with data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bilevel.errors import RequirementError
from bilevel.rng import Streams, stream
from bilevel_problems.mllm_hft import formulations, memory
from bilevel_problems.mllm_hft.memory import (
    Footprint,
    capacity,
    footprint,
    require_room,
    spelled,
)

KIB = 2**10


def test_a_product_of_exponentials_by_hand():
    """y ↦ Σ exp(y) b: exp saves its result, the product b (the batch is not counted)."""

    def loss(at: dict, batch: Tensor) -> Tensor:
        return (at["y"].exp() * batch * at["x"]).sum()

    y, x, batch = torch.zeros(256), torch.ones(256), torch.ones(256)
    found = footprint(loss, {"x": x}, {"y": y}, batch)
    assert found.weights == 2 * KIB
    assert found.graph == KIB  # exp(y), and nothing for what has no gradient
    twice = footprint(lambda at, b: loss(at, b) + loss(at, 2 * b), {"x": x}, {"y": y}, batch)
    assert twice.graph == 3 * KIB  # exp(y) once more, and 2 b, which is no tensor of the batch


def test_one_storage_is_counted_once():
    def loss(at: dict, batch: Tensor) -> Tensor:
        value = at["y"].exp()
        return (value * value.T).sum() + value.reshape(-1).square().sum()

    found = footprint(loss, {}, {"y": torch.zeros(16, 16)}, None)
    assert found.graph == KIB


@pytest.mark.parametrize("formulation", ["two_variable", "weighted"])
def test_without_data_as_with_data(formulation, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from tests.problems.mllm_hft.miniature import prepared

    monkeypatch.setenv("BILEVEL_CACHE", str(tmp_path))
    problem = prepared(formulation=formulation)
    x, y = problem.init(Streams(0))
    batch = next(problem.lower_batches(stream(0, "b")))
    made = problem._prepared
    network, frozen = made.loaded.network, {**made.constants, **x}
    every = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    frozen |= {name: value for name, value in every.items() if name not in y}

    def loss(reference: dict, at: dict, batch: dict) -> Tensor:
        return formulations.lower(problem.form, network, at, batch, anchor=2.0, reference=reference)

    bare = {name: value.to("meta") for name, value in made.reference.items()}
    found = footprint(lambda at, b: loss(bare, at, b), frozen, y, batch)
    variables = {name: value.requires_grad_() for name, value in y.items()}
    at = {**frozen, **variables}
    known = [*at.values(), *leaves(batch), *made.reference.values()]
    with saved(known) as graph:
        value = loss(made.reference, at, batch)
    with saved([*known, *graph]) as derivative:
        torch.autograd.grad(value, list(variables.values()), create_graph=True, allow_unused=True)
    assert found.graph == pytest.approx(size(graph), rel=0.01)
    assert found.derivative == pytest.approx(size(derivative), rel=0.01)
    assert found.derivative > found.graph > found.weights / 10


def leaves(batch: dict) -> list[Tensor]:
    found = []
    for value in batch.values():
        inside = value if isinstance(value, dict) else getattr(value, "__dict__", None)
        found += leaves(inside) if inside is not None and not isinstance(value, Tensor) else [value]
    return [value for value in found if isinstance(value, Tensor)]


class saved:
    """Tensors that autograd saves within, but those whose memory is `known`; by address."""

    def __init__(self, known: list[Tensor]) -> None:
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.found: list[Tensor] = []
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)

    def pack(self, tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in self.known:
            self.found.append(tensor)
        return tensor

    def __enter__(self) -> list[Tensor]:
        self.hooks.__enter__()
        return self.found

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)


def size(tensors: list[Tensor]) -> int:
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_what_cannot_fit_is_refused_with_the_remedy():
    room = capacity(torch.device("cpu"))
    if room is None:
        pytest.skip("this system does not say how much memory it has")
    fits = Footprint(weights=room // 2, graph=room // 2, derivative=room)
    require_room(fits, torch.device("cpu"), "")
    large = Footprint(weights=room // 2, graph=room // 2 + 2 * KIB, derivative=0)
    with pytest.raises(RequirementError, match=r"cpu has .*; lower problem\.lower_batch"):
        require_room(large, torch.device("cpu"), "lower problem.lower_batch")
    assert capacity(torch.device("meta")) is None


def test_a_run_says_what_it_needs_and_refuses_before_it_moves(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from tests.problems.mllm_hft.miniature import prepared

    monkeypatch.setenv("BILEVEL_CACHE", str(tmp_path))
    problem = prepared(formulation="weighted", queue=3)
    (told,) = problem.place("cpu", torch.float64)
    assert told.note.startswith("at least weights ")
    wide, narrow = (problem._footprint(dtype) for dtype in (torch.float64, torch.float32))
    assert narrow.weights < wide.weights
    assert narrow.graph < wide.graph
    assert str(wide) in told.note
    network = problem._prepared.loaded.network
    monkeypatch.setattr(memory, "capacity", lambda device: narrow.weights + narrow.graph - 1)
    with pytest.raises(RequirementError, match=r"cpu has .*problem\.lower_batch"):
        problem.place("cpu", torch.float32)
    assert network.image_head.weight.dtype == torch.float64
    monkeypatch.setattr(memory, "capacity", lambda device: narrow.weights + narrow.graph)
    problem.place("cpu", torch.float32)
    assert network.image_head.weight.dtype == torch.float32


def test_bytes_are_spelled():
    sizes = 2**9, 640 * 2**20, 3 * 2**29, 388 * 2**30
    assert [spelled(size) for size in sizes] == ["0.5 KiB", "640 MiB", "1.5 GiB", "388 GiB"]


def test_the_table_of_a_7b_model_is_recomputed():
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from docs import mllm_memory

    page = (Path(__file__).parents[3] / "docs" / "mllm_memory.md").read_text(encoding="utf-8")
    assert page.count("\n| `") == len(mllm_memory.ROWS)
    case = mllm_memory.ROWS[1]
    assert f"\n{mllm_memory.row(*case)}\n" in page
    for other in mllm_memory.ROWS:
        assert f"| `{other[0]}` | {str(other[1])[6:]} | {other[2]} |" in page
