"""A closed-form objective, and what plain Optuna makes of it."""

import math

import optuna

from bilevel.cli.names import shipped

QUADRATIC = shipped()["quadratic"]
WORDS = ["upper.optimizer.lr=0.01..1,log,7", "lower.steps=5,20"]
CHOICES = ("5", "20")


def objective(values) -> float:
    return (math.log10(values["upper.optimizer.lr"]) + 0.7) ** 2 + float(values["lower.steps"]) / 20


def plain(sampler: str, maximize: bool, trials: int, seed: int = 3):
    grid = {
        "upper.optimizer.lr": [0.01, *(0.01 * 100 ** (n / 6) for n in range(1, 6)), 1.0],
        "lower.steps": CHOICES,
    }
    made = {
        "grid": lambda: optuna.samplers.GridSampler(grid, seed=seed),
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
        "tpe": lambda: optuna.samplers.TPESampler(seed=seed),
    }[sampler]()
    study = optuna.create_study(sampler=made, direction="maximize" if maximize else "minimize")

    def run(trial):
        lr = trial.suggest_float("upper.optimizer.lr", 0.01, 1.0, log=True)
        steps = trial.suggest_categorical("lower.steps", CHOICES)
        return objective({"upper.optimizer.lr": lr, "lower.steps": steps})

    study.optimize(run, n_trials=trials)
    return study
