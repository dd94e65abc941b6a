"""One look says whether to trust an estimate: the closed form is missed exactly where it warns."""

import warnings

import pytest
import torch

from bilevel import hypergradient, solve_lower
from bilevel.calculus.gauss_newton import Composed
from bilevel.errors import ConvergenceError, UntrustedWarning
from bilevel.estimators import Implicit, Unroll
from bilevel.linear import CG, Identity, Nystrom
from bilevel.lower import LBFGS, Gradient, Newton
from bilevel.lower.divergence import Growth
from bilevel.optimizers import SGD, Adam
from bilevel.problem.trust import Step, reasons
from bilevel.types import Estimate, Stats, Structure

B = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)


def problem(curvatures, scale=1.0):
    """G = scale · (½ yᵀ D y − s bᵀ y): y* = s b / d, and dΦ/ds = Σ b²/d² · s for F = ½ ‖y‖²."""
    d = torch.tensor(curvatures, dtype=torch.float64)

    def G(x, y, _):
        return scale * ((d * y["w"].square()).sum() / 2 - x["s"] * (B @ y["w"]))

    def F(x, y, _):
        return y["w"].square().sum() / 2

    x = {"s": torch.tensor(2.0, dtype=torch.float64)}
    return F, G, x, {"w": 2 * B / d}, float(2 * (B / d).square().sum())


def error(estimate, right):
    return abs(float(estimate.hypergradient["s"]) - right) / abs(right)


def test_a_good_estimate_is_trusted_and_silent():
    F, G, x, y, right = problem([1.0, 2.0, 3.0, 4.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solved = solve_lower(G, x, y, solver=Newton())
        found = hypergradient(F, G, x, solved, estimator=Implicit())
    assert error(found, right) < 1e-6
    assert found.trusted
    assert found.reasons == ()


def test_a_large_condition_number_is_warned_of_by_the_words_of_a_run():
    curvatures = [1e-6, 1e-3, 0.1, 1.0]
    _, G, x, y, _ = problem(curvatures)
    right = float((B / torch.tensor(curvatures, dtype=torch.float64)).sum())

    def F(x, y, _):
        return y["w"].sum()

    with pytest.warns(UntrustedWarning, match="relative residual") as caught:
        found = hypergradient(F, G, x, y, estimator=Implicit(solver=CG(iterations=2)))
    assert error(found, right) > 0.5
    assert not found.trusted
    assert str(caught[0].message) == "; ".join(found.reasons)
    assert caught[0].filename == __file__


def test_the_warning_can_be_turned_off_and_the_reasons_stay():
    F, G, x, y, _ = problem([1e-6, 1e-3, 0.1, 1.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=UntrustedWarning)
        found = hypergradient(F, G, x, y, estimator=Implicit(solver=CG(iterations=2)))
    assert not found.trusted


def test_a_saddle_of_the_lower_level_is_not_trusted():
    F, G, x, y, _ = problem([1.0, 2.0, -3.0, 4.0])
    with pytest.warns(UntrustedWarning, match="not positive definite"):
        assert not hypergradient(F, G, x, y, estimator=Implicit()).trusted


def test_a_lower_solve_short_of_its_tolerance_is_a_reason_for_what_claims_the_solution_alone():
    F, G, x, y, right = problem([1.0, 2.0, 3.0, 4.0])
    start = {"w": y["w"] + 5}
    few = Gradient(steps=3, tolerance=1e-8)
    solved = solve_lower(G, x, start, solver=few, record=True)
    with pytest.warns(UntrustedWarning, match="above its tolerance"):
        found = hypergradient(F, G, x, solved, estimator=Implicit())
    assert error(found, right) > 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert hypergradient(F, G, x, solved, estimator=Unroll()).trusted  # right for its path


def test_a_lower_solve_without_a_tolerance_is_judged_by_where_it_ended():
    F, G, x, y, right = problem([0.01, 0.02, 0.03, 0.04])
    start = {"w": y["w"] + 5 * y["w"].norm()}
    with pytest.warns(UntrustedWarning, match="has no tolerance"):
        found = hypergradient(F, G, x, solve_lower(G, x, start), estimator=Implicit())
    assert error(found, right) > 0.1
    enough = solve_lower(G, x, start, solver=Gradient(steps=400, optimizer=SGD(lr=40.0)))
    good = hypergradient(F, G, x, enough, estimator=Implicit())
    assert error(good, right) < 1e-6
    assert good.trusted


def test_an_absolute_tolerance_that_a_small_loss_meets_at_once_is_seen_through():
    F, G, x, y, right = problem([1.0, 2.0, 3.0, 4.0], scale=1e-9)
    solved = solve_lower(G, x, {"w": 0.5 * y["w"]}, solver=LBFGS(tolerance=1e-8))
    assert solved.stats.steps == 0
    assert solved.stats.converged
    with pytest.warns(UntrustedWarning, match="met its tolerance"):
        found = hypergradient(F, G, x, solved, estimator=Implicit())
    assert error(found, right) < 1e-6 or not found.trusted


def test_steps_that_diverge_are_an_error_that_bounds_the_step():
    _, G, x, y, _ = problem([1.0, 2.0, 3.0, 50.0])
    start = {"w": y["w"] + 1}
    with pytest.raises(ConvergenceError, match=r"diverge: in 20 of.*at most 0.4 times") as caught:
        solve_lower(G, x, start)
    assert "factor of 4 " in str(caught.value)  # lr L − 1 with lr = 0.1, L = 50
    inside = solve_lower(G, x, start, solver=Gradient(steps=400, optimizer=SGD(lr=0.1 * 0.4 * 0.9)))
    assert torch.allclose(inside.y["w"], y["w"], atol=1e-5)


@pytest.mark.parametrize("optimizer", [Adam(lr=0.1), SGD(lr=0.01, momentum=0.95)])
def test_what_moves_off_a_point_of_rest_does_not_count_as_divergence(optimizer):
    _, G, x, y, _ = problem([1.0, 2.0, 3.0, 4.0])
    near = {"w": y["w"] + 1e-12}
    stats = solve_lower(G, x, near, solver=Gradient(steps=20, optimizer=optimizer)).stats
    assert stats.steps == 20


@pytest.mark.parametrize(("last", "bound"), [(1e9, True), (1e5, False)])
def test_the_bound_of_the_step_is_said_where_the_last_step_grew(last, bound):
    """lr L − 1 = 1e9 / 1e7 there; a step that shrank says nothing of L."""
    growth = Growth()
    for norm in (1.0, 2.0, 4.0, 8.0, 1e7, last):
        growth.note(norm, norm)
    with pytest.raises(ConvergenceError, match="the lower steps diverge") as said:
        growth.refuse_divergence()
    assert ("at most 0.02 times the present one" in str(said.value)) is bound
    assert "take a smaller lower.optimizer.lr" in str(said.value)


@pytest.mark.parametrize("held", [True, False], ids=["held", "free"])
def test_where_a_set_holds_y_its_gradient_is_no_distance(held):
    """min over w ≤ 1 of ½ ‖w − 2‖²: w* = 1, where ∇y G = −1."""

    def G(x, y, _):
        return (y["w"] - 2).square().sum() / 2 + 0 * x["s"].sum()

    structure = Structure(project=lambda y: {"w": y["w"].clamp(max=1.0)}) if held else None
    x, y = {"s": torch.zeros(2, dtype=torch.float64)}, {"w": torch.zeros(3, dtype=torch.float64)}
    steps = 200 if held else 3
    solved = solve_lower(G, x, y, solver=Gradient(steps=steps), structure=structure)
    assert solved.stats.gradient_norm > 1
    stats = Stats(residual=0.0, converged=True, curvature=1.0)
    found = Estimate(x, torch.zeros(()), None, stats)
    assert bool(reasons(Step(Implicit(), found, solved))) is not held


@pytest.mark.parametrize("estimator", ["implicit", "lancbio"])
@pytest.mark.parametrize("damping", [1e-3, 0.1, 1.0, 1e6])
def test_damping_that_outweighs_the_lower_hessian_is_not_trusted(estimator, damping):
    F, G, x, y, right = problem([1.0, 2.0, 3.0, 4.0])
    more = {"products": 4} if estimator == "lancbio" else {}
    asked = {"name": estimator, "damping": damping, **more}
    found = hypergradient(F, G, x, y, estimator=asked)
    d = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    v = y["w"] / (d + damping)
    left = float(damping * v.norm() / y["w"].norm())
    assert found.stats.damping_residual == pytest.approx(left, rel=1e-9)
    # the error of a tenth is met between the second and the third
    assert (error(found, right) > 0.05) is (damping >= 0.1)
    assert ("estimator.damping to a smaller value" in "".join(found.reasons)) is (left > 0.1)
    assert error(found, right) < 0.1 or not found.trusted


def test_damping_within_a_known_bound_is_trusted():
    """h is nearly ∇x F alone, which no solve changes."""
    F, G, x, y, _ = problem([1.0, 2.0, 3.0, 4.0])

    def outweighed(x, y, batch):
        return 1e4 * x["s"].square() + F(x, y, batch)

    known = {"strong_convexity": 1.0, "cross_norm": float(B.norm())}
    bounded = Implicit(damping=1.0, **known)
    assert hypergradient(outweighed, G, x, y, estimator=bounded).trusted
    assert not hypergradient(F, G, x, y, estimator=bounded).trusted


@pytest.mark.parametrize(
    "name", ["implicit", "identity", "gauss_newton", "soba", "lancbio", "nystrom"]
)
def test_what_has_no_evidence_of_its_error_is_not_trusted_and_warns_of_nothing(name):
    F, G, x, y, right = problem([1.0, 2.0, 3.0, 4.0])
    asked = {
        "identity": Implicit(solver=Identity()),
        "nystrom": Implicit(solver=Nystrom(rank=4, rho=1e-9)),
        "gauss_newton": {"name": "implicit", "curvature": "gauss_newton"},
    }.get(name, name)
    if name == "gauss_newton":
        written = G
        G = Composed(
            outputs=lambda x, y, _: y["w"], loss=lambda x, y, z, _: written(x, {"w": z}, _)
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = hypergradient(F, G, x, y, estimator=asked)
    measured = name in ("implicit", "nystrom")
    assert found.trusted is measured
    assert measured or "nothing that was computed says" in found.reasons[0]
    assert error(found, right) < 1e-6 or name in ("identity", "soba", "lancbio")


def test_another_claim_than_that_of_the_solution_is_trusted_for_itself():
    F, G, x, y, right = problem([1.0, 2.0, 3.0, 4.0])
    found = hypergradient(F, G, x, y, estimator="none")
    assert (found.claim, found.trusted, float(found.hypergradient["s"])) == ("direct", True, 0.0)
    assert error(found, right) == 1.0


def toy(curvature):
    """G = ½ (a − x)² + ½ c (b − 50)², F = ½ (a − 1)²: a* = x, and dΦ/dx = x − 1."""

    def F(x, y, _):
        return (y["a"] - 1).square() / 2

    def G(x, y, _):
        return (y["a"] - x["s"]).square() / 2 + curvature * (y["b"] - 50).square() / 2

    x = {"s": torch.tensor(3.0, dtype=torch.float64)}
    return F, G, x, {name: torch.zeros((), dtype=torch.float64) for name in "ab"}


@pytest.mark.parametrize("solver", ["lbfgs", "proximal", "newton"])
@pytest.mark.parametrize("curvature", [1e2, 1e5, 1e7, 1e8])
def test_a_small_gradient_beside_a_large_curvature_hides_no_error_of_f(solver, curvature):
    """‖∇y G‖ = 2 meets a tolerance of 1e-8 · 1e8 · 50, and leaves a off by 2 of 50."""
    F, G, x, start = toy(curvature)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrustedWarning)
        solved = solve_lower(G, x, start, solver=solver)
        found = hypergradient(F, G, x, solved, estimator="implicit")
    off = error(found, 2.0)
    assert found.trusted is (off < 0.1)
    assert off < 1e-3 or off > 1  # both sides are clear of the threshold
    if solver == "newton":
        assert off < 1e-12


def test_an_offset_of_y_hides_no_error_of_f():
    """Two steps are far from enough, and 4 is little beside a y of a thousand."""
    one = torch.ones(2, dtype=torch.float64)

    def F(x, y, _):
        return (y["w"] - 1001).square().sum() / 2

    def G(x, y, _):
        return (y["w"] - 1000 - x["s"]).square().sum() / 2

    x, start = {"s": torch.tensor([5.0, -3.0], dtype=torch.float64)}, {"w": 1000 * one}
    for steps in (2, 400):
        solved = solve_lower(G, x, start, solver=Gradient(steps=steps, optimizer=SGD(lr=0.1)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UntrustedWarning)
            found = hypergradient(F, G, x, solved, estimator="implicit")
        off = float((found.hypergradient["s"] - (x["s"] - 1)).norm() / (x["s"] - 1).norm())
        assert found.trusted is (off < 1e-6) is (steps == 400)


@pytest.mark.parametrize("estimator", ["implicit", "fixed_point", "kkt", "lancbio"])
def test_a_y_that_is_not_the_solution_for_this_x_is_not_trusted(estimator):
    """y of another x: nothing but ∇y G at this one says so."""
    F, G, x, y, _ = problem([1.0, 2.0, 3.0, 4.0])
    mean = torch.full_like(B, 0.25)
    free = Structure()
    if estimator == "kkt":  # a constraint that the solution meets by itself
        level = float(mean @ y["w"]) / float(x["s"])
        free = Structure(
            constraints=lambda x, y, _: {"equality": (mean @ y["w"] - level * x["s"])[None]}
        )
    elif estimator == "fixed_point":  # a set that y is well inside of
        free = Structure(project=lambda y: {"w": y["w"].clamp(-100, 100)})
    asked = (
        {"name": "lancbio", "products": 4, "residual": True}
        if estimator == "lancbio"
        else estimator
    )

    def ask(y):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UntrustedWarning)
            return hypergradient(F, G, x, y, estimator=asked, structure=free)

    good, stale = ask(y), ask({"w": 0.3 * y["w"]})
    assert good.trusted
    assert abs(good.stats.value_error) < 1e-12
    assert not stale.trusted
    # F is quadratic and y* linear in x: at 0.3 y*, F(y) − F(y*) is −0.7 · 0.3 ‖y*‖² to first order
    least = 0.3 * 0.7 * float(y["w"].square().sum())
    assert stale.stats.value_error == pytest.approx(-least, rel=1e-6)
    assert "y is not the lower solution for this x" in "".join(stale.reasons)


def test_an_active_constraint_that_is_taken_for_inactive_is_not_trusted():
    """The nearest point of a disc, from a solve that ends just inside its edge."""
    a, w = torch.tensor([3.0, 4.0]).double(), torch.tensor([1.0, 2.0]).double()
    x = {"radius": torch.tensor(2.0, dtype=torch.float64)}

    def F(x, y, _):
        return (y["w"] @ w) ** 2

    def G(x, y, _):
        return (y["w"] - a).square().sum()

    inside = Structure(
        constraints=lambda x, y, _: {"inequality": (y["w"] @ y["w"] - x["radius"] ** 2)[None]}
    )
    for short, held in ((1e-5, False), (1e-9, True)):
        y = {"w": a / a.norm() * 2 * (1 - short)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UntrustedWarning)
            found = hypergradient(F, G, x, y, estimator="kkt", structure=inside)
        right = 2 * 2 * float(a @ w / a.norm()) ** 2
        assert (abs(float(found.hypergradient["radius"]) - right) < 1e-3 * right) is held
        assert found.trusted is held
        assert held or "estimator.activity" in found.reasons[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_f_passes_through_zero_rounding_of_y_is_no_error_of_f(dtype):
    """Nothing is small beside an F of zero; beside what F changes by with x it is."""
    _, _, x, y, _ = problem([1.0, 2.0, 3.0, 4.0])
    x, y = ({name: entry.to(dtype) for name, entry in part.items()} for part in (x, y))
    d, b = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=dtype), B.to(dtype)
    least = y["w"].square().sum() / 2

    def F(x, y, _):
        return y["w"].square().sum() / 2 - least

    def G(x, y, _):
        return (d * y["w"].square()).sum() / 2 - x["s"] * (b @ y["w"])

    for part, trusted in ((1 + 1e-6, True), (0.9, False)):
        found = hypergradient(F, G, x, {"w": part * y["w"]}, estimator="implicit")
        assert abs(float(found.value)) < 10 * abs(found.stats.value_error)
        assert found.trusted is trusted


def test_what_first_order_cannot_tell_is_not_given_as_a_number():
    """F = ½ ‖y‖² at 3 y*: to first order it would be negative at y*."""
    F, G, x, y, _ = problem([1.0, 2.0, 3.0, 4.0])
    far = hypergradient(F, G, x, {"w": 3 * y["w"]}, estimator="implicit")
    assert "and is far from that at the lower solution" in far.reasons[0]
    near = hypergradient(F, G, x, {"w": 1.2 * y["w"]}, estimator="implicit")
    here, there = 0.72, 0.72 - 0.24  # of ‖y*‖²: ½ 1.2², less 1.2 · 0.2
    size = float(y["w"].square().sum())
    assert f"F = {here * size:.3g} here" in near.reasons[0]
    assert f"to first order, {there * size:.3g};" in near.reasons[0]


def test_a_tolerance_that_is_not_met_by_little_or_cannot_be_is_no_doubt():
    """y may be near enough all the same; where a set holds it, its gradient stays."""
    F, G, x, y, right = problem([1.0, 2.0, 3.0, 4.0])
    d, b = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64), B
    for steps, trusted in ((2, False), (80, True)):
        short = Gradient(steps=steps, tolerance=1e-14, optimizer=SGD(lr=0.2))
        solved = solve_lower(G, x, {"w": 0 * y["w"]}, solver=short)
        with warnings.catch_warnings():
            warnings.simplefilter("error" if trusted else "ignore", UntrustedWarning)
            found = hypergradient(F, G, x, solved, estimator="implicit")
        assert not solved.stats.converged
        assert (error(found, right) < 1e-5) is trusted
        assert found.trusted is trusted
    # held at w ≤ 1 in the first and the third entry, where y* is 2 and 2
    held = Structure(project=lambda y: {"w": y["w"].clamp(max=1.0)})
    few, many = (Gradient(steps=steps, tolerance=1e-6, optimizer=SGD(lr=0.2)) for steps in (1, 80))
    free = float((b / d)[[1, 3]].square().sum() * x["s"])
    for solver, trusted in ((few, False), (many, True)):
        solved = solve_lower(G, x, {"w": 0 * y["w"]}, solver=solver, structure=held)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UntrustedWarning)
            found = hypergradient(F, G, x, solved, estimator="fixed_point")
        assert not solved.stats.converged
        assert (error(found, free) < 1e-4) is trusted
        assert found.trusted is trusted
