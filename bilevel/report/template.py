"""Templates of pages: charts and scripts inlined, so that a page is one file that requests nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def fill(template: str, specs: Sequence[dict[str, Any]], **values: Any) -> str:
    """The page that a template makes of `values`; `specs[i]` is drawn in its element `chart<i>`."""
    environment = Environment(
        loader=PackageLoader("bilevel", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(
        values,
        specs=Markup(_script(specs)),
        vega=Markup(_vega() if specs else ""),
    )


@cache
def _vega() -> str:
    """What draws charts, bundled; it takes two seconds to make."""
    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return bundle.replace("</script", "<\\/script")


def _script(value: Any) -> str:
    """JSON that may stand inside a script element."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")
