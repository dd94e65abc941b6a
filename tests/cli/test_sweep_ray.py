"""`sweep --engine ray` on a Ray of this machine: equal to a sweep without it, and as robust."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from bilevel.errors import RequirementError
from bilevel.runfolder import checkpoint, record
from bilevel.sweeping import figure
from bilevel.sweeping import ray as engine
from tests.cli.commands import SHORT, invoke

pytest.importorskip("optuna")
# of what Ray does itself
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

LR = "upper.optimizer.lr=0.01,0.1,0.5"
FAST = (*SHORT, "evaluate.held=false", "sinks=[jsonl]")


@pytest.fixture(scope="module")
def address():
    ray = pytest.importorskip("ray", reason="needs ray: pip install 'bilevel[ray]'")
    root = str(Path(__file__).parents[2])
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": root}},
    )
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    monkeypatch.setattr(figure, "draw", lambda *_: [])


def sweep(runs: Path, *words: object, code: int = 0):
    return invoke("sweep", "quadratic", *FAST, *words, "--runs-dir", runs, code=code)


def trials(runs: Path) -> list[dict]:
    content = json.loads((runs / "quadratic-sweep" / "sweep.json").read_text())
    return content["trials"]


def told(runs: Path) -> list[tuple]:
    return [(t["number"], t["values"], t["value"], t["status"]) for t in trials(runs)]


def test_a_sweep_on_ray_is_the_sweep_without_it(address, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    sweep(here, LR, "--workers", 0)
    sweep(there, LR, "--workers", 2, "--engine", "ray", "--ray-address", address)
    assert told(there) == told(here)
    assert {status for *_, status in told(there)} == {"done"}
    assert len({value for _, _, value, _ in told(there)}) == 3  # negative control: they differ


def test_a_trial_that_fails_costs_itself(address, tmp_path):
    words = ("lower.optimizer.lr=0.01,1e200", "--engine", "ray", "--ray-address", address)
    sweep(tmp_path, *words, code=6)
    assert [t["status"] for t in trials(tmp_path)] == ["done", "failed"]
    assert "step 1" in trials(tmp_path)[1]["reason"]


def test_a_task_that_is_stopped_saves_its_state(address, tmp_path, monkeypatch):
    class Watched(engine.Task):
        def ended(self):
            found = list(tmp_path.glob("quadratic-sweep/trial-*/events.jsonl"))
            if any('"stepped"' in path.read_text() for path in found):
                raise KeyboardInterrupt
            return super().ended()

    monkeypatch.setattr(engine, "Task", Watched)
    words = ("upper.optimizer.lr=0.01,0.1", "upper.steps=100000", "sinks=[jsonl]", "report=false")
    place = ("--runs-dir", tmp_path, "--engine", "ray", "--ray-address", address)
    invoke("sweep", "quadratic", *words, "checkpoint.every=0", *place, code=130)
    (folder,) = tmp_path.glob("quadratic-sweep/trial-0000*")
    last = record.last(folder) or {}
    found = checkpoint.latest(folder / "checkpoints")
    assert found is not None
    assert (last["event"], last["reason"], last["step"]) == ("finished", "interrupted", found.step)
    assert not list(tmp_path.glob("quadratic-sweep/trials/*/result.json"))  # it goes on later


def test_without_a_cluster_it_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "find_spec", lambda name: object())
    monkeypatch.delenv(engine.ADDRESS, raising=False)
    assert "--engine ray needs a cluster" in sweep(tmp_path, LR, "--engine", "ray", code=2).stderr
    said = sweep(tmp_path, LR, "--engine", "rey", code=2).stderr
    assert "--engine 'rey': unknown choice. Did you mean 'ray'?" in said

    def init(**given):
        raise ConnectionError("Could not find any running Ray instance.\nmore")

    monkeypatch.setattr(engine, "import_module", lambda name: SimpleNamespace(init=init))
    with pytest.raises(
        RequirementError, match=r"no Ray cluster at auto: Could not find any .*instance\.$"
    ):
        engine.starter("auto", print, 1, "cpu")


def test_without_the_extra_it_says_which(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "find_spec", lambda name: None)
    said = sweep(tmp_path, LR, "--engine", "ray", code=3).stderr
    assert "pip install 'bilevel[ray]'" in said


@pytest.mark.parametrize(
    ("device", "cluster", "gpus"),
    [("auto", {"GPU": 2.0}, 1), ("cpu", {"GPU": 2.0}, 0), ("auto", {"CPU": 8.0}, 0)],
)
def test_a_trial_asks_for_a_gpu_where_it_may_use_one(device, cluster, gpus):
    assert engine.resources(3, device, cluster) == {"num_cpus": 3, "num_gpus": gpus}
