"""Source-level mutants of every estimator: `python -m tests.mutation.run [module …]`.

Takes the file of each estimator, changes one sign, operator or constant at a time, and asks
`check_estimator`'s checks about every component and preset that lives in it. Not part of the suite: it
takes minutes. Prints a table, and the mutants that nothing here kills.
"""

from __future__ import annotations

import ast
import copy
import importlib
import multiprocessing
import sys
import types
from collections.abc import Iterator
from pathlib import Path

from bilevel import presets, registry
from bilevel.build import build
from bilevel.errors import RequirementError
from tests.mutation.held import LEFT_OUT, first_complaint

ROOM = Path(importlib.import_module("bilevel.estimators").__file__ or "").parent
SECONDS = 60
"""A mutant that does not end is a mutant killed."""
SWAPS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
CALLS = {"add": "sub", "sub": "add"}


def sites(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(number of the node, what is done to it)."""
    for number, node in enumerate(ast.walk(tree)):
        if isinstance(node, ast.BinOp) and type(node.op) in SWAPS:
            yield number, f"{type(node.op).__name__} → {SWAPS[type(node.op)].__name__}"
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            yield number, "−a → a"
        elif _is_tree_call(node, CALLS):
            yield number, f"tree.{node.func.attr} → tree.{CALLS[node.func.attr]}"  # pyright: ignore
        elif _is_tree_call(node, {"axpy": "", "axpy_": "", "scale": "", "scale_": ""}):
            yield number, f"sign in tree.{node.func.attr}"  # pyright: ignore


def _is_tree_call(node: ast.AST, names: dict[str, str]) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "tree"
        and node.func.attr in names
    )


def mutate(tree: ast.Module, number: int) -> tuple[ast.Module, int]:
    """(the tree with one node changed, its line)."""
    tree = copy.deepcopy(tree)
    node = list(ast.walk(tree))[number]
    if isinstance(node, ast.BinOp):
        node.op = SWAPS[type(node.op)]()
    elif isinstance(node, ast.UnaryOp):
        node.op = ast.UAdd()
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr in CALLS:
            node.func.attr = CALLS[node.func.attr]
        else:
            place = 1 if node.func.attr == "axpy_" or node.func.attr == "scale_" else 0
            node.args[place] = ast.UnaryOp(ast.USub(), node.args[place])
    return ast.fix_missing_locations(tree), getattr(node, "lineno", 0)


def methods(module: str) -> dict[str, tuple[str, dict[str, object]]]:
    """What is built from a module: name → (class, options)."""
    found = {}
    specs = {name: {"name": name} for name in registry.names("estimators")}
    specs |= {name: dict(p.spec) for name, p in presets.of("estimators").items()}
    for name, spec in specs.items():
        cls = registry.find("estimators", spec["name"])
        if cls.__module__ == module and name not in LEFT_OUT:
            found[name] = (cls.__name__, spec)
    return found


def judge(module: str, number: int, queue: multiprocessing.Queue) -> None:
    """Put what the checks say of one mutant into the queue; None where it survives."""
    import torch

    torch.set_num_threads(1)
    path = Path(importlib.import_module(module).__file__ or "")
    tree, _ = mutate(ast.parse(path.read_text(encoding="utf-8")), number)
    broken = types.ModuleType(f"{module}_mutant")
    sys.modules[broken.__name__] = broken
    try:
        exec(compile(tree, str(path), "exec"), broken.__dict__)
        for name, (cls, spec) in methods(module).items():
            right = build("estimators", spec)
            options = {f: getattr(right, f) for f in right.__dataclass_fields__}
            said = first_complaint(name, getattr(broken, cls)(**options))
            if said:
                queue.put(f"{name}, {said}")
                return
    except Exception as error:
        queue.put(f"raised {type(error).__name__}: {error}")
        return
    queue.put(None)


def verdict(module: str, number: int) -> str | None:
    """What killed a mutant, in a process of its own."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=judge, args=(module, number, queue))
    process.start()
    try:
        return queue.get(timeout=SECONDS)
    except Exception:
        return f"not done after {SECONDS} s"
    finally:
        process.kill()
        process.join()


def main(asked: list[str]) -> None:
    print("| file | mutants | killed | survivors |\n|---|---|---|---|")
    said: list[str] = []
    for path in sorted(ROOM.glob("*.py")):
        module = f"bilevel.estimators.{path.stem}"
        if path.stem == "__init__" or (asked and path.stem not in asked):
            continue
        try:
            if not methods(module):
                continue
            [build("estimators", spec) for _, spec in methods(module).values()]
        except RequirementError:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        alive = []
        count = 0
        for number, what in sites(tree):
            count += 1
            if verdict(module, number) is None:
                alive.append(f"{mutate(tree, number)[1]} ({what})")
        print(f"| `{path.stem}` | {count} | {count - len(alive)} | {len(alive)} |", flush=True)
        said += [f"{path.stem}.py:{line}" for line in alive]
    print("\nalive:", *said, sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
