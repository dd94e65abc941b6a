"""The rooms and their doors: imports go one way, and the command line starts without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = [
    ["errors", "components"],
    ["types"],
    ["tree", "rng", "events"],
    ["registry"],
    ["calculus"],
    ["optimizers", "linear"],
    ["unrolling"],
    ["problem"],
    ["preconditioners", "adjoint", "lower", "directions"],
    ["estimators"],
    ["functional"],
    ["run"],
    ["runfolder"],
    ["sinks"],
    ["recipe"],
    ["testing"],
    ["report"],
    ["comparing"],
    ["cli"],
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


FOLDERS = ["directions", "estimators", "linear", "lower", "optimizers", "preconditioners"]
FOLDERS += ["problem", "run", "sinks"]
"""They offer the classes that live in them, imported when used."""

FILES = sorted((ROOT / "bilevel").rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    room = path.relative_to(ROOT / "bilevel").parts[0].removesuffix(".py")
    if room == "__init__":
        return
    assert room in LEVEL, f"{room} has no place in ORDER"
    for name in imports(path):
        parts = name.split(".")
        assert parts[0] != "bilevel_problems", f"{path.name} imports a problem"
        if parts[0] != "bilevel" or len(parts) < 2 or parts[1] not in LEVEL:
            continue
        assert LEVEL[parts[1]] <= LEVEL[room], f"{room} imports {name}"


def test_estimators_never_import_each_other():
    for path in (ROOT / "bilevel" / "estimators").glob("[!_]*.py"):
        assert not [n for n in imports(path) if n.startswith("bilevel.estimators")]


def test_linear_solvers_know_no_losses():
    for path in (ROOT / "bilevel" / "linear").glob("*.py"):
        found = {n.split(".")[1] for n in imports(path) if n.startswith("bilevel.")}
        assert found <= {"tree", "types", "errors", "rng", "components", "linear", "registry"}


def test_only_the_command_line_and_the_console_import_rich():
    for path in FILES:
        room = path.relative_to(ROOT / "bilevel")
        if room.parts[0] == "cli" or room == Path("sinks/console.py"):
            continue
        assert not [n for n in imports(path) if n.split(".")[0] == "rich"], room


def test_sinks_see_events_alone():
    for path in (ROOT / "bilevel" / "sinks").glob("*.py"):
        rooms = {n.split(".")[1] for n in imports(path) if n.startswith("bilevel.")}
        assert not rooms & {"run", "problem", "estimators", "linear", "lower", "calculus"}


@pytest.mark.parametrize(
    "command",
    [
        "import bilevel",
        "from bilevel import " + ", ".join(FOLDERS) + "; [dir(folder) for folder in (linear, run)]",
        "from bilevel.cli import main; import sys; sys.argv = ['bilevel', '--help']; main()",
        "from bilevel.cli import main; import sys; sys.argv = ['bilevel', 'ls']; main()",
    ],
    ids=["import", "import of components' folders", "--help", "ls"],
)
def test_torch_is_not_imported_before_it_is_needed(command):
    code = f"""
import atexit, sys
atexit.register(lambda: print("torch" in sys.modules, file=sys.stderr))
{command}
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr.strip().endswith("False")


def test_the_public_names():
    import bilevel

    assert sorted(bilevel.__all__) == [
        "BilevelError",
        "__version__",
        "component",
        "hypergradient",
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
