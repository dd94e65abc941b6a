"""A batch that is written into after it was drawn is refused: steps that are kept would be of another one."""

import itertools

import pytest
import torch

import bilevel
from bilevel.errors import ProblemError
from bilevel.lower.gradient import Gradient
from bilevel.problem.unwritten import LOOKED_AT
from tests.problem.squares import X, Y

STEPS = Gradient(steps=3)
REFUSED = r"batches.*: drawing a batch wrote into one that was drawn before.*batch\.clone\(\)"


def upper(x, y, batch):
    return (y["y"] - batch).square().sum()


def lower(x, y, batch):
    return (y["y"] - x["x"] * batch).square().sum()


def buffers(number, copied=False):
    """Batches 1, 2, 3, … that share so many buffers."""
    kept = [torch.zeros(3, dtype=torch.float64) for _ in range(number)]
    for step in itertools.count(1):
        filled = kept[step % number].fill_(step)
        yield filled.clone() if copied else filled


def in_numpy():
    """numpy counts no writes, so that autograd does not see them."""
    buffer = torch.zeros(3, dtype=torch.float64)
    for step in itertools.count(1):
        buffer.numpy()[:] = step
        yield {"a": [buffer]}["a"][0]


class Buffered:
    upper_loss, lower_loss = staticmethod(upper), staticmethod(lower)

    def __init__(self, make):
        self.make = make

    def init(self, streams):
        return X, Y

    def upper_batches(self, stream):
        return itertools.repeat(torch.ones(3))

    def lower_batches(self, stream):
        return self.make()


MAKERS = [lambda: buffers(1), lambda: buffers(LOOKED_AT - 1), in_numpy]


@pytest.mark.parametrize("make", MAKERS, ids=["one", "two", "numpy"])
def test_a_buffer_that_is_filled_again_is_refused(make):
    with pytest.raises(ProblemError, match=rf"lower\.{REFUSED}"):
        bilevel.minimize(Buffered(make), lower=STEPS, estimator="unroll", steps=4, dtype="float64")
    with pytest.raises(ProblemError, match=REFUSED):
        bilevel.solve_lower(lower, X, Y, solver=Gradient(steps=4), batches=make(), record=True)
    with pytest.raises(ProblemError, match=REFUSED):
        bilevel.unroll(lower, X, Y, steps=4, batches=make())


def test_copies_and_one_batch_for_all_steps_are_not():
    fresh = [torch.full((3,), float(step), dtype=torch.float64) for step in range(1, 13)]
    ends = [
        bilevel.minimize(
            Buffered(make), lower=STEPS, estimator="unroll", steps=4, dtype="float64"
        ).history
        for make in (lambda: buffers(1, copied=True), lambda: iter(fresh))
    ]
    assert [e.hypergradient_norm for e in ends[0]] == [e.hypergradient_norm for e in ends[1]]
    same = torch.tensor([1.0, float("nan"), 3.0])
    bilevel.minimize(Buffered(lambda: itertools.repeat(fresh[0])), lower=STEPS, steps=4)
    spoilt = bilevel.problem.unwritten.Unwritten("batches")
    for _ in range(2):  # NaN is NaN
        spoilt.look(same)


def test_batches_that_are_moved_to_the_runs_dtype_are_copies():
    minimize = bilevel.minimize(
        Buffered(lambda: buffers(1)), lower=STEPS, estimator="unroll", steps=4, dtype="float32"
    )
    assert len(minimize.history) == 4


def test_a_generator_of_the_caller_goes_on():
    """It was closed with the first call, and the second was told that it had ended."""
    batches = buffers(1, copied=True)
    for last in (3.0, 6.0):
        solved = bilevel.solve_lower(lower, X, Y, solver=STEPS, batches=batches)
        assert float(solved.batch[0]) == last
    bilevel.unroll(lower, X, Y, steps=2, batches=batches)
    assert float(next(batches)[0]) == 9.0


@pytest.mark.parametrize(
    "one", [torch.ones(2, 3), (torch.ones(3), torch.ones(3)), {"a": torch.ones(3)}], ids=type
)
def test_one_batch_is_no_iterator_of_batches(one):
    with pytest.raises(
        ProblemError, match=r"lower\.batches must be an iterator.*itertools\.repeat"
    ):
        bilevel.minimize(Buffered(lambda: one), lower=STEPS, steps=2)
