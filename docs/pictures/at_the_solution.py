"""Error against cost on the problem of docs/estimators/measured.py: one hypergradient each point."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bilevel import hypergradient, solve_lower, tree
from bilevel.estimators import (
    KKT,
    FixedPoint,
    Forward,
    Implicit,
    OneStep,
    Penalty,
    Shine,
    Unroll,
    ZerothOrder,
)
from bilevel.linear import CG, GMRES, MINRES, Dense, Identity, Neumann, NormalCG, Nystrom
from bilevel.lower import LBFGS, Gradient, Newton, Proximal
from bilevel.optimizers import SGD, Adam
from bilevel.rng import Streams
from bilevel.types import Estimator, Structure
from bilevel_problems.box_qp import BoxQP
from bilevel_problems.quadratic import Quadratic
from docs.estimators.measured import ask, batch, problem, x, y
from docs.pictures.chart import Curves

Point = tuple[float, float]


def point(found: tuple[float, int, int, int]) -> Point:
    """(oracle calls, relative error)"""
    return float(sum(found[1:])), found[0]


def along(estimators: Iterable[Estimator], **at: Any) -> list[Point]:
    return [point(ask(estimator, **at)) for estimator in estimators]


def implicit() -> Curves:
    def cg(**options: Any) -> list[Estimator]:
        return [Implicit(solver=CG(iterations=k, tolerance=0), **options) for k in range(1, 11)]

    found = {"at y*": along(cg())}
    for damping in (1e-1, 1e-3):
        found[f"damping {damping:g}"] = along(cg(damping=damping))
    for steps in (20, 60):
        solver = Gradient(steps=steps, optimizer=SGD(lr=1.0))
        near = solve_lower(problem.lower_loss, x, y, solver=solver, batch=batch).y
        found[f"y after {steps} steps"] = along(cg(), y=near)
    return found


def linear_solvers() -> Curves:
    tight = {"tolerance": 0.0}
    solvers = {
        "cg": [CG(iterations=k, **tight) for k in range(1, 11)],
        "minres": [MINRES(iterations=k, **tight) for k in range(1, 11)],
        "normal_cg": [NormalCG(iterations=k, **tight) for k in range(1, 11)],
        "neumann": [Neumann(iterations=k, scale=1.0) for k in (1, 2, 4, 8, 16, 32, 64)],
        "nystrom, rho 0.1": [Nystrom(rank=k, rho=0.1) for k in (1, 2, 4, 6, 8, 9, 10)],
        "identity, dense": [Identity(), Dense()],
    }
    return {n: along(Implicit(solver=one) for one in all_) for n, all_ in solvers.items()}


def unroll(counts: tuple[int, ...] = (1, 2, 5, 10, 20, 40, 80, 160)) -> Curves:
    found: Curves = {"unroll": [], "forward": [], "last 5 of the steps": [], "implicit, there": []}
    for steps in counts:
        solver = Gradient(steps=steps, optimizer=SGD(lr=1.0))
        solved = solve_lower(problem.lower_loss, x, y, solver=solver, batch=batch, record=True)
        for name, estimator in (
            ("unroll", Unroll()),
            ("forward", Forward()),
            ("last 5 of the steps", Unroll(last=5)),
        ):
            if name in found and (steps >= 5 or "last" not in name):
                error, *cost = ask(estimator, solved.y, solved.path)
                lower = steps - 5 if "last" in name else 0
                found[name].append((sum(cost) + lower, error))
        error, *cost = ask(Implicit(), solved.y)
        found["implicit, there"].append((sum(cost) + steps, error))
    return found


def one_step() -> Curves:
    found: Curves = {}
    for condition in (1.0, 3.0, 10.0, 100.0):
        of = Quadratic(condition=condition)
        exact, solution = of.hypergradient(x), of.lower_solution(x)
        losses = (of.upper_loss, of.lower_loss)
        batches = {"upper_batch": of.constants, "lower_batch": of.constants}
        found[f"condition {condition:g}"] = [
            (
                lr,
                tree.norm(
                    tree.sub(
                        hypergradient(
                            *losses, x, solution, estimator=OneStep(lr=lr), **batches
                        ).hypergradient,
                        exact,
                    )
                )
                / tree.norm(exact),
            )
            for lr in (0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0)
        ]
    return found


def zeroth_order(samples: tuple[int, ...] = (1, 3, 10, 30, 100)) -> Curves:
    solver = Gradient(steps=20, optimizer=SGD(lr=1.0))
    solved = solve_lower(problem.lower_loss, x, y, solver=solver, batch=batch, record=True)
    at = {"y": solved.y, "path": solved.path}

    def typical(**options: Any) -> Point:
        """The root of the mean squared error over five seeds."""
        all_ = [point(ask(ZerothOrder(seed=seed, **options), **at)) for seed in range(5)]
        return all_[0][0], (sum(error**2 for _, error in all_) / len(all_)) ** 0.5

    return {
        "zeroth_order": [typical(samples=n) for n in samples],
        "pzobo": [typical(samples=n, partial=True) for n in samples],
        "unroll": along([Unroll()], **at),
    }


def penalty(counts: tuple[int, ...] = (2, 5, 10, 20, 50, 100, 200)) -> Curves:
    found: Curves = {}
    for strength, central in ((10.0, False), (100.0, False), (1000.0, False), (100.0, True)):
        found[f"λ = {strength:g}" + (", central" if central else "")] = along(
            Penalty(
                strength=strength,
                central=central,
                lower=Gradient(steps=steps, optimizer=SGD(lr=1.0)),
            )
            for steps in counts
        )
    return found


def shine(memories: tuple[int, ...] = (1, 2, 3, 5, 8, 10, 15, 18)) -> Curves:
    solved = solve_lower(problem.lower_loss, x, y, solver=LBFGS(history=40), batch=batch)
    at = {"y": solved.y, "pairs": solved.pairs}
    found: Curves = {
        f"shine, {update}": [
            (memory, ask(Shine(memory=memory, update=update), **at)[0]) for memory in memories
        ]
        for update in ("bfgs", "block")
    }
    found["cg, as many HVPs"] = [
        (k, ask(Implicit(solver=CG(iterations=k, tolerance=0)), solved.y)[0]) for k in range(1, 11)
    ]
    return found


def constrained() -> Curves:
    of = BoxQP()
    at, _ = of.init(Streams(0))
    y = of.lower_solution(at)
    exact = of.hypergradient(at)

    box = Structure(project=of.project_lower, constraints=of.lower_constraints)

    def error(estimator: Estimator, structure: Structure | None = box) -> Point:
        got = hypergradient(
            of.upper_loss,
            of.lower_loss,
            at,
            y,
            estimator=estimator,
            upper_batch=of.constants,
            lower_batch=of.constants,
            **({"structure": structure} if structure else {}),
        )
        spent = got.stats.gradients + got.stats.hvps + got.stats.cross_products
        return float(spent), tree.norm(tree.sub(got.hypergradient, exact)) / tree.norm(exact)

    ks = range(1, 11)
    return {
        "fixed_point, gmres": [
            error(FixedPoint(lr=0.5, solver=GMRES(iterations=k, tolerance=0))) for k in ks
        ],
        "fixed_point, neumann": [
            error(FixedPoint(lr=0.5, solver=Neumann(iterations=k)))
            for k in (1, 2, 4, 8, 16, 32, 64)
        ],
        "kkt, minres": [
            error(KKT(solver=MINRES(iterations=k, tolerance=0))) for k in (*ks, 12, 14, 16, 18, 20)
        ],
        "implicit, blind to the box": [
            error(Implicit(solver=CG(iterations=k, tolerance=0)), None) for k in ks
        ],
    }


def lower(most: int = 256) -> Curves:
    """Distance to y* of the lower solvers from one start, after up to `most` steps."""
    of = Quadratic(condition=100)
    exact = of.lower_solution(x)

    def after(solver: Any) -> Point:
        solved = solve_lower(of.lower_loss, x, y, solver=solver, batch=of.constants)
        off = tree.norm(tree.sub(solved.y, exact)) / tree.norm(exact)
        return float(solved.stats.gradients + solved.stats.hvps), off

    few = [k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256) if k <= most]
    many = few[2:]
    return {
        "gradient, sgd": [after(Gradient(steps=k, optimizer=SGD(lr=1.0))) for k in many],
        "the same, momentum 0.8": [
            after(Gradient(steps=k, optimizer=SGD(lr=1.0, momentum=0.8))) for k in many
        ],
        "gradient, adam": [after(Gradient(steps=k, optimizer=Adam(lr=0.3))) for k in many],
        "proximal": [after(Proximal(steps=k)) for k in few],
        "lbfgs": [after(LBFGS(steps=k)) for k in few[:7]],
        "newton": [after(Newton(steps=1))],
    }
