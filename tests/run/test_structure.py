"""What restricts y, in a run and from Python: who may ignore it, and who is refused."""

import pytest

from bilevel import hypergradient, solve_lower
from bilevel.errors import ProblemError
from bilevel.estimators.alternating import Alternating
from bilevel.estimators.fixed_point import FixedPoint
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.kkt import KKT
from bilevel.estimators.lancbio import LancBiO
from bilevel.estimators.one_step import OneStep
from bilevel.estimators.penalty import Penalty
from bilevel.estimators.unroll import Unroll
from bilevel.events import Warned
from bilevel.lower.gradient import Gradient
from bilevel.lower.proximal import Proximal
from bilevel.problem.levels import structure_of
from bilevel.rng import Streams
from bilevel.run import engine
from bilevel.types import Structure
from bilevel_problems.box_qp import BoxQP
from bilevel_problems.lasso import Lasso
from tests.estimators.maps import at_random, made


class Both(Lasso):
    def project_lower(self, y):
        return y


class Loose(BoxQP):
    project_lower = property()  # pyright: ignore


def warnings(setup):
    return [e.kind for e in engine.run(setup, engine.start(setup)) if isinstance(e, Warned)]


def test_only_what_does_not_know_is_cautioned_about():
    assert "projection" not in warnings(made(BoxQP()))
    assert "projection" not in warnings(made(BoxQP(), estimator=KKT()))
    assert "projection" in warnings(made(BoxQP(), estimator=Implicit()))
    assert "projection" not in warnings(made(Lasso()))
    assert "projection" in warnings(made(Lasso(), estimator=Implicit()))


def of_python(problem, estimator, **held):
    x = at_random(problem, 0)
    return hypergradient(
        problem.upper_loss,
        problem.lower_loss,
        x,
        problem.lower_solution(x),
        estimator=estimator,
        upper_batch=next(problem.upper_batches(None)),
        lower_batch=next(problem.lower_batches(None)),
        structure=Structure(**held),
    )


@pytest.mark.parametrize(
    "estimator", [Implicit(), LancBiO(), Penalty(), Implicit(target_error=1e-3)]
)
def test_what_holds_y_is_not_passed_over_from_python(estimator):
    box, lasso = BoxQP(), Lasso()
    with pytest.raises(
        ProblemError,
        match=r"does not support project_lower and would ignore it.*FixedPoint.*without project",
    ):
        of_python(box, estimator, project=box.project_lower)
    with pytest.raises(ProblemError, match=r"does not support prox_lower"):
        of_python(lasso, estimator, prox=lasso.prox_lower)
    with pytest.raises(ProblemError, match=r"does not support lower_constraints.*use KKT"):
        of_python(box, estimator, constraints=box.lower_constraints)
    of_python(box, estimator)  # on the user's word that nothing holds y there


def test_what_knows_or_claims_another_function_is_not_refused():
    box = BoxQP()
    of_python(box, FixedPoint(), project=box.project_lower)
    of_python(box, KKT(), project=box.project_lower, constraints=box.lower_constraints)
    of_python(box, OneStep(), project=box.project_lower)  # claims the step, and no more
    with pytest.raises(ProblemError, match="KKT does not support project_lower"):
        of_python(box, KKT(), project=box.project_lower)


def test_whoever_ignores_the_proximal_map_is_refused():
    for estimator in (Implicit(), KKT(), Unroll()):
        with pytest.raises(
            ProblemError, match=r"does not support prox_lower.*estimator: fixed_point"
        ):
            engine.refuse_mismatch(made(Lasso(), estimator=estimator))
    for estimator in (FixedPoint(), Alternating()):  # the latter differentiates no lower level
        engine.refuse_mismatch(made(Lasso(), estimator=estimator))


def test_a_doubtful_active_set_is_a_warning():
    few = Proximal(steps=1, lr=0.1)
    assert "degenerate" in warnings(made(BoxQP(bound=0.2), lower=few))
    assert "degenerate" not in warnings(made(BoxQP(bound=0.2)))


def test_a_lower_solver_that_would_ignore_the_proximal_map_is_refused():
    with pytest.raises(ProblemError, match="lower: proximal"):
        engine.refuse_mismatch(made(Lasso(), lower=Gradient()))
    p = Lasso()
    x, y = p.init(Streams(0))
    with pytest.raises(ProblemError, match=r"would ignore it.*lower: proximal"):
        solve_lower(p.lower_loss, x, y, solver=Gradient(), structure=structure_of(p))
    engine.refuse_mismatch(made(Lasso()))


def test_two_maps_that_do_not_compose_are_refused():
    with pytest.raises(ProblemError, match="both project_lower and prox_lower"):
        warnings(made(Both()))


def test_constraints_that_nothing_keeps_are_refused():
    with pytest.raises(ProblemError, match=r"has lower_constraints, and \w+ would ignore it"):
        engine.refuse_mismatch(made(Loose()))
