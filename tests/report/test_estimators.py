"""The pages of `compare` and `check` hold what the documents do."""

import json
import re

import pytest

pytest.importorskip("altair")
pytest.importorskip("vl_convert")

import altair

from bilevel import report
from bilevel.errors import CheckpointError
from bilevel.report.estimators import check_page, compare_page
from tests.report.documents import checked, compared
from tests.report.records import PIXEL, table


def specs(html: str) -> list:
    found = re.search(r"const specs = (\[.*\]);\n", html)
    return json.loads(found[1]) if found else []


def test_a_comparison_has_medians_with_the_lowest_and_the_highest(tmp_path):
    html = compare_page(compared(), tmp_path / "none.png")
    rows = table(html, "Result")
    assert rows["estimator"] == ["rank", "err at y*", "ms", "MB", "grad/HVP/cross", "F at end"]
    assert rows["implicit* ✓"] == ["1", "2.0e-15", "13.6 9 to 14.5", "1.2", "2/10/1", "36.2"]
    assert "13.6<br><small>9 to 14.5</small>" in html
    assert rows["<kkt>"][0] == "failed"
    assert "2 seeds; reference: closed form" in html
    assert "<strong>&lt;kkt&gt;</strong>: seeds 0, 1: has none" in html
    for said in ("‖dΦ/dx‖ falls", "needs lower_start", "bilevel compare toy --seeds 0,1"):
        assert said in html
    assert "on one batch a level: with minibatches a number of that batch, noise included" in html
    assert html.index("‖dΦ/dx‖ falls") > html.index("2.0e-15")


def test_each_column_has_its_meaning(tmp_path):
    for html in (compare_page(compared(), tmp_path / "none.png"), check_page(checked())):
        (heads,) = (row for name, row in table(html, "Result").items() if name == "estimator")
        said = html[html.index("What each column means") :]
        for head in heads:
            assert f'<th scope="row">{head}</th>' in said


def test_the_figure_of_a_comparison_is_in_it(tmp_path):
    (tmp_path / "error-cost.png").write_bytes(PIXEL)
    assert "data:image/png;base64,iVBORw0KGgo" in compare_page(
        compared(), tmp_path / "error-cost.png"
    )
    assert "data:image/png" not in compare_page(compared(), tmp_path / "none.png")


def test_errors_are_drawn_and_one_of_zero_too(tmp_path):
    (spec,) = specs(compare_page(compared(), tmp_path / "none.png"))
    altair.Chart.from_dict(spec)
    drawn = [(row["name"], row["kind"], row["is"], row["error"]) for row in spec["data"]["values"]]
    assert drawn == [
        ("implicit", "at y*", 5e-15, 5e-15),
        ("implicit", "in run", 0.02, 0.02),
    ]
    document = compared()
    document["cells"][0]["along"][1]["error"] = 0.0
    (spec,) = specs(compare_page(document, tmp_path / "none.png"))
    assert (spec["data"]["values"][0]["is"], spec["data"]["values"][0]["error"]) == (0.0, 1e-16)


def test_a_check_has_its_verdicts_and_notes():
    html = check_page(checked())
    rows = table(html, "Result")
    assert rows["implicit"] == ["solution", "1.0e-15", "2.5e-02", "1.000", "10", "exact"]
    assert rows["mine"] == ["–", "–", "–", "–", "10", "wrong"]
    assert '<span class="bad">wrong</span>' in html
    assert "its sign is wrong" in html
    (spec,) = specs(html)
    assert {row["kind"] for row in spec["data"]["values"]} == {"claim err", "err vs dΦ/dx"}


def test_agreement_with_the_path_has_a_column_a_variable():
    whole = {"cosine": 0.5, "ratio": 2.0, "error": 0.3}
    rows = [
        {
            "name": "unroll",
            "agreements": {"w": {"cosine": 1.0, "ratio": 1.0, "error": 1e-6}},
            "whole": whole,
            "note": "",
        },
        {"name": "kkt", "agreements": {}, "whole": None, "note": "cannot"},
    ]
    html = check_page(checked() | {"rows": rows})
    assert table(html, "Result") == {
        "estimator": ["w", "all"],
        "unroll": ["1.00 × 1", "0.50 × 2?"],
        "kkt": ["–", "–"],
    }
    assert not specs(html)


@pytest.mark.parametrize("text", ["{torn", "[]", "{}", '{"rows": 3}'])
def test_a_damaged_comparison_is_one_error(text, tmp_path):
    (tmp_path / "compare.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"compare\.json: cannot be read"):
        report.write_comparison(tmp_path)
    assert not (tmp_path / "compare.html").exists()


def test_a_comparison_is_written_beside_its_numbers(tmp_path):
    (tmp_path / "compare.json").write_text(json.dumps(compared()))
    assert report.write_comparison(tmp_path) == tmp_path / "compare.html"
    assert "13.6" in (tmp_path / "compare.html").read_text()
