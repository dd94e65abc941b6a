"""The words every room shares: parameters, points, losses, estimates, and the protocols."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import (
    Any,
    ClassVar,
    Literal,
    Protocol,
    TypeVar,
    runtime_checkable,
)

from torch import Tensor

from bilevel import notebook
from bilevel.errors import ProblemError

Params = dict[str, Tensor]
Named = str | Mapping[str, Any]
"""A component by its name, or a mapping of `name` and options, as in a recipe."""
Function = Callable[[Params, Params, Any], Tensor]
"""A loss as the user writes it: pure in (x, y, batch), returns a scalar."""


@dataclass
class Counts:
    """Oracle calls made through a pair of losses; every `Loss` of the pair shares one."""

    losses: int = 0
    gradients: int = 0
    hvps: int = 0
    cross_products: int = 0
    reached: set[str] = field(default_factory=set)
    """Names of upper variables that were seen to influence a loss."""
    cut: set[str] = field(default_factory=set)
    """The levels whose loss was seen to call what takes a part of it out of autograd's graph."""


RESTRICTIONS = ("project_lower", "prox_lower", "lower_constraints")
"""The optional methods of a problem that restrict y: y* is no longer where ∇y G = 0."""


@dataclass(frozen=True)
class Structure:
    """What is known of the lower level beside G; each where the problem has it."""

    project: Callable[[Params], Params] | None = None
    """y ↦ the nearest point of the set that y is restricted to; applied after each lower step."""
    prox: Callable[[Params, Params, float], Params] | None = None
    """(x, y, step) ↦ argmin over u of R(x, u) + ‖u − y‖² / 2 step: y* minimises G + R."""
    map: Callable[[Params, Params, Any], Params] | None = None
    """(x, y, batch) ↦ T(x, y), whose fixed point y* is."""
    constraints: Callable[[Params, Params, Any], Params] | None = None
    """(x, y, batch) ↦ {"equality": c, "inequality": d}: y* minimises G over c = 0, d ≤ 0."""
    diagonal: Callable[[Params, Params, Any], Params] | None = None
    """(x, y, batch) ↦ an approximation of the diagonal of ∂²yy G, positive, in the shapes of y."""

    @property
    def restrictions(self) -> frozenset[str]:
        """Those of `RESTRICTIONS` that there are."""
        held = (self.project, self.prox, self.constraints)
        return frozenset(n for n, f in zip(RESTRICTIONS, held, strict=True) if f is not None)


def first_ignored(restrictions: Collection[str], supported: Collection[str]) -> str | None:
    """One of `restrictions` that nobody who supports those in `supported` takes into account.

    Constraints say the same as a projection or a proximal map beside them: one of them is enough.
    """
    if "lower_constraints" in restrictions and "lower_constraints" in supported:
        return None
    for name in ("project_lower", "prox_lower"):
        if name in restrictions and name not in supported:
            return name
    return "lower_constraints" if {*restrictions} == {"lower_constraints"} else None


@dataclass(frozen=True)
class Several:
    """Batches that a loss is the mean over, in the place of one batch."""

    batches: tuple[Any, ...]


@dataclass(frozen=True)
class Loss:
    """One of the two objectives with its batch bound: `loss(x, y)` is a scalar tensor."""

    function: Function
    batch: Any
    counts: Counts
    level: Literal["upper", "lower"]
    draws: Iterator[Any] | None = None
    """Where `fresh` takes batches from."""
    structure: Structure = Structure()

    def __call__(self, x: Params, y: Params) -> Tensor:
        if isinstance(self.batch, Several):
            values = [self.on(batch)(x, y) for batch in self.batch.batches]
            return sum(values[1:], values[0]) / len(values)
        self.counts.losses += 1
        return self.function(x, y, self.batch)

    @property
    def one_batch(self) -> Any:
        """Its batch, for what takes a batch and is no loss.

        Raises:
            ProblemError: it is the mean over several.
        """
        if isinstance(self.batch, Several):
            raise ProblemError(
                f"{self.level}.accumulate takes the mean of losses over {len(self.batch.batches)} "
                "batches, and lower_map, lower_constraints, lower_diagonal and Gauss-Newton products "
                "are of one batch: set lower.accumulate to 1, and make the batches larger"
            )
        return self.batch

    def on(self, batch: Any) -> Loss:
        """The same objective on another batch; oracle calls are still counted together."""
        return Loss(self.function, batch, self.counts, self.level, self.draws, self.structure)

    def fresh(self) -> Loss:
        """The same objective on a batch drawn now; itself where it has no batch at all.

        Raises:
            ProblemError: it has one batch and nothing to draw others from.
        """
        if self.draws is not None:
            return self.on(next(self.draws))
        if self.batch is None:
            return self
        raise ProblemError(
            f"{self.level}: the estimator draws fresh batches, and only one was given; pass "
            f"{self.level}_batches, an iterator of them (itertools.repeat(batch) for a "
            "deterministic loss)"
        )


@dataclass(frozen=True)
class Losses:
    """F and G, each with its batch, sharing one ledger of oracle calls."""

    upper: Loss
    lower: Loss

    @property
    def counts(self) -> Counts:
        return self.upper.counts


@dataclass
class PathGraph:
    """The graph of a path, kept while its steps were taken: good for one backward pass, at that x."""

    of: Params
    """The x at which the steps were taken."""
    batches: tuple[Any, ...]
    ends: tuple[Params, Params, Params] | None
    """x and y_0 as leaves, and y_K with its graph back to them; None once taken."""

    def take(self, path: Path, x: Params) -> tuple[Params, Params, Params] | None:
        """`ends`, once; None where the path has other steps."""
        if not _took(self.of, self.batches, path, x):
            return None
        ends, self.ends = self.ends, None
        return ends


@dataclass(frozen=True)
class PathIterates:
    """Where a path passed, kept while its steps were taken: good at that x."""

    of: Params
    """The x at which the steps were taken."""
    batches: tuple[Any, ...]
    passed: Mapping[int, tuple[Params, Any]]
    """(y, state of the optimizer) by the number of steps before it; the first and the last are there."""

    def along(self, path: Path, x: Params) -> Mapping[int, tuple[Params, Any]] | None:
        """`passed`; None where the path has other steps."""
        return self.passed if _took(self.of, self.batches, path, x) else None


def _took(of: Params, batches: tuple[Any, ...], path: Path, x: Params) -> bool:
    """Whether a path has these very steps, taken at this very x."""
    if path.batches is not batches or x.keys() != of.keys():
        return False
    return all(x[name] is entry for name, entry in of.items())


@dataclass(frozen=True)
class Path:
    """K lower steps y_{k+1} = step(y_k, ∇y G(x, y_k; batch_k)), kept so that they can be replayed.

    Each ends with the projection of the lower loss that it is replayed with, where there is one.
    """

    optimizer: Optimizer
    start: Params
    state: Any
    batches: tuple[Any, ...]
    restart: Callable[[Params], Params] | None = None
    """y_0 as a function of x, where it is one and the path begins there (MAML)."""
    dropped: int = 0
    """Steps that were taken before these and not recorded."""
    graph: PathGraph | None = field(default=None, repr=False, compare=False)
    iterates: PathIterates | None = field(default=None, repr=False, compare=False)


Pairs = tuple[tuple[Params, Params], ...]
"""(s, ∇y G(x, y + s) − ∇y G(x, y)), oldest first: what a lower solver learned of ∂²yy G."""


@dataclass(frozen=True)
class Point:
    """Where a hypergradient is asked for: upper x, lower y, and how the lower level came there."""

    x: Params
    y: Params
    path: Path | None = None
    pairs: Pairs | None = None
    """What a quasi-Newton lower solver learned on the way to y."""


Stopped = Literal[
    "tolerance",
    "iterations",
    "curvature",
    "rounding",
    "stagnation",
    "asked",
    "degenerate",
    "unverified",
    "infeasible",
]
"""Why a solve ended: its tolerance is met; its budget is spent; a direction has no positive
curvature; its residual is as small as the dtype can tell; no step gains anything more; whoever
watched it asked for the end. Or why the end does not count: what was solved is the system of one
side of a kink; the residual it reports is not the true one; the constraints cannot be met."""

AGREES: Mapping[Stopped | None, tuple[bool | None, ...]] = {
    None: (None,),
    "tolerance": (True,),
    "iterations": (False, None),
    "curvature": (False,),
    "rounding": (True, False),
    "stagnation": (False,),
    "asked": (True,),
    "degenerate": (False,),
    "unverified": (False,),
    "infeasible": (False,),
}
"""What `converged` may be beside each reason: None where there was no tolerance to reach."""


KNOWN_CONSTANTS = "known constants"
"""`Stats.error_bound_from` of a bound that leaves nothing out and estimates nothing."""


@dataclass(frozen=True, repr=False)
class Stats:
    """The evidence that comes with a hypergradient; None where a method has nothing to say."""

    gradients: int = 0
    """First-order gradients of F or G."""
    hvps: int = 0
    """Products with ∂²yy G."""
    cross_products: int = 0
    """Products with (∂²xy G)ᵀ."""
    iterations: int = 0
    """Iterations of the adjoint solve, or lower steps differentiated."""
    residual: float | None = None
    """‖b − A v‖ / ‖b‖ of the adjoint system at the returned v."""
    damping_residual: float | None = None
    """damping ‖v‖ / ‖b‖: what v leaves of the system without damping, beside `residual`. None where
    there is no damping."""
    value_error: float | None = None
    """F(x, y) − F(x, y*) to first order, vᵀ∇y G: what y, where it is not solved to the end, makes of F."""
    y_error: float | None = None
    """What h changes by, relative to it, where y takes a step of Newton's method. Measured in the first
    call of `bilevel.hypergradient`, where ∇y G leaves a doubt of y and nothing restricts it."""
    damping_error: float | None = None
    """What h changes by, relative to it, with a tenth of the damping. Measured in the first call of
    `bilevel.hypergradient`, where `damping_residual` leaves a doubt."""
    curvature: float | None = None
    """Smallest pᵀA p / pᵀp met; ≤ 0 means the lower Hessian is not positive definite there."""
    condition: float | None = None
    """Estimate (a lower bound) of the condition number of A, from Ritz values."""
    converged: bool | None = None
    """Whether the solve reached its tolerance, or as much of it as the dtype allows; None where it
    has none to reach."""
    stopped: Stopped | None = None
    """Why the solve ended; None where there was none to end, or a method of others does not say."""
    degenerate: int | None = None
    """Kinks or constraints of the lower level that are weakly active, or of a wrong sign: where
    there are any, Φ may have no derivative, or y is not solved well enough to tell."""
    error_bound: float | None = None
    """A bound or an estimate of ‖h − dΦ/dx‖ from what was seen at this point."""
    error_bound_from: str | None = None
    """Where the constants in `error_bound` come from. Of `KNOWN_CONSTANTS` it is a bound, shown as
    "≤"; of anything else an estimate, which the error may exceed, shown as "~"."""
    seconds: float = 0.0

    def __repr__(self) -> str:
        """What it has something to say of, numbers to three digits."""
        said = {f.name: getattr(self, f.name) for f in fields(self)}
        said = {f.name: said[f.name] for f in fields(self) if said[f.name] != f.default}
        shown = (f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v!r}" for k, v in said.items())
        return f"Stats({', '.join(shown)})"


@dataclass(frozen=True)
class Moved:
    """Where a method that moves y itself has taken it."""

    y: Params
    loss: float
    """The function of y that it descends, G or a mixture of F and G, before the move."""
    gradient_norm: float
    """The norm of the direction that y was moved along."""
    steps: int = 1


def _entries(params: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors by their names, also in containers of a problem's own: "layers.0.weight"."""
    if isinstance(params, Tensor):
        yield name, params
        return
    if isinstance(params, (list, tuple)):
        parts = enumerate(params)
    else:
        parts = (params if isinstance(params, Mapping) else vars(params)).items()
    for key, part in parts:
        yield from _entries(part, f"{name}.{key}" if name else str(key))


def _described(entry: Tensor) -> str:
    return f"norm {float(entry.norm()):.3g}, shape {[*entry.shape]}"


Claim = Literal["solution", "path", "step", "penalty", "direct"]

CLAIMS: Mapping[Claim | None, str] = {
    "solution": "the gradient of F(x, y*(x))",
    "path": "the gradient of F(x, y_K(x)), along the lower steps",
    "step": "the gradient of F(x, y − lr ∇y G(x, y)), after one lower step",
    "penalty": "the gradient of a penalty function",
    "direct": "the gradient of F(x, y) at fixed y",
    None: "the gradient of no function: an approximation",
}


@dataclass(frozen=True, repr=False)
class Estimate:
    """A hypergradient with its evidence. `state` warm-starts the next call at a nearby point."""

    hypergradient: Params
    value: Tensor
    """F at the point the estimator evaluated it, a detached scalar."""
    state: Any
    stats: Stats
    moved: Moved | None = None
    """For a method whose `needs` say that it moves y itself."""
    step: float | None = None
    """How far x is to go along −hypergradient, for one whose `needs` say that it moves x."""
    reasons: tuple[str, ...] = ()
    """Why not to trust it, each with its remedy: set by `bilevel.hypergradient` from `stats`, and from
    the lower solve where that is known. Empty where no evidence speaks against it, and there is some
    where dΦ/dx or no function is claimed."""
    claim: Claim | None = None
    """Of which function it is the gradient, as `Estimator.claim`: set by `bilevel.hypergradient`."""

    @property
    def trusted(self) -> bool:
        """Whether it can be taken for the gradient that the method claims: no `reasons`."""
        return not self.reasons

    def __repr__(self) -> str:
        """F, the norm and shape of each entry, the evidence and the doubts; no tensor in full."""
        return "\n".join(
            [f"Estimate: F = {float(self.value):.4g}", *map(": ".join, self._rows()), *self.reasons]
        )

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        rows = [(name, [value]) for name, value in self._rows()]
        head = f"F = {float(self.value):.4g}"
        return notebook.table(["hypergradient", head], rows, [head]) + notebook.lines(*self.reasons)

    def _rows(self) -> Iterator[tuple[str, str]]:
        for name, entry in _entries(self.hypergradient):
            yield name, _described(entry)
        yield "evidence", repr(self.stats).removeprefix("Stats(").removesuffix(")") or "none"
        yield "claims", CLAIMS[self.claim]
        yield "trusted", "yes" if self.trusted else "no"


Iterates = Literal["each", "root"]
"""Each iterate of K steps, or each ⌈√K⌉-th; the last is there in both."""


@dataclass(frozen=True)
class Needs:
    """What an estimator needs of its surroundings; a run that cannot give it is refused at once."""

    second_order: bool = True
    """Products with second derivatives of G."""
    path: float = 0
    """How many of the last lower steps must be recorded: 0, a number, or `math.inf` for all."""
    graph: bool = False
    """It takes the graph of those steps where the lower solver kept it, and evaluates none again."""
    iterates: Iterates | None = None
    """Which of the iterates between those steps it takes where the lower solver kept them, so that it
    takes no step again to come to them."""
    fresh: bool = False
    """Batches of its own, drawn by `Loss.fresh` while it estimates."""
    pairs: bool = False
    """The pairs of a quasi-Newton lower solver, as `Point.pairs`."""
    learned: bool = False
    """It differentiates what the lower optimizer takes from x (`bilevel.optimizers.Learned`)."""
    moves_lower: bool = False
    """It moves y itself and returns `Estimate.moved`: the run's lower solver is not used."""
    moves_upper: bool = False
    """It returns `Estimate.step`: the run's upper optimizer is not used."""
    requires: frozenset[str] = frozenset()
    """Optional methods of a problem that it can do nothing without, such as lower_start."""
    supports: frozenset[str] = frozenset()
    """Which of a problem's `RESTRICTIONS` it takes into account."""
    rounding_amplification: float = 1.0
    """How many times the rounding of a gradient comes back in a difference that it takes; a dtype
    that is too coarse for that is refused."""
    rounding_remedy: str = "an option that makes the difference larger"
    """What amplifies less, for the refusal: "a smaller strength"."""
    caution: Callable[[], str] | None = None
    """Says what is known to be wrong with it; a run warns with that, `bilevel check` notes it."""

    def ignored(self, restrictions: Collection[str]) -> str | None:
        """One of these restrictions of y that it would ignore, if there is one."""
        return first_ignored(restrictions, self.supports)


@dataclass(frozen=True)
class Offers:
    """What a lower solver gives to an estimator, and which restrictions of y it respects."""

    path: bool = False
    """Its steps can be recorded and replayed, as `LowerSolution.path`."""
    graph: bool = False
    """It can keep the graph of the steps that it records: `solve` takes `graph`."""
    iterates: bool = False
    """It can keep the iterates between the steps that it records: `solve` takes `iterates`."""
    pairs: bool = False
    """It returns `LowerSolution.pairs`."""
    learned: frozenset[str] = frozenset()
    """The entries of x that its steps take as options, such as a learned learning rate."""
    supports: frozenset[str] = frozenset()
    """Which of a problem's `RESTRICTIONS` it takes into account."""

    def ignored(self, restrictions: Collection[str]) -> str | None:
        """One of these restrictions of y that it would ignore, if there is one."""
        if "prox_lower" in restrictions and "prox_lower" not in self.supports:
            return "prox_lower"  # constraints beside it do not say what R is
        return first_ignored(restrictions, self.supports)


@runtime_checkable
class Estimator(Protocol):
    """Returns an estimate of dΦ/dx at a point. Frozen; what it remembers is `state`.

    `claim` names the function of x whose exact gradient `estimate` returns once its inner solve
    has converged: "solution" Φ(x) = F(x, y*(x)); "path" F(x, y_K(x)) with y_K the replayed path;
    "step" F(x, y − lr ∇y G(x, y)), or that to first order; "penalty" a penalty function that it
    states, such as λ (min over y of (G + F / λ) − G(x, y)), at fixed y where it moves y; "direct"
    F(x, y) at fixed y; None for no such function.
    `bilevel check` holds every estimator to its claim. One whose claim is other than "solution"
    has `objective(losses, at) -> Callable[[Params], Tensor]`, that function; one that needs other
    settings for its claim to hold (iterations, no damping) has `tight(dim_y)`, itself with them.

    One that knows better than a step of Newton's method on G how y comes nearer to the lower solution
    has `nearer(losses, at)`, that y, or None where it cannot tell; `Stats.y_error` is measured there.
    """

    @property
    def needs(self) -> Needs: ...
    @property
    def claim(self) -> Claim | None: ...
    def init(self, at: Point) -> Any: ...
    def estimate(self, losses: Losses, at: Point, state: Any) -> Estimate: ...


Matvec = Callable[[Params], Params]
SolverOption = Literal["precondition", "stop", "observe", "overwrite"]


@dataclass(frozen=True)
class Solve:
    """Solution of A v = b, with evidence."""

    solution: Params
    stats: Stats


@runtime_checkable
class LinearSolver(Protocol):
    """Solves A v = b knowing only v ↦ A v. `start` may be warm; zero costs no product.

    Neither b nor `start` is written into. One that cannot solve the system however long it works
    sets `approximate = True`; implicit differentiation then claims nothing. One whose `solve` takes
    more by keyword says so in `accepts`, a set of:

    - "precondition": r ↦ M⁻¹ r, M symmetric positive definite;
    - "stop": progress ↦ whether to end, which decides in the place of the tolerance;
    - "observe": called with each pair (p, A p), both the solve's own;
    - "overwrite": whether b and `start` may be written into, and come back as whatever they are.

    `tight(dim)`, where there is one, is the same solver converged as far as float64 allows.
    """

    def solve(self, matvec: Matvec, b: Params, start: Params) -> Solve: ...


def accepted(solver: LinearSolver) -> frozenset[SolverOption]:
    """What its `solve` takes beside matvec, b and start."""
    return getattr(solver, "accepts", frozenset())


def is_approximate(solver: LinearSolver) -> bool:
    """Whether it cannot solve the system however long it works."""
    return getattr(solver, "approximate", False)


C = TypeVar("C")


def changed(value: C, /, **values: Any) -> C:
    """`dataclasses.replace` that calls no `__init__`: for those that compute nothing from their fields."""
    assert values.keys() <= value.__dict__.keys(), values
    made = object.__new__(type(value))
    made.__dict__.update(value.__dict__, **values)
    return made


def tightened(component: C, dim: int) -> C:
    """A component converged as far as float64 allows for `dim` unknowns, by its own `tight`.

    Itself where it has none: there is nothing to converge.
    """
    tighten = getattr(component, "tight", None)
    return tighten(dim) if tighten else component


@dataclass(frozen=True)
class System:
    """The adjoint system (∂²yy G + damping · I) v = b at a point, as a preconditioner sees it."""

    matvec: Matvec
    """v ↦ (∂²yy G + damping · I) v; every call is one HVP and is counted."""
    b: Params
    losses: Losses
    at: Point
    damping: float
    spent: int | None
    """Iterations that the last solve took; None before the first."""


@runtime_checkable
class Preconditioner(Protocol):
    """Gives M⁻¹ of some M ≈ A, symmetric positive definite, or None where it does not pay (yet).

    What it builds goes into the state: nested dicts of tensors and numbers, never written into.
    One that needs the pairs of a quasi-Newton lower solver sets `needs_pairs = True`. One that
    learns from a solve sets `learns = True`, and has `room(b)`, how many pairs (p, A p) of the
    solve it wants, and `learn(state, pairs)`, the state with them.
    """

    def init(self, at: Point) -> Any: ...
    def prepare(self, system: System, state: Any) -> tuple[Matvec | None, Any]: ...


class LearningPreconditioner(Preconditioner, Protocol):
    """A `Preconditioner` that sets `learns = True`."""

    def room(self, b: Params) -> int: ...
    def learn(self, state: Any, pairs: list[tuple[Params, Params]]) -> Any: ...


@runtime_checkable
class Optimizer(Protocol):
    """A step that autograd can differentiate: pure, out of place. State is a dict of tensors."""

    differentiable: ClassVar[bool]

    def init(self, y: Params) -> Any: ...
    def step(self, y: Params, gradient: Params, state: Any) -> tuple[Params, Any]: ...


@dataclass(frozen=True)
class LowerStats:
    """What a lower solve did: steps and gradients taken, and where it ended."""

    steps: int
    gradients: int
    loss: float
    """G at the last point it was evaluated."""
    gradient_norm: float
    """‖∇y G‖ at the last point it was evaluated."""
    converged: bool | None = None
    hvps: int = 0
    violation: float | None = None
    """How far y is outside the lower constraints, where the solver heeds any."""
    stopped: Stopped | None = None
    """Why it ended; None where nothing was solved."""
    skipped: int = 0
    """Steps that were left out because G or its gradient was not finite."""

    @property
    def infeasible(self) -> bool:
        """The solver gave up on the constraints: a larger penalty no longer brought y closer to them."""
        return self.stopped == "infeasible"


@dataclass(frozen=True, repr=False)
class LowerSolution:
    """y with the means to go on (`state`) and, if recorded, to differentiate through (`path`).

    `bilevel.hypergradient` takes one in the place of y.
    """

    y: Params
    state: Any = None
    stats: LowerStats = LowerStats(0, 0, math.nan, math.nan)
    batch: Any = None
    """The last batch used: Hessian products belong on the same one."""
    path: Path | None = None
    pairs: Pairs | None = None
    """From a quasi-Newton method: the steps that it took, and what they changed ∇y G by."""
    structure: Structure | None = None
    """What `bilevel.solve_lower` was told of y* beside the minimum of G."""

    def __repr__(self) -> str:
        """G, the norm and shape of each entry, how it was solved, what else is there; no tensor."""
        stats = self.stats
        done = f"{stats.steps} steps, {stats.gradients} gradients, {stats.hvps} HVPs"
        how = f"solved: {done}, ‖∇y G‖ = {stats.gradient_norm:.3g}"
        kept = [name for name in ("state", "path", "pairs") if getattr(self, name) is not None]
        return "\n".join(
            [
                f"LowerSolution: G = {stats.loss:.4g}",
                *(f"{name}: {_described(entry)}" for name, entry in _entries(self.y)),
                how + (f", stopped: {stats.stopped}" if stats.stopped else ""),
                f"kept: {', '.join(kept) or 'nothing'}",
            ]
        )


@runtime_checkable
class LowerSolver(Protocol):
    """Approximately solves min over y of G(x, y), G the loss with its `structure`.

    `record` asks for that many of the last steps as a `Path`. `offers` says what it can give, and
    which restrictions of y it respects; what it would ignore is refused before it is called.
    """

    @property
    def offers(self) -> Offers: ...
    def init(self, y: Params) -> Any: ...
    def solve(
        self,
        loss: Loss,
        x: Params,
        y: Params,
        *,
        batches: Iterator[Any],
        state: Any,
        record: float = 0,
    ) -> LowerSolution: ...


ALL_STEPS = math.inf
