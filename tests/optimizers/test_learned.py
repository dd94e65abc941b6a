"""Learned options of the lower optimizer: derivatives against differences, refusals, recipes."""

import math

import pytest
import torch

import bilevel
from bilevel import hypergradient, solve_lower, unroll
from bilevel.errors import ProblemError, RecipeError
from bilevel.estimators import FOMAML, Forward, Implicit, OneStep, Penalty, Unroll, ZerothOrder
from bilevel.lower import LBFGS, AugmentedLagrangian, Gradient
from bilevel.optimizers import SGD, Adam, AdamW, Learned, RMSprop, TorchOptimizer
from bilevel.optimizers.adjusted import Adjusted
from bilevel.optimizers.clip import Clip
from bilevel.optimizers.learned import bound
from bilevel.registry.build import build
from bilevel.registry.fields import describe
from bilevel.run import Setup, Upper
from bilevel.run.refusals import refuse_mismatch

K = 4
F64 = torch.float64


def tensor(*values):
    return torch.tensor(values, dtype=F64)


def scalar(value):
    return torch.tensor(value, dtype=F64)


BATCH = {"in": tensor([1.0, -0.5, 2.0], [0.3, 1.2, -1.0]), "out": tensor(0.7, -0.4)}
Y = {"w": tensor(0.5, -1.5, 0.8), "b": scalar(0.3)}


def lower(x, y, batch):
    residual = (batch["in"] @ y["w"] + y["b"]).tanh() - batch["out"]
    return residual.square().sum() + x["decay"].exp() * (y["w"].square().sum() + y["b"] ** 2)


def upper(x, y, batch):
    return (batch["in"] @ y["w"] + 2 * y["b"] - 1).square().sum() + (y["w"] ** 3).sum()


LR = Learned(upper="lr", transform="exp")
MOMENTUM = Learned(upper="momentum", transform="sigmoid")
DECAY = Learned(upper="l2", transform="softplus")
X = {
    "decay": scalar(-2.0),
    "lr": scalar(-2.5),
    "momentum": scalar(0.4),
    "l2": scalar(-3.0),
    "beta": scalar(1.5),
}
CASES = [
    SGD(lr=LR, momentum=MOMENTUM, weight_decay=DECAY),
    SGD(lr=LR, momentum=MOMENTUM, nesterov=True),
    SGD(lr=0.1, momentum=MOMENTUM, dampening=0.2),
    SGD(lr=LR),
    Adam(
        lr=LR, beta1=MOMENTUM, beta2=Learned(upper="beta", transform="sigmoid"), weight_decay=DECAY
    ),
    AdamW(lr=LR, beta1=MOMENTUM, weight_decay=DECAY),
    RMSprop(lr=LR, alpha=MOMENTUM, momentum=Learned(upper="beta", transform="sigmoid")),
]
MODES = ["store", "recompute", "checkpoint", "traced", "mixed"]


def used(optimizer, x=None):
    """The entries of x that a case reads."""
    names = {"decay", *(o.upper for o in vars(optimizer).values() if isinstance(o, Learned))}
    return {name: entry for name, entry in (x or X).items() if name in names}


def end(optimizer, x, steps=K):
    """F at y_K, of the steps with the options that x gives."""
    y = unroll(lower, x, Y, steps=steps, optimizer=optimizer, batch=BATCH)
    return upper(x, y, BATCH).detach()


def differences(value, x, h=1e-6):
    """Central differences of value(x), entry by entry."""
    found = {}
    for name, entry in x.items():
        found[name] = torch.zeros_like(entry)
        for i in range(entry.numel()):
            step = torch.zeros_like(entry).flatten()
            step[i] = h
            above, below = (value({**x, name: entry + s * step.view_as(entry)}) for s in (1, -1))
            found[name].view(-1)[i] = (above - below) / (2 * h)
    return found


def estimate(estimator, optimizer, x, steps=K):
    solved = solve_lower(
        lower, x, Y, solver=Gradient(steps=steps, optimizer=optimizer), batch=BATCH, record=True
    )
    return hypergradient(upper, lower, x, solved, estimator=estimator, upper_batch=BATCH)


def off(got, expected):
    """The largest relative error of an entry, so that a zero in a small one shows."""
    assert got.keys() == expected.keys()
    return max(float((got[n] - e).norm() / e.norm()) for n, e in expected.items())


@pytest.mark.parametrize("optimizer", CASES, ids=repr)
def test_the_solve_takes_the_values_that_x_gives(optimizer):
    numbers = {
        name: float(option.at(X, Y)["w"])
        for name, option in vars(optimizer).items()
        if isinstance(option, Learned)
    }
    plain = type(optimizer)(**{**vars(optimizer), **numbers})
    x = used(optimizer)
    got = solve_lower(lower, x, Y, solver=Gradient(steps=K, optimizer=optimizer), batch=BATCH)
    expected = solve_lower(lower, x, Y, solver=Gradient(steps=K, optimizer=plain), batch=BATCH)
    for name, entry in expected.y.items():
        torch.testing.assert_close(got.y[name], entry, rtol=1e-13, atol=0)
    other = {**x, next(n for n in x if n != "decay"): scalar(-1.0)}
    moved = solve_lower(lower, other, Y, solver=Gradient(steps=K, optimizer=optimizer), batch=BATCH)
    assert (moved.y["w"] - expected.y["w"]).norm() > 1e-4  # negative control


@pytest.mark.parametrize("optimizer", CASES, ids=repr)
def test_differences_in_every_memory_mode_and_forward(optimizer):
    x = used(optimizer)
    expected = differences(lambda x: end(optimizer, x), x)
    assert all(entry.norm() > 1e-4 for entry in expected.values())  # else nothing would be shown
    for estimator in [*(Unroll(memory=mode) for mode in MODES), Forward()]:
        got = estimate(estimator, optimizer, x).hypergradient
        assert off(got, expected) < 1e-6, estimator
    shorter = estimate(Unroll(), optimizer, x, steps=K - 1).hypergradient
    assert off(shorter, expected) > 1e-2  # negative control


def test_what_a_clipped_optimizer_learns_is_bound_too():
    y = {"w": tensor(1.0, 2.0)}
    x = {"lr": scalar(-2.5)}
    rule = bound(Adjusted(SGD(lr=LR), Clip(norm=1.0)), x, y)
    stepped, _ = rule.step(y, {"w": tensor(0.0, 10.0)}, rule.init(y))
    torch.testing.assert_close(stepped["w"], tensor(1.0, 2.0 - math.exp(-2.5)))


def test_one_step_of_sgd_by_hand():
    """y_1 = y_0 − e^a g, so dF/da = −e^a ∇F(y_1) · g."""

    def loss(x, y):
        return (y["w"] - 1).square().sum() / 2 + 0 * x["a"]

    def outer(x, y):
        return y["w"].square().sum() / 2

    solver = Gradient(steps=1, optimizer=SGD(lr=Learned(upper="a", transform="exp")))
    x, y = {"a": scalar(math.log(0.25))}, {"w": tensor(3.0)}
    solved = solve_lower(loss, x, y, solver=solver, record=True)
    assert float(solved.y["w"]) == 2.5
    got = hypergradient(outer, loss, x, solved, estimator=Unroll())
    assert float(got.hypergradient["a"]) == pytest.approx(-0.25 * 2.5 * 2.0, rel=1e-14)


@pytest.mark.parametrize("memory", ["store", "traced", "mixed"])
@pytest.mark.parametrize("kind", ["tree", "shape"])
def test_one_for_each_coordinate(memory, kind):
    """Meta-SGD: an entry for each of y, nested or by its dotted name; or a shape that broadcasts."""
    if kind == "tree":
        x = {"decay": X["decay"], "lr.w": tensor(-2.5, -2.0, -3.0), "lr.b": scalar(-2.2)}
        start, loss, outer = Y, lower, upper
    else:
        x, start = {"decay": X["decay"], "lr": tensor(-2.5, -2.0, -3.0)}, {"w": Y["w"]}

        def loss(x, y, batch):
            return lower(x, {**y, "b": Y["b"]}, batch)

        def outer(x, y, batch):
            return upper(x, {**y, "b": Y["b"]}, batch)

    optimizer = SGD(lr=LR, momentum=0.5)

    def value(x):
        y = unroll(loss, x, start, steps=K, optimizer=optimizer, batch=BATCH)
        return outer(x, y, BATCH).detach()

    solver = Gradient(steps=K, optimizer=optimizer)
    solved = solve_lower(loss, x, start, solver=solver, batch=BATCH, record=True)
    got = hypergradient(outer, loss, x, solved, estimator=Unroll(memory=memory), upper_batch=BATCH)
    assert off(got.hypergradient, differences(value, x)) < 1e-6


def test_nested_x_is_one_for_each_entry_of_y():
    x = {"decay": X["decay"], "lr": {"w": tensor(-2.5, -2.0, -3.0), "b": scalar(-2.2)}}
    flat = {"decay": X["decay"], "lr.w": x["lr"]["w"], "lr.b": x["lr"]["b"]}
    nested = estimate(Unroll(), SGD(lr=LR), x).hypergradient
    expected = estimate(Unroll(), SGD(lr=LR), flat).hypergradient
    assert torch.equal(nested["lr"]["w"], expected["lr.w"])
    assert torch.equal(nested["lr"]["b"], expected["lr.b"])


def test_zeroth_order_sees_it_too():
    x = used(SGD(lr=LR))
    many = ZerothOrder(samples=400, smoothing=1e-5)
    got = estimate(many, SGD(lr=LR), x).hypergradient["lr"]
    expected = differences(lambda x: end(SGD(lr=LR), x), x)["lr"]
    assert float(got * expected) > 0
    assert float((got - expected).abs() / expected.abs()) < 0.5


def test_a_narrow_y_keeps_its_dtype():
    y = {name: entry.float() for name, entry in Y.items()}
    optimizer = SGD(lr=Learned(upper="lr", transform="exp"), momentum=MOMENTUM)
    x = {"lr": tensor(-2.5, -2.0, -3.0), "momentum": X["momentum"]}
    state = optimizer.init(y)
    stepped = {"w": y["w"]}
    moved, _ = bound(optimizer, x, stepped).step(stepped, stepped, state)
    assert moved["w"].dtype == torch.float32


def test_a_run_learns_its_learning_rate():
    """From a rate far too small, F after K steps falls to where the best constant rate takes it."""

    class Rate:
        def init(self, streams):
            return {"log_lr": scalar(math.log(0.01))}, {"w": tensor(3.0)}

        def lower_start(self, x, y):
            return {"w": tensor(3.0)}

        def lower_loss(self, x, y, batch):
            return (y["w"] - 1).square().sum() / 2

        def upper_loss(self, x, y, batch):
            return (y["w"] - 1).square().sum() / 2

        def upper_batches(self, stream):
            while True:
                yield None

        lower_batches = upper_batches

    found = bilevel.minimize(
        Rate(),
        lower=Gradient(steps=2, optimizer=SGD(lr=Learned(upper="log_lr", transform="exp"))),
        estimator=Unroll(),
        upper=Upper(optimizer=Adam(lr=0.1)),
        steps=120,
    )
    assert float(found.x["log_lr"].exp()) == pytest.approx(1.0, abs=0.2)  # y_1 = 1 at once


@pytest.mark.parametrize(
    ("estimator", "words"),
    [
        (Implicit(), r"lr from x.*Implicit differentiates the lower solution.*estimator: unroll"),
        (OneStep(), r"lr from x.*OneStep does not differentiate them.*estimator: unroll"),
    ],
    ids=repr,
)
def test_who_does_not_differentiate_the_steps_refuses(estimator, words):
    with pytest.raises(ProblemError, match=words):
        estimate(estimator, SGD(lr=LR), used(SGD(lr=LR)))


def test_without_a_path_there_is_a_word():
    x, solver = used(SGD(lr=LR)), Gradient(steps=K, optimizer=SGD(lr=LR))
    solved = solve_lower(lower, x, Y, solver=solver, batch=BATCH)
    with pytest.raises(ProblemError, match=r"lr reaches neither loss.*how it steps"):
        hypergradient(upper, lower, x, solved, estimator=Implicit(), upper_batch=BATCH)


@pytest.mark.parametrize(
    ("lower_solver", "estimator", "words"),
    [
        (Gradient(optimizer=SGD(lr=LR)), Implicit(), "Implicit differentiates the lower solution"),
        (Gradient(optimizer=SGD(lr=LR)), FOMAML(), "FOMAML does not differentiate"),
        (AugmentedLagrangian(solver=Gradient(optimizer=SGD(lr=LR))), Implicit(), "lr"),
        (Gradient(), Implicit(), None),
        (Gradient(optimizer=SGD(lr=LR)), Unroll(), None),
    ],
    ids=["implicit", "fomaml", "inner", "plain", "unroll"],
)
def test_a_run_refuses_before_it_begins(lower_solver, estimator, words):
    from bilevel_problems.quadratic import Quadratic

    class Starts(Quadratic):
        def lower_start(self, x, y):
            return y

        def lower_constraints(self, x, y, batch):
            return {}

    kind = Quadratic if words is None or "FOMAML" not in words else Starts
    setup = Setup(problem=kind(), lower=lower_solver, estimator=estimator, upper=Upper())
    if words is None:
        refuse_mismatch(setup)
        return
    with pytest.raises(ProblemError, match=words):
        refuse_mismatch(setup)


def test_an_estimators_own_solver_and_other_steps_refuse():
    inner = Penalty(lower=Gradient(optimizer=SGD(lr=LR)))
    with pytest.raises(ProblemError, match=r"own lower solver takes lr from x"):
        hypergradient(upper, lower, X, Y, estimator=inner, upper_batch=BATCH, lower_batch=BATCH)
    with pytest.raises(ProblemError, match=r"exp\(x\['lr'\]\).*lower: gradient"):
        SGD(lr=LR).step(Y, Y, {})


def test_reversible_refuses_by_name():
    optimizer = SGD(lr=LR, momentum=0.9)
    with pytest.raises(ProblemError, match=r"lr is learned.*recompute or checkpoint"):
        estimate(Unroll(memory="reversible"), optimizer, used(optimizer))


@pytest.mark.parametrize(
    ("x", "option", "words"),
    [
        (
            {"log_lr": 0.0},
            "log_rl",
            "has no entry 'log_rl': it has 'log_lr'; did you mean 'log_lr'",
        ),
        ({"lr.w": 0.0}, "lr", "no entry 'lr.b' for y\\['b'\\]"),
        ({"lr": [0.0, 0.0]}, "lr", r"shape \(2,\).*y\['w'\] of shape \(3,\)"),
        ({"lr": [[0.0] * 3] * 2}, "lr", r"shape \(2, 3\)"),
        ({"lr": -0.1}, "lr", r"lr = x\['lr'\] is -0.1.*exp or softplus"),
        ({"lr": [0.1, -0.2, 0.1]}, "lr", r"is -0.2"),
        ({"lr": math.nan}, "lr", r"is nan"),
    ],
    ids=["none", "lacking", "shape", "larger", "negative", "one negative", "nan"],
)
def test_a_wrong_entry_is_named(x, option, words):
    x = {name: torch.tensor(value, dtype=F64) for name, value in x.items()}
    y = {"w": Y["w"]} if "is -0.2" in words else Y
    optimizer = SGD(lr=Learned(upper=option))

    def loss(x, y, _):
        return sum(entry.square().sum() for entry in y.values())

    with pytest.raises(ProblemError, match=words):
        solve_lower(loss, x, y, solver=Gradient(optimizer=optimizer))
    with pytest.raises(ProblemError, match=words):
        unroll(loss, x, y, steps=2, optimizer=optimizer)


def test_a_momentum_of_1_is_taken_where_the_number_is():
    """The range is the option's own: SGD takes 1, Adam's averages do not."""
    x = {"m": scalar(1.0)}
    solve_lower(
        lower,
        {**X, **x},
        Y,
        solver=Gradient(optimizer=SGD(lr=1e-3, momentum=Learned(upper="m"))),
        batch=BATCH,
    )
    with pytest.raises(ProblemError, match="beta1"):
        solve_lower(
            lower,
            {**X, **x},
            Y,
            solver=Gradient(optimizer=Adam(beta1=Learned(upper="m"))),
            batch=BATCH,
        )


def test_in_a_recipe():
    spec = {"name": "sgd", "lr": {"upper": "log_lr", "transform": "exp"}, "momentum": 0.5}
    made = build("optimizers", spec, "lower.optimizer")
    assert made == SGD(lr=Learned(upper="log_lr", transform="exp"), momentum=0.5)
    again = describe(Gradient(optimizer=made), "lower")
    assert again["optimizer"]["lr"] == spec["lr"]
    assert build("lower", again) == Gradient(optimizer=made)


@pytest.mark.parametrize(
    ("lr", "words"),
    [
        (-1, "lr = -1; must be > 0 or a mapping of Learned's options"),
        ({"upper": "a", "transform": "expo"}, "lr.transform = 'expo'; must be 'identity'"),
        ({"uper": "a"}, "lr.uper: unknown key. Did you mean 'upper'"),
        ({}, "lr.upper: missing"),
    ],
    ids=["number", "transform", "key", "missing"],
)
def test_a_recipes_mistake_is_named(lr, words):
    with pytest.raises(RecipeError, match=words.replace("(", r"\(")):
        build("optimizers", {"name": "sgd", "lr": lr}, "lower.optimizer")


def test_a_tensor_is_refused_with_this_remedy():
    with pytest.raises(TypeError, match=r"lr=Learned\(upper=…\)"):
        SGD(lr=torch.tensor(0.1, requires_grad=True))


def test_solvers_say_what_they_take():
    assert Gradient(optimizer=SGD(lr=LR, momentum=MOMENTUM)).offers.learned == {"lr", "momentum"}
    assert Gradient(optimizer=TorchOptimizer(optimizer="SGD")).offers.learned == frozenset()
    assert LBFGS().offers.learned == frozenset()
