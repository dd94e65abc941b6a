"""The report: one offline file that holds the numbers of the record."""

import json
import random
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("altair")
pytest.importorskip("vl_convert")

from bilevel import recipe as recipes
from bilevel import report, runfolder
from bilevel.errors import RecipeError, RequirementError
from bilevel.events import Evaluated, Finished, Held, Sent
from bilevel.report.charts import charts
from bilevel.report.history import POINTS, read
from bilevel.report.page import _seconds, _size
from bilevel.sinks.jsonl import JSONLines
from tests.sinks.events import EVENTS, STARTED, stepped, with_evidence

PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c489"
    "0000000a49444154789c6300010000050001"
)


@pytest.fixture
def run(tmp_path: Path) -> runfolder.RunFolder:
    text = "problem: quadratic\nname: <toy> # </script>\n".replace("<toy>", "toy")
    recipe = recipes.loads(text)
    folder = runfolder.create(
        tmp_path,
        recipe.name,
        recipe.hash,
        text=text,
        resolved=recipe.dump(),
        overrides=["seed=0"],
        environment=runfolder.environment(),
    )
    receiver = JSONLines().open(folder.path, None)
    for event in EVENTS:
        receiver.receive(event)
    receiver.close()
    folder.figures.mkdir()
    (folder.figures / "gap.png").write_bytes(PIXEL)
    return folder


class References(HTMLParser):
    """Whatever a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "poster") and value:
                self.found.append(value)


def fetched(html: str) -> list[str]:
    parser = References()
    parser.feed(html)
    return [reference for reference in parser.found if not reference.startswith("data:")]


def row(name: str, *cells: str) -> str:
    """A row of a table of numbers."""
    written = "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<th scope="row" class="text">{name}</th>{written}'


def test_it_is_one_file_that_fetches_nothing(run):
    html = report.write(run).read_text()
    assert fetched(html) == []
    assert "vegaEmbed(" in html
    assert fetched('<script src="https://a/b.js"></script>') == ["https://a/b.js"]


def test_it_holds_the_numbers_of_the_record(run):
    html = report.write(run).read_text()
    assert "done, 6 of 6 upper steps" in html
    assert row("accuracy", "0.5", "1", "+0.5") in html
    assert "1,234,567 lower" in html
    assert "Step 2: negative" in html
    assert "data:image/png;base64,iVBORw0KGgo" in html
    assert "quadratic (num_upper 5, num_lower 10" in html
    found = re.search(r"const specs = (\[.*\]);\n", html)
    assert found is not None
    specs = json.loads(found[1])
    values = next(iter(specs[0]["datasets"].values())) if "datasets" in specs[0] else None
    values = values or specs[0]["data"]["values"]
    assert [row["step"] for row in values] == [1, 3, 4, 5, 6]  # step 2 was NaN
    assert html.count('<div id="chart') == len(specs)


def test_what_is_owed_to_x_is_told_where_the_control_was_measured(run):
    receiver = JSONLines().open(run.path, 6)
    for event in (Held(6, {"accuracy": 0.875}), EVENTS[-1]):
        receiver.receive(event)
    receiver.close()
    html = report.write(run).read_text()
    titles = ["before", "x held", "after", "change", "owed to x"]
    assert "".join(f'<th scope="col">{title}</th>' for title in titles) in html
    assert row("accuracy", "0.5", "0.875", "1", "+0.5", "+0.125") in html
    assert row("gap", "–", "–", "2", "–", "–") in html  # it was NaN before the first step


@pytest.mark.parametrize("reason", ["interrupted", "terminated", "diverged", "failed", None])
@pytest.mark.parametrize(
    ("measured", "steps", "title", "cells"),
    [
        ((0, 2), 3, "at step 2", ("0", "20", "+20")),
        ((2,), 3, "at step 2", ("–", "20", "–")),
        ((0,), 3, "after", ("0", "–", "–")),
        ((0, 2), 2, "after", ("0", "20", "+20")),
    ],
)
def test_no_measure_is_of_a_step_at_which_it_was_not_taken(
    measured, steps, title, cells, reason, run
):
    receiver = JSONLines().open(run.path, None)
    receiver.receive(STARTED)
    for step in range(steps + 1):
        if step:
            receiver.receive(stepped(step))
        if step in measured:
            receiver.receive(Evaluated(step, {"gap": 10 * step}))
    if reason:
        receiver.receive(Finished(steps, reason, 1.0))
    receiver.close()
    html = report.write(run).read_text()
    titles = ["before", title, "change"]
    assert "".join(f'<th scope="col">{each}</th>' for each in titles) in html
    assert row("gap", *cells) in html


@pytest.mark.parametrize(
    ("reason", "shown"),
    [
        ("diverged", '<p class="failure">F is NaN</p>'),
        ("failed", '<p class="failure">F is NaN</p>'),
        ("stopped early", "stopped early, 6 of 6 upper steps: F is NaN"),
    ],
)
def test_why_a_run_ended_is_said_and_a_failure_stands_out(reason, shown, run):
    receiver = JSONLines().open(run.path, 6)
    receiver.receive(Finished(6, reason, 1.0, message="F is NaN"))
    receiver.close()
    html = report.write(run).read_text()
    assert shown in html
    assert html.count("F is NaN") == 1
    assert ('class="failure"' in html) is (reason != "stopped early")


def test_warnings_come_after_the_result_and_before_the_curves(run):
    html = report.write(run).read_text()
    places = [html.index(part) for part in (">Result<", "Step 2: negative", ">The run<")]
    assert places == sorted(places)


def test_the_command_is_that_which_made_the_run_or_one_that_repeats_it(run):
    assert f"<code>bilevel run {run.resolved}</code>" in report.write(run).read_text()
    path = run.path / "environment.json"
    about = json.loads(path.read_text()) | {"command": ["bilevel", "run", "toy", "a=[1, 2]"]}
    path.write_text(json.dumps(about))
    assert "<code>bilevel run toy &#39;a=[1, 2]&#39;</code>" in report.write(run).read_text()


def test_figures_that_are_large_are_made_smaller(run):
    image = pytest.importorskip("PIL.Image")
    noise = image.frombytes("RGB", (900, 700), random.Random(0).randbytes(3 * 900 * 700))
    for n in range(3):
        noise.save(run.figures / f"noise{n}.png")
    (run.figures / "torn.png").write_bytes(b"\x89PNG" + bytes(2_000_000))
    path = report.write(run)
    assert sum(figure.stat().st_size for figure in run.figures.iterdir()) > 7_000_000
    assert path.stat().st_size < 3_000_000
    html = path.read_text()
    assert html.count("data:image/webp;base64,") == 3
    assert "left out for its size: figures/torn.png" in html
    assert "data:image/png;base64,iVBORw0KGgo" in html  # the small one as it is


def test_an_unfinished_run_has_a_report_too(run):
    path = run.path / "events.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:5]))
    assert "not finished, 2 of 6 upper steps" in report.write(run).read_text()


def test_a_run_without_record_is_refused(run):
    (run.path / "events.jsonl").unlink()
    with pytest.raises(RecipeError, match="nothing is recorded"):
        report.write(run)
    assert not run.report.exists()


def test_without_the_extra_it_says_how_to_install_it(run, monkeypatch):
    monkeypatch.setattr(report, "NEEDED", ("altair", "no_such_package"))
    with pytest.raises(RequirementError, match=r"needs no_such_package: pip install 'bilevel\[rep"):
        report.write(run)


@pytest.mark.parametrize("steps", [0, 1, POINTS, POINTS + 1, 3 * POINTS])
def test_curves_are_thinned_and_end_where_the_run_did(steps, tmp_path: Path):
    receiver = JSONLines().open(tmp_path, None)
    receiver.receive(STARTED)
    for step in range(1, steps + 1):
        receiver.receive(stepped(step, float(step)))
    receiver.close()
    curve = read(tmp_path).curve("upper_loss")
    assert len(curve) <= POINTS + 1
    assert len(curve) >= min(steps, POINTS / 2)
    if steps:
        assert (curve[0], curve[-1]) == ((1, 1.0), (steps, float(steps)))


def test_the_error_is_said_to_be_a_bound_or_an_estimate(tmp_path: Path):
    for name, sources, said in (
        ("bound", ["known constants"], ["≤ a bound (from: known constants)"]),
        (
            "ritz",
            ["Ritz values"],
            ["~ an estimate, which the error may exceed (from: Ritz values)"],
        ),
        ("both", ["known constants", "estimated"], ["≤ a bound", "~ an estimate"]),
    ):
        (tmp_path / name).mkdir()
        receiver = JSONLines().open(tmp_path / name, None)
        receiver.receive(STARTED)
        for step, source in enumerate(sources, 1):
            receiver.receive(with_evidence(step, error_bound=0.1, error_bound_from=source))
        receiver.close()
        (chart,) = [c for c in charts(read(tmp_path / name)) if c.title.startswith("Error of")]
        assert all(part in chart.note for part in said)
        assert ("≤" in chart.note, "~" in chart.note) == ("≤" in str(said), "~" in str(said))


def test_the_report_counts_each_kind_of_call(run):
    assert "6 gradients, 6 HVPs, 6 cross products" in report.write(run).read_text()


def test_what_ranks_sent_stands_where_there_were_several(run):
    assert "Sent by each rank" not in report.write(run).read_text()
    receiver = JSONLines().open(run.path, None)
    receiver.receive(STARTED)
    for step, size in enumerate((9_000_000, 1000, 2000), 1):
        receiver.receive(replace(stepped(step), sent=Sent(20 + step, size)))
    receiver.receive(replace(stepped(4), sent=None))  # resumed on one rank
    receiver.close()
    html = report.write(run).read_text()
    assert "66 sums of 9 MB; 22 sums of 2 kB a step, in the median" in html
    (chart,) = [c for c in charts(read(run.path)) if c.title == "Sent by each rank"]
    (values,) = chart.spec["data"].values()
    assert [(row["step"], row["value"]) for row in values] == [(1, 9.0), (2, 0.001), (3, 0.002)]
    several = report.write_many([run], run.path / "several.html", title="t", made_by="m")
    assert "MB sent by each rank" in several.read_text()


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (312, "312 B"),
        (999.4, "999 B"),
        (999.6, "1 kB"),
        (53_120, "53.1 kB"),
        (3.2e6, "3.2 MB"),
        (1.234e12, "1.23 TB"),
    ],
)
def test_sizes_are_read_in_units_of_a_thousand(count, text):
    assert _size(count) == text


def test_curvature_is_drawn_with_a_line_at_zero_where_it_matters(tmp_path: Path):
    pytest.importorskip("altair")
    for name, values, rules in (("up", (1.0, 2.0), 0), ("bent", (1.0, -0.5), 1)):
        (tmp_path / name).mkdir()
        receiver = JSONLines().open(tmp_path / name, None)
        receiver.receive(STARTED)
        for step, value in enumerate(values, 1):
            receiver.receive(with_evidence(step, curvature=value))
        receiver.close()
        (chart,) = [c for c in charts(read(tmp_path / name)) if c.title.startswith("Curvature")]
        assert json.dumps(chart.spec).count('"rule"') == rules
        assert all(f'"value": {value}' in json.dumps(chart.spec) for value in values)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.00042, "0.42 ms"),
        (0.42, "420 ms"),
        (0.99949, "999 ms"),
        (0.9996, "1 s"),
        (1.51, "1.51 s"),
        (999.4, "999 s"),
        (999.6, "1,000 s"),
        (12345.6, "12,346 s"),
    ],
)
def test_times_are_read_without_powers_of_ten(seconds, text):
    assert _seconds(seconds) == text
