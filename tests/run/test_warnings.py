"""The table of warnings: what makes each line hold, and what keeps it back."""

import itertools
import re
from dataclasses import replace

import pytest
import torch

import bilevel
from bilevel import tree
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.penalty import Penalty
from bilevel.estimators.unroll import Unroll
from bilevel.events import Stepped, Warned
from bilevel.linear.cg import CG
from bilevel.linear.neumann import Neumann
from bilevel.linear.nystrom import Nystrom
from bilevel.lower.gradient import Gradient
from bilevel.lower.lbfgs import LBFGS
from bilevel.lower.newton import Newton
from bilevel.optimizers.differentiable import SGD
from bilevel.problem.trust import LOWER, TABLE, Step, found
from bilevel.run.divergence import note
from bilevel.run.engine import restore, run, start
from bilevel.types import Estimate, LowerSolution, LowerStats, Stats
from bilevel_problems.quadratic import Quadratic
from tests.run.setups import setup

RIGHT = Stats(residual=1e-8, curvature=1.0, converged=True, stopped="tolerance")
SHORT = replace(RIGHT, residual=1e-3, converged=False)


def step(stats=RIGHT, estimator=None, gradient_norm=1e-9, h=1.0, length=None):
    """One upper step with ‖h‖ = h, from a y of length 1 whose solve met its tolerance."""
    lower = LowerSolution(
        {"y": torch.ones(1, dtype=torch.float64)},
        None,
        LowerStats(3, 3, 0.0, gradient_norm, converged=True),
        None,
    )
    h_ = {"x": torch.tensor([h], dtype=torch.float64)}
    estimate = Estimate(h_, torch.zeros(()), None, stats, step=length)
    return Step(estimator or Implicit(), estimate, lower)


def unmet():
    given = step()
    stats = replace(given.lower.stats, converged=False, violation=1.0, stopped="infeasible")
    return replace(given, lower=replace(given.lower, stats=stats))


def stuck(gradient_norm=0.3):
    """A line search that finds nothing better, as at a kink."""
    given = step(gradient_norm=gradient_norm)
    stats = replace(given.lower.stats, converged=False, stopped="stagnation")
    return replace(given, lower=replace(given.lower, stats=stats))


CASES = {
    "curvature": (step(replace(RIGHT, curvature=-0.5)), "curvature -0.5"),
    "no curvature at all": (step(replace(RIGHT, curvature=0.0)), "curvature 0"),
    "degenerate": (step(replace(SHORT, degenerate=2)), "2 of the lower level's kinks"),
    "inner solve": (step(Stats(converged=False), Penalty()), "estimator.strength"),
    "adjoint": (step(replace(SHORT, stopped="iterations", iterations=20)), "after 20 iterations"),
    "adjoint, rounding": (step(replace(SHORT, stopped="rounding")), "as far as the dtype allows"),
    "adjoint, stagnation": (step(replace(SHORT, stopped="stagnation")), "gains nothing more"),
    "adjoint, unverified": (step(replace(SHORT, stopped="unverified")), "estimator.solver: gmres"),
    "residual": (step(replace(RIGHT, residual=0.3)), "estimator.solver.iterations, or look"),
    "damping": (step(replace(RIGHT, damping_residual=0.3)), "estimator.damping to a smaller value"),
    "infeasible": (unmet(), "y is 1 outside them"),
    "lower solve": (step(gradient_norm=0.3), "set lower.tolerance to 1e-03"),
    "lower solve, of F": (
        step(replace(RIGHT, value_error=-0.5), gradient_norm=1e-5),
        "F = 0 here, and is far from that at the lower solution",
    ),
    "lower solve, stuck": (stuck(), "comes no further than ‖∇y G‖ = 3.0e-01"),
}


@pytest.mark.parametrize(("case", "said"), CASES.values(), ids=CASES)
def test_each_line_of_the_table_can_hold_alone(case, said):
    ((_, message),) = found(case).items()
    assert said in message(case)


def test_no_line_is_left_out():
    lines = [row for row in TABLE if any(row.holds(case) for case, _ in CASES.values())]
    assert lines == list(TABLE)


def test_what_is_right_is_not_warned_of():
    assert not found(step())


SILENT = {
    "nothing": Stats(),
    "work alone": Stats(gradients=3, hvps=2, iterations=1, stopped="iterations"),
}


@pytest.mark.parametrize("stats", SILENT.values(), ids=SILENT)
def test_where_no_evidence_is_left_no_line_can_hold(stats):
    """So none is asked: a step of a single-loop method leaves none."""
    free = LowerSolution({"y": torch.ones(1)}, None, LowerStats(3, 3, 0.0, 0.3), None)
    silent = replace(step(stats), lower=free)
    assert silent.is_silent
    assert not any(row.holds(silent) for row in (*TABLE, *LOWER))
    assert not any(case.is_silent for case, _ in CASES.values())
    unconverged = replace(free, stats=replace(free.stats, converged=False))
    assert not replace(silent, lower=unconverged).is_silent


def test_a_solve_that_rounding_ends_near_the_solution_is_not_stuck():
    assert not found(stuck(gradient_norm=1e-3))
    assert not found(replace(stuck(), estimator=Unroll()))  # which claims nothing of the solution


class Hinge:
    """A support vector machine, whose solution lies on the kinks of its loss."""

    def __init__(self):
        stream = torch.Generator().manual_seed(0)
        self.a = torch.randn(30, 4, generator=stream, dtype=torch.float64)
        self.label = (self.a[:, 0] + 0.5 * torch.randn(30, generator=stream)).sign()

    def init(self, streams):
        return {"log_c": torch.zeros(())}, {"w": torch.zeros(4)}

    def upper_loss(self, x, y, batch):
        return torch.nn.functional.softplus(-self.label * (self.a @ y["w"])).mean()

    def lower_loss(self, x, y, batch):
        slack = (1 - self.label * (self.a @ y["w"])).clamp(min=0).sum()
        return 0.5 * y["w"].square().sum() + x["log_c"].exp() * slack

    def upper_batches(self, stream):
        return itertools.repeat(None)

    lower_batches = upper_batches


def test_a_lower_level_with_kinks_is_warned_of_where_its_solver_stops():
    """It ended with no word of it: F of a y that is far from y*, and a hypergradient that is wrong."""
    s = setup(Hinge(), steps=3, lower=LBFGS(), estimator=Implicit())
    warned = [e for e in run(s, start(s)) if isinstance(e, Warned)]
    assert [e.kind for e in warned] == ["lower solve"]
    assert "kinks" in warned[0].message
    solved = bilevel.solve_lower(
        Hinge().lower_loss, *tree.to(Hinge().init(None), "cpu", torch.float64), solver=LBFGS()
    )
    at = tree.to(Hinge().init(None), "cpu", torch.float64)[0]
    with pytest.warns(bilevel.errors.UntrustedWarning, match="kinks"):
        bilevel.hypergradient(
            Hinge().upper_loss, Hinge().lower_loss, at, solved, estimator=Implicit()
        )


def test_what_explains_the_others_speaks_alone():
    """Negative curvature makes the residual large and the solve end."""
    stats = replace(SHORT, curvature=-1.0, residual=0.5, degenerate=1, stopped="curvature")
    assert list(found(step(stats))) == ["curvature"]
    bent = replace(stats, curvature=1.0, stopped="iterations")
    assert list(found(step(bent))) == ["degenerate", "residual"]
    assert list(found(step(replace(bent, stopped="curvature")))) == ["curvature"]


@pytest.mark.parametrize(("bound", "said"), [(None, True), (0.2, True), (0.05, False)])
def test_a_large_residual_is_no_matter_where_the_error_is_known_to_be_small(bound, said):
    stats = replace(SHORT, residual=0.5, error_bound=bound, stopped="iterations")
    assert ("residual" in found(step(stats))) == said


def test_a_method_that_chooses_its_step_means_its_residual():
    stats = replace(RIGHT, residual=0.5)
    assert list(found(step(stats))) == ["residual"]
    assert not found(step(stats, length=0.1))


@pytest.mark.parametrize(("g", "said"), [(1e-13, []), (1e-3, ["lower solve"])])
def test_y_at_zero_is_not_called_unsolved(g, said):
    """Its length says nothing of how far it is from a y* of zero."""
    near = step(replace(RIGHT, curvature=2.0), Implicit(solver=CG()), gradient_norm=g)
    zero = replace(near.lower, y={"y": torch.full((3,), 1e-14, dtype=torch.float64)})
    assert list(found(replace(near, lower=zero))) == said


def test_negative_curvature_and_truncation_are_said_once():
    class Saddle(Quadratic):
        def lower_loss(self, x, y, batch):
            return super().lower_loss(x, y, batch) - 2 * y["y"][0] ** 2

    s = setup(Saddle(), lower=Gradient(steps=1, optimizer=SGD(lr=1e-3)), steps=4)
    warned = [e for e in run(s, start(s)) if isinstance(e, Warned)]
    assert [w.kind for w in warned] == ["curvature"]
    assert "damping" in warned[0].message
    s = setup(steps=4, estimator=Implicit(solver=CG(iterations=7)))
    warned = [e for e in run(s, start(s)) if isinstance(e, Warned)]
    assert [w.kind for w in warned] == ["adjoint"]
    s = setup(steps=4, estimator=Implicit(solver=CG(iterations=99)))
    assert not [e for e in run(s, start(s)) if isinstance(e, Warned)]


def test_a_projection_below_is_cautioned_about():
    class Boxed(Quadratic):
        def project_lower(self, y):
            return y

    s = setup(Boxed(), steps=1)
    assert "projection" in [e.kind for e in run(s, start(s)) if isinstance(e, Warned)]
    s = setup(Boxed(), Unroll(), steps=1)
    assert "projection" not in [e.kind for e in run(s, start(s)) if isinstance(e, Warned)]


@pytest.mark.parametrize(
    ("solver", "remedy"),
    [
        (Neumann(iterations=2), "raise estimator.solver.iterations, or take estimator.solver: cg"),
        (Nystrom(rank=1), "raise estimator.solver.rank, or take estimator.solver: cg"),
        (CG(iterations=1, tolerance=0.9), "raise estimator.solver.iterations, or look"),
    ],
    ids=repr,
)
def test_a_large_residual_is_said_whatever_converged_says(solver, remedy):
    """Once, with what it means and what helps, and counted at each step."""
    s = setup(steps=3, estimator=Implicit(solver=solver, start="cold"))
    events = list(run(s, start(s)))
    residuals = [e.estimate.residual for e in events if isinstance(e, Stepped)]
    assert min(residuals) > 0.1
    assert {e.estimate.converged for e in events if isinstance(e, Stepped)} <= {None, True}
    (warned,) = [e for e in events if isinstance(e, Warned)]
    assert (warned.step, warned.kind) == (1, "residual")
    assert remedy in warned.message
    assert f"{residuals[0]:.2g}" in warned.message
    assert events[-1].warned == {"residual": 3}


def test_a_small_residual_or_a_small_bound_is_not_warned_of():
    s = setup(steps=3, estimator=Implicit(solver=Neumann(iterations=500, scale=0.5)))
    events = list(run(s, start(s)))
    assert not [e for e in events if isinstance(e, Warned)]
    assert events[-1].warned == {}
    bounds = {"strong_convexity": 0.1, "cross_norm": 1e-6}  # as if x hardly moved y
    s = setup(steps=1, estimator=Implicit(solver=CG(iterations=1, tolerance=0.9), **bounds))
    events = list(run(s, start(s)))
    assert [e.estimate.residual > 0.1 for e in events if isinstance(e, Stepped)] == [True]
    assert not [e for e in events if isinstance(e, Warned)]


class Scaled(Quadratic):
    """G times a constant: another G with the same y*, the same hypergradient."""

    def lower_loss(self, x, y, batch):
        return SCALE * super().lower_loss(x, y, batch)


SCALE = 1e-12


@pytest.mark.parametrize(
    "solver", [Newton(tolerance=1e-10), LBFGS(tolerance=1e-10)], ids=["newton", "lbfgs"]
)
def test_a_tolerance_that_says_nothing_at_the_scale_of_g_is_said(solver):
    """‖∇y G‖ ≤ 1e-10 is met at the start, where y is nowhere near y*."""
    s = setup(Scaled(), steps=2, lower=solver, estimator=Implicit())
    state = start(s)
    events = list(run(s, state))
    assert [e.lower.converged for e in events if isinstance(e, Stepped)] == [True, True]
    assert tree.norm(tree.sub(state.y, s.problem.lower_solution(state.x))) > 0.1
    (warned,) = [e for e in events if isinstance(e, Warned)]
    assert warned.kind == "lower solve"
    asked = float(re.search(r"set lower\.tolerance to (\S+),", warned.message).group(1))
    better = setup(Scaled(), steps=2, lower=replace(solver, tolerance=asked), estimator=Implicit())
    assert not [e for e in run(better, start(better)) if isinstance(e, Warned)]
    relative = setup(Scaled(), steps=2, lower=type(solver)(), estimator=Implicit())
    events = list(run(relative, start(relative)))
    assert not [e for e in events if isinstance(e, Warned)]
    assert [e.lower.steps > 0 for e in events if isinstance(e, Stepped)] == [True, True]
    plain = setup(Quadratic(), steps=2, lower=solver, estimator=Implicit())  # negative control
    assert not [e for e in run(plain, start(plain)) if isinstance(e, Warned)]


def test_warnings_are_counted_across_a_resume():
    s = setup(steps=4, estimator=Implicit(solver=Neumann(iterations=2)))
    state = start(s)
    for event in run(s, state):
        if isinstance(event, Stepped) and event.step == 2:
            break
    events = list(run(s, restore(s, state.save())))
    assert not [e for e in events if isinstance(e, Warned)]
    assert events[-1].warned == {"residual": 4}


@pytest.mark.parametrize("estimator", [Implicit(), Unroll()])
@pytest.mark.parametrize("compile", ["off", "step"])
def test_a_lower_level_that_diverges_over_the_steps_is_said(estimator, compile):
    """The largest curvature is 1: lr = 2.1 takes each solve a little farther, and none far."""

    def of(lr):
        lower = Gradient(steps=10, optimizer=SGD(lr=lr))
        return setup(estimator=estimator, lower=lower, steps=40, compile=compile)

    s = of(2.1)
    state, said = start(s), []
    for event in run(s, state):
        if isinstance(event, Warned) and event.kind == "divergence":
            said.append((event.step, event.message))
        if isinstance(event, Stepped) and event.step == 30:
            break
    assert len(said) == 1
    assert 4 < said[0][0] < 20
    assert "smaller lower.optimizer.lr" in said[0][1]
    rest = list(run(s, restore(s, state.save())))
    assert rest[-1].warned["divergence"] == 40 - said[0][0] + 1
    right = of(1.9)  # below the bound of 2
    assert "divergence" not in list(run(right, start(right)))[-1].warned


@pytest.mark.parametrize(
    ("loss", "norm", "is_said"),
    [(0.4, 1e-3, False), (1e4, 1e-3, True), (1e4, 1e-12, False), (float("nan"), 1.0, False)],
)
def test_a_gradient_that_was_rounding_alone_may_grow(loss, norm, is_said):
    """As where y begins at its solution, and x moves later: it diverges where the loss has grown as well."""
    state, value = start(setup()), torch.tensor(1.0)
    for _ in range(4):
        assert not note(state, value, LowerStats(10, 10, 0.3, 1e-14))
    assert bool(note(state, value, LowerStats(10, 10, loss, norm))) == is_said
