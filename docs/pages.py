"""Parts of pages that a command writes: what stands between `<!-- name -->` and `<!-- /name -->`."""

from __future__ import annotations

import re


def put(text: str, name: str, part: str) -> str:
    """The page's text with `part` between the markers of that name.

    Raises:
        ValueError: the page has no such markers.
    """
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    new, found = re.subn(pattern, lambda m: f"{m[1]}\n{part}\n\n{m[2]}", text, flags=re.DOTALL)
    if not found:
        raise ValueError(f"no markers <!-- {name} --> … <!-- /{name} -->")
    return new
