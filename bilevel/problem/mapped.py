"""Problems that are made of another problem: each of its optional methods is mapped, or refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bilevel.problem.answers import answered
from bilevel.problem.protocol import OPTIONAL

Maps = Mapping[str, Callable[[Any, Any], Any] | str]
"""By optional method: (the outer problem, the inner method) ↦ the outer method; or why there is none."""


def keep(outer: Any, method: Any) -> Any:
    """The inner method as it is."""
    return method


def refuse_unmapped(outer: Any, inner: Any, maps: Maps) -> None:
    """Raise `ValueError` if the inner problem has an optional method that cannot be mapped."""
    for name in OPTIONAL:
        how = maps[name]
        if isinstance(how, str) and getattr(inner, name, None) is not None:
            kind = type(inner).__name__
            raise ValueError(
                f"{kind} has {name}, which {type(outer).__name__} cannot take over: {how}"
            )


def mapped(outer: Any, inner: Any, maps: Maps, name: str) -> Any:
    """The optional method `name` of a problem made of `inner`; for its `__getattr__`.

    Raises:
        AttributeError: the inner problem has none, so that the outer one has none either.
    """
    how = maps.get(name)
    if how is None or isinstance(how, str) or getattr(inner, name, None) is None:
        raise AttributeError(name)
    return how(outer, answered(inner, name))
