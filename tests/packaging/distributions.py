"""Do sdist and wheel hold what they should? `python -m tests.packaging.distributions SOURCE DIST`.

The sdist is the source without what is of the repository alone; the wheel has every module, template,
recipe and table that the package reads at run time.
"""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path

OF_THE_REPOSITORY = (".ci/", ".git", ".pre-commit-config.yaml")
MADE = ("PKG-INFO", "setup.cfg", "bilevel.egg-info/")
PACKAGES = {
    "bilevel/": "bilevel/",
    "problems/": "bilevel_problems/",
    "recipes/": "bilevel_recipes/",
}


def main(source: str, folder: str) -> None:
    """Exit with what is missing or too much; silence is consent."""
    root = Path(source)
    committed = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    committed = {name for name in committed if not name.startswith((*OF_THE_REPOSITORY, *MADE))}
    (sdist,), (wheel,) = (list(Path(folder).glob(form)) for form in ("*.tar.gz", "*.whl"))
    with tarfile.open(sdist) as file:
        names = {member.name.partition("/")[2] for member in file if member.isfile()}
    compare("sdist", {name for name in names if not name.startswith(MADE)}, committed)
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
    wanted = {
        into + name.removeprefix(of)
        for of, into in PACKAGES.items()
        for name in committed
        if name.startswith(of)
    }
    compare("wheel", names, wanted)


def compare(what: str, got: set[str], wanted: set[str]) -> None:
    if got != wanted:
        raise SystemExit(
            f"{what}: lacks {sorted(wanted - got)}, has {sorted(got - wanted)} too much"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
