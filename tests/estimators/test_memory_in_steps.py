"""How what is alive at once grows with the number of lower steps K: counted, not timed or sampled."""

import gc

import pytest
import torch

from bilevel import hypergradient
from bilevel.estimators.forward import Forward
from bilevel.estimators.unroll import Unroll
from bilevel.optimizers.differentiable import SGD
from bilevel.types import LowerSolution, Path

SIZE = 1009
VECTOR = 8 * SIZE


class Kept:
    """What autograd saved, where the garbage collector sees it."""

    def __init__(self, value):
        self.value = value


def alive():
    """Bytes in the distinct memories of all tensors whose last dimension is that of y."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) is torch.Tensor and thing.dim() and thing.shape[-1] == SIZE:
            memory = thing.untyped_storage()
            found[memory.data_ptr()] = memory.nbytes()
    return sum(found.values())


def peak(estimator, K):
    """The most that is alive at an evaluation of G, in vectors of the size of y."""
    most = [0]

    def G(x, y, batch):
        most[0] = max(most[0], alive())
        # powers save what they are taken of; exp would save its result, and so keep itself alive
        return (0.1 * y["y"].pow(3) + y["y"].square() - x["x"] * y["y"]).sum()

    def F(x, y, batch):
        return y["y"].square().sum()

    x, y = (
        {"x": torch.tensor(0.3, dtype=torch.float64)},
        {"y": torch.zeros(SIZE, dtype=torch.float64)},
    )
    path = Path(SGD(lr=0.1), y, {}, (None,) * K)
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.value):
        hypergradient(F, G, x, LowerSolution(y, path=path), estimator=estimator)
    return most[0] / VECTOR


def growth(estimator, few=16, many=64):
    gc.collect()
    gc.freeze()  # so that looking at what is new takes no time
    try:
        return peak(estimator, many) - peak(estimator, few)
    finally:
        gc.unfreeze()


@pytest.mark.parametrize(
    ("estimator", "least", "most"),
    [
        (Unroll(), 1.5 * 48, 20 * 48),  # a graph a step
        (Unroll(memory="recompute"), 48, 48),  # an iterate a step
        (Unroll(memory="checkpoint"), 4, 8),  # √64 − √16 starts of segments, and one segment's
        (Forward(), 0, 0),
    ],
    ids=["store", "recompute", "checkpoint", "forward"],
)
def test_what_is_kept_grows_as_it_is_said_to(estimator, least, most):
    assert least <= growth(estimator) <= most
