"""The functional core on plain functions: what it returns, and what it must never touch."""

import time

import pytest
import torch
from torch import nn
from torch.func import functional_call

import bilevel
from bilevel import tree
from bilevel.errors import ConvergenceError, ProblemError, RecipeError
from bilevel.estimators.alternating import Alternating
from bilevel.estimators.forward import Forward
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.one_step import OneStep
from bilevel.estimators.unroll import Unroll
from bilevel.linear.cg import CG
from bilevel.linear.dense import Dense
from bilevel.linear.gmres import GMRES
from bilevel.linear.minres import MINRES
from bilevel.linear.normal_cg import NormalCG
from bilevel.lower.gradient import Gradient
from bilevel.lower.lbfgs import LBFGS
from bilevel.lower.newton import Newton
from bilevel.optimizers.differentiable import SGD, Adam
from bilevel.optimizers.torch_optim import TorchOptimizer
from bilevel.preconditioners.hutchinson import Hutchinson
from bilevel.types import Estimate, LowerSolution, Point
from tests.cases import NAMES, PROBLEMS, assert_close, closed_form, relative
from tests.points import halves, product

ESTIMATORS = [
    Implicit(solver=CG(iterations=100, tolerance=1e-10)),
    Implicit(solver=Dense()),
    OneStep(),
    OneStep(finite_difference=True),
    Unroll(along=Gradient(steps=3)),
    Unroll(along=Gradient(steps=3), memory="recompute"),
    Unroll(along=Gradient(steps=3), memory="checkpoint"),
    Alternating(),
]
IDS = ["cg", "dense", "one step", "one step fd", "unroll", "recompute", "checkpoint", "none"]
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS, ids=IDS)


def upper(x, y, batch):
    return ((y["w"] - 2.0) ** 2).sum() + (x["a"] * y["b"]).sum() + x["direct"].exp().sum()


def lower(x, y, batch):
    w = ((y["w"] - x["a"]) ** 2).sum() * 0.7 + (y["w"] ** 4).sum() * 0.1
    return w + ((y["b"] + x["a"][0]) ** 2).sum() + x["scale"].exp() * (y["b"] ** 2).sum()


def point(dtype=torch.float64):
    x = {
        "a": torch.tensor([0.3, -1.2], dtype=dtype),
        "direct": torch.tensor(0.4, dtype=dtype),
        "scale": torch.tensor(-0.5, dtype=dtype),
    }
    y = {"w": torch.tensor([1.0, 0.2], dtype=dtype), "b": torch.tensor([0.1, 0.9], dtype=dtype)}
    return x, y


@every_estimator
def test_returns_names_shapes_dtypes_value_and_evidence(estimator):
    x, y = point()
    estimate = bilevel.hypergradient(upper, lower, x, y, estimator=estimator)
    assert isinstance(estimate, Estimate)
    assert {n: (h.shape, h.dtype) for n, h in estimate.hypergradient.items()} == {
        n: (p.shape, p.dtype) for n, p in x.items()
    }
    assert estimate.value.shape == ()
    assert not estimate.value.requires_grad
    assert not any(h.requires_grad for h in estimate.hypergradient.values())
    assert estimate.stats.gradients >= 1
    assert estimate.stats.seconds > 0


def test_the_evidence_of_cg():
    x, y = point()
    stats = bilevel.hypergradient(upper, lower, x, y, estimator=ESTIMATORS[0]).stats
    assert stats.hvps == stats.iterations == 3  # distinct eigenvalues: two of `w`, one of `b`
    assert stats.cross_products == 1
    assert stats.gradients == 2
    assert stats.converged
    assert stats.residual <= 1e-10
    H = torch.func.jacrev(torch.func.jacrev(lambda w: lower(x, tree.unflatten(w, y), None)))(
        tree.flatten(y)
    )
    values = torch.linalg.eigvalsh(H)
    assert values[0] <= stats.curvature <= values[-1]
    assert stats.condition == pytest.approx(float(values[-1] / values[0]), rel=1e-6)


@every_estimator
def test_touches_nothing(estimator):
    x, y = point()
    for params in (x, y):
        for entry in params.values():
            entry.requires_grad_()
            entry.grad = torch.full_like(entry, 7.0)
    before = tree.clone(x), tree.clone(y)
    random_state = torch.random.get_rng_state()
    with torch.no_grad():  # a caller's mode does not matter either
        bilevel.hypergradient(upper, lower, x, y, estimator=estimator)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    for params, old in zip((x, y), before, strict=True):
        for name, entry in params.items():
            assert torch.equal(entry, old[name])
            assert torch.equal(entry.grad, torch.full_like(entry, 7.0))
            assert entry.is_leaf


@every_estimator
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_lower_precisions_agree_with_float64(estimator, dtype, rtol):
    if getattr(estimator, "finite_difference", False):
        rtol = max(rtol, 0.02)  # a difference of 0.01 in y loses digits to rounding
        if (
            dtype is torch.bfloat16
        ):  # a difference of 0.01 in a y of length 2 is nothing but rounding
            with pytest.raises(ProblemError, match="bfloat16 a y of length"):
                bilevel.hypergradient(upper, lower, *point(dtype), estimator=estimator)
            return
    truth = bilevel.hypergradient(upper, lower, *point(), estimator=estimator).hypergradient
    x, y = point(dtype)
    got = bilevel.hypergradient(upper, lower, x, y, estimator=estimator).hypergradient
    assert {h.dtype for h in got.values()} == {dtype}
    assert relative(tree.map(torch.Tensor.double, got), truth) <= rtol


@every_estimator
def test_non_contiguous_tensors(estimator):
    torch.manual_seed(0)
    A = torch.randn(3, 4, dtype=torch.float64)

    def up(x, y, batch):
        return ((y["w"] - 1) ** 2).sum() + (x["p"] ** 2).sum()

    def low(x, y, batch):
        return ((y["w"] @ x["p"] - A[:, :3]) ** 2).sum() + 0.5 * (y["w"] ** 2).sum()

    w, p = torch.randn(4, 3, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    contiguous = bilevel.hypergradient(
        up, low, {"p": p.t().contiguous()}, {"w": w.t().contiguous()}, estimator=estimator
    )
    strided = bilevel.hypergradient(up, low, {"p": p.t()}, {"w": w.t()}, estimator=estimator)
    assert not p.t().is_contiguous()
    assert_close(strided.hypergradient, contiguous.hypergradient, rtol=1e-12)


@every_estimator
def test_an_upper_variable_that_reaches_neither_loss_is_named(estimator):
    x, y = point()
    x["forgotten"] = torch.ones(2, dtype=torch.float64)
    with pytest.raises(ProblemError, match="forgotten reaches neither loss"):
        bilevel.hypergradient(upper, lower, x, y, estimator=estimator)


@every_estimator
def test_a_detached_upper_variable_is_named(estimator):
    x, y = point()

    def cut(function):
        return lambda x, y, b: function(x | {"a": x["a"].detach()}, y, b)

    with pytest.raises(ProblemError, match="a reaches neither loss"):
        bilevel.hypergradient(cut(upper), cut(lower), x, y, estimator=estimator)


@every_estimator
def test_a_variable_in_one_loss_only_is_fine(estimator):
    x, y = point()  # `direct` is in F only, `scale` in G only
    h = bilevel.hypergradient(upper, lower, x, y, estimator=estimator).hypergradient
    assert float(h["direct"]) == pytest.approx(float(x["direct"].exp()))
    assert (float(h["scale"]) != 0) is not isinstance(estimator, Alternating)


def test_a_lower_variable_that_only_the_upper_loss_uses_is_held_fixed():
    """The lower level never moves it, so it adds nothing, and the solve still converges."""
    x, y = point()
    truth = bilevel.hypergradient(upper, lower, x, y, estimator=ESTIMATORS[0])
    wide = y | {"unused": torch.ones(3, dtype=torch.float64)}

    def up(x, y, batch):
        return upper(x, y, batch) + 5 * y["unused"].sum()

    got = bilevel.hypergradient(up, lower, x, wide, estimator=ESTIMATORS[0])
    assert got.stats.converged
    assert_close(got.hypergradient, truth.hypergradient, rtol=1e-12)


def test_the_state_warm_starts_the_adjoint():
    case = closed_form(PROBLEMS[1], 0)
    estimator = Implicit(solver=CG(iterations=1000, tolerance=1e-9))
    cold = case.estimate(estimator)
    warm = case.estimate(estimator, state=cold.state)
    assert cold.stats.iterations > 20
    assert warm.stats.iterations == 0
    unwarmed = Implicit(solver=estimator.solver, start="cold")
    assert case.estimate(unwarmed, state=cold.state).stats.iterations == cold.stats.iterations


@pytest.mark.parametrize("make", PROBLEMS, ids=NAMES)
def test_unroll_function_is_differentiable_by_autograd(make):
    case = closed_form(make, 0)
    x = tree.map(lambda p: p.clone().requires_grad_(), case.x)
    start = tree.map(lambda p: (p + 0.1).requires_grad_(), case.y)
    end = bilevel.unroll(
        case.problem.lower_loss,
        x,
        start,
        steps=5,
        optimizer=SGD(lr=0.05),
        batch=case.lower_batch,
    )
    F = case.problem.upper_loss(x, end, case.upper_batch)
    (name,) = case.x
    (y_name,) = case.y
    at_x, at_start = torch.autograd.grad(F, [x[name], start[y_name]])
    path = case.record(5, 0.05, tree.detach(start)).path
    assert_close(
        {name: at_x},
        case.estimate(Unroll(), LowerSolution(case.y, path=path)).hypergradient,
        rtol=1e-12,
    )
    H = case.hessian()
    M = torch.linalg.matrix_power(torch.eye(len(H), dtype=H.dtype) - 0.05 * H, 5)
    (F_y,) = torch.autograd.grad(case.problem.upper_loss(x, end, case.upper_batch), end[y_name])
    torch.testing.assert_close(at_start, M @ F_y, rtol=1e-9, atol=1e-12)


def test_unroll_function_refuses_what_cannot_be_differentiated():
    with pytest.raises(ProblemError, match="writes in place"):
        bilevel.unroll(lower, *point(), steps=2, optimizer=TorchOptimizer(optimizer="Adagrad"))


def test_not_finite_is_an_error_that_names_the_loss_or_the_variable():
    x, y = point()
    nan = lambda x, y, b: upper(x, y, b) * float("nan")  # noqa: E731
    with pytest.raises(ConvergenceError, match="upper_loss = nan"):
        bilevel.hypergradient(nan, lower, x, y, estimator=Implicit())
    steep = lambda x, y, b: upper(x, y, b) + (x["direct"] - 0.4).abs().sqrt()  # noqa: E731
    with pytest.raises(ConvergenceError, match="hypergradient of direct is not finite"):
        bilevel.hypergradient(steep, lower, x, y, estimator=Implicit())


@pytest.mark.parametrize("name", ["x", "y"])
def test_wrong_inputs_are_named(name):
    x, y = point()
    broken = {"x": x, "y": y} | {name: {"w": torch.ones(2, dtype=torch.int64)}}
    with pytest.raises(ProblemError, match=rf"{name}\['w'\] must be a floating-point tensor"):
        bilevel.hypergradient(upper, lower, **broken, estimator=Implicit())


def test_two_hundred_thousand_unknowns_without_a_matrix():
    """Per-coordinate lower problems with condition 1e3: the solution is known in closed form."""
    n = 200_000
    weights = torch.logspace(0, -3, n, dtype=torch.float64)

    def low(x, y, batch):
        return 0.5 * (weights * y["y"] ** 2).sum() - x["s"] * y["y"].sum()

    def up(x, y, batch):
        return 0.5 * (weights * (y["y"] - 1.0) ** 2).sum()

    s = 0.7
    x, y = {"s": torch.tensor(s, dtype=torch.float64)}, {"y": s / weights}
    estimator = Implicit(solver=CG(iterations=400, tolerance=1e-9))
    got = bilevel.hypergradient(up, low, x, y, estimator=estimator)
    truth = float((s / weights - 1.0).sum())
    assert float(got.hypergradient["s"]) == pytest.approx(truth, rel=1e-6)
    assert got.stats.converged
    assert got.stats.condition == pytest.approx(1e3, rel=0.05)


@pytest.mark.parametrize("memory", ["store", "recompute", "checkpoint", "mixed"])
def test_gradients_that_share_memory_are_kept_apart(memory):
    """autograd gives one tensor for x_a + x_b, and an expanded scalar for a sum."""

    def up(x, y, batch):
        return x["a"] + x["b"] + x["v"].sum() + (y["y"] ** 2).sum()

    def low(x, y, batch):
        return ((y["y"] - x["a"] - 2 * x["b"]) ** 2).sum() + (x["v"].sum() * y["y"]).sum() / 9

    draw = lambda *s: torch.linspace(0.1, 0.7, max(1, sum(s)), dtype=torch.float64).reshape(s)  # noqa: E731
    x = {"a": draw(), "b": draw() + 1, "v": draw(3)}
    y = {"y": draw(2)}
    leaves = tree.map(lambda p: p.clone().requires_grad_(), x)
    end = bilevel.unroll(low, leaves, y, steps=4)
    truth = torch.autograd.grad(up(leaves, end, None), list(leaves.values()))
    along = Gradient(steps=4)
    got = bilevel.hypergradient(up, low, x, y, estimator=Unroll(along=along, memory=memory))
    assert_close(got.hypergradient, dict(zip(x, truth, strict=True)), rtol=1e-12)
    for h in got.hypergradient.values():
        h += 1.0  # each entry is the caller's own


def test_a_product_may_alias_what_was_put_in():
    """The Hessian of ½‖y‖² returns its argument; solvers write in place."""

    def low(x, y, batch):
        return 0.5 * (y["y"] ** 2).sum() - (x["x"] * y["y"]).sum()

    def up(x, y, batch):
        return (y["y"] ** 3).sum()

    x = {"x": torch.tensor([1.0, -2.0], dtype=torch.float64)}
    for solver in (CG(), MINRES(), GMRES(), NormalCG(), Dense()):
        got = bilevel.hypergradient(up, low, x, {"y": x["x"]}, estimator=Implicit(solver=solver))
        assert_close(got.hypergradient, {"x": 3 * x["x"] ** 2}, rtol=1e-9)


@pytest.mark.parametrize("solver", [CG(), MINRES(), GMRES()], ids=lambda s: type(s).__name__)
def test_a_product_that_is_not_finite_is_an_error(solver):
    def low(x, y, batch):
        return y["y"].norm() + 0.5 * ((y["y"] - x["x"]) ** 2).sum()

    def up(x, y, batch):
        return ((y["y"] - 1) ** 2).sum()

    x, y = {"x": torch.ones(2)}, {"y": torch.zeros(2)}
    with pytest.raises(ConvergenceError, match="not finite"):
        bilevel.hypergradient(up, low, x, y, estimator=Implicit(solver=solver))


def test_too_few_batches_are_an_error():
    y = {"y": torch.zeros(2)}

    def low(x, y, batch):
        return ((y["y"] - batch) ** 2).sum()

    with pytest.raises(ProblemError, match="batches ended"):
        bilevel.unroll(low, {}, y, steps=10, batches=[1.0, 2.0])
    with pytest.raises(ProblemError, match="batches ended"):
        bilevel.solve_lower(low, {}, y, solver=Gradient(steps=10), batches=[1.0, 2.0])


def test_each_step_is_replayed_on_its_own_batch():
    """Batches that differ from step to step, forwards, backwards and truncated."""
    case = closed_form(PROBLEMS[0], 0)
    scales = [0.5, 1.0, 2.0, 0.7]

    def low(x, y, batch):
        return batch * case.problem.lower_loss(x, y, case.lower_batch)

    x, start = tree.map(lambda p: p.clone().requires_grad_(), case.x), case.y["y"] + 1.0
    y = start.requires_grad_()
    for scale in scales:
        (g,) = torch.autograd.grad(low(x, {"y": y}, scale), y, create_graph=True)
        y = y - 0.2 * g
    F = case.problem.upper_loss(x, {"y": y}, case.upper_batch)
    truth = {"x": torch.autograd.grad(F, x["x"])[0]}
    solved = bilevel.solve_lower(
        low,
        case.x,
        {"y": start.detach()},
        solver=Gradient(steps=4, optimizer=SGD(lr=0.2)),
        batches=scales,
        record=True,
    )
    for estimator in (
        Unroll(),
        Unroll(memory="recompute"),
        Unroll(memory="checkpoint"),
        Forward(),
    ):
        got = bilevel.hypergradient(
            case.problem.upper_loss,
            low,
            case.x,
            solved,
            estimator=estimator,
            upper_batch=case.upper_batch,
            lower_batch=solved.batch,
        )
        assert_close(got.hypergradient, truth, rtol=1e-11)


def test_batch_norm_is_refused_before_its_buffers_change():
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    net[1].requires_grad_(False)  # frozen, and still in training mode
    y = {"0.weight": net[0].weight.detach(), "0.bias": net[0].bias.detach()}
    before = net[1].running_mean.clone()

    def low(x, y, batch):
        return (functional_call(net, y, (torch.randn(5, 3),)) ** 2).mean()

    with pytest.raises(ProblemError, match="BatchNorm in training mode"):
        bilevel.solve_lower(low, {}, y)
    assert torch.equal(net[1].running_mean, before)


def test_the_seconds_are_those_of_the_call():
    case, before = closed_form(PROBLEMS[0], 0), time.perf_counter()
    seconds = case.estimate(Implicit()).stats.seconds
    assert 0 < seconds < time.perf_counter() - before


def test_a_state_from_another_problem_is_named():
    small = bilevel.hypergradient(
        product,
        halves,
        {"x": torch.ones(3)},
        {"a": torch.ones(3), "b": torch.zeros(3)},
        estimator=Implicit(),
    )
    x, y = {"x": torch.ones(2)}, {"a": torch.ones(2), "b": torch.zeros(2)}
    with pytest.raises(ProblemError, match=r"state is of another problem.*shape.*state=None"):
        bilevel.hypergradient(product, halves, x, y, estimator=Implicit(), state=small.state)

    class Fails(Implicit):
        def estimate(self, losses, at, state):
            raise RuntimeError("of its own")

    own = Implicit().init(Point(x, y))  # control: another error is left alone
    with pytest.raises(RuntimeError, match="of its own"):
        bilevel.hypergradient(product, halves, x, y, estimator=Fails(), state=own)


def test_inference_mode_is_said_to_be_the_reason():
    x, y = {"x": torch.ones(2)}, {"a": torch.ones(2), "b": torch.zeros(2)}
    with torch.inference_mode():
        with pytest.raises(ProblemError, match=r"torch.inference_mode\(\)"):
            bilevel.hypergradient(product, halves, x, y, estimator=Implicit())
        with pytest.raises(ProblemError, match=r"torch.inference_mode\(\)"):
            bilevel.solve_lower(halves, x, y)
    with torch.no_grad():
        assert bilevel.hypergradient(product, halves, x, y, estimator=Implicit())


def test_dense_names_a_hessian_that_is_not_finite():
    def rooted(x, y, batch):
        return halves(x, y, batch) + y["a"].abs().pow(1.5).sum()

    x, y = {"x": torch.ones(2)}, {"a": torch.zeros(2), "b": torch.zeros(2)}
    with pytest.raises(
        ConvergenceError, match=r"product with the lower Hessian is not finite at this point"
    ):
        bilevel.hypergradient(product, rooted, x, y, estimator=Implicit(solver=Dense()))


def test_hutchinson_with_an_empty_entry():
    x = {"x": torch.ones(2)}
    y = {"a": torch.ones(2), "b": torch.zeros(2), "none": torch.zeros(0, 3)}
    estimator = Implicit(preconditioner=Hutchinson())
    got = bilevel.hypergradient(product, halves, x, y, estimator=estimator).hypergradient["x"]
    # ∂²yy G = I, so dΦ/dx = b + 2a
    assert torch.allclose(got, y["b"] + 2 * y["a"])


# arguments


def doors(F, G, x, y, batch=None):
    """Each way in from plain functions, called with these losses and variables."""
    return {
        "hypergradient": lambda: bilevel.hypergradient(
            F, G, x, y, estimator="implicit", upper_batch=batch, lower_batch=batch
        ),
        "solve_lower": lambda: bilevel.solve_lower(G, x, y, batch=batch),
        "unroll": lambda: bilevel.unroll(G, x, y, steps=2, batch=batch),
    }


every_door = pytest.mark.parametrize("door", ["hypergradient", "solve_lower", "unroll"])


def inference(*shape):
    with torch.inference_mode():
        return torch.ones(*shape)


NO_VARIABLES = {
    "x is a list of numbers": (
        [1.0],
        {"a": torch.ones(2)},
        r"^x\['0'\] must be a floating-point tensor, got float",
    ),
    "x is None": (None, {"a": torch.ones(2)}, r"^x must be a dict.* got NoneType"),
    "y is a tensor": ({"x": torch.ones(2)}, torch.ones(2), r"^y must be a dict.* got Tensor"),
    "an entry is a number": ({"x": 1.0}, {"a": torch.ones(2)}, r"^x\['x'\] must be .* got float"),
    "y is empty": ({"x": torch.ones(2)}, {}, "^y is empty"),
    "x of inference": (
        {"x": inference(2)},
        {"a": torch.ones(2)},
        r"^x\['x'\] was made under .*clone",
    ),
    "y of inference": (
        {"x": torch.ones(2)},
        {"a": inference(2)},
        r"^y\['a'\] was made under .*clone",
    ),
}


@every_door
@pytest.mark.parametrize(("x", "y", "message"), NO_VARIABLES.values(), ids=NO_VARIABLES.keys())
def test_what_is_no_variable_is_named(door, x, y, message):
    with pytest.raises(ProblemError, match=message):
        doors(halves, product, x, y)[door]()


@every_door
def test_a_batch_made_under_inference_mode_is_named_with_the_remedy(door):
    def weighted(x, y, batch):
        return (batch * (y["a"] - x["x"]) ** 2).sum()

    def call(batch):
        return doors(weighted, weighted, {"x": torch.zeros(2)}, {"a": torch.ones(2)}, batch)[door]()

    with pytest.raises(ProblemError, match=r"^lower_loss uses a tensor .*inference_mode.*clone"):
        call(inference(2))
    call(inference(2).clone())  # taken outside of inference mode, as the remedy says


def test_components_may_be_given_by_name_or_as_in_a_recipe():
    x, y = point()
    asked = {"name": "implicit", "solver": {"name": "cg", "iterations": 3}}
    for given, estimator in (("implicit", Implicit()), (asked, Implicit(solver=CG(iterations=3)))):
        named = bilevel.hypergradient(upper, lower, x, y, estimator=given).hypergradient
        expected = bilevel.hypergradient(upper, lower, x, y, estimator=estimator).hypergradient
        assert_close(named, expected, rtol=0)
    for given, solver in (
        ("newton", Newton()),
        ({"name": "gradient", "steps": 2}, Gradient(steps=2)),
    ):
        named = bilevel.solve_lower(lower, x, y, solver=given).y
        assert_close(named, bilevel.solve_lower(lower, x, y, solver=solver).y, rtol=0)
    for given, optimizer in (("adam", Adam()), ({"name": "sgd", "lr": 0.2}, SGD(lr=0.2))):
        named = bilevel.unroll(lower, x, y, steps=2, optimizer=given)
        expected = bilevel.unroll(lower, x, y, steps=2, optimizer=optimizer)
        assert_close(tree.detach(named), tree.detach(expected), rtol=0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Implicit, r"estimator = Implicit, a class; expected an instance: Implicit\(…\)"),
        ("implicit_", "Did you mean 'implicit'"),
        (3, r"estimator = 3; expected an instance, a name \(.*implicit"),
        (CG(), "estimator = CG.*; expected an instance, a name"),
    ],
)
def test_what_is_no_estimator_is_refused(given, message):
    with pytest.raises(RecipeError, match=message):
        bilevel.hypergradient(upper, lower, *point(), estimator=given)


def test_a_class_or_another_component_is_refused_as_a_solver_and_an_optimizer():
    x, y = point()
    with pytest.raises(RecipeError, match=r"solver = LBFGS, a class; .*LBFGS\(…\)"):
        bilevel.solve_lower(lower, x, y, solver=LBFGS)
    with pytest.raises(RecipeError, match=r"solver = SGD.*; expected an instance, a name"):
        bilevel.solve_lower(lower, x, y, solver=SGD())
    with pytest.raises(RecipeError, match=r"optimizer = Adam, a class; .*Adam\(…\)"):
        bilevel.unroll(lower, x, y, steps=2, optimizer=Adam)


def test_a_call_with_state_evaluates_each_loss_once():
    calls = {"F": 0, "G": 0}

    def counted(name, loss):
        def function(x, y, batch):
            calls[name] += 1
            return loss(x, y, batch)

        return function

    F, G = counted("F", upper), counted("G", lower)
    state = bilevel.hypergradient(F, G, *point(), estimator="implicit").state
    assert calls["G"] > 1  # the first call looks whether the losses are pure
    calls.update(F=0, G=0)
    bilevel.hypergradient(F, G, *point(), estimator="implicit", state=state)
    assert calls == {"F": 1, "G": 1}
