"""What the tests of comparisons share."""

from bilevel.comparing import plan

SHORT = ["upper.steps=4", "evaluate.every=0"]

GREEDY = """
import torch
from bilevel.estimators.implicit import Implicit
class Greedy:
    claim, needs = None, Implicit().needs
    def __init__(self, megabytes: int = 200): self.megabytes = megabytes
    def init(self, at): return Implicit().init(at)
    def estimate(self, losses, at, state):
        torch.ones(self.megabytes * 250_000, dtype=torch.float32)
        return Implicit().estimate(losses, at, state)
"""


def variant(recipe, **given):
    made = plan.make(recipe, labels=list(given), given=given)
    return {c.label: c.recipe for c in made.cells}
