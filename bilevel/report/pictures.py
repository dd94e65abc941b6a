"""Figures of runs as data of a page, made smaller where they are more than a page has room for."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

ROOM = 1_200_000
"""Bytes of a page that figures may take: with scripts and charts it stays below 3 MB."""
WIDTHS = (1400, 1000, 700, 500, 350)
"""Widths in pixels, tried from the first on."""


def embedded(paths: Sequence[Path], room: int = ROOM) -> list[str | None]:
    """A data URI for each PNG; None for one that cannot be read or made small enough."""
    files = [_read(path) for path in paths]
    if sum(4 * len(file) // 3 for file in files if file) <= room:
        return [_uri(file, "png") if file else None for file in files]
    share = 3 * room // 4 // len(files)
    return [_smaller(file, share) if file else None for file in files]


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _smaller(file: bytes, size: int) -> str | None:
    if len(file) <= size:
        return _uri(file, "png")
    try:
        from PIL import Image  # comes with matplotlib

        picture = Image.open(io.BytesIO(file)).convert("RGBA")
    except (ImportError, OSError):  # no Pillow, or no picture
        return None
    paper = Image.new("RGB", picture.size, "white")
    paper.paste(picture, mask=picture)
    for width in WIDTHS:
        out = io.BytesIO()
        scaled = paper.copy()
        scaled.thumbnail((width, 4 * width))
        scaled.save(out, "webp", quality=80)
        if out.tell() <= size:
            return _uri(out.getvalue(), "webp")
    return None


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
