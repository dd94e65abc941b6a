"""Differentiable steps equal torch.optim; their derivatives equal hand-written loops."""

import pytest
import torch

from bilevel import tree
from bilevel.errors import RecipeError
from bilevel.optimizers.adjusted import Adjusted
from bilevel.optimizers.differentiable import SGD, Adam, AdamW, RMSprop
from bilevel.optimizers.schedule import Schedule
from bilevel.optimizers.torch_optim import TorchOptimizer

TABLE = [
    (SGD(lr=0.05), torch.optim.SGD, {"lr": 0.05}),
    (SGD(lr=0.05, weight_decay=0.1), torch.optim.SGD, {"lr": 0.05, "weight_decay": 0.1}),
    (SGD(lr=0.05, momentum=0.9), torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    (
        SGD(lr=0.05, momentum=0.9, dampening=0.3, weight_decay=0.01),
        torch.optim.SGD,
        {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01},
    ),
    (
        SGD(lr=0.05, momentum=0.9, nesterov=True),
        torch.optim.SGD,
        {"lr": 0.05, "momentum": 0.9, "nesterov": True},
    ),
    (Adam(lr=0.05), torch.optim.Adam, {"lr": 0.05}),
    (
        Adam(lr=0.05, beta1=0.8, beta2=0.95, eps=1e-4, weight_decay=0.1),
        torch.optim.Adam,
        {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.1},
    ),
    (AdamW(lr=0.05), torch.optim.AdamW, {"lr": 0.05}),
    (
        AdamW(lr=0.05, beta1=0.8, beta2=0.95, eps=1e-4, weight_decay=0.3),
        torch.optim.AdamW,
        {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.3},
    ),
    (RMSprop(lr=0.01), torch.optim.RMSprop, {"lr": 0.01}),
    (
        RMSprop(lr=0.01, alpha=0.9, eps=1e-4, momentum=0.5, weight_decay=0.1),
        torch.optim.RMSprop,
        {"lr": 0.01, "alpha": 0.9, "eps": 1e-4, "momentum": 0.5, "weight_decay": 0.1},
    ),
]
IDS = [repr(ours) for ours, _, _ in TABLE]


def draw(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(3, 2, generator=generator, dtype=dtype) + 1,
        "b": torch.randn(4, generator=generator, dtype=dtype) * 10,
        "s": torch.randn((), generator=generator, dtype=dtype),
    }


def uneven(y):
    return sum(((1 + i) * (p - i) ** 2 + torch.cos(p)).sum() for i, p in enumerate(y.values()))


def ours_after(optimizer, steps, seed=0, dtype=torch.float64):
    y = draw(seed, dtype)
    state = optimizer.init(y)
    for _ in range(steps):
        leaves = tree.leaves(y)
        g = torch.autograd.grad(uneven(leaves), list(leaves.values()))
        y, state = optimizer.step(y, dict(zip(y, g, strict=True)), state)
    return y


def torch_after(make, options, steps, seed=0, dtype=torch.float64):
    y = tree.leaves(draw(seed, dtype))
    optimizer = make(list(y.values()), **options)
    for _ in range(steps):
        optimizer.zero_grad()
        uneven(y).backward()
        optimizer.step()
    return tree.detach(y)


def distance(a, b):
    return max(float((a[n] - b[n]).abs().max() / (1 + b[n].abs().max())) for n in a)


@pytest.mark.parametrize(("ours", "theirs", "options"), TABLE, ids=IDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-4)])
def test_equals_torch_over_fifty_steps(ours, theirs, options, dtype, tolerance):
    got = ours_after(ours, 50, dtype=dtype)
    expected = torch_after(theirs, options, 50, dtype=dtype)
    assert distance(got, expected) <= tolerance


@pytest.mark.parametrize(("ours", "theirs", "options"), TABLE, ids=IDS)
def test_the_table_can_fail(ours, theirs, options):
    changed = options | {"lr": options["lr"] * 1.01}
    assert distance(ours_after(ours, 50), torch_after(theirs, changed, 50)) > 1e-4


@pytest.mark.parametrize("optimizer", [ours for ours, _, _ in TABLE], ids=IDS)
def test_a_step_is_differentiable_in_everything(optimizer):
    """Two steps, differentiated in y and both gradients, against torch's numerical Jacobian."""
    y = {"a": torch.tensor([0.7, -1.3], dtype=torch.float64)}

    def two_steps(start, first, second):
        state = optimizer.init({"a": start})
        once, state = optimizer.step({"a": start}, {"a": first}, state)
        twice, _ = optimizer.step(once, {"a": second}, state)
        return twice["a"]

    inputs = [
        value.clone().requires_grad_()
        for value in (y["a"], y["a"].cos(), torch.tensor([0.4, 2.0], dtype=torch.float64))
    ]
    assert torch.autograd.gradcheck(two_steps, inputs, atol=1e-6)


@pytest.mark.parametrize("optimizer", [Adam(), AdamW(), RMSprop()], ids=repr)
def test_a_zero_gradient_has_a_finite_derivative(optimizer):
    g = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    y = {"a": torch.ones(2, dtype=torch.float64)}
    moved, _ = optimizer.step(y, {"a": g}, optimizer.init(y))
    (slope,) = torch.autograd.grad(moved["a"].sum(), g)
    assert slope.isfinite().all()
    naive = (g**2).sqrt().sum()  # what is avoided
    assert torch.autograd.grad(naive, g)[0].isnan().all()


@pytest.mark.parametrize(
    ("name", "options"),
    [("Adagrad", {"lr": 0.1}), ("NAdam", {"lr": 0.01}), ("SGD", {"lr": 0.05, "momentum": 0.9})],
)
def test_any_torch_optimizer_by_name(name, options):
    got = ours_after(TorchOptimizer(optimizer=name, options=options), 20)
    expected = torch_after(getattr(torch.optim, name), options, 20)
    assert distance(got, expected) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "Adagard"}, "Adagard"),
        ({"optimizer": "LBFGS"}, "lower: lbfgs"),
        ({"optimizer": "Adagrad", "options": {"speed": 1}}, "speed"),
    ],
)
def test_a_wrong_torch_optimizer_is_refused_at_once(options, message):
    with pytest.raises(RecipeError, match=message):
        TorchOptimizer(**options)


def test_what_is_offered_instead_may_be_chosen():
    with pytest.raises(RecipeError) as caught:
        TorchOptimizer(optimizer="LBFGS")
    offered = str(caught.value).split("it has ")[1].split(". ")[0].split(", ")
    assert "Adagrad" in offered
    assert not {"LBFGS", "Optimizer"} & {*offered}


@pytest.mark.parametrize(
    "optimizer", [TorchOptimizer(optimizer="Adagrad"), SGD(), Adam()], ids=repr
)
def test_a_step_writes_into_nothing_it_was_given(optimizer):
    y, g = {"y": torch.ones(3)}, {"y": torch.full((3,), 2.0)}
    after, _ = optimizer.step(y, g, optimizer.init(y))
    assert torch.equal(y["y"], torch.ones(3))
    assert torch.equal(g["y"], torch.full((3,), 2.0))
    assert not torch.equal(after["y"], y["y"])


def test_nesterov_without_momentum_is_refused():
    with pytest.raises(RecipeError, match="momentum > 0"):
        SGD(nesterov=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("optimizer", [ours for ours, _, _ in TABLE], ids=IDS)
def test_a_scalar_keeps_its_dtype(optimizer, scheduled, dtype):
    """The count that corrects Adam's averages and a scheduled rate are float64 scalars, as it is one."""
    if scheduled:
        schedule = Schedule(name="ExponentialLR", options={"gamma": 0.5})
        optimizer = Adjusted(optimizer, None, schedule)
    y, g = {"a": torch.tensor(1.0, dtype=dtype)}, {"a": torch.tensor(0.3, dtype=dtype)}
    state = optimizer.init(y)
    state = optimizer.ahead(state, 2) if scheduled else state
    for _ in range(2):
        y, state = optimizer.step(y, g, state)
    kept = [entry for where, entry in tree.named(state) if where.endswith("['a']")]
    assert {entry.dtype for entry in (y["a"], *kept)} == {dtype}
    assert y["a"] < 1.0
