"""`check` from Python: one table of rows, printed and in a notebook."""

import re
from dataclasses import replace

import pytest
import torch

from bilevel import hypergradient, solve_lower
from bilevel.errors import RecipeError
from bilevel.estimators import Alternating, Implicit, OneStep
from bilevel.linear import CG
from bilevel.lower import Gradient
from bilevel.optimizers import SGD
from bilevel.testing import check_table
from bilevel.types import Stats
from tests.run.setups import Plain

PLANTED = {"truth": Implicit(), "half": Implicit(damping=2.0), "direct": "alternating"}
"""G_yy = 2 and F_x = 0: with damping 2 the hypergradient is half of what it is, at fixed y it is 0."""


def test_rows_are_what_is_true_and_print_as_a_table():
    found = check_table(Plain(), PLANTED, lower="newton")
    assert [row.name for row in found] == [*PLANTED]
    errors = [row.error for row in found]
    assert errors == pytest.approx([0, 0.5, 1], abs=1e-6)
    lines = repr(found).splitlines()
    assert lines[0].startswith("reference: central differences")
    assert [re.split("  +", line)[0] for line in lines[1:5]] == ["estimator", *PLANTED]
    assert lines[3].split()[3:5] == ["5.0e-01", "1.000"]  # error and cosine of half the truth


def test_a_notebook_has_every_cell_and_the_notes():
    found = check_table(Plain(), {"<b>": OneStep()}, lower="newton")
    shown = found._repr_html_()
    assert "&lt;b&gt;" in shown
    assert "<b>" not in shown
    cells = re.findall(r"<t[dh][^>]*>([^<]*)</t", shown)
    assert len(cells) == 14  # seven heads, seven cells
    assert cells[6] == "verdict"
    assert cells[13] == found[0].verdict


@pytest.mark.parametrize(
    ("estimators", "said"), [((), "none is given"), (("implicitt",), "Did you mean 'implicit'")]
)
def test_what_cannot_be_compared_is_told(estimators, said):
    with pytest.raises(RecipeError, match=said):
        check_table(Plain(), estimators)


def test_statistics_print_what_they_say():
    assert repr(Stats()) == "Stats()"
    said = Stats(gradients=2, residual=1.23456e-7, converged=False, stopped="iterations")
    assert repr(said) == (
        "Stats(gradients=2, residual=1.23e-07, converged=False, stopped='iterations')"
    )


def estimated(estimator):
    x, y = {"x": torch.full((300,), 3.0)}, {"y": torch.full((300,), 3.0)}

    def lower(x, y, batch):
        return (torch.linspace(1, 2, 300) * (y["y"] - x["x"]) ** 2).sum()

    return hypergradient(lambda x, y, batch: (y["y"] ** 2).mean(), lower, x, y, estimator=estimator)


@pytest.mark.untrusted("one iteration of CG is too few, and says so")
def test_an_estimate_prints_its_evidence_and_no_tensor_in_full():
    # dF/dx = 2 · 3 / 300 in each of 300 entries
    lines = repr(estimated(Implicit())).splitlines()
    assert lines[0] == "Estimate: F = 9"
    assert lines[1] == f"x: norm {0.02 * 300**0.5:.3g}, shape [300]"
    assert lines[2].startswith("evidence: gradients=2, hvps=")
    assert lines[3:] == ["claims: the gradient of F(x, y*(x))", "trusted: yes"]
    doubted = estimated(Implicit(solver=CG(iterations=1)))
    assert repr(doubted).splitlines()[4:] == ["trusted: no", *doubted.reasons]
    direct = repr(estimated(Alternating())).splitlines()
    assert direct[3:] == ["claims: the gradient of F(x, y) at fixed y", "trusted: yes"]
    assert "trusted</td>" in doubted._repr_html_()
    nested = replace(doubted, hypergradient={"a": [torch.ones(4)], "b": (torch.zeros(2, 1),)})
    assert repr(nested).splitlines()[1:3] == [
        "a.0: norm 2, shape [4]",
        "b.0: norm 0, shape [2, 1]",
    ]
    assert repr(estimated(Alternating())).splitlines()[1] == "x: norm 0, shape [300]"


def test_a_lower_solution_prints_how_it_was_solved_and_no_tensor_in_full():
    # y ← y − 2 · 0.25 (y − 1) halves the distance to 1 in each of 400 entries, four times from 17
    found = solve_lower(
        lambda x, y, batch: ((y["w"] - 1) ** 2).sum(),
        {},
        {"w": torch.full((400,), 17.0)},
        solver=Gradient(steps=4, optimizer=SGD(lr=0.25)),
    )
    assert repr(found).splitlines()[1:3] == [
        "w: norm 40, shape [400]",
        f"solved: 4 steps, 4 gradients, 0 HVPs, ‖∇y G‖ = {4 * 20:g}, stopped: iterations",
    ]
    assert repr(found).splitlines()[0] == f"LowerSolution: G = {2**2 * 400}"
