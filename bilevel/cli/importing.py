"""The imports of a command that computes, without Python's looks for garbage that they cannot leave.

torch alone makes half a million objects: a sixth of its import is spent on looking through them, and a
third of what `bilevel validate` takes on doing so again, several times, when the process ends.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from bilevel.cli.options import settings


@contextmanager
def importing() -> Iterator[None]:
    """Collect no garbage within; of a process that is this command, never look at what is there by now.

    What is made afterwards, by a problem's own code say, is collected as ever.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
        if settings.is_whole_process:
            gc.freeze()
