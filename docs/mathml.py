"""Formulas of the site as MathML, which browsers draw themselves: no script, no font, no request.

docutils converts the LaTeX when the site is built; what it does not know is a warning, and the
strict build fails.
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

_BARE = re.compile(r"(\\[dt]?frac)\s*(\w)\s*(\w)")


def mathml(latex: str, *, block: bool) -> str:
    """One formula.

    Raises:
        MathError: docutils does not know a command in it.
    """
    # docutils reads `\tfrac12 y` as 12 over y
    found = tex2mathml(_BARE.sub(r"\1{\2}{\3}", latex), as_block=block)
    # a norm's opening bar would stretch beside a fraction, its closing one, with its power, would not
    return re.sub(r"<mo([^>]*)>‖</mo>", r'<mo\1 stretchy="false">‖</mo>', found)


def _convert(node: nodes.Element, *, block: bool) -> str:
    try:
        return mathml(node.astext(), block=block)
    except MathError as error:
        logging.getLogger(__name__).warning("%s", error, location=node)
        return ""


def _inline(translator: Any, node: nodes.Element) -> None:
    translator.body.append(_convert(node, block=False))
    raise nodes.SkipNode


def _block(translator: Any, node: nodes.Element) -> None:
    # a scroll bar of its own where the screen is narrow, which the keyboard reaches
    formula = _convert(node, block=True)
    translator.body.append(f'<div class="formula" tabindex="0">{formula}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
