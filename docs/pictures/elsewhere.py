"""Pictures of families on problems of their own, as their pages have them."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch

from bilevel import hypergradient, solve_lower, tree
from bilevel.calculus.gauss_newton import Composed
from bilevel.errors import ProblemError
from bilevel.estimators import Implicit
from bilevel.linear import CG, Dense
from bilevel.lower import Gradient, Newton
from bilevel.optimizers import SGD
from bilevel.preconditioners import KFAC
from bilevel.problem import OverTasks
from bilevel.registry.build import build
from bilevel.rng import Streams
from bilevel.types import Params
from bilevel_problems.sinusoid import Sinusoid
from docs.estimators import precision as narrow
from docs.pictures.chart import Curves

DOUBLE: dict[str, Any] = {"dtype": torch.float64}
PAGES = Path(__file__).parent.parent / "estimators"


def _off(found: Params, exact: Params) -> float:
    return tree.norm(tree.sub(found, exact)) / tree.norm(exact)


def kfac(counts: tuple[int, ...] = (5, 10, 20, 30, 40, 60, 80, 120, 160)) -> Curves:
    """The badly scaled layer of docs/estimators/kfac.md."""
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(100, 12, generator=draw, **DOUBLE) * 10 ** -torch.linspace(
        0, 1.5, 12, **DOUBLE
    )
    weights = 10 ** -torch.linspace(0, 2, 4, **DOUBLE)

    def lower(x: Params, y: Params, batch: None) -> torch.Tensor:
        z = torch.nn.functional.linear(inputs, y["weight"], y["bias"])
        penalty = torch.stack([(entry**2).sum() for entry in y.values()]).sum()
        return (weights * (z - 1).square()).mean() + 0.5 * x["decay"].exp() * penalty

    def upper(x: Params, y: Params, batch: None) -> torch.Tensor:
        return torch.stack([(entry - 1).square().sum() for entry in y.values()]).sum()

    x = {"decay": torch.tensor(-10.0, **DOUBLE)}
    start = {"weight": torch.zeros(4, 12, **DOUBLE), "bias": torch.zeros(4, **DOUBLE)}
    y = solve_lower(lower, x, start, solver=Newton()).y

    def ask(**options: Any) -> Any:
        return hypergradient(upper, lower, x, y, estimator=Implicit(**options))

    exact = ask(solver=Dense()).hypergradient
    found: Curves = {}
    for name, preconditioner in (
        ("cg, plain", None),
        ("cg, kfac", KFAC()),
        ("cg, kfac, damping 0.01", KFAC(damping=0.01)),
    ):
        found[name] = []
        for k in counts:
            got = ask(solver=CG(iterations=k, tolerance=0), preconditioner=preconditioner)
            spent = got.stats.gradients + got.stats.hvps + got.stats.cross_products
            found[name].append((float(spent), _off(got.hypergradient, exact)))
    return found


def gauss_newton() -> Curves:
    """A network fitted to targets that it can reach, and to others that it cannot."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, **DOUBLE)

    inputs, noise = normal(30, 3), normal(30, 2)
    true = {"first": normal(3, 4), "second": normal(4, 2)}
    x = {"scale": torch.ones(3, **DOUBLE), "decay": torch.tensor(-9.0, **DOUBLE)}

    def net(x: Params, y: Params, batch: Any) -> torch.Tensor:
        return torch.tanh(inputs * x["scale"] @ y["first"]) @ y["second"]

    def fitted(x: Params, y: Params, z: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        penalty = torch.stack([(entry**2).sum() for entry in y.values()]).sum()
        return ((z - batch) ** 2).mean() + 0.5 * x["decay"].exp() * penalty

    def upper(x: Params, y: Params, batch: Any) -> torch.Tensor:
        return torch.stack([(entry - 0.3).square().sum() for entry in y.values()]).sum()

    lower, found = Composed(outputs=net, loss=fitted), {}
    for spread in (0.003, 0.3):
        targets = net(x, true, None) + spread * noise
        y = solve_lower(lower, x, true, solver=Newton(), batch=targets).y
        off = float((net(x, y, None) - targets).square().mean().sqrt())

        def ask(y: Params = y, targets: torch.Tensor = targets, **options: Any) -> Any:
            return hypergradient(
                upper, lower, x, y, estimator=Implicit(**options), lower_batch=targets
            )

        truth = ask(solver=Dense())
        assert truth.stats.curvature > 0, "y is a minimum"
        for curvature in ("hessian", "gauss_newton"):
            points = found[f"{curvature}, residual {off:.1g}"] = []
            for k in (1, 2, 4, 7, 10, 14, 18, 22, 26, 30):
                got = ask(solver=CG(iterations=k, tolerance=0), curvature=curvature)
                spent = got.stats.gradients + got.stats.hvps + got.stats.cross_products
                points.append((float(spent), _off(got.hypergradient, truth.hypergradient)))
    return found


def meta_learning(counts: tuple[int, ...] = (1, 2, 3, 5, 8, 12)) -> Curves:
    """cos of the angle to MAML's hypergradient, at the untrained start, on 25 waves."""
    waves, streams = OverTasks(problem=Sinusoid(), num_tasks=25), Streams(0)
    x, y = tree.to(waves.init(streams), "cpu", torch.float64)
    shots, queries = tree.to(next(waves.episodes(streams["waves"])), "cpu", torch.float64)
    found: Curves = {}
    for steps in counts:
        for lr in (0.02, 0.002):
            adapted = solve_lower(
                waves.lower_loss,
                x,
                lambda x: waves.lower_start(x, y),
                solver=Gradient(steps=steps, optimizer=SGD(lr=lr)),
                batch=shots,
                record=True,
            )
            maml, *others = (
                hypergradient(
                    waves.upper_loss,
                    waves.lower_loss,
                    x,
                    adapted,
                    estimator=build("estimators", name),
                    upper_batch=queries,
                    lower_batch=shots,
                ).hypergradient
                for name in ("maml", "fomaml", "reptile")
            )
            for name, h in zip(("fomaml", "reptile"), others, strict=True):
                cosine = tree.dot(h, maml) / tree.norm(h) / tree.norm(maml)
                found.setdefault(f"{name}, lr {lr:g}", []).append((float(steps), float(cosine)))
    return found


def precision() -> Curves:
    """Error by the rounding of the dtype; a curve ends where the method is refused."""
    found: Curves = {}
    for name, spec in (
        ("implicit", "implicit"),
        ("unroll", "unroll"),
        ("fixed_point", "fixed_point"),
        ("f2sa, λ = 100", "f2sa"),
        ("f2sa, λ = 12", {"name": "f2sa", "strength": 12.0}),
        ("darts", "darts"),
    ):
        found[name] = []
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            try:
                found[name].append((torch.finfo(dtype).eps, narrow.error(spec, dtype)))
            except ProblemError:
                break
    return found


ROWS = {
    "cold": "start: cold, no preconditioner",
    "warm": "start: warm, no preconditioner",
    "galerkin": "start: galerkin, no preconditioner",
    "nystrom": "preconditioner: nystrom",
    "diagonal": "preconditioner: diagonal",
    "nothing else asked": "nothing else asked",
}


def fewer_products() -> Curves:
    """HVPs by those of cold CG that is told when to stop: the table of the page."""
    text = (PAGES / "fewer_products.md").read_text("utf-8")
    table = {
        cells[0].strip(): [cell.strip() for cell in cells[1:-1]]
        for line in re.findall(r"^\|(.*)$", text, re.MULTILINE)
        if len(cells := line.split("|")) == 7
    }
    spans = [[float(end) for end in cell.split(" to ")] for cell in table["condition number"]]
    middle = [math.sqrt(low * high) for low, high in spans]
    told = [int(cell) for cell in table["cold CG, told when to stop"]]
    found = {}
    for name, row in ROWS.items():
        spent = [int(cell.split(",")[0]) for cell in table[row]]
        found[name] = sorted(
            zip(middle, (a / b for a, b in zip(spent, told, strict=True)), strict=True)
        )
    return found
