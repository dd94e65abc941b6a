"""A step recorded and replayed: what is followed, what departs, and what is refused."""

import itertools
import math

import pytest
import torch

from bilevel import tree
from bilevel.replay.program import Departed, Feed, NotReplayable, record
from bilevel.scalars.functions import call, larger, smaller, sqrt

A = {"a": torch.tensor([3.0, 4.0], dtype=torch.float64)}
B = {"a": torch.tensor([1.0, -2.0], dtype=torch.float64)}


def feed(*batches):
    return Feed({"lower": iter(batches or itertools.repeat(None))})


def replayed(step, *others, at=A):
    """What replays of a step that was recorded at `at` give at others."""
    found, program = record(step, at, feed().iterators())
    again = program(at, feed())
    assert torch.equal(torch.as_tensor(again), torch.as_tensor(found))
    return [program(one, feed()) for one in others]


def of(function):
    return lambda inputs, draws: function(inputs)


@pytest.mark.parametrize(
    "function",
    [
        tree.norm,
        lambda a: 2 * tree.dot(a, B) - tree.norm(a) ** 2 / 3 % 2 // 1,
        lambda a: -abs(1 - tree.dot(a, B)) + 1 / tree.norm(a),
        lambda a: larger(tree.dot(a, B), 0.0) + smaller(2.0, tree.norm(a)) + larger(1, 2),
        lambda a: call(math.hypot, tree.norm(a), 1.0) + sqrt(tree.dot(a, a)),
        lambda a: tree.axpy(tree.dot(a, B), a, B)["a"],
        lambda a: tree.scale(tree.norm(a), a)["a"],
        lambda a: tree.axpy_(tree.clone(a), tree.norm(a), B)["a"],
        lambda a: tree.scale_({"a": a["a"] + 1, "b": a["a"] - 1}, tree.norm(a))["a"],
        lambda a: a["a"] / tree.norm(a) + tree.norm(a) * a["a"],
        lambda a: torch.add(a["a"], 1, out=torch.zeros(2, dtype=torch.float64)) * a["a"],
    ],
)
def test_numbers_go_on_as_numbers(function):
    """Of another input too, to the bit."""
    for one, found in zip((B, A), replayed(of(function), B, A), strict=True):
        expected = function(one)
        if isinstance(expected, float):
            assert found == expected
        else:
            assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "function",
    [
        lambda a: 1.0 if tree.dot(a, B) > 0 else 2.0,  # -5 of A, 5 of B
        lambda a: 1.0 if tree.norm(a) == 5 else 2.0,
        lambda a: math.exp(tree.norm(a)),  # a float of it: another number, another step
        lambda a: float(f"{tree.norm(a):.3f}"),
        lambda a: float(a["a"][0]),
        lambda a: 1.0 if bool(a["a"][1] > 0) else 2.0,
        lambda a: float(torch.equal(a["a"], A["a"])),
        lambda a: sum([1.0] * int(a["a"][0].abs())),
    ],
)
def test_what_is_decided_on_a_number_is_looked_at_again(function):
    with pytest.raises(Departed, match=r"replay/test_program\.py:\d+"):
        replayed(of(function), B)
    assert replayed(of(function), A) == [function(A)]


def test_a_shape_or_an_entry_more_departs():
    for other in (
        {"a": torch.zeros(3, dtype=torch.float64)},
        {"a": A["a"].float()},
        {**A, "b": A["a"]},
    ):
        with pytest.raises(Departed, match="begins with"):
            replayed(of(tree.norm), other)


def test_derivatives_are_recorded_with_their_backward_passes():
    def second(a):
        a = {"a": a["a"].detach().requires_grad_()}
        (g,) = torch.autograd.grad(a["a"].pow(3).sum(), a["a"], create_graph=True)
        return torch.autograd.grad(g @ B["a"], a["a"])[0]

    (found,) = replayed(of(second), B)
    assert torch.equal(found, 6 * B["a"] * B["a"])


def test_numbers_that_are_inputs_stay_inputs():
    def step(inputs, draws):
        return {"x": inputs["x"] * inputs["rate"], "rate": inputs["rate"] / 2, "name": "n"}

    given = {"x": A["a"], "rate": 0.5}
    _, program = record(step, given, feed().iterators())
    found = program({"x": B["a"], "rate": 0.25}, feed())
    assert torch.equal(found["x"], B["a"] * 0.25)
    assert (found["rate"], found["name"]) == (0.125, "n")


def test_batches_are_drawn_in_turn_and_given_again():
    def step(inputs, draws):
        first, second = next(draws["lower"]), next(draws["lower"])
        return inputs["a"] @ first["w"] + 10 * second["w"].sum()

    one, two, three = ({"w": torch.tensor([float(k), 0.0], dtype=torch.float64)} for k in (1, 2, 3))
    _, program = record(step, A, feed(one, two).iterators())
    assert program(A, feed(two, three)) == 3 * 2 + 30
    short = {"w": torch.zeros(1, dtype=torch.float64)}
    drawn = feed(three, short, one)
    with pytest.raises(Departed, match="another shape of lower batches"):
        program(A, drawn)
    assert list(drawn.again()["lower"]) == [three, short, one]
    # one tensor twice is recorded as one, and is to be one again
    _, program = record(step, A, feed(one, one).iterators())
    assert program(A, feed(two, two)) == 3 * 2 + 20
    with pytest.raises(Departed, match="other tensors in lower batches"):
        program(A, feed(two, three))


KEPT = torch.zeros(2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda a: torch.rand(2), "draws random numbers"),
        (lambda a: KEPT.add_(a["a"]), "writes into a tensor that is kept from step to step"),
        (lambda a: a["a"].add_(1.0), "writes into a tensor that is kept from step to step"),
        (lambda a: tree.scale_(a, tree.norm(a)), "writes into a tensor that is kept"),
        (lambda a: a["a"].numpy(), "reads numbers by numpy"),
        (lambda a: a["a"].tolist(), "reads numbers by tolist"),
    ],
)
def test_what_no_replay_could_do_again_is_refused(function, said):
    with pytest.raises(NotReplayable, match=rf"replay/test_program\.py:\d+ {said}"):
        record(of(function), A, feed().iterators())
    assert KEPT.sum() == 0
    assert tree.norm(A) == 5  # and nothing is recorded any more


@pytest.mark.parametrize(
    "function",
    [
        lambda total, a: total.sum() + total.add_(a["a"]).sum(),
        lambda total, a: total.add_(a["a"]).sum() * (total + 1).sum(),
        lambda total, a: total[:1].copy_(a["a"][1:]).sum() + total.view(2).sum(),
        lambda total, a: a["a"] * total.add_(1).mul_(a["a"].sum()).sum(),
    ],
)
@pytest.mark.parametrize("start", [torch.zeros_like, torch.ones_like])
def test_what_is_written_into_is_not_taken_for_fixed(function, start):
    """A tensor of shapes alone is the same in every replay until something is added to it."""

    def step(inputs, draws):
        return function(start(inputs["a"]), inputs)

    for one, found in zip((B, A), replayed(step, B, A), strict=True):
        assert torch.equal(found, step(one, None))


def test_a_tensor_of_python_numbers_is_new_in_each_replay():
    """Written into, it would else go on from one replay to the next."""
    assert torch.equal(
        replayed(of(lambda a: torch.tensor([1.0, 1.0]).add_(a["a"].float())), A, A)[1],
        1 + A["a"].float(),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_entries_are_scaled_to_the_bits_of_a_scale_in_place(dtype):
    """torch rounds 16-bit numbers once in the one way and twice in the other."""
    x = torch.linspace(0.1, 0.9, 64).to(dtype)

    def step(x, _):
        return tree.scale_({"a": x * 1}, 0.3 / x.sum().item())["a"]

    found, program = record(step, x, {})
    assert torch.equal(found, step(x, None))
    other = x.flip(0) * 2
    assert torch.equal(program(other, Feed({})), step(other, None))


def test_a_tensor_that_is_drawn_again_as_it_was_is_copied_once():
    data, nan = torch.arange(6.0), torch.tensor([float("nan"), 1.0])
    kept = Feed({"lower": itertools.repeat({"data": data, "nan": nan, "size": 3})}, copies=True)
    for _ in range(5):
        assert kept.draw("lower")["data"] is data
    copies = [batch["data"] for batch in kept.taken()["lower"]]
    assert len({id(one) for one in copies}) == 1
    assert torch.equal(copies[0], data)
    assert copies[0].data_ptr() != data.data_ptr()
    assert len({id(batch["nan"]) for batch in kept.taken()["lower"]}) == 1
    assert not kept.is_rewritten()


def test_a_tensor_that_is_written_into_between_two_draws_has_a_copy_of_each():
    data = torch.zeros(3)

    def batches():
        for k in range(3):
            data.fill_(k)
            yield data

    kept = Feed({"lower": batches()}, copies=True)
    for _ in range(3):
        kept.draw("lower")
    assert [one[0].item() for one in kept.taken()["lower"]] == [0, 1, 2]
    assert kept.is_rewritten()


@pytest.mark.parametrize(("dtype", "departs"), [(torch.float64, False), (torch.float32, True)])
def test_a_norm_that_becomes_small_is_another_step_in_float32_alone(dtype, departs):
    """There squares below 1e-30 are added up in float64; in float64 there is nothing to mend."""
    at = tree.map_nested(lambda entry: entry.to(dtype), A)
    _, program = record(of(lambda a: tree.norm(a)), at, feed().iterators())
    small = tree.scale(1e-20, at)
    if departs:
        with pytest.raises(Departed):
            program(small, feed())
    else:
        assert program(small, feed()) == tree.norm(small) == pytest.approx(5e-20)
