"""Components one import away: `from bilevel.linear import CG` imports `bilevel.linear.cg` then.

The names are those of the registry's table (entry points), so that a component is registered and
exported in one place. Importing a folder imports none of its components.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from importlib import import_module

from bilevel.registry.entries import references


def exports(
    folder: str, group: str | None = None, also: Mapping[str, str] | None = None
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of the package `folder`, with the classes that live below it.

    Args:
        folder: the `__name__` of the package.
        group: whose registered components are offered.
        also: names that are not registered, each with its module: {"Problem": "bilevel.problem.protocol"}.
    """

    @functools.cache
    def homes() -> dict[str, str]:
        found = dict(also or {})
        for reference in references(group).values() if group else ():
            module, _, name = reference.partition(":")
            if module.startswith(f"{folder}."):  # other packages' are imported from there
                found[name] = module
        return found

    def own() -> list[str]:
        defined = vars(sys.modules[folder]).items()
        return [name for name, value in defined if getattr(value, "__module__", None) == folder]

    def __getattr__(name: str) -> object:
        if name == "__all__":  # asked for by `from folder import *`
            return sorted({*homes(), *own()})
        if name.startswith("__") or name not in homes():
            message = f"module {folder!r} has no attribute {name!r}"
            raise AttributeError(message, name=name, obj=sys.modules[folder])
        found = getattr(import_module(homes()[name]), name)
        setattr(sys.modules[folder], name, found)
        return found

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[folder]), *homes()} - {"TYPE_CHECKING", "exports"})

    return __getattr__, __dir__
