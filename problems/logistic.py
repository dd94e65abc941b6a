"""Logistic regression with one penalty a feature, learned on held-out data.

    G(x, w) = mean over lower samples of log(1 + exp(−b aᵀw)) + ½ Σⱼ exp(xⱼ) wⱼ²
    F(w)    = mean over upper samples of log(1 + exp(−b aᵀw))

The classic of hyperparameter optimization by implicit differentiation (Pedregosa 2016,
arXiv:1602.02355, sec. 4, with one penalty for all features there). Features at different scales
and penalties that spread make the lower Hessian ill-conditioned.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cached_property
from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from bilevel import rng, tree
from bilevel.components import component
from bilevel.rng import Streams
from bilevel.types import Params


@component
class Logistic:
    """Held-out logistic loss over the log of each feature's penalty.

    `data`: scikit-learn's breast cancer (30 features, malignant or not), its digits (64 pixels,
    above 4 or not), or synthetic. `spread` multiplies the standardised features by log-spaced
    scales from 1 to 1 / spread, and the condition number of the lower Hessian by about spread².
    """

    data: Literal["breast_cancer", "digits", "synthetic"] = "breast_cancer"
    spread: float = Field(default=1.0, ge=1)
    initial_log_penalty: float = -6.0
    num_features: PositiveInt = 200
    """Of the synthetic data."""
    data_seed: int = 0

    @cached_property
    def splits(self) -> dict[str, Params]:
        """(A, b) for "lower", "upper" and "test": half, a quarter, a quarter; b is ±1."""
        A, b = self._load()
        order = torch.randperm(len(b), generator=rng.stream(self.data_seed, "logistic.split"))
        half, three = len(b) // 2, 3 * len(b) // 4
        parts = {"lower": order[:half], "upper": order[half:three], "test": order[three:]}
        train = A[parts["lower"]]
        A = (A - train.mean(0)) / train.std(0).clamp(min=1e-12)
        A = A * self._scales(A.shape[1])
        return {name: {"A": A[rows], "b": b[rows]} for name, rows in parts.items()}

    def init(self, streams: Streams) -> tuple[Params, Params]:
        dim = self.splits["lower"]["A"].shape[1]
        x = torch.full((dim,), self.initial_log_penalty, dtype=torch.float64)
        return {"log_penalty": x}, {"w": torch.zeros(dim, dtype=torch.float64)}

    def upper_loss(self, x: Params, y: Params, batch: Params) -> Tensor:
        return torch.nn.functional.softplus(-batch["b"] * (batch["A"] @ y["w"])).mean()

    def lower_loss(self, x: Params, y: Params, batch: Params) -> Tensor:
        penalty = 0.5 * (x["log_penalty"].exp() * y["w"] ** 2).sum()
        return self.upper_loss(x, y, batch) + penalty

    def lower_diagonal(self, x: Params, y: Params, batch: Params) -> Params:
        """exp(x) + mean of p (1 − p) a², the diagonal of the lower Hessian."""
        p = torch.sigmoid(batch["A"] @ y["w"])
        return {"w": x["log_penalty"].exp() + (p * (1 - p)) @ batch["A"].square() / len(p)}

    def upper_batches(self, stream: torch.Generator) -> Iterator[Params]:
        return itertools.repeat(self.splits["upper"])

    def lower_batches(self, stream: torch.Generator) -> Iterator[Params]:
        return itertools.repeat(self.splits["lower"])

    def evaluate(self, x: Params, y: Params) -> dict[str, float]:
        test = tree.to(self.splits["test"], y["w"].device, y["w"].dtype)
        right = (test["A"] @ y["w"] * test["b"] > 0).double().mean()
        return {"test loss": float(self.upper_loss(x, y, test)), "test accuracy": float(right)}

    def _load(self) -> tuple[Tensor, Tensor]:
        if self.data == "synthetic":
            return _synthetic(self.num_features, self.data_seed)
        from sklearn import datasets

        if self.data == "digits":
            A, target = datasets.load_digits(return_X_y=True)
            return _signed(A, target > 4)
        A, target = datasets.load_breast_cancer(return_X_y=True)
        return _signed(A, target > 0)

    def _scales(self, dim: int) -> Tensor:
        scales = torch.logspace(0, 1, dim, base=1 / self.spread, dtype=torch.float64)
        return scales[torch.randperm(dim, generator=rng.stream(self.data_seed, "logistic.scales"))]


def _signed(A: object, positive: object) -> tuple[Tensor, Tensor]:
    return torch.as_tensor(A).double(), torch.as_tensor(positive).double() * 2 - 1


def _synthetic(dim: int, seed: int) -> tuple[Tensor, Tensor]:
    """1,000 samples with correlated features, a tenth of them relevant; labels drawn, not set."""
    stream = rng.stream(seed, "logistic.synthetic")
    A = torch.randn(1000, dim, generator=stream, dtype=torch.float64)
    A = A + 0.5 * torch.randn(1000, 1, generator=stream, dtype=torch.float64)
    w = torch.randn(dim, generator=stream, dtype=torch.float64)
    w[dim // 10 :] = 0
    p = torch.sigmoid(2 * A @ w / max(1, dim // 10) ** 0.5)
    return A, (torch.rand(1000, generator=stream, dtype=torch.float64) < p).double() * 2 - 1
