"""`new`: a problem, an estimator or a package to begin with, which runs and passes its test as it is."""

from __future__ import annotations

import keyword
import os
import re
import sys
from collections.abc import Iterator
from importlib import resources
from importlib.resources.abc import Traversable
from importlib.util import find_spec
from pathlib import Path
from string import Template

from rich.console import Console
from rich.text import Text

from bilevel import registry
from bilevel.cli.names import SCHEMA_KEY, schema_path
from bilevel.errors import RecipeError
from bilevel.runfolder import files

KINDS = ("problem", "estimator", "package")
_REMEDY = "make room, or name another place with --to"


def new(console: Console, kind: str, name: str, to: Path) -> None:
    """Write the files of `kind`, called `name`, into the folder `to`; all of them or none.

    Raises `RecipeError` where `name` cannot name a module, or something of that name is there.
    """
    if kind not in KINDS:
        raise RecipeError(registry.unknown(kind, KINDS, "kind"))
    _refuse_name(name)
    if not os.path.isdir(to):
        raise RecipeError(f"{to}: there is no such folder")
    made = dict(_package(name) if kind == "package" else _files(kind, name))
    targets = [to / path for path in ([name] if kind == "package" else made)]
    for target in targets:
        if os.path.lexists(target):
            raise RecipeError(f"{target}: is there already; take another name, or another --to")
    try:
        for path, text in made.items():
            files.write_text(to / path, text, remedy=_REMEDY, make_folder=True)
    except BaseException:
        for target in targets:
            files.remove(target)
        raise
    for path in made:
        console.print(Text(str(to / path)), soft_wrap=True)
    for line in _next(kind, name, to):
        console.print(Text(line, style="dim"), soft_wrap=True)


def _refuse_name(name: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise RecipeError(
            f"{name}: must be lower-case letters, digits and '_', and no word of Python: it names "
            "a module and a component, e.g. my_problem"
        )
    if name in sys.stdlib_module_names or find_spec(name):
        raise RecipeError(f"{name}: a module of that name is installed, which yours would hide")


def _files(kind: str, name: str) -> Iterator[tuple[str, str]]:
    yield from _filled(
        kind,
        **_words(name),
        module=name,
        folder="parent",
        component=f"{name}.py:{_camel(name)}",
        modeline=f"{SCHEMA_KEY}{schema_path()}\n",
    )


def _package(name: str) -> Iterator[tuple[str, str]]:
    """The files of both kinds in a package, where their components have short names."""
    for path, text in _filled("package", **_words(name), distribution=name.replace("_", "-")):
        yield f"{name}/{path}", text
    for kind, component in (("problem", name), ("estimator", f"{name}_estimator")):
        places = {
            f"{component}.py": f"{name}/{kind}.py",
            f"test_{component}.py": f"tests/test_{kind}.py",
            f"{component}.yaml": f"recipes/{component}.yaml",
        }
        found = _filled(
            kind,
            **_words(component),
            module=f"{name}.{kind}",
            folder='parent.parent / "recipes"',
            component=component,
            modeline="",  # which would hold a path of this machine
        )
        for path, text in found:
            yield f"{name}/{places[path]}", text


def _words(name: str) -> dict[str, str]:
    return {"name": name, "Class": _camel(name), "title": name.replace("_", " ").capitalize()}


def _filled(kind: str, **values: str) -> Iterator[tuple[str, str]]:
    root = resources.files("bilevel") / "templates" / kind
    for path, file in _below(root):
        text = Template(file.read_text(encoding="utf-8")).substitute(values)
        yield Template(path.removesuffix(".template")).substitute(values), text


def _below(folder: Traversable, before: str = "") -> Iterator[tuple[str, Traversable]]:
    for item in sorted(folder.iterdir(), key=lambda item: item.name):
        if item.is_dir():
            yield from _below(item, f"{before}{item.name}/")
        else:
            yield f"{before}{item.name}", item


def _next(kind: str, name: str, to: Path) -> Iterator[str]:
    if kind == "package":
        yield f"install it: pip install -e '{to / name}[test]'   test it: pytest {to / name}"
    else:
        recipe, test = to / f"{name}.yaml", to / f"test_{name}.py"
        yield f"run it: bilevel run {recipe}   test it: pytest {test}"


def _camel(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))
