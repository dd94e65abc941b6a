"""Whether a state that is handed in belongs to the variables that it is to go on with."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bilevel.errors import ProblemError
from bilevel.types import Params

FACTORED = ("row_var", "col_var")
"""What torch's Adafactor keeps in shapes other than the parameter's."""


def require_state(state: Any, params: Params, what: str) -> None:
    """Raise `ProblemError` if a tensor kept for a variable has another shape than the variable.

    Trees keyed as `params` are looked at, and an optimizer's entries for each of its names, however
    deep in dicts and lists; torch would broadcast a momentum of shape (1, 3) into a variable of shape (3,).
    """
    if isinstance(state, list):
        state = dict(enumerate(state))
    if not isinstance(state, dict):
        return
    if state.keys() == params.keys():
        for name, entry in params.items():
            for kept in _kept(state[name]):
                if kept.shape != entry.shape:
                    raise ProblemError(
                        f"{what} is of another problem: it holds {name!r} in shape "
                        f"{tuple(kept.shape)}, expected {tuple(entry.shape)}; pass state=None where "
                        "the variables have changed"
                    )
        return
    for part in state.values():
        require_state(part, params, what)


def _kept(entry: Any) -> list[Tensor]:
    """The tensors kept for one variable; counters have no shape."""
    if isinstance(entry, dict):
        return [
            value
            for key, value in entry.items()
            if isinstance(value, Tensor) and value.dim() and key not in FACTORED
        ]
    return [entry] if isinstance(entry, Tensor) else []
