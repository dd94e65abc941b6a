"""`bilevel study`: cells run once, kept as JSON; tables, page and figures from these alone; resumed, shared, refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from bilevel.runfolder import RunFolder, arithmetic
from bilevel.studying.results import Book, StudyCell
from bilevel.studying.statistics import interval
from tests.cli.commands import invoke
from tests.studying import small

CELLS = 34
"""Of the regime easy: 4 + 4 + 2 + 4 + 2 to tune, 3 seeds of 6; and two arms at 3 seeds of the regime hard."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which the whole study was run; tests copy it or leave it as it is."""
    folder = tmp_path_factory.mktemp("study")
    small.lay(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = invoke("study", "small.yaml", "--workers", "0")
    (folder / "said.txt").write_text(result.output, "utf-8")
    return folder


@pytest.fixture
def there(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


def kept(place: Path) -> dict[str, dict]:
    """Every kept file by its path, without the seconds."""
    found = {}
    for path in sorted((place / "results").rglob("*.json")):
        found[str(path.relative_to(place))] = json.loads(path.read_text("utf-8")) | {"seconds": 0}
    return found


def test_every_cell_is_kept_and_no_run_is_left(there):
    found = kept(there)
    assert len(found) in (
        CELLS + 6,
        CELLS + 12,
    )  # by whether `mixed` is the baseline, with its stage
    assert {each["status"] for each in found.values()} == {"done"}
    assert list((there / "runs").rglob("events.jsonl")) == []
    said = (there / "said.txt").read_text("utf-8")
    assert "34 of 34 cells are there; upper value, smallest is best" in said
    assert re.search(r"implicit +ours .* (win|undecided|tie|loss) ", said)
    assert "rates" not in said.partition("easy: well")[2]  # a stage is in no table
    assert all(len(line) <= 100 for line in said.splitlines() if " left  " not in line)


def test_a_quiet_study_is_the_tables_of_what_is_there(there):
    quiet = invoke("study", "small.yaml", "--no-run", "-q").output
    whole = invoke("study", "small.yaml", "--no-run").output
    assert re.search(r"implicit +ours ", quiet)
    assert "the baseline named on development seeds" in whole
    assert "the baseline named on development seeds" not in quiet
    assert set(quiet.splitlines()) < set(whole.splitlines())


def test_a_quiet_study_without_a_cell_says_where_its_page_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small.lay(tmp_path)
    said = invoke("study", "small.yaml", "--no-run").output
    assert "0 of 34 cells are there" in said
    assert "no cells: ours and baseline, its arms, are not named yet" in said
    text = small.TEXT.replace("arms: [ours, baseline]", "arms: [again, mixed]")
    assert "no cells" not in invoke("study", str(small.lay(tmp_path, text)), "--no-run").output
    quiet = invoke("study", "small.yaml", "--no-run", "-q").output
    assert quiet.splitlines() == [line for line in quiet.splitlines() if Path(line).is_file()]


def test_the_numbers_are_those_of_the_cells(there):
    (easy, hard) = json.loads(invoke("study", "small.yaml", "--no-run", "--json").stdout)["regimes"]
    book = Book(there / "results")

    def values(arm, regime="easy"):
        cells = [book.get(StudyCell(regime, arm, "test", seed)) for seed in range(3)]
        return [cell.measures["upper value"] for cell in cells if cell]

    baseline = easy["named"]["baseline"]
    row = next(row for row in easy["rows"] if row["arm"] == "implicit")
    pairs = zip(values("implicit"), values(baseline), strict=True)
    expected = interval([one - other for one, other in pairs])
    assert row["against"] == {
        "mean": expected.mean,
        "low": expected.low,
        "high": expected.high,
        "n": 3,
    }
    assert row["value"]["mean"] == pytest.approx(sum(values("implicit")) / 3)
    means = {
        trial: sum(
            book.get(StudyCell("easy", "implicit", "tune", seed, trial)).measures["upper value"]  # type: ignore[union-attr]
            for seed in (100, 101)
        )
        / 2
        for trial in (0, 1)
    }
    assert row["tuned"]["mean"] == min(means.values())
    assert {each["arm"] for each in hard["rows"]} == {baseline, "implicit"}
    assert all(each["tuned"]["mean"] > 0 for each in hard["rows"])  # as tuned in the regime easy
    again = next(row for row in easy["rows"] if row["arm"] == "again")
    assert again["cost"]["gradients"] == 2 * row["cost"]["gradients"]  # with the stage before it
    assert again["cost"]["runs"] == 2


def test_the_page_and_its_figures_come_from_the_cells_alone(there):
    page, figure = there / "page.md", there / "page" / "differences.svg"
    text, drawn = page.read_text("utf-8"), figure.read_bytes()
    assert (there / "page" / "axis.svg").is_file()
    assert re.search(r"\*\*(In easy, `implicit` (is|can|differs)|Not yet)", text)
    assert "upper.optimizer.lr=" in text.partition("study:tuned")[2]
    page.write_text(re.sub(r"\d", "0", text), "utf-8")
    figure.unlink()
    invoke("study", "small.yaml", "--no-run")
    assert page.read_text("utf-8") == text
    assert figure.read_bytes() == drawn


def test_what_is_there_is_not_run_again_and_what_is_missing_comes_out_the_same(there):
    before = kept(there)
    times = {p: p.stat().st_mtime_ns for p in (there / "results").rglob("*.json")}
    invoke("study", "small.yaml", "--workers", "0")
    assert times == {p: p.stat().st_mtime_ns for p in (there / "results").rglob("*.json")}
    gone = there / "results" / "easy" / "again" / "test-seed1.json"
    gone.unlink()
    invoke("study", "small.yaml", "--regime", "hard", "--workers", "0")
    assert not gone.is_file()  # control: it was not asked for
    invoke("study", "small.yaml", "--arm", "again", "--seeds", "1", "--workers", "0")
    assert kept(there) == before
    now = {p: p.stat().st_mtime_ns for p in (there / "results").rglob("*.json")}
    assert {p for p in now if now[p] != times[p]} == {gone}


def test_a_cell_that_another_process_is_at_is_left_to_it(there):
    gone = there / "results" / "easy" / "direct" / "test-seed0.json"
    gone.unlink()
    place = there / "runs" / "small-study" / "easy" / "direct" / "test-seed0"
    with RunFolder(place).lock():
        result = invoke("study", "small.yaml", "--workers", "0")
        assert "running in another process: 1" in result.output
        assert not gone.is_file()
    invoke("study", "small.yaml", "--workers", "0")
    assert gone.is_file()


def test_cells_run_in_processes_of_their_own(there):
    before = kept(there)
    for seed in (0, 1):
        (there / "results" / "easy" / "direct" / f"test-seed{seed}.json").unlink()
    result = invoke("study", "small.yaml", "--workers", "2")
    assert "easy/direct/test-seed1: " in result.output
    assert kept(there) == before


def test_cells_of_other_settings_are_refused_and_run_again_where_that_is_asked(
    place, tmp_path, monkeypatch
):
    shutil.copytree(place, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    text = Path("small.yaml").read_text("utf-8")
    other = text.replace(
        "settings: {estimator: alternating}\n    vary", "settings: {estimator: one_step}\n    vary"
    )
    assert other != text
    Path("small.yaml").write_text(other, "utf-8")
    result = invoke("study", "small.yaml", "--workers", "0", code=2)
    assert re.search(r"direct/t\S+json: was run with other settings .*one_step", result.stderr)
    assert "--again altered" in result.stderr
    before = kept(Path())
    invoke("study", "small.yaml", "--workers", "0", "--regime", "easy", "--again", "altered")
    after = kept(Path())
    changed = {name.split("/")[2] for name in after if after[name] != before.get(name)}
    assert changed == {"direct"}


def test_a_cell_says_what_it_was_computed_with_and_others_are_warned_of(
    place, tmp_path, monkeypatch
):
    (here,) = {each["arithmetic"] for each in kept(place).values()}
    assert here == arithmetic.here()
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    one = Book(tmp_path / "results").path(StudyCell("easy", "implicit", "test", 1))
    text = one.read_text("utf-8")
    again = ("study", "small.yaml", "--workers", "0", "--regime", "easy")

    one.unlink()
    assert "computed with" not in invoke(*again).stderr  # control: all were computed here
    assert f"digest of what they come to: {here} (" in (tmp_path / "page.md").read_text("utf-8")
    assert "not all computed alike" not in (tmp_path / "page.md").read_text("utf-8")

    one.write_text(text.replace(here, "AVX3, 1 thread, 0"), "utf-8")
    Book(tmp_path / "results").path(StudyCell("easy", "implicit", "test", 2)).unlink()
    result = invoke(*again)
    assert (
        f"computes with {here}, and cells that are there were computed with AVX3" in result.stderr
    )
    page = (tmp_path / "page.md").read_text("utf-8")
    assert "AVX3, 1 thread, 0 (1 cells)" in page
    assert "**Seeds whose cells were not all computed alike**: easy 1." in page


def test_a_study_that_asks_for_other_instructions_is_refused_before_anything_runs(
    tmp_path, monkeypatch
):
    small.lay(tmp_path, small.TEXT + "arithmetic: {instructions: avx2}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(arithmetic.NAMED, "none yet")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    result = invoke("study", "small.yaml", "--workers", "0", code=3)
    assert "AVX2 is asked for, and torch computes with DEFAULT" in result.stderr
    assert not (tmp_path / "results").exists()
    assert invoke("study", "small.yaml", "--no-run").exit_code == 0  # what is there can be shown


def test_a_run_that_fails_is_a_cell_that_failed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = small.TEXT.partition("  rates:")[0].replace("arms: [ours, baseline], ", "")
    text = text.replace("=0.1,0.5", "=0.1,1e300").replace("upper.steps: 2", "upper.steps: 8")
    small.lay(tmp_path, text)
    result = invoke("study", "small.yaml", "--regime", "easy", "--workers", "0", code=6)
    assert "easy/direct/tune-trial01-seed100: failed: " in result.output
    book = Book(tmp_path / "results")
    failed = book.get(StudyCell("easy", "direct", "tune", 100, 1))
    assert failed is not None
    assert failed.reason
    assert Path("runs/small-study/easy/direct/tune-trial01-seed100").is_dir()
    done = book.get(StudyCell("easy", "direct", "test", 0))
    assert done is not None  # the other setting was taken
    assert "upper.optimizer.lr=0.1" in done.assignments
    times = {p: p.stat().st_mtime_ns for p in Path("results").rglob("*.json")}
    invoke("study", "small.yaml", "--regime", "easy", "--workers", "0", "--again", "failed", code=6)
    now = {p: p.stat().st_mtime_ns for p in Path("results").rglob("*.json")}
    assert {p.name for p in now if now[p] != times[p]} == {
        "tune-trial01-seed100.json",
        "tune-trial01-seed101.json",
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--regime", "esay"], "--regime 'esay': unknown regime. Did you mean 'easy'?"),
        (["--arm", "direkt"], "--arm 'direkt': unknown arm. Did you mean 'direct'?"),
        (["--phase", "tuning"], "--phase 'tuning': unknown phase"),
        (["--seeds", "0,7"], "--seeds 7: is no seed of small.yaml"),
        (["--again", "all"], "--again 'all': unknown choice"),
    ],
)
def test_what_is_asked_for_and_is_not_there_is_refused(there, words, said):
    assert said in invoke("study", "small.yaml", *words, code=2).stderr


def test_a_page_without_markers_is_not_touched(there):
    page = there / "page.md"
    text = page.read_text("utf-8")
    page.write_text("# Mine\n", "utf-8")
    result = invoke("study", "small.yaml", "--no-run", code=2)
    assert (
        "page.md: has no place for the results; write one of <!-- study:answer -->" in result.stderr
    )
    assert page.read_text("utf-8") == "# Mine\n"
    page.write_text(text, "utf-8")


def test_settings_that_make_no_recipe_are_said_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small.lay(
        tmp_path,
        small.TEXT.replace("estimator: implicit}\n    vary", "estimator: implicitt}\n    vary"),
    )
    result = invoke("study", "small.yaml", code=2)
    assert re.search(r"small.yaml: easy, implicit: .*'implicitt'.*'implicit'", result.stderr)
    assert not Path("results").exists()
