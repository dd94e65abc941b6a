"""Bilevel optimization in PyTorch: hypergradients that come with their evidence.

Names are imported on first use, so that `import bilevel` (and the command line's help) does not
load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bilevel.components import component as component
    from bilevel.errors import BilevelError as BilevelError
    from bilevel.functional import hypergradient as hypergradient
    from bilevel.functional import solve_lower as solve_lower
    from bilevel.functional import unroll as unroll
    from bilevel.run.minimize import iterate as iterate
    from bilevel.run.minimize import minimize as minimize

__version__ = "0.1.0"

_HOMES = {
    "BilevelError": "errors",
    "component": "components",
    "hypergradient": "functional",
    "iterate": "run.minimize",
    "minimize": "run.minimize",
    "solve_lower": "functional",
    "unroll": "functional",
}
__all__ = [
    "BilevelError",
    "__version__",
    "component",
    "hypergradient",
    "iterate",
    "minimize",
    "solve_lower",
    "unroll",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'bilevel' has no attribute {name!r}")
    return getattr(import_module(f"bilevel.{_HOMES[name]}"), name)
