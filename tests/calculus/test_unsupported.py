"""What torch cannot differentiate is said with the remedy, whichever door it is met behind."""

import re
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import bilevel
from bilevel import calculus
from bilevel.calculus import unsupported
from bilevel.errors import ProblemError
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.one_step import OneStep
from bilevel.estimators.penalty import Penalty
from bilevel.estimators.unroll import Unroll
from bilevel.lower.gradient import Gradient
from bilevel.lower.newton import Newton
from bilevel.problem.purity import refuse_impure
from bilevel.types import Counts, Loss, LowerSolution, Point

F = nn.functional
X = {"s": torch.tensor(0.5, dtype=torch.float64)}
Y = {"w": torch.tensor([[0.3, -0.4], [0.1, 0.8], [1.0, 0.2]], dtype=torch.float64)}
IDS = torch.tensor([[0, 2, 2]])


def upper(x, y, batch):
    return (y["w"] - 1).square().sum()


def held(x, y):
    return 0.5 * (y["w"] - x["s"]).square().sum()


def tanh(w):
    return w.tanh()


COMPILED = torch.compile(tanh, backend="aot_eager")
SECOND = {
    "compiled": (lambda x, y, b: COMPILED(y["w"]).sum() + held(x, y), r"torch\.compile.*eager"),
    "embedding_bag": (
        lambda x, y, b: F.embedding_bag(IDS, y["w"], mode="sum").sin().sum() + held(x, y),
        "_embedding_bag_backward, which has no second derivative",
    ),
    "cdist": (
        lambda x, y, b: torch.cdist(y["w"], y["w"] + 1).sum() + held(x, y),
        "_cdist_backward, which has no second derivative",
    ),
}
FIRST = {
    "sparse": (
        lambda x, y, b: F.embedding(IDS, y["w"], sparse=True).square().sum(),
        "sparse gradient.*sparse=False",
    ),
    "reentrant": (
        lambda x, y, b: checkpoint(tanh, y["w"], use_reentrant=True).sum() + held(x, y),
        "use_reentrant=False",
    ),
}


@pytest.mark.parametrize(
    ("loss", "said"), [*SECOND.values(), *FIRST.values()], ids=[*SECOND, *FIRST]
)
@pytest.mark.parametrize(
    "door",
    [
        lambda loss, path: bilevel.unroll(loss, X, Y, steps=2),
        *(
            lambda loss, path, e=e: bilevel.hypergradient(
                upper, loss, X, LowerSolution(Y, path=path), estimator=e
            )
            for e in (
                Implicit(),
                OneStep(),
                Unroll(),
                Unroll(memory="recompute"),
                Unroll(memory="mixed"),
            )
        ),
    ],
    ids=["unroll()", "implicit", "one_step", "unroll", "recompute", "mixed"],
)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_second_order_methods_say_what_helps(door, loss, said, request):
    unaffected = "mixed" in request.node.name or "one_step" in request.node.name
    if unaffected and loss not in (
        FIRST["sparse"][0],
        FIRST["reentrant"][0],
        SECOND["compiled"][0],
    ):
        pytest.skip("takes no second derivative of that term: forward mode, or ∂²xy alone")
    held_only = lambda x, y, b: held(x, y)  # noqa: E731
    path = bilevel.solve_lower(held_only, X, Y, solver=Gradient(steps=2), record=True).path
    with pytest.raises(ProblemError, match=rf"lower_loss .*{said}"):
        door(loss, path)


@pytest.mark.parametrize(("loss", "said"), FIRST.values(), ids=FIRST)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_first_order_methods_do_too(loss, said):
    for door in (
        lambda: bilevel.solve_lower(loss, X, Y),
        lambda: bilevel.hypergradient(upper, loss, X, Y, estimator=Penalty()),
    ):
        with pytest.raises(ProblemError, match=rf"lower_loss .*{said}"):
            door()


FLEX = """
import torch
from torch.nn.attention.flex_attention import flex_attention

import bilevel
from bilevel.errors import ProblemError
from bilevel.estimators import Implicit

def lower(x, y, batch):
    w = y["w"].reshape(1, 1, 16, 16)
    return flex_attention(w, w, w).square().sum() + (y["w"] - x["s"]).square().sum()

def upper(x, y, batch):
    return y["w"].square().sum()

x, y = {"s": torch.tensor(0.5)}, {"w": torch.ones(16, 16)}
for call in (
    lambda: bilevel.solve_lower(lower, x, y),
    lambda: bilevel.hypergradient(upper, lower, x, y, estimator=Implicit()),
):
    try:
        call()
    except ProblemError as error:
        print(error)
"""


def test_flex_attention_is_refused_with_what_helps():
    """In a process of its own: what it leaves in torch's compiler is met by the next who compiles."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FLEX], capture_output=True, text=True, check=True
    )
    said = done.stdout.splitlines()
    assert len(said) == 2
    assert all(re.match(r"lower_loss uses flex_attention.*'eager'\)$", line) for line in said)


@pytest.mark.parametrize("name", ["embedding_bag", "cdist"])
def test_newton_says_it_too(name):
    loss, said = SECOND[name]
    with pytest.raises(ProblemError, match=rf"lower_loss .*{said}"):
        bilevel.solve_lower(loss, X, Y, solver=Newton())


@pytest.mark.parametrize("loss", [loss for loss, _ in SECOND.values()], ids=SECOND)
def test_first_derivatives_of_the_others_are_taken(loss):
    solved = bilevel.solve_lower(loss, X, Y)
    got = bilevel.hypergradient(upper, loss, X, solved.y, estimator=Penalty()).hypergradient
    assert torch.isfinite(got["s"])


def test_the_uncompiled_function_is_right():
    """G = ½ ‖w − s‖² + Σ tanh w: the same y through a compiled function, and dΦ/ds by differences."""

    def plain(x, y, batch):
        return tanh(y["w"]).sum() + held(x, y)

    def solved(s, loss):
        x = {"s": torch.tensor(s, dtype=torch.float64)}
        return x, bilevel.solve_lower(loss, x, Y, solver=Gradient(steps=300)).y

    x, y = solved(0.5, plain)
    compiled = solved(0.5, SECOND["compiled"][0])[1]
    assert torch.allclose(compiled["w"], y["w"])
    got = float(bilevel.hypergradient(upper, plain, x, y, estimator=Implicit()).hypergradient["s"])
    ends = [float(upper(*solved(0.5 + h, plain), None)) for h in (1e-4, -1e-4)]
    assert got == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-6)


def test_a_compiled_function_is_still_compiled_after_it_was_looked_at():
    found = []

    def backend(module, inputs):
        found.append(module)
        return module.forward

    @torch.compile(backend=backend)
    def scaled(w):
        return 2 * w

    loss = lambda x, y, b: scaled(y["w"]).square().sum() + held(x, y)  # noqa: E731
    refuse_impure(Loss(loss, None, Counts(), "lower"), X, Y)
    scaled(Y["w"])
    assert found


def test_an_error_of_a_backward_is_quoted():
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w):
            return w.sum()

        @staticmethod
        def backward(ctx, *grads):
            return grads[0].expand(7)

    loss = Loss(lambda x, y, b: Fails.apply(y["w"]), None, Counts(), "lower")
    with pytest.raises(ProblemError, match=r"cannot differentiate lower_loss.*invalid gradient"):
        calculus.gradients(loss, Point(X, Y))


def test_being_out_of_memory_is_no_matter_of_the_loss(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(unsupported, "_on_cpu", full)
    loss = Loss(upper, None, Counts(), "upper")
    with pytest.raises(torch.OutOfMemoryError):
        calculus.gradients(loss, Point(X, Y))


def mixed(w, s):
    return (w.pow(3) * s).sum(), (w * s).sum()


@pytest.mark.parametrize("alone", [True, False])
def test_a_derivative_is_that_of_torch(alone, monkeypatch):
    """By the backward pass alone, and by torch's function where there is no such pass."""
    if not alone:
        monkeypatch.setattr(unsupported, "_backward", None)
    w, s, unused = (t.clone().requires_grad_() for t in (Y["w"], X["s"], X["s"]))
    outputs = mixed(w, s)
    loss = Loss(upper, None, Counts(), "upper")
    found = unsupported.grad(loss, outputs, [w, s, unused], create_graph=True)
    right = torch.autograd.grad(outputs, [w, s, unused], create_graph=True, allow_unused=True)
    assert torch.equal(found[0], right[0])
    assert torch.equal(found[1], right[1])
    assert found[2] is right[2] is None
    vectors = [torch.full_like(w, 2.0), torch.tensor(-1.0, dtype=torch.float64)]
    given = [found[0], found[1]], [w], vectors
    again = unsupported.grad(loss, *given, retain_graph=True)
    (bent,) = torch.autograd.grad(*given)  # the graph was kept
    assert torch.equal(again[0], bent)


@pytest.mark.parametrize("shape", [(2,), (3, 1), (3, 2, 1), ()])
def test_a_vector_of_another_shape_is_refused_also_where_it_could_be_expanded(shape):
    w = Y["w"].clone().requires_grad_()
    loss = Loss(upper, None, Counts(), "upper")
    with pytest.raises(RuntimeError, match="Mismatch in shape"):
        unsupported.grad(loss, [w.pow(2)], [w], [torch.ones(shape, dtype=torch.float64)])


def test_a_subclass_of_tensor_answers_for_itself():
    asked = []

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            asked.append(func)
            return super().__torch_function__(func, types, args, kwargs)

    w = Y["w"].clone().as_subclass(Watched).requires_grad_()
    total = w.pow(2).sum()
    unsupported.grad(Loss(upper, None, Counts(), "upper"), [total], [w])
    assert torch.autograd.grad in asked
