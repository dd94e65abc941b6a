"""Names of components: a registered name, `path/to/file.py:Class` or `package.module:Class`.

A file is relative to what names it: the folder of a recipe, or the current one on the command line.
Registered names are entry points of the groups `bilevel.<group>`, so that another package adds
its own by declaring them. Nothing here imports torch, and listing imports no component at all.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from bilevel.errors import RecipeError, RequirementError, unknown
from bilevel.registry import presets
from bilevel.registry.source_docs import summary_of

PREFIX = "bilevel."
FILE = re.compile(r"^(?P<file>.+\.py):(?P<name>[A-Za-z_]\w*)$")
_FILE_MODULE = "bilevel_file_"
MODULE = re.compile(r"^(?P<module>[A-Za-z_]\w*(?:\.\w+){0,50}):(?P<name>[A-Za-z_]\w*)$")

# Where the name to import is not the name to install.
_DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "vl_convert": "vl-convert-python"}


@dataclass(frozen=True)
class Entry:
    """A registered component: its name, the first line of its docstring, and where it lives."""

    name: str
    summary: str
    reference: str


def groups() -> tuple[str, ...]:
    """The groups in which something is registered, ours first."""
    found = {g for g in importlib.metadata.entry_points().groups if g.startswith(PREFIX)}
    known = ["problems", "estimators", "lower", "linear", "optimizers", "sinks"]
    names = [group.removeprefix(PREFIX) for group in found]
    return tuple(sorted(names, key=lambda n: (known.index(n) if n in known else 99, n)))


_KINDS = {"lower": "lower solver", "linear": "linear solver"}


def kind(group: str) -> str:
    """What one component of a group is called: "problem", "linear solver"."""
    return _KINDS.get(group, group.removesuffix("s").replace("_", " "))


def names(group: str) -> tuple[str, ...]:
    """The names registered in a group, in alphabetical order."""
    return tuple(sorted(_points(group)))


def references(group: str) -> dict[str, str]:
    """What each registered name stands for, `module:Class`."""
    return {name: point.value for name, point in _points(group).items()}


def entries(group: str) -> tuple[Entry, ...]:
    """Every component registered in `group`, with its summary; imports none of them."""
    points = _points(group)
    return tuple(
        Entry(name, _conflict(group, name) or summary_of(points[name].value), points[name].value)
        for name in names(group)
    )


def find(group: str, reference: str, base: Path | None = None) -> type[Any]:
    """The class that `reference` names in `group`; relative files are relative to `base`.

    Raises `RecipeError` for an unknown name, with the nearest known ones, and
    `RequirementError` where a package is missing that the component imports.
    """
    if match := FILE.match(reference):
        path = _path(match["file"], reference, base or Path())
        return _attribute(_load_file(path, reference), match["name"], reference)
    if match := MODULE.match(reference):
        family = [name for name in presets.of(group) if name.startswith(f"{match['module']}:")]
        if family:  # `betty:bogus` is not a class to look for in betty
            raise RecipeError(unknown(reference, family, kind(group)))
        return _attribute(_import(match["module"], reference), match["name"], reference)
    points = _points(group)
    if reference not in points:
        if reference.endswith(".py"):
            raise RecipeError(_no_class(reference, base or Path()))
        known = {*points, *presets.of(group)}
        raise RecipeError(unknown(reference, known, kind(group)) + _elsewhere(reference, group))
    if conflict := _conflict(group, reference):
        raise RecipeError(conflict)
    module, _, name = points[reference].value.partition(":")
    return _attribute(_import(module, reference), name, reference)


def _elsewhere(name: str, group: str) -> str:
    """What has this name though it is not of this group."""
    found = [f"{other}/{name}" for other in groups() if other != group and name in _points(other)]
    return f" Of another kind there is {' and '.join(found)}." if found else ""


def _no_class(reference: str, base: Path) -> str:
    """What is wrong with a file that stands where a class of it is meant."""
    path = _path(reference, reference, base)
    try:
        body = ast.parse(path.read_bytes()).body
    except (SyntaxError, ValueError):
        body = []
    names = [node.name for node in body if isinstance(node, ast.ClassDef)]
    such = f"{reference}:{names[-1] if names else 'Name'}"
    held = f" (it has {', '.join(names)})" if names else ""
    return f"{reference!r} is a file; say which class of it{held}, as in {such}"


def absolute(reference: str, base: Path) -> str:
    """`reference` with the path of a file made absolute; other references as they are."""
    if match := FILE.match(reference):
        path = _path(match["file"], reference, base).resolve()
        return f"{path}:{match['name']}"
    return reference


def name_of(cls: type[Any], group: str) -> str:
    """The shortest reference by which `find` returns `cls`."""
    value = f"{cls.__module__}:{cls.__qualname__}"
    for name, point in _points(group).items():
        if point.value == value:
            return name
    module = sys.modules.get(cls.__module__)
    if module is not None and cls.__module__.startswith(_FILE_MODULE):
        return f"{module.__file__}:{cls.__qualname__}"
    return value


def foreign(group: str) -> tuple[str, ...]:
    """The names in a group that another package registers."""
    ours = ("bilevel.", "bilevel_problems.")
    return tuple(name for name, value in references(group).items() if not value.startswith(ours))


def _points(group: str) -> dict[str, importlib.metadata.EntryPoint]:
    found: dict[str, importlib.metadata.EntryPoint] = {}
    for point in _registered(group):
        found.setdefault(point.name, point)
    return found


def _registered(group: str) -> Sequence[importlib.metadata.EntryPoint]:
    """The entry points of a group. Each look reads a file of every package installed: one is enough."""
    return _read(importlib.metadata.entry_points, PREFIX + group, tuple(map(_dated, sys.path)))


@lru_cache(maxsize=64)
def _read(read: Any, group: str, _: Any) -> Sequence[importlib.metadata.EntryPoint]:
    return tuple(read(group=group))


def _dated(folder: str) -> tuple[str, float]:
    """A folder of packages, and when one was last added to it or removed."""
    try:
        return folder, os.stat(folder or ".").st_mtime
    except OSError:
        return folder, 0.0


def _conflict(group: str, name: str) -> str | None:
    """What is wrong with a name that two packages register."""
    points = _registered(group)
    values = dict.fromkeys(point.value for point in points if point.name == name)
    if len(values) < 2:
        return None
    return (
        f"{group} name {name!r} is registered twice: {' and '.join(values)}; uninstall one of the "
        "two packages"
    )


def _attribute(module: ModuleType, name: str, reference: str) -> type[Any]:
    found = getattr(module, name, None)
    if not isinstance(found, type):
        classes = [
            n
            for n, value in vars(module).items()
            if isinstance(value, type) and value.__module__ == module.__name__
        ]
        raise RecipeError(f"{reference!r}: {unknown(name, classes, f'class in {module.__file__}')}")
    return found


def _import(module: str, reference: str) -> ModuleType:
    with _importing(module, reference):
        return importlib.import_module(module)


@contextmanager
def _importing(what: str, reference: str) -> Iterator[None]:
    """Whatever a module of somebody's own raises while it is imported is one `BilevelError`."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise _missing(error, what, reference) from error
    except RequirementError:  # an ImportError that says itself what is missing
        raise
    except (Exception, SystemExit) as error:  # one that exits is no success of ours
        kind = type(error).__name__
        raise RecipeError(f"{reference!r}: importing {what} failed: {kind}: {error}") from error


def _path(file: str, reference: str, base: Path) -> Path:
    """The file that a reference names; raises `RecipeError` where no file can have that name."""
    try:
        path = base / Path(file).expanduser()
        is_there = path.is_file()
    except (OSError, RuntimeError) as error:  # a name too long, a user that does not exist
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(f"{reference!r}: {reason}") from error
    if not is_there:
        raise RecipeError(f"{reference!r}: there is no file {path}")
    return path


class _AsItIs(importlib.machinery.SourceFileLoader):
    """Runs what a file says now: of an edit of the same size in one second, the bytecode is of before."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


def _load_file(path: Path, reference: str) -> ModuleType:
    path = path.resolve()
    # The content is part of the name: an edited file is a new module, an unchanged one the same.
    digest = hashlib.sha256(str(path).encode() + path.read_bytes()).hexdigest()[:12]
    name = f"{_FILE_MODULE}{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path, loader=_AsItIs(name, str(path)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    _offer_neighbours(path, reference)
    try:
        with _importing(str(path), reference):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


_offered: set[str] = set()
"""Folders of files loaded so far, at the end of `sys.path`."""


def _offer_neighbours(path: Path, reference: str) -> None:
    """Let a file import the modules beside it, now and later; what is installed comes first.

    Raises `RecipeError` where it imports one whose name stands for a file of another such folder.
    """
    folder = str(path.parent)
    wanted = set(_IMPORTED.findall(path.read_bytes()))
    for name in (name.decode() for name in wanted):
        loaded = getattr(sys.modules.get(name), "__file__", None)
        if loaded is None or not any(
            (path.parent / each).exists() for each in (name, f"{name}.py")
        ):
            continue
        home = next((each for each in _offered if Path(loaded).is_relative_to(each)), folder)
        if home != folder:
            raise RecipeError(
                f"{reference!r}: the module {name!r} beside it is already loaded from {loaded}; "
                "give one of the two another name"
            )
    if folder not in _offered:
        _offered.add(folder)
        sys.path.append(folder)


_IMPORTED = re.compile(rb"^[ \t]*(?:import|from)[ \t]+([A-Za-z_]\w*)", re.MULTILINE)


def _missing(error: ModuleNotFoundError, module: str, reference: str) -> RequirementError:
    absent = (error.name or "?").partition(".")[0]
    if absent in ("bilevel", "bilevel_problems"):
        return RequirementError(f"{reference!r}: {error.name} is not part of this installation")
    return RequirementError(
        f"{reference!r} needs the module {absent!r}, which is not installed (imported by {module}). "
        f"{remedy_for(absent)}"
    )


def remedy_for(module: str) -> str:
    """How to come by an importable module; a name to install is given only where it is known.

    Anyone can register the name of a helper module of yours: it is not what to install.
    """
    extra = extra_for(module)
    if extra:
        return f"Install it: pip install 'bilevel[{extra}]'"
    return (
        f"Where it is a file of yours, put {module}.py beside the file that imports it; else install "
        "the package that its documentation names"
    )


def extra_for(package: str) -> str | None:
    """The extra of `bilevel` that installs an importable `package`, or None."""
    wanted = _normal(_DISTRIBUTIONS.get(package, package))
    for extra, required in extras().items():
        if wanted in {_normal(name) for name in required}:
            return extra
    return None


def extras() -> Mapping[str, tuple[str, ...]]:
    """The optional extras of this package with the distributions each installs.

    An extra that asks for another, as `bilevel[mllm]`, installs what that one does.
    """
    found: dict[str, list[tuple[str, str | None]]] = {}
    for line in importlib.metadata.requires("bilevel") or []:
        match = re.match(r"^([\w.-]+)(?:\[([\w-]+)\])?.*extra\s*==\s*['\"]([\w-]+)['\"]", line)
        if match:
            found.setdefault(match[3], []).append((match[1], match[2]))

    def installed_by(extra: str) -> Iterator[str]:
        for name, other in found.get(extra, ()):
            yield from installed_by(other) if name == "bilevel" and other else (name,)

    return {extra: tuple(installed_by(extra)) for extra in found}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
