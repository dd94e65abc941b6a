"""Where a run is computed and in what precision, by name."""

from __future__ import annotations

import torch

from bilevel.errors import RecipeError, RequirementError

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def device(asked: str, option: str = "runtime.device") -> torch.device:
    """The device called `asked`: auto, cpu, cuda, cuda:N or mps; auto never fails.

    Raises:
        RequirementError: this machine does not have it; the message names `option`.
    """
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = asked.partition(":")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(index or 0) >= count:
            found = f"{count} CUDA device{'s' if count != 1 else ''}" if count else "no CUDA device"
            raise RequirementError(
                f"{option} = {asked!r}, but torch {torch.__version__} finds {found}; use "
                f"{option}=auto, or install a torch build with CUDA (`bilevel doctor`)"
            )
        return torch.device("cuda", int(index or 0))
    if kind == "mps" and not torch.backends.mps.is_available():
        raise RequirementError(
            f"{option} = {asked!r}, but torch {torch.__version__} finds no Apple GPU; use "
            f"{option}=auto"
        )
    return torch.device(asked)


def dtype(asked: str) -> torch.dtype:
    """The dtype called `asked`. Raises `RecipeError` for one that runs are not made in."""
    if asked not in DTYPES:
        raise RecipeError(f"dtype = {asked!r}; must be one of {', '.join(DTYPES)}")
    return DTYPES[asked]


def autocast(asked: str | None) -> torch.dtype | None:
    """The dtype for products. Raises `RecipeError` for one that losses are not evaluated in."""
    if asked not in (None, "bfloat16"):
        raise RecipeError(
            f"autocast = {asked!r}; must be 'bfloat16' or None: float16 would need scaled losses"
        )
    return asked and torch.bfloat16
