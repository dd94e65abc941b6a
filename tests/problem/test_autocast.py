"""Losses under autocast: second derivatives are those of the conversions written by hand, all else is float32."""

import itertools
from dataclasses import replace

import pytest
import torch

import bilevel
from bilevel.errors import ProblemError, RecipeError
from bilevel.estimators import FixedPoint, Forward, Implicit, Penalty, Unroll
from bilevel.events import Stepped
from bilevel.linear import CG, Dense
from bilevel.lower import Gradient
from bilevel.optimizers import SGD, Adam
from bilevel.problem.autocast import Autocast
from bilevel.recipe import loads
from bilevel.recipe.assemble import assemble
from bilevel.run.engine import Setup, refuse_mismatch, restore, run, start
from bilevel.run.upper import Upper
from tests.run.setups import frozen, same

N, M, ROWS = 6, 5, 12
STREAM = torch.Generator().manual_seed(0)


def drawn(*shape):
    return torch.randn(*shape, generator=STREAM, dtype=torch.float64)


A, B, C, T = drawn(ROWS, N) / 3, drawn(ROWS, M) / 3, drawn(ROWS), drawn(N)
RHO = 0.5


class Affine:
    """G = ‖A y − B x − c‖²/2 + ρ ‖y‖²/2, F = ‖y − t‖²/2 + ‖x‖²/20, with the products that autocast takes."""

    def init(self, streams):
        return {"x": torch.ones(M)}, {"y": torch.zeros(N)}

    def product(self, matrix, vector):
        return matrix.to(vector) @ vector

    def upper_loss(self, x, y, batch):
        return 0.5 * (y["y"] - T.to(y["y"])).square().sum() + 0.05 * x["x"].square().sum()

    def lower_loss(self, x, y, batch):
        residual = self.product(A, y["y"]) - self.product(B, x["x"])
        rest = 0.5 * (residual.to(y["y"]) - C.to(y["y"])).square().sum()
        return rest + 0.5 * RHO * y["y"].square().sum()

    def upper_batches(self, generator):
        return itertools.repeat(None)

    lower_batches = upper_batches


class Converted(Affine):
    """The conversions of autocast written by hand."""

    def product(self, matrix, vector):
        return matrix.to(torch.bfloat16) @ vector.to(torch.bfloat16)


def truth():
    """dΦ/dx at x = 1 in float64: y* = H⁻¹ Aᵀ(B x + c), dy*/dx = H⁻¹ Aᵀ B."""
    x = torch.ones(M, dtype=torch.float64)
    H = A.T @ A + RHO * torch.eye(N, dtype=torch.float64)
    y = torch.linalg.solve(H, A.T @ (B @ x + C))
    return (torch.linalg.solve(H, A.T @ B)).T @ (y - T) + 0.1 * x


def setup(problem, estimator, autocast=torch.bfloat16, **options):
    return Setup(
        problem=problem,
        lower=options.pop("lower", Gradient(steps=60, optimizer=SGD(lr=0.4))),
        upper=Upper(steps=options.pop("steps", 1), optimizer=SGD(lr=1.0)),
        estimator=estimator,
        autocast=autocast,
        **options,
    )


def hypergradient(s):
    """x moved by one step of length 1."""
    state = start(s)
    before = state.x["x"].clone()
    list(run(s, state))
    return before - state.x["x"]


EXACT = [
    Implicit(solver=Dense()),
    Implicit(solver=CG(iterations=N)),
    FixedPoint(lr=0.4),
    Unroll(),
    Unroll(memory="recompute"),
    Unroll(memory="traced"),
    Unroll(memory="mixed"),
    Forward(),
]

NAMES = [f"{k} {type(e).__name__} {getattr(e, 'memory', '')}" for k, e in enumerate(EXACT)]


@pytest.mark.parametrize("estimator", EXACT, ids=NAMES)
def test_the_hypergradient_is_that_of_conversions_by_hand(estimator):
    """And within bfloat16's rounding of the closed form; float32 is a thousand times nearer."""
    got = hypergradient(setup(Affine(), estimator))
    by_hand = hypergradient(setup(Converted(), estimator, autocast=None))
    torch.testing.assert_close(got, by_hand, rtol=1e-5, atol=1e-6)
    error = (got.double() - truth()).norm() / truth().norm()
    assert 1e-4 < error < 0.02  # eps of bfloat16 is 0.0078
    alone = hypergradient(setup(Affine(), estimator, autocast=None))
    assert (alone.double() - truth()).norm() < 1e-4 * truth().norm()


def test_all_that_is_kept_is_float32():
    s = setup(Affine(), Implicit(), lower=Gradient(steps=3, optimizer=Adam()), steps=2)
    state = start(s)
    events = list(run(s, state))
    assert [type(e) for e in events].count(Stepped) == 2

    def dtypes(value):
        if isinstance(value, torch.Tensor):
            return {value.dtype} if value.is_floating_point() else set()
        parts = value.values() if isinstance(value, dict) else value
        return set().union(*map(dtypes, parts)) if isinstance(value, (dict, list)) else set()

    kept = [state.x, state.y, state.lower, state.upper, state.estimator]
    assert dtypes(kept) == {torch.float32}
    value = s.problem.lower_loss(state.x, state.y, None)
    assert value.dtype == torch.float32


def test_the_products_are_in_bfloat16():
    seen = []

    class Seen(Affine):
        def product(self, matrix, vector):
            out = super().product(matrix, vector)
            seen.append(out.dtype)
            return out

        def evaluate(self, x, y):
            self.product(A, y["y"])
            return {"last": float(seen[-1] == torch.float32)}

    s = setup(Seen(), Implicit())
    events = list(run(s, start(s)))
    assert torch.bfloat16 in seen
    assert next(e for e in events if hasattr(e, "metrics")).metrics == {"last": 1.0}
    seen.clear()
    s = setup(Seen(), Implicit(), autocast=None)
    list(run(s, start(s)))
    assert torch.bfloat16 not in seen


def test_resuming_is_bit_identical():
    s = setup(Affine(), Unroll(), lower=Gradient(steps=4, optimizer=Adam(lr=0.05)), steps=5)
    whole = start(s)
    list(run(s, whole))
    first = start(s)
    for event in run(s, first):
        if isinstance(event, Stepped) and event.step == 2:
            break
    again = restore(s, frozen(first.save()))
    list(run(s, again))
    assert same(again.save(), whole.save())


def test_it_is_taken_once_and_taken_off():
    problem = Affine()
    s = setup(problem, Implicit())
    assert (s.problem.problem, type(s.problem).__name__) == (problem, "Affine")
    assert isinstance(s.problem, Autocast)
    assert replace(s, seed=3).problem.problem is problem
    assert replace(s, autocast=None, dtype=torch.float64).problem is problem


def test_what_does_not_go_together_is_refused():
    with pytest.raises(RecipeError, match="set dtype to float32"):
        setup(Affine(), Implicit(), dtype=torch.float64)
    # as in runtime.dtype: bfloat16, which float32 does not share
    with pytest.raises(ProblemError, match="in bfloat16 an error of"):
        refuse_mismatch(setup(Affine(), Penalty(strength=1e3)))
    refuse_mismatch(setup(Affine(), Penalty(strength=1e3), autocast=None))


def test_from_a_recipe_and_from_python():
    text = "problem: quadratic\nruntime: {autocast: bfloat16, device: cpu}\n"
    assert assemble(loads(text)).autocast == torch.bfloat16
    assert assemble(loads("problem: quadratic\nruntime: {device: cpu}\n")).autocast is None
    for override, message in (
        ("runtime.autocast=float16", "float16 overflows at 65,504"),
        ("runtime.autocast=bf16", "must be 'bfloat16'"),
        ("runtime.dtype=float64", "set dtype to float32"),
    ):
        with pytest.raises(RecipeError, match=message):
            loads(text, [override])
    options = {"lower": Gradient(steps=5, optimizer=SGD(lr=0.4)), "steps": 1, "device": "cpu"}
    got = bilevel.minimize(Affine(), autocast="bfloat16", **options)
    plain = bilevel.minimize(Affine(), **options)
    assert got.history[0].upper_loss == pytest.approx(plain.history[0].upper_loss, rel=0.02)
    assert got.history[0].upper_loss != plain.history[0].upper_loss
    with pytest.raises(RecipeError, match="float16 overflows at 65,504"):
        bilevel.minimize(Affine(), autocast="float16", **options)
