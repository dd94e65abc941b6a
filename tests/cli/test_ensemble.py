"""`run` and `resume` of a recipe with `seeds`: a folder a seed, means, failures, Ctrl-C."""

import json
import math
import re

import pytest

from bilevel import recipe as recipes
from bilevel.cli import ensemble
from bilevel.runfolder import record
from tests.cli.commands import SHORT, invoke, run

FAST = (*SHORT, "sinks=[jsonl]", "evaluate.held=false")


def begin(runs, *overrides, code=0):
    words = ["run", "quadratic", *FAST, *overrides, "--runs-dir", runs]
    return invoke(*words, code=code)


def events(folder):
    """The record but for the times in it."""
    text = (folder / record.FILE).read_text()
    return re.sub(r'"seconds": [^,}]+', "", text)


def test_each_seed_has_a_run_like_any_other_and_the_table_their_mean(runs):
    result = begin(runs, "seeds=3..4")
    (whole,) = (path.parent for path in runs.glob("*/*/ensemble.yaml"))
    folders = [whole.with_name(f"{whole.name}-seed{seed}") for seed in (3, 4)]
    assert set(whole.parent.iterdir()) == {whole, *folders}
    losses = []
    for seed, folder in zip((3, 4), folders, strict=True):
        alone = run(runs, *FAST, f"seed={seed}")
        assert events(folder) == events(alone)
        assert recipes.load(folder / "resolved.yaml") == recipes.load(alone / "resolved.yaml")
        about = json.loads((folder / "environment.json").read_text())
        assert about["command"][-1] == f"seed={seed}"
        assert not [word for word in about["command"] if word.startswith("seeds=")]
        stepped = [event for event in record.read(folder) if event["event"] == "stepped"]
        losses.append(stepped[-1]["upper_loss"])
    middle = sum(losses) / 2
    half = 12.706204736 * abs(losses[0] - losses[1]) / 2  # t of one degree: s/√2 = |a − b| / 2
    found = ensemble.means([ensemble.RunFolder(folder) for folder in folders])
    assert found["upper loss F"]["after"].mean == pytest.approx(middle, rel=1e-12)
    assert found["upper loss F"]["after"].half == pytest.approx(half, rel=1e-9)
    assert found["upper value"]["before"].n == 2
    assert "quadratic, 2 of 2 seeds; mean ± 95 % interval" in result.output
    assert re.search(r"upper value +\d+ ± \d+", result.output)


def test_what_was_stopped_goes_on_and_what_is_done_stands(runs):
    begin(runs, "seeds=0..2")
    (whole,) = (path.parent for path in runs.glob("*/*/ensemble.yaml"))
    folders = [whole.with_name(f"{whole.name}-seed{seed}") for seed in range(3)]
    whole_records = [events(folder) for folder in folders]
    # as if killed after step 2 of the second seed: of it a checkpoint is left, and no third
    path = folders[1] / record.FILE
    lines = path.read_text().splitlines(keepends=True)
    cut = next(n for n, line in enumerate(lines) if '"step": 3' in line)
    path.write_text("".join(lines[:cut]))
    for step in folders[1].glob("checkpoints/step-00000004"):
        for each in step.iterdir():
            each.unlink()
        step.rmdir()
    for each in sorted(folders[2].rglob("*"), reverse=True):
        each.unlink() if each.is_file() else each.rmdir()
    stood = (folders[0] / record.FILE).stat().st_mtime_ns
    result = invoke("resume", whole)
    assert [events(folder) for folder in folders] == whole_records
    assert (folders[0] / record.FILE).stat().st_mtime_ns == stood
    assert f"{folders[0]}/ is done" in result.output
    assert "3 of 3 seeds" in result.output
    by_name = invoke("resume", "quadratic", "--runs-dir", runs)  # the newest of the name
    assert "3 of 3 seeds" in by_name.output


def test_a_seed_that_fails_costs_itself_and_the_exit_code_is_6(runs, tmp_path):
    (tmp_path / "some.py").write_text(
        "from bilevel_problems.quadratic import Quadratic\n"
        "class Some(Quadratic):\n"
        "    def init(self, streams):\n"
        "        x, y = super().init(streams)\n"
        "        if float(next(iter(y.values())).flatten()[0]) < 0:\n"
        "            raise ValueError('this start')\n"
        "        return x, y\n"
    )
    words = (f"problem={{name: '{tmp_path / 'some.py'}:Some'}}", "seeds=0..3")
    result = begin(runs, *words, code=6)
    failed = re.findall(r"seed (\d): Some.init failed: ValueError: this start", result.stderr)
    assert 0 < len(failed) < 4
    assert f"{len(failed)} of 4 seeds failed" in result.stderr
    assert len(list(runs.glob("*/*-seed*"))) == 4 - len(failed)
    assert f"{4 - len(failed)} of 4 seeds; mean" in result.output
    (whole,) = (path.parent for path in runs.glob("*/*/ensemble.yaml"))
    again = invoke("resume", whole, code=6).stderr
    assert re.findall(r"seed (\d): Some.init failed", again) == failed


def test_machines_read_the_means(runs):
    result = begin(runs, "seeds=0..1", "--json")
    answer = json.loads(result.stdout.splitlines()[-1])
    assert [each["status"] for each in answer["runs"]] == ["done", "done"]
    measured = answer["ensemble"]["measures"]["upper value"]["after"]
    ends = [each["measures"]["upper value"] for each in answer["runs"]]
    assert math.isclose(measured["mean"], sum(ends) / 2, rel_tol=1e-12)
    assert (measured["n"], answer["ensemble"]["failed"]) == (2, {})


def test_an_ensemble_that_was_changed_does_not_go_on(runs):
    begin(runs, "seeds=0..1")
    (path,) = runs.glob("*/*/ensemble.yaml")
    path.write_text(path.read_text().replace("lr: 0.1", "lr: 0.2"))
    result = invoke("resume", path.parent, code=2)
    assert "upper.optimizer.lr is 0.1 there and 0.2 here" in result.stderr


def test_a_dry_run_of_an_ensemble_writes_nothing(runs):
    text = begin(runs, "seeds=0..4", "--dry-run").output
    assert recipes.loads(text).seeds == (0, 1, 2, 3, 4)
    assert not runs.exists()
