"""Names of components, found without importing them, and components made of names and options.

`entries` finds registered components and those in files; `presets` are names for a component with
options (`presets.toml`); `exports` offers the classes in the folder of their group, imported when
used; `source_docs` reads docstrings and options from source. `fields` and `build` make components
of plain data, `diagnostics` collects all that is wrong with it. Nothing here imports torch.
"""

from bilevel.errors import unknown
from bilevel.registry.entries import (
    FILE,
    MODULE,
    Entry,
    absolute,
    entries,
    extra_for,
    extras,
    find,
    foreign,
    groups,
    kind,
    name_of,
    names,
    references,
    remedy_for,
)

__all__ = [
    "FILE",
    "MODULE",
    "Entry",
    "absolute",
    "entries",
    "extra_for",
    "extras",
    "find",
    "foreign",
    "groups",
    "kind",
    "name_of",
    "names",
    "references",
    "remedy_for",
    "unknown",
]
