"""Sine waves: what a task is, and that adapting from a learned start beats every control."""

import itertools
import math

import pytest
import torch

from bilevel import recipe, tree
from bilevel.cli.names import locate
from bilevel.recipe.assemble import assemble
from bilevel.rng import Streams, stream
from bilevel.run import engine
from bilevel_problems.sinusoid import Sinusoid


def test_shots_and_queries_are_of_one_wave():
    for shots, queries in itertools.islice(Sinusoid(shots=7).episodes(stream(0, "t")), 20):
        assert (len(shots["a"]), len(queries["a"])) == (7, 10)
        # b = c sin a + d cos a: two unknowns from the shots foretell the queries
        basis = torch.cat([shots["a"].sin(), shots["a"].cos()], 1).double()
        found = torch.linalg.lstsq(basis, shots["b"].double()).solution
        told = torch.cat([queries["a"].sin(), queries["a"].cos()], 1).double() @ found
        torch.testing.assert_close(told, queries["b"].double(), rtol=0, atol=1e-5)
        assert 0.1 <= float(found.norm()) <= 5 + 1e-5
        assert -math.pi - 1e-5 <= math.atan2(float(found[1]), float(found[0])) <= 1e-5


def test_losses_are_their_formulas():
    problem = Sinusoid(width=3, proximal=0.7)
    x, y = problem.init(Streams(0))
    x = tree.map(lambda p: p + 0.1, x)
    batch, _ = next(problem.episodes(stream(0, "t")))
    h = batch["a"]
    for i in (0, 1):
        h = torch.tanh(h @ y[f"weight{i}"].T + y[f"bias{i}"])
    error = ((h @ y["weight2"].T + y["bias2"] - batch["b"]) ** 2).mean()
    size = sum(float(p.numel()) for p in x.values())
    torch.testing.assert_close(problem.upper_loss(x, y, batch), error)
    torch.testing.assert_close(problem.lower_loss(x, y, batch), error + 0.35 * 0.01 * size)
    assert problem.lower_start(x, y) is x


def test_measures_are_of_waves_not_trained_on():
    problem = Sinusoid(num_held_out=3, held_out_steps=2, held_out_lr=0.01)
    x, y = problem.init(Streams(0))
    got = problem.evaluate(x, y)
    waves = itertools.islice(problem.episodes(stream(0, "sinusoid.held_out")), 3)
    before = after = 0.0
    for shots, queries in waves:
        y = tree.leaves(x)
        before += float(problem.upper_loss(x, y, queries).detach()) / 3
        for _ in range(2):
            g = torch.autograd.grad(problem.lower_loss(x, y, shots), list(y.values()))
            y = tree.leaves({n: p - 0.01 * d for (n, p), d in zip(y.items(), g, strict=True)})
        after += float(problem.upper_loss(x, y, queries).detach()) / 3
    assert got["error before adapting"] == pytest.approx(before, rel=1e-5)
    assert got["error after adapting"] == pytest.approx(after, rel=1e-5)


def run(*overrides):
    """Measures of the recipe before and after a short run."""
    setup = assemble(recipe.load(locate("sinusoid"), ["runtime.device=cpu", *overrides]))
    state = engine.start(setup)
    x, problem = tree.clone(state.x), setup.problem.problem
    for _ in engine.run(setup, state):
        pass
    return problem.evaluate(x, {}), problem.evaluate(state.x, {})


SHORT = ("upper.steps=60", "problem.num_tasks=10", "evaluate.every=0")


def test_what_is_learned_is_to_adapt():
    """Against two controls: the untrained start, and one trained on all waves without adapting."""
    untrained, learned = run(*SHORT, "problem.problem.num_held_out=50")
    _, joint = run(*SHORT, "problem.problem.num_held_out=50", "lower.optimizer.lr=1e-12")
    name = "error after adapting"
    assert learned[name] < untrained[name]
    assert learned[name] < joint[name]
    # and it is adaptation, not a better mean: before it the learned start is no better than joint
    assert learned["error before adapting"] > learned[name]
