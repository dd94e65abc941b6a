"""Adjoint systems to ask about: runs of them, and what a preconditioner sees of one."""

import torch

from bilevel import hypergradient, tree
from bilevel.rng import stream
from bilevel.types import Point, System
from tests.cases import relative


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


def quadratic_of(eigenvalues, seed, dtype):
    """(F, G, x, y, dΦ/dx) of a random quadratic with these eigenvalues, y solved in float64."""
    draw, n = stream(seed, "rotated"), len(eigenvalues)
    Q = torch.linalg.qr(torch.randn(n, n, generator=draw, dtype=torch.float64))[0]
    A = (Q * torch.as_tensor(eigenvalues, dtype=torch.float64)) @ Q.T
    B = torch.randn(n, 3, generator=draw, dtype=torch.float64)
    x, t = (torch.randn(k, generator=draw, dtype=torch.float64) for k in (3, n))
    y = torch.linalg.solve(A, B @ x)
    truth = {"x": B.T @ torch.linalg.solve(A, y - t)}
    A_, B_, t_ = A.to(dtype), B.to(dtype), t.to(dtype)

    def F(x, y, batch):
        return 0.5 * (y["y"] - t_).square().sum()

    def G(x, y, batch):
        return 0.5 * y["y"] @ (A_ @ y["y"]) - y["y"] @ (B_ @ x["x"])

    return F, G, {"x": x.to(dtype)}, {"y": y.to(dtype)}, truth


def asked_of(problem, estimator):
    """(relative error, stats)."""
    F, G, x, y, truth = problem
    got = hypergradient(F, G, x, y, estimator=estimator)
    return relative(tree.map(torch.Tensor.double, got.hypergradient), truth), got.stats
