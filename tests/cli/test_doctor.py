"""`doctor`: what is wrong with an installation."""

import re

from tests.cli.commands import invoke


def test_the_doctor_finds_this_installation_sound():
    text = invoke("doctor").output
    assert "All that is needed is there." in text
    assert re.search(r"ok +hypergradient", text)


def test_the_doctor_says_what_is_wrong(monkeypatch):
    monkeypatch.setattr("bilevel.cli.doctor._quadratic_error", lambda: 1e-3)
    result = invoke("doctor", code=4)
    assert re.search(r"no +hypergradient", result.output)


def test_the_doctor_says_which_second_derivatives_of_torch_are_wrong(monkeypatch):
    """Not an error: what uses them is refused where a method needs their second derivative."""
    for error, said in (
        (1.3, r"-- +torch\._weight_norm .*wrong in this torch"),
        (1e-9, r"ok +torch"),
    ):
        monkeypatch.setattr("bilevel.cli.doctor.error_of", lambda name, error=error: error)
        assert re.search(said, " ".join(invoke("doctor").output.split()))
