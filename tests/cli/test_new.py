"""`new`: what it writes runs and passes as it is."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from bilevel.runfolder import files
from tests.cli.commands import invoke


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A folder in which `new` has written a problem and an estimator, as if its modules were found."""
    invoke("new", "problem", "prices", "--to", tmp_path)
    invoke("new", "estimator", "own_solve", "--to", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("prices", "own_solve"):
        sys.modules.pop(name, None)


def module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def named_tests(path: Path) -> dict[str, object]:
    return {name: part for name, part in vars(module(path)).items() if name.startswith("test_")}


@pytest.mark.parametrize(("name", "number"), [("prices", 2), ("own_solve", 2)])
def test_its_tests_pass_as_they_are(written, name, number):
    found = named_tests(written / f"test_{name}.py")
    assert len(found) == number
    for test in found.values():
        test()


@pytest.mark.parametrize(
    ("name", "right", "wrong", "failing"),
    [
        ("prices", 'batch["A"] @ y["w"]', 'batch["A"] @ y["w"].detach()', "contract"),
        ("own_solve", "tree.sub(F_x", "tree.axpy(1.0, F_x", "claim"),
    ],
)
def test_its_tests_can_fail(written, name, right, wrong, failing):
    source = written / f"{name}.py"
    assert source.read_text().count(right) == 1
    source.write_text(source.read_text().replace(right, wrong))
    found = named_tests(written / f"test_{name}.py")
    (test,) = (test for key, test in found.items() if failing in key)
    with pytest.raises(Exception, match=r"\w"):
        test()


@pytest.mark.parametrize("name", ["prices", "own_solve"])
def test_its_recipe_runs(written, name):
    shown = invoke(
        "run",
        written / f"{name}.yaml",
        "upper.steps=2",
        "report=false",
        "--runs-dir",
        written / "runs",
    )
    assert "done at step 2" in shown.stdout


def test_every_file_is_under_forty_lines_and_says_what_to_do_next(written, tmp_path):
    invoke("new", "package", "both", "--to", tmp_path)
    made = [path for path in written.rglob("*") if path.suffix in (".py", ".yaml", ".toml")]
    assert len(made) == 6 + 8
    for path in made:
        assert len(path.read_text().splitlines()) < 40, path
        assert "$" not in path.read_text().replace("$schema=", ""), path
    said = invoke("new", "problem", "third", "--to", tmp_path).stdout
    assert f"bilevel run {tmp_path}/third.yaml" in said
    assert f"pytest {tmp_path}/test_third.py" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("probem", "a"), "Did you mean 'problem'?"),
        (("problem", "My-Problem"), "must be lower-case letters"),
        (("problem", "../a"), "must be lower-case letters"),
        (("problem", "class"), "no word of Python"),
        (("problem", "torch"), "a module of that name is installed"),
        (("estimator", "json"), "a module of that name is installed"),
        (("problem", "a", "--to", "nowhere"), "nowhere: there is no such folder"),
    ],
)
def test_a_bad_name_is_refused(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in invoke("new", *words, code=2).stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("kind", "there"), [("problem", "test_a.py"), ("package", "a")])
def test_what_is_there_is_not_written_over(kind, there, tmp_path):
    (tmp_path / there).write_text("own_solve")
    assert f"{there}: is there already" in invoke("new", kind, "a", "--to", tmp_path, code=2).stderr
    assert [path.name for path in tmp_path.iterdir()] == [there]
    assert (tmp_path / there).read_text() == "own_solve"


@pytest.mark.parametrize("kind", ["problem", "package"])
def test_all_is_written_or_nothing(kind, tmp_path, monkeypatch):
    write, calls = files.write_text, []

    def fill(path, text, **options):
        calls.append(path)
        if len(calls) == 3:
            raise files.CheckpointError(f"{path}: cannot be written")
        write(path, text, **options)

    monkeypatch.setattr(files, "write_text", fill)
    invoke("new", kind, "a", "--to", tmp_path, code=1)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    invoke("new", kind, "a", "--to", tmp_path)  # negative control
