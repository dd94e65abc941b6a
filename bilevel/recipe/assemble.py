"""From a recipe to a setup: the only place where the parts of a run are put together."""

from __future__ import annotations

import torch

from bilevel.errors import RequirementError
from bilevel.recipe.recipe import Recipe
from bilevel.run.engine import Setup

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def assemble(recipe: Recipe) -> Setup:
    """The setup that a recipe describes, on a device that this machine has.

    Raises `RequirementError` where it does not have it.
    """
    return Setup(
        problem=recipe.problem,
        lower=recipe.lower,
        upper=recipe.upper,
        estimator=recipe.estimator,
        name=recipe.name,
        seed=recipe.seed,
        device=device(recipe.runtime.device),
        dtype=DTYPES[recipe.runtime.dtype],
        evaluate_every=recipe.evaluate.every,
    )


def device(asked: str) -> torch.device:
    """The device called `asked`: auto, cpu, cuda, cuda:N or mps; auto never fails."""
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = asked.partition(":")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(index or 0) >= count:
            found = f"{count} CUDA device{'s' if count != 1 else ''}" if count else "no CUDA device"
            raise RequirementError(
                f"runtime.device = {asked!r}, but torch {torch.__version__} finds {found}; use "
                "runtime.device=auto, or install a torch build with CUDA (`bilevel doctor`)"
            )
        return torch.device("cuda", int(index or 0))
    if kind == "mps" and not torch.backends.mps.is_available():
        raise RequirementError(
            f"runtime.device = {asked!r}, but torch {torch.__version__} finds no Apple GPU; use "
            "runtime.device=auto"
        )
    return torch.device(asked)
