"""Regions of a record compiled by TorchInductor: the same to rounding, in fewer calls.

Each becomes one function in C++ or of the device, which fuses operations: sums are taken in another
order, and so bits differ.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from bilevel.replay.regions import Called


def by_inductor(region: GraphModule, given: list[Tensor]) -> Called:
    """TorchInductor, on the operations that it knows and with no writes."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # that torch has of itself as it is imported
        from torch._guards import TracingContext, tracing
        from torch._inductor.compile_fx import compile_fx_inner
        from torch._inductor.decomposition import select_decomp_table
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.proxy_tensor import make_fx

    mode = FakeTensorMode()
    with torch.no_grad():
        traced = make_fx(lambda *a: region(*a), decomposition_table=select_decomp_table())(*given)
        fake = [mode.from_tensor(one) for one in given]
        with tracing(TracingContext(mode)), mode:
            made: Any = compile_fx_inner(traced, fake)
    return made
