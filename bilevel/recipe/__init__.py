"""From YAML to the parts of a run. At package level nothing here imports torch.

`yaml_source` reads text and overrides; `recipe` is the checked whole, its components made by
`registry.build`; `assemble` puts a run together, the only place that does. Nothing here runs
anything.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bilevel.recipe.recipe import Recipe as Recipe
    from bilevel.recipe.recipe import load as load
    from bilevel.recipe.recipe import loads as loads
    from bilevel.recipe.recipe import read as read

_HOMES = {
    "Recipe": "recipe",
    "load": "recipe",
    "loads": "recipe",
    "read": "recipe",
}
__all__ = ["Recipe", "load", "loads", "read"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'bilevel.recipe' has no attribute {name!r}")
    return getattr(import_module(f"bilevel.recipe.{_HOMES[name]}"), name)
