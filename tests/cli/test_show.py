"""`show`: a component or a recipe."""

import io
import re

import pytest
from rich.console import Console

from bilevel import recipe as recipes
from bilevel import registry
from bilevel.cli.docstrings import wrapped
from bilevel.cli.names import shipped
from bilevel.cli.show import show
from bilevel.registry import presets
from tests.cli.commands import invoke


def test_show_tells_the_options_of_a_component():
    text = invoke("show", "implicit").output
    assert re.search(r"damping +0.0 +NonNegativeFloat", text)
    assert "bilevel ls linear" in text
    assert "arXiv:1602.02355" in text
    assert "Literal['cold', 'warm', 'linear', 'galerkin']" in text
    assert re.search(
        r"^preconditioner +None +one of: bilevel ls preconditioners \| None", text, re.M
    )
    raised = text.partition("Raises:\n")[2].partition("\n\n")[0].splitlines()
    assert {len(line) - len(line.lstrip()) for line in raised} == {4, 8}
    assert "bilevel show quadratic.yaml" in invoke("show", "quadratic").output
    assert "Did you mean 'implicit'" in invoke("show", "implict", code=2).stderr
    assert invoke("show", "linear/cg").output != invoke("show", "optimizers/sgd").output


def test_show_a_recipe_as_written_and_resolved():
    assert invoke("show", "ridge.yaml").output.startswith("# One ridge penalty")
    resolved = invoke("show", "ridge.yaml", "--resolved").output
    assert recipes.loads(resolved) == recipes.load(shipped()["ridge"])


WIDTHS = (60, 80)


def shown(name: str, width: int) -> list[str]:
    stream = io.StringIO()
    show(Console(file=stream, width=width), name)
    return [line.rstrip() for line in stream.getvalue().splitlines()]


@pytest.mark.parametrize("width", WIDTHS)
def test_an_item_of_a_list_goes_on_below_its_text(width):
    lines = shown("cg", width)
    begun = [number for number, line in enumerate(lines) if re.match(r"\d\. ", line)]
    assert [lines[number][:3] for number in begun] == ["1. ", "2. ", "3. ", "4. "]
    listed = lines[begun[0] : lines.index("", begun[0])]
    below = [line for line in listed if not re.match(r"\d\. ", line)]
    assert below
    assert all(re.match(r"   \S", line) for line in below), "indented as the text of its item"
    assert all(len(line) > width // 2 for line in below[:2]), "no line is left half empty"


@pytest.mark.parametrize("width", WIDTHS)
def test_a_line_that_is_set_off_stays_so_where_it_is_too_long(width):
    lines = shown("problems/hyper_cleaning", width)
    at = next(number for number, line in enumerate(lines) if line.startswith("    G(x, y)"))
    formulas = lines[at : lines.index("", at)]
    assert all(line.startswith("    ") for line in formulas)
    assert "    F(y) = mean CE on clean data" in formulas, "each formula on a line of its own"
    assert "alg. 1. The methods" in " ".join(shown("single_loop", width)), "no item within a text"


@pytest.mark.parametrize("width", WIDTHS)
def test_no_page_is_wider_than_the_terminal(width):
    for group in registry.groups():
        for name in (*registry.names(group), *presets.of(group)):
            _, *lines = shown(f"{group}/{name}", width)
            wide = [line for line in lines if len(line) > width and "Its options:" not in line]
            assert not wide, (name, wide)


def test_lines_of_lists_and_paragraphs_are_joined_and_wrapped_anew():
    doc = "- one\n  more\n- two\n\nText\n1. of it.\n\nRaises:\n    E: why\n        so.\n    F: not."
    assert wrapped(doc, 80) == [
        "- one more",
        "- two",
        "",
        "Text 1. of it.",
        "",
        "Raises:",
        "    E: why so.",
        "    F: not.",
    ]
    assert wrapped(doc, 11)[0:3] == ["- one more", "- two", ""]
    assert "        so." in wrapped(doc, 11)
    assert wrapped("a b", 0) == ["a", "b"]
