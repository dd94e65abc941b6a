"""A peer: the hypergradients of betty-ml 0.2.1 by its own functions, at the same point.

Choe, Neiswanger, Xie and Xing (2023), arXiv:2207.02849. betty is not a dependency; its wheel
refuses Python 3.11 although it runs there, so that it is installed by `INSTALL`.
"""

from __future__ import annotations

import functools
import importlib.metadata
import math
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from bilevel import tree
from bilevel.calculus.precision import require_step
from bilevel.calculus.products import gradient_x, value
from bilevel.components import component
from bilevel.errors import ProblemError, RequirementError
from bilevel.types import Counts, Estimate, Loss, Losses, Needs, Params, Point, Stats

VERSION = "0.2.1"
INSTALL = f"pip install --no-deps --ignore-requires-python betty-ml=={VERSION}"


@component
class Betty:
    """∇x F plus the implicit term that `betty.hypergradient.get_grads` returns at (x, y).

    "neumann": `iterations` terms after the first of the series with `neumann_alpha` = `scale`;
    "cg": as released, whose directions use the old residual: no solution after any number of
    iterations, which `caution` shows on a quadratic in five unknowns; "darts": −(∂²xy G)ᵀ ∇y F by
    a central difference of ∇x G, error O(epsilon²); "sama": the same with the preconditioner of
    SGD, the identity (the state of Adam does not reach an estimator). Costs 3 gradients,
    `iterations` HVPs and 1 cross product; "darts" and "sama" 4 gradients. No warm start.

    Raises:
        RequirementError: betty-ml 0.2.1 is not installed.
        ProblemError: an entry of y does not reach G, or an entry of x does not reach ∇y G.
    """

    needs_whole: ClassVar[str] = "estimator: implicit"
    method: Literal["neumann", "cg", "darts", "sama"] = "neumann"
    iterations: PositiveInt = 20
    scale: PositiveFloat = 0.1
    epsilon: PositiveFloat = 1e-2

    def __post_init__(self) -> None:
        require()

    @property
    def needs(self) -> Needs:
        is_wrong = self.method == "cg"
        return Needs(second_order=self._is_second_order, caution=self.caution if is_wrong else None)

    @property
    def claim(self) -> Literal["solution"] | None:
        return "solution" if self.method == "cg" else None

    def caution(self) -> str:
        """What is known to be wrong with its CG, measured."""
        return (
            f"betty-ml {VERSION}'s CG is wrong as released: on a quadratic in five unknowns, after "
            f"five iterations, its adjoint is off by {cg_error():.2g} of its size"
        )

    def tight(self, dim: int) -> Betty:
        """The same with as many iterations as CG needs in exact arithmetic."""
        return replace(self, iterations=dim)

    def init(self, at: Point) -> dict[str, Any]:
        return {}

    def estimate(self, losses: Losses, at: Point, state: dict[str, Any]) -> Estimate:
        x, y = tree.leaves(at.x), tree.map(Tensor.requires_grad_, tree.clone(at.y))
        upper, lower = _Node(x), _Node(y, functools.partial(losses.lower, x, y))
        lower.config = self._config()
        if not self._is_second_order:
            require_step(f"betty:{self.method}", self.epsilon, at.y)
        with torch.enable_grad():
            F = value(losses.upper, at.x, y)
            if not F.requires_grad:  # betty would be asked for the derivative of a constant
                return Estimate(gradient_x(losses.upper, at.x, at.y), F, state, Stats())
            implicit = _get_grads(F, [upper, lower, upper])
        self._count(losses.counts)
        h = gradient_x(losses.upper, at.x, at.y)
        # ∂²xy G reaches every entry of x, or betty would have refused
        losses.counts.reached.update(at.x)
        tree.axpy_(h, 1.0, dict(zip(at.x, implicit, strict=True)))
        iterations = self.iterations if self._is_second_order else 1
        return Estimate(h, F.detach(), state, Stats(iterations=iterations))

    @property
    def _is_second_order(self) -> bool:
        return self.method in ("neumann", "cg")

    def _config(self) -> Any:
        return SimpleNamespace(
            type=self.method,
            neumann_iterations=self.iterations,
            neumann_alpha=self.scale,
            cg_iterations=self.iterations,
            cg_alpha=1.0,  # with any other its two uses do not agree
            darts_alpha=self.epsilon,
            darts_multitask=False,
            sama_adam_alpha=self.epsilon,
            sama_multitask=False,
        )

    def _count(self, counts: Counts) -> None:
        """What betty asked autograd for: ∇y F, and ∇y G with its products or ∇x G twice."""
        counts.gradients += 2 if self._is_second_order else 3
        if self._is_second_order:
            counts.hvps += self.iterations
            counts.cross_products += 1


@dataclass
class _Node:
    """As much of a `betty.problems.Problem` as its hypergradients touch."""

    params: Params
    loss: Any = None
    config: Any = None
    cur_batch: Any = None
    paths: tuple[Any, ...] = ()
    _strategy: str = "default"
    optimizer: Any = field(init=False)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.SGD(self.parameters(), lr=1.0)

    def training_step_exec(self, batch: Any) -> Tensor:
        return self.loss()

    def parameters(self) -> list[Tensor]:
        return list(self.params.values())

    trainable_parameters = meta_trainable_parameters = parameters


def _get_grads(loss: Tensor, path: list[_Node]) -> list[Tensor]:
    from betty.hypergradient import get_grads  # pyright: ignore[reportMissingImports]

    try:
        return list(get_grads(loss, path, False, False))
    except RuntimeError as error:
        if "appears to not have been used" not in str(error):
            raise
        raise ProblemError(
            "betty's functions need every entry of y in lower_loss and every entry of x in its "
            "gradient in y; leave the others out of x and y, or use estimator: implicit"
        ) from error


@functools.cache
def require() -> None:
    """Raise `RequirementError` unless the betty that was looked at is installed."""
    try:
        found = importlib.metadata.version("betty-ml")
    except importlib.metadata.PackageNotFoundError:
        found = None
    if found != VERSION:
        here = "is not installed" if found is None else f"is here as {found}"
        raise RequirementError(f"betty-ml {VERSION} {here}; install it: {INSTALL}")


@functools.cache
def cg_error() -> float:
    """‖v − A⁻¹ b‖ / ‖A⁻¹ b‖ of betty's CG after five iterations in five unknowns; 0 is right."""
    A = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64))
    b = torch.ones(5, dtype=torch.float64)
    zero = {"p": torch.zeros(5, dtype=torch.float64)}

    def upper(x: Params, y: Params, batch: Any) -> Tensor:
        return b @ y["p"]

    def lower(x: Params, y: Params, batch: Any) -> Tensor:
        return 0.5 * y["p"] @ A @ y["p"] - x["p"] @ y["p"]

    counts = Counts()
    losses = Losses(Loss(upper, None, counts, "upper"), Loss(lower, None, counts, "lower"))
    got = Betty(method="cg", iterations=5).estimate(losses, Point(zero, zero), {})
    truth = b / A.diag()
    error = float((got.hypergradient["p"] - truth).norm() / truth.norm())
    return error if math.isfinite(error) else math.inf
