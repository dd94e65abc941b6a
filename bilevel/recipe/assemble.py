"""From a recipe to a setup: the only place where the parts of a run are put together."""

from __future__ import annotations

from bilevel.problem.spread import spread
from bilevel.ranks import ALONE, Ranks
from bilevel.recipe.recipe import Recipe
from bilevel.run.placement import DTYPES, device
from bilevel.run.setup import Setup


def assemble(recipe: Recipe, ranks: Ranks = ALONE) -> Setup:
    """The setup that a recipe describes, on a device that this machine has; its problem over `ranks`.

    Raises `RequirementError` where it does not have it, `RecipeError` where all ranks would be on one.
    """
    return Setup(
        problem=spread(recipe.problem, ranks),
        ranks=ranks,
        lower=recipe.lower,
        upper=recipe.upper,
        estimator=recipe.estimator,
        name=recipe.name,
        seed=recipe.seed,
        device=device(recipe.runtime.device, ranks=ranks),
        dtype=DTYPES[recipe.runtime.dtype],
        autocast=DTYPES[recipe.runtime.autocast] if recipe.runtime.autocast else None,
        evaluate_every=recipe.evaluate.every,
        evaluate_held=recipe.evaluate.held,
        stop=recipe.evaluate.stop,
        best=recipe.checkpoint.best,
    )
