"""The page of many runs holds the numbers of their records."""

import csv
import io
import json
import re

import pytest

pytest.importorskip("altair")
pytest.importorskip("vl_convert")

import altair
from jsonschema import ValidationError

from bilevel import report
from bilevel.report.arms import select
from bilevel.report.curves import MOST_ARMS, pairs
from bilevel.report.seeds import mean
from bilevel.report.several import render
from tests.report.records import PIXEL, table, write


@pytest.fixture
def folders(tmp_path):
    """Two arms: implicit at three seeds, unroll at one."""
    found = [
        write(
            tmp_path,
            f"toy/{seed}",
            [4.0, 2.0, 1.0 + seed],
            seed=seed,
            measures={"accuracy": (0.1, 0.5 + 0.1 * seed)},
            held={"accuracy": 0.4},
            warned="raise the iterations" if seed else "",
        )
        for seed in range(3)
    ]
    other = write(tmp_path, "toy/9", [4.0, 3.0], estimator="unroll", calls=25, end="diverged")
    return [*found, other]


def page(folders) -> str:
    return render(folders, "toy", "bilevel report toy -o <toy>.html")


def values(html: str, title: str, axis: int) -> list[dict[str, float]]:
    """The points of a chart: those over steps (0) or over calls (1)."""
    titles = re.findall(r'<div class="steps">\s*<figure><figcaption>(.*?) <span>', html)
    found = re.search(r"const specs = (\[.*\]);\n", html)
    assert found is not None
    spec = json.loads(found[1])[2 * titles.index(title) + axis]
    return [
        {key: float(value) for key, value in row.items()}
        for row in csv.DictReader(io.StringIO(spec["data"]["values"]))
    ]


def test_the_specifications_are_vega_lite(folders):
    found = [spec for pair in pairs(select(folders).arms) for spec in (pair.steps, pair.calls)]
    assert len(found) == 8  # F, G, norm and accuracy
    for each in found:
        altair.Chart.from_dict(each)
    spec = found[0]
    spec["layer"][1]["mark"]["type"] = "no such mark"  # which a check of nothing would let pass
    with pytest.raises(ValidationError):
        altair.Chart.from_dict(spec)


def test_measures_of_an_earlier_step_are_left_out_of_the_means(folders):
    path = folders[2].path / "events.jsonl"
    last = '"event": "evaluated", "step": 3'
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if last not in line and "held" not in line))
    cells = table(page(folders), "Results")["estimator=implicit"]
    half = mean([0.5, 0.6]).half
    assert half is not None
    assert cells[1] == f"0.55 ± {half:.2f} (of 2)"
    assert cells[4] == "2.0 ± 2.5"


def test_the_results_are_means_with_intervals(folders):
    rows = table(page(folders), "Results")
    assert rows["arm"] == [
        "seeds",
        "accuracy",
        "accuracy, x held",
        "accuracy, owed to x",
        "upper loss F",
        "lower loss G",
    ]
    half = mean([0.5, 0.6, 0.7]).half
    assert half == pytest.approx(0.2484, abs=1e-4)
    assert rows["estimator=implicit"] == [
        "3",
        "0.60 ± 0.25",
        "0.4 ± 0",
        "0.20 ± 0.25",
        "2.0 ± 2.5",
        "1.0 ± 1.2",
    ]
    assert rows["estimator=unroll"] == ["1, 1 diverged", "–", "–", "–", "3", "1.5"]


def test_what_it_took(folders):
    rows = table(page(folders), "What it took")
    assert rows["arm"][:3] == ["seeds", "upper steps", "oracle calls"]
    assert rows["estimator=implicit"][:3] == ["3", "3 ± 0", "30 ± 0"]
    assert rows["estimator=unroll"][1:3] == ["2", "50"]


def test_what_differs_is_a_table_and_what_follows_from_it_another(folders):
    html = page(folders)
    assert table(html, "What differs") == {
        "arm": ["estimator.name"],
        "estimator=implicit": ["implicit"],
        "estimator=unroll": ["unroll"],
    }
    rows = table(html, "Options")
    assert rows["setting"] == ["estimator=implicit", "estimator=unroll"]
    assert rows["estimator.damping"] == ["0.0", "–"]
    assert rows["estimator.memory"] == ["–", "store"]
    assert not [key for key in rows if not key.startswith("estimator.") and key != "setting"]


def test_options_have_a_column_for_each_name_not_for_each_arm(folders, tmp_path):
    settings = {"upper.optimizer.lr": 0.5}
    folders.append(write(tmp_path, "toy/lr", [1.0], estimator="unroll", settings=settings))
    html = page(folders)
    assert table(html, "Options")["setting"] == ["estimator=implicit", "estimator=unroll"]
    assert table(html, "What differs")["lr=0.5 estimator=unroll"] == ["0.5", "unroll"]


def test_many_settings_stand_below_each_other(tmp_path):
    keys = ["upper.optimizer.lr", "upper.optimizer.eps", "upper.steps", "lower.steps", "seed"]
    keys += ["problem.num_upper", "problem.num_lower", "problem.rho", "lower.optimizer.lr"]
    keys += ["lower.tolerance"]
    folders = [write(tmp_path, f"toy/{n}", [1.0], settings=dict.fromkeys(keys, n)) for n in (1, 2)]
    rows = table(page(folders), "What differs")
    assert len(rows["setting"]) == 2
    assert rows["problem.rho"] == ["1", "2"]
    assert "seed" not in rows


def test_a_setting_alone_is_a_column(tmp_path):
    folders = [
        write(tmp_path, f"toy/{lr}", [1.0], settings={"upper.optimizer.lr": lr})
        for lr in (0.1, 0.2)
    ]
    rows = table(page(folders), "What differs")
    assert rows == {"arm": ["upper.optimizer.lr"], "lr=0.1": ["0.1"], "lr=0.2": ["0.2"]}


def test_curves_are_means_over_seeds_over_steps_and_over_calls(folders):
    html = page(folders)
    steps = values(html, "Upper loss F", 0)
    assert [(row["arm"], row["x"], row["mean"]) for row in steps] == [
        (0, 1, 4.0),
        (0, 2, 2.0),
        (0, 3, 2.0),
        (1, 1, 4.0),
        (1, 2, 3.0),
    ]
    assert steps[2]["high"] - steps[2]["mean"] == pytest.approx(2.4841, abs=1e-4)
    assert steps[2]["n"] == 3
    assert steps[3]["low"] == steps[3]["high"] == 4.0  # one seed has no band
    calls = values(html, "Upper loss F", 1)
    assert [row["x"] for row in calls] == [10, 20, 30, 25, 50]
    measured = values(html, "accuracy", 1)
    assert [(row["x"], row["mean"]) for row in measured] == [(0, 0.1), (30, 0.6)]


def test_a_curve_ends_where_the_shortest_run_of_its_arm_does(tmp_path):
    folders = [write(tmp_path, f"toy/{n}", [2.0] * n, seed=n) for n in (2, 5)]
    for folder in folders:  # one recipe that was stopped early
        folder.resolved.write_text(
            re.sub(r"(?m)^  steps: \d+$", "  steps: 5", folder.resolved.read_text())
        )
    html = page(folders)
    assert [row["x"] for row in values(html, "Upper loss F", 0)] == [1, 2]
    assert "until step 2, where its shortest run ends; the longest has 5" in html


def test_warnings_come_after_the_results_once_an_arm(folders):
    html = page(folders)
    assert html.count("raise the iterations") == 1
    assert html.index("raise the iterations") > html.index("0.60 ± 0.25")
    assert "In 2 of 3 runs." in html


def test_figures_stand_side_by_side(folders):
    for folder in folders[1:]:
        folder.figures.mkdir()
        (folder.figures / "gap.png").write_bytes(PIXEL)
    html = page(folders)
    assert html.count("data:image/png;base64,iVBORw0KGgo") == 2  # one an arm
    assert 'alt="gap: estimator=implicit, seed 1"' in html
    assert 'alt="gap: estimator=unroll, seed 0"' in html


def test_figures_that_have_no_place_are_counted_and_named(folders, monkeypatch):
    for folder in folders[1:]:
        folder.figures.mkdir()
        for name in ("gap", "path"):
            (folder.figures / f"{name}.png").write_bytes(PIXEL)
    assert "have no place" not in page(folders)  # negative control
    monkeypatch.setattr("bilevel.report.several.MOST_FIGURES", 3)
    html = page(folders)
    assert html.count("data:image/png;base64,iVBORw0KGgo") == 3
    assert "1 more figures have no place on this page; they are in figures/ of their runs" in html
    assert "<p>path (estimator=unroll, seed 0)</p>" in html


def test_the_commands_can_be_copied(folders):
    html = page(folders)
    assert "<code>bilevel report toy -o &lt;toy&gt;.html</code>" in html
    assert html.count('class="copy"') == 1 + len(folders)


def test_many_arms_are_in_the_tables_and_the_best_are_drawn(tmp_path):
    folders = [
        write(tmp_path, f"toy/{n:02}", [float(n + 1)], settings={"upper.optimizer.lr": n + 1.0})
        for n in range(MOST_ARMS + 3)
    ]
    html = page(folders)
    assert len(table(html, "Results")) == 1 + MOST_ARMS + 3
    drawn = {row["arm"] for row in values(html, "Upper loss F", 0)}
    assert len(drawn) == MOST_ARMS
    assert "3 more arms are in the tables alone" in html
    assert f'"name": "lr={MOST_ARMS + 1.0}"' not in html
    assert f'"name": "lr={float(MOST_ARMS)}"' in html


def test_a_damaged_run_is_told_and_the_others_stand(folders):
    (folders[0].path / "events.jsonl").write_text("{torn\n")
    html = page(folders)
    assert f"{folders[0].path}: left out: " in html
    assert table(html, "Results")["estimator=implicit"][0] == "2"
    for folder in folders[1:]:
        (folder.path / "events.jsonl").unlink()
    assert "nothing is recorded" in page(folders)


def test_a_long_page_stays_below_three_megabytes(tmp_path):
    names = {f"measure {n}": (0.123456789, 1 / 3) for n in range(12)}
    folders = [
        write(tmp_path, f"toy/{n}", [1 / (n + 1)] * 400, settings={"seed": n}, measures=names)
        for n in range(2)
    ]
    path = report.write_many(folders, tmp_path / "many.html", title="toy", made_by="bilevel")
    assert path.stat().st_size < 3_000_000


def test_losses_without_measure_are_drawn_and_told(tmp_path):
    """Of runs that diverge: the largest numbers there are, zero, and what is not finite."""
    huge = [1e308, 1.7e308, float("inf"), float("nan")]
    folders = [write(tmp_path, f"toy/{n}", huge, seed=n, end="diverged") for n in range(3)]
    folders.append(write(tmp_path, "toy/0s", [0.0, -1e308], estimator="unroll"))
    html = page(folders)
    rows = table(html, "Results")
    assert rows["estimator=implicit"] == ["3, 3 diverged", "1.7e+308 ± 0", "8.5e+307 ± 0"]
    assert rows["estimator=unroll"] == ["1", "-1e+308", "-5e+307"]
    drawn = values(html, "Upper loss F", 0)
    assert [(row["arm"], row["x"]) for row in drawn] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert drawn[1]["mean"] == 1.7e308
