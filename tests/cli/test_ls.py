"""`ls`: what is registered."""

import re

from tests.cli.commands import invoke


def test_ls_lists_what_is_registered():
    text = invoke("ls").output
    for name in (
        "quadratic",
        "implicit",
        "newton",
        "cg",
        "adam",
        "jsonl",
        "hyper_cleaning",
        "soba",
    ):
        assert re.search(rf"[ ,]{name}[ ,\n]", text), name
    assert max(map(len, text.splitlines())) <= 80
    assert len(text.splitlines()) < 50
    assert "bilevel ls estimators" in text
    told = invoke("ls", "estimators").output
    assert re.search(r"^  implicit +∇x F", told, re.MULTILINE)
    single_loop = " ".join(
        re.search(r"^  single_loop((.*\n)+?)  \w", told, re.MULTILINE)[1].split()
    )
    assert single_loop.endswith("direction d_x."), "no half clause"
    assert max(map(len, told.splitlines())) <= 80
    only = invoke("ls", "linear").output
    assert "cg" in only
    assert "adam" not in only
    assert "Did you mean 'linear'" in invoke("ls", "liner", code=2).stderr
