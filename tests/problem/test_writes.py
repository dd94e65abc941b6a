"""A loss that writes into what it is given is refused at every door, and leaves no trace."""

import functools
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

import bilevel
from bilevel import tree
from bilevel.errors import ProblemError
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.penalty import Penalty
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import SGD
from bilevel.problem import writes
from bilevel.problem.from_modules import FromModules
from bilevel.problem.over_tasks import OverTasks
from bilevel.problem.purity import refuse_impure
from bilevel.problem.writes import reachable
from bilevel.run.engine import Setup, run, start
from bilevel.run.upper import Upper
from bilevel.types import Counts, Loss

F = nn.functional
IDS, T = torch.tensor([[0, 1], [1, 2]]), torch.ones(2, 2, dtype=torch.float64)
B = torch.tensor([[1.0, 2.0], [3.0, 5.0]], dtype=torch.float64)


def start_of():
    x = {"l": torch.tensor(-0.1, dtype=torch.float64)}
    return x, {"e": torch.full((3, 2), 4 / 6**0.5, dtype=torch.float64)}  # ‖y‖ = 4


def size(x, y):
    return x["l"].exp() * y["e"].square().sum()


def embedding(x, y, batch):
    return ((F.embedding(IDS, y["e"], max_norm=1.0).sum(1) - T) ** 2).sum() + size(x, y)


def divides(x, y, batch):
    return y["e"].div_(2.0).square().sum() + size(x, y)


def clamps(x, y, batch):
    x["l"].clamp_(0.0, 1.0)
    return size(x, y)


def through_data(x, y, batch):
    y["e"].data.mul_(0.5)
    return size(x, y)


def through_a_view(x, y, batch):
    y["e"].detach()[0].zero_()
    return size(x, y)


def through_numpy(x, y, batch):
    y["e"].detach().numpy()[0] = 0.0
    return size(x, y)


def out_of_torch(x, y, batch):
    torch.mul(y["e"].detach(), 0.5, out=y["e"].data)
    return size(x, y)


def transposes(x, y, batch):
    return y["e"].t_().sum() * size(x, y)


def renames(x, y, batch):
    y["e"] = 2 * y["e"]
    return size(x, y)


WRITES = {
    embedding: r"y\['e'\].*embedding_renorm.*project_lower",
    divides: r"y\['e'\].*aten.div_.*div for div_",
    clamps: r"x\['l'\].*clamp for clamp_",
    through_data: r"y\['e'\].*mul_",
    through_a_view: r"y\['e'\].*zero_",
    through_numpy: r"y\['e'\]",
    out_of_torch: r"y\['e'\].*mul.out",
    transposes: r"y\['e'\].*aten.t_",
    renames: r"y\..*\{\*\*y, name: value\}",
}


@pytest.mark.parametrize(("loss", "said"), WRITES.items(), ids=lambda p: getattr(p, "__name__", ""))
def test_a_write_into_x_or_y_is_refused_by_name_and_changes_nothing(loss, said):
    for call in (
        lambda x, y: bilevel.solve_lower(loss, x, y),
        lambda x, y: bilevel.unroll(loss, x, y, steps=3),
        lambda x, y: bilevel.hypergradient(size_of_y, loss, x, y, estimator=Implicit()),
        lambda x, y: bilevel.hypergradient(size_of_y, loss, x, y, estimator=Penalty()),
        lambda x, y: bilevel.hypergradient(loss, lower, x, y, estimator=Implicit()),
    ):
        x, y = start_of()
        entries = {**x, **y}
        with pytest.raises(ProblemError, match=rf"_loss writes into {said}"):
            call(x, y)
        assert float(tree.norm(y)) == pytest.approx(4.0)
        assert float(x["l"]) == -0.1
        assert all({**x, **y}[name] is entry for name, entry in entries.items())


def size_of_y(x, y, batch):
    return y["e"].sum()


def lower(x, y, batch):
    return ((F.embedding(IDS, y["e"]).sum(1) - T) ** 2).sum() + size(x, y)


def test_what_the_remedies_of_the_embedding_say_is_accepted_and_right():
    """Looked-up rows scaled in the loss; the unrolled slope against differences of the same loss."""

    def scaled(x, y, batch):
        e = F.embedding(IDS, y["e"])
        e = e / (e.norm(dim=-1, keepdim=True) / 1.0).clamp(min=1)
        return ((e.sum(1) - T) ** 2).sum() + size(x, y)

    def end(log):
        x = {"l": torch.tensor(log, dtype=torch.float64, requires_grad=True)}
        y = bilevel.unroll(scaled, x, start_of()[1], steps=5, optimizer=SGD(lr=0.05))
        return x, y["e"].sum()

    x, value = end(-0.1)
    (got,) = torch.autograd.grad(value, x["l"])
    above, below = (end(-0.1 + h)[1].item() for h in (1e-5, -1e-5))
    expected = (above - below) / 2e-5
    assert float(got) == pytest.approx(expected, rel=1e-6)
    assert abs(expected) > 1e-3


# batches, in every container

Pair = namedtuple("Pair", "a b")


@dataclass
class Data:
    a: torch.Tensor
    b: torch.Tensor


BATCHES = {
    "tensor": (lambda b: b, lambda: B.clone(), "the batch"),
    "tuple": (lambda b: b[0], lambda: (B.clone(), T), r"the batch\[0\]"),
    "named tuple": (lambda b: b.a, lambda: Pair(B.clone(), T), r"the batch\.a"),
    "list": (lambda b: b[1][0], lambda: [T, [B.clone()]], r"the batch\[1\]\[0\]"),
    "dict": (lambda b: b["a"], lambda: {"a": B.clone()}, r"the batch\['a'\]"),
    "mapping": (lambda b: b["a"], lambda: OrderedDict(a=B.clone()), r"the batch\['a'\]"),
    "dataclass": (lambda b: b.a, lambda: Data(B.clone(), T), r"the batch\.a"),
}


@pytest.mark.parametrize(("part", "make", "said"), BATCHES.values(), ids=BATCHES)
def test_a_write_into_a_batch_is_refused_in_every_container(part, make, said):
    def centred(x, y, batch):
        here = part(batch)
        here -= here.mean(0)
        return (here @ y["e"].T).square().sum() + size(x, y)

    def rightly(x, y, batch):
        here = part(batch) - part(batch).mean(0)
        return (here @ y["e"].T).square().sum() + size(x, y)

    batch = make()
    x, y = start_of()
    for door in (bilevel.solve_lower, functools.partial(bilevel.unroll, steps=2)):
        with pytest.raises(ProblemError, match=rf"lower_loss writes into {said} \(aten.sub_"):
            door(centred, x, y, batch=batch)
        assert torch.equal(part(batch), B)
    assert (
        bilevel.solve_lower(rightly, x, y, batch=batch, solver=Gradient(steps=1)).stats.steps == 1
    )


def test_entries_taken_out_of_a_batch_are_put_back():
    def pops(x, y, batch):
        return size(x, y) * batch.pop("scale") + batch["rest"].pop()

    batch = {"scale": torch.tensor(2.0), "rest": [torch.tensor(1.0)]}
    with pytest.raises(ProblemError, match="lower_loss writes into the batch"):
        bilevel.solve_lower(pops, *start_of(), batch=batch)
    assert list(batch) == ["scale", "rest"]
    assert len(batch["rest"]) == 1


def test_a_batch_with_missing_values_is_not_taken_for_changed():
    batch = torch.tensor([1.0, float("nan")], dtype=torch.float64)

    def skips(x, y, batch):
        return size(x, y) * batch.nansum()

    refuse_impure(Loss(skips, batch, Counts(), "lower"), *start_of())


# modules


class Observing(nn.Module):
    """Keeps a running mean in a buffer, outside of torch's own normalisations."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(2, dtype=torch.float64))

    def forward(self, a):
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(0.1 * a.mean(0))
        return (a - self.mean) * self.weight


def by_closure(net):
    return lambda x, y, batch: functional_call(net, {"weight": y["e"][0]}, (B,)).sum() + size(x, y)


def by_partial(net):
    def loss(net, x, y, batch):
        return net(B).sum() + size(x, y)

    return functools.partial(loss, net)


def by_method(net):
    class Problem:
        def __init__(self):
            self.nets = {"one": net}

        def loss(self, x, y, batch):
            return self.nets["one"](B).sum() + size(x, y)

    return Problem().loss


def by_call(net):
    class Callable:
        def __init__(self):
            self.net = net

        def __call__(self, x, y, batch):
            return self.net(B).sum() + size(x, y)

    return Callable()


GLOBAL = Observing()


def by_global(_):
    def inner():
        return GLOBAL(B)

    return lambda x, y, batch: inner().sum() + size(x, y)


@pytest.mark.parametrize(
    "make", [by_closure, by_partial, by_method, by_call, by_global], ids=lambda f: f.__name__
)
def test_a_write_into_a_buffer_of_a_module_that_a_loss_holds_is_refused(make):
    net = GLOBAL if make is by_global else Observing()
    loss = make(net)
    for door in (bilevel.solve_lower, functools.partial(bilevel.unroll, steps=2)):
        with pytest.raises(ProblemError, match=r"writes into buffer mean of Observing.*eval\(\)"):
            door(loss, *start_of())
        assert not net.mean.any()
    net.eval()
    refuse_impure(Loss(loss, None, Counts(), "lower"), *start_of())
    net.train()


def test_a_frozen_embedding_with_max_norm_is_refused_and_kept():
    table = nn.Embedding(3, 2, max_norm=1.0).requires_grad_(False).double()
    before = table.weight.fill_(3.0).clone()
    with pytest.raises(ProblemError, match=r"parameter weight of Embedding.*max_norm"):
        bilevel.solve_lower(lambda x, y, b: table(IDS).sum() * size(x, y), *start_of())
    assert torch.equal(table.weight, before)


def modules(model):
    def fit(upper, lower, batch):
        return lower(batch).square().mean() * upper.parameters["log"].exp()

    def batches(stream):
        while True:
            yield B

    penalty = nn.ParameterDict({"log": torch.zeros((), dtype=torch.float64)})
    return FromModules(penalty, model, fit, fit, batches, batches)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Observing(), "buffer mean of Observing"),
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).double(), "BatchNorm in training mode"),
        (
            nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2).double()),
            r"buffer parametrizations.weight.0._u",
        ),
    ],
    ids=["a running mean", "batch norm", "spectral norm"],
)
def test_a_run_of_modules_that_write_into_their_buffers_is_refused(model, said):
    problem = modules(model)
    before = {name: b.clone() for name, b in model.named_buffers()}
    setup = Setup(problem, Gradient(steps=2), Upper(steps=1), Penalty(), dtype=torch.float64)
    with pytest.raises(ProblemError, match=rf"upper_loss .*{said}"):
        list(run(setup, start(setup)))
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    model.eval()
    assert list(run(setup, start(setup)))


class Tasks:
    """Tasks that write into their batch."""

    def init(self, streams):
        x, y = start_of()
        return x, {"e": y["e"][0]}

    def upper_loss(self, x, y, batch):
        return y["e"].square().sum()

    def lower_loss(self, x, y, batch):
        batch.mul_(2.0)
        return (y["e"] - batch).square().sum() + size(x, y)

    def episodes(self, stream):
        while True:
            yield B[0].clone(), B[1].clone()

    def upper_batches(self, stream):
        return (upper for _, upper in self.episodes(stream))

    def lower_batches(self, stream):
        return (lower for lower, _ in self.episodes(stream))


@pytest.mark.parametrize("batched", [True, False])
def test_a_task_that_writes_into_its_batch_is_refused(batched):
    problem = OverTasks(problem=Tasks(), num_tasks=2, batched=batched)
    setup = Setup(problem, Gradient(steps=2), Upper(steps=1), Implicit(), dtype=torch.float64)
    with pytest.raises(ProblemError, match="lower_loss writes into the batch"):
        list(run(setup, start(setup)))


# what the loss holds, written into by numpy


class Holder:
    def __init__(self):
        self.array, self.tensor = np.ones(3), torch.ones(3, dtype=torch.float64)
        self.frozen, self.names = np.ones(3), np.array(["a", "b"])
        self.frozen.flags.writeable = False

    def counts(self, x, y, batch):
        self.array[0] += 1.0
        return size(x, y)

    def through_numpy(self, x, y, batch):
        self.tensor.numpy()[1] = 5.0
        return size(x, y)

    def reads(self, x, y, batch):
        return size(x, y) * self.array[0] * self.frozen[0] * self.tensor[0] * len(self.names)


@pytest.mark.parametrize(("name", "held"), [("counts", "array"), ("through_numpy", "tensor")])
def test_a_write_by_numpy_into_what_a_loss_holds_is_refused_and_undone(name, held):
    holder, (x, y) = Holder(), start_of()
    with pytest.raises(ProblemError, match=f"lower_loss writes into {held}"):
        bilevel.solve_lower(getattr(holder, name), x, y)
    assert holder.array.tolist() == holder.tensor.tolist() == [1.0, 1.0, 1.0]


def test_a_write_by_numpy_into_a_closure_is_refused():
    array, (x, y) = np.zeros(2), start_of()

    def loss(x, y, batch):
        array[0] += 1
        return size(x, y)

    with pytest.raises(ProblemError, match="lower_loss writes into array"):
        bilevel.solve_lower(loss, x, y)
    assert array.tolist() == [0.0, 0.0]


def test_what_is_only_read_is_accepted_and_what_is_too_large_is_not_copied(monkeypatch):
    holder, (x, y) = Holder(), start_of()
    bilevel.solve_lower(holder.reads, x, y, solver=Gradient(steps=1))
    monkeypatch.setattr(writes, "COPIED", 8)  # bytes: what docs/problem.md says is not seen
    refuse_impure(Loss(holder.through_numpy, B, Counts(), "lower"), x, y)
    assert holder.tensor.tolist() == [1.0, 5.0, 1.0]


# what is not refused


def test_writes_into_what_the_loss_made_itself_are_accepted():
    def loss(x, y, batch):
        total = torch.zeros((), dtype=torch.float64)
        rows = y["e"].clone()
        rows[0] *= 2.0
        rows.detach_()
        total += y["e"].detach().t_().sum()
        total += rows.sum()
        return total + size(x, y)

    refuse_impure(Loss(loss, B, Counts(), "lower"), *start_of())


def test_what_a_loss_holds_is_found_without_end_in_circles():
    class Node:
        pass

    one, other = Node(), Node()
    one.next, other.next, one.net = other, one, nn.Linear(1, 1)
    names = [name for name, _ in reachable(lambda x, y, b: one)]
    assert sorted(names) == ["parameter bias of Linear", "parameter weight of Linear"]
