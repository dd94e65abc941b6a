"""Tensor operations, and calls of Python functions of this package: what work costs, and not how long."""

import sys
from collections import Counter
from pathlib import Path

from torch.utils._python_dispatch import TorchDispatchMode

import bilevel

PACKAGE = str(Path(bilevel.__file__).parent)


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def operations(call):
    with Operations() as counter:
        call()
    return counter.found


def own_calls(call):
    """Python functions of this package that a call enters."""
    found = 0

    def note(frame, event, _):
        nonlocal found
        found += event == "call" and frame.f_code.co_filename.startswith(PACKAGE)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found
