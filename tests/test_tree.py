"""The algebra equals the same algebra on one flat vector."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bilevel import tree
from bilevel.errors import ProblemError

shapes = st.dictionaries(
    st.text(min_size=1, max_size=4),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
    min_size=1,
    max_size=4,
)


def random_tree(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in sizes.items()
    }


@given(shapes, st.floats(-3, 3), st.integers(0, 99))
def test_agrees_with_flat_vectors(sizes, alpha, seed):
    a, b = random_tree(sizes, seed), random_tree(sizes, seed + 1)
    p, q = tree.flatten(a), tree.flatten(b)
    for got, expected in [
        (tree.add(a, b), p + q),
        (tree.sub(a, b), p - q),
        (tree.scale(alpha, a), alpha * p),
        (tree.axpy(alpha, a, b), alpha * p + q),
        (tree.mul(a, b), p * q),
        (tree.div(a, b), p / q),
        (tree.axpy_(tree.clone(b), alpha, a), alpha * p + q),
        (tree.scale_(tree.clone(a), alpha), alpha * p),
    ]:
        torch.testing.assert_close(tree.flatten(got), expected, rtol=1e-14, atol=1e-14)
        assert list(got) == list(sizes)
    assert math.isclose(tree.dot(a, b), float(p @ q), abs_tol=1e-12)
    assert math.isclose(tree.norm(a), float(p.norm()), abs_tol=1e-12)
    assert tree.size(a) == p.numel()


@given(shapes, st.integers(0, 99))
def test_unflatten_is_the_inverse(sizes, seed):
    a = random_tree(sizes, seed)
    back = tree.unflatten(tree.flatten(a), a)
    assert all(torch.equal(back[name], a[name]) for name in a)


def test_pairs_by_name_and_not_by_order():
    a = {"p": torch.tensor(1.0), "q": torch.tensor(10.0)}
    b = {"q": torch.tensor(100.0), "p": torch.tensor(1000.0)}
    assert tree.add(a, b) == {"p": 1001.0, "q": 110.0}
    assert tree.dot(a, b) == 2000.0


def test_different_names_are_an_error():
    with pytest.raises(KeyError, match="q"):
        tree.add({"p": torch.ones(1)}, {"q": torch.ones(1)})


def test_dot_of_bfloat16_is_accumulated_wide():
    a = {"p": torch.ones(4096, dtype=torch.bfloat16)}
    assert tree.dot(a, a) == 4096.0
    assert float(sum(torch.ones(600, dtype=torch.bfloat16))) != 600.0  # what is avoided


def test_leaves_share_memory_and_clone_does_not():
    a = {"p": torch.zeros(3)}
    assert tree.leaves(a)["p"].data_ptr() == a["p"].data_ptr()
    assert tree.leaves(a)["p"].requires_grad
    assert tree.clone(a)["p"].data_ptr() != a["p"].data_ptr()


def test_to_casts_floats_only_and_keeps_containers():
    value = {"a": [torch.ones(2), torch.ones(2, dtype=torch.int64)], "b": ("text", None)}
    got = tree.to(value, "cpu", torch.float64)
    assert [t.dtype for t in got["a"]] == [torch.float64, torch.int64]
    assert got["b"] == ("text", None)


@pytest.mark.parametrize("bad", [[torch.ones(1)], {"p": 1.0}, {"p": torch.ones(1).long()}])
def test_wrong_parameters_are_named(bad):
    with pytest.raises(ProblemError, match="x"):
        tree.require(bad, "x")


RECORDED = {
    "add": lambda a, b: tree.add(a, b),
    "sub": lambda a, b: tree.sub(a, b),
    "scale": lambda a, b: tree.scale(-0.3, a),
    "axpy": lambda a, b: tree.axpy(-0.3, a, b),
}


def saved_by(function, a, b):
    """How many tensors autograd keeps for the backward pass, and what came out."""
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function(a, b)
    return len(kept), result


@pytest.mark.parametrize("name", RECORDED)
def test_sums_that_autograd_records_keep_no_inputs(name):
    draw = torch.Generator().manual_seed(0)
    a, b = ({n: torch.randn(3, generator=draw) for n in "pq"} for _ in range(2))
    plain = RECORDED[name](a, b)
    leaf = tree.leaves(a)
    kept, recorded = saved_by(RECORDED[name], leaf, b)
    assert kept == 0
    assert all(torch.equal(plain[n], recorded[n].detach()) for n in plain)
    assert all(entry.requires_grad for entry in recorded.values())


def test_a_foreach_sum_keeps_them():
    """Negative control, and the reason: once torch mends this the detour can go."""
    a = {"p": torch.ones(3, requires_grad=True)}
    kept, _ = saved_by(lambda a, b: torch._foreach_add([a["p"]], [b["p"]]), a, tree.detach(a))
    assert kept > 0


def test_eps_is_that_of_the_coarsest_entry():
    mixed = {"a": torch.zeros(2), "b": torch.zeros((), dtype=torch.bfloat16)}
    assert tree.eps(mixed) == torch.finfo(torch.bfloat16).eps
    assert tree.eps({}) == 0.0


# coefficients beyond the dtype


def small(requires_grad=False):
    return {
        "p": torch.tensor([2**-14, -(2**-13)], dtype=torch.float16, requires_grad=requires_grad)
    }


@pytest.mark.parametrize(
    "sum_of",
    [
        lambda a, b: tree.axpy(2.0**17, a, b),
        lambda a, b: tree.axpy_(tree.clone(b), 2.0**17, a),
        lambda a, b: {"p": tree.add_scaled(b["p"], 2.0**17, a["p"])},
        lambda a, b: {"p": tree.add_scaled(b["p"], 2.0**17, a["p"], out=torch.zeros_like(b["p"]))},
    ],
    ids=["axpy", "axpy_", "add_scaled", "out"],
)
def test_a_coefficient_above_65504_times_a_small_float16(sum_of):
    b = {"p": torch.tensor([1.0, 2.0], dtype=torch.float16)}
    with pytest.raises(RuntimeError, match="without overflow"):  # what torch itself says
        torch.add(b["p"], small()["p"], alpha=2.0**17)
    got = sum_of(small(), b)["p"]
    assert got.dtype == torch.float16
    assert got.tolist() == [9.0, -14.0]


def test_it_is_differentiated_and_float32_has_a_largest_number_too():
    a, b = small(requires_grad=True), {"p": torch.ones(2, dtype=torch.float16)}
    (slope,) = torch.autograd.grad(tree.axpy(2.0**15 * 2, a, b)["p"].sum() / 2**4, a["p"])
    assert slope.tolist() == [4096.0, 4096.0]
    wide = {"p": torch.tensor([2.0**-100])}
    assert tree.axpy(2.0**130, wide, {"p": torch.zeros(1)})["p"].item() == 2.0**30


def test_what_is_too_large_for_the_dtype_is_infinite_still():
    b = {"p": torch.ones(2, dtype=torch.float16)}
    assert tree.axpy(1e6, b, b)["p"].tolist() == [math.inf, math.inf]
    assert tree.axpy(math.inf, b, b)["p"].tolist() == [math.inf, math.inf]


def test_contiguous_does_not_look_again_at_what_it_returned():
    """A state of many parts, one of which is new: the others stay the very objects that they were."""
    wide = torch.arange(6.0).reshape(2, 3)
    before = tree.contiguous({"rows": {"0": wide.T, "1": wide}, "age": 1, "list": [wide.T]})
    assert before["rows"]["0"].is_contiguous()
    now = {"rows": {**before["rows"], "1": wide.T}, "age": 2, "list": before["list"]}
    after = tree.contiguous(now, before)
    assert after["rows"]["0"] is before["rows"]["0"]
    assert after["list"] is before["list"]
    assert torch.equal(after["rows"]["1"], wide.T)
    assert after["rows"]["1"].is_contiguous()
    assert after["age"] == 2
    # what is new is looked at wherever it stands, and whatever `known` is
    assert tree.contiguous({"a": {"b": wide.T}}, {"a": 3})["a"]["b"].is_contiguous()
    assert tree.contiguous(wide.T, wide).is_contiguous()


def test_a_batch_that_stands_is_given_back_in_a_new_dictionary():
    """Numbers beside its tensors are as they were, and hold nothing up; lists are gone into."""
    batch = {"a": torch.ones(2), "block": 3, "scale": 0.5, "last": True}
    got = tree.to(batch, torch.device("cpu"), torch.float32)
    assert got == batch
    assert got is not batch
    assert got["a"] is batch["a"]
    moved = tree.to({**batch, "more": [torch.ones(2)]}, torch.device("cpu"), torch.float64)
    assert moved["more"][0].dtype == moved["a"].dtype == torch.float64
    assert moved["block"] == 3
