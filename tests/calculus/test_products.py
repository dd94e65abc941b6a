"""Products with second derivatives against the full matrices of torch.func, and what is refused."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

from bilevel import calculus, tree
from bilevel.errors import ConvergenceError, ProblemError
from bilevel.problem.purity import refuse_impure
from bilevel.types import Counts, Loss, Losses, Point


def loss_of(function, level="lower", batch=None):
    return Loss(function, batch, Counts(), level)


def wavy(x, y, batch):
    mixed = torch.sin(y["b"] @ x["a"]) + (y["c"] ** 3).sum() * x["a"].prod()
    return mixed + (y["b"] ** 2).sum() * y["c"].sum()


@pytest.fixture
def at():
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return Point({"a": draw(3)}, {"b": draw(2, 3), "c": draw(4)})


def scalar(x, y, batch):
    return wavy(x, {"b": y["b"].sum(0), "c": y["c"]}, batch)


def flat_scalar(at):
    def function(fx, fy):
        return scalar(tree.unflatten(fx, at.x), tree.unflatten(fy, at.y), None)

    return function, tree.flatten(at.x), tree.flatten(at.y)


def test_products_equal_the_full_matrices(at):
    function, fx, fy = flat_scalar(at)
    lower = calculus.linearize(loss_of(scalar), at)
    u = tree.map(torch.cos, at.y)
    H, J = (jacrev(jacrev(function, 1), wrt)(fx, fy) for wrt in (1, 0))
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(tree.flatten(lower.gradient), jacrev(function, 1)(fx, fy), **close)
    torch.testing.assert_close(tree.flatten(lower.hvp_yy(u)), H @ tree.flatten(u), **close)
    torch.testing.assert_close(tree.flatten(lower.vjp_xy(u)), J.T @ tree.flatten(u), **close)
    assert not torch.allclose(tree.flatten(lower.hvp_yy(u)), -(H @ tree.flatten(u)))  # control


def test_oracle_calls_are_counted(at):
    loss = loss_of(scalar)
    lower = calculus.linearize(loss, at)
    for _ in range(3):
        lower.hvp_yy(at.y)
    lower.vjp_xy(at.y)
    calculus.gradients(loss, at)
    counts = loss.counts
    assert (counts.gradients, counts.hvps, counts.cross_products, counts.losses) == (2, 3, 1, 2)


def test_the_graph_is_built_once(at):
    calls = []

    def counting(x, y, batch):
        calls.append(1)
        return scalar(x, y, batch)

    lower = calculus.linearize(loss_of(counting), at)
    for _ in range(5):
        lower.hvp_yy(at.y)
    assert len(calls) == 1


def test_what_is_not_reached_has_a_zero_gradient(at):
    _, at_x, at_y = calculus.gradients(loss_of(lambda x, y, b: (y["c"] ** 2).sum()), at)
    assert tree.norm(at_x) == 0
    assert tree.norm({"b": at_y["b"]}) == 0
    assert torch.equal(at_y["c"], 2 * at.y["c"])


def test_a_lower_loss_linear_in_y_has_a_zero_hessian(at):
    lower = calculus.linearize(loss_of(lambda x, y, b: y["c"].sum() * x["a"].sum()), at)
    assert tree.norm(lower.hvp_yy(at.y)) == 0
    assert tree.norm(lower.vjp_xy(at.y)) > 0


@pytest.mark.parametrize("bad", [lambda x, y, b: y["c"], lambda x, y, b: 3.0])
def test_a_loss_that_is_no_scalar_is_refused(at, bad):
    with pytest.raises(ProblemError, match="lower_loss must return a scalar"):
        calculus.gradients(loss_of(bad), at)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_refused(at, value):
    with pytest.raises(ConvergenceError, match="upper_loss"):
        calculus.gradients(loss_of(lambda x, y, b: y["c"].sum() * value, "upper"), at)


def test_fused_attention_is_refused_with_the_remedy():
    def attention(x, y, batch):
        q = y["q"][None, None]
        return nn.functional.scaled_dot_product_attention(q, q * x["s"], q).sum()

    at = Point({"s": torch.ones(())}, {"q": torch.randn(4, 8)})
    with pytest.raises(ProblemError, match=r"attn_implementation='eager'.*sdpa_kernel"):
        calculus.linearize(loss_of(attention), at).hvp_yy(at.y)


def test_the_remedy_works():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attention(x, y, batch):
        q = y["q"][None, None]
        with sdpa_kernel(SDPBackend.MATH):
            return nn.functional.scaled_dot_product_attention(q, q * x["s"], q).sum()

    at = Point({"s": torch.ones(())}, {"q": torch.randn(4, 8)})
    assert tree.norm(calculus.linearize(loss_of(attention), at).hvp_yy(at.y)) > 0


def test_other_errors_of_torch_are_left_alone(at):
    with pytest.raises(RuntimeError, match="size"):
        calculus.linearize(loss_of(lambda x, y, b: (y["c"] @ x["a"]).sum()), at)


@pytest.mark.parametrize(
    ("module", "refused"),
    [
        (nn.BatchNorm1d(3).train(), True),
        (nn.BatchNorm1d(3).eval(), False),
        (nn.BatchNorm1d(3, track_running_stats=False).train(), False),
        (nn.LayerNorm(3), False),
    ],
    ids=["train", "eval", "no statistics", "layer norm"],
)
def test_batch_norm_in_training_mode_is_refused(module, refused):
    net = nn.Sequential(nn.Linear(3, 3), module)
    y = {name: p.detach() for name, p in net.named_parameters()}
    data = torch.randn(5, 3)

    def lower(x, y, batch):
        return (functional_call(net, y, batch) ** 2).mean() * x["w"].exp()

    loss = loss_of(lower, batch=data)
    if refused:
        with pytest.raises(ProblemError, match=r"BatchNorm in training mode.*eval"):
            refuse_impure(loss, {"w": torch.zeros(())}, y)
    else:
        refuse_impure(loss, {"w": torch.zeros(())}, y)


def test_with_no_upper_variables_there_is_no_cross_product():
    at = Point({}, {"y": torch.ones(3, dtype=torch.float64)})
    lower = calculus.linearize(loss_of(lambda x, y, b: (y["y"] ** 3).sum()), at)
    assert lower.vjp_xy(at.y) == {}
    assert torch.equal(lower.hvp_yy(at.y)["y"], 6 * at.y["y"])


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("the derivative overflowed", RuntimeError),
        ("frobnicate is not implemented", RuntimeError),
        ("derivative for aten::frobnicate is not implemented", ProblemError),
        ("derivative of frobnicate is not implemented", ProblemError),
    ],
)
def test_only_a_missing_second_derivative_is_taken_for_one(text, kind):
    with pytest.raises(kind) as caught, calculus.second_order(loss_of(scalar)):
        raise RuntimeError(text)
    assert type(caught.value) is kind
    assert text in str(caught.value if kind is RuntimeError else caught.value.__cause__)


def of_the_sum(x, y, batch):
    s = x["a"] + y["a"]
    return 0.5 * s.square().sum() + s.pow(3).sum()


def test_results_of_one_pass_share_no_memory():
    """autograd gives one tensor to both where a loss is a function of x + y; callers may write into each."""
    at = Point({"a": torch.ones(3)}, {"a": torch.full((3,), 2.0)})
    _, at_x, at_y = calculus.gradients(loss_of(of_the_sum), at)
    product, cross = calculus.linearize(loss_of(of_the_sum), at).pull({"a": torch.ones(3)})
    both = Point(tree.leaves(at.x), tree.leaves(at.y))
    y = tree.add(both.x, both.y)  # a graph back to x and to where y began
    losses = Losses(*(loss_of(lambda x, y, b: y["a"].pow(3).sum(), n) for n in ("upper", "lower")))
    F = losses.upper({}, y)
    through, start = calculus.products.through_from(F, both.x, both.y, losses, y)
    pairs = (at_x, at_y, 30.0), (product, cross, 19.0), (through, start, 27.0)
    for one, other, right in pairs:
        one["a"].zero_()
        assert torch.equal(other["a"], torch.full((3,), right))
