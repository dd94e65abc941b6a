"""Losses that are no functions, or that autograd does not differentiate twice: seen before use."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

import bilevel
from bilevel.errors import ProblemError
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.penalty import Penalty
from bilevel.problem import purity
from tests.problem.squares import X, Y, lower_of, square, upper

# randomness


class Noisy:
    """Draws from a generator of its own."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, x, y, batch):
        noise = torch.randn(3, generator=self.generator, dtype=torch.float64)
        return (y["y"] - x["x"] * noise).square().sum()


def dropout(x, y, batch):
    return square({"x": nn.functional.dropout(x["x"], 0.5, training=True)}, y, batch)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (dropout, "draws random numbers"),
        (lambda x, y, b: square(x, y, b) * torch.rand(()), "draws random numbers"),
        # at y = 0 the value of the loss does not show it
        (lambda x, y, b: nn.functional.dropout(y["y"], 0.5).square().sum(), "draws random"),
        (Noisy(), "and then"),
    ],
    ids=["dropout", "rand", "unseen in the value", "a generator of its own"],
)
def test_a_random_loss_is_refused_with_the_remedy(loss, said):
    y = {"y": torch.zeros(3, dtype=torch.float64)}
    for call in (
        lambda: bilevel.solve_lower(loss, X, y),
        lambda: bilevel.hypergradient(upper, loss, X, y, estimator=Penalty()),
        lambda: bilevel.hypergradient(loss, square, X, y, estimator=Implicit()),
    ):
        state = torch.get_rng_state()
        with pytest.raises(ProblemError, match=rf"{said}.*module.eval.*in the batch"):
            call()
        assert torch.equal(state, torch.get_rng_state())


def test_noise_from_the_batch_and_dropout_that_is_off_are_accepted():
    net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).double()
    noise = torch.tensor([0.0, 2.0, 2.0], dtype=torch.float64)

    def seeded(x, y, batch):
        generator = torch.Generator().manual_seed(batch)
        return square({"x": x["x"] * torch.randn(3, generator=generator)}, y, None)

    def seeding(x, y, batch):
        torch.manual_seed(batch)
        return square({"x": x["x"] * torch.randn(3)}, y, None)

    def module(x, y, batch):
        return functional_call(net, y, (x["x"],)).square().sum()

    weights = {name: entry.detach() for name, entry in net.named_parameters()}
    purity.refuse_impure(lower_of(lambda x, y, b: square({"x": x["x"] * b}, y, b), noise), X, Y)
    purity.refuse_impure(lower_of(seeded, 3), X, Y)
    purity.refuse_impure(lower_of(seeding, 3), X, Y)
    net.eval()
    purity.refuse_impure(lower_of(module), X, weights)
    net.train()
    with pytest.raises(ProblemError, match="draws random numbers"):
        purity.refuse_impure(lower_of(module), X, weights)
