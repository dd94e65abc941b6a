"""`check_estimator`: an estimator held to its claim and to the contract of its protocol."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bilevel import calculus, tree
from bilevel.testing.findings import copied, difference, report, through_a_checkpoint
from bilevel.testing.harness import Harness, in_float32, init
from bilevel.testing.needs import cases_of, unprovided, without_y
from bilevel.testing.passes import Passes
from bilevel.testing.reference import Scene
from bilevel.testing.verdicts import CheckRow, check
from bilevel.types import AGREES, CLAIMS, Counts, Estimate, Estimator, Losses, Params, Point

LOOSE = 0.05
"""Relative, between float32 and float64: a difference quotient loses half of the digits."""


def check_estimator(
    estimator: Estimator,
    *,
    seeds: tuple[int, ...] = (0, 1),
    within: float | None = None,
    average: int = 1,
) -> None:
    """Hold an estimator to its claim, on problems with closed forms, and to its protocol.

    - its claim, as `bilevel check` tests it, and with the state of another x;
    - names, shapes and dtypes of x, in float64 and float32; F, detached; y moved if it says so;
    - `state` goes through a checkpoint, is not written to, and decides the next answer alone;
    - x, y and the global random state are left as they were;
    - what it is asked for decides what it returns: not the answer of the call before;
    - it counts no fewer gradients and second-order products than autograd was asked for;
    - where it says that it needs no second derivative, no graph of one is built;
    - where F does not depend on y, dΦ/dx = ∇x F.

    One that requires `lower_constraints` or `lower_start` of a problem is held to closed forms
    that have them, and one that knows a projection or constraints to those as well.

    Args:
        estimator: the component, with the options that are to be checked.
        seeds: of the problems' data and starting points.
        within: for an estimator that claims nothing: how far, relatively, its answer as configured
            may be from dΦ/dx at the lower solution. Without it its answer must have a positive
            inner product with dΦ/dx.
        average: over how many answers `within` is taken; for methods that draw random numbers.

    Raises:
        CheckError: with everything that is wrong.
    """
    name = type(estimator).__name__
    report(name, {"protocol": lambda: _protocol(estimator)})
    report(name, parts_of(estimator, seeds=seeds, within=within, average=average))


def parts_of(
    estimator: Estimator, *, seeds: tuple[int, ...], within: float | None, average: int
) -> dict[str, Callable[[], Iterator[str]]]:
    """The checks of an estimator by name; each yields what is wrong."""
    parts: dict[str, Callable[[], Iterator[str]]] = {}
    for seed in seeds:
        for case, problem in cases_of(estimator, seed).items():
            harness = Harness(estimator, problem, seed)
            at = f"{case}, seed {seed}"
            parts[f"claim ({at})"] = lambda s=harness: _claim(s)
            parts[f"size ({at})"] = lambda s=harness: _size(s, within, average)
            parts[f"warm start ({at})"] = lambda s=harness: _warm(s)
    first = cases_of(estimator, seeds[0])
    plain = next(iter(first.values()))
    nonlinear = Harness(estimator, first.get("nonlinear", plain), seeds[0])
    parts |= {
        "returns": lambda: _returns(nonlinear),
        "float32": lambda: _narrow(nonlinear),
        "state": lambda: _state(nonlinear),
        "purity": lambda: _pure(nonlinear),
        "counts": lambda: _counts(nonlinear),
        "no adjoint": lambda: _without_y(Harness(estimator, without_y(plain), seeds[0])),
    }
    return parts


def _protocol(estimator: Estimator) -> Iterator[str]:
    if not isinstance(estimator, Estimator):
        missing = [n for n in ("needs", "claim", "init", "estimate") if not hasattr(estimator, n)]
        yield f"is not an Estimator: it lacks {', '.join(missing)}"
        return
    if estimator.claim not in CLAIMS:
        yield f"claim = {estimator.claim!r}; must be one of {(*CLAIMS,)}"
    elif estimator.claim not in ("solution", None) and not hasattr(estimator, "objective"):
        yield (
            f"claims {estimator.claim!r} and has no `objective(losses, at)`, the function of x "
            "that it differentiates"
        )
    if lacking := unprovided(estimator):
        yield f"requires {', '.join(lacking)}, which no problem that it could be held to has"


def _claim(harness: Harness) -> Iterator[str]:
    if harness.estimator.claim is None:
        return
    found = check(harness.setup, {"it": harness.estimator})
    row = next(row for row in found if isinstance(row, CheckRow))
    if row.verdict == "wrong":
        yield row.note
    elif row.verdict in ("refused", "untested"):
        yield f"its claim {row.claim!r} could not be tested: {row.note}"


def _size(harness: Harness, within: float | None, average: int) -> Iterator[str]:
    """What can be asked of an estimator that claims nothing."""
    if harness.estimator.claim is not None and within is None:
        return
    scene = harness.scene()
    reference = harness.truth(scene)
    state, total = harness.init(scene), tree.zeros_like(scene.x)
    for _ in range(average):
        got = harness.ask(scene, state)
        state, total = got.state, tree.add(total, got.hypergradient)
    h = tree.scale(1 / average, total)
    error, cosine = reference.error(h), reference.cosine(h)
    if within is not None and not error <= within:
        yield f"relative error {error:.2e} at the lower solution; within = {within:g} was asked for"
    if within is None and not (cosine is not None and cosine > 0):
        yield f"cosine {cosine} with dΦ/dx at the lower solution; must be > 0, or state `within`"


def _warm(harness: Harness) -> Iterator[str]:
    """A state from elsewhere may help, and must not decide."""
    here, there = harness.scene(0), harness.scene(1)
    first = harness.ask(here, harness.init(here))
    second = harness.ask(there, first.state)
    if all(torch.equal(a, b) for a, b in _beside(first.hypergradient, second.hypergradient)):
        yield "returns at another x, with the state from before, the very answer from before"
    if harness.estimator.claim != "solution":
        return
    tight = harness.tight
    warm = harness.ask(there, harness.ask(here, init(tight, here), estimator=tight).state)
    got = harness.ask(there, warm.state, estimator=tight)
    if got.stats.converged is not False:
        error = harness.truth(there).error(got.hypergradient)
        if not error <= 1e-6:
            yield f"relative error {error:.1e} from the state of another x; {1e-6:.0e} was expected"


def _beside(a: Params, b: Params) -> Iterator[tuple[Tensor, Tensor]]:
    yield from ((a[name], b[name]) for name in a)


def _returns(harness: Harness) -> Iterator[str]:
    scene = harness.scene()
    got = harness.ask(scene, harness.init(scene))
    yield from _alike(got.hypergradient, scene.x, "hypergradient")
    if not isinstance(got.value, Tensor) or got.value.shape != () or got.value.requires_grad:
        yield "value must be a detached scalar tensor: F where it was evaluated"
    elif not math.isfinite(float(got.value)):
        yield f"value = {float(got.value)}"
    stopped, converged = got.stats.stopped, got.stats.converged
    if stopped is not None and converged not in AGREES.get(stopped, ()):
        yield f"says converged = {converged} beside stopped = {stopped!r}, which do not agree"
    moves = harness.estimator.needs.moves_lower
    if moves and got.moved is None:
        yield "needs.moves_lower, and `moved` is None"
    if got.moved is not None:
        if not moves:
            yield "returns `moved`, and its needs do not say moves_lower: the run would ignore it"
        yield from _alike(got.moved.y, scene.tight, "moved.y")


def _alike(got: Params, expected: Params, name: str) -> Iterator[str]:
    if got.keys() != expected.keys():
        yield f"{name} has the names {sorted(got)}; expected {sorted(expected)}"
        return
    for key, entry in got.items():
        like = expected[key]
        if (entry.shape, entry.dtype) != (like.shape, like.dtype):
            yield (
                f"{name}[{key!r}] is {entry.dtype} {tuple(entry.shape)}; expected {like.dtype} "
                f"{tuple(like.shape)}"
            )
        if entry.requires_grad:
            yield f"{name}[{key!r}] carries a graph; detach it"


def _narrow(harness: Harness) -> Iterator[str]:
    wide = harness.scene()
    narrow = in_float32(wide)
    expected = harness.ask(wide, harness.init(wide)).hypergradient
    got = harness.ask(narrow, harness.init(narrow)).hypergradient
    yield from _alike(got, narrow.x, "hypergradient")
    off = tree.norm(tree.sub(tree.map(Tensor.double, got), expected)) / tree.norm(expected)
    if not off <= LOOSE:
        yield f"differs by {off:.1e} from its answer in float64; {LOOSE:g} at most was expected"


def _state(harness: Harness) -> Iterator[str]:
    here, there = harness.scene(0), harness.scene(1)
    state = harness.ask(here, harness.init(here)).state
    kept = through_a_checkpoint(state)
    if said := difference(state, kept):
        yield f"state does not come back from a checkpoint as it went in: {said}"
        return
    first = harness.ask(there, state)
    if said := difference(state, kept):
        yield f"writes into the state that it is given: {said}; it belongs to the caller"
    yield from _apart(first, there)
    again, resumed = harness.ask(there, kept), harness.ask(there, through_a_checkpoint(kept))
    for other, how in ((again, "asked again"), (resumed, "resumed from a checkpoint")):
        if difference(first.hypergradient, other.hypergradient):
            yield f"{how}, with the same state, it answers otherwise"
        elif difference(first.state, other.state):
            yield f"{how}, with the same state, it leaves another state"


def _apart(got: Estimate, scene: Scene) -> Iterator[str]:
    """Whoever gets an answer may write into it, and may move x and y in place."""
    moved = got.moved.y if got.moved else {}
    others = {"hypergradient": got.hypergradient, "moved.y": moved, **_inputs(scene)}
    kept = set(_memories(got.state))
    for name, params in others.items():
        if kept & set(_memories(params)):
            yield f"its state shares memory with {name}, which the caller may write into; copy it"


def _memories(value: Any) -> Iterator[int]:
    if isinstance(value, Tensor) and value.numel():
        yield value.untyped_storage().data_ptr()
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _memories(item)


def _pure(harness: Harness) -> Iterator[str]:
    scene = harness.scene()
    random, before = torch.random.get_rng_state(), repr(harness.estimator)
    kept = {name: tree.clone(part) for name, part in _inputs(scene).items()}
    batch = copied(scene.losses.lower.batch)
    harness.ask(scene, None)
    for name, part in _inputs(scene).items():
        if said := difference(part, kept[name]):
            yield f"writes into {name}: {said}"
    if said := difference(scene.losses.lower.batch, batch):
        yield f"writes into the batch: {said}"
    if not torch.equal(random, torch.random.get_rng_state()):
        yield "draws from the global random state; rng.stream(seed, name) is a stream of its own"
    if repr(harness.estimator) != before:
        yield "changes its own fields; what it remembers belongs in `state`"


def _inputs(scene: Scene) -> dict[str, Params]:
    return {"x": scene.x, "y": scene.tight}


def _counts(harness: Harness) -> Iterator[str]:
    scene, seen = harness.scene(), Passes()
    stats = harness.ask(scene, harness.init(scene), wrap=seen.watch).stats
    products = stats.hvps + stats.cross_products
    if stats.gradients < seen.first:
        yield f"counts {stats.gradients} gradients; autograd was asked for {seen.first}"
    if products < seen.second:
        yield f"counts {products} second-order products; autograd was asked for {seen.second}"
    if not harness.estimator.needs.second_order and seen.graphs:
        yield (
            "needs.second_order is False, and a gradient was taken with its graph "
            f"(create_graph=True), {seen.graphs} times"
        )
    if products and not harness.estimator.needs.second_order:
        yield f"needs.second_order is False, and it counts {products} second-order products"


def _without_y(harness: Harness) -> Iterator[str]:
    scene = harness.scene()
    tight = harness.tight
    got = harness.ask(scene, init(tight, scene), estimator=tight).hypergradient
    if not tree.is_finite(got):
        yield "F does not depend on y, and the hypergradient is not finite"
    elif harness.estimator.claim in ("solution", "path", "step", "direct"):
        _, truth, _ = calculus.gradients(_fresh(scene).upper, Point(scene.x, scene.tight))
        off = tree.norm(tree.sub(got, truth)) / tree.norm(truth)
        if not off <= 1e-6:
            yield f"F does not depend on y, and it is {off:.1e} off ∇x F"


def _fresh(scene: Scene) -> Losses:
    counts = Counts()
    losses = scene.losses
    return Losses(replace(losses.upper, counts=counts), replace(losses.lower, counts=counts))
