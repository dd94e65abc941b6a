"""`check` tells right from wrong: planted errors are caught on every kind of reference."""

from __future__ import annotations

import importlib.util
import sys
import types
from dataclasses import dataclass, replace

import pytest
import torch

from bilevel import calculus, tree
from bilevel.calculus.finite_differences import central
from bilevel.errors import ProblemError
from bilevel.estimators.alternating import Alternating
from bilevel.estimators.averaged_multipliers import AveragedMultipliers
from bilevel.estimators.forward import Forward
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.one_step import OneStep
from bilevel.estimators.penalty import Penalty
from bilevel.estimators.shine import Shine
from bilevel.estimators.unroll import Unroll
from bilevel.estimators.value_gap import ValueGap
from bilevel.linear.cg import CG
from bilevel.linear.dense import Dense
from bilevel.linear.gmres import GMRES
from bilevel.linear.identity import Identity
from bilevel.linear.minres import MINRES
from bilevel.linear.neumann import Neumann
from bilevel.linear.normal_cg import NormalCG
from bilevel.lower.gradient import Gradient
from bilevel.lower.lbfgs import LBFGS
from bilevel.lower.newton import Newton
from bilevel.optimizers.differentiable import SGD, Adam
from bilevel.rng import stream
from bilevel.run.engine import Setup
from bilevel.run.upper import Upper
from bilevel.testing import CheckRow, check
from bilevel.types import Stats
from bilevel_problems.hyper_cleaning import HyperCleaning
from bilevel_problems.quadratic import Quadratic
from bilevel_problems.ridge import Ridge
from tests.wrapped import Wrapped

SHIPPED = {
    "cg": Implicit(),
    "dense": Implicit(solver=Dense()),
    "neumann": Implicit(solver=Neumann(scale=0.3)),
    "unroll": Unroll(),
    "last three": Unroll(last=3, memory="recompute"),
    "one step": OneStep(),
    "one step fd": OneStep(finite_difference=True),
    "forward": Forward(),
    "penalty": Penalty(),
    "penalty, central": Penalty(central=True),
    "minres": Implicit(solver=MINRES()),
    "gmres": Implicit(solver=GMRES()),
    "normal cg": Implicit(solver=NormalCG()),
    "none": Alternating(),
}
KEPT = {
    name: "exact" if estimator.claim == "solution" else "as claimed"
    for name, estimator in SHIPPED.items()
}
PROBLEMS = {
    "closed form": Quadratic(),
    "closed form, real data": Ridge(),
    "central differences": HyperCleaning(num_train=40, num_clean=30, ridge=0.1),
}


@dataclass(frozen=True)
class Wavy:
    """A lower level with no closed form and a lower loss that Newton cannot bound from below."""

    dim: int = 4

    def init(self, streams):
        x = torch.linspace(0.1, 0.5, self.dim, dtype=torch.float64)
        return {"x": x}, {"y": x - 1.0}

    def upper_loss(self, x, y, batch):
        return (y["y"] ** 2).sum() + (x["x"] * y["y"]).sum()

    def lower_loss(self, x, y, batch):  # slopes down for ever, convex: no minimum to solve for
        return torch.exp(-y["y"] * x["x"].exp()).sum()

    def upper_batches(self, generator):
        while True:
            yield None

    lower_batches = upper_batches


def rows(problem, estimators, **options) -> dict[str, CheckRow]:
    lower = options.pop("lower", Gradient(steps=25, optimizer=SGD(lr=0.3)))
    setup = Setup(problem, lower, Upper(), Implicit())
    found = [row for row in check(setup, estimators, **options) if isinstance(row, CheckRow)]
    return {row.name: row for row in found}


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_every_estimator_keeps_its_claim(problem):
    found = rows(problem, SHIPPED)
    assert {name: row.verdict for name, row in found.items()} == KEPT
    assert all(row.claim_error < 1e-3 for row in found.values())


@dataclass(frozen=True)
class Planted(Wrapped):
    """An estimator with one mistake."""

    inner: object
    mistake: object

    def estimate(self, losses, at, state):
        estimate = self.inner.estimate(losses, at, state)
        _, F_x, _ = calculus.gradients(losses.upper, at)
        return replace(estimate, hypergradient=self.mistake(estimate.hypergradient, F_x))


MISTAKES = {
    "sign of all": lambda h, F_x: tree.scale(-1.0, h),
    "sign of the implicit term": lambda h, F_x: tree.sub(tree.scale(2.0, F_x), h),
    "half of the implicit term": lambda h, F_x: tree.scale(0.5, tree.add(h, F_x)),
    "one part in a thousand": lambda h, F_x: tree.scale(1.001, h),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_planted_mistakes_are_caught(problem, mistake):
    methods = {name: SHIPPED[name] for name in ("cg", "neumann", "unroll", "one step")}
    found = rows(problem, {name: Planted(e, mistake) for name, e in methods.items()})
    assert {row.verdict for row in found.values()} == {"wrong"}
    assert all("claim missed" in row.note for row in found.values())


def test_a_sign_error_in_the_calculus_is_caught(monkeypatch):
    """The reference does not lean on the code under test: all second-order methods fall."""
    right = calculus.Linearization.vjp_xy
    monkeypatch.setattr(
        calculus.Linearization, "vjp_xy", lambda self, v: tree.scale(-1.0, right(self, v))
    )
    for problem in PROBLEMS.values():
        found = rows(problem, {"cg": Implicit(), "one step": OneStep()})
        assert {row.verdict for row in found.values()} == {"wrong"}


def test_the_reference_says_what_it_is():
    one = {"cg": Implicit()}
    assert rows(Quadratic(), one)["cg"].reference == "closed form"
    cleaning = rows(PROBLEMS["central differences"], one)["cg"]
    assert cleaning.reference == "central differences (6 directions)"
    adjoint = rows(Wavy(), one)["cg"]
    assert adjoint.reference == "converged adjoint"
    assert adjoint.verdict == "as claimed"  # the formula holds; there is no lower solution


def test_the_adjoint_reference_catches_a_mistake_too():
    found = rows(Wavy(), {name: Planted(Implicit(), m) for name, m in MISTAKES.items()})
    assert {row.verdict for row in found.values()} == {"wrong"}


def test_errors_are_those_of_the_settings_asked_for():
    """Truncated unrolling and damping are off by what theory says they are, and claim nothing more."""
    found = rows(
        Quadratic(),
        {
            "few": Implicit(solver=CG(iterations=2)),
            "many": Implicit(solver=CG(iterations=50, tolerance=1e-10)),
            "damped": Implicit(damping=0.5),
        },
        lower=Gradient(steps=600, optimizer=SGD(lr=0.9)),
    )
    assert found["few"].error > 1e-2 > 1e-6 > found["many"].error
    assert found["many"].cosine == pytest.approx(1.0, abs=1e-9)
    assert found["damped"].verdict == "approximate"
    assert found["damped"].error > 1e-2


def test_what_claims_nothing_and_comes_to_no_number_is_refused_with_the_reason():
    far = Neumann(scale=1e3, iterations=400)
    found = rows(
        Quadratic(),
        {
            "damped": Implicit(solver=far, damping=0.1),
            "claims": Implicit(solver=far),  # which is judged at a scale that converges
            "near": Implicit(solver=replace(far, scale=0.3), damping=0.1),
        },
    )
    assert found["damped"].verdict == "refused"
    assert "the Neumann series diverges" in found["damped"].note
    assert found["claims"].verdict == "exact"
    assert found["near"].verdict == "approximate"


def test_what_cannot_be_tested_is_not_called_exact():
    found = rows(
        Quadratic(condition=1e7),
        {"neumann": Implicit(solver=Neumann(scale=0.5))},
    )
    assert found["neumann"].verdict == "untested"
    assert "not converged" in found["neumann"].note


def test_a_lower_solver_is_lent_where_the_own_one_keeps_nothing():
    wrong = Planted(Unroll(), MISTAKES["one part in a thousand"])
    chosen = {"unroll": Unroll(), "wrong": wrong, "cg": Implicit()}
    found = rows(Quadratic(), chosen, lower=LBFGS())
    assert found["unroll"].verdict == "as claimed"
    assert found["unroll"].note == (
        "not measured as configured, for lower: lbfgs keeps no path; its claim was tested after "
        "lower: gradient"
    )
    assert found["unroll"].is_claim_alone
    assert not found["cg"].is_claim_alone
    assert (found["unroll"].error, found["unroll"].cosine) == (None, None)  # of no run there is
    assert found["wrong"].verdict == "wrong"
    assert found["cg"].verdict == "exact"
    assert found["cg"].note == ""
    refined = Shine(refine=CG())
    chosen = {"shine": refined, "wrong": Planted(refined, MISTAKES["half of the implicit term"])}
    found = rows(Quadratic(), chosen)
    assert {name: row.verdict for name, row in found.items()} == {
        "shine": "exact",
        "wrong": "wrong",
    }
    assert "lower: gradient keeps no pairs; its claim was tested" in found["shine"].note


def test_what_claims_nothing_is_untested_where_nothing_is_measured():
    found = rows(Quadratic(), {"shine": Shine(), "damped": Implicit(damping=0.5)})
    assert (found["shine"].error, found["shine"].claim_error) == (None, None)
    assert found["shine"].verdict == "untested"
    assert found["shine"].note == (
        "claims nothing that could be tested; not measured as configured, for lower: gradient "
        "keeps no pairs"
    )
    assert found["damped"].verdict == "approximate"
    assert found["damped"].note.endswith("err vs dΦ/dx is all there is")


def test_a_gap_that_is_flat_at_the_solution_is_tested_beside_it():
    wrong = Planted(ValueGap(), MISTAKES["one part in a thousand"])
    found = rows(Ridge(), {"gap": ValueGap(), "wrong": wrong}, lower=Newton())
    assert {name: row.verdict for name, row in found.items()} == {
        "gap": "as claimed",
        "wrong": "wrong",
    }


def test_a_nonconvex_lower_level_is_followed_to_its_local_solution():
    class Wells(Wavy):
        def lower_loss(self, x, y, batch):
            return ((y["y"] ** 2 - 1) ** 2 / 4 + 0.1 * x["x"] * y["y"]).sum()

    found = rows(Wells(), SHIPPED, lower=Gradient(steps=25, optimizer=Adam(lr=0.1)))
    assert found["cg"].reference == "central differences"
    assert {name: row.verdict for name, row in found.items()} == KEPT


@pytest.mark.parametrize("dim", [3, 60])
def test_central_differences_of_a_known_function(dim):
    """Against the exact gradient, in all coordinates and in random directions."""
    generator = torch.Generator().manual_seed(0)
    x = {"a": torch.randn(dim, generator=generator, dtype=torch.float64)}
    found = central(lambda x: torch.sin(x["a"]).sum() * x["a"][0].exp(), x, stream(0, "t"))
    leaf = x["a"].clone().requires_grad_()
    (torch.sin(leaf).sum() * leaf[0].exp()).backward()
    truth = found.along({"a": leaf.grad})
    assert float((found.slopes - truth).norm() / truth.norm()) < 1e-8
    assert found.error < 1e-4
    assert found.directions.shape[1] == (3 if dim == 3 else 6)


class Held(Wavy):
    """y is held above 1.5, where the free solution y = x is not: dΦ/dx = 0 through y."""

    def upper_loss(self, x, y, batch):
        return ((y["y"] - 3.0) ** 2).sum() + 0.0 * x["x"].sum()

    def lower_loss(self, x, y, batch):
        return 0.5 * ((y["y"] - x["x"]) ** 2).sum()

    def project_lower(self, y):
        return tree.map(lambda p: p.clamp(min=1.5), y)


class HeldFarOff(Held):
    """The bound is where nothing ever comes: implicit differentiation is right."""

    def project_lower(self, y):
        return tree.map(lambda p: p.clamp(min=-50.0), y)


def test_an_active_constraint_makes_implicit_differentiation_wrong():
    found = rows(Held(), {"cg": Implicit(), "unroll": Unroll(), "none": Alternating()})
    assert found["cg"].reference == "central differences"
    assert found["cg"].verdict == "refused"
    assert "project_lower restricts the lower solution here" in found["cg"].note
    assert "use estimator: fixed_point" in found["cg"].note
    assert found["cg"].error > 0.5
    assert found["unroll"].error < 1e-9
    assert found["unroll"].verdict == "as claimed"


def test_a_mistake_is_no_refusal_where_the_constraint_is_not_active():
    wrong = Planted(Implicit(), MISTAKES["half of the implicit term"])
    found = rows(HeldFarOff(), {"cg": Implicit(), "wrong": wrong})
    assert {name: row.verdict for name, row in found.items()} == {"cg": "exact", "wrong": "wrong"}


PLANTED = {
    "cg residual": (
        "bilevel.linear.cg",
        "_update_residual(r, alpha, Ap, by_entry)",
        "_update_residual(r, -alpha, Ap, by_entry)",
    ),
    "cg step": (
        "bilevel.linear.cg",
        "_update_direction(v, alpha, p,",
        "_update_direction(v, -alpha, p,",
    ),
    "neumann residual": (
        "bilevel.linear.neumann",
        "tree.axpy_(r, -self.scale, Ar)",
        "tree.axpy_(r, self.scale, Ar)",
    ),
    "neumann sum": (
        "bilevel.linear.neumann",
        "tree.axpy_(v, self.scale, r)",
        "tree.axpy_(v, -self.scale, r)",
    ),
}


@pytest.mark.parametrize(("module", "right", "wrong"), PLANTED.values(), ids=PLANTED)
def test_sign_errors_inside_the_solvers_are_caught(module, right, wrong):
    """A solver broken in its source, whose own evidence breaks with it."""
    source = importlib.util.find_spec(module).loader.get_source(module)
    assert source.count(right) == 1
    broken = types.ModuleType("broken")
    sys.modules["broken"] = broken
    exec(compile(source.replace(right, wrong), "broken", "exec"), broken.__dict__)
    solver = broken.CG() if module.endswith("cg") else broken.Neumann(scale=0.3)
    for problem in (Quadratic(), Ridge()):
        row = rows(problem, {"planted": Implicit(solver=solver)})["planted"]
        assert row.verdict == "wrong", row.note


def test_a_negated_hessian_product_is_caught(monkeypatch):
    right = calculus.Linearization.hvp_yy
    monkeypatch.setattr(
        calculus.Linearization, "hvp_yy", lambda self, v: tree.scale(-1.0, right(self, v))
    )
    assert rows(Quadratic(), {"cg": Implicit()})["cg"].verdict == "wrong"


@dataclass(frozen=True)
class Silent(Planted):
    """A mistake, and no word about the solve."""

    said: object = None

    def estimate(self, losses, at, state):
        return replace(super().estimate(losses, at, state), stats=self.said)


@pytest.mark.parametrize("said", [Stats(), Stats(residual=1e-12)], ids=repr)
def test_silence_is_no_excuse(said):
    wrong = Silent(Implicit(), MISTAKES["sign of all"], said)
    right = Silent(Implicit(), lambda h, F_x: h, said)
    found = rows(Quadratic(), {"wrong": wrong, "right": right})
    assert (found["wrong"].verdict, found["right"].verdict) == ("wrong", "exact")


def test_an_estimator_that_breaks_costs_only_its_own_row():
    def breaks(h, F_x):
        raise KeyError("gone")

    found = rows(
        Quadratic(),
        {
            "breaks": Planted(Implicit(), breaks),
            "other names": Planted(Implicit(), lambda h, F_x: {"z": h["x"]}),
            "identity": Implicit(solver=Identity()),
            "cg": Implicit(),
        },
    )
    assert found["breaks"].verdict == "wrong"
    assert "KeyError" in found["breaks"].note
    assert found["other names"].verdict == "wrong"
    assert "must return a hypergradient with the form of x" in found["other names"].note
    assert found["identity"].verdict == "approximate"
    assert found["cg"].verdict == "exact"


def test_a_rough_function_is_not_called_as_claimed():
    class Rough(Wavy):
        def upper_loss(self, x, y, batch):
            return torch.sin(3e4 * x["x"]).sum() + (y["y"] ** 2).sum()

    wrong = Planted(Alternating(), MISTAKES["sign of all"])
    assert rows(Rough(), {"none": wrong})["none"].verdict == "untested"


def test_a_penalised_problem_without_a_minimum_is_no_test_of_the_penalty():
    class Slides(Wavy):
        """F falls for ever along an entry of y that G does not use."""

        def init(self, streams):
            return {"a": torch.ones(())}, {"w": torch.tensor([0.1, 0.2]), "free": torch.ones(())}

        def upper_loss(self, x, y, batch):
            return (y["w"] - 1).square().sum() + 0.1 * y["free"] * x["a"]

        def lower_loss(self, x, y, batch):
            return (y["w"] - x["a"]).square().sum() + 0.1 * (y["w"] ** 4).sum()

    class Bounded(Slides):
        def upper_loss(self, x, y, batch):
            return super().upper_loss(x, y, batch) + 0.05 * y["free"].square() * x["a"] ** 2

    wrong = Planted(Penalty(), MISTAKES["sign of all"])
    asked = {"penalty": Penalty(), "averaged": AveragedMultipliers(), "cg": Implicit()}
    found = rows(Slides(), asked, lower=Newton())
    assert {name: row.verdict for name, row in found.items()} == {
        "penalty": "untested",
        "averaged": "untested",
        "cg": "exact",
    }
    assert "what it minimises may have no minimum" in found["penalty"].note
    found = rows(Bounded(), {"penalty": Penalty(), "wrong": wrong}, lower=Newton())
    assert (found["penalty"].verdict, found["wrong"].verdict) == ("as claimed", "wrong")


def test_nothing_to_check_is_said():
    class Flat(Wavy):
        def init(self, streams):
            return {}, super().init(streams)[1]

    with pytest.raises(ProblemError, match="x is empty"):
        rows(Flat(), {"cg": Implicit()})
