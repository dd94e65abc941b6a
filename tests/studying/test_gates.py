"""Gate 1 of the flagship's study: the page has what gates.json holds, and no arm of ours is below."""

import pytest

from bilevel.studying import file as files
from docs import study_gates as gates
from docs.pages import put


@pytest.fixture(scope="module")
def content():
    return files.read(gates.STUDY).content


def test_the_page_has_the_gates_figures():
    text, found = gates.PAGE.read_text("utf-8"), gates.read()
    assert put(text, "gates", gates.part(found)) == text
    changed = [{**row, "cosine": row["cosine"] / 2} for row in found]
    assert put(text, "gates", gates.part(changed)) != text  # negative control
    computed = {(row["estimator"], row["steps"]) for row in found}
    assert computed == {(name, n) for name in gates.ESTIMATORS for n in gates.STEPS}


def test_what_is_missing_is_said():
    found = [row for row in gates.read() if row["steps"] == 5]
    assert gates.verdict(found).endswith("- not yet computed: 10, 40 lower steps\n")
    assert "- `unroll`: 0.8 or more at 5\n" in gates.verdict(found)
    assert "- `one_step`: 0.8 or more nowhere\n" in gates.verdict(found)


def test_no_arm_of_ours_is_below_the_gate(content):
    found = gates.read()
    assert gates.refused(found, content) == []
    worse = [
        {**row, "cosine": 0.79} if row["estimator"] == "unroll" and row["steps"] == 5 else row
        for row in found
    ]
    # negative controls: the path below the gate, also as the stage of an arm that is retrained; an arm let in again
    assert gates.refused(worse, content) == ["online", "learned", "scalars", "kinds"]
    arms = dict(content.arms)
    one_step = arms["one_step"]
    arms["one_step"] = type(one_step)(**{**vars(one_step), "group": "ours"})
    assert gates.refused(found, type(content)(**{**vars(content), "arms": arms})) == ["one_step"]
