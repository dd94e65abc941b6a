"""A lower level that is a map, and how to ask an estimator about a problem."""

import itertools

import torch

from bilevel import tree
from bilevel.estimators.fixed_point import FixedPoint
from bilevel.linear.gmres import GMRES
from bilevel.lower.proximal import Proximal
from bilevel.optimizers.differentiable import SGD
from bilevel.rng import Streams, stream
from bilevel.run.engine import Setup
from bilevel.run.upper import Upper
from tests.cases import ask_anyway

SEEDS = range(3)
EXACT = GMRES(iterations=200, restart=60, tolerance=1e-13)


class Recurrent:
    """y = tanh(W y + x) with a W of no symmetry; h = (F_y)ᵀ (I − D W)⁻¹ D, D = diag(1 − y²)."""

    def __init__(self, seed=0, radius=0.6, dim=6):
        s = stream(seed, "recurrent")
        W = torch.randn(dim, dim, generator=s, dtype=torch.float64)
        self.W = W * radius / float(torch.linalg.eigvals(W).abs().max())
        self.t = torch.randn(dim, generator=s, dtype=torch.float64) + 1
        self.x = {"x": torch.randn(dim, generator=s, dtype=torch.float64)}

    def init(self, streams):
        return self.x, {"y": torch.zeros_like(self.t)}

    def lower_map(self, x, y, batch):
        return {"y": torch.tanh(self.W @ y["y"] + x["x"])}

    def upper_loss(self, x, y, batch):
        return 0.5 * ((y["y"] - self.t) ** 2).sum() + 0.1 * (x["x"] ** 4).sum()

    def lower_loss(self, x, y, batch):
        return 0.5 * ((y["y"] - self.lower_map(x, y, batch)["y"]) ** 2).sum()

    def upper_batches(self, stream):
        return itertools.repeat(None)

    lower_batches = upper_batches

    def solved(self):
        y = {"y": torch.zeros_like(self.t)}
        for _ in range(2000):
            y = self.lower_map(self.x, y, None)
        return y

    def truth(self):
        y, x = self.solved()["y"], self.x["x"]
        D = (1 - y**2).diag()
        response = torch.linalg.solve(torch.eye(len(y), dtype=y.dtype) - D @ self.W, D)
        return {"x": 0.4 * x**3 + response.T @ (y - self.t)}


ask = ask_anyway


def at_random(problem, seed):
    x, _ = problem.init(Streams(seed))
    s = stream(seed, "at")
    return tree.map(lambda p: p + 0.5 * torch.randn(p.shape, generator=s, dtype=p.dtype), x)


def made(problem, **options):
    parts = {
        "lower": Proximal(),
        "upper": Upper(steps=2, optimizer=SGD(lr=0.1)),
        "estimator": FixedPoint(),
    }
    return Setup(problem, **{**parts, **options}, dtype=torch.float64)
