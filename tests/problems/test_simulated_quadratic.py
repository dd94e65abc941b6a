"""The simulated quadratic is what it says: closed forms, blocks, eigenvalues."""

import pytest
import torch

from bilevel import rng, tree
from bilevel.errors import RecipeError
from bilevel.estimators.implicit import Implicit
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import SGD
from bilevel.registry.build import build
from bilevel.run.engine import Setup
from bilevel.run.upper import Upper
from bilevel.testing import CheckRow, check
from bilevel_problems.simulated_quadratic import SimulatedQuadratic
from tests.cases import closed_form, relative


def case():
    return closed_form(lambda seed: SimulatedQuadratic(data_seed=seed), 1)


def test_the_closed_forms_are_those_of_the_whole():
    at = case()
    x, y = tree.leaves(at.x), tree.leaves(at.y)
    loss = at.problem.lower_loss(at.x, y, at.lower_batch)
    assert float(torch.autograd.grad(loss, y["y"])[0].norm()) < 1e-12 * (1 + tree.norm(at.y))
    value = at.problem.upper_loss(x, at.problem.lower_solution(x), at.upper_batch)
    truth = {"x": torch.autograd.grad(value, x["x"])[0]}
    assert relative(at.truth, truth) < 1e-10
    assert relative(tree.scale(1.01, at.truth), truth) > 1e-3


def test_the_losses_are_averages_over_the_blocks():
    at, parts = case(), SimulatedQuadratic(data_seed=1, batch_size=64)
    for level, blocks in (("upper", 8), ("lower", 64)):
        draws = getattr(parts, f"{level}_batches")(rng.stream(0, level))
        found = {}
        while len(found) < blocks:
            batch = next(draws)
            assert batch["blocks"] == blocks
            found[batch["block"]] = getattr(parts, f"{level}_loss")(at.x, at.y, batch)
        whole = getattr(at.problem, f"{level}_loss")(at.x, at.y, getattr(at, f"{level}_batch"))
        mean = torch.stack(list(found.values())).mean()
        torch.testing.assert_close(mean, whole, rtol=1e-12, atol=1e-12)
        assert float(torch.stack(list(found.values())).std()) > 0.01


def test_eigenvalues_are_those_asked_for_up_to_sampling():
    values = torch.linalg.eigvalsh(SimulatedQuadratic().lower["yy"][0])
    assert values[0] == pytest.approx(0.1, rel=0.1)
    assert values[-1] == pytest.approx(1.0, rel=0.1)
    assert SimulatedQuadratic().lower["yy"].shape == (1, 20, 20)


def test_blocks_must_be_equal():
    with pytest.raises(RecipeError, match="must divide 512"):
        SimulatedQuadratic(batch_size=100)


def test_with_batches_check_asks_about_the_batch_that_is_drawn():
    """The closed form of the whole would call every method wrong that is right on its batch."""
    problem = SimulatedQuadratic(num_lower=4, batch_size=128)
    assert not hasattr(problem, "hypergradient")
    assert not hasattr(problem, "lower_solution")
    assert problem.evaluate(*case_of(problem))["squared hypergradient norm"] > 0
    lower = Gradient(steps=50, optimizer=SGD(lr=0.5))
    setup = Setup(problem, lower, Upper(), Implicit(), dtype=torch.float64)
    options = {"lower_lr": 0.5, "adjoint_lr": 0.5}
    asked = {n: build("estimators", {"name": n, **options}) for n in ("soba", "saba", "srba")}
    rows = [r for r in check(setup, {"implicit": Implicit(), **asked}) if isinstance(r, CheckRow)]
    found = {row.name: row.verdict for row in rows}
    assert found == dict.fromkeys(("implicit", "soba", "saba"), "exact") | {"srba": "untested"}
    assert "met 1 of 32 blocks" in rows[-1].note


def case_of(problem):
    return problem.init(rng.Streams(0))
