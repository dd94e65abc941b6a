"""Every method of a run on a problem of unequal rows, over ranks and on the whole, as one table."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from bilevel import ranks as over
from bilevel import tree
from bilevel.calculus.gauss_newton import Composed
from bilevel.problem.learned_start import LearnedStart
from bilevel.problem.over_tasks import OverTasks
from bilevel.problem.spread import spread
from bilevel.ranks import ALONE, Ranks
from bilevel.run import Setup, Upper, engine
from bilevel.run import setup as set_up
from bilevel.sharding.parts import X_FROM, collected, teams
from bilevel_problems.sinusoid import Sinusoid
from tests.ranks import on_ranks

ROWS, BLOCKS, FEATURES, CLASSES = 7, 4, 4, 3


class Classes:
    """Multinomial regression with a penalty a feature and a weight a class; blocks of seven rows."""

    def __init__(self) -> None:
        stream = torch.Generator().manual_seed(3)
        shape = BLOCKS, ROWS, FEATURES
        a = torch.randn(shape, generator=stream, dtype=torch.float64)
        label = torch.randint(CLASSES, shape[:2], generator=stream)
        self.blocks = [
            {"a": a[k] + 0.3, "label": label[k], "block": k, "blocks": BLOCKS}
            for k in range(BLOCKS)
        ]

    def init(self, streams: Any) -> tuple[Any, Any]:
        x = {"penalty": torch.linspace(-1.0, 0.5, FEATURES), "class": torch.zeros(CLASSES) + 0.2}
        weight = torch.linspace(-0.5, 0.7, CLASSES * FEATURES).reshape(CLASSES, FEATURES)
        return x, {"weight": weight, "bias": torch.linspace(-0.1, 0.2, CLASSES)}

    def scores(self, x: Any, y: Any, batch: Any) -> Tensor:
        return linear(batch["a"], y["weight"], y["bias"])

    def penalised(self, x: Any, y: Any, scores: Tensor, batch: Any) -> Tensor:
        losses = cross_entropy(scores, batch["label"], reduction="none")
        penalty = (x["penalty"].exp() * y["weight"].square()).sum() + y["bias"].square().sum()
        return (x["class"].exp()[batch["label"]] * losses).mean() + 0.5 * penalty

    def lower_loss(self, x: Any, y: Any, batch: Any) -> Tensor:
        return self.penalised(x, y, self.scores(x, y, batch), batch)

    def upper_loss(self, x: Any, y: Any, batch: Any) -> Tensor:
        at = cross_entropy(self.scores(x, y, batch), batch["label"])
        return at + 0.05 * x["penalty"].square().sum()

    def upper_batches(self, stream: torch.Generator) -> Iterator[Any]:
        while True:
            yield self.blocks[int(torch.randint(BLOCKS, (), generator=stream))]

    lower_batches = upper_batches


class Whole(Classes):
    """Deterministic: one block."""

    def upper_batches(self, stream: torch.Generator) -> Iterator[Any]:
        while True:
            yield self.blocks[1]

    lower_batches = upper_batches


class Model(Whole):
    """The lower loss says what it is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.lower_loss = Composed(outputs=self.scores, loss=self.penalised)  # pyright: ignore


class Constrained(Whole):
    def lower_constraints(self, x: Any, y: Any, batch: Any) -> Any:
        high = y["weight"].sum(1) - 1.0 - 0.01 * batch["a"].mean() - 0.1 * x["penalty"].sum()
        return {"inequality": high, "equality": y["bias"].sum().reshape(1)}


class Projected(Whole):
    def project_lower(self, y: Any) -> Any:
        return {**y, "weight": y["weight"].clamp(-0.3, 0.3)}


class Proximal(Whole):
    def prox_lower(self, x: Any, y: Any, step: float) -> Any:
        w = y["weight"]
        return {**y, "weight": w.sign() * (w.abs() - 0.05 * step * x["penalty"].exp()).relu()}


class Mapped(Whole):
    """A damped step of the gradient by hand, on the whole batch, as a map."""

    def lower_map(self, x: Any, y: Any, batch: Any) -> Any:
        away = self.scores(x, y, batch).softmax(1)
        hit = torch.nn.functional.one_hot(batch["label"], CLASSES).to(away)
        slope = (away - hit).T @ batch["a"] / len(away) + x["penalty"].exp() * y["weight"]
        bias = (away - hit).mean(0) + y["bias"]
        return {"weight": y["weight"] - 0.2 * slope, "bias": y["bias"] - 0.2 * bias}


class Diagonal(Whole):
    def lower_diagonal(self, x: Any, y: Any, batch: Any) -> Any:
        weight = batch["a"].square().mean(0) + x["penalty"].exp()
        return {"weight": weight.expand(CLASSES, FEATURES).clone(), "bias": torch.ones(CLASSES)}


class Stepped(Whole):
    """x has one learning rate for all of y, and a momentum for each coordinate or output."""

    def init(self, streams: Any) -> tuple[Any, Any]:
        x, y = super().init(streams)
        keep = {"keep.weight": torch.linspace(-1.0, 0.4, CLASSES * FEATURES).reshape(CLASSES, -1)}
        return {**x, "rate": torch.tensor(-1.0), **keep, "keep.bias": torch.zeros(1) - 0.5}, y


class Started(Whole):
    """x is where y starts, and the centre of a penalty on it."""

    def init(self, streams: Any) -> tuple[Any, Any]:
        y = super().init(streams)[1]
        return y, tree.clone(y)

    def lower_start(self, x: Any, y: Any) -> Any:
        return x

    def lower_loss(self, x: Any, y: Any, batch: Any) -> Tensor:
        away = [(y[name] - x[name]).square().sum() for name in x]
        scores = self.scores(x, y, batch)
        return cross_entropy(scores, batch["label"]) + 0.5 * torch.stack(away).sum()

    def upper_loss(self, x: Any, y: Any, batch: Any) -> Tensor:
        return cross_entropy(self.scores(x, y, batch), batch["label"])


class Odd(Whole):
    """y has a number, fewer rows than ranks, none at all, and an entry that G is linear in."""

    def init(self, streams: Any) -> tuple[Any, Any]:
        x, y = super().init(streams)
        y |= {"number": torch.tensor(0.2), "one": torch.full((1, 2), 0.3), "none": torch.zeros(0)}
        return x, {**y, "linear": torch.ones(2)}

    def penalised(self, x: Any, y: Any, scores: Tensor, batch: Any) -> Tensor:
        more = (y["number"] - x["class"].sum()).square() + y["one"].square().sum()
        whole = super().penalised(x, y, scores * (1 + y["number"]), batch)
        return whole + more + 0.1 * y["linear"].sum() + y["none"].sum()


PROBLEMS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        Classes,
        Whole,
        Model,
        Constrained,
        Projected,
        Proximal,
        Mapped,
        Diagonal,
        Stepped,
        Started,
    )
}
PROBLEMS["Odd"] = Odd
PROBLEMS["OverTasks"] = lambda: OverTasks(
    problem=Sinusoid(shots=3, queries=4, width=3, proximal=0.5),  # pyright: ignore
    num_tasks=5,
)
PROBLEMS["LearnedStart"] = lambda: LearnedStart(problem=Whole())  # pyright: ignore

SGD = {"name": "gradient", "steps": 3, "optimizer": {"name": "sgd", "lr": 0.2}}
Case = Mapping[str, Any]
"""problem, estimator, and where they are others than here: lower, upper, steps."""


def ends(case: Case, ranks: Ranks) -> dict[str, Any]:
    """x, y and the statistics of each step of a run."""
    setup = Setup(
        spread(PROBLEMS[case.get("problem", "Whole")](), ranks),
        case.get("lower", SGD),
        Upper(steps=case.get("steps", 2), **case.get("upper", {})),
        case["estimator"],
        dtype=torch.float64,
        ranks=ranks,
        seed=5,
    )
    engine.refuse_mismatch(setup)
    state = engine.start(setup)
    events = [event for event in engine.run(setup, state) if type(event).__name__ == "Stepped"]
    x, y = collected(state.x), collected(state.y)
    h = torch.tensor([event.hypergradient_norm for event in events], dtype=torch.float64)
    F = torch.tensor([event.upper_loss for event in events], dtype=torch.float64)
    return {"x": x, "y": y, "F": {"F": F}, "h": {"h": h}}


@functools.cache
def _import_what_is_lazy() -> None:
    """What torch imports when it is first traced, once and not in every process that is forked."""
    for memory in ("traced", "mixed"):
        ends({"estimator": {"name": "unroll", "memory": memory}, "steps": 1}, ALONE)
    ends({"estimator": "shine", "lower": "lbfgs", "steps": 1}, ALONE)


Table = dict[str, list[Any]]


def table(cases: Mapping[str, Case], size: int) -> Table:
    """For each case what each rank found: (how far off one rank on the whole, relatively; its end).

    Where something is raised on a rank, or alone, its words stand there. One set of forked ranks: they
    divide the runs on the whole among them, then take those over ranks together.
    """
    return tables(cases, size, {})[0]


def tables(cases: Mapping[str, Case], size: int, *meshes: Mapping[str, Any]) -> list[Table]:
    """A table for each mesh, as `teams` takes it.

    Beside that, `x_from` is how many numbers of x are held in parts, and `only` which cases are taken.
    """
    _import_what_is_lazy()

    def work(ranks: Ranks) -> list[dict[str, Any]]:
        torch.set_num_threads(1)
        with over.apart():
            mine = {
                name: _told(lambda c=case: ends(c, ALONE))
                for k, (name, case) in enumerate(cases.items())
                if k % size == ranks.rank
            }
        truth = {name: found for one in ranks.gather(mine) for name, found in one.items()}
        found = []
        for mesh in meshes:
            set_up.X_FROM = mesh.get("x_from", X_FROM)
            only, how = mesh.get("only", cases), {*mesh} - {"x_from", "only"}
            over_teams = teams(ranks, **{key: mesh[key] for key in how})
            found.append({name: _compared(truth[name], cases[name], over_teams) for name in only})
        return found

    found = on_ranks(size, work)
    for one in found:
        if isinstance(one, Exception):
            raise one
    return [
        {name: [one[k][name] for one in found] for name in found[0][k]} for k in range(len(meshes))
    ]


def _told(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _compared(truth: Any, case: Case, ranks: Ranks) -> tuple[float, dict[str, Any]] | str:
    found = truth if isinstance(truth, str) else _told(lambda: ends(case, ranks))
    if isinstance(found, str):
        return found
    off = max(tree.norm(tree.sub(found[k], truth[k])) / tree.norm(truth[k]) for k in truth)
    return off, found
