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
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx_inner
        from torch._inductor.decomposition import select_decomp_table
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.proxy_tensor import make_fx

    mode = FakeTensorMode()
    with torch.no_grad():
        table = {
            **select_decomp_table(),
            torch.ops.aten.mv.default: _matrix_vector,
            torch.ops.aten.mm.default: _matrix_matrix,
        }
        traced = make_fx(lambda *a: region(*a), decomposition_table=table)(*given)
        fake = [mode.from_tensor(one) for one in given]
        # a region is given what a replay or the region before it has looked at
        with tracing(TracingContext(mode)), mode, config.patch(size_asserts=False):
            made: Any = compile_fx_inner(traced, fake)
        made(list(given))  # a first call keeps what was tuned; later ones need not look for it
    return getattr(made, "current_callable", made)


MATRIX = 2**12
"""Numbers of a matrix from which on a product with it is left to BLAS."""


def _matrix_vector(a: Tensor, v: Tensor) -> Tensor:
    """A v. Where it is taken apart, as by default, sums in float64 take four times as long as in BLAS."""
    if a.dtype is torch.float64 and a.numel() >= MATRIX and a.stride(1) == 1:
        return torch.mm(a, v.unsqueeze(1)).squeeze(1)
    return (a * v).sum(1)


def _matrix_matrix(a: Tensor, b: Tensor) -> Tensor:
    """A B. Where one of them is a vector and the other is small, it goes with what stands around it."""
    if a.dtype not in (torch.float32, torch.float64) or max(a.numel(), b.numel()) >= MATRIX:
        return NotImplemented
    if a.shape[1] == 1:
        return a * b
    if b.shape[1] == 1:
        return (a * b.squeeze(1)).sum(1, keepdim=True)
    if a.shape[0] == 1:
        return (a.squeeze(0).unsqueeze(1) * b).sum(0, keepdim=True)
    return NotImplemented
