"""Where an adjoint solve starts, from the adjoints of past upper steps.

Galerkin projection onto past solutions: Fischer (1998), Comput. Methods Appl. Mech. Engrg. 163.
"""

from __future__ import annotations

import itertools
from typing import Literal

from bilevel import tree
from bilevel.scalars.matrices import least_squares, numbers_of, tensor_of
from bilevel.types import Matvec, Params

Start = Literal["cold", "warm", "linear", "galerkin"]
DEPTH: dict[Start, int] = {"cold": 0, "warm": 1, "linear": 2, "galerkin": 3}
"""How many past adjoints each start looks at."""


def begin(
    start: Start, matvec: Matvec, b: Params, past: list[Params]
) -> tuple[Params, Params | None]:
    """(v_0, A v_0 where it is known) from the past adjoints, the newest last.

    cold: 0. warm: v⁻¹. linear: 2 v⁻¹ − v⁻². No product; the residual costs the solver one.
    galerkin: the v in the span of the past ones that is nearest to A⁻¹ b in the norm of A, by one
    product each and no other; never further off in that norm than cold, warm or linear.
    """
    if start != "warm":  # one vector may be 0; among several it would say nothing
        past = [v for v in past if tree.norm(v) > 0]
    if not past or start == "cold" or tree.norm(b) == 0:
        return tree.zeros_like(b), None
    if start == "warm" or len(past) == 1:
        return past[-1], None
    if start == "linear":
        return tree.sub(tree.scale(2.0, past[-1]), past[-2]), None
    return _galerkin(matvec, b, past)


def with_cached_product(matvec: Matvec, at: Params, product: Params) -> Matvec:
    """`matvec` that has the product at `at` already: a solver's first, that of its start.

    Used for these very tensors only, and as long as nobody has written into them; then it is
    dropped. A copy each time, since the caller may write into what it is given.
    """
    versions = {name: entry._version for name, entry in at.items()}
    cached: list[Params] = [product]

    def apply(v: Params) -> Params:
        if any(entry._version != versions[name] for name, entry in at.items()):
            cached.clear()
        same = all(v[name] is entry for name, entry in at.items())
        return tree.clone(cached[0]) if same and cached else matvec(v)

    return apply


def _galerkin(matvec: Matvec, b: Params, past: list[Params]) -> tuple[Params, Params]:
    basis = _differences(past)
    images = [matvec(d) for d in basis]
    gram = tensor_of([[tree.dot(d, Ad) for Ad in images] for d in basis])
    right = tensor_of([tree.dot(d, b) for d in basis])
    weights = numbers_of(least_squares((gram + gram.T) / 2, right))
    v, Av = tree.zeros_like(b), tree.zeros_like(b)
    for weight, d, Ad in zip(weights, basis, images, strict=True):
        tree.axpy_(v, weight, d)
        tree.axpy_(Av, weight, Ad)
    return v, Av


def _differences(past: list[Params]) -> list[Params]:
    """v⁻¹ and its first and second differences, of length 1: the same span, far from parallel."""
    newest, rows = list(reversed(past)), []
    while newest:
        size = tree.norm(newest[0])
        if size > 0:
            rows.append(tree.scale(1 / size, newest[0]))
        newest = [tree.sub(a, b) for a, b in itertools.pairwise(newest)]
    return rows
