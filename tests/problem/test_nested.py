"""x and y as their callers nest them, and losses without a batch: the numbers of the flat ones."""

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import tree
from bilevel.components import component
from bilevel.errors import ProblemError
from bilevel.estimators import Implicit, Unroll
from bilevel.lower import LBFGS, Gradient, Newton
from bilevel.optimizers import SGD
from bilevel.problem import LearnedStart, OverTasks
from bilevel.rng import Streams
from bilevel.types import Structure
from tests.problem.fits import Fit

Pair = namedtuple("Pair", ["weight", "bias"])


@dataclass
class Layer:
    weight: Tensor
    bias: Tensor


W, B = torch.tensor([0.3, -0.7], dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)
A = torch.tensor([1.5, -0.2], dtype=torch.float64)

CONTAINERS = {
    "dict": (
        lambda w, b: {"layer": {"weight": w, "bias": b}},
        lambda y: (y["layer"]["weight"], y["layer"]["bias"]),
    ),
    "list": (lambda w, b: [w, [b]], lambda y: (y[0], y[1][0])),
    "tuple": (lambda w, b: (w, b), lambda y: y),
    "named tuple": (lambda w, b: {"layer": Pair(w, b)}, lambda y: y["layer"]),
    "dataclass": (lambda w, b: Layer(w, b), lambda y: (y.weight, y.bias)),
}
every_container = pytest.mark.parametrize(("put", "take"), CONTAINERS.values(), ids=CONTAINERS)


def F(a, w, b):
    return (w - 1).square().sum() + (a * w).sum() * b + b


def G(a, w, b):
    return 0.5 * (w - a).square().sum() + (b - a.prod()).square() + 0.1 * (w.sum() * b).square()


def flat(_):
    """The losses on flat dicts, with a batch that is not used."""
    return (
        lambda x, y, batch: F(x["a"], y["w"], y["b"]),
        lambda x, y, batch: G(x["a"], y["w"], y["b"]),
    )


def equal(a, b):
    return torch.equal(torch.as_tensor(a), torch.as_tensor(b))


@every_container
@pytest.mark.parametrize(
    ("estimator", "solver"),
    [(Implicit(), Gradient(steps=3)), (Implicit(), LBFGS()), (Unroll(), Gradient(steps=3))],
    ids=["implicit", "lbfgs", "unroll"],
)
@pytest.mark.untrusted("20 steps of gradient descent do not solve the lower level")
def test_solution_and_hypergradient_are_those_of_flat_dicts(put, take, estimator, solver):
    record = isinstance(estimator, Unroll)
    upper, lower = flat(None)
    y = bilevel.solve_lower(lower, {"a": A}, {"w": W, "b": B}, solver=solver, record=record)
    expected = bilevel.hypergradient(upper, lower, {"a": A}, y, estimator=estimator).hypergradient

    x = put(A, torch.zeros((), dtype=torch.float64))
    nested = (
        lambda x, y: F(take(x)[0], *take(y)) + 3 * take(x)[1],
        lambda x, y: G(take(x)[0], *take(y)),
    )
    solved = bilevel.solve_lower(nested[1], x, put(W, B), solver=solver, record=record)
    assert type(solved.y) is type(put(W, B))
    assert equal(take(solved.y)[0], y.y["w"])
    assert equal(take(solved.y)[1], y.y["b"])
    found = bilevel.hypergradient(*nested, x, solved, estimator=estimator)
    assert type(found.hypergradient) is type(x)
    assert torch.allclose(take(found.hypergradient)[0], expected["a"], rtol=1e-12, atol=0)
    assert take(found.hypergradient)[1].item() == 3
    again = bilevel.hypergradient(*nested, x, solved, estimator=estimator, state=found.state)
    assert torch.allclose(take(again.hypergradient)[0], expected["a"], rtol=1e-5, atol=0)


@every_container
def test_unrolled_y_has_the_containers_of_y_and_its_graph(put, take):
    a = A.clone().requires_grad_()
    upper, lower = flat(None)
    y = bilevel.unroll(lower, {"a": a}, {"w": W, "b": B}, steps=3)
    (expected,) = torch.autograd.grad(upper({"a": a}, y, None), a)
    y = bilevel.unroll(lambda x, y: G(x["p"]["a"], *take(y)), {"p": {"a": a}}, put(W, B), steps=3)
    assert type(y) is type(put(W, B))
    (got,) = torch.autograd.grad(F(a, *take(y)), a)
    assert equal(got, expected)


def test_a_start_and_a_projection_take_and_return_the_containers():
    def lower(x, y):
        return 0.5 * (y["layer"]["w"] - x[0]).square().sum()

    def start(x):
        return {"layer": {"w": 2 * x[0]}}

    def clamped(y):
        return {"layer": {"w": y["layer"]["w"].clamp(max=1.0)}}

    solved = bilevel.solve_lower(
        lower,
        [A],
        start,
        record=True,
        solver=Gradient(steps=2),
        structure=Structure(project=clamped),
    )
    assert solved.y["layer"]["w"].tolist()[0] == 1.0
    # y_2 = a + 0.9² a for the entry that stays below 1
    assert solved.y["layer"]["w"].tolist()[1] == pytest.approx(-0.2 * 1.81)
    found = bilevel.hypergradient(
        lambda x, y: y["layer"]["w"].sum(), lower, [A], solved, estimator=Unroll()
    )
    assert isinstance(found.hypergradient, list)
    assert found.hypergradient[0].tolist() == pytest.approx([0.0, 1.81])


def test_a_flat_dict_is_taken_as_it_is_and_two_entries_of_one_name_are_refused():
    params = {"w": W, "b": B}
    assert tree.flat(params, "y") is params
    assert list(tree.flat({"l": params, "m": [B]}, "y")) == ["l.w", "l.b", "m.0"]
    with pytest.raises(ProblemError, match=r"^y has two entries of the dotted name 'l\.w'"):
        tree.flat({"l": {"w": W}, "l.w": B}, "y")
    with pytest.raises(
        ProblemError, match=r"^y\['l\.w'\] must be a floating-point tensor, got int"
    ):
        bilevel.solve_lower(lambda x, y: y, {"a": A}, {"l": {"w": 3}})


def test_a_tensor_in_two_places_is_one_variable():
    """d/da of (w - a)²/2 solved and F = w + w with one w: h = 2."""
    w, a = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    y = {"in": {"w": w}, "out": [w]}

    def lower(x, y):
        return 0.5 * (y["in"]["w"] - x["a"]).square().sum()

    def upper(x, y):
        return (y["in"]["w"] + y["out"][0]).sum()

    solved = bilevel.solve_lower(lower, {"a": a}, y, solver=Newton())
    assert solved.y["out"][0].item() == pytest.approx(1)
    got = bilevel.hypergradient(upper, lower, {"a": a}, solved, estimator="implicit")
    assert got.hypergradient["a"].item() == pytest.approx(2)


class Losses:
    """Losses as methods, with a default for the batch, and as callable objects."""

    def plain(self, x, y):
        return G(x["a"], y["w"], y["b"])

    def optional(self, x, y, batch=None):
        assert batch == "given"
        return self.plain(x, y)

    def __call__(self, x, y):
        return self.plain(x, y)


def test_a_loss_takes_its_batch_where_it_can_and_refuses_one_where_it_cannot():
    x, y = {"a": A}, {"w": W, "b": B}
    expected = bilevel.solve_lower(flat(None)[1], x, y, batch=None).y["w"]
    losses = Losses()
    assert equal(bilevel.solve_lower(losses.plain, x, y).y["w"], expected)
    assert equal(bilevel.solve_lower(losses, x, y).y["w"], expected)
    assert equal(bilevel.solve_lower(losses.optional, x, y, batch="given").y["w"], expected)
    for given in ({"batch": 1}, {"batches": iter([1] * 20)}):
        with pytest.raises(
            ProblemError, match=r"^lower_loss takes \(x, y\) alone and would ignore"
        ):
            bilevel.solve_lower(losses.plain, x, y, **given)
    with pytest.raises(ProblemError, match=r"^upper_loss takes \(x, y\) alone"):
        bilevel.hypergradient(losses, losses, x, y, estimator="implicit", upper_batch=1)


def test_an_entry_that_reaches_nothing_is_allowed_as_the_refusal_says():
    x, y = {"a": A, "idle": torch.ones(2, dtype=torch.float64)}, {"w": W, "b": B}
    upper, lower = flat(None)
    with pytest.raises(ProblemError, match=r"idle reaches neither loss.*add 0 \* x\[\.\.\.\]"):
        bilevel.hypergradient(upper, lower, x, y, estimator="implicit")
    found = bilevel.hypergradient(
        lambda x, y, batch: upper(x, y, batch) + 0 * x["idle"].sum(),
        lower,
        x,
        y,
        estimator="implicit",
    )
    assert found.hypergradient["idle"].tolist() == [0, 0]


@component
class Contained(Fit):
    """`Fit` with x and y in containers: a, and the pair of y and its offset."""

    put_x: Callable = None
    take_x: Callable = None
    put: Callable = None
    take: Callable = None

    def flat(self, x, y):
        w, b = self.take(y)
        return {"x": self.take_x(x)}, {"y": w, "offset": b}

    def init(self, streams):
        x, y = super().init(streams)
        return self.put_x(x["x"]), self.put(y["y"], y["offset"])

    def lower_loss(self, x, y, batch):
        return super().lower_loss(*self.flat(x, y), batch)

    def upper_loss(self, x, y, batch):
        return super().upper_loss(*self.flat(x, y), batch)

    def evaluate(self, x, y):
        return super().evaluate(*self.flat(x, y))

    def project_upper(self, x):
        return self.put_x(self.take_x(x).clamp(-0.8, 0.8))

    def project_lower(self, y):
        w, b = self.take(y)
        return self.put(w.clamp(-0.6, 0.6), b)


def contained(of_x, of_y):
    (put_x, take_x), (put, take) = of_x, of_y
    return Contained(put_x=put_x, take_x=take_x, put=put, take=take)


X_CONTAINERS = {
    "flat": (lambda a: {"x": a}, lambda x: x["x"]),
    "dict": (lambda a: {"in": {"x": a}}, lambda x: x["in"]["x"]),
    "list": (lambda a: [a], lambda x: x[0]),
}
FLAT = contained(
    X_CONTAINERS["flat"], (lambda w, b: {"y": w, "offset": b}, lambda y: (y["y"], y["offset"]))
)
WRAPPED = {
    "start": lambda p: LearnedStart(problem=p),
    "tasks": lambda p: OverTasks(problem=p, num_tasks=3),
    "loop": lambda p: OverTasks(problem=p, num_tasks=3, batched=False),
    "tasks of start": lambda p: OverTasks(problem=LearnedStart(problem=p), num_tasks=3),
    "start of tasks": lambda p: LearnedStart(problem=OverTasks(problem=p, num_tasks=3)),
}


@every_container
@pytest.mark.parametrize("x", X_CONTAINERS)
@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_a_learned_start_and_tasks_of_nested_variables_are_those_of_the_flat(wrap, x, put, take):
    def trained(problem, seed=0):
        return bilevel.minimize(
            wrap(problem),
            estimator=Unroll(),
            lower=Gradient(steps=3, optimizer=SGD(lr=0.1)),
            upper=SGD(lr=0.05),
            steps=5,
            evaluate_held=True,
            seed=seed,
            dtype="float64",
            progress=False,
        )

    nested, plain = trained(contained(X_CONTAINERS[x], (put, take))), trained(FLAT)
    for found, expected in ((nested.x, plain.x), (nested.y, plain.y)):
        leaves = zip(tree.flat(found, "").values(), tree.flat(expected, "").values(), strict=True)
        assert all(torch.equal(*pair) for pair in leaves)
    assert (nested.metrics, nested.held) == (plain.metrics, plain.held)
    take(nested.y)  # in the containers that were given
    other = trained(FLAT, seed=1)  # control
    assert other.history[-1].upper_loss != plain.history[-1].upper_loss


def test_a_learned_start_stands_beside_x():
    x, y = LearnedStart(problem=contained(X_CONTAINERS["dict"], CONTAINERS["list"])).init(
        Streams(0)
    )
    assert [*tree.flat(x, "x")] == ["in.x", "start.0", "start.1.0"]
    assert equal(x["start"][0], y[0])
    x, _ = LearnedStart(problem=contained(X_CONTAINERS["list"], CONTAINERS["list"])).init(
        Streams(0)
    )
    assert [*tree.flat(x, "x")] == ["own.0", "start.0", "start.1.0"]


def test_an_x_of_that_name_is_refused():
    taken = contained((lambda a: {"start": a}, lambda x: x["start"]), CONTAINERS["list"])
    with pytest.raises(ProblemError, match="x of Contained has an entry 'start'"):
        LearnedStart(problem=taken).init(Streams(0))
