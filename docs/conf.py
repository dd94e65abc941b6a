"""The site: built strictly and offline, from Markdown and docstrings."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bilevel

if TYPE_CHECKING:
    from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent.parent))  # for docs.mathml

project = "bilevel"
author = "The bilevel developers"
copyright = author
release = bilevel.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "docs.mathml"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"bilevel {release}"
html_show_sphinx = False
html_show_sourcelink = False
html_copy_source = False
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["site.css"]
templates_path = ["_templates"]
html_context = {
    "versions": os.environ.get("BILEVEL_DOCS_VERSIONS", "").split()
}  # see docs.versions
html_sidebars = {
    "**": [
        "sidebar/brand.html",
        "sidebar/search.html",
        "sidebar/scroll-start.html",
        "sidebar/navigation.html",
        "versions.html",
        "sidebar/scroll-end.html",
    ]
}

myst_enable_extensions = ["dollarmath"]
myst_update_mathjax = False  # there is none
myst_heading_anchors = 3
nb_execution_mode = "off"  # their outputs are kept, and a test compares them

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80

# Types of other packages: an inventory of theirs would have to be fetched from the network.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|collections|pathlib|pydantic|annotated_types)\..*"),
    # pydantic's, by their short names; parts of types that were taken apart at a comma; aliases
    (r"py:.*", r"(NonNegative|Positive)(Int|Float)|dict\[str|ValidationError"),
    (r"py:.*", r"(typing\.|Annotated\[)?Literal\[.*"),
    (
        r"py:.*",
        r"Start|Params|Direction|tuple\[.*|BeforeValidator|PydanticUndefined|_autocast|Folder",
    ),
    # of runs over several ranks, not offered to users
    (r"py:class", r"bilevel\.(ranks\.Ranks|problem\.over_tasks\.SomeTasks)"),
    # the type of a documented field that holds another component: Annotated[…, Slot("group")]
    (r"py:class", r"bilevel\.(types\.Annotated|components\.Slot)|preconditioners"),
    (
        r"py:.*",
        r"bilevel\.((types|components)\.C|run\.options\._(device|autocast|teams)|sinks\.mlflow\._without_password)",
    ),  # a type variable, validators
]

_ANNOTATED = re.compile(r"Annotated\[([^\[\]]+), \w+\([^()]*\)\]")
_SECTION = re.compile(r"^(Args|Returns|Raises):$")
_ENTRY = re.compile(r"^    (\w+): (.*)$")
_FIELDS = {"Args": "param", "Raises": "raises"}


def to_rst(lines: list[str]) -> list[str]:
    """A docstring of ours as reStructuredText: sections as fields, backticks as code."""
    found: list[str] = []
    section = ""
    for line in lines:
        if match := _SECTION.match(line):
            section = match[1]
            found += [":returns:"] if section == "Returns" else []
        elif section in _FIELDS and (entry := _ENTRY.match(line)):
            found.append(f":{_FIELDS[section]} {entry[1]}: {entry[2]}")
        else:
            section = section if line.startswith(" ") or not line else ""
            found.append(line)
    return [_code(line) for line in found]


def _code(line: str) -> str:
    """`x` as literal text, also where a letter follows it, as in `x`s."""
    if line.lstrip().startswith((">>>", "...")):
        return line
    line = re.sub(
        r"(?<!`)`([^`]+)`(\w?)", lambda m: f"``{m[1]}``" + (rf"\ {m[2]}" if m[2] else ""), line
    )
    # |y| outside of code would be a substitution
    parts = re.split(r"(``.+?``)", line)
    return "".join(p if p.startswith("``") else p.replace("|", r"\|") for p in parts)


def _process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = to_rst(lines)


def _shorten(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str, returns: str
) -> tuple[str, str] | None:
    """`Annotated[LinearSolver, Slot("linear")]` as the type alone."""
    return (_ANNOTATED.sub(r"\1", signature), returns) if signature else None


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-signature", _shorten)
    app.connect("autodoc-process-docstring", _process)
