"""Lasso with one penalty a feature, or one for all, learned on held-out data; closed form.

    w*(x) = argmin over w of 1/(2n) ‖A w − b‖² + Σⱼ exp(xⱼ) |wⱼ|,    F(w) = 1/(2m) ‖A' w − b'‖²

`lower_loss` is the smooth part; the penalty is a proximal map. On the support S with signs σ:
(A_SᵀA_S / n) w_S = A_Sᵀ b / n − exp(x_S) σ. Bertrand et al. (2020), arXiv:2002.08943, differentiate it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cached_property

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from bilevel import rng, tree
from bilevel.components import component
from bilevel.rng import Streams
from bilevel.types import Params


@component
class Lasso:
    """Held-out squared error of the lasso over the log of its penalties; features partly irrelevant."""

    num_features: PositiveInt = 20
    num_relevant: PositiveInt = 6
    num_samples: PositiveInt = 60
    noise: NonNegativeFloat = 0.5
    per_feature: bool = True
    initial_log_penalty: float = -2.0
    data_seed: int = 0

    @cached_property
    def splits(self) -> dict[str, Params]:
        """(A, b) for "lower", "upper" and "test", `num_samples` each, in float64."""
        stream = rng.stream(self.data_seed, "lasso")

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=stream, dtype=torch.float64)

        w = 1 + draw(self.num_features).abs()
        w[self.num_relevant :] = 0

        def split() -> Params:
            A = draw(self.num_samples, self.num_features)
            return {"A": A, "b": A @ w + self.noise * draw(self.num_samples)}

        return {"lower": split(), "upper": split(), "test": split()}

    def init(self, streams: Streams) -> tuple[Params, Params]:
        dim = self.num_features if self.per_feature else 1
        x = torch.full((dim,), self.initial_log_penalty, dtype=torch.float64)
        return {"log_penalty": x}, {"w": torch.zeros(self.num_features, dtype=torch.float64)}

    def upper_loss(self, x: Params, y: Params, batch: Params) -> Tensor:
        off = batch["A"] @ y["w"] - batch["b"]
        return 0.5 * off @ off / len(off)

    def lower_loss(self, x: Params, y: Params, batch: Params) -> Tensor:
        return self.upper_loss(x, y, batch)

    def prox_lower(self, x: Params, y: Params, step: float) -> Params:
        """Soft thresholding: sign(w) max(|w| − step exp(x), 0)."""
        return {"w": _shrink(y["w"], step * x["log_penalty"].exp())}

    def upper_batches(self, stream: torch.Generator) -> Iterator[Params]:
        return itertools.repeat(self.splits["upper"])

    def lower_batches(self, stream: torch.Generator) -> Iterator[Params]:
        return itertools.repeat(self.splits["lower"])

    def lower_solution(self, x: Params) -> Params:
        """Proximal steps find the support and the signs; the rest is a linear system."""
        w, _ = self._solve(x)
        return {"w": w.to(x["log_penalty"].dtype)}

    def hypergradient(self, x: Params) -> Params:
        """−exp(x) σ v on the support, with (A_SᵀA_S / n) v = (∇F)_S; summed where one x is for all."""
        H, held = self._hessian(x), self._like("upper", x)
        w, support = self._solve(x)
        slope = held["A"].T @ (held["A"] @ w - held["b"]) / len(held["b"])
        v = torch.zeros_like(w)
        v[support] = torch.linalg.solve(H[support][:, support], slope[support])
        h = -x["log_penalty"].double().exp() * w.sign() * v
        h = h if self.per_feature else h.sum(0, keepdim=True)
        return {"log_penalty": h.to(x["log_penalty"].dtype)}

    def evaluate(self, x: Params, y: Params) -> dict[str, float]:
        test = tree.to(self.splits["test"], y["w"].device, y["w"].dtype)
        return {
            "test loss": float(self.upper_loss(x, y, test)),
            "features used": float((y["w"] != 0).sum()),
        }

    def _solve(self, x: Params) -> tuple[Tensor, Tensor]:
        """(w*, its support), in float64."""
        train, H = self._like("lower", x), self._hessian(x)
        moment, penalty = (
            train["A"].T @ train["b"] / len(train["b"]),
            x["log_penalty"].double().exp(),
        )
        spectrum = torch.linalg.eigvalsh(H)
        step, w = 1 / float(spectrum[-1]), torch.zeros_like(moment)
        for _ in range(int(40 * spectrum[-1] / spectrum[0].clamp(min=1e-3)) + 40):
            before, w = w, _shrink(w - step * (H @ w - moment), step * penalty)
            if torch.equal(w, before):
                break
        support, signs = w != 0, w.sign()
        right = (moment - penalty * signs)[support]
        w[support] = torch.linalg.solve(H[support][:, support], right)
        return w, support

    def _hessian(self, x: Params) -> Tensor:
        A = self._like("lower", x)["A"]
        return A.T @ A / len(A)

    def _like(self, split: str, x: Params) -> Params:
        """A split where x is, in float64: torch factorises nothing in 16 bits."""
        device = x["log_penalty"].device
        return {name: part.to(device) for name, part in self.splits[split].items()}


def _shrink(w: Tensor, threshold: Tensor) -> Tensor:
    return w.sign() * (w.abs() - threshold).clamp(min=0)
