"""Schedules against torch's own schedulers driving torch's own optimizers."""

import pytest
import torch
from torch.optim import lr_scheduler

from bilevel.errors import ProblemError
from bilevel.optimizers import SGD, Adam, AdamW, Learned, RMSprop, Schedule, TorchOptimizer
from bilevel.optimizers.schedule import lr_of, with_lr
from bilevel.run.upper import Upper

STEPS = 12
LR = 0.07
WARM_UP = {"name": "LinearLR", "options": {"start_factor": 0.25, "total_iters": 4}}
OPTIONS = {
    "LambdaLR": {"lr_lambda": lambda k: 1 / (1 + k)},
    "MultiplicativeLR": {"lr_lambda": lambda k: 0.9 + 0.01 * k},
    "StepLR": {"step_size": 3, "gamma": 0.5},
    "MultiStepLR": {"milestones": [2, 7], "gamma": 0.3},
    "ConstantLR": {"factor": 0.4, "total_iters": 5},
    "LinearLR": {"start_factor": 0.2, "total_iters": 6},
    "ExponentialLR": {"gamma": 0.8},
    "PolynomialLR": {"total_iters": 9, "power": 2.0},
    "CosineAnnealingLR": {"T_max": STEPS, "eta_min": 0.01},
    "CosineAnnealingWarmRestarts": {"T_0": 3, "T_mult": 2},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 3, "cycle_momentum": False},
    "OneCycleLR": {"max_lr": 0.2, "total_steps": STEPS + 1, "cycle_momentum": False},
    "SequentialLR": {
        "schedulers": [WARM_UP, {"name": "ExponentialLR", "options": {"gamma": 0.9}}],
        "milestones": [4],
    },
    "ChainedScheduler": {"schedulers": [WARM_UP, {"name": "StepLR", "options": {"step_size": 5}}]},
}


def theirs(name, optimizer):
    """The scheduler as a user of torch would build it."""
    options = dict(OPTIONS[name])
    parts = [theirs_of(part, optimizer) for part in options.pop("schedulers", [])]
    cls = getattr(lr_scheduler, name)
    if name == "ChainedScheduler":
        return cls(parts, optimizer)
    return cls(optimizer, **({"schedulers": parts} if parts else {}), **options)


def theirs_of(part, optimizer):
    return getattr(lr_scheduler, part["name"])(optimizer, **part["options"])


def path(upper, shift=0):
    """x after each of STEPS steps along gradients that are given."""
    x, state, found = {"w": start()}, upper.optimizer.init({"w": start()}), []
    for k in range(STEPS):
        x, state = upper.step(x, {"w": gradient(k)}, state, k + shift)
        found.append(x["w"])
    return torch.stack(found)


def start():
    return torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def gradient(k):
    return torch.tensor([1.0, -0.3 * k, 0.2 + k], dtype=torch.float64).cos()


def path_of_torch(name, make):
    w = torch.nn.Parameter(start())
    optimizer = make([w])
    scheduler, found = theirs(name, optimizer), []
    for k in range(STEPS):
        w.grad = gradient(k)
        optimizer.step()
        found.append(w.detach().clone())
        if k + 1 < STEPS:
            scheduler.step()
    return torch.stack(found)


@pytest.mark.parametrize("name", OPTIONS)
def test_rates_are_those_of_torch(name):
    schedule = Schedule(name=name, options=OPTIONS[name])
    truth = path_of_torch(name, lambda w: torch.optim.SGD(w, LR, momentum=0.9))
    upper = Upper(optimizer=SGD(lr=LR, momentum=0.9), schedule=schedule)
    torch.testing.assert_close(path(upper), truth, rtol=1e-13, atol=0)
    # negative controls: the rate of the step after is another, and so is that of no schedule
    for other in (path(upper, 1), path(Upper(optimizer=SGD(lr=LR, momentum=0.9)))):
        assert (other - truth).abs().max() > 1e-4


PAIRS = [
    (Adam(lr=LR), lambda w: torch.optim.Adam(w, LR)),
    (AdamW(lr=LR, weight_decay=0.2), lambda w: torch.optim.AdamW(w, LR, weight_decay=0.2)),
    (RMSprop(lr=LR, momentum=0.5), lambda w: torch.optim.RMSprop(w, LR, momentum=0.5)),
    (TorchOptimizer(optimizer="Adagrad"), torch.optim.Adagrad),
    (
        TorchOptimizer(optimizer="NAdam", options={"lr": LR}),
        lambda w: torch.optim.NAdam(w, LR),
    ),
]


@pytest.mark.parametrize(
    ("optimizer", "make"), PAIRS, ids=["adam", "adamw", "rmsprop", "adagrad", "nadam"]
)
def test_every_optimizer_follows(optimizer, make):
    schedule = Schedule(name="CosineAnnealingLR", options=OPTIONS["CosineAnnealingLR"])
    truth = path_of_torch("CosineAnnealingLR", make)
    found = path(Upper(optimizer=optimizer, schedule=schedule))
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-14)


def test_all_of_torch_are_offered_or_refused():
    base = lr_scheduler.LRScheduler
    known = {
        name
        for name, cls in vars(lr_scheduler).items()
        if isinstance(cls, type) and issubclass(cls, base) and name[0] != "_"
    }
    assert known - {"LRScheduler", "ReduceLROnPlateau"} == OPTIONS.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "StepLr"}, "Did you mean 'StepLR'"),
        ({"name": "LRScheduler"}, "LRScheduler"),
        ({"name": "ReduceLROnPlateau"}, "follows a measure.*evaluate.stop"),
        ({"name": "StepLR"}, "StepLR: .*step_size"),
        ({"name": "LambdaLR", "options": {"lr_lambda": "1 / k"}}, "which only Python can give"),
        ({"name": "LambdaLR", "options": {"lr_lambda": lambda k: -1.0}}, "must be ≥ 0"),
        ({"name": "OneCycleLR", "options": {"max_lr": 1.0, "total_steps": 9}}, "cycle_momentum"),
        ({"name": "SequentialLR", "options": {"milestones": [1]}}, "needs schedulers"),
        ({"name": "ChainedScheduler", "options": {"schedulers": ["StepLR"]}}, "name, options"),
    ],
)
def test_what_is_no_schedule_is_refused(options, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        Schedule(**options)


def test_rates_are_kept_and_asked_for_in_any_order():
    schedule = Schedule(name="ExponentialLR", options={"gamma": 0.5})
    assert schedule.rates(6, 8, 1.0) == [2**-6, 2**-7]
    assert schedule.rates(0, 2, 1.0) == [1.0, 0.5]
    assert Schedule(name="ExponentialLR", options={"gamma": 0.25}).rates(1, 2, 4.0) == [1.0]


def test_a_rate_that_torch_lacks_is_told_with_the_step():
    schedule = Schedule(name="LambdaLR", options={"lr_lambda": [1.0, 0.5, -2.0].__getitem__})
    assert schedule.rates(0, 2, 1.0) == [1.0, 0.5]
    with pytest.raises(ProblemError, match=r"lr = -2.0 for step 3; must be ≥ 0"):
        schedule.rates(2, 3, 1.0)
    with pytest.raises(ProblemError, match="no rate for step 4"):
        Schedule(name="LambdaLR", options={"lr_lambda": [1.0, 0.5, 2.0].__getitem__}).rates(
            3, 4, 1.0
        )


class Rateless:
    differentiable = False


def test_an_optimizer_without_a_rate_has_none_to_schedule():
    with pytest.raises(ProblemError, match="Rateless has no number `lr`"):
        lr_of(Rateless())
    learned = Learned(upper="lr")
    assert lr_of(SGD(lr=learned)) is learned
    assert lr_of(TorchOptimizer(optimizer="Adagrad")) == 0.01
    assert lr_of(with_lr(TorchOptimizer(optimizer="Adagrad"), 0.0)) == 0.0
