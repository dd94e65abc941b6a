"""Each combination that is refused before a run: with its remedy, which is then accepted."""

import ast
import inspect
import re
from dataclasses import replace

import pytest

from bilevel.errors import ProblemError
from bilevel.estimators.aggregation import Aggregation
from bilevel.estimators.fixed_point import FixedPoint
from bilevel.estimators.fomaml import FOMAML
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.kkt import KKT
from bilevel.estimators.maid import MAID
from bilevel.estimators.penalty import Penalty
from bilevel.estimators.regularised_gap import RegularisedGap
from bilevel.estimators.shine import Shine
from bilevel.estimators.single_loop import SingleLoop
from bilevel.estimators.unroll import Unroll
from bilevel.linear.dense import Dense
from bilevel.lower.augmented_lagrangian import AugmentedLagrangian
from bilevel.lower.gradient import Gradient
from bilevel.lower.lbfgs import LBFGS
from bilevel.lower.proximal import Proximal
from bilevel.optimizers.clip import Clip
from bilevel.optimizers.differentiable import SGD
from bilevel.optimizers.learned import Learned
from bilevel.optimizers.schedule import Schedule
from bilevel.optimizers.torch_optim import TorchOptimizer
from bilevel.problem.levels import Levels
from bilevel.ranks import ALONE, Ranks
from bilevel.run import refusals
from bilevel.run.engine import Setup, refuse_mismatch
from bilevel.run.targets import Best
from bilevel.run.upper import Upper
from bilevel.sharding.parts import Team
from bilevel.testing.check_scenes import CheckScene, not_applicable
from bilevel_problems.quadratic import Quadratic
from tests.run.setups import Noisy


class With:
    """The quadratic problem with more methods."""

    def __init__(self, *names):
        self._problem = Quadratic()
        for name in names:
            setattr(self, name, lambda *point: point[-1])

    def __getattr__(self, name):
        return getattr(self._problem, name)


def made(problem=None, estimator=None, lower=None):
    return Setup(
        problem=problem or Quadratic(),
        lower=lower or Gradient(),
        upper=Upper(),
        estimator=estimator or Implicit(),
    )


ONE_CYCLE = Schedule(
    name="OneCycleLR", options={"max_lr": 0.1, "total_steps": 7, "cycle_momentum": False}
)


class OwnRows(Implicit):
    own_rows = True


TWO = Ranks(size=2, group=object())
HELD_TOGETHER = replace(TWO, team=Team(TWO, TWO, ALONE))
ADAFACTOR = TorchOptimizer(optimizer="Adafactor")


REFUSED = {
    "no problem": (made(object()), "it lacks init, upper_loss", {"problem": Quadratic()}),
    "steps that cannot be replayed": (
        made(estimator=Unroll(), lower=LBFGS()),
        "use lower: gradient",
        {"lower": Gradient()},
    ),
    "a problem without what the method is for": (
        made(estimator=KKT()),
        "add it, or use estimator: implicit",
        {"estimator": Implicit()},
    ),
    "a learned rate that nothing differentiates": (
        made(lower=Gradient(optimizer=SGD(lr=Learned(upper="x")))),
        "use estimator: unroll, forward or zeroth_order, or a number",
        {"lower": Gradient()},
    ),
    "a learned rate of the upper steps": (
        replace(made(), upper=Upper(optimizer=SGD(lr=Learned(upper="x")))),
        "give a number",
        {"upper": Upper()},
    ),
    "a schedule for an estimator with steps of its own": (
        replace(made(estimator=MAID()), upper=Upper(clip=Clip(norm=1.0))),
        "upper.clip would do nothing; leave it out, or use estimator: implicit",
        {"estimator": Implicit()},
    ),
    "hypergradients at y that moves": (
        replace(made(estimator=SingleLoop()), upper=Upper(accumulate=2)),
        "use larger batches, or estimator: implicit",
        {"estimator": Implicit()},
    ),
    "a schedule that ends before the run": (
        replace(made(), upper=Upper(steps=9, schedule=ONE_CYCLE)),
        r"upper.schedule: .* no rate for step 9: Tried to step 8 times.*has 9 upper steps",
        {"upper": Upper(steps=8, schedule=ONE_CYCLE)},
    ),
    "several batches of one episode": (
        made(With("episodes"), lower=Gradient(accumulate=2)),
        "use upper.accumulate",
        {"lower": Gradient()},
    ),
    "the best of what is not measured": (
        replace(made(Noisy()), best=Best(measure="accuracy", mode="max")),
        "has no evaluate; add one, or take checkpoint.best out",
        {"best": None},
    ),
    "no pairs": (made(estimator=Shine()), "use lower: lbfgs", {"lower": LBFGS()}),
    "no start to learn": (
        made(estimator=FOMAML()),
        "for problems that have lower_start",
        {"problem": With("lower_start")},
    ),
    "x moved past its projection": (
        made(With("project_upper"), MAID()),
        "use estimator: implicit",
        {"estimator": Implicit()},
    ),
    "y moved out of its set": (
        made(With("project_lower"), SingleLoop()),
        "use estimator: fixed_point, or unroll",
        {"estimator": FixedPoint()},
    ),
    "a proximal map unknown": (
        made(With("prox_lower"), Implicit(), Proximal()),
        "use estimator: fixed_point",
        {"estimator": FixedPoint()},
    ),
    "a proximal map ignored": (
        made(With("prox_lower"), FixedPoint()),
        "use lower: proximal",
        {"lower": Proximal()},
    ),
    "constraints that nothing keeps": (
        made(With("lower_constraints")),
        "use lower: augmented_lagrangian, or add project_lower",
        {"lower": AugmentedLagrangian()},
    ),
    "y moved out of its constraints": (
        made(With("lower_constraints"), SingleLoop(), AugmentedLagrangian()),
        "use estimator: kkt",
        {"estimator": KKT()},
    ),
    "rows of one's own rank": (
        replace(made(), estimator=OwnRows(), ranks=TWO),
        r"have it sum what it sees by bilevel\.ranks\.here\(\)\.sum",
        {"estimator": Implicit()},
    ),
    "all of y where each rank has its rows": (
        replace(made(None, Implicit(solver=Dense())), ranks=HELD_TOGETHER),
        r"Dense works with all of y at once, .* use solver: cg",
        {"estimator": Implicit()},
    ),
    "and within a component of a component": (
        replace(made(None, Penalty(lower=LBFGS())), ranks=HELD_TOGETHER),
        "LBFGS works with all of y at once, .* use lower: gradient",
        {"estimator": Penalty()},
    ),
    "steps of torch that look at a whole matrix": (
        replace(made(None, Implicit(), Gradient(optimizer=ADAFACTOR)), ranks=HELD_TOGETHER),
        "TorchOptimizer works with all of y at once, .* use optimizer: adam",
        {"lower": Gradient(optimizer=TorchOptimizer(optimizer="Adagrad"))},
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_remedy_that_is_accepted(case):
    setup, remedy, change = REFUSED[case]
    with pytest.raises(ProblemError, match=remedy):
        refuse_mismatch(setup)
    refuse_mismatch(replace(setup, **change))


def test_each_refusal_has_a_case():
    functions = ast.parse(inspect.getsource(refusals)).body
    raised = [
        node
        for function in functions
        if getattr(function, "name", "") != "refuse_empty_upper"  # asked of x, not of a set-up
        for node in ast.walk(function)
        if isinstance(node, ast.Raise)
    ]
    told = set()
    for setup, _, _ in REFUSED.values():
        with pytest.raises(ProblemError) as refused:
            refuse_mismatch(setup)
        where = refused.traceback[-1]
        told.add((where.path.name, where.lineno))
    # what is no problem, what a lower solver would ignore, and what no estimator of y* sees
    elsewhere = {"levels.py", "path.py"}
    assert {name for name, _ in told} == {"refusals.py", *elsewhere}
    assert len({at for at in told if at[0] not in elsewhere}) == len(raised)


def test_what_knows_of_the_set_may_move_y():
    for knows in (RegularisedGap(), Aggregation()):
        refuse_mismatch(made(With("project_lower"), knows))
        with pytest.raises(ProblemError, match="does not support prox_lower"):
            refuse_mismatch(made(With("project_lower", "prox_lower"), knows, Proximal()))
    refuse_mismatch(made(With("lower_constraints"), RegularisedGap()))
    refuse_mismatch(made(With("lower_constraints", "project_lower")))


def test_what_is_ignored_is_named():
    def ignored(estimator, *names):
        return refusals.ignored_by(estimator, Levels(With(*names)))

    assert ignored(Implicit(), "project_lower") == "project_lower"
    assert ignored(Implicit(), "prox_lower") == "prox_lower"
    assert ignored(Implicit(), "lower_constraints") == "lower_constraints"
    assert ignored(KKT(), "lower_constraints") is None
    assert ignored(Implicit()) is None
    assert ignored(FixedPoint(), "project_lower", "prox_lower") is None
    assert ignored(KKT(), "project_lower") == "project_lower"
    assert ignored(KKT(), "project_lower", "lower_constraints") is None


CONSTRAINED = made(With("lower_constraints"), KKT(), AugmentedLagrangian())
RESTRICTED = {
    "lower_constraints": (CONSTRAINED, "kkt"),
    "prox_lower": (made(With("prox_lower"), FixedPoint(), Proximal()), "fixed_point"),
    "project_lower": (made(With("project_lower"), FixedPoint()), "fixed_point"),
    "nothing": (made(), "implicit"),
}


@pytest.mark.parametrize("case", RESTRICTED)
def test_the_estimator_that_is_advised_works_where_y_is_restricted(case):
    setup, advised = RESTRICTED[case]
    refuse_mismatch(setup)
    with pytest.raises(ProblemError, match=rf"use .*estimator: {advised}$"):
        refuse_mismatch(replace(setup, estimator=FOMAML()))


@pytest.mark.parametrize(
    ("name", "advised"), [("lower_constraints", "kkt"), ("project_lower", "fixed_point, or kkt .*")]
)
def test_check_does_not_advise_the_estimator_that_it_refuses(name, advised, monkeypatch):
    monkeypatch.setattr(CheckScene, "is_restricted", True)
    here = CheckScene(made(With(name)), perturb=0.0)
    said = not_applicable(here, Implicit())
    assert re.fullmatch(rf"{name} restricts .* use estimator: {advised}", said or "")
    assert not_applicable(CheckScene(made(), perturb=0.0), Implicit()) is None
