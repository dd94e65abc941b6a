"""Where a run is computed and in what precision, by name."""

from __future__ import annotations

import torch

from bilevel.errors import RecipeError, RequirementError
from bilevel.ranks import ALONE, Ranks

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def device(asked: str, option: str = "runtime.device", ranks: Ranks = ALONE) -> torch.device:
    """The device called `asked`: auto, cpu, cuda, cuda:N or mps; auto never fails.

    Of several ranks each has the CUDA device of its number on the machine.

    Raises:
        RequirementError: this machine does not have it; the message names `option`.
        RecipeError: several ranks would be on one device.
    """
    if ranks.size > 1 and (":" in asked or asked == "mps"):
        raise RecipeError(
            f"{option} = {asked!r} is one device, and there are {ranks.size} ranks; set {option}="
            "cuda, which gives each the device of its number, or cpu, or take one rank"
        )
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = asked.partition(":")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        number = int(index or ranks.local)
        if number >= count:
            found = f"{count} CUDA device{'s' if count != 1 else ''}" if count else "no CUDA device"
            at = "" if ranks.size == 1 else f" for rank {ranks.local} of this machine"
            raise RequirementError(
                f"{option} = {asked!r}{at}, but torch {torch.__version__} finds {found}; use "
                f"{option}=auto, or install a torch build with CUDA (`bilevel doctor`)"
            )
        return torch.device("cuda", number)
    if kind == "mps" and not torch.backends.mps.is_available():
        raise RequirementError(
            f"{option} = {asked!r}, but torch {torch.__version__} finds no Apple GPU; use "
            f"{option}=auto"
        )
    return torch.device(asked)
