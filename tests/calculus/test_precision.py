"""Narrow dtypes: what is accepted is near what float64 gives, what is refused would not be."""

import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bilevel import hypergradient, registry, rng, tree
from bilevel.calculus import precision
from bilevel.calculus.precision import require_resolved, require_step
from bilevel.errors import BilevelError, ProblemError
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.penalty import Penalty
from bilevel.lower.gradient import Gradient
from bilevel.registry import presets
from bilevel.registry.build import build
from bilevel.run import engine
from bilevel.run.engine import Setup
from bilevel.run.upper import Upper
from bilevel_problems.quadratic import Quadratic

PAGE = Path(__file__).parents[2] / "docs" / "estimators" / "precision.py"
error = runpy.run_path(str(PAGE))["error"]  # what the page measures with

NARROW = (torch.bfloat16, torch.float16)
OTHERS = {
    **dict.fromkeys(["fomaml", "reptile", "maml", "iaptt"], "their start depends on x"),
    **dict.fromkeys(["saba", "srba", "vrbo"], "their batches are blocks"),
    **dict.fromkeys(["shine", "shine_block", "shine_refined"], "not a matter of rounding"),
    "kkt": "the problem has no constraints",
    "fixed_point": "held to the condition number below",
}
REFUSED = {
    torch.bfloat16: {
        *("penalty", "f2sa", "f2sa_p", "gradient_gap", "g_pbgd", "value_function", "bvfsm"),
        *("darts", "sama", "zeroth_order", "pzobo"),
    },
    torch.float16: {
        *("value_function", "bvfsm", "darts", "sama", "zeroth_order", "pzobo"),
    },
}
NAMES = [
    name
    for name in [*registry.names("estimators"), *presets.of("estimators")]
    if name not in OTHERS and not name.startswith("betty")
]


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.untrusted("a dtype too coarse is what it is about")
def test_a_method_is_near_its_float64_or_refused(name, dtype):
    if name in REFUSED[dtype]:
        with pytest.raises(ProblemError, match=r"runtime\.dtype: float32"):
            error(name, dtype)
    else:
        # a tenth of rounding is let through, and constants of the problem make of it at most this
        assert error(name, dtype) < 0.25
    assert error(name, torch.float32) < 0.01


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("name", ["gradient_gap", "f2sa", "f2sa_p", "darts", "sama", "pzobo"])
def test_what_is_refused_would_be_off_by_a_tenth_and_more(name, dtype, monkeypatch):
    """Control: the refusals are not gratuitous."""
    monkeypatch.setattr(precision, "SHARE", 1e9)
    monkeypatch.setattr(precision, "STEP", 0.0)
    if name in REFUSED[dtype]:
        assert max(error(name, dtype, seed) for seed in range(3)) > 0.1


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        ({"name": "f2sa", "strength": 12.0}, torch.bfloat16),
        ({"name": "f2sa_p", "strength": 12.0}, torch.bfloat16),
        ({"name": "gradient_gap", "strength": 6.0}, torch.bfloat16),
        ({"name": "zeroth_order", "smoothing": 0.3}, torch.bfloat16),
        ({"name": "pzobo", "smoothing": 0.03}, torch.float16),
        ({"name": "darts", "epsilon": 1.5}, torch.bfloat16),
        ({"name": "sama", "epsilon": 1.5}, torch.bfloat16),
    ],
    ids=str,
)
def test_with_the_remedy_it_is_accepted_and_near(spec, dtype):
    assert error(spec, dtype) < 0.3


@pytest.mark.parametrize(
    ("name", "option", "sign"), [("penalty", "strength", -1), ("zeroth_order", "smoothing", 1)]
)
def test_the_refusal_names_a_change_that_is_enough_and_hardly_more(name, option, sign):
    estimator = build("estimators", name)

    def changed(factor):
        return replace(estimator, **{option: getattr(estimator, option) * factor**sign})

    with pytest.raises(ProblemError) as refused:
        precision.require_resolved(estimator, [torch.float32, torch.bfloat16])
    factor = float(str(refused.value).split("by a factor of ")[1].split(" ")[0])
    precision.require_resolved(changed(factor), [torch.bfloat16])
    with pytest.raises(ProblemError, match="bfloat16 an error of"):
        precision.require_resolved(changed(0.9 * factor), [torch.bfloat16])
    precision.require_resolved(estimator, [torch.float32])
    with pytest.raises(ProblemError, match="float32 an error of"):
        precision.require_resolved(changed(1e-6), [torch.float32])


def test_a_run_is_refused_before_its_first_step():
    made = Setup(Quadratic(), Gradient(), Upper(), build("estimators", "f2sa"))
    engine.refuse_mismatch(made)
    with pytest.raises(ProblemError, match=r"use a smaller strength by a factor of 7\.9"):
        engine.refuse_mismatch(replace(made, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("asked", "dtype", "held"),
    [
        (1e-3, torch.bfloat16, False),
        (1e-5, torch.float16, False),
        (0.2, torch.bfloat16, True),
        (1e-3, torch.float32, True),
    ],
)
@pytest.mark.untrusted("a dtype too coarse is what it is about")
def test_an_error_below_what_the_dtype_leaves_is_not_said_to_be_held(asked, dtype, held):
    problem = Quadratic()
    x, _ = problem.init(rng.Streams(0))
    y, truth = problem.lower_solution(x), problem.hypergradient(x)
    x, y, batch = (tree.to(part, "cpu", dtype) for part in (x, y, problem.constants))
    got = hypergradient(
        problem.upper_loss,
        problem.lower_loss,
        x,
        y,
        estimator=Implicit(target_error=asked),
        upper_batch=batch,
        lower_batch=batch,
    )
    h = tree.to(got.hypergradient, "cpu", torch.float64)
    assert (tree.norm(tree.sub(h, truth)) <= asked * tree.norm(truth)) is held
    assert got.stats.converged is held


@pytest.mark.parametrize("size", [1.0, 1000.0])
def test_a_step_is_held_to_the_length_of_y(size):
    y = {"a": torch.full((4,), size / 2, dtype=torch.float32)}
    least = 3 * torch.finfo(torch.float32).eps * tree.norm(y)
    precision.require_step("it", 1.01 * least, y)
    with pytest.raises(ProblemError, match="it takes a difference over epsilon"):
        precision.require_step("it", 0.99 * least, y)
    precision.require_step("it", 1e-9 * size, tree.map(torch.Tensor.double, y))


def test_what_a_fixed_point_loses_is_the_condition_number():
    for dtype in NARROW:
        assert error("fixed_point", dtype) < 10 * 3 * torch.finfo(dtype).eps
    with pytest.raises(BilevelError):
        error("kkt", torch.float64)  # why it is not here


@pytest.mark.parametrize(
    ("dtype", "wider"), [("bfloat16", "float32"), ("float32", "float64"), ("float64", None)]
)
def test_a_wider_dtype_is_advised_only_where_there_is_one(dtype, wider):
    dtype = getattr(torch, dtype)
    with pytest.raises(ProblemError) as step:
        require_step("one_step", 0.0, {"y": torch.ones(2, dtype=dtype)})
    with pytest.raises(ProblemError) as resolved:
        require_resolved(Penalty(strength=1e18), [dtype])
    for said in (str(step.value), str(resolved.value)):
        assert ("wider dtype" in said) is (wider is not None)
        assert wider is None or f"(runtime.dtype: {wider})" in said
