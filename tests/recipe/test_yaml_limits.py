"""YAML that would construct, hang or fill the memory: one `RecipeError` each, with its line."""

import re
from itertools import pairwise
from pathlib import Path

import pytest

from bilevel import recipe as recipes
from bilevel.errors import RecipeError
from bilevel.recipe import yaml_limits, yaml_source
from bilevel.registry import diagnostics
from tests.cli.commands import invoke

SECTION = "problem: quadratic\n"


def bomb(levels: int, width: int = 9) -> str:
    """Aliases of aliases: width ** levels values in a few hundred characters."""
    names = [f"a{level}" for level in range(levels)]
    lines = [f"a0: &a0 [{', '.join(['x'] * width)}]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * width)}]" for a, b in pairwise(names)]
    return "\n".join(lines) + "\n"


REFUSED = {
    "version": ("%YAML 1.3\n---\na: 1", 1, "recipes are YAML 1.2"),
    "older version": ("%YAML 1.1\n---\na: no", 1, "recipes are YAML 1.2"),
    "ordered map": ("!!omap 3", 1, "a tag"),
    "tagged integer": ("a: 1\nseed: !!int x", 2, "a tag"),
    "tagged float": ("a: !!float x", 1, "a tag"),
    "tagged boolean": ("a: !!bool x", 1, "a tag"),
    "object": ("a: !!python/object:os.system x", 1, "a tag"),
    "date": ("a: 1\nseed: 2001-13-45", 2, "month must be in 1..12"),
    "digits": (f"a: 1\nseed: {'9' * 5000}", 2, "cannot be read"),
    "hexadecimal": (f"seed: 0x{'f' * 5000}", 1, "more than 63 bits"),
    "maps": ("{a: " * 300 + "1" + "}" * 300, 1, "in one another"),
    "lists": ("a: " + "[" * 3000 + "]" * 3000, 1, "in one another"),
    "blocks": ("".join(f"{' ' * n}a:\n" for n in range(60)), 51, "in one another"),
    "bomb": (bomb(40), 4, "aliases repeat"),
    "cycle": ("a: &a [*a]", 1, "inside of what it repeats"),
    "values": ("a:\n" + "- 1\n" * 6000, yaml_limits.VALUES - 1, "values"),
    "characters": ("a: 1\n" * 100_000, 40_001, "characters"),
    "control": ("a: 1\nb: \0", 2, "is not allowed"),
}


@pytest.mark.parametrize(("text", "line", "message"), REFUSED.values(), ids=REFUSED)
def test_a_text_is_refused_with_its_line(text, line, message):
    with pytest.raises(RecipeError, match=rf"^r\.yaml:{line}: .*{re.escape(message)}"):
        yaml_source.parse(text, "r.yaml")


def test_what_is_just_allowed_is_read():  # negative control
    deep = "a: " + "[" * (yaml_limits.DEPTH - 1) + "]" * (yaml_limits.DEPTH - 1)
    assert yaml_source.parse(deep, "r").data["a"] != []
    many = yaml_source.parse("a: [" + "1, " * (yaml_limits.VALUES - 3) + "]", "r").data["a"]
    assert many == [1] * (yaml_limits.VALUES - 3)
    assert yaml_source.parse("%YAML 1.2\n---\na: no", "r").data == {"a": "no"}
    assert yaml_source.parse(f"a: {2**63 - 1}", "r").data == {"a": 2**63 - 1}
    assert yaml_source.parse("a: &x [1]\nb: *x", "r").data == {"a": [1], "b": [1]}
    assert len(yaml_source.parse(bomb(3), "r").data["a2"][0][0]) == 9


OVERRIDES = [
    "sinks.²=jsonl",
    "sinks.٣=jsonl",
    f"sinks.{'9' * 5000}=jsonl",
    f"{'a.' * 1000}b=1",
    "seed=!!int x",
    "seed=2001-13-45",
    "seed=&a [*a]",
    f"seed={'9' * 5000}",
]


@pytest.mark.parametrize("assignment", OVERRIDES, ids=lambda text: text[:12])
def test_an_override_is_refused_in_one_readable_line(assignment):
    with pytest.raises(RecipeError) as found:
        recipes.loads("problem: quadratic\nsinks: [jsonl, rows]\n", [assignment])
    assert str(found.value).startswith("override '")
    assert len(str(found.value)) < 400


COMPONENTS = {
    "a long name": (f"problem: {'q' * 150_000}", "must be a name"),
    "a long file": (f"problem: {'q' * 500}.py:X", "File name too long"),
    "a user that is not": ("problem: ~no_such_user/x.py:X", "home directory"),
    "many packages": (f"problem: {'a.' * 450}b:X", "unknown problem"),
    "an empty part": ("problem: a..b:X", "unknown problem"),
    "a builtin": ("problem: builtins:dict", "dict is not a component"),
}


@pytest.mark.parametrize(("text", "message"), COMPONENTS.values(), ids=COMPONENTS)
def test_a_name_that_names_nothing_is_refused(text, message):
    with pytest.raises(RecipeError, match=rf"(?s)^recipe:1: problem.*{message}"):
        recipes.loads(text)


def test_a_file_name_too_long_in_an_override_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="File name too long"):
        recipes.loads("problem: quadratic\n", [f"problem={'q' * 500}.py:X"], base=tmp_path)


def test_as_many_sinks_as_anyone_has_use_for():
    with pytest.raises(RecipeError, match=r"^recipe:2: sinks: 21 of them; at most 20$"):
        recipes.loads(f"{SECTION}sinks: [{', '.join(['jsonl'] * 21)}]")
    assert len(recipes.loads(f"{SECTION}sinks: [{', '.join(['jsonl'] * 20)}]").sinks) == 20


def test_a_page_of_errors_is_shown_and_the_rest_counted():
    keys = "".join(f"k{n}: 1\n" for n in range(diagnostics.MOST + 7))
    with pytest.raises(RecipeError) as found:
        recipes.loads(SECTION + keys)
    lines = str(found.value).split("\n")
    assert lines[0] == f"recipe: {diagnostics.MOST + 7} errors"
    assert lines[-2].startswith(
        f"  recipe:{diagnostics.MOST + 1}: k{diagnostics.MOST - 1}: unknown"
    )
    assert lines[-1] == "  … and 7 more"


def test_a_file_without_an_end_is_not_read_to_it(tmp_path: Path):
    endless = tmp_path / "endless.yaml"
    endless.symlink_to("/dev/zero")
    with pytest.raises(RecipeError, match="characters"):
        recipes.load(endless)


def test_the_command_line_says_it_and_exits_with_2(tmp_path: Path):
    path = tmp_path / "r.yaml"
    path.write_text(SECTION + bomb(40))
    result = invoke("validate", path, code=2)
    assert result.stderr.startswith(f"error: {path}:5: ")
    assert len(result.stderr.splitlines()) == 1
