"""Names of components, found without importing them. Nothing here imports torch.

`entries` finds registered components and those in files; `presets` are names for a component with
options (`presets.toml`); `exports` offers the classes in the folder of their group, imported when
used; `source_docs` reads docstrings and options from source.
"""

from bilevel.registry.entries import (
    FILE,
    MODULE,
    Entry,
    absolute,
    entries,
    extra_for,
    extras,
    find,
    groups,
    kind,
    name_of,
    names,
    references,
    unknown,
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
    "groups",
    "kind",
    "name_of",
    "names",
    "references",
    "unknown",
]
