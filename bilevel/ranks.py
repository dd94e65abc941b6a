"""Who computes a run together: one process alone, or several, each with a part of every batch.

A sum over ranks is differentiated by two functions, each the derivative of the other: `enter` is the
identity and its backward a sum over ranks, `leave` is that sum and its backward the identity. For a
loss that is a weighted sum over parts of a batch,

    leave(Σ over own rows of w f(enter(x), enter(y), part))

has the value and the derivatives of every order of the loss on the whole batch, the same bits on every
rank. So no estimator and no solver knows of ranks. `share` and `rows` are for losses that need more
than their own rows. All are the identity in a process that is `ALONE`, which never touches
torch.distributed; within `apart`, where one process has the whole batch, they are so too.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from bilevel import tree
from bilevel.errors import LostRankError, ProblemError, RankError, RequirementError, reason_of

TIMEOUT = 600.0
"""Seconds that a rank waits for the others in a sum before it gives up."""
PATIENCE = 7 * 24 * 3600.0
"""Seconds that ranks wait for one that works alone: downloads, evaluates, writes."""


WATCHED = 1000
"""So many first sums are each preceded by a message of two integers: whether all ranks sum the same."""
OWN = (
    "A component sees the rows of its own rank only, or draws random numbers of its own: sums over a "
    "batch belong in bilevel.ranks.share, those over variables that ranks hold together in bilevel.tree, "
    "and random numbers in the streams that a component is given"
)


@dataclass
class Ledger:
    """What a rank has sent: sums over ranks, and the bytes of what was summed."""

    calls: int = 0
    bytes: int = 0

    def note(self, values: Sequence[Tensor]) -> None:
        self.calls += 1
        self.bytes += sum(value.numel() * value.element_size() for value in values)

    def mark(self) -> tuple[int, int]:
        """(calls, bytes) so far, for `since`."""
        return self.calls, self.bytes

    def since(self, mark: tuple[int, int]) -> tuple[int, int]:
        """(calls, bytes) that came after a mark."""
        return self.calls - mark[0], self.bytes - mark[1]


@dataclass(eq=False)
class Ranks:
    """The processes that compute a run together, as one of them sees them."""

    rank: int = 0
    size: int = 1
    local: int = 0
    """Its number on its own machine: of its device."""
    group: Any = field(default=None, repr=False)
    """Of torch.distributed; sums over it fail after `TIMEOUT`."""
    patient: Any = field(default=None, repr=False)
    """The same processes, on CPUs; whoever waits in it does so for `PATIENCE`."""
    ledger: Ledger = field(default_factory=Ledger)
    notices: Any = field(default=None, repr=False)
    """Where one that fails leaves its last word (`bilevel.run.notices`), if anywhere."""
    team: Any = field(default=None, repr=False)
    """With whom it holds parameters together (`bilevel.sharding.parts.Team`); None where it has all."""

    @property
    def is_alone(self) -> bool:
        return self.group is None

    @property
    def is_first(self) -> bool:
        """Whether it is the one that writes, evaluates and speaks."""
        return self.rank == 0

    def sum(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The sums over ranks, in new memory, of tensors of the same shapes on each; one call."""
        if self.is_alone or not values:
            return list(values)
        return _operation()([*values], self.group.group_name)

    def sum_of(self, value: Tensor) -> Tensor:
        """The sum over ranks of one tensor, without a derivative."""
        return self.sum([value.detach()])[0]

    def most(self, value: int) -> int:
        """The largest of the integers that the ranks come with: a flag that any of them may raise.

        Whoever comes first waits as long as it takes.
        """
        if self.is_alone:
            return value
        from torch import distributed

        flag = torch.tensor([value])
        with self.reaching():
            distributed.all_reduce(flag, distributed.ReduceOp.MAX, group=self.patient)
        return int(flag)

    def every(self, value: int) -> list[int]:
        """The integers that the ranks come with, in their order."""
        if self.is_alone:
            return [value]
        return [found for (found,) in self.beside([value])]

    def beside(self, values: Sequence[int]) -> list[list[int]]:
        """The integers, equally many, that each rank comes with, in the order of the ranks."""
        mine = torch.zeros(self.size, len(values), dtype=torch.int64)
        mine[self.rank] = torch.tensor(values)
        return self.sum_of(mine.to(self._where)).tolist()

    def require_same(self, values: Sequence[Tensor]) -> None:
        """Raise `RankError` where the ranks are about to sum tensors of other sizes each.

        One message of two integers a rank, which is none of the ledger. Without it gloo ends the
        process, and nccl waits or adds what does not belong together.
        """
        own = [sum(value.numel() for value in values), len(values)]
        every = torch.zeros(self.size, 2, dtype=torch.int64, device=self._where)
        every[self.rank] = torch.tensor(own)
        self.group.allreduce_coalesced([every]).wait()
        for rank, found in enumerate(every.tolist()):
            if found != every[0].tolist():
                sizes = [f"{n:,} numbers in {k} tensors" for n, k in (every[0].tolist(), found)]
                raise RankError(
                    f"rank 0 of {self.size} sums {sizes[0]} where rank {rank} sums {sizes[1]}: they "
                    f"do not take the same steps. {OWN}"
                )

    @property
    def _where(self) -> str:
        """The device of what the group sums beside a run's own tensors."""
        return "cpu" if is_gloo(self.group) else "cuda"

    def from_first(self, value: Any = None) -> Any:
        """What the first rank has here, on every rank; the others wait for as long as it takes."""
        if self.is_alone:
            return value
        from torch import distributed

        told = [value]
        with self.reaching():
            distributed.broadcast_object_list(told, group=self.patient, group_src=0)
        return told[0]

    def gather(self, value: Any) -> list[Any]:
        """What each rank has here, on every rank, in their order."""
        if self.is_alone:
            return [value]
        from torch import distributed

        found: list[Any] = [None] * self.size
        with self.reaching():
            distributed.all_gather_object(found, value, group=self.patient)
        return found

    @contextmanager
    def reaching(self) -> Iterator[None]:
        """Turn what torch raises where another rank does not come into a `LostRankError` with its word."""
        try:
            yield
        except (RankError, torch.OutOfMemoryError):
            raise
        except RuntimeError as error:
            if self.notices:
                raise self.notices.lost(reason_of(error)) from error
            raise LostRankError(
                f"rank {self.rank} of {self.size} waited in vain: {reason_of(error)}. Another rank "
                "has ended, or is so slow that the time is over"
            ) from error

    @contextmanager
    def telling(self, what: str) -> Iterator[None]:
        """What every rank does for itself; one that fails is told to all, so that none waits for it.

        Raises:
            RankError: another rank raised.
        """
        try:
            yield
        except Exception as error:
            self.gather(f"{type(error).__name__}: {error}")
            raise
        for rank, said in enumerate(self.gather(None)):
            if said is not None:
                raise RankError(f"rank {rank} failed in {what}: {said}")


ALONE = Ranks()
_groups: dict[str, Ranks] = {}
"""Those that were joined, by the name of their group."""
_here: Ranks = ALONE
_is_apart = False


def here() -> Ranks:
    """Those that the present computation is spread over: `ALONE` in most processes, and within `apart`."""
    return ALONE if _is_apart else _here


@contextmanager
def apart() -> Iterator[None]:
    """Within, this process computes alone on whole batches: `share` and `rows` are the identity."""
    global _is_apart
    before, _is_apart = _is_apart, True
    try:
        yield
    finally:
        _is_apart = before


# joining


def announced() -> int:
    """How many ranks the environment says there are, as torchrun sets it; 1 without.

    Raises:
        RankError: WORLD_SIZE is no number of ranks.
    """
    said = os.environ.get("WORLD_SIZE", "").strip() or "1"
    if not (said.isascii() and said.isdigit() and int(said) > 0):
        raise RankError(
            f"the environment says WORLD_SIZE={said!r}; expected how many ranks there are, 1 or more, "
            "as torchrun sets it. Without it a process is one rank"
        )
    return int(said)


def find_others(timeout: float = TIMEOUT) -> tuple[Any, int, int]:
    """(a store that the ranks share before they are a group, this one's number, how many there are).

    RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are read.

    Raises:
        RankError: one of them is not set, or nobody is there.
    """
    from torch.distributed.distributed_c10d import (
        PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
    )
    from torch.distributed.rendezvous import rendezvous

    size = announced()
    try:
        store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
    except (RuntimeError, ValueError) as error:
        raise RankError(
            f"rank {os.environ.get('RANK', '?')} of {size} finds no others at "
            f"{os.environ.get('MASTER_ADDR', '(MASTER_ADDR is not set)')}: {reason_of(error)}. "
            "torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
        ) from error
    return PrefixStore("bilevel", store), rank, size


def join(device: str = "cpu", timeout: float = TIMEOUT, notices: Any = None) -> Ranks:
    """Join the ranks that the environment announces, as torchrun sets it; `ALONE` where there is one.

    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are read. Sums are taken by nccl where
    `device` is "cuda", else by gloo. A group that was formed already is taken as it is. In `notices`
    a rank that waits in vain finds what another has said.

    Raises:
        RequirementError: this torch has no torch.distributed, or not the backend.
        RankError: the ranks do not find each other.
    """
    if announced() == 1:
        return ALONE
    from torch import distributed

    backend = "nccl" if device == "cuda" else "gloo"
    if not distributed.is_available() or not distributed.is_backend_available(backend):
        raise RequirementError(
            f"{announced()} ranks need torch.distributed with {backend}, which torch "
            f"{torch.__version__} was built without; install another build, or run one rank"
        )
    if backend == "nccl":
        torch.cuda.set_device(_local())
    return heedful(lambda: _join(backend, timeout, notices))


def _join(backend: str, timeout: float, notices: Any) -> Ranks:
    from torch import distributed

    if backend == "nccl":
        torch.cuda.set_device(_local())  # which a thread has of its own
    if not distributed.is_initialized():
        both = f"cpu:gloo,cuda:{backend}" if backend == "nccl" else backend
        try:
            distributed.init_process_group(both, timeout=timedelta(seconds=timeout))
        except (RuntimeError, ValueError) as error:
            raise RankError(
                f"rank {os.environ.get('RANK', '?')} of {announced()} finds no others at "
                f"{os.environ.get('MASTER_ADDR', '(MASTER_ADDR is not set)')}: {error}"
            ) from error
    return adopt(distributed.group.WORLD, notices)


def _local() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def heedful(work: Callable[[], Any]) -> Any:
    """What a work that waits for other ranks comes to, done where it keeps no signal from being heard.

    Ranks that connect wait in torch's C++ for one that was killed before it connected, and nothing
    closes that would wake them. A signal's handler runs in the main thread, between two steps of Python.
    """
    found: list[Any] = []
    raised: list[BaseException] = []

    def whole() -> None:
        try:
            found.append(work())
        except BaseException as error:  # raised where it was asked for
            raised.append(error)

    thread = threading.Thread(target=whole, name="joining ranks", daemon=True)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]
    return found[0]


def adopt(group: Any, notices: Any = None) -> Ranks:
    """Compute with the processes of a group of torch.distributed from here on."""
    global _here
    from torch import distributed

    assert group is not None
    patient = distributed.new_group(
        distributed.get_process_group_ranks(group),
        backend="gloo",
        timeout=timedelta(seconds=PATIENCE),
    )
    rank = distributed.get_rank(group)
    local = int(os.environ.get("LOCAL_RANK", rank))
    _here = Ranks(rank, group.size(), local, group, patient, notices=notices)
    _groups[group.group_name] = _here
    return _here


def grid(ranks: Ranks, size: int) -> tuple[Ranks, Ranks]:
    """(those in this rank's row, those in its column) of all ranks in rows of `size`, one after another.

    What they send is counted with what all send.
    """
    from torch.distributed.device_mesh import init_device_mesh

    shape = ranks.size // size, size
    kind = "cpu" if is_gloo(ranks.group) else "cuda"
    mesh = heedful(lambda: init_device_mesh(kind, shape, mesh_dim_names=("column", "row")))
    found = []
    for name in ("row", "column"):
        group = mesh.get_group(name)
        if group.size() == 1:
            found.append(Ranks())
            continue
        own = Ranks(group.rank(), group.size(), ranks.local, group, ledger=ranks.ledger)
        own.notices = ranks.notices
        _groups[group.group_name] = own
        found.append(own)
    ranks.every(0)  # or one that is done first may end while others still connect to it
    return found[0], found[1]


def depart() -> None:
    """End what `join` began; nothing where there was nothing."""
    global _here
    if _here.is_alone:
        return
    from torch import distributed

    _here = ALONE
    _groups.clear()
    distributed.destroy_process_group()


def is_gloo(group: Any) -> bool:
    """Whether a group sums on CPUs."""
    from torch import distributed

    return "gloo" in distributed.get_backend(group)


# the one operation


_libraries: list[Any] = []
"""An operation lives as long as the library it was defined in."""


@functools.cache
def _operation() -> Any:
    """Σ over ranks as an operation of torch: it stands in traces, and counts in what replays them."""
    library = torch.library.Library("bilevel", "FRAGMENT")
    library.define("sum_over_ranks(Tensor[] values, str group) -> Tensor[]")
    library.impl("sum_over_ranks", _sum, "CompositeExplicitAutograd")
    library.impl("sum_over_ranks", _sizes, "Meta")
    _libraries.append(library)
    return torch.ops.bilevel.sum_over_ranks.default


def _sum(values: list[Tensor], group: str) -> list[Tensor]:
    ranks = _groups[group]
    with ranks.reaching():
        if ranks.ledger.calls < WATCHED:
            ranks.require_same(values)
        return _summed(values, ranks)


def _summed(values: list[Tensor], ranks: Ranks) -> list[Tensor]:
    found = [value.clone(memory_format=torch.contiguous_format) for value in values]
    for dtype in dict.fromkeys(value.dtype for value in found):
        together = [value for value in found if value.dtype == dtype]
        ranks.ledger.note(together)
        ranks.group.allreduce_coalesced(together).wait()
    return found


def _sizes(values: list[Tensor], group: str) -> list[Tensor]:
    return [torch.empty(value.shape, dtype=value.dtype, device=value.device) for value in values]


class Enter(torch.autograd.Function):
    """The identity; backward, the sum over ranks. Applied as `Enter.apply(ranks, *values)`."""

    @staticmethod
    def forward(ranks: Ranks, *values: Tensor) -> tuple[Tensor, ...]:
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.ranks, ctx.like = inputs[0], likeness(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *_present(Leave, ctx.ranks, gradients)

    @staticmethod
    def jvp(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        _, *tangents = inputs
        # a view has a view for its tangent, also one of zeros
        return tuple(tangent.view(tangent.shape) for tangent in with_zeros(tangents, ctx.like))


class Leave(torch.autograd.Function):
    """The sum over ranks; backward, the identity. Applied as `Leave.apply(ranks, *values)`."""

    @staticmethod
    def forward(ranks: Ranks, *values: Tensor) -> tuple[Tensor, ...]:
        return tuple(ranks.sum(values))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.ranks, ctx.like = inputs[0], likeness(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *_present(Enter, ctx.ranks, gradients)

    @staticmethod
    def jvp(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        _, *tangents = inputs
        return with_zeros(_present(Leave, ctx.ranks, tangents), ctx.like)


def _present(
    function: Any, ranks: Ranks, values: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """The function of those that there are; None stays None, as it is on every rank."""
    live = [value for value in values if value is not None]
    found = iter(function.apply(ranks, *live) if live else ())
    return tuple(None if value is None else next(found) for value in values)


Likeness = list[tuple[torch.Size, torch.dtype, torch.device]]


def likeness(values: Sequence[Tensor]) -> Likeness:
    """What zeros like these are made of, without their memory."""
    return [(value.shape, value.dtype, value.device) for value in values]


def with_zeros(tangents: Sequence[Tensor | None], like: Likeness) -> tuple[Tensor, ...]:
    """Tangents with zeros where there is none: torch fails where one of several outputs has None."""
    return tuple(
        torch.zeros(shape, dtype=dtype, device=device) if tangent is None else tangent
        for tangent, (shape, dtype, device) in zip(tangents, like, strict=True)
    )


def by_rows(batch: Any, rank: int, ranks: int) -> tuple[Any, float]:
    """(the rows of a batch that are a rank's, their share of all): how a problem without `part` is cut.

    Every tensor with a dimension is cut along its first, as `torch.tensor_split` does; all have the
    same number of rows. A batch without such tensors goes to every rank whole, each counted for its
    share of the ranks.

    Raises:
        ProblemError: tensors differ in their number of rows, or there are fewer rows than ranks.
    """
    named = [(where, leaf) for where, leaf in tree.named(batch, "batch") if _has_rows(leaf)]
    if not named:
        return batch, 1 / ranks
    first, total = named[0][0], len(named[0][1])
    for where, leaf in named:
        if len(leaf) != total:
            raise ProblemError(
                f"{first} has {total} rows and {where} has {len(leaf)}, so that it is not known how "
                f"to cut the batch for {ranks} ranks. Remedy: {PART}"
            )
    if total < ranks:
        raise ProblemError(
            f"the batch has {total} row{'s' if total != 1 else ''}, and {ranks} ranks are to have a "
            "part of it each; make the batches larger, or take fewer ranks"
        )

    def own(leaf: Any) -> Any:
        return leaf.tensor_split(ranks)[rank] if _has_rows(leaf) else leaf

    part = tree.map_nested(own, batch)
    return part, len(own(named[0][1])) / total


PART = (
    "give the problem part(batch, rank, ranks) -> (batch of that rank, its weight), where (batch, "
    "1 / ranks) has every rank compute all of it"
)


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0


# what losses are made of


def enter(ranks: Ranks, values: Sequence[Tensor]) -> list[Tensor]:
    """The same values; their gradients are the sums over ranks. Those without a gradient as they are."""
    live = [value for value in values if value.requires_grad]
    if ranks.is_alone or not live:
        return list(values)
    found = iter(Enter.apply(ranks, *live))
    return [next(found) if value.requires_grad else value for value in values]


def leave(ranks: Ranks, value: Tensor) -> Tensor:
    """The sum over ranks of what each has; its gradient goes to each as it is."""
    return value if ranks.is_alone else Leave.apply(ranks, value)[0]


def share(value: Tensor) -> Tensor:
    """Within a loss: the sum over the ranks' parts of the batch, such as of counted tokens.

    `value` is what the part of this rank adds; its derivative is that of the whole sum. The value
    itself where one process has the whole batch. Costs one sum over ranks, and one backward.

        def lower_loss(self, x, y, batch):                 # a mean over tokens, not over rows
            loss, counted = self.tokens(y, batch)          # sums over the rows there are
            rows = torch.tensor(float(len(batch["ids"])))
            per_row = ranks.share(counted) / ranks.share(rows)
            return loss / rows / per_row
    """
    ranks = here()
    if ranks.is_alone:
        return value
    return enter(ranks, [leave(ranks, value)])[0]


def mean(total: Tensor, count: Tensor | float) -> Tensor:
    """Within a loss: Σ total / Σ count over the ranks' parts, where a part's weight is 1 / ranks.

    For terms that are means over different things (rows, pairs, tokens): no one weight of a part is
    right for all. `total / count` where one process has the whole batch.
    """
    ranks = here()
    if ranks.is_alone:
        return total / count
    shared = share(torch.as_tensor(count, dtype=total.dtype, device=total.device))
    return ranks.size * total / shared


def rows(value: Tensor) -> Tensor:
    """Within a loss: the rows of all ranks, in the order of the batch, such as other rows' embeddings.

    `value` has a row for each of this rank's; differentiable. Itself where one process has the whole
    batch. Costs one sum of all rows, one of how many, and one sum backward. Which rows are this
    rank's own is `own_rows`.
    """
    ranks = here()
    if ranks.is_alone:
        return value
    begin, total = place(len(value))
    empty = value.new_zeros((total, *value.shape[1:]))
    padded = torch.cat([empty[:begin], value, empty[begin + len(value) :]])
    return share(padded)


def own_rows(count: int) -> slice:
    """Which of `rows` are this rank's, that has `count` of them."""
    begin, _ = place(count)
    return slice(begin, begin + count)


def place(count: int) -> tuple[int, int]:
    """(where this rank's rows begin among all, how many there are in all), from how many it has."""
    ranks = here()
    counts = ranks.every(count)
    return sum(counts[: ranks.rank]), sum(counts)
