"""`cp`: a recipe to start from."""

from pathlib import Path

import pytest

from bilevel.cli.names import shipped
from tests.cli.commands import SHORT, invoke


def test_cp_copies_and_never_overwrites(tmp_path: Path):
    assert "bilevel run" in invoke("cp", "ridge", tmp_path).output
    copied = tmp_path / "ridge.yaml"
    schema = shipped()["ridge"].with_name("recipe.schema.json")
    here, there = copied.read_text(), shipped()["ridge"].read_text()
    assert here == there.replace("$schema=recipe.schema.json", f"$schema={schema}") != there
    copied.write_text("mine")
    assert "is there already" in invoke("cp", "ridge", copied, code=2).stderr
    assert copied.read_text() == "mine"
    invoke("cp", "ridge", tmp_path / "other")
    assert (tmp_path / "other.yaml").is_file()
    assert "no such folder" in invoke("cp", "ridge", tmp_path / "a" / "b.yaml", code=2).stderr


def test_paths_of_the_home_folder_that_a_shell_has_left(tmp_path: Path, monkeypatch):
    """As in --runs-dir=~/runs; a folder that is called ~ is a danger to the one that it is not."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    invoke("cp", "quadratic", "~/mine.yaml")
    assert f"{tmp_path}/mine.yaml: valid" in invoke("validate", "~/mine.yaml").output
    invoke("run", "~/mine.yaml", *SHORT, "--runs-dir=~/runs")
    assert {path.name for path in tmp_path.iterdir()} == {"mine.yaml", "runs"}


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["quadratic", "/dev/null"], 2, "error: /dev/null: is there already"),
        ([".", "c.yaml"], 2, "error: '.': unknown recipe"),
        (["..", "c.yaml"], 2, "error: '..': unknown recipe"),
        (["", "c.yaml"], 2, "error: '': unknown recipe"),
        ([300 * "a", "c.yaml"], 2, "unknown recipe"),
        ([f"{300 * 'a'}.yaml", "c.yaml"], 2, "there is no such file"),
        (["quadratic", 300 * "a"], 1, "cannot be written: File name too long; make room"),
    ],
)
def test_odd_names_are_one_message(words, code, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = invoke("cp", *words, code=code).stderr
    assert said in message
    assert len(message.splitlines()) == 1
    assert not list(tmp_path.iterdir())
