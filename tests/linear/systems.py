"""Linear systems of a given spectrum."""

import math

import torch

from bilevel import tree


def system(spectrum, seed, dtype=torch.float64):
    """(matvec, A, b as a tree of two entries, solution) with the given eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    n = len(spectrum)
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    A = (Q * torch.as_tensor(spectrum, dtype=torch.float64)) @ Q.T
    flat = torch.randn(n, generator=generator, dtype=torch.float64) + 1
    like = {"a": torch.zeros(n // 3, dtype=dtype), "b": torch.zeros(n - n // 3, dtype=dtype)}
    A = A.to(dtype)

    def matvec(v):
        return tree.unflatten(A @ tree.flatten(v), like)

    return matvec, A, tree.unflatten(flat.to(dtype), like)


def as_one_task(matvec, b):
    """The same system for a solver of tasks: one task of all unknowns."""

    def product(v):
        return {"all": tree.flatten(matvec(tree.unflatten(v["all"][0], b)))[None]}

    return product, {"all": tree.flatten(b)[None]}


def zero(b):
    return tree.zeros_like(b)


def run_cg(solver, matvec, b, **known):
    """Conjugate gradient from zero, with what a caller knows; b is copied, since it is taken over."""
    return solver.solve(matvec, tree.clone(b), zero(b), overwrite=True, **known)


def log_spectrum(n, condition):
    return torch.logspace(0, -math.log10(condition), n).tolist()


INDEFINITE = [-2.0, -0.5, -0.1, 0.3, 0.7, 1.0, 1.5, 3.0, 4.0]


def error(solve, A, b):
    truth = torch.linalg.solve(A, tree.flatten(b))
    return float((tree.flatten(solve.solution) - truth).norm() / truth.norm())
