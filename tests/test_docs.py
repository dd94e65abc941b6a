"""The documentation is true: its blocks run, its outputs match, its links lead somewhere.

On a page, blocks run in order in one namespace and one folder. A python or yaml block that
begins with a comment naming a file is saved under that name. A console block holds commands
after `$ ` and what they print, where `…` stands for any words or the rest of a word.
"""

import doctest
import importlib
import itertools
import re
import shlex
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from typer.testing import CliRunner

from bilevel import recipe
from bilevel.cli.app import app
from bilevel.errors import RecipeError
from bilevel.registry import presets
from bilevel.studying import file as studies
from tests.problems.mllm_hft import own_files

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts)
EXECUTED = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
LINKED = [*EXECUTED, ROOT / "CHANGELOG.md"]

NOT_RUN = {
    "make run": "sets up an environment and runs the flagship for minutes",
    "make test": "runs this file",
    "make lint": "the gate runs it",
    "make docs": "the gate builds the site",
    "make benchmark": "measures for an hour",
    "python -m tests.benchmarks": "measures for minutes",
    "pip install": "changes the environment",
    "bilevel run recipes/mllm_hft.yaml": "takes minutes; tests/problems shortens it",
    "bilevel run mllm_hft": "takes minutes; tests/problems shortens it",
    "bilevel check mllm_hft": "takes minutes",
    "bilevel resume mllm_hft": "there is no such run here",
    "bilevel report mllm_hft": "there is no such run here",
    "bilevel study recipes/studies/mllm_hft.yaml": "takes a day; tests/cli/test_study.py runs a small one",
}
"""Commands, by how they begin, that the pages show and this file does not run, and why."""

LAID = {"your_llava.md": own_files.lay}
"""What a page finds in its folder, which speaks of the reader's own files."""


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    kind: str
    text: str

    @property
    def place(self):
        return f"{self.page.name}:{self.line}"


def tokens(text):
    return MarkdownIt("commonmark").enable("table").parse(text)


def blocks(page):
    return [
        Block(page, (token.map or [0])[0] + 2, (token.info.split() or [""])[0], token.content)
        for token in tokens(page.read_text(encoding="utf-8"))
        if token.type == "fence"
    ]


def commands(text):
    """Each command of a console block with the lines that follow it."""
    found = []
    for line in text.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        else:
            assert found, f"a console block begins with '$ ', got {line!r}"
            found[-1][1].append(line)
    return found


@dataclass
class Session:
    """What one page has defined, written and run so far."""

    folder: Path
    namespace: dict = field(default_factory=lambda: {"__name__": "page"})
    code: int = 0

    def run(self, block):
        self._save(block)
        if block.kind == "python":
            self._python(block)
        elif block.kind == "yaml" and block.text.startswith("apiVersion:"):
            pass  # of Kubernetes: tests/test_launching.py
        elif block.kind == "yaml":
            self._yaml(block)
        elif block.kind == "console":
            self._console(block)

    def _save(self, block):
        named = re.match(r"# ([\w.-]+\.(?:py|yaml))\n", block.text)
        if named:
            (self.folder / named[1]).write_text(block.text, encoding="utf-8")

    def _python(self, block):
        # blank lines before it make a traceback name the line of the page
        padded = "\n" * (block.line - 1) + block.text
        exec(compile(padded, str(block.page), "exec"), self.namespace)

    def _yaml(self, block):
        """A whole recipe, or sections of one, which then get a problem; or a study."""
        if re.search(r"^arms:", block.text, re.MULTILINE):
            studies.read(self.folder / block.text.split()[1])
            return
        whole = re.search(r"^problem:", block.text, re.MULTILINE)
        text = block.text if whole else f"{block.text}\nproblem: quadratic\n"
        recipe.loads(text, title=block.place, base=self.folder)

    def _console(self, block):
        for command, shown in commands(block.text):
            if not any(command.startswith(start) for start in NOT_RUN):
                self._command(block.place, command, " ".join(shown))

    def _command(self, place, command, shown):
        parts = shlex.split(command)
        if parts == ["echo", "$?"]:
            assert str(self.code) == shown.strip(), f"{place}: exit code {self.code}"
            self.code = 0
            return
        assert self.code == 0, f"{place}: the command before exited with {self.code}"
        assert parts[0] == "bilevel", f"{place}: {command!r} is neither run nor in NOT_RUN"
        result = CliRunner().invoke(app, parts[1:])
        self.code = result.exit_code
        assert not shown or matches(shown, result.output), (
            f"{place}: {command}\nshown:\n{shown}\ngot:\n{result.output}"
        )

    def close(self):
        assert self.code == 0, f"the last command exited with {self.code}"


def matches(shown, got):
    """Whether words are the same in order, `…` for anything; numbers to the digits shown."""
    got, reached = got.split(), {0}
    for word in shown.split():
        if word == "…":
            reached = set(range(min(reached), len(got) + 1)) if reached else reached
        else:
            reached = {i + 1 for i in reached if i < len(got) and same(word, got[i])}
    return len(got) in reached


NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
ROUNDING = 1e-8
"""Printed errors below this are rounding, which is another on another machine."""


def same(word, got):
    if "…" in word:
        return re.fullmatch(".*".join(map(re.escape, word.split("…"))), got) is not None
    if word == got:
        return True
    numbers = NUMBER.findall(word), NUMBER.findall(got)
    if NUMBER.sub("0", word) != NUMBER.sub("0", got) or len(numbers[0]) != len(numbers[1]):
        return False
    return all(close(a, b) for a, b in zip(*numbers, strict=True))


def close(shown, got):
    """Equal integers; other numbers one unit apart in the last digit shown, or both rounding."""
    if shown == got:
        return True
    mantissa, _, exponent = shown.partition("e")
    if "." not in mantissa:
        return False
    a, b = float(shown), float(got)
    unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return abs(a - b) <= 1.001 * unit or max(abs(a), abs(b)) < ROUNDING


def run_page(page, folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("BILEVEL_CACHE", str(folder / "cache"))
    monkeypatch.syspath_prepend(page.parent)  # what a page's blocks import stands beside it
    LAID.get(page.name, lambda folder: None)(folder)
    session = Session(folder)
    for block in blocks(page):
        session.run(block)
    session.close()


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"  # peft asks transformers by its old name
)
@pytest.mark.untrusted("pages show solves that are short, and what becomes of them")
@pytest.mark.parametrize("page", EXECUTED, ids=lambda page: page.name)
def test_blocks_run_and_outputs_are_what_is_shown(page, tmp_path, monkeypatch):
    run_page(page, tmp_path, monkeypatch)


WRONG = {
    "an assertion": "```python\nassert 1 + 1 == 3\n```\n",
    "a name of another page": "```python\nundefined\n```\n",
    "an unknown option": "```yaml\nlower: {optimiser: sgd}\n```\n",
    "a recipe of an unknown problem": "```yaml\nproblem: quadratik\n```\n",
    "an output": "```console\n$ bilevel validate quadratic\nwrong\n```\n",
    "an exit code": "```console\n$ bilevel validate no_such_recipe\n```\n",
    "a command that is no decision": "```console\n$ rm -rf .\n```\n",
}


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG)
def test_what_is_wrong_on_a_page_is_found(text, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    with pytest.raises((AssertionError, NameError, RecipeError)):
        run_page(page, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("shown", "got", "agree"),
    [
        ("a … d", "a b c d", True),
        ("a …", "a", True),
        ("runs/…/ 0.01…", "runs/x/ 0.0142", True),
        ("0.01…", "0.0242", False),
        ("a b", "a b c", False),
        ("error 2.5e-02", "error 2.6e-02", True),
        ("error 2.5e-02", "error 2.7e-02", False),
        ("error 1.3e-15", "error 6.0e-16", True),
        ("error 1.3e-15", "error 6.0e-06", False),
        ("10 HVPs", "11 HVPs", False),
        ("0.9998", "-0.9998", False),
    ],
)
def test_outputs_are_compared_word_by_word(shown, got, agree):
    assert matches(shown, got) is agree


def test_the_readme_is_readable_at_80_columns():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > 80] == []


LONG = re.compile(r"from bilevel\.(\w+)\.\w+ import (\w[\w, ]*)")


def long_imports(text):
    """Names that are imported from their file where their folder offers them."""
    found = []
    for folder, names in LONG.findall(text):
        offered = getattr(importlib.import_module(f"bilevel.{folder}"), "__all__", ())
        found += [name for name in names.split(", ") if name in offered]
    return found


def test_pages_and_docstrings_import_as_users_do():
    written = [*EXECUTED, *DOCS.rglob("*.py"), *(ROOT / "tests" / "third_party").rglob("*.py")]
    found = {path.name: long_imports(path.read_text(encoding="utf-8")) for path in written}
    for path in [*(ROOT / "bilevel").rglob("*.py"), *(ROOT / "problems").rglob("*.py")]:
        lines = [line for line in path.read_text().splitlines() if ">>>" in line]
        found[str(path)] = long_imports("\n".join(lines))
    assert {path: names for path, names in found.items() if names} == {}
    assert long_imports(">>> from bilevel.linear.cg import CG, ritz") == ["CG"]


def test_nothing_is_left_out_without_need():
    shown = [
        command
        for page in EXECUTED
        for block in blocks(page)
        if block.kind == "console"
        for command, _ in commands(block.text)
    ]
    for start in NOT_RUN:
        if "mllm_hft" not in start:
            assert any(command.startswith(start) for command in shown), f"{start!r} is not shown"


def slug(heading):
    """The anchor that both GitHub and MyST give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(page):
    found = tokens(page.read_text(encoding="utf-8"))
    headings = [after for at, after in itertools.pairwise(found) if at.type == "heading_open"]
    return {slug("".join(part.content for part in h.children or [])) for h in headings}


def broken_links(page):
    text = page.read_text(encoding="utf-8")
    for token in tokens(text):
        for part in token.children or []:
            href = str(part.attrs.get("href", ""))
            if part.type != "link_open" or re.match(r"\w+:", href):
                continue
            path, _, anchor = href.partition("#")
            target = (page.parent / path).resolve() if path else page
            if not target.exists() or (anchor and slug(anchor) not in anchors(target)):
                yield href


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert not list(broken_links(page))


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Here\n\n[a](#here) [b](#there) [c](gone.md) [d](page.md#here)\n")
    assert list(broken_links(page)) == ["#there", "gone.md"]


PLACES = {
    "estimators": "estimators",
    "linear": "estimators",
    "lower": "lower",
    "optimizers": "lower",
    "problems": "recipes",
    "sinks": "recipes",
    "mllm_sources": "mllm_hft",
    "mllm_encoders": "mllm_hft",
    "mllm_models": "mllm_hft",
}


def unmentioned(points):
    """Registered names that the page of their group does not mention as `name`."""
    for group, names in points.items():
        kind = group.removeprefix("bilevel.")
        place = PLACES.get(kind, "estimators")
        pages = [DOCS / f"{place}.md", *sorted((DOCS / place).glob("*.md"))]
        text = "".join(page.read_text(encoding="utf-8") for page in pages)
        yield from (f"{kind}/{name}" for name in names if f"`{name}`" not in text)


def registered():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["entry-points"]


def test_every_component_is_on_its_page():
    assert not list(unmentioned(registered()))
    assert not list(unmentioned({group: presets.of(group) for group in ("estimators", "linear")}))


def test_a_component_on_no_page_is_found():
    points = {"bilevel.linear": {"cg": "", "forgotten": ""}}
    assert list(unmentioned(points)) == ["linear/forgotten"]


def with_examples():
    """Modules of the package whose docstrings hold examples."""
    for path in sorted((ROOT / "bilevel").rglob("*.py")):
        if ">>> " in path.read_text(encoding="utf-8"):
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("name", list(with_examples()))
def test_examples_in_docstrings(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted
    assert not result.failed


def test_a_wrong_example_is_found():
    examples = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    runner = doctest.DocTestRunner(verbose=False)
    assert runner.run(examples, out=lambda text: None).failed == 1
