"""Who holds which rows of a tree, and how a whole is made of parts and differentiated.

S ranks hold a tree together: of an entry with rows each has some, as `torch.tensor_split` cuts them;
of one without (a number) each has all. R ranks are a mesh of R / S such teams, rank = team · S + index.
They are plain tensors in a dict whose names are `tree.Part`s, which say what of the whole they are.

A loss over ranks needs the whole. Two functions that are each other's derivative make it:

    Gather    all-gather within the team; backward `Scatter`
    Scatter   the sum over all ranks, of which each keeps its rows (reduce-scatter within the team, a
              sum over teams); backward `Gather`

so that for a loss Σ_r w_r f(Gather(y), part_r) the derivatives of every order are parts, and nothing
but a loss, while it is evaluated, ever has the whole. Where every rank computes the same of the whole,
as it does with a projection, `Collect` (all-gather) and `Cut` (one's own rows) are the pair.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from bilevel import ranks as over
from bilevel import tree
from bilevel.errors import ProblemError, RecipeError
from bilevel.ranks import Ranks
from bilevel.sharding.again import remember
from bilevel.tree import Part
from bilevel.types import Params

Keep = Literal["whole", "again"]


@dataclass(eq=False)
class Team:
    """The ranks that hold a tree together, as one of them sees them."""

    everyone: Ranks
    within: Ranks
    """This team; `within.rank` says which rows are this rank's."""
    across: Ranks
    """The ranks of all teams that have the same rows; alone where there is one team."""
    keep: Keep = "whole"
    """Whether the graph of a loss keeps wholes, or parts of which wholes are gathered again."""
    levels: set[str] = field(default_factory=set)
    """Which of x and y are in parts."""

    @property
    def is_first(self) -> bool:
        return self.within.is_first

    def most(self, value: float) -> float:
        seen = torch.zeros(self.within.size, dtype=torch.float64)
        seen[self.within.rank] = value
        where = "cpu" if over.is_gloo(self.within.group) else "cuda"
        return self.within.sum_of(seen.to(where)).max().item()

    def total(self, value: Tensor) -> Tensor:
        return self.within.sum_of(value)

    def leave(self, value: Tensor) -> Tensor:
        return over.leave(self.within, value)

    def rows(self, count: int, rank: int | None = None) -> slice:
        """Which of so many rows a rank of the team has; those of this one without `rank`."""
        rank, size = self.within.rank if rank is None else rank, self.within.size
        each, more = divmod(count, size)
        begin = rank * each + min(rank, more)
        return slice(begin, begin + each + (rank < more))

    def part(self, name: str, shape: torch.Size) -> Part:
        """The name of an entry of a whole of this shape."""
        return Part(name, self, shape, self.rows(shape[0]) if shape else None)

    def cut(self, whole: Params) -> Params:
        """This rank's part of a tree, in memory of its own."""
        names = {name: self.part(name, entry.shape) for name, entry in whole.items()}
        return {
            names[n]: (e[names[n].rows] if names[n].rows else e).clone() for n, e in whole.items()
        }


def teams(ranks: Ranks, data: int = -1, shard: int = 1, keep: Keep = "whole") -> Ranks:
    """The same ranks as a mesh of `data` teams of `shard` ranks each; data = -1 is what is left.

    A `Setup` of them keeps y, and an x of `X_FROM` numbers or more, in parts.

    Raises:
        RecipeError: the number of ranks is not data · shard.
    """
    if shard == 1 and data in (-1, ranks.size):
        return ranks
    if ranks.size % shard or data not in (-1, ranks.size // shard):
        fits = sorted({n for n in range(1, ranks.size + 1) if ranks.size % n == 0})
        wanted = f"{data} · {shard}" if data != -1 else f"a multiple of {shard}"
        raise RecipeError(
            f"runtime.mesh is {{data: {data}, shard: {shard}}}, which takes {wanted} ranks, and there "
            f"{'is 1' if ranks.is_alone else f'are {ranks.size}'}: start that many (bilevel run --ranks "
            f"N, torchrun), or set runtime.mesh.data=-1 and runtime.mesh.shard to "
            f"{' or '.join(map(str, fits))}"
        )
    within, across = over.grid(ranks, shard)
    return replace(ranks, team=Team(replace(ranks), within, across, keep))


X_FROM = 2**20
"""How many numbers x has to have to be held in parts; below that all ranks have all of it."""


def team_of(a: Params) -> Team | None:
    """Who holds a tree; None where it is whole."""
    found = tree.holders(a)
    assert found is None or isinstance(found, Team)
    return found


# the two operations


_libraries: list[Any] = []
"""An operation lives as long as the library it was defined in."""
_teams: dict[str, Team] = {}
"""By the name of the group within."""


@functools.cache
def _operations() -> tuple[Any, Any]:
    """(gather, scatter) as operations of torch: they stand in traces, and count in what replays them."""
    library = torch.library.Library("bilevel", "FRAGMENT")
    library.define("gather_rows(Tensor[] values, int[] rows, str group) -> Tensor[]")
    library.define("scatter_rows(Tensor[] values, str group) -> Tensor[]")
    kernels = {"gather_rows": (_gather, _wholes), "scatter_rows": (_scatter, _own)}
    for name, (kernel, shapes) in kernels.items():
        library.impl(name, kernel, "CompositeExplicitAutograd")
        library.impl(name, shapes, "Meta")
    _libraries.append(library)
    ops = torch.ops.bilevel
    return ops.gather_rows.default, ops.scatter_rows.default


def _key(team: Team) -> str:
    name = team.within.group.group_name
    _teams[name] = team
    return name


def _gather(values: list[Tensor], rows: list[int], group: str) -> list[Tensor]:
    team = _teams[group]
    size, found = team.within.size, []
    padded = [_padded(v, -(-count // size)) for v, count in zip(values, rows, strict=True)]
    buffers = [value.new_empty(size * len(value), *value.shape[1:]) for value in padded]
    _together(team, "allgather_into_tensor_coalesced", buffers, padded)
    for buffer, own, count in zip(buffers, padded, rows, strict=True):
        if count == len(buffer):
            found.append(buffer)
            continue
        having = [len(range(count)[team.rows(count, rank)]) for rank in range(size)]
        pieces = [piece[:n] for piece, n in zip(buffer.split(len(own)), having, strict=True)]
        found.append(torch.cat(pieces))
    team.within.ledger.note(found)
    return found


def _scatter(values: list[Tensor], group: str) -> list[Tensor]:
    team = _teams[group]
    size, inputs = team.within.size, []
    for value in values:
        each = -(-len(value) // size)
        pieces = [_padded(value[team.rows(len(value), r)], each) for r in range(size)]
        inputs.append(value.contiguous() if len(value) == size * each else torch.cat(pieces))
    outputs = [value.new_empty(len(value) // size, *value.shape[1:]) for value in inputs]
    _together(team, "reduce_scatter_tensor_coalesced", outputs, inputs)
    team.within.ledger.note(values)
    outputs = team.across.sum(outputs)
    mine = [len(range(len(value))[team.rows(len(value))]) for value in values]
    return [out if len(out) == n else out[:n].clone() for out, n in zip(outputs, mine, strict=True)]


def _together(team: Team, name: str, outputs: list[Tensor], inputs: list[Tensor]) -> None:
    """One call for the tensors of each dtype; none for those without numbers."""
    ranks = team.within
    with ranks.reaching():
        if ranks.ledger.calls < over.WATCHED:
            ranks.require_same(inputs)
        for dtype in dict.fromkeys(value.dtype for value in inputs):
            chosen = [k for k, v in enumerate(inputs) if v.dtype == dtype and v.numel()]
            if chosen:
                call = getattr(ranks.group, name)
                call([outputs[k] for k in chosen], [inputs[k] for k in chosen]).wait()


def _padded(value: Tensor, rows: int) -> Tensor:
    """With rows of zeros after its own, as collectives of equal sizes need it."""
    if len(value) == rows:
        return value.contiguous()
    return torch.cat([value, value.new_zeros(rows - len(value), *value.shape[1:])])


def _wholes(values: list[Tensor], rows: list[int], group: str) -> list[Tensor]:
    return [_empty(v, count) for v, count in zip(values, rows, strict=True)]


def _own(values: list[Tensor], group: str) -> list[Tensor]:
    team = _teams[group]
    return [_empty(value, len(range(len(value))[team.rows(len(value))])) for value in values]


def _empty(like: Tensor, rows: int) -> Tensor:
    return torch.empty(rows, *like.shape[1:], dtype=like.dtype, device=like.device)


# the functions


Rows = tuple[int, ...]
"""How many rows each of some wholes has."""


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.team, ctx.rows, *_ = inputs
    ctx.like = over.likeness(output)


def _present(function: Any, ctx: Any, values: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """The function of those that there are; None stays None, as it is on every rank."""
    live = [k for k, value in enumerate(values) if value is not None]
    rows = tuple(ctx.rows[k] for k in live)
    found = function.apply(ctx.team, rows, *[values[k] for k in live]) if live else ()
    places: list[Tensor | None] = [None] * len(values)
    for k, value in zip(live, found, strict=True):
        places[k] = value
    return tuple(places)


class Gather(torch.autograd.Function):
    """Wholes of parts; backward, `Scatter`. Applied as `Gather.apply(team, rows of each, *parts)`."""

    @staticmethod
    def forward(team: Team, rows: Rows, *parts: Tensor) -> tuple[Tensor, ...]:
        gather, key = _operations()[0], _key(team)
        wholes = gather([*parts], rows, key)
        if team.keep == "again":
            for whole, part, count in zip(wholes, parts, rows, strict=True):
                remember(whole, part, functools.partial(gather, [part.detach()], [count], key))
        return tuple(wholes)

    setup_context = staticmethod(_remember)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, *_present(Scatter, ctx, gradients)

    @staticmethod
    def jvp(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        return over.with_zeros(_present(Gather, ctx, inputs[2:]), ctx.like)


class Scatter(torch.autograd.Function):
    """Parts of the sums over all ranks; backward, `Gather`. Applied as `Gather` is, to wholes."""

    @staticmethod
    def forward(team: Team, rows: Rows, *wholes: Tensor) -> tuple[Tensor, ...]:
        return tuple(_operations()[1]([*wholes], _key(team)))

    setup_context = staticmethod(_remember)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, *_present(Gather, ctx, gradients)

    @staticmethod
    def jvp(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        return over.with_zeros(_present(Scatter, ctx, inputs[2:]), ctx.like)


class Collect(torch.autograd.Function):
    """`Gather` where each rank computes the same of the wholes; backward, `Cut`."""

    forward = Gather.forward
    setup_context = staticmethod(_remember)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, *_present(Cut, ctx, gradients)

    @staticmethod
    def jvp(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        return over.with_zeros(_present(Collect, ctx, inputs[2:]), ctx.like)


class Cut(torch.autograd.Function):
    """One's own rows of what is the same on each rank; backward, `Collect`."""

    @staticmethod
    def forward(team: Team, rows: Rows, *wholes: Tensor) -> tuple[Tensor, ...]:
        return tuple(whole[team.rows(len(whole))].clone() for whole in wholes)

    setup_context = staticmethod(_remember)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, *_present(Collect, ctx, gradients)

    @staticmethod
    def jvp(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        return over.with_zeros(_present(Cut, ctx, inputs[2:]), ctx.like)


def gathered(a: Params) -> Params:
    """The whole of a tree for a loss, whose gradients are summed over all ranks; a whole one as it is."""
    team = team_of(a)
    if team is None:
        return a
    return _whole(a, Gather, lambda rest: over.enter(team.everyone, rest))


def collected(a: Params) -> Params:
    """The whole of a tree for what every rank computes alike; a whole one as it is."""
    return a if tree.holders(a) is None else _whole(a, Collect, lambda rest: rest)


def cut(whole: Params, like: Params) -> Params:
    """The parts of a whole that every rank has computed alike, under the names of `like`."""
    team = team_of(like)
    if team is None:
        return whole
    names = [name for name in like if isinstance(name, Part)]
    pairs = [name for name in names if name.rows]
    wholes = [whole[name] for name in pairs]
    found = iter(Cut.apply(team, tuple(map(len, wholes)), *wholes) if wholes else ())
    return {name: next(found) if name.rows else whole[name] for name in names}


def for_rows(name: str, key: str, value: Tensor) -> Tensor:
    """What a value that broadcasts to an entry, such as its learning rate, is for this rank's rows of it.

    `name` is the entry's, `key` that of the value; whole ones are as they are. The gradient is that of
    all rows.

    Raises:
        ProblemError: ranks hold the value's own rows together, and they are not those of the entry.
    """
    if not isinstance(name, Part) or name.rows is None:
        return value
    team, own = team_of({name: value}), key if isinstance(key, Part) and key.rows else None
    assert team is not None
    if own and own.shape != name.shape:
        raise ProblemError(
            f"x[{str(key)!r}] of shape {tuple(own.shape)} is for y[{str(name)!r}] of shape "
            f"{tuple(name.shape)}, and ranks hold the rows of each together; give it the shape of "
            "the entry, or set runtime.mesh.shard=1"
        )
    if own:
        return value
    if value.dim() == len(name.shape) and len(value) == name.shape[0] > 1:
        return Cut.apply(team, (len(value),), value)[0]
    return over.enter(team.within, [value])[0]


def _whole(a: Params, function: Any, enter: Callable[[list[Tensor]], list[Tensor]]) -> Params:
    """The entries with rows through one of the functions, the others through `enter`."""
    names = [name for name in a if isinstance(name, Part)]
    pairs = [name for name in names if name.rows]
    rest = iter(enter([a[name] for name in names if not name.rows]))
    rows = tuple(name.shape[0] for name in pairs)
    team = names[0].holders
    found = iter(function.apply(team, rows, *[a[name] for name in pairs]) if pairs else ())
    return {str(name): next(found) if name.rows else next(rest) for name in names}
