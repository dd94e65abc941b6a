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
