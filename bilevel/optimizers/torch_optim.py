"""Any optimizer of `torch.optim`, by its class name; not differentiable."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator

from bilevel import tree
from bilevel.components import component
from bilevel.types import Params


@component
class TorchOptimizer:
    """`torch.optim.<optimizer>(y, **options)`, e.g. optimizer=Adagrad, options={lr: 0.1}.

    Cannot be unrolled: torch's steps write in place. For that use sgd, adam, adamw or rmsprop.
    A step builds the optimizer anew from its saved state, which costs some 100 µs and one copy.
    """

    differentiable: ClassVar[bool] = False
    optimizer: str
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _is_known(self) -> Self:
        known = [n for n, c in vars(torch.optim).items() if isinstance(c, type)]
        if self.optimizer not in known or self.optimizer in ("Optimizer", "LBFGS"):
            offered = ", ".join(sorted({*known} - {"Optimizer", "LBFGS"}))
            raise ValueError(
                f"{self.optimizer!r} is no step-wise optimizer of torch.optim; it has {offered}. "
                "For L-BFGS use lower: lbfgs"
            )
        for name, value in self.options.items():
            if isinstance(value, torch.Tensor) and value.requires_grad:
                raise ValueError(
                    f"options[{name!r}] is a tensor that requires grad, and torch's steps are not "
                    f"differentiated in it; give a number, or {name}.detach()"
                )
        self._build({"y": torch.zeros(1)})
        return self

    def _build(self, y: Params) -> torch.optim.Optimizer:
        try:
            return getattr(torch.optim, self.optimizer)(list(y.values()), **self.options)
        except TypeError as error:
            raise ValueError(f"torch.optim.{self.optimizer}: {error}") from error

    @property
    def lr_of_torch(self) -> float:
        """The learning rate: the one given, or torch's default."""
        return float(self._build({"y": torch.zeros(1)}).param_groups[0]["lr"])

    @property
    def needs_whole(self) -> str:
        """What to take where ranks hold y together and a step is not taken number by number."""
        elsewhere = "optimizer: adam, or another of torch.optim that steps number by number"
        return elsewhere if self.optimizer == "Adafactor" else ""

    def init(self, y: Params) -> dict[str, Any]:
        return {}

    def step(
        self, y: Params, gradient: Params, state: dict[str, Any]
    ) -> tuple[Params, dict[str, Any]]:
        y = tree.leaves(tree.clone(y))
        optimizer = self._build(y)
        for name, kept in state.items():
            # set, not loaded: load_state_dict would cast counters and products to y's dtype
            optimizer.state[y[name]] = {key: _copy(value) for key, value in kept.items()}
        for name, entry in y.items():
            entry.grad = gradient[name].detach()
        optimizer.step()
        return tree.detach(y), {name: dict(optimizer.state[entry]) for name, entry in y.items()}


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
