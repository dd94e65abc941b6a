"""Ridge regression with one penalty a feature, learned on held-out data; closed form.

    G(x, w) = 1/(2n) ‖A w − b‖² + ½ Σⱼ exp(xⱼ) wⱼ²,    F(w) = 1/(2m) ‖A' w − b'‖²

Foo, Do and Ng (2007) learn one penalty a feature; scikit-learn's diabetes data by default.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from bilevel import rng, tree
from bilevel.components import component
from bilevel.rng import Streams
from bilevel.types import Params


@component
class Ridge:
    """Held-out squared error of ridge regression over the log of each feature's penalty."""

    data: Literal["diabetes", "synthetic"] = "diabetes"
    initial_log_penalty: float = -3.0
    data_seed: int = 0

    @cached_property
    def splits(self) -> dict[str, Params]:
        """Standardised (A, b) for "lower", "upper" and "test": half, a quarter, a quarter."""
        A, b = _diabetes() if self.data == "diabetes" else _synthetic(self.data_seed)
        order = torch.randperm(len(b), generator=rng.stream(self.data_seed, "ridge.split"))
        half, three = len(b) // 2, 3 * len(b) // 4
        parts = {"lower": order[:half], "upper": order[half:three], "test": order[three:]}
        train = A[parts["lower"]]
        A, b = (A - train.mean(0)) / train.std(0), b - b[parts["lower"]].mean()
        b = b / b[parts["lower"]].std()
        return {name: {"A": A[rows], "b": b[rows]} for name, rows in parts.items()}

    def init(self, streams: Streams) -> tuple[Params, Params]:
        dim = self.splits["lower"]["A"].shape[1]
        x = torch.full((dim,), self.initial_log_penalty, dtype=torch.float64)
        return {"log_penalty": x}, {"w": torch.zeros(dim, dtype=torch.float64)}

    def upper_loss(self, x: Params, y: Params, batch: Params) -> Tensor:
        off = batch["A"] @ y["w"] - batch["b"]
        return 0.5 * off @ off / len(off)

    def lower_loss(self, x: Params, y: Params, batch: Params) -> Tensor:
        penalty = 0.5 * (x["log_penalty"].exp() * y["w"] ** 2).sum()
        return self.upper_loss(x, y, batch) + penalty

    def upper_batches(self, stream: torch.Generator) -> Iterator[Params]:
        return itertools.repeat(self.splits["upper"])

    def lower_batches(self, stream: torch.Generator) -> Iterator[Params]:
        return itertools.repeat(self.splits["lower"])

    def lower_solution(self, x: Params) -> Params:
        """(AᵀA / n + diag(exp x))⁻¹ Aᵀb / n."""
        train = self._like("lower", x)
        moment = train["A"].T @ train["b"] / len(train["b"])
        return {"w": torch.linalg.solve(self._hessian(x), moment).to(x["log_penalty"].dtype)}

    def hypergradient(self, x: Params) -> Params:
        """−exp(x) · w* · v with (AᵀA / n + diag(exp x)) v = A'ᵀ(A' w* − b') / m."""
        held, penalty = self._like("upper", x), x["log_penalty"].double()
        w = self.lower_solution({"log_penalty": penalty})["w"]
        slope = held["A"].T @ (held["A"] @ w - held["b"]) / len(held["b"])
        v = torch.linalg.solve(self._hessian(x), slope)
        return {"log_penalty": (-penalty.exp() * w * v).to(x["log_penalty"].dtype)}

    def evaluate(self, x: Params, y: Params) -> dict[str, float]:
        test = tree.to(self.splits["test"], y["w"].device, y["w"].dtype)
        w = y["w"]
        explained = 1 - (test["A"] @ w - test["b"]).var() / test["b"].var()
        return {
            "test loss": float(self.upper_loss(x, y, test)),
            "test explained variance": float(explained),
        }

    def _hessian(self, x: Params) -> Tensor:
        A = self._like("lower", x)["A"]
        return A.T @ A / len(A) + x["log_penalty"].double().exp().diag()

    def _like(self, split: str, x: Params) -> Params:
        """A split where x is, in float64: torch factorises nothing in 16 bits."""
        device = x["log_penalty"].device
        return {name: part.to(device) for name, part in self.splits[split].items()}


def _diabetes() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_diabetes

    data, target = load_diabetes(return_X_y=True, scaled=False)
    return torch.as_tensor(data).double(), torch.as_tensor(target).double()


def _synthetic(seed: int) -> tuple[Tensor, Tensor]:
    """60 samples of 12 features at scales 0.1 to 10, a third of them irrelevant, noise 0.5."""
    stream = rng.stream(seed, "ridge.synthetic")
    A = torch.randn(60, 12, generator=stream, dtype=torch.float64) + 0.5
    w = torch.randn(12, generator=stream, dtype=torch.float64)
    w[8:] = 0
    b = A @ w + 0.5 * torch.randn(60, generator=stream, dtype=torch.float64) + 2
    return A * torch.logspace(-1, 1, 12, dtype=torch.float64), b
