"""Where a source file can be changed so that what it computes is another thing, and how."""

from __future__ import annotations

import ast
import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass

OPPOSITE: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Lt: ast.GtE,
    ast.LtE: ast.Gt,
    ast.Gt: ast.LtE,
    ast.GtE: ast.Lt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
KINDS = (
    "severed",
    "sign",
    "dropped term",
    "dropped update",
    "condition",
    "off by one",
    "ratio",
    "constant",
)
"""What is done, in the order in which a sample takes one of each."""
SIGN_AT = {"axpy": 0, "axpy_": 1, "scale": 0, "scale_": 1}
"""Which argument of a function of `tree` is its factor."""


@dataclass(frozen=True)
class Mutant:
    """One change of one file."""

    file: str
    number: int
    kind: str
    line: int
    change: str
    """What stood there and what stands there now."""
    reads: str
    """The first line of the statement as it is now; the name of the mutant in the table."""


def sample(file: str, source: str, most: int) -> list[Mutant]:
    """At most `most` mutants, of every kind in turn; the same ones every time."""
    found = sorted(_mutants(file, source), key=lambda m: m.number)
    draw = random.Random(file)
    draw.shuffle(found)
    by_kind = [[m for m in found if m.kind == kind] for kind in KINDS]
    taken: list[Mutant] = []
    while any(by_kind) and len(taken) < most:
        taken += [group.pop() for group in by_kind if group]
    return sorted(taken[:most], key=lambda m: (m.line, m.number))


def mutated(source: str, mutant: Mutant) -> ast.Module:
    """The file with the change made."""
    tree = ast.parse(source)
    node = list(ast.walk(tree))[mutant.number]
    replacement = dict(_changes(node))[mutant.kind]
    _Replace(node, replacement).visit(tree)
    return ast.fix_missing_locations(tree)


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self._old, self._new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return ast.copy_location(self._new, node) if node is self._old else self.generic_visit(node)


def _mutants(file: str, source: str) -> Iterator[Mutant]:
    tree = ast.parse(source)
    computing = _computing(tree)
    for number, node in enumerate(ast.walk(tree)):
        if id(node) not in computing:
            continue
        for kind, new in _changes(node):
            change = f"{ast.unparse(node)} → {ast.unparse(new)}".replace("\n", " ")
            reads = _reads(computing[id(node)], node, new)
            yield Mutant(file, number, kind, getattr(node, "lineno", 0), change, reads)


def _reads(statement: ast.stmt, node: ast.AST, new: ast.AST) -> str:
    if node is statement and isinstance(new, ast.Pass):
        return f"pass  # {ast.unparse(node)}".split("\n")[0]
    place = [id(each) for each in ast.walk(statement)].index(id(node))
    twin = copy.deepcopy(statement)
    changed = _Replace(list(ast.walk(twin))[place], new).visit(twin)
    return ast.unparse(changed).split("\n")[0]


def _computing(tree: ast.AST) -> dict[int, ast.stmt]:
    """The statement of each node in the bodies of functions, but for annotations, texts, errors."""
    found: dict[int, ast.stmt] = {}

    def enter(node: ast.AST, statement: ast.stmt) -> None:
        if isinstance(node, ast.Raise | ast.JoinedStr | ast.FunctionDef):
            return
        statement = node if isinstance(node, ast.stmt) else statement
        found[id(node)] = statement
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    enter(child, statement)

    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            for statement in function.body:
                enter(statement, statement)
    return found


def _changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """(kind, what to put in the place of the node); no kind twice."""
    if isinstance(node, ast.BinOp) and type(node.op) in OPPOSITE:
        yield from _operator(node)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield "sign", copy.deepcopy(node.operand)
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        new = copy.deepcopy(node)
        new.ops = [OPPOSITE[type(node.ops[0])]()]  # pyright: ignore
        yield "condition", new
    elif isinstance(node, ast.BoolOp):
        new = copy.deepcopy(node)
        new.op = OPPOSITE[type(node.op)]()  # pyright: ignore
        yield "condition", new
    elif isinstance(node, ast.IfExp) and not isinstance(node.test, ast.Compare):
        yield "condition", ast.IfExp(node.test, node.orelse, node.body)
    elif isinstance(node, ast.If) and not isinstance(node.test, ast.Compare | ast.BoolOp):
        yield (
            "condition",
            ast.If(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse),
        )
    elif isinstance(node, ast.Constant):
        yield from _constant(node)
    elif isinstance(node, ast.Expr | ast.AugAssign | ast.Assign) and _updates(node):
        yield "dropped update", ast.Pass()
    elif isinstance(node, ast.Call):
        yield from _call(node)


def _operator(node: ast.BinOp) -> Iterator[tuple[str, ast.AST]]:
    new = copy.deepcopy(node)
    new.op = OPPOSITE[type(node.op)]()  # pyright: ignore
    additive = isinstance(node.op, ast.Add | ast.Sub)
    yield ("sign" if additive else "ratio"), new
    yield "dropped term", copy.deepcopy(node.left)


def _constant(node: ast.Constant) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(node.value, bool):
        yield "condition", ast.Constant(not node.value)
    elif isinstance(node.value, int):
        yield "off by one", ast.Constant(node.value + 1)
    elif isinstance(node.value, float) and node.value:
        yield "constant", ast.Constant(node.value * 2)


def _updates(node: ast.stmt) -> bool:
    """Whether a statement writes into a variable what was computed from that variable."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Call)
    if isinstance(node, ast.AugAssign):
        return True
    if not isinstance(node, ast.Assign):
        return False
    written, read = (
        {name.id for part in parts for name in ast.walk(part) if isinstance(name, ast.Name)}
        for parts in (node.targets, [node.value])
    )
    return written <= read


def _call(node: ast.Call) -> Iterator[tuple[str, ast.AST]]:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
    room = getattr(getattr(node.func, "value", None), "id", "")
    if name in ("vjp_xy", "vjp_x"):
        yield "severed", _of_tree("scale", ast.Constant(0.0), copy.deepcopy(node))
    elif name in ("hvp_yy", "matvec", "restrict", "project"):
        yield "severed", copy.deepcopy(node.args[0])
    elif room == "tree":
        yield from _algebra(name, node)
    elif isinstance(node.func, ast.Name) and node.func.id == "range":
        new = copy.deepcopy(node)
        last = 1 if len(node.args) > 1 else 0
        new.args[last] = ast.BinOp(new.args[last], ast.Sub(), ast.Constant(1))
        yield "off by one", new


def _algebra(name: str, node: ast.Call) -> Iterator[tuple[str, ast.AST]]:
    new = copy.deepcopy(node)
    if name == "leaves":
        yield "severed", _of_tree("detach", *new.args)
    elif name in ("add", "sub"):
        yield "sign", _of_tree("sub" if name == "add" else "add", *new.args)
        yield "dropped term", copy.deepcopy(node.args[0])
    elif name in SIGN_AT:
        place = SIGN_AT[name]
        new.args[place] = ast.UnaryOp(ast.USub(), new.args[place])
        yield "sign", new
        yield "dropped term", copy.deepcopy(node.args[0 if name.endswith("_") else -1])


def _of_tree(name: str, *arguments: ast.expr) -> ast.Call:
    return ast.Call(
        ast.Attribute(ast.Name("tree", ast.Load()), name, ast.Load()), list(arguments), []
    )
