"""`cp`: a recipe to start from."""

from pathlib import Path

from bilevel.cli.names import shipped
from tests.cli.commands import invoke


def test_cp_copies_and_never_overwrites(tmp_path: Path):
    assert "bilevel run" in invoke("cp", "ridge", tmp_path).output
    copied = tmp_path / "ridge.yaml"
    assert copied.read_bytes() == shipped()["ridge"].read_bytes()
    copied.write_text("mine")
    assert "is there already" in invoke("cp", "ridge", copied, code=2).stderr
    assert copied.read_text() == "mine"
    invoke("cp", "ridge", tmp_path / "other")
    assert (tmp_path / "other.yaml").is_file()
    assert "no such folder" in invoke("cp", "ridge", tmp_path / "a" / "b.yaml", code=2).stderr
