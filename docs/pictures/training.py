"""Learning rates along a run, and a run that was stopped beside one that was not."""

from __future__ import annotations

import bilevel
from bilevel.estimators import Implicit
from bilevel.lower import Gradient
from bilevel.optimizers import SGD, Adam, Schedule
from bilevel.run import Setup, Upper, engine
from docs.estimators.measured import problem
from docs.pictures.chart import Chart, Curves

STEPS, STOPPED, LR = 200, 12, 0.1
WARM_UP = [
    {"name": "LinearLR", "options": {"start_factor": 0.1, "total_iters": 20}},
    {"name": "CosineAnnealingLR", "options": {"T_max": 180}},
]
SCHEDULES = {
    "warm-up, then cosine": Schedule(
        name="SequentialLR", options={"milestones": [20], "schedulers": WARM_UP}
    ),
    "StepLR": Schedule(name="StepLR", options={"step_size": 50, "gamma": 0.5}),
    "ExponentialLR": Schedule(name="ExponentialLR", options={"gamma": 0.985}),
    "OneCycleLR": Schedule(
        name="OneCycleLR",
        options={"max_lr": LR, "total_steps": STEPS, "cycle_momentum": False},
    ),
}


def rates() -> Curves:
    """The rate of each step, from the schedules that a run follows."""
    return {
        name: [(k + 1.0, rate) for k, rate in enumerate(each.rates(0, STEPS, LR))]
        for name, each in SCHEDULES.items()
    }


def stopped() -> Curves:
    """F along a run, and along one whose state was saved after some steps and taken up by another process."""
    lower = Gradient(optimizer=SGD(lr=1.0))
    setup = Setup(problem, lower, Upper(steps=30, optimizer=Adam(lr=0.3)), Implicit())
    whole = _losses(setup, engine.start(setup), 30)
    first = engine.start(setup)
    begun = _losses(setup, first, STOPPED)
    resumed = _losses(setup, engine.restore(setup, first.save()), 30)
    return {"never stopped": whole, f"until step {STOPPED}": begun, "resumed": resumed}


def _losses(setup: Setup, state: engine.State, until: int) -> list[tuple[float, float]]:
    found = []
    for event in engine.run(setup, state):
        if isinstance(event, bilevel.events.Stepped):
            found.append((float(event.step), event.upper_loss))
        if state.step == until:
            break
    return found


CHARTS = {
    "training_rates": Chart(
        title="The learning rate of each step under four schedules",
        computed=rates,
        x="upper step",
        y="learning rate",
        logarithmic="",
        y_range=(0, None),
    ),
    "resuming": Chart(
        title="F along a run that was stopped and resumed, on the curve of one that was not",
        computed=stopped,
        x="upper step",
        y="F before the step",
        logarithmic="",
        points=(f"until step {STOPPED}", "resumed"),
    ),
}
