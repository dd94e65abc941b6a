"""One variable at both levels, and a text head that refines text beside it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bilevel.errors import ProblemError
from bilevel.estimators.dynamic_barrier import DynamicBarrier
from bilevel.estimators.rising_penalty import RisingPenalty
from bilevel.events import Stepped
from bilevel.optimizers.differentiable import SGD
from bilevel.rng import Streams, stream
from bilevel.run import engine
from bilevel_problems.mllm_hft import formulations
from bilevel_problems.mllm_hft.losses import task_loss
from bilevel_problems.mllm_hft.models.network import call
from bilevel_problems.mllm_hft.sources.mixture import Mixture
from bilevel_problems.mllm_hft.sources.shapes import Shapes
from tests.problems.mllm_hft.miniature import miniature, prepared, setup

pytest.importorskip("transformers", reason="the model is transformers' own")
pytest.importorskip("peft", reason="LoRA goes through peft")

pytestmark = pytest.mark.usefixtures("cache")

TWO = Mixture(parts={"true": Shapes(), "odd": Shapes(invented=1.0)}, clean=Shapes())


@pytest.mark.parametrize(
    "estimator", [DynamicBarrier(), RisingPenalty()], ids=lambda e: type(e).__name__
)
def test_simple_has_one_variable_at_both_levels(estimator):
    problem = prepared(formulation="simple")
    x, y = problem.init(Streams(0))
    assert x == {}
    names = {"image_head.weight", "text_head.weight"}
    assert names <= y.keys()
    assert any(".lora_" in name for name in y)
    assert any("projector" in name for name in y)
    batch = next(problem.lower_batches(stream(0, "b")))
    assert set(batch) == {"contrast"}
    at = {**problem._prepared.constants, **y}
    network = problem._prepared.loaded.network
    assert float(problem.lower_loss(x, y, batch)) == float(
        formulations.contrast(network, at, batch["contrast"])
    )
    made = replace(setup(problem), estimator=estimator)
    engine.refuse_mismatch(made)
    state = engine.start(made)
    steps = [event for event in engine.run(made, state) if isinstance(event, Stepped)]
    assert [event.totals.gradients for event in steps] == [2, 4]
    moved = {name for name, value in state.y.items() if not torch.equal(value, y[name])}
    assert moved >= {name for name in y if ".lora_A" not in name}  # LoRA's B is 0 at first


@pytest.mark.parametrize("formulation", formulations.FORMS)
def test_y_is_projected_where_a_scalar_with_a_range_is_in_it(formulation):
    """What is not there is refused nowhere: an estimator that moves y may take it."""
    problem = miniature(formulation=formulation)
    project = problem.project_lower
    assert (project is not None) == (formulation == "joint")
    assert ("project_lower" in setup(problem).levels) == (formulation == "joint")
    if project:
        tau = project({"log_tau": torch.tensor(9.0), "other": torch.tensor(9.0)})
        assert float(tau["log_tau"]) == pytest.approx(formulations.LOG_TAU_RANGE[1], rel=1e-6)
        assert float(tau["other"]) == 9.0
        with pytest.raises(ProblemError, match="does not support project_lower"):
            engine.refuse_mismatch(replace(setup(problem), estimator=DynamicBarrier()))


def test_the_task_loss_is_that_of_all_logits_and_so_are_its_gradients():
    """Where answers alone reach the output layer; a conversation and a caption alone, weighed."""
    problem = prepared(formulation="weighted", source=TWO)
    network = problem._prepared.loaded.network
    x, y = problem.init(Streams(0))
    x["source_scores"] += torch.tensor([0.4, -0.4])
    y = {name: value + 0.1 * torch.ones_like(value) for name, value in y.items()}
    batch = next(problem.lower_batches(stream(0, "b")))["task"]
    answers = batch["counted"].sum(1)
    assert answers.min() < answers.max() == batch["places"].shape[1] < batch["ids"].shape[1]
    at = {n: v.requires_grad_() for n, v in {**x, **y}.items()}
    inputs = {n: batch[n] for n in ("ids", "mask", "prefix", "features")}
    weights, scalars = formulations.split(at)
    weighed = formulations.by_source(scalars, batch)

    def dense(counted: torch.Tensor) -> torch.Tensor:
        logits = call(network, weights, "logits", **inputs)
        return task_loss(logits, batch["ids"], counted, weighed)

    def slopes(loss: torch.Tensor) -> list[torch.Tensor]:
        found = torch.autograd.grad(loss, list(at.values()), allow_unused=True)
        return [slope for slope in found if slope is not None]

    got, expected = formulations.task(network, at, batch), dense(batch["counted"])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
    for mine, theirs in zip(slopes(got), slopes(expected), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6 * float(theirs.abs().max()))
    other = dense(batch["counted"].roll(-1, 1))  # what stands before an answer is no answer
    assert abs(float(got.detach() - other.detach())) > 1e-3


def test_the_path_of_simple_follows_both_losses():
    """One step of the penalty from the start: −lr (∇L_C + ∇L_T / λ), by autograd."""
    problem = prepared(formulation="simple")
    made = replace(setup(problem, 1), estimator=RisingPenalty(strength=3.0, optimizer=SGD(lr=0.5)))
    state = engine.start(made)
    streams = Streams(made.seed)
    y = {name: value.clone().requires_grad_() for name, value in state.y.items()}
    batches = (
        next(problem.lower_batches(streams["lower.batches"])),
        next(problem.upper_batches(streams["upper.batches"])),
    )
    loss = problem.lower_loss({}, y, batches[0]) + problem.upper_loss({}, y, batches[1]) / 3
    found = torch.autograd.grad(loss, list(y.values()), allow_unused=True)
    list(engine.run(made, state))
    for (name, value), slope in zip(y.items(), found, strict=True):
        expected = value.detach() if slope is None else value.detach() - 0.5 * slope
        torch.testing.assert_close(state.y[name], expected, rtol=1e-4, atol=1e-6)


def test_a_residual_text_head_begins_as_the_linear_one_and_refines_text_alone():
    plain = prepared(formulation="two_variable")
    deep = prepared(formulation="two_variable", text_head="residual")
    (_, y), (x, z) = (p.init(Streams(0)) for p in (plain, deep))
    more = {"text_head.inner.weight", "text_head.inner.bias", "text_head.outer.weight"}
    assert z.keys() - y.keys() == more
    batch = next(deep.lower_batches(stream(0, "b")))
    assert float(plain.lower_loss(x, y, batch)) == float(deep.lower_loss(x, z, batch))
    leaf = z["text_head.outer.weight"].clone().requires_grad_()
    loss = deep.lower_loss(x, {**z, "text_head.outer.weight": leaf}, batch)
    (slope,) = torch.autograd.grad(loss, leaf)
    assert float(slope.norm()) > 0
    bent = {**z, "text_head.outer.weight": torch.eye(16)}
    head = deep._prepared.loaded.network
    states = torch.randn(3, 16, generator=stream(0, "s"))
    inner = torch.nn.functional.gelu(
        states @ z["text_head.inner.weight"].T + z["text_head.inner.bias"]
    )
    torch.testing.assert_close(
        call(head, bent, "text_head", input=states),
        (states + inner) @ z["text_head.weight"].T,
        rtol=1e-5,
        atol=1e-6,
    )
    made = setup(deep)
    assert sum(isinstance(e, Stepped) for e in engine.run(made, engine.start(made))) == 2
