"""Problems from modules: the same hypergradient as with dicts, frozen parts held, nothing written."""

import itertools

import pytest
import torch
from torch import nn
from torch.func import functional_call

from bilevel import hypergradient, solve_lower, tree
from bilevel.errors import ProblemError
from bilevel.estimators.implicit import Implicit
from bilevel.linear.cg import CG
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import SGD
from bilevel.problem.from_modules import Bound, FromModules
from bilevel.rng import Streams
from bilevel.run.engine import Setup, prepare, run, start
from bilevel.run.upper import Upper


class Weigher(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, a):
        return self.net(a).sigmoid()


def fit(upper, lower, batch):
    return ((lower(batch["a"]) - batch["b"]) ** 2).mean()


def weighted(upper, lower, batch):
    errors = (lower(batch["a"]) - batch["b"]) ** 2
    return (upper(batch["a"]) * errors).mean() + 0.1 * (lower.parameters["weight"] ** 2).sum()


def make(dtype=torch.float64):
    torch.manual_seed(0)
    a = torch.randn(40, 2, dtype=dtype)
    data = {"a": a, "b": a.sum(1, keepdim=True) + 1}
    return FromModules(
        Weigher().to(dtype),
        nn.Linear(2, 1, dtype=dtype),
        fit,
        weighted,
        make_upper_batches=lambda stream: itertools.repeat(data),
        make_lower_batches=lambda stream: itertools.repeat(data),
    )


def test_the_hypergradient_equals_that_of_plain_functions():
    problem = make()
    x, y = problem.init(Streams(0))
    batch = next(problem.upper_batches(torch.Generator()))

    def linear(y):
        return batch["a"] @ y["weight"].T + y["bias"]

    def plain_upper(x, y, _):
        return ((linear(y) - batch["b"]) ** 2).mean()

    def plain_lower(x, y, _):
        hidden = torch.tanh(batch["a"] @ x["net.0.weight"].T + x["net.0.bias"])
        weight = torch.sigmoid(hidden @ x["net.2.weight"].T + x["net.2.bias"])
        return (weight * (linear(y) - batch["b"]) ** 2).mean() + 0.1 * (y["weight"] ** 2).sum()

    estimator = Implicit(solver=CG(iterations=50, tolerance=1e-12))
    expected = hypergradient(plain_upper, plain_lower, x, y, estimator=estimator)
    got = hypergradient(
        problem.upper_loss,
        problem.lower_loss,
        x,
        y,
        estimator=estimator,
        upper_batch=batch,
        lower_batch=batch,
    )
    for name in x:
        torch.testing.assert_close(got.hypergradient[name], expected.hypergradient[name])
    assert tree.norm(got.hypergradient) > 1e-6


def test_a_run_writes_nothing_until_store():
    problem = make()
    before = {n: p.detach().clone() for n, p in problem.lower.named_parameters()}
    setup = Setup(
        problem,
        Gradient(steps=5, optimizer=SGD(lr=0.1)),
        Upper(steps=3),
        Implicit(),
        dtype=torch.float64,
    )
    list(prepare(setup))
    state = start(setup)
    list(run(setup, state))
    for name, p in problem.lower.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is None
    problem.store(state.x, state.y)
    assert torch.equal(problem.lower.weight, state.y["weight"])
    assert not torch.equal(problem.lower.weight, before["weight"])


def test_frozen_parameters_are_no_variables():
    problem = make()
    problem.lower.bias.requires_grad_(False)
    _, y = problem.init(Streams(0))
    assert set(y) == {"weight"}
    problem.lower.weight.requires_grad_(False)
    with pytest.raises(ProblemError, match=r"lower module has no trainable.*requires_grad_"):
        problem.init(Streams(0))


# modules stay as they are


def shared_layer():
    layer = nn.Linear(3, 3).double()
    return nn.Sequential(layer, nn.Tanh(), layer)


def tied_weights():
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    net[2].weight = net[0].weight
    return net


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(3, 2).double()

    def forward(self, a):
        return self.rnn(a[None])[0][0]


MODELS = {"a layer twice": shared_layer, "tied weights": tied_weights, "recurrent": Recurrent}


def problem_of(model, objective=None):
    def fit(upper, lower, batch):
        return (lower(batch) - 1).square().mean()

    def regularised(upper, lower, batch):
        size = sum(p.square().sum() for p in lower.parameters.values())
        return fit(upper, lower, batch) + upper.parameters["log"].exp() * size

    penalty = nn.ParameterDict({"log": torch.zeros((), dtype=torch.float64)})
    data = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)
    repeat = lambda stream: itertools.repeat(data)  # noqa: E731
    return FromModules(penalty, model, fit, objective or regularised, repeat, repeat)


def identities(model):
    """Every parameter of every layer as the object that it is, and what layers compute with."""
    found = [(id(m), name, id(p)) for m in model.modules() for name, p in m._parameters.items()]
    flat = [id(p) for m in model.modules() for p in getattr(m, "_flat_weights", ())]
    return found, flat


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_parameters_are_the_same_objects_before_and_after(make):
    model = make()
    before, values = identities(model), {n: p.clone() for n, p in model.named_parameters()}
    data = torch.ones(4, 3, dtype=torch.float64)
    out = model(data).detach()
    problem = problem_of(model)
    setup = Setup(problem, Gradient(steps=3), Upper(steps=2), Implicit(), dtype=torch.float64)
    list(prepare(setup))
    state = start(setup)
    list(run(setup, state))
    assert identities(model) == before
    assert all(torch.equal(p, values[n]) for n, p in model.named_parameters())
    assert torch.equal(model(data), out)  # a recurrent layer computes with a list of its own
    again = start(setup)  # a second init finds the parameters
    assert again.y.keys() == state.y.keys()

    problem.store(state.x, state.y)
    assert identities(model) == before
    assert not torch.equal(model(data), out)
    assert torch.equal(model(data), functional_call(make_like(make, model), state.y, (data,)))


def make_like(make, model):
    """Another model with the same values, which may be spoilt."""
    other = make()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_they_are_so_where_a_loss_raises(make):
    model = make()
    before = identities(model)

    def fails(upper, lower, batch):
        lower.module.register_forward_hook(lambda *_: 1 / 0)
        return lower(batch).sum()

    problem = problem_of(model, fails)
    x, y = problem.init(Streams(0))
    with pytest.raises(ZeroDivisionError):
        solve_lower(problem.lower_loss, x, y, batch=torch.ones(4, 3, dtype=torch.float64))
    assert identities(model) == before


def test_a_layer_twice_has_the_hypergradient_of_plain_functions():
    problem = problem_of(shared_layer())
    x, y = problem.init(Streams(0))
    assert set(y) == {"0.weight", "0.bias"}
    data = next(problem.lower_batches(torch.Generator()))

    def model(y):
        hidden = torch.tanh(data @ y["0.weight"].T + y["0.bias"])
        return hidden @ y["0.weight"].T + y["0.bias"]

    def plain(x, y, _):
        return (model(y) - 1).square().mean()

    def regularised(x, y, _):
        return plain(x, y, _) + x["log"].exp() * sum(p.square().sum() for p in y.values())

    estimator = Implicit(solver=CG(iterations=50, tolerance=1e-12))
    expected = hypergradient(plain, regularised, x, y, estimator=estimator)
    got = hypergradient(
        problem.upper_loss,
        problem.lower_loss,
        x,
        y,
        estimator=estimator,
        upper_batch=data,
        lower_batch=data,
    )
    torch.testing.assert_close(got.hypergradient["log"], expected.hypergradient["log"])
    assert abs(float(got.hypergradient["log"])) > 1e-4


def test_torch_itself_does_not_put_them_back():
    """The control: why `functional_call` is not used. Should torch mend this, use it again."""
    model = shared_layer()
    functional_call(model, {"0.weight": torch.zeros(3, 3).double()}, torch.ones(1, 3).double())
    assert not isinstance(model[0].weight, nn.Parameter)


def test_buffers_may_be_replaced_too_and_are_put_back():
    model = nn.BatchNorm1d(2, affine=False).double().eval()
    own = model.running_mean
    x = torch.ones(1, 2, dtype=torch.float64)
    moved = Bound(model, {"running_mean": torch.tensor([1.0, -1.0], dtype=torch.float64)})(x)
    plain = model(x)
    assert moved[0, 0] == 0
    assert float(moved[0, 1]) == pytest.approx(2 * float(plain[0, 1]))
    assert model.running_mean is own
