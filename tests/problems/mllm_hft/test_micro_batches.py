"""A loss by micro-batches is the loss, and so are its derivatives; the memory is that of one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import calculus, tree
from bilevel.errors import ProblemError
from bilevel.estimators.alternating import Alternating
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.one_step import OneStep
from bilevel.estimators.unroll import Unroll
from bilevel.events import Stepped
from bilevel.linear.cg import CG
from bilevel.optimizers.differentiable import SGD
from bilevel.rng import Streams, stream
from bilevel.run import engine
from bilevel.types import Counts, Loss, Params, Point
from bilevel_problems.mllm_hft.losses import answer_losses, mean_of_answers, task_loss
from bilevel_problems.mllm_hft.micro_batches import in_chunks
from bilevel_problems.mllm_hft.problem import HierarchicalFineTuning
from bilevel_problems.mllm_hft.sources.mixture import Mixture
from bilevel_problems.mllm_hft.sources.shapes import Shapes
from tests.problems.mllm_hft.miniature import miniature, setup

pytest.importorskip("transformers", reason="the model is transformers' own")
pytest.importorskip("peft", reason="LoRA goes through peft")

pytestmark = pytest.mark.usefixtures("cache")

CASES: list[dict[str, Any]] = [
    {},
    {"negatives": "batch", "heads": "hacl"},
    {"queue": 5},
    {"contrast_loss": "chip"},
    {"contrast_loss": "chip_released"},
    {"formulation": "two_variable"},
    {"formulation": "proximal", "queue": 3},
    {"formulation": "joint", "clean": 0.5},
    {"source": Mixture(parts={"true": Shapes(), "odd": Shapes(invented=1.0)}, clean=Shapes())},
]


class Wide:
    """torch, but for float32, which is float64."""

    def __getattr__(self, name: str) -> Any:
        return torch.float64 if name == "float32" else getattr(torch, name)


@pytest.fixture(autouse=True)
def float64(monkeypatch):
    """Norms and softmax of Llama in float64 too; transformers rounds them to float32 whatever comes."""
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(modeling_llama, "torch", Wide())


def named(options: dict[str, Any]) -> str:
    return "-".join(f"{k}={v}" for k, v in options.items() if k != "source") or str(len(options))


def wide(options: dict[str, Any], micro_batch: int | None) -> HierarchicalFineTuning:
    """In float64, with batches of 5 that 2 does not divide."""
    sizes = {"lower_batch": 6, "contrast_batch": 5, "upper_batch": 5}
    problem = miniature(micro_batch=micro_batch, **sizes, **options)
    for _ in problem.prepare():
        pass
    problem.place("cpu", torch.float64)
    return problem


def derivatives(problem: HierarchicalFineTuning) -> list[Tensor]:
    """Values, gradients, a Hessian and a cross product of both losses, away from the start."""
    x, y = (tree.to(part, "cpu", torch.float64) for part in problem.init(Streams(0)))
    noise = stream(1, "noise")
    x, y = (
        tree.map(lambda v: v + 0.1 * torch.randn(v.shape, generator=noise, dtype=v.dtype), part)
        for part in (x, y)
    )
    u = tree.map(lambda v: torch.randn(v.shape, generator=noise, dtype=v.dtype), y)
    batches = {
        "lower": next(problem.lower_batches(stream(0, "l"))),
        "upper": next(problem.upper_batches(stream(0, "u"))),
    }
    found = []
    for level, batch in batches.items():
        function = getattr(problem, f"{level}_loss")
        loss = Loss(function, tree.to(batch, "cpu", torch.float64), Counts(), level)
        value, at_x, at_y = calculus.gradients(loss, Point(x, y))
        line = calculus.linearize(loss, Point(x, y))
        found += [value, *at_x.values(), *at_y.values()]
        found += [*line.hvp_yy(u).values(), *line.vjp_xy(u).values()]
    return found


@pytest.mark.parametrize("options", CASES, ids=named)
def test_values_and_derivatives_are_those_of_the_whole_batch(options):
    expected = derivatives(wide(options, None))
    scale = max(float(value.abs().max()) for value in expected)
    for size in (2,) if options else (2, 64):
        for got, wanted in zip(derivatives(wide(options, size)), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12 * scale)


@pytest.fixture
def unmeasured(monkeypatch):
    """Runs that are not evaluated: what is compared are the steps."""
    for name in ("evaluate", "figures"):
        monkeypatch.delattr(HierarchicalFineTuning, name)


def run(options: dict[str, Any], estimator: Any, micro_batch: int | None) -> tuple[Params, Params]:
    """x at the start and after two upper steps of two lower ones, by SGD.

    Adam's first step is rounding where ∇G is small.
    """
    made = setup(wide(options, micro_batch))
    lower = replace(made.lower, optimizer=SGD(lr=0.05))
    upper = replace(made.upper, optimizer=SGD(lr=0.5))
    made = replace(made, lower=lower, upper=upper, estimator=estimator, dtype=torch.float64)
    state = engine.start(made)
    start = state.x
    steps = [event for event in engine.run(made, state) if isinstance(event, Stepped)]
    assert [step.hypergradient_norm > 0 for step in steps] == [True, True]
    return start, state.x


ESTIMATORS = [
    Unroll(memory="store"),
    Unroll(memory="recompute"),
    Implicit(solver=CG(iterations=3), damping=5.0),
    OneStep(),
    Alternating(),
]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
@pytest.mark.usefixtures("unmeasured")
def test_estimators_give_the_same_steps(estimator):
    formulation = "two_variable" if isinstance(estimator, Alternating) else "weighted"
    (start, whole), (_, some) = (
        run({"formulation": formulation}, estimator, size) for size in (None, 2)
    )
    for name, value in whole.items():
        torch.testing.assert_close(some[name], value, rtol=1e-8, atol=1e-12)
    assert any(not torch.allclose(value, start[name]) for name, value in whole.items())


@pytest.mark.usefixtures("unmeasured")
def test_forward_mode_is_refused_by_name():
    with pytest.raises(ProblemError, match=r"micro-batches.*memory=recompute"):
        run({}, Unroll(memory="mixed"), 2)


def test_the_mean_is_over_the_whole_batch():
    """Rows of 4, 1 and 0 counted tokens, by hand; a mean of the chunks' means is another number."""
    generator = stream(0, "logits")
    logits = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    ids = torch.tensor([[0, 1, 2, 3], [4, 0, 1, 2], [3, 4, 0, 1]])
    counted = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    weights = torch.tensor([2.0, 0.5, 7.0], dtype=torch.float64)
    minus = -logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    expected = (2 * minus[0].sum() + 0.5 * minus[1, 0]) / 5

    def each(parameters: dict, rows: dict) -> tuple[Tensor]:
        return (answer_losses(rows["logits"], rows["ids"], rows["counted"]),)

    rows = {"logits": logits, "ids": ids, "counted": counted}
    (found,) = in_chunks(each, {}, rows, 2)
    torch.testing.assert_close(mean_of_answers(found, counted, weights), expected)
    torch.testing.assert_close(task_loss(logits, ids, counted, weights), expected)
    parts = [
        task_loss(logits[:1], ids[:1], counted[:1]),
        task_loss(logits[1:], ids[1:], counted[1:]),
    ]
    assert abs(float(torch.stack(parts).mean() - mean_of_answers(found, counted))) > 0.05
    with pytest.raises(ProblemError, match="no answer to count"):
        mean_of_answers(found[2:], counted[2:])


def test_negatives_are_those_of_the_whole_batch():
    """The contrast of halves, each on its own, is another loss: InfoNCE is not a sum over rows."""
    problem = wide({"formulation": "two_variable", "anchor": 0.0}, 2)
    x, y = (tree.to(part, "cpu", torch.float64) for part in problem.init(Streams(0)))
    batch = tree.to(next(problem.lower_batches(stream(0, "l"))), "cpu", torch.float64)["contrast"]

    def half(part: slice) -> dict[str, Any]:
        against = batch["against"]
        pairs = replace(
            against, pairs=against.pairs[part, part], hallucinated=against.hallucinated[part]
        )
        rows = {n: v[part] for n, v in batch.items() if isinstance(v, Tensor)}
        return {"contrast": {**rows, "against": pairs}}

    halves = [float(problem.lower_loss(x, y, half(part))) for part in (slice(2), slice(2, 4))]
    whole = float(problem.lower_loss(x, y, half(slice(4))))
    assert abs(sum(halves) / 2 - whole) > 0.05
