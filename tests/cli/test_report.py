"""`report`: written again from a run's folder, or of many runs in one file."""

import pytest

from bilevel import report
from bilevel.cli.app import app
from tests.cli.commands import RUNNER, invoke, run
from tests.report.records import table, write


def test_a_report_is_written_again(runs):
    folder = run(runs)
    (folder / "report.html").unlink(missing_ok=True)
    result = RUNNER.invoke(app, ["report", "quadratic", "--runs-dir", str(runs)])
    if result.exit_code == 3:
        pytest.skip("without the extra report")
    assert result.output.strip() == str(folder / "report.html")
    page = (folder / "report.html").read_text()
    assert "<code>bilevel run quadratic upper.steps=4 evaluate.every=2" in page


@pytest.fixture
def many(tmp_path):
    if report.missing():
        pytest.skip("without the extra report")
    for name, seed in (("toy", 0), ("toy", 1), ("ridge", 0)):
        write(tmp_path, f"{name}/{seed}", [1.0], seed=seed, settings={"problem.rho": len(name)})
    return tmp_path


def test_a_page_of_many_runs(many):
    to = many / "many.html"
    assert invoke("report", "toy", "-o", to, "--runs-dir", many).output == f"{to}\n"
    assert table(to.read_text(), "Results")["toy"][0] == "2"
    invoke("report", "t*", "ridge", "-o", to, "--runs-dir", many)
    assert {key: cells[0] for key, cells in table(to.read_text(), "Results").items()} == {
        "arm": "seeds",
        "rho=3": "2",
        "rho=5": "1",
    }
    invoke("report", "-o", many, "--where", "seed=1", "--runs-dir", many)
    html = (many / "report.html").read_text()
    assert table(html, "Results")["toy"][0] == "1"
    assert f"bilevel report --where seed=1 --runs-dir {many} -o {many}" in html


def test_many_runs_need_a_file_and_a_file_needs_runs(many):
    for words in (["toy", "ridge"], [], ["toy", "--where", "seed=1"]):
        assert "name it with -o" in invoke("report", *words, "--runs-dir", many, code=2).stderr
    words = ("-o", many / "a.html", "--where", "seed=9", "--runs-dir", many)
    assert "no run in" in invoke("report", *words, code=2).stderr
    assert not (many / "a.html").exists()
