"""Losses over tasks are replayed where that is the same, bit for bit, and where it is not they say so."""

import copy
import pickle

import pytest
import torch

from bilevel import solve_lower
from bilevel.components import component
from bilevel.errors import ProblemError
from bilevel.estimators.unroll import Unroll
from bilevel.events import Warned
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import SGD, Adam
from bilevel.problem import replayed
from bilevel.problem.learned_start import LearnedStart
from bilevel.problem.over_tasks import OverTasks, replay_refusal
from bilevel.rng import Streams, stream
from bilevel.run import engine
from bilevel.run.engine import Setup
from bilevel.run.upper import Upper
from bilevel.types import Structure
from bilevel_problems.sinusoid import Sinusoid
from tests.counting import operations
from tests.problem.fits import Fit

TASKS = 3


@pytest.fixture
def vmaps(monkeypatch):
    """The calls of vmap so far."""
    found, plain = [], torch.func.vmap
    monkeypatch.setattr(
        torch.func, "vmap", lambda *given: lambda *rest: found.append(0) or plain(*given)(*rest)
    )
    return found


def scene(problem=None, **options):
    """(the problem over tasks, a lower loss at a point as a call)."""
    made = OverTasks(problem=problem or Fit(), num_tasks=TASKS, **options)
    x, y = made.init(Streams(0))
    shots, _ = next(made.episodes(stream(0, "b")))
    return made, lambda: made.lower_loss(x, y, shots)


def trained(problem, steps=5, **options):
    """x after some upper steps, and what was warned of."""
    setup = Setup(
        OverTasks(problem=problem, num_tasks=TASKS, **options),
        Gradient(steps=3, optimizer=SGD(lr=0.1)),
        Upper(steps=steps, optimizer=Adam(lr=0.05)),
        Unroll(),
        dtype=torch.float64,
    )
    state = engine.start(setup)
    told = [event for event in engine.run(setup, state) if isinstance(event, Warned)]
    return state.x, told


@pytest.mark.parametrize("problem", [Fit(), Sinusoid(width=5, proximal=0.5)], ids=["fit", "net"])
def test_a_run_is_the_same_bit_for_bit(problem, vmaps):
    x, told = trained(problem, 10)
    replays = len(vmaps)
    plain, _ = trained(problem, 10, replayed=False)
    assert not told
    assert all(torch.equal(entry, plain[name]) for name, entry in x.items())
    assert replays < len(vmaps) - replays


def test_vmap_is_called_a_few_times_and_then_no_more(vmaps):
    made, call = scene()
    first = call()
    for _ in range(5):
        call()
    told = len(vmaps)
    # the record itself, its check, the call that asked for it, and the first comparison
    assert told <= replayed.AFTER + 4
    for _ in range(20):
        assert torch.equal(call(), first)
    assert len(vmaps) == told
    assert not made.not_replayed

    # control: off, it is called each time
    _, call = scene(replayed=False)
    for _ in range(4):
        call()
    assert len(vmaps) == told + 4


def test_another_shape_dtype_start_or_structure_is_recorded_apart():
    made, _ = scene()
    x, y = made.init(Streams(0))
    shots, queries = next(made.episodes(stream(0, "b")))
    fewer = {name: entry[:, :4] for name, entry in shots.items()}
    swapped = {"b": shots["b"], "a": shots["a"]}
    for _ in range(6):
        for batch in (shots, fewer, swapped):
            expected = sum(
                Fit().lower_loss(
                    x, {n: v[i] for n, v in y.items()}, {n: v[i] for n, v in batch.items()}
                )
                for i in range(TASKS)
            )
            torch.testing.assert_close(made.lower_loss(x, y, batch), expected, rtol=1e-12, atol=0)
        narrow = ({n: v.float() for n, v in part.items()} for part in (x, y, shots))
        assert made.lower_loss(*narrow).dtype == torch.float32
        made.upper_loss(x, y, queries)


def test_one_tensor_that_is_two_inputs_is_two_inputs():
    """Where y begins at x both losses see one tensor; replayed at others, they must not."""
    made = OverTasks(problem=Sinusoid(width=3, proximal=1.0), num_tasks=TASKS)
    x, y = made.init(Streams(0))
    shots, _ = next(made.episodes(stream(0, "b")))
    same = {name: entry[0] for name, entry in y.items()}
    for _ in range(5):
        made.lower_loss(same, {n: v.expand(TASKS, *v.shape) for n, v in same.items()}, shots)
    apart = {name: entry + 1 for name, entry in x.items()}
    y = {n: v.expand(TASKS, *v.shape) for n, v in x.items()}
    plain = OverTasks(problem=made.problem, num_tasks=TASKS, replayed=False)
    assert torch.equal(made.lower_loss(apart, y, shots), plain.lower_loss(apart, y, shots))


class Reversed(torch.autograd.Function):
    """The identity, with the derivative of minus that."""

    generate_vmap_rule = True

    @staticmethod
    def forward(entry):
        return entry

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


@component
class Odd(Fit):
    """A loss that does something beside `Fit`'s."""

    what: str = ""

    def lower_loss(self, x, y, batch):
        loss, more = super().lower_loss(x, y, batch), 0.0
        match self.what:
            case "constant":
                with torch.no_grad():
                    more = y["y"].sum()
            case "write":
                more = y["y"].clone().mul_(2.0).sum()
            case "number":
                more = float(x["x"].detach().sum()) * y["y"].sum()
            case "branch":
                more = y["y"].sum() if x["x"].sum() > 0 else y["y"].square().sum()
            case "function":
                more = Reversed.apply(y["y"]).square().sum()
        return loss + more


REASONS = {
    "constant": "turns gradients off",
    "write": "writes into a tensor (aten.mul_.Tensor)",
    "number": "turns a tensor into a float of Python",
    "branch": "turns a tensor into a bool of Python",
    "function": "or an autograd.Function",
}


@pytest.mark.parametrize(("what", "why"), REASONS.items(), ids=REASONS)
def test_what_cannot_be_replayed_is_told_and_right(what, why):
    """Each of these would have a record with other values, or other derivatives, at another point."""
    x, told = trained(Odd(what=what))
    plain, untold = trained(Odd(what=what), replayed=False)
    assert torch.equal(x["x"], plain["x"])
    (warning,) = told
    assert warning.kind == "tasks"
    assert why in warning.message
    assert "lower_loss" in warning.message
    assert not untold
    assert not trained(Odd())[1]  # control: without any of these nothing is said


def test_the_reason_is_found_below_another_problem():
    made, call = scene(Odd(what="number"))
    for _ in range(4):
        call()
    (why,) = made.not_replayed.values()
    assert replay_refusal(LearnedStart(problem=made)) == replay_refusal(made)
    assert why in replay_refusal(made)
    assert replay_refusal(Fit()) is None


class Scaled(Fit):
    """A loss that depends on what is not its argument, as a schedule of somebody's would have it."""

    elsewhere = [1.0]  # noqa: RUF012

    def lower_loss(self, x, y, batch):
        return self.elsewhere[0] * vars(self).get("own", 1.0) * super().lower_loss(x, y, batch)

    def set(self, value):
        object.__setattr__(self, "own", value)


def test_an_attribute_that_changes_is_seen_at_once():
    made, call = scene(Scaled())
    for _ in range(5):
        once = call()
    for scale in (2.0, 3.0):
        made.problem.set(scale)
        for _ in range(5):
            torch.testing.assert_close(call(), scale * once, rtol=1e-14, atol=0)
    assert not made.not_replayed
    for scale in range(5):
        made.problem.set(float(scale))
        [call() for _ in range(4)]
    assert "attributes of the problem change" in made.not_replayed["lower_loss"]
    made.problem.set(7.0)
    torch.testing.assert_close(call(), 7 * once, rtol=1e-14, atol=0)


@component
class Held(Fit):
    """A loss that reads a dict of its own."""

    def lower_loss(self, x, y, batch):
        options = vars(self).setdefault("options", {"scale": 1.0})
        return options["scale"] * super().lower_loss(x, y, batch)


@pytest.mark.parametrize(
    "change",
    [
        lambda problem, scale: vars(problem)["options"].update(scale=scale),
        lambda problem, scale: vars(problem).update(options={"scale": scale}),
    ],
    ids=["entry", "dict"],
)
@pytest.mark.parametrize("wrap", [lambda p: p, lambda p: LearnedStart(problem=p)])
def test_what_an_attribute_holds_is_seen_at_once_also_below_another_problem(change, wrap, vmaps):
    own = Held()
    made, call = scene(wrap(own))
    for _ in range(6):
        once = call()
    assert made._replayed._records
    for scale in (2.0, 3.0):
        change(own, scale)
        for _ in range(6):
            torch.testing.assert_close(call(), scale * once, rtol=1e-14, atol=0)
    assert not made.not_replayed
    told = len(vmaps)  # control: it is replayed while nothing changes
    call()
    assert len(vmaps) == told


def test_what_changes_elsewhere_is_an_error_at_the_next_comparison(monkeypatch):
    """No loss may depend on that, so it is looked for on every `EVERY`-th use, and exactly then."""
    monkeypatch.setattr(replayed, "EVERY", 8)
    monkeypatch.setattr(Scaled, "elsewhere", [1.0])
    _, call = scene(Scaled())
    once, *_ = (float(call()) for _ in range(5))
    Scaled.elsewhere[0] = 2.0
    assert [float(call()) / once for _ in range(6)] == [1.0] * 6  # those of the record
    with pytest.raises(ProblemError, match=r"lower_loss of Scaled .* up to 7 uses of that record"):
        call()
    # control: it is none where nothing changes
    _, call = scene(Scaled())
    assert len({float(call()) for _ in range(40)}) == 1


def test_what_changes_elsewhere_before_the_first_use_of_a_record_is_told_and_right(monkeypatch):
    monkeypatch.setattr(Scaled, "elsewhere", [1.0])
    made, call = scene(Scaled())
    once, *_ = (call() for _ in range(3))
    for scale in (2.0, 3.0):
        Scaled.elsewhere[0] = scale
        torch.testing.assert_close(call(), scale * once, rtol=1e-14, atol=0)
    assert made.not_replayed == {"lower_loss": replayed.OTHER}


def test_a_loss_that_differs_from_call_to_call_is_told(monkeypatch):
    """As sums on a device may in their last digit, which is no reason to end a run."""
    monkeypatch.setattr(replayed, "EVERY", 8)
    monkeypatch.setattr(Scaled, "elsewhere", [1.0])
    made, call = scene(Scaled())
    once, *_ = (call() for _ in range(11))
    monkeypatch.setattr(Scaled, "elsewhere", Growing())
    torch.testing.assert_close(call(), once, rtol=1e-12, atol=0)
    assert made.not_replayed == {"lower_loss": replayed.OTHER}


class Growing(list):
    """Whose entry is another each time."""

    def __getitem__(self, place):
        self.append(0)
        return 1 + 1e-14 * len(self)


def test_nothing_is_hidden_from_what_looks_at_operations(vmaps):
    """The checks of purity, and traces, see the loss itself."""
    _, call = scene()
    for _ in range(5):
        call()
    before = len(vmaps)
    call()
    assert len(vmaps) == before
    assert operations(call)["tanh"] == 1
    assert len(vmaps) == before + 1


def test_forms_beyond_the_last_are_evaluated_as_they_are(monkeypatch):
    monkeypatch.setattr(replayed, "MOST", 1)
    made, call = scene()
    x, y = made.init(Streams(0))
    _, queries = next(made.episodes(stream(0, "b")))
    for _ in range(5):
        call()
        value = made.upper_loss(x, y, queries)
    assert len(made._replayed._records) == 1
    plain = OverTasks(problem=Fit(), num_tasks=TASKS, replayed=False)
    assert torch.equal(value, plain.upper_loss(x, y, queries))


def test_a_copy_begins_with_no_records():
    made, call = scene(Sinusoid(width=3))
    for _ in range(5):
        call()
    for again in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert again == made
        assert not again._replayed._records
    assert made._replayed._records


def test_solving_and_starting_are_replayed_too(vmaps):
    """What takes task by task a function that is no loss: the start, the projection."""
    made = OverTasks(problem=Boxed(), num_tasks=TASKS)
    x, y = made.init(Streams(0))
    shots, _ = next(made.episodes(stream(0, "b")))
    structure = Structure(project=made.project_lower)
    solver = Gradient(steps=30, optimizer=SGD(lr=0.2))
    found = solve_lower(made.lower_loss, x, y, solver=solver, batch=shots, structure=structure).y
    assert len(vmaps) < 30
    looped = OverTasks(problem=Boxed(), num_tasks=TASKS, batched=False)
    slow = solve_lower(looped.lower_loss, x, y, solver=solver, batch=shots, structure=structure).y
    for name, entry in found.items():
        torch.testing.assert_close(entry, slow[name], rtol=1e-12, atol=1e-14)
    assert float(found["y"].abs().max()) == 0.6


@component
class Boxed(Fit):
    def project_lower(self, y):
        return {"y": y["y"].clamp(-0.6, 0.6), "offset": y["offset"]}
