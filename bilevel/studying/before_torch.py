"""What of a study's file must be known before torch is imported; imports no torch."""

import sys
from contextlib import suppress
from pathlib import Path
from typing import get_args

from bilevel.errors import RecipeError
from bilevel.recipe.yaml_source import parse
from bilevel.runfolder import arithmetic


def choose_arithmetic(path: Path) -> None:
    """Ask for the study's `arithmetic`. What is wrong with the file, or comes too late, is said when it is read."""
    if "torch" in sys.modules:
        return
    with suppress(OSError, UnicodeError, RecipeError):
        wanted = parse(path.read_text(encoding="utf-8"), str(path)).data.get("arithmetic")
        for known in get_args(arithmetic.Instructions):
            if isinstance(wanted, dict) and wanted.get("instructions") == known:
                arithmetic.ask_for(known)
