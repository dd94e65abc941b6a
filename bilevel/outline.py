"""What a component says about itself, read from its source with `ast`: nothing is imported.

Importing a component imports torch, which takes seconds; a listing should answer at once.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path


@dataclass(frozen=True)
class Option:
    """One option of a component: as written in its source."""

    name: str
    type: str
    default: str | None
    """None where there is no default: the option is needed."""
    doc: str
    slot: str | None = None
    """The group whose components the option holds."""


@dataclass(frozen=True)
class Outline:
    """A component's docstring, the docstring of its module, and its options."""

    doc: str
    module_doc: str
    options: tuple[Option, ...]


def summary_of(reference: str) -> str:
    """The first line of the docstring of `module:Class`; empty where there is none."""
    outline = outline_of(reference)
    return outline.doc.partition("\n")[0] if outline else ""


def outline_of(reference: str) -> Outline | None:
    """The outline of `module:Class`, or None where its source cannot be found."""
    module, _, name = reference.partition(":")
    path = source_of(module)
    if path is None:
        return None
    tree = _parse(path)
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return Outline(
                doc=ast.get_docstring(node) or "",
                module_doc=ast.get_docstring(tree) or "",
                options=tuple(_options(node)),
            )
    return None


def source_of(module: str) -> Path | None:
    """The source file of a module, found without importing its parents."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    full = top
    for part in rest:
        spec = _child(spec, full := f"{full}.{part}")
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    return Path(spec.origin)


def _child(parent: ModuleSpec | None, full: str) -> ModuleSpec | None:
    if parent is None or parent.submodule_search_locations is None:
        return None
    return PathFinder.find_spec(full, list(parent.submodule_search_locations))


@functools.cache
def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _options(node: ast.ClassDef) -> list[Option]:
    options = []
    for index, statement in enumerate(node.body):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        written = ast.unparse(statement.annotation)
        name = statement.target.id
        if name.startswith("_") or written.startswith("ClassVar"):
            continue
        kind, slot = _kind(statement.annotation)
        options.append(
            Option(name, kind, _default(statement.value), _doc(node.body, index + 1), slot)
        )
    return options


def _kind(annotation: ast.expr) -> tuple[str, str | None]:
    """The type without `Annotated[…]`, and the group of a `Slot("group")` inside it."""
    slot = None
    for part in ast.walk(annotation):
        if isinstance(part, ast.Call) and ast.unparse(part.func).endswith("Slot") and part.args:
            slot = ast.literal_eval(part.args[0])
    return ast.unparse(_Unannotate().visit(annotation)), slot


class _Unannotate(ast.NodeTransformer):
    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        self.generic_visit(node)
        annotated = ast.unparse(node.value).endswith("Annotated")
        if annotated and isinstance(node.slice, ast.Tuple):
            return node.slice.elts[0]
        return node


def _default(value: ast.expr | None) -> str | None:
    if value is None:
        return None
    if isinstance(value, ast.Call) and ast.unparse(value.func) in ("Field", "field"):
        given = {keyword.arg: keyword.value for keyword in value.keywords}
        if "default_factory" in given:
            return f"{ast.unparse(given['default_factory'])}()"
        if "default" in given:
            return ast.unparse(given["default"])
        return ast.unparse(value.args[0]) if value.args else None
    return ast.unparse(value)


def _doc(body: list[ast.stmt], index: int) -> str:
    """The string that stands right after a field, which is its documentation."""
    if index < len(body):
        after = body[index]
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            return inspect.cleandoc(str(after.value.value))
    return ""
