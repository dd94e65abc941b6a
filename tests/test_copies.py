"""No two places in `bilevel/` share eight lines of code that one function should serve.

Lines are those of statements within functions, as `ast.unparse` writes them with every name and constant
left out, so that neither spacing, comments nor a renaming hide a copy; a run of them ends where its function
does, and eight of one shape, such as a list of assignments, are none. Signatures, fields, imports and docstrings
are no code here: a protocol's signature stands with every class that has it.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from tests.imports import PACKAGE

LINES, SHAPES = 8, 4
Line = tuple[int, str]


def runs(source: str) -> Iterator[list[Line]]:
    """(line number, text) of the statements of each function, those of functions within it apart."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield list(_lines(node.body))


def _lines(body: Sequence[ast.stmt]) -> Iterator[Line]:
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield statement.lineno, f"<{statement.lineno}>"  # its own run; here it ends one
        elif not _is_text(statement):
            for text in ast.unparse(_Shape().visit(statement)).splitlines():
                yield statement.lineno, text.strip()


class _Shape(ast.NodeTransformer):
    """A statement with its names and constants left out."""

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Name("_", node.ctx)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        return ast.Attribute(self.visit(node.value), "_", node.ctx)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        return ast.Constant("" if isinstance(node.value, str) else 0)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        return ast.Constant("")

    def visit_keyword(self, node: ast.keyword) -> ast.AST:
        return ast.keyword("_" if node.arg else None, self.visit(node.value))


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def copies(sources: Mapping[str, str], lines: int = LINES) -> list[str]:
    """ "a.py:3 ~ b.py:40" where `lines` lines stand in two functions; the first of each run."""
    seen: defaultdict[tuple[str, ...], list[tuple[str, int]]] = defaultdict(list)
    for name, source in sources.items():
        for run in runs(source):
            for start in range(len(run) - lines + 1):
                window = run[start : start + lines]
                texts = tuple(text for _, text in window)
                if len(set(texts)) >= min(SHAPES, lines):
                    seen[texts].append((name, window[0][0]))
    return [
        " ~ ".join(f"{name}:{number}" for name, number in places)
        for places in seen.values()
        if len(set(places)) > 1
    ]


def package() -> dict[str, str]:
    paths = sorted(PACKAGE.rglob("*.py"))
    return {str(path.relative_to(PACKAGE)): path.read_text(encoding="utf-8") for path in paths}


def test_no_eight_lines_stand_twice():
    sources = package()
    assert len(sources) > 150
    assert copies(sources) == []


BODY = [
    "    total, seen = 0.0, []",
    "    for value in values:",
    "        total += f(value)",
    "        if total > 1:",
    "            seen.append(value)",
    "        else:",
    "            total = g(total, scale=2)",
    "    seen = sorted(seen)",
]


def planted(body: Sequence[str], name: str) -> str:
    return "\n".join(
        [f"def {name}(values):", '    """Some text."""', *body, "    return seen, total"]
    )


def test_a_planted_copy_is_found():  # negative control
    text = planted(BODY, "two").replace("seen", "kept").replace("1", "0.5").replace(" += ", " +=  ")
    found = copies({**package(), "one.py": planted(BODY, "one"), "two.py": text})
    assert found == ["one.py:3 ~ two.py:3", "one.py:4 ~ two.py:4"]
    assert copies({"one.py": "\n\n".join(planted(BODY, name) for name in ("one", "two"))})


def test_what_differs_in_a_line_or_says_one_thing_again_and_again_is_none():
    changed = [*BODY[:2], "        total -= f(value) ** 2", *BODY[3:]]
    sources = {"one.py": planted(BODY, "one"), "two.py": planted(changed, "two")}
    assert copies(sources) == []
    assert copies(sources, lines=5)  # what is the same of them
    many = [f"    a{i} = f(b{i})" for i in range(20)]
    assert copies({"one.py": planted(many, "one"), "two.py": planted(many, "two")}) == []
