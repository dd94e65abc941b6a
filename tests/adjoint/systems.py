"""Adjoint systems to ask about: runs of them, and what a preconditioner sees of one."""

import torch

from bilevel import hypergradient, tree
from bilevel.types import Point, System


def seen_by(case, spent=None, damping=0.0):
    losses, at = case.losses(), Point(case.x, case.y)
    A = case.hessian() + damping * torch.eye(tree.size(case.y))
    b = tree.map(torch.ones_like, case.y)
    made = System(lambda v: tree.unflatten(A @ tree.flatten(v), b), b, losses, at, damping, spent)
    return made, A


def matrix_of(inverse, like):
    eye = torch.eye(tree.size(like), dtype=torch.float64)
    return torch.stack([tree.flatten(inverse(tree.unflatten(e, like))) for e in eye], dim=1)


def along(upper, lower, truth, solution, estimator, x, steps, lr):
    """(relative error, stats) of every call of a run that follows the truth."""
    state, found = None, []
    for _ in range(steps):
        got = hypergradient(upper, lower, x, solution(x), estimator=estimator, state=state)
        h, state = truth(x), got.state
        error = tree.norm(tree.sub(got.hypergradient, h)) / tree.norm(h)
        found.append((error, got.stats))
        x = tree.axpy(-lr, h, x)
    return found
