"""Writes the picture and the list of docs/house.md from the package itself: `python -m docs.house`.

The picture is drawn in layers (Sugiyama, Tagawa and Toda 1981): floors from tests/imports.py, an
arrow for each import that no other arrows imply, long arrows led through free places in between.
"""

from __future__ import annotations

import ast
from html import escape
from itertools import pairwise
from pathlib import Path

from docs.pages import put
from tests.imports import FLOORS, PACKAGE, files, rooms

HERE = Path(__file__).parent
PAGE, PICTURE = HERE / "house.md", HERE / "house.svg"

WIDTH, ROW, BOX, GAP, THROUGH = 700, 74, 26, 12, 8
"""Pixels: the picture's width, from floor to floor, a box's height, between boxes, an arrow's lane."""

Node = tuple[int, str]
"""(floor, room), or (floor, "a>b") where the arrow from a to b passes that floor."""
Arrow = tuple[str, str]


def arrows(graph: dict[str, set[str]]) -> list[Arrow]:
    """The imports between rooms that do not follow from others."""

    def below(name: str) -> set[str]:
        return graph[name].union(*(below(one) for one in graph[name]))

    return sorted(
        (here, there)
        for here, targets in graph.items()
        for there in targets
        if not any(there in below(other) for other in targets - {there})
    )


def chains(drawn: list[Arrow], floors: list[list[str]]) -> dict[Arrow, list[Node]]:
    """The places that each arrow passes, from its room down to the one that is imported."""
    floor = {name: height for height, names in enumerate(floors) for name in names}
    return {
        (here, there): [
            (floor[here], here),
            *((height, f"{here}>{there}") for height in range(floor[here] - 1, floor[there], -1)),
            (floor[there], there),
        ]
        for here, there in drawn
    }


def size(name: str) -> float:
    return THROUGH if ">" in name else 7.4 * len(name) + 18


def spread(row: list[str], wanted: dict[str, float]) -> dict[str, float]:
    """Centres as near to what is wanted as the order and the width allow."""
    half = {name: (size(name) + GAP) / 2 for name in row}

    def pushed(
        names: list[str], wanted: dict[str, float], sign: int, edge: float
    ) -> dict[str, float]:
        at = {}
        for name in names:
            at[name] = sign * max(sign * wanted[name], sign * edge + half[name])
            edge = at[name] + sign * half[name]
        return at

    right = pushed(row, wanted, 1, -WIDTH)
    left = pushed(row[::-1], wanted, -1, 2 * WIDTH)
    mean = {name: (right[name] + left[name]) / 2 for name in row}  # neither side is preferred
    return pushed(row[::-1], pushed(row, mean, 1, GAP), -1, WIDTH - GAP)


def places(paths: list[list[Node]], floors: list[list[str]]) -> dict[Node, float]:
    """x of every box and lane: each near the mean of what it is joined to, by sweeps up and down."""
    rows = [list(names) for names in floors]
    joined: dict[Node, list[Node]] = {}
    for path in paths:
        for high, low in pairwise(path):
            joined.setdefault(high, []).append(low)
            joined.setdefault(low, []).append(high)
        for height, name in path[1:-1]:
            rows[height].append(name)
    at: dict[Node, float] = {}
    for height, row in enumerate(rows):
        at |= {(height, name): WIDTH * (i + 1) / (len(row) + 1) for i, name in enumerate(row)}
    for sweep in range(60):
        order = range(len(rows)) if sweep % 2 else reversed(range(len(rows)))
        for height in order:
            wanted = {}
            for name in rows[height]:
                near = [at[node] for node in joined.get((height, name), [])]
                wanted[name] = sum(near) / len(near) if near else at[height, name]
            rows[height].sort(key=lambda name: (round(wanted[name], 3), name))
            at |= {(height, n): x for n, x in spread(rows[height], wanted).items()}
        ends = [at[node] + sign * size(node[1]) / 2 for node in at for sign in (1, -1)]
        off = (WIDTH - min(ends) - max(ends)) / 2  # no side gains on the other from sweep to sweep
        at = {node: x + off for node, x in at.items()}
    return at


def picture() -> str:
    """The SVG."""
    graph = rooms(files())
    paths = chains(arrows(graph), FLOORS)
    at = places(list(paths.values()), FLOORS)
    tall = ROW * len(FLOORS)

    def y(height: int) -> float:
        return tall - ROW * (height + 0.5)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {tall}" width="{WIDTH}" '
        f'height="{tall}" font-family="sans-serif" font-size="13">',
        "<title>The folders of bilevel, and who imports whom</title>",
        f'<rect width="{WIDTH}" height="{tall}" fill="#ffffff"/>',
        '<marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 0L8 4L0 8z" fill="#555555"/></marker>',
    ]
    for height in range(0, len(FLOORS), 2):
        out.append(
            f'<rect y="{y(height) - ROW / 2:g}" width="{WIDTH}" height="{ROW}" fill="#f5f5f5"/>'
        )
    for path in paths.values():
        (first, _), (last, _) = path[0], path[-1]
        line = f"M{at[path[0]]:.0f} {y(first) + BOX / 2:g}"
        for high, low in pairwise(path):
            top = y(high[0]) + BOX / 2
            end = y(low[0]) - BOX / 2
            middle = (top + end) / 2
            line += f"C{at[high]:.0f} {middle:g} {at[low]:.0f} {middle:g} {at[low]:.0f} {end:g}"
            if low != path[-1]:
                line += f"V{end + BOX:g}"
        assert first > last, "an arrow leads down"
        out.append(
            f'<path d="{line}" fill="none" stroke="#777777" stroke-width="1" '
            'marker-end="url(#tip)"/>'
        )
    for height, names in enumerate(FLOORS):
        for name in names:
            wide, folder = size(name), (PACKAGE / name).is_dir()
            x = at[height, name]
            out.append(
                f'<rect x="{x - wide / 2:.1f}" y="{y(height) - BOX / 2:g}" width="{wide:.1f}" '
                f'height="{BOX}" rx="4" fill="#ffffff" stroke="#222222" '
                f'stroke-width="{1.5 if folder else 1}"'
                + ("/>" if folder else ' stroke-dasharray="4 2"/>')
            )
            out.append(
                f'<text x="{x:.1f}" y="{y(height) + 4.5:g}" text-anchor="middle" '
                f'fill="#111111">{escape(name)}</text>'
            )
    return "\n".join([*out, "</svg>", ""])


def about(name: str) -> str:
    """The first line of a room's docstring."""
    path = PACKAGE / name / "__init__.py"
    path = path if path.exists() else PACKAGE / f"{name}.py"
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    return text.splitlines()[0]


def listing() -> str:
    """Each room in a line, from the top floor down."""
    lines = [
        f"- `{name}{'/' if (PACKAGE / name).is_dir() else '.py'}`: {about(name)}"
        for floor in reversed(FLOORS)
        for name in floor
    ]
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with the list of today."""
    return put(text, "the list", listing())


if __name__ == "__main__":
    PICTURE.write_text(picture(), "utf-8")
    PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")
