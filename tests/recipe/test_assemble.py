"""From recipe to setup."""

import pytest
import torch

from bilevel import recipe as recipes
from bilevel.errors import RequirementError
from bilevel.recipe.assemble import assemble, device


def _setup(*overrides: str):
    return assemble(recipes.loads("problem: quadratic", overrides))


def test_a_setup_holds_what_the_recipe_says():
    setup = _setup("seed=5", "name=n", "runtime.dtype=float64", "evaluate.every=3", "upper.steps=4")
    assert (setup.seed, setup.name, setup.evaluate_every) == (5, "n", 3)
    assert setup.dtype is torch.float64
    assert setup.upper.steps == 4


def test_auto_takes_what_there_is(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert device("auto") == torch.device("cpu")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert device("auto") == torch.device("cuda", 0)
    assert device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(RequirementError, match=r"'cuda:2', but torch .* finds 2 CUDA devices"):
        device("cuda:2")


def test_a_missing_device_is_said_with_its_remedy(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    with pytest.raises(
        RequirementError, match=r"no CUDA device; use runtime.device=auto"
    ) as caught:
        _setup("runtime.device=cuda")
    assert caught.value.exit_code == 3
    with pytest.raises(RequirementError, match="no Apple GPU"):
        _setup("runtime.device=mps")
