"""Second derivatives that are wrong without a word: custom functions that lose theirs, torch's own.

Looked for once, before a method that takes second derivatives of G trusts them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, _weight_norm  # pyright: ignore[reportPrivateImportUsage]
from torch.autograd.function import BackwardCFunction

from bilevel import calculus, rng, tree
from bilevel.calculus.unsupported import COMPILED
from bilevel.errors import ProblemError
from bilevel.problem.purity import is_transformed
from bilevel.ranks import Enter, Leave
from bilevel.sharding.parts import Collect, Cut, Gather, Scatter
from bilevel.types import Counts, Loss, Params, Point

MISSING = 0.1
"""The part of a product that has to be missing for a loss to be refused."""


def refuse_missing_second_derivative(loss: Loss, at: Point) -> None:
    """Raise `ProblemError` if part of a second derivative of the loss is lost, or is known to be wrong.

    torch is silent where the backward of a custom autograd.Function is `once_differentiable`, or
    leaves its graph: as one term of several it gives a Hessian, or a cross product, without that
    term. Looked for where a custom function is in the graph of the loss alone, and in float32 or
    wider: are central differences of ∇y G and ∇x G along a random direction v of y, at two step
    sizes, other vectors than (∂²yy G) v and (∂²xy G)ᵀ v? Refused only where the difference can be
    trusted: it is the same at both step sizes and on both sides (no kinks, no rounding), and ∇G is
    the slope of G (no gradient that is meant to be another, such as a straight-through one).

    Functions of torch whose second derivative is wrong (`WRONG`) are refused by name.

    Costs one evaluation; with a custom function 4 gradients, 1 HVP, 2 cross products and 2
    evaluations, and 2 gradients and 2 evaluations more before it is refused.
    """
    apart = replace(loss, counts=Counts())
    x, y = tree.leaves(at.x), tree.leaves(at.y)
    with torch.enable_grad():
        nodes = [*_nodes(calculus.value(apart, x, y))]
    # those of Python have no such name before torch 2.13
    used = {node.name() for node in nodes if not isinstance(node, BackwardCFunction)}
    for name, wrong in WRONG.items():
        if name in used and error_of(name) > ACCURATE:
            raise ProblemError(
                f"{loss.level}_loss uses {wrong.what}, whose second derivative is wrong in torch "
                f"{torch.__version__}: {wrong.remedy}, or use an estimator that takes no second "
                "derivative (estimator=penalty, one_step with finite_difference)"
            )
    names = sorted({_name(node) for node in nodes if _is_custom(node)})
    eps = max(tree.eps(x), tree.eps(y))
    if names and eps <= torch.finfo(torch.float32).eps and loses_part(apart, at, eps):
        if "CompiledFunction" in names:
            raise ProblemError(f"{loss.level}_loss {COMPILED}")
        raise ProblemError(
            f"{loss.level}_loss loses part of its second derivative in a custom autograd.Function, "
            f"one of: {', '.join(names)}. Its backward is once_differentiable, or leaves the graph "
            "(.detach(), .data, numpy): write it with differentiable operations of torch on "
            "ctx.saved_tensors, or use an estimator that takes no second derivative "
            "(estimator=penalty, one_step with finite_difference)"
        )


def require_second_derivative(loss: Loss, at: Point) -> None:
    """`refuse_missing_second_derivative`, and one product of each kind, which torch may not have.

    For doors behind which autograd is called by others. Nothing inside a transform of torch.func.
    """
    if is_transformed(at.x, at.y):
        return
    refuse_missing_second_derivative(loss, at)
    calculus.linearize(replace(loss, counts=Counts()), at).pull(at.y)


def _nodes(output: Tensor) -> Iterator[Any]:
    """The functions in the graph of a tensor."""
    seen, left = set(), [output.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        left += [before for before, _ in node.next_functions]
        yield node


def _name(node: Any) -> str:
    return type(node).__name__.removesuffix("Backward")


def _is_custom(node: Any) -> bool:
    """Whether it is a function of the problem's own; sums over ranks are differentiable at any order."""
    if not isinstance(node, BackwardCFunction):
        return False
    return getattr(node, "_forward_cls", None) not in _ACROSS


_ACROSS = (Enter, Leave, Gather, Scatter, Collect, Cut)


# custom functions


@dataclass(frozen=True)
class _Along:
    """Central differences of ∇x G and ∇y G along v in y, with step h."""

    slopes: dict[str, Params]
    """(g₊ − g₋) / 2h of g = ∇x G ("x") and ∇y G ("y") at y ± h v."""
    bend: dict[str, float]
    """‖g₊ − 2g + g₋‖ / h of each."""
    slope: float
    """(G₊ − G₋) / 2h."""


def loses_part(loss: Loss, at: Point, eps: float) -> bool:
    """Whether differences of ∇G along a direction of y are other vectors than its products."""
    stream = rng.stream(0, "second derivative")
    v = direction(at.y, stream)
    if v is None:
        return False
    h = eps ** (1 / 3) * (1 + tree.norm(at.y))
    made = calculus.linearize(loss, at)
    got = {"y": made.hvp_yy(v), "x": made.vjp_xy(v)}
    gradients = dict(zip("xy", calculus.gradients(loss, at)[1:], strict=True))
    wide = _differences(loss, at, v, h, gradients)
    lost = {name: tree.norm(tree.sub(wide.slopes[name], got[name])) for name in got}
    suspect = [n for n, gap in lost.items() if gap > _least(wide.slopes[n], got[n])]
    if not suspect and (asymmetry := _asymmetry(made, v, got["x"])) > MISSING * tree.norm(got["x"]):
        suspect, lost["x"] = ["x"], asymmetry
    if not suspect:
        return False
    narrow = _differences(loss, at, v, h / 2, gradients)
    expected = tree.dot(gradients["y"], v)
    if abs(narrow.slope - expected) > max(1e-2 * abs(expected), 0.1 * h * max(lost.values())):
        return False
    return any(
        tree.norm(tree.sub(wide.slopes[n], narrow.slopes[n])) <= 1e-2 * lost[n]
        and narrow.bend[n] <= 0.1 * lost[n]
        and (n == "y" or _is_slope(loss, at, gradients["x"], eps, stream))
        for n in suspect
    )


def _least(expected: Params, got: Params) -> float:
    return MISSING * max(tree.norm(expected), tree.norm(got))


def direction(like: Params, stream: torch.Generator) -> Params | None:
    """A random vector of length 1; None where there is nothing to move."""
    v = tree.drawn(lambda p: torch.randn(p.shape, generator=stream).to(p), like)
    size = tree.norm(v)
    return tree.scale(1 / size, v) if size else None


def _asymmetry(made: calculus.Linearization, v: Params, cross: Params) -> float:
    """|⟨(∂²yx G) u, v⟩ − ⟨u, (∂²xy G)ᵀ v⟩| for u along the latter: 0, were both from one function."""
    size = tree.norm(cross)
    if not size:
        return 0.0
    return abs(tree.dot(made.jvp_yx(tree.scale(1 / size, cross)), v) - size)


def _differences(
    loss: Loss, at: Point, v: Params, h: float, gradients: dict[str, Params]
) -> _Along:
    (above, *g_above), (below, *g_below) = (
        calculus.gradients(loss, Point(at.x, tree.axpy(s * h, v, at.y))) for s in (1, -1)
    )
    slopes, bend = {}, {}
    for name, up, down in zip("xy", g_above, g_below, strict=True):
        slopes[name] = tree.scale(1 / (2 * h), tree.sub(up, down))
        bend[name] = tree.norm(tree.axpy(-2.0, gradients[name], tree.add(up, down))) / h
    return _Along(slopes, bend, float(above - below) / (2 * h))


def _is_slope(loss: Loss, at: Point, g: Params, eps: float, stream: torch.Generator) -> bool:
    """Whether ∇x G is what G changes by along a random direction of x."""
    u = direction(at.x, stream)
    if u is None:
        return False
    h = eps ** (1 / 3) * (1 + tree.norm(at.x))
    with torch.no_grad():
        above, below = (loss(tree.axpy(s * h, u, at.x), at.y) for s in (1, -1))
    return abs(float(above - below) / (2 * h) - tree.dot(g, u)) <= 1e-2 * tree.norm(g)


# torch's own


@dataclass(frozen=True)
class Wrong:
    """A function of torch whose second derivative is wrong, where `function` says so."""

    what: str
    remedy: str
    function: Callable[[Tensor], Tensor]
    """Uses it, from a vector of 6 numbers to one."""


WRONG = {
    "WeightNormInterfaceBackward0": Wrong(
        "torch._weight_norm (weight_norm of torch.nn.utils and of its parametrizations)",
        "compute the weight by hand, g * v / v.norm(dim=1, keepdim=True) over all dimensions but "
        "that of the outputs, in the loss or in a parametrization of your own "
        "(torch.nn.utils.parametrize.register_parametrization)",
        lambda v: (_weight_norm(v.reshape(2, 3), v[::3, None].detach(), 0) ** 3).sum(),
    ),
}
"""By the name of their node in autograd's graph, which is looked for in that of G."""

ACCURATE = 1e-6
"""The relative error of a Hessian product below which a function of `WRONG` counts as mended."""


@cache
def error_of(name: str) -> float:
    """The relative error of a Hessian product of `WRONG[name]`, against differences, on this torch."""
    v, direction = torch.linspace(0.5, 2.0, 6).double(), torch.linspace(-1, 1, 6).double()

    def gradient(at: Tensor) -> Tensor:
        at = at.detach().requires_grad_()
        return torch.autograd.grad(WRONG[name].function(at), at)[0]

    at = v.clone().requires_grad_()
    with torch.enable_grad():
        (g,) = torch.autograd.grad(WRONG[name].function(at), at, create_graph=True)
        (got,) = torch.autograd.grad(g, at, direction)
        h = 1e-5
        truth = (gradient(v + h * direction) - gradient(v - h * direction)) / (2 * h)
    return float((got - truth).norm() / truth.norm())
