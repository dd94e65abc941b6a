"""The house: imports go one way, what must start fast does, and the tests have the same folders."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.imports import FLOORS, PACKAGE, ROOT, circle, climbs, files, imported, rooms

FOLDERS = ["directions", "estimators", "linear", "lower", "optimizers", "preconditioners"]
FOLDERS += ["problem", "run", "sinks"]
"""They offer the classes that live in them, imported when used."""

FILES = sorted(PACKAGE.rglob("*.py"))
TESTS = ROOT / "tests"


def imports(path):
    return list(imported(path.read_text(encoding="utf-8")))


def folders(root):
    """The folders of Python below a folder, as relative paths."""
    found = {path.parent.relative_to(root) for path in root.rglob("*.py")}
    return {str(folder) for folder in found} - {"."}


# the order of rooms


def test_every_room_has_its_floor():
    assert sorted(name for floor in FLOORS for name in floor) == sorted(rooms(files()))


def test_imports_go_one_way():
    assert climbs(rooms(files()), FLOORS) == []


def test_no_files_import_each_other_in_a_circle():
    assert circle(files()) is None


def test_an_arrow_upwards_a_neighbour_and_a_circle_are_found(tmp_path):
    package = tmp_path / "bilevel"
    for name, text in {
        "__init__": "if TYPE_CHECKING:\n    from bilevel.high.one import f",  # offered lazily
        "low/__init__": "",
        "low/one": "def f():\n    from bilevel.low import two",
        "low/two": "from bilevel.low.one import f",
        "side": "from bilevel.low import one",
        "high/__init__": "if TYPE_CHECKING:\n    from bilevel.high.one import f",
        "high/one": "import bilevel.low.two\nfrom bilevel.high import f",
    }.items():
        path = package / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    graph = files(package)
    assert graph["bilevel.high.one"] == {"bilevel.low.two", "bilevel.high"}
    assert set(circle(graph) or ()) == {"bilevel.low.one", "bilevel.low.two"}
    arrows = rooms(graph)
    assert arrows == {"low": set(), "side": {"low"}, "high": {"low"}}
    assert climbs(arrows, [["low"], ["side", "high"]]) == []
    assert climbs(arrows, [["low", "side"], ["high"]]) == ["side imports low"]
    assert climbs(arrows, [["high"], ["low"], ["side"]]) == ["high imports low"]


def test_nothing_imports_a_problem():
    for path in FILES:
        assert not [n for n in imports(path) if n.split(".")[0] == "bilevel_problems"], path


def test_estimators_never_import_each_other():
    for path in (PACKAGE / "estimators").glob("[!_]*.py"):
        assert not [n for n in imports(path) if n.startswith("bilevel.estimators")]


def test_linear_solvers_know_no_losses():
    for path in (PACKAGE / "linear").glob("*.py"):
        found = {n.split(".")[1] for n in imports(path) if n.startswith("bilevel.")}
        assert found <= {
            "tree",
            "types",
            "errors",
            "rng",
            "components",
            "linear",
            "registry",
            "scalars",
        }


SHOWING = ("sinks/console.py", "sinks/panel.py", "sinks/progress.py")


def test_only_the_command_line_and_what_shows_a_run_import_rich():
    for path in FILES:
        room = path.relative_to(PACKAGE)
        if room.parts[0] == "cli" or room.as_posix() in SHOWING:
            continue
        assert not [n for n in imports(path) if n.split(".")[0] == "rich"], room


def test_sinks_see_events_alone():
    for path in (PACKAGE / "sinks").glob("*.py"):
        rooms = {n.split(".")[1] for n in imports(path) if n.startswith("bilevel.")}
        assert not rooms & {"run", "problem", "estimators", "linear", "lower", "calculus"}


def imports_torch(code, *arguments, module="torch"):
    """Whether torch is there once a process has run this code; it must end well."""
    told = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print({module!r} in sys.modules, file=sys.stderr))\n"
    )
    command = [sys.executable, "-c", told + code, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return {"True": True, "False": False}[result.stderr.strip().splitlines()[-1]]


@pytest.mark.parametrize(
    "code",
    [
        "import bilevel",
        "import bilevel.registry",
        "import bilevel.recipe",
        "import bilevel.runfolder",
        "from bilevel import " + ", ".join(FOLDERS) + "; [dir(folder) for folder in (linear, run)]",
    ],
)
def test_torch_is_not_imported_at_package_level(code):
    assert not imports_torch(code)


@pytest.mark.parametrize(
    ("code", "compiles"),
    [
        ("import bilevel; bilevel.minimize('quadratic', steps=1, progress=False)", False),
        ("import torch; torch.compile(torch.sin, backend='eager')(torch.ones(1))", True),
    ],
)
def test_torch_is_there_without_its_compiler(code, compiles):
    """Which takes as long to import as torch itself, and no step needs it."""
    assert imports_torch(code, module="torch._dynamo") is compiles


@pytest.mark.parametrize("command", ["--help", "ls", "runs"])
def test_what_only_looks_imports_no_torch(command, tmp_path):
    at = ["--runs-dir", tmp_path] if command == "runs" else []
    assert not imports_torch("from bilevel.cli import main; main()", command, *at)


@pytest.mark.parametrize("code", ["import bilevel.functional", "import bilevel; bilevel.unroll"])
def test_and_where_it_is_needed_it_is_seen(code):
    assert imports_torch(code)


# how large the house is, and what its doors say


def test_at_most_ten_files_stand_beside_the_folders():
    doors = {"__main__.py"}  # `python -m bilevel`, which has one line
    assert len({path.name for path in PACKAGE.glob("*.py")} - doors) <= 10


DENIAL = re.compile(r"\b(no|none|nothing|not|never|nobody|only|alone)\b", re.IGNORECASE)


def map_of(text):
    """What is wrong with the docstring of an `__init__` as a map of its folder."""
    lines = (ast.get_docstring(ast.parse(text)) or "").splitlines()
    if not 3 <= len(lines) <= 12:
        return f"{len(lines)} lines; expected 3 to 12 that say what lives there and what may not"
    if not any(DENIAL.search(line) for line in lines):
        return "does not say what may not live there"
    return None


@pytest.mark.parametrize("folder", sorted(folders(PACKAGE)))
def test_each_folder_says_what_lives_there_and_what_may_not(folder):
    assert map_of((PACKAGE / folder / "__init__.py").read_text(encoding="utf-8")) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "0 lines"),
        ('"""Sinks."""', "1 lines"),
        ('"""Sinks.\n\nEverything that takes events.\n"""', "does not say"),
        ('"""Sinks.\n\nThey take events and nothing else.\n"""', None),
    ],
)
def test_a_map_that_says_too_little_is_told(text, said):
    assert said in map_of(text) if said else map_of(text) is None


# one class name, one meaning

SAME_IN_EACH = {"Nystrom"}
"""Registered under one name in two groups: a linear solver and a preconditioner of one method."""


def repeated(texts):
    """The class names that are defined in more than one place, by the files' texts."""
    found = [
        node.name
        for text in texts
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ClassDef)
    ]
    return {name for name in found if found.count(name) > 1}


def test_a_class_name_has_one_meaning():
    assert repeated(path.read_text("utf-8") for path in FILES) == SAME_IN_EACH


def test_a_class_name_of_two_meanings_is_found():
    assert repeated(["class Found: ...", "def f():\n    class Found: ...", "class A: ..."]) == {
        "Found"
    }


# the tests have the same rooms

BESIDE = {"benchmarks", "benchmarks/peers", "gpu", "mutation", "packaging", "third_party"}
"""Tests of no single folder: what is measured, what needs a device, who tests the tests, a release, a
package of somebody else."""


def strangers(tests, package, problems):
    """(folders of tests that mirror nothing, folders of the package that have no tests)"""
    mirrored = package | {"problems"} | {f"problems/{folder}" for folder in problems}
    return tests - mirrored - BESIDE, package - tests


def test_the_tests_mirror_the_package():
    problems = folders(ROOT / "problems")
    assert strangers(folders(TESTS), folders(PACKAGE), problems) == (set(), set())


def test_a_folder_without_a_counterpart_is_found():
    found = strangers({"linear", "solvers", "gpu", "problems"}, {"linear", "run"}, {"hft"})
    assert found == ({"solvers"}, {"run"})


def unfit(path, text):
    """What is wrong with a file of tests, or None."""
    if path.stem.endswith("_more"):
        return "is named for nothing"
    if len(text.splitlines()) > 600:
        return "is longer than 600 lines"
    if [n for n in imported(text) if n.startswith("tests.") and ".test_" in n]:
        return "imports from a file of tests; what both need belongs in a module beside them"
    return None


def test_files_of_tests_are_short_and_share_nothing_but_helpers():
    found = {str(path): unfit(path, path.read_text("utf-8")) for path in TESTS.rglob("*.py")}
    assert len(found) > 100
    assert {path: why for path, why in found.items() if why} == {}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("test_linear_more.py", "", "named"),
        ("test_linear.py", "\n" * 601, "longer"),
        ("test_linear.py", "\n" * 600, None),
        ("test_linear.py", "from tests.run.test_engine import setup", "imports"),
        ("test_linear.py", "from tests.run.setups import setup", None),
    ],
)
def test_a_file_of_tests_that_is_unfit_is_found(name, text, said):
    found = unfit(Path(name), text)
    assert said in found if said else found is None


# what is seen from outside


def test_the_public_names():
    import bilevel

    assert sorted(bilevel.__all__) == [
        "BilevelError",
        "__version__",
        "component",
        "hypergradient",
        "iterate",
        "minimize",
        "solve_lower",
        "unroll",
    ]
    assert all(getattr(bilevel, name) is not None for name in bilevel.__all__)


def test_the_repository_speaks_of_the_project_alone():
    words = ["/" + "work/", "/" + "tmp/", "pypi" + ".org", "files.python" + "hosted"]
    kinds = {".py", ".md", ".toml", ".yaml", ".txt", ".j2", ""}
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    for name in tracked:
        path = ROOT / name
        if path.suffix in kinds and path.is_file():
            text = path.read_text(errors="ignore")
            assert not [w for w in words if w in text], name


def test_every_folder_is_in_the_wheel():
    """What the list leaves out is there in a checkout and missing where it is installed."""
    settings = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text("utf-8"))["tool"]
    listed = settings["setuptools"]["packages"]
    there = {
        ".".join(path.parent.relative_to(PACKAGE.parent).parts)
        for path in PACKAGE.rglob("__init__.py")
        if "templates" not in path.parts
    }
    assert {name for name in listed if name.partition(".")[0] == "bilevel"} == there
