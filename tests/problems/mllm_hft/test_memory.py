"""What is counted without data is what autograd saves with data."""

from __future__ import annotations

import re
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel.errors import RequirementError
from bilevel.rng import Streams, stream
from bilevel_problems.mllm_hft import formulations, memory, step_memory
from bilevel_problems.mllm_hft.memory import (
    SHARE,
    Footprint,
    capacity,
    footprint,
    require_room,
    rows_at_a_time,
    spelled,
    working_set,
)
from bilevel_problems.mllm_hft.planning import lower_step
from bilevel_problems.mllm_hft.step_memory import Step, largest_that_fits

pytestmark = pytest.mark.usefixtures("cache")
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


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("formulation", ["two_variable", "weighted"])
def test_without_data_as_with_data(formulation, micro_batch):
    """At the moment when autograd holds most, whole or chunk by chunk."""
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from tests.problems.mllm_hft.miniature import prepared

    problem = prepared(formulation=formulation)
    x, y = problem.init(Streams(0))
    batch = next(problem.lower_batches(stream(0, "b")))
    made = problem._prepared
    network, frozen = made.loaded.network, {**made.constants, **x}
    every = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    frozen |= {name: value for name, value in every.items() if name not in y}

    def loss(reference: dict, at: dict, batch: dict) -> Tensor:
        return formulations.lower(
            problem.form,
            network,
            at,
            batch,
            anchor=2.0,
            reference=reference,
            micro_batch=micro_batch,
        )

    bare = {name: value.to("meta") for name, value in made.reference.items()}
    found = footprint(lambda at, b: loss(bare, at, b), frozen, y, batch)
    variables = {name: value.requires_grad_() for name, value in y.items()}
    at, entries = {**frozen, **variables}, list(variables.values())
    known = [*at.values(), *leaves(batch), *made.reference.values()]
    with Held(known) as first:
        torch.autograd.grad(loss(made.reference, at, batch), entries, allow_unused=True)
    with Held(known) as second:
        value = loss(made.reference, at, batch)
        slopes = torch.autograd.grad(value, entries, create_graph=True, allow_unused=True)
        kept = second.size()
        slopes = [slope for slope in slopes if slope is not None]
        torch.autograd.grad(
            slopes, entries, [torch.ones_like(s) for s in slopes], allow_unused=True
        )
    assert found.graph == pytest.approx(first.most, rel=0.01)
    assert found.graph + found.derivative == pytest.approx(second.most, rel=0.01)
    # of chunks that are alike one is counted; what is kept of the others are states and cotangents
    assert kept * (1 if micro_batch is None else 0.5) <= found.kept * 1.01 <= kept * 1.02
    assert found.derivative > found.graph > found.weights / 20


def test_micro_batches_hold_one_at_a_time():
    """Of a batch of 32, two rows hold less than a sixteenth: conversations or contrast, never both."""
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from tests.problems.mllm_hft.miniature import prepared

    problem = prepared(lower_batch=32, contrast_batch=32, train=40)
    made = problem._prepared
    whole, two, four = map(lower_step(problem, made, torch.float32).holds, (None, 2, 4))
    assert whole.graph > 16 * two.graph
    assert whole.graph + whole.derivative > 16 * (two.graph + two.derivative)
    assert four.graph / two.graph == pytest.approx(2, rel=0.1)
    assert whole.kept > 100 * two.kept
    assert whole.weights == two.weights


def test_few_are_counted_with_data_and_alike_layers_from_two(monkeypatch):
    """The same bytes as the meta device counts of all layers, and the decoder is whole again."""
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from bilevel_problems.mllm_hft.models.tiny import Tiny
    from tests.problems.mllm_hft.miniature import prepared

    model = Tiny(hidden=16, layers=5, heads=2, rank=2, steps=1, batch=4, scenes=16)
    problem = prepared(formulation="two_variable", model=model)
    made = problem._prepared
    counted, taken = Step.counted, []

    def recorded(step: Step, on: str, size: int | None) -> Footprint:
        taken.append((len(made.loaded.network.language.layers), on))
        return counted(step, on, size)

    monkeypatch.setattr(Step, "counted", recorded)
    step = lower_step(problem, made, torch.float32)
    found = [step.holds(None)]
    monkeypatch.setattr(step_memory, "FEW", 0)
    found.append(step.holds(None))
    made.loaded.network.language.layers[3].add_module("more", torch.nn.Linear(3, 3))
    more = step.holds(None)
    assert taken == [(5, "cpu"), (1, "meta"), (2, "meta"), (5, "meta")]
    assert found[0] == found[1] == replace(more, weights=more.weights - 4 * 12)
    assert found[0].graph > 0


def test_the_largest_micro_batch_that_fits():
    """A row holds 2 and its derivative 3 beside weights of 10: 10 + 5 m."""

    def needed(size: int | None) -> Footprint:
        asked.append(size)
        return Footprint(10, 2 * (size or 32), 3 * (size or 32))

    for room, size in ((170, None), (169.9, 16), (50, 8), (49.9, 4), (15, 1), (1, 1), (None, None)):
        asked: list[int | None] = []
        scaled = None if room is None else round(room / SHARE * 1000) / 1000
        chosen, found = largest_that_fits(needed, 32, scaled)  # pyright: ignore[reportArgumentType]
        assert chosen == size, room
        assert found == needed(size)


def test_auto_takes_what_fits_and_says_so(monkeypatch):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from tests.problems.mllm_hft.miniature import prepared

    problem = prepared(micro_batch="auto", lower_batch=12, contrast_batch=12)
    (step, evaluation) = problem.place("cpu", torch.float32)
    assert "micro-batches" not in step.note
    assert "for 128 captions at a time" in evaluation.note
    made = problem._prepared
    four = lower_step(problem, made, torch.float32).holds(4)
    room = round(four.of_second_order / SHARE) + 1
    monkeypatch.setattr(memory, "capacity", lambda device: room)
    step, evaluation = problem.place("cpu", torch.float32)
    assert step.note == f"at least {four}; micro-batches of 4"
    cache, attention = made.loaded.network.decoding_bytes(made.plan.tokens)
    rows = int((SHARE * room - four.weights) // (cache + attention))
    assert 1 < rows < 128
    assert f"KV cache {spelled(rows * cache)} for {rows} captions at a time" in evaluation.note
    assert problem._evaluator.rows == rows


def test_a_kv_cache_is_as_large_as_transformers_makes_it():
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from tests.problems.mllm_hft.miniature import prepared

    made = prepared()._prepared
    network = made.loaded.network
    ids = torch.zeros(3, 7, dtype=torch.long)
    sequence = network._sequence(ids, torch.ones_like(ids).bool())
    layers = network._decode(sequence, use_cache=True).past_key_values.layers
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    tokens = sequence.mask.shape[1]
    assert 3 * network.decoding_bytes(tokens)[0] == size


def leaves(batch: dict) -> list[Tensor]:
    found = []
    for value in batch.values():
        inside = value if isinstance(value, dict) else getattr(value, "__dict__", None)
        found += leaves(inside) if inside is not None and not isinstance(value, Tensor) else [value]
    return [value for value in found if isinstance(value, Tensor)]


class Held:
    """Bytes that autograd holds within, but of memory that is `known`: at most, and now; by address."""

    def __init__(self, known: list[Tensor]) -> None:
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.alive: dict[int, tuple[int, int]] = {}
        self.most = 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda box: box[0])

    def pack(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        box, address = _Box([tensor]), storage.data_ptr()
        if address not in self.known:
            self.alive[id(box)] = address, storage.nbytes()
            weakref.finalize(box, self.alive.pop, id(box))
            self.most = max(self.most, self.size())
        return box

    def size(self) -> int:
        return sum(dict(self.alive.values()).values())

    def __enter__(self) -> Held:
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)


class _Box(list):
    """A list that can be referred to weakly."""


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


def test_a_derivative_that_cannot_fit_is_warned_of_with_the_remedy(monkeypatch):
    """Not refused: a method of first order does without."""
    found = Footprint(weights=4 * KIB, graph=2 * KIB, derivative=3 * KIB)
    cpu = torch.device("cpu")
    for room, warned in ((9 * KIB, False), (9 * KIB - 1, True), (6 * KIB, True), (None, False)):
        monkeypatch.setattr(memory, "capacity", lambda device, room=room: room)
        require_room(found, cpu, "lower it")
        said = memory.second_order_room(found, cpu, "lower problem.micro_batch")
        assert len(said) == warned
    monkeypatch.setattr(memory, "capacity", lambda device: 8 * KIB)
    (said,) = memory.second_order_room(found, cpu, "lower problem.micro_batch")
    assert re.search(
        "cpu has 8 KiB, .* at least 9 KiB: .*; lower problem.micro_batch", said.message
    )


def test_a_run_says_what_it_needs_and_refuses_before_it_moves(monkeypatch):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from tests.problems.mllm_hft.miniature import prepared

    problem = prepared(formulation="weighted", queue=3)
    told, evaluation = problem.place("cpu", torch.float64)
    assert told.note.startswith("at least weights ")
    assert "KV cache" in evaluation.note
    wide, narrow = (
        lower_step(problem, problem._prepared, dtype).holds(None)
        for dtype in (torch.float64, torch.float32)
    )
    assert narrow.weights < wide.weights
    assert narrow.graph < wide.graph
    assert str(wide) in told.note
    network = problem._prepared.loaded.network
    monkeypatch.setattr(memory, "capacity", lambda device: narrow.weights + narrow.graph - 1)
    with pytest.raises(RequirementError, match=r"cpu has .*problem\.lower_batch"):
        problem.place("cpu", torch.float32)
    assert network.image_head.weight.dtype == torch.float64
    monkeypatch.setattr(memory, "capacity", lambda device: narrow.weights + narrow.graph)
    *_, warned = problem.place("cpu", torch.float32)
    assert (warned.kind, warned.step) == ("memory", 0)
    assert network.image_head.weight.dtype == torch.float32


def test_bytes_are_spelled():
    sizes = 2**9, 640 * 2**20, 3 * 2**29, 388 * 2**30
    assert [spelled(size) for size in sizes] == ["0.5 KiB", "640 MiB", "1.5 GiB", "388 GiB"]


def test_the_table_of_a_7b_model_is_recomputed():
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from docs import mllm_memory

    page = (Path(__file__).parents[3] / "docs" / "mllm_memory.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) == len(mllm_memory.ROWS)
    case = mllm_memory.Case("weighted", torch.bfloat16, 32, 2)
    assert rows[mllm_memory.ROWS.index(case)] == mllm_memory.row(case)
    for line, other in zip(rows, mllm_memory.ROWS, strict=True):
        kind = str(other.weights)[6:]
        size = other.micro_batch or "–"
        assert line.startswith(f"| `{other.formulation}` | {kind} | {other.batch} | {size} |")


def test_the_working_set_is_what_is_alive_at_once():
    """a and exp(a) together, then exp(a) and its successor: two of 4 KiB, whatever came before."""
    given = torch.ones(4 * KIB)

    def function(with_grad: bool) -> Tensor:
        with torch.set_grad_enabled(with_grad):
            first = torch.ones(KIB, requires_grad=with_grad)
            second = first.exp()
            del first
            third = second.view(32, 32) + given[0]  # a view and what is given take nothing
            del second
            return third.sum()

    found, size = working_set(lambda: function(False))
    assert float(found) == pytest.approx(KIB * (torch.e + 1))
    assert size == 2 * 4 * KIB
    with torch.inference_mode():
        assert working_set(lambda: function(False))[1] == size
    # autograd keeps the leaf and exp(a) until the sum is there
    assert working_set(lambda: function(True))[1] == size + 4 * KIB + 4


def test_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(memory, "capacity", lambda device: 1000)
    at_a_time = [
        rows_at_a_time(each, held, torch.device("cpu"), 20)
        for each, held in ((100, 0), (100, 300), (100, 700), (800, 0), (1, 0))
    ]
    assert at_a_time == [7, 4, 1, 1, 20]
    monkeypatch.setattr(memory, "capacity", lambda device: None)
    assert rows_at_a_time(100, 0, torch.device("cpu"), 20) == 20
