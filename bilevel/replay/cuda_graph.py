"""Regions of a record captured as CUDA graphs: the same kernels, launched by one call, to the same bits.

A graph reads and writes memory of its own. What a region is given is copied there first, but for
constants, which are read where they are; results are copied out of it, as the next replay writes over
them. A number on the CPU would be frozen in a graph, so operations with one are in no region.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx
from torch.fx import GraphModule

from bilevel.replay.regions import Called, is_tensor

Function = Callable[[], list[Tensor]]
Captured = tuple[list[Tensor], Callable[[], None]]
Capture = Callable[[Function, torch.device], Captured]
"""(a function of memory that stays, where) ↦ (its results, what computes them again in their place)."""


def on_device(function: Function, device: torch.device) -> Captured:
    """A `Capture` as a `torch.cuda.CUDAGraph`, after one run beside it, as libraries set up at their first call."""
    with torch.cuda.device(device):
        here, beside = torch.cuda.current_stream(), torch.cuda.Stream()
        beside.wait_stream(here)
        with torch.cuda.stream(beside):
            function()
        here.wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = function()
    return results, graph.replay


def by_cuda_graph(region: GraphModule, given: list[Tensor], capture: Capture = on_device) -> Called:
    """A region captured once, and replayed on what it is given."""
    placeholders = [node for node in region.graph.nodes if node.op == "placeholder"]
    stays = [node.meta.get("is_constant", False) for node in placeholders]
    own = [one if kept else one.clone() for one, kept in zip(given, stays, strict=True)]
    with torch.no_grad():
        where = next((one.device for one in own), torch.device("cuda"))
        results, replay = capture(lambda: list(region(*own)), where)

    def call(now: list[Tensor]) -> list[Tensor]:
        for target, one in zip(own, now, strict=True):
            if target is not one:  # what stays is read where it is
                target.copy_(one)
        replay()
        return [_copy(one) for one in results]

    return call


def _copy(result: Tensor) -> Tensor:
    """In a layout of its own that is the same, as of a slice; what repeats itself in memory no longer does."""
    if 0 in result.stride():
        return result.clone()
    shape, stride = result.shape, result.stride()
    copy = torch.empty_strided(shape, stride, dtype=result.dtype, device=result.device)
    return copy.copy_(result)


def is_on_device(node: fx.Node) -> bool:
    """Whether an operation has tensors of a CUDA device alone."""
    return is_tensor(node) and all(
        one.meta["device"].type == "cuda"
        for one in (node, *node.all_input_nodes)
        if "device" in one.meta
    )
