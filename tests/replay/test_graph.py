"""What is left of a recorded graph."""

from collections import Counter

import numpy as np
import torch

from bilevel.replay.program import Feed, record
from bilevel.replay.recorder import LARGE, Recorder


def left(function, size=3):
    """How often each operation stays, of a function of one vector, whose replay is its own."""
    x = torch.linspace(0.1, 1, size, dtype=torch.float64)
    found, program = record(lambda inputs, draws: function(inputs), x, Feed({}).iterators())
    assert torch.equal(program(x, Feed({})), found)
    targets = (n.target for n in program.graph.nodes if n.op == "call_function")
    return Counter(getattr(target, "__name__", str(target)) for target in targets)


def test_what_is_computed_twice_is_computed_once():
    assert left(lambda x: x.exp() * x.exp().detach()) == {"exp": 1, "mul": 1}
    # control: what is not the same is not
    assert left(lambda x: (x * 0.0) + (x * -0.0))["mul"] == 2
    assert left(lambda x: torch.pow(x, 2) + torch.pow(x, 2.0))["pow"] == 2


def test_large_tensors_are_computed_again():
    assert left(lambda x: x.exp() * x.exp(), size=LARGE) == {"exp": 2, "mul": 1}


def test_what_reads_memory_that_is_written_stays():
    def written(x):
        total = x.clone()
        first = total.exp()
        total.add_(1.0)
        return first + total.exp() + total.detach()

    assert left(written)["exp"] == 2


def test_what_nothing_needs_goes_and_what_is_fixed_is_kept():
    assert left(lambda x: (x.sin(), x + (torch.ones_like(x) * 2).neg())[1]) == {"add": 1}


def test_results_are_tensors_of_their_own():
    x = torch.ones(2)
    _, program = record(lambda x, _: [x.exp(), x.exp()], x, Feed({}).iterators())
    a, b = program(x, Feed({}))
    assert a.data_ptr() != b.data_ptr()


def test_a_vector_times_a_matrix_is_one_operation():
    A = torch.arange(6, dtype=torch.float64).reshape(3, 2)
    assert left(lambda x: x @ A) == {"matmul": 1}
    # control: a product with a row that somebody made is that of matrices
    assert left(lambda x: (x[None] @ A)[0])["mm"] == 1


def test_products_with_one_go_unless_they_are_somebody_s_own():
    assert left(lambda x: (x * torch.ones_like(x.sum())).exp() + (x * 2).exp()) == {
        "mul": 1,
        "exp": 2,
        "add": 1,
    }
    one = torch.ones((), dtype=torch.float64)
    assert left(lambda x: (x * one.new_ones(())).exp()) == {"exp": 1}
    # controls: a caller may write into a result; a number of another dtype, or another number, is none
    assert left(lambda x: x * torch.ones_like(one))["mul"] == 1
    assert left(lambda x: ((x > 0.5) * torch.ones_like(one)).exp())["mul"] == 1
    assert left(lambda x: (x * torch.full_like(one, 2.0)).exp())["mul"] == 1


def test_memory_that_is_taken_again_is_another():
    """Freed, and given to the next tensor: what was true of the first is not of the second."""
    recorder, memory = Recorder(), np.ones(3)
    seen, addresses = set(), set()
    for _ in range(5):
        here = torch.from_numpy(memory)
        seen.add(recorder._memory(here))
        # control: a part of it, or another tensor beside it, is of the same
        assert recorder._memory(here[1:]) == recorder._memory(here)
        assert recorder._memory(torch.from_numpy(memory)) == recorder._memory(here)
        addresses.add(here.data_ptr())
        del here
    assert len(addresses) == 1
    assert len(seen) == 5
