"""The site of every release: `python -m docs.versions` builds each tag `v…` and the tree as it is, side by side.

docs/_build/versions/ has a folder a version, `latest` for the tree, and a page that leads to the newest release.
The sidebar of each page lists the others. Nothing is fetched; a tag is built from a worktree of its own.
"""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
LATEST = "latest"
NAMES = "BILEVEL_DOCS_VERSIONS"
"""The variable by which conf.py is told the names of all versions, the newest first."""
_TAG = re.compile(r"v(\d+)\.(\d+)\.(\d+)(\S*)")

Build = Callable[[Path, Path, Sequence[str]], None]


def tags(root: Path) -> list[str]:
    """The tags of releases, the newest first; v1.0.0rc1 comes before v1.0.0."""
    found = [match for tag in _git(root, "tag").split() if (match := _TAG.fullmatch(tag))]

    def order(match: re.Match[str]) -> tuple[tuple[int, ...], bool, str]:
        *numbers, rest = match.groups()
        return tuple(map(int, numbers)), not rest, rest

    return [match[0] for match in sorted(found, key=order, reverse=True)]


def build(source: Path, to: Path, names: Sequence[str]) -> None:
    """Sphinx, as strict as `make docs` is."""
    sphinx = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-n", "-b", "html"]
    environment = {**os.environ, NAMES: " ".join(names), "PYTHONPATH": str(source)}
    subprocess.run([*sphinx, str(source / "docs"), str(to)], check=True, env=environment)


def build_all(root: Path, to: Path, build: Build = build) -> list[str]:
    """Build the tree and every release below `to`; the names, the newest first."""
    released = tags(root)
    names = [LATEST, *released]
    to.mkdir(parents=True, exist_ok=True)
    build(root, to / LATEST, names)
    for tag in released:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "tree"
            _git(root, "worktree", "add", "--detach", str(place), tag)
            try:
                build(place, to / tag, names)
            finally:
                _git(root, "worktree", "remove", "--force", str(place))
    (to / "index.html").write_text(_front(released[0] if released else LATEST), encoding="utf-8")
    return names


def _front(name: str) -> str:
    place = html.escape(f"{name}/index.html")
    return (
        f'<!doctype html><meta charset="utf-8"><title>bilevel</title>'
        f'<meta http-equiv="refresh" content="0; url={place}"><a href="{place}">bilevel {name}</a>\n'
    )


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *words], check=True, capture_output=True, text=True
    )
    return done.stdout


if __name__ == "__main__":
    print("\n".join(build_all(ROOT, ROOT / "docs" / "_build" / "versions")))
