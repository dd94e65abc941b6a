"""The same answers on a GPU: `make gpu-check`. Skipped, with the reason, where there is none."""

from dataclasses import replace

import pytest
import torch

from bilevel import tree
from bilevel.estimators.alternating import Alternating
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.one_step import OneStep
from bilevel.estimators.single_loop import SingleLoop
from bilevel.estimators.unroll import Unroll
from bilevel.events import CAPTURED, Evaluated, Traced
from bilevel.linear.cg import CG
from bilevel.linear.dense import Dense
from bilevel.linear.neumann import Neumann
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import SGD, Adam
from bilevel.run import replayed
from bilevel.run.engine import Setup, prepare, run, start
from bilevel.run.upper import Upper
from bilevel_problems.hyper_cleaning import HyperCleaning
from bilevel_problems.quadratic import Quadratic

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CUDA = torch.device("cuda")
ESTIMATORS = {
    "cg": Implicit(solver=CG(iterations=50, tolerance=1e-10)),
    "dense": Implicit(solver=Dense()),
    "neumann": Implicit(solver=Neumann(scale=0.5)),
    "unroll": Unroll(),
    "recompute": Unroll(memory="recompute"),
    "one step": OneStep(),
    "none": Alternating(),
    "single loop": SingleLoop(),
}


def end(setup):
    list(prepare(setup))
    state = start(setup)
    list(run(setup, state))
    return tree.flatten(state.x).cpu(), tree.flatten(state.y).cpu()


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_a_run_ends_where_it_ends_on_the_cpu(estimator):
    lower = Gradient(steps=8, optimizer=SGD(lr=0.3, momentum=0.5))
    cpu = Setup(Quadratic(), lower, Upper(steps=5), estimator, dtype=torch.float64)
    gpu = replace(cpu, device=torch.device("cuda"))
    for a, b in zip(end(cpu), end(gpu), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


class Drawing(Quadratic):
    """Draws on the device wherever the run calls it once in a while."""

    def init(self, streams):
        x, y = super().init(streams)
        return x, tree.map(lambda p: p + torch.rand(p.shape, device="cuda").to(p), y)

    def evaluate(self, x, y):
        return {"noise": float(torch.rand((), device=y["y"].device))}


def test_draws_on_the_device_are_of_the_seed():
    def noise(seed):
        scene = Setup(
            Drawing(), Gradient(steps=2), Upper(steps=2), Alternating(), seed=seed, device=CUDA
        )
        state = start(scene)
        return state.y["y"].tolist(), [
            e.metrics["noise"] for e in run(scene, state) if isinstance(e, Evaluated)
        ]

    before = torch.cuda.get_rng_state()
    first, other = noise(1), noise(2)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    torch.cuda.manual_seed(7)
    assert noise(1) == first
    assert first[0] != other[0]
    assert first[1] != other[1]
    assert first[1][0] == first[1][1]


def test_float32_on_the_gpu_is_near_float64_on_the_cpu():
    """By SGD: Adam's first steps are signs, of entries that rounding may have turned too."""
    lower, upper = Gradient(steps=8, optimizer=SGD(lr=0.05)), Upper(steps=5, optimizer=SGD(lr=1.0))
    problem = HyperCleaning(num_train=100, num_clean=50)
    cpu = Setup(problem, lower, upper, Implicit(damping=0.01), dtype=torch.float64)
    gpu = replace(cpu, device=torch.device("cuda"), dtype=torch.float32)
    for a, b in zip(end(cpu), end(gpu), strict=True):
        assert float((a - b.double()).norm() / a.norm()) < 1e-3


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_a_run_from_a_record_is_the_run(estimator):
    """To the bits, by CUDA graphs where a step writes nowhere; the losses differ from batch to batch."""
    lower = Gradient(steps=8, optimizer=Adam(lr=0.05))
    problem = HyperCleaning(num_train=100, num_clean=50)
    setup = Setup(
        problem, lower, Upper(steps=7), estimator, device=torch.device("cuda"), dtype=torch.float64
    )
    for a, b in zip(end(setup), end(replace(setup, compile="step")), strict=True):
        assert torch.equal(a, b)


def test_a_step_is_captured_and_each_graph_is_launched_by_one_call():
    lower = Gradient(steps=8, optimizer=SGD(lr=0.05))
    problem = HyperCleaning(num_train=100, num_clean=50)
    setup = Setup(
        problem, lower, Upper(steps=7), Unroll(memory="store"), device=torch.device("cuda"),
        dtype=torch.float64, compile="step",
    )  # fmt: skip
    list(prepare(setup))
    state = start(setup)
    events = list(run(setup, state))
    assert [e.why for e in events if isinstance(e, Traced)] == ["", CAPTURED]
    assert not {"compile", "cuda graph"} & state.warned.keys()


def test_a_step_compiled_on_the_gpu_is_the_step_to_rounding(monkeypatch):
    monkeypatch.setattr(replayed, "PAYS", 0)
    lower = Gradient(steps=8, optimizer=SGD(lr=0.05))
    problem = HyperCleaning(num_train=100, num_clean=50)
    setup = Setup(
        problem, lower, Upper(steps=7), Unroll(memory="store"), device=torch.device("cuda"),
        dtype=torch.float64,
    )  # fmt: skip
    for a, b in zip(end(setup), end(replace(setup, compile="inductor")), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
