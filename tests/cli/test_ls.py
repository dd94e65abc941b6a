"""`ls`: what is registered."""

import json
import re

from bilevel.cli.names import summary
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


def test_recipes_are_told_in_whole_sentences(tmp_path):
    told = json.loads(invoke("ls", "recipes", "--json").stdout)["kinds"]["recipes"]
    for each in told:
        assert each["summary"].endswith("."), each
    lines = invoke("ls", "recipes").output.splitlines()
    assert max(map(len, lines)) <= 80
    assert "ImageNet weights." in " ".join(" ".join(lines).split())
    path = tmp_path / "mine.yaml"
    path.write_text("# Half of a\n# sentence. Another one.\nversion: 1\n# not this\n")
    assert summary(path) == "Half of a sentence."
    path.write_text("version: 1\n")
    assert summary(path) == ""
