"""Named presets: methods of the literature that are a known component with options.

`estimator: {name: darts, lr: 0.1}` is the component that the preset stands for, with the
preset's options and those given here over them. The table is `presets.toml`.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A name, what it stands for in words, and the plain data that builds it."""

    name: str
    about: str
    spec: Mapping[str, Any]


def of(group: str) -> Mapping[str, Preset]:
    """The presets of a group of components, by name."""
    return {name: Preset(name, **entry) for name, entry in _table().get(group, {}).items()}


@functools.cache
def _table() -> Mapping[str, Mapping[str, Any]]:
    text = resources.files("bilevel.registry").joinpath("presets.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)
