"""`check`: a row for each estimator, and when it fails."""

import re
from pathlib import Path

import pytest

from bilevel import report
from bilevel.errors import RequirementError
from bilevel.estimators import betty
from tests.cli.commands import invoke
from tests.report.records import table


def test_check_shows_a_row_for_each_estimator():
    text = invoke("check", "quadratic").output
    assert "reference: closed form" in text
    for name in ("implicit", "alternating", "one_step", "unroll"):
        verdict = "exact" if name == "implicit" else "as claimed"
        assert re.search(rf"^{name} .* {verdict}", text, re.MULTILINE)
    only = invoke("check", "quadratic", "--estimators", "implicit,none").output
    assert "unroll" not in only
    assert max(map(len, text.splitlines())) <= 80


def test_a_claim_alone_is_marked_and_what_is_not_measured_is_untested():
    text = invoke("check", "box_qp", "--estimators", "forward,zeroth_order,kkt").output
    assert re.search(r"^forward +path +\d\S+ +- +- +\d+ +as claimed\*$", text, re.MULTILINE)
    assert re.search(r"^zeroth_order +- +- +- +- +0 +untested *$", text, re.MULTILINE)
    assert re.search(r"^kkt .* exact *$", text, re.MULTILINE)
    assert "*: of the claim alone" in text
    told = " ".join(text.split())
    assert "forward: not measured as configured, for lower: proximal keeps no path; its" in told
    assert "zeroth_order: claims nothing that could be tested; not measured" in told
    assert "*" not in invoke("check", "box_qp", "--estimators", "kkt").output


def test_variables_beyond_the_columns_are_counted():
    text = invoke("check", "sinusoid", "--path", "problem.problem.width=4").output
    assert "in `all` alone: 1 more of them" in text


WRONG = """
from bilevel import tree
from bilevel.estimators.implicit import Implicit
from dataclasses import replace
class Wrong:
    claim = "solution"
    needs = Implicit().needs
    def init(self, at): return Implicit().init(at)
    def estimate(self, losses, at, state):
        got = Implicit().estimate(losses, at, state)
        return replace(got, hypergradient=tree.scale(1.01, got.hypergradient))
"""


def test_check_says_which_are_exact_only_once_settled():
    text = " ".join(invoke("check", "quadratic", "--estimators", "implicit,lancbio").output.split())
    assert re.search(r"lancbio solution \S+ 4.\de-01 .* exact ", text)
    assert "lancbio: exact with all inner solves" in text
    assert "implicit, lancbio: exact with" not in text  # it is 2.5e-02 off


def test_one_that_is_not_installed_costs_the_others_nothing(monkeypatch):
    def absent():
        raise RequirementError("betty-ml is not installed")

    monkeypatch.setattr(betty, "require", absent)
    result = invoke("check", "quadratic", "--estimators", "none,betty:neumann", code=3)
    assert re.search(r"^none .* as claimed", result.output, re.MULTILINE)
    assert re.search(r"^betty:neumann .* untested", result.output, re.MULTILINE)
    assert "betty:neumann: betty-ml is not installed" in result.output
    assert "betty:neumann: not tested" in result.stderr
    alone = invoke("check", "quadratic", "--estimators", "betty:neumann", code=3)
    assert "betty-ml is not installed" in alone.stderr
    assert "betty-ml  is not installed" in invoke("doctor").output.replace("betty-ml is", "is")


def test_a_preset_that_is_not_there_is_no_class_of_that_module():
    got = invoke("check", "quadratic", "--estimators", "betty:neuman", code=2).stderr
    assert "unknown estimator. Did you mean 'betty:neumann'" in got
    assert "site-packages" not in invoke("run", "quadratic", "estimator=betty:bogus", code=2).stderr


def test_a_wrong_estimator_fails_the_check(tmp_path: Path):
    (tmp_path / "wrong.py").write_text(WRONG)
    path = tmp_path / "wrong.yaml"
    path.write_text("problem: quadratic\nestimator: wrong.py:Wrong\n")
    result = invoke("check", path, code=4)
    assert re.search(r"wrong *$", result.output, re.MULTILINE)
    assert "not the hypergradient that is claimed" in result.stderr


def test_one_that_was_asked_for_and_cannot_work_fails_the_check():
    result = invoke("check", "quadratic", "--estimators", "implicit,kkt", code=4)
    assert re.search(r"^kkt .* refused", result.output, re.MULTILINE)
    assert "lower_constraints" in result.output
    assert "kkt: cannot work on this problem" in result.stderr
    invoke("check", "quadratic", "--estimators", "implicit")  # negative control


def test_check_of_the_path_has_a_column_for_each_upper_variable():
    overrides = "lower={name: gradient, steps: 3, optimizer: {name: sgd, lr: 1e-2}}"
    text = invoke(
        "check", "ridge", overrides, "--path", "--estimators", "unroll,alternating"
    ).output
    assert re.search(r"^unroll +1\.00 ×1 +1\.00 ×1$", text, re.MULTILINE)
    assert re.search(r"^alternating +0\.00 ×0 +0\.00 ×0$", text, re.MULTILINE)
    assert max(map(len, text.splitlines())) <= 80
    refused = invoke("check", "ridge", "--path", code=2)
    assert "keeps no path" in refused.output


COARSE = """
from bilevel_problems.quadratic import Quadratic
class Coarse(Quadratic):
    def upper_loss(self, x, y, batch):
        found = super().upper_loss(x, y, batch) + 30_000
        return found.float().to(found.dtype)
"""


def test_check_of_the_path_says_where_its_differences_are_rough(tmp_path: Path):
    (tmp_path / "coarse.py").write_text(COARSE)
    words = ("check", "quadratic", "--path", "--estimators", "unroll")
    text = invoke(*words, f"problem={tmp_path / 'coarse.py'}:Coarse").output
    assert re.search(r"^unroll .*\? .*\?", text, re.MULTILINE)
    assert re.search(r"change as their step is halved, x by \d+%", " ".join(text.split()))
    assert max(map(len, text.splitlines())) <= 80
    assert "?" not in invoke(*words).output  # negative control


def test_a_check_has_a_page(tmp_path: Path):
    if report.missing():
        pytest.skip("without the extra report")
    to = tmp_path / "check.html"
    result = invoke("check", "quadratic", "--estimators", "implicit,kkt", "-o", to, code=4)
    assert str(to) in result.output
    page = to.read_text()
    assert "bilevel check quadratic --estimators implicit,kkt" in page
    rows = table(page, "Result")
    assert (rows["implicit"][-1], rows["kkt"][-1]) == ("exact", "refused")


OWN = """
from bilevel_problems.ridge import Ridge
class Mine(Ridge):
    def lower_solution(self, x):
        w = super().lower_solution(x)["w"]
        return {}
"""


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ("{'w': w + 0.3}", "Mine.lower_solution is not a solution: ‖∇y G‖ = "),
        ("{'w': 1.1 * w}", "Mine.lower_solution is not a solution: ‖∇y G‖ = "),
        ("{'w': w[:, None]}", "Mine.lower_solution must return y as {'w': ("),
        ("{'y': w}", "Mine.lower_solution must return y as {'w': ("),
        ("{'w': w.numpy()}", "got {'w': a ndarray}"),
    ],
)
def test_a_closed_form_that_is_wrong_is_told_before_an_estimator_is(made, said, tmp_path: Path):
    (tmp_path / "own.py").write_text(OWN.replace("{}", made))
    problem = f"problem={tmp_path}/own.py:Mine"
    result = invoke("check", "ridge", problem, "--estimators", "implicit", code=2)
    assert said in " ".join(result.stderr.split())
    assert "wrong" not in result.output
