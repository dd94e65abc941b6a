"""A problem of several tasks."""

import torch

from bilevel.components import component


@component
class Fit:
    """A task: a tanh model of one draw of data, held near x so that G is convex. In float64."""

    dim: int = 3
    restart: bool = False

    def init(self, streams):
        x = torch.randn(self.dim, generator=streams["init"], dtype=torch.float64)
        return {"x": x}, {"y": 0.5 * x, "offset": torch.zeros((), dtype=torch.float64)}

    def episodes(self, stream):
        while True:
            a = torch.randn(2, 6, self.dim, generator=stream, dtype=torch.float64)
            b = torch.randn(2, 6, generator=stream, dtype=torch.float64)
            yield {"a": a[0], "b": b[0]}, (a[1], b[1])

    def lower_loss(self, x, y, batch):
        off = torch.tanh(batch["a"] @ y["y"]) + y["offset"] - batch["b"]
        return off.square().mean() + 2 * (y["y"] - x["x"]).square().sum()

    def upper_loss(self, x, y, batch):
        a, b = batch
        return (a @ y["y"] + y["offset"] - b).square().mean() + 0.1 * x["x"].pow(2).sum()

    def upper_batches(self, stream):
        return (upper for _, upper in self.episodes(stream))

    def lower_batches(self, stream):
        return (lower for lower, _ in self.episodes(stream))

    def evaluate(self, x, y):
        return {"first": float(y["y"][0])}
