"""The rooms of `bilevel/`, in what order they stand, and who imports whom, read from source.

A room is a folder of `bilevel/` or a file beside the folders. What an `__init__` offers lazily
(its block under TYPE_CHECKING) is no import; every other import is one, wherever it stands.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Set
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "bilevel"

FLOORS = [
    ["errors", "rng", "notebook", "scalars"],
    ["types", "components", "runfolder"],
    ["tree", "events", "registry"],
    ["ranks"],
    ["sharding"],
    ["calculus", "linear", "optimizers", "replay", "sinks"],
    ["preconditioners", "directions", "unrolling", "lower"],
    ["problem", "adjoint"],
    ["estimators", "functional"],
    ["run"],
    ["recipe", "testing"],
    ["comparing", "report"],
    ["sweeping"],
    ["studying"],
    ["cli"],
]
"""From the ground up: a room imports from floors below its own, and from no neighbour."""

Graph = Mapping[str, Set[str]]


def imported(source: str, *, lazily: bool = True) -> Iterator[str]:
    """Every name that is imported, "a.b.c" for `from a.b import c`, at whatever depth."""
    nodes: list[ast.AST] = [ast.parse(source)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.If) and not lazily and ast.unparse(node.test) == "TYPE_CHECKING":
            nodes += node.orelse
        else:
            nodes += ast.iter_child_nodes(node)


def module_of(path: Path, root: Path) -> str:
    """The dotted name of a file below `root`."""
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def files(package: Path = PACKAGE) -> dict[str, set[str]]:
    """Each module of a package, with the modules of it that are imported there.

    `from bilevel.run import engine` is an import of the file `engine`; `from bilevel.run import
    Setup` is one of the folder's `__init__`, where no file has that name.
    """
    sources = {module_of(path, package.parent): path for path in package.rglob("*.py")}
    graph = {}
    for module, path in sources.items():
        names = imported(path.read_text(encoding="utf-8"), lazily=path.name != "__init__.py")
        homes = {name if name in sources else name.rpartition(".")[0] for name in names}
        graph[module] = (homes & set(sources)) - {module}
    return graph


def room(module: str) -> str:
    """The room of a module; empty for the package itself, and its door `__main__`."""
    return (*module.removesuffix(".__main__").split("."), "")[1]


def rooms(graph: Graph) -> dict[str, set[str]]:
    """Each room with the other rooms that it imports from."""
    found: dict[str, set[str]] = {room(module): set() for module in graph if room(module)}
    for module, targets in graph.items():
        if here := room(module):
            found[here] |= {room(target) for target in targets} - {here, ""}
    return found


def circle(graph: Graph) -> list[str] | None:
    """Modules that import each other in a circle, or None where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def climbs(graph: Graph, floors: list[list[str]]) -> list[str]:
    """The arrows between rooms that do not lead down."""
    level = {name: height for height, floor in enumerate(floors) for name in floor}
    return [
        f"{here} imports {there}"
        for here, targets in graph.items()
        for there in sorted(targets)
        if level[there] >= level[here]
    ]
