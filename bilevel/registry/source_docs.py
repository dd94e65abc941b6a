"""What a component says about itself, read from its source with `ast`: nothing is imported.

Importing a component imports torch, which takes seconds; a listing should answer at once.
"""

from __future__ import annotations

import ast
import copy
import functools
import importlib.util
import inspect
import re
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from bilevel.errors import RecipeError


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
    """The first line of the docstring of `module:Class`; empty where there is none.

    One that goes on below, up to what is set off as a formula, is not cut in the middle.
    """
    try:
        found = _found(reference)
    except RecipeError as error:  # which costs a listing this one line
        return f"broken: {error}"
    if found is None:
        return ""
    lines = (ast.get_docstring(found[0]) or "").partition("\n\n")[0].splitlines()
    if not lines or len(lines) > 1 or lines[0].endswith((".", "!", "?")):
        return " ".join(lines)
    return _until_a_comma(lines[0])


def _until_a_comma(text: str) -> str:
    """The first line of a sentence that a formula below ends, without its last clause."""
    whole, _, cut = text.rpartition(", ")
    return f"{whole}." if whole and cut else text


def outline_of(reference: str) -> Outline | None:
    """The outline of `module:Class`, or None where its source cannot be found.

    Raises `RecipeError` where the source cannot be read, as that of a broken plug-in.
    """
    found = _found(reference)
    if found is None:
        return None
    node, module = found
    return Outline(
        doc=ast.get_docstring(node) or "",
        module_doc=ast.get_docstring(module) or "",
        options=tuple(_options(node, module)),
    )


def _found(reference: str) -> tuple[ast.ClassDef, ast.Module] | None:
    """The class that `module:Class` names, and its module."""
    module, _, name = reference.partition(":")
    path = source_of(module)
    if path is None:
        return None
    try:
        return _class(name, _parse(path))
    except (OSError, SyntaxError, ValueError, RecursionError) as error:
        line = f":{error.lineno}" if isinstance(error, SyntaxError) else ""
        said = error.msg if isinstance(error, SyntaxError) else error
        raise RecipeError(f"{path}{line}: {type(error).__name__}: {said}") from error


def _class(name: str, module: ast.Module) -> tuple[ast.ClassDef, ast.Module] | None:
    for node in module.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node, module
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


def _options(node: ast.ClassDef, module: ast.Module) -> list[Option]:
    options = []
    for index, statement in enumerate(node.body):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        written = ast.unparse(statement.annotation)
        name = statement.target.id
        if name.startswith("_") or written.startswith("ClassVar"):
            continue
        kind, slot = _kind(statement.annotation)
        kind = _spelled(kind, module)
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
    return ast.unparse(_Unannotate().visit(copy.deepcopy(annotation))), slot


def _spelled(kind: str, module: ast.Module, depth: int = 2) -> str:
    """A type in which the names of choices, `Start = Literal[…]`, are what they stand for."""
    for name in dict.fromkeys(re.findall(r"\b[A-Z]\w*", kind)):
        found = _choices(name, module, depth)
        if found:
            kind = re.sub(rf"\b{name}\b", lambda _, found=found: found, kind)
    return kind


def _choices(name: str, module: ast.Module, depth: int) -> str | None:
    """`Literal[…]` where the module gives it that name, itself or by an import of ours."""
    for node in module.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            value = ast.unparse(node.value)
            return value if value.startswith("Literal[") else None
        if not isinstance(node, ast.ImportFrom) or all(name != each.name for each in node.names):
            continue
        path = source_of(node.module or "") if depth else None
        return _choices(name, _parse(path), depth - 1) if path else None
    return None


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
