"""From a recipe to a setup: the only place where the parts of a run are put together."""

from __future__ import annotations

import math

from bilevel.problem.spread import spread
from bilevel.ranks import ALONE, Ranks
from bilevel.recipe.recipe import Recipe
from bilevel.run.placement import DTYPES, device
from bilevel.run.setup import Setup
from bilevel.sharding.parts import teams


def assemble(recipe: Recipe, ranks: Ranks | None = None, *, resumed: bool = False) -> Setup:
    """The setup that a recipe describes, on a device that this machine has; its problem over `ranks`.

    They are the recipe's mesh; where a run is `resumed`, the nearest to it that they can be. Without
    `ranks` one process has all of it, whatever the mesh.

    Raises:
        RequirementError: the machine has no such device.
        RecipeError: all ranks would be on one, or they are no such mesh.
    """
    ranks = ALONE if ranks is None else _mesh(recipe, ranks, resumed)
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
        compile=recipe.runtime.compile,
        evaluate_before=recipe.evaluate.before,
        evaluate_every=recipe.evaluate.every,
        evaluate_held=recipe.evaluate.held,
        draw=recipe.evaluate.figures,
        stop=recipe.evaluate.stop,
        best=recipe.checkpoint.best,
    )


def _mesh(recipe: Recipe, ranks: Ranks, resumed: bool) -> Ranks:
    mesh, keep = recipe.runtime.mesh, recipe.runtime.keep
    if resumed:
        return teams(ranks, shard=math.gcd(mesh.shard, ranks.size), keep=keep)
    return teams(ranks, mesh.data, mesh.shard, keep)
