"""Upper steps that are recorded and replayed: the same bits, the same errors, and nothing frozen."""

import io
import itertools
import re
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from bilevel.errors import ConvergenceError, RecipeError
from bilevel.estimators import Implicit, OneStep, Penalty
from bilevel.events import Stepped, Warned
from bilevel.linear.cg import CG
from bilevel.lower.gradient import Gradient
from bilevel.optimizers import SGD, Adam, Clip, Schedule, TorchOptimizer
from bilevel.recipe.assemble import assemble
from bilevel.recipe.recipe import loads
from bilevel.run import replayed
from bilevel.run.engine import restore, run, start
from bilevel.run.replayed import unfit
from bilevel.sinks.console import ConsoleReceiver
from bilevel.sinks.jsonl import JSONLines
from tests.run.replays import FIXED, LOGISTIC, SETUPS, Parts, both, ended, require_same
from tests.run.setups import Noisy, frozen, same, setup


class Counted:
    """A problem whose losses are counted."""

    def __init__(self, problem):
        self.problem, self.calls = problem, []

    def __getattr__(self, name):
        if name not in ("upper_loss", "lower_loss"):
            return getattr(self.problem, name)
        return lambda *given: self.calls.append(name) or getattr(self.problem, name)(*given)


@pytest.mark.parametrize("name", SETUPS)
def test_a_run_from_a_record_is_the_run(name):
    both(SETUPS[name])


def evaluations(steps):
    """Of the losses, in each step of a run of so many."""
    problem = Counted(LOGISTIC)
    s = replace(setup(problem, Implicit(solver=FIXED), steps=steps), compile="step")
    state, taken = start(s), []
    for event in run(s, state):
        if isinstance(event, Stepped):
            taken.append(len(problem.calls))
            problem.calls.clear()
    return taken


def test_the_losses_are_evaluated_in_no_replay():
    taken = evaluations(steps=9)
    # step 1 by itself; 2 recorded and by itself; 3 compared; then replays alone, and the last compared
    assert taken[1] == 2 * taken[2] > 0
    assert taken[3:] == [0] * 5 + [taken[2]]


def test_comparisons_grow_apart_up_to_a_limit_and_end_with_the_run(monkeypatch):
    monkeypatch.setattr(replayed, "EVERY", 2)
    monkeypatch.setattr(replayed, "SPARSEST", 6)
    compared = [step for step, calls in enumerate(evaluations(steps=30), start=1) if calls]
    assert compared == [1, 2, 3, 5, 9, 15, 21, 27, 30]


# what differs from step to step


def test_batches_of_another_shape_are_recorded_again():
    """20 rows in batches of 6, 6, 6 and 2, five a step: a period of four steps, each recorded once."""
    s = setup(Noisy(), Implicit(solver=FIXED), steps=14)
    state, _, traces, _ = both(s, traces=4)
    assert [trace.step for trace in traces] == [2, 3, 4, 5]
    assert [trace.why for trace in traces] == ["", *["another shape of lower batches"] * 3]
    assert state.lower_batches.drawn == 5 * 14  # each once, also where a replay departs


def test_a_solve_of_another_length_is_recorded_again():
    s = setup(LOGISTIC, Implicit(solver=CG(iterations=6, tolerance=1e-3)), steps=12)
    _, taken, traces, _ = both(s, traces=3)
    assert {step.estimate.iterations for step in taken[1:]} == {1, 2, 3}
    assert traces[1].why.startswith("linear/cg.py:")


def test_a_branch_of_a_loss_is_taken_where_it_is_taken_without():
    """F moves x["b"] to below 0; what G is there is another function."""
    torn = Parts()
    torn.torn = True
    s = setup(torn, Implicit(solver=FIXED), optimizer=SGD(lr=0.2))
    state, _, traces, _ = both(s, traces=2)
    assert state.x["b"].sum() < 0
    assert traces[1].why.startswith("run/replays.py:")


def test_a_run_that_is_resumed_is_the_one_that_was_not():
    s = replace(setup(Noisy(), Implicit(solver=FIXED), steps=9), compile="step")
    whole = ended(s)
    state = start(s)
    for event in run(s, state):
        if isinstance(event, Stepped) and event.step == 4:
            break
    resumed = ended(s, restore(s, frozen(state.save())))
    assert same(resumed[0].save(), whole[0].save())
    assert [trace.count for trace in resumed[2]] == [1, 2, 3, 4]  # of its own


class Scaled(Parts):
    """F or G times what the batch says, which is NaN in the batch of a step."""

    def __init__(self, level, at):
        super().__init__()
        self.level, self.at = level, at

    def upper_loss(self, x, y, batch):
        return super().upper_loss(x, y, batch) * batch

    lower_loss = Parts.lower_loss

    def batches(self, level, each):
        for drawn in itertools.count():
            is_bad = level == self.level and drawn == self.at * each
            yield torch.tensor(torch.nan if is_bad else 1.0, dtype=torch.float64)

    def upper_batches(self, generator):
        return self.batches("upper", 1)

    def lower_batches(self, generator):
        return self.batches("lower", 5)


@pytest.mark.parametrize("level", ["upper", "lower"])
@pytest.mark.parametrize("nonfinite", ["halt", "skip"])
def test_what_is_not_finite_is_found_at_the_step_that_makes_it(level, nonfinite):
    """In the upper batch of step 7, or the first lower batch of it."""

    def fails(mode):
        s = setup(Scaled(level, at=6), Implicit(solver=FIXED), steps=9)
        s = replace(s, upper=replace(s.upper, nonfinite=nonfinite), compile=mode)
        state, said = start(s), []
        try:
            for event in run(s, state):
                if isinstance(event, Warned):
                    said.append((event.step, event.kind, event.message))
        except ConvergenceError as error:
            said.append(str(error))
        return state, said

    (plain, said), (compiled, also) = fails("off"), fails("step")
    if nonfinite == "halt":
        assert said == also
        assert said[-1].startswith(f"step 7: {level}_loss = nan")
        assert compiled.step == 6
    else:
        assert said == [event for event in also if event[1] != "compile"]
        assert (7, "skipped") in [event[:2] for event in said]
        assert compiled.step == 9
    assert same(plain.x, compiled.x)
    assert same(plain.y, compiled.y)


class Masked(Parts):
    """G is the mean over the rows that a batch chooses: one of them, then three, and so on, a step each."""

    def lower_loss(self, x, y, batch):
        off = (self.rows @ y["w"].T + y["b"] - self.aim).square().sum(1)
        return off[batch > 0].mean() + sum((x[name].exp() * y[name].square()).sum() for name in y)

    def lower_batches(self, generator):
        for step in itertools.count():
            chosen = torch.zeros(8)
            chosen[: 1 + 2 * (step % 2)] = 1.0
            yield from [chosen] * 5


def test_another_number_of_chosen_rows_is_another_step():
    """What is divided by their number would else be divided by that of the record."""
    _, _, traces, _ = both(setup(Masked(), Implicit(solver=FIXED), steps=8), traces=2)
    assert traces[1].why.startswith("run/test_replayed.py:")


class Rooted(Parts):
    """G has the root of a matrix that is positive definite in no batch of step 5."""

    def lower_loss(self, x, y, batch):
        root = torch.linalg.cholesky(batch * torch.eye(3, dtype=torch.float64))
        return super().lower_loss(x, y, None) * root.diagonal().prod()

    def lower_batches(self, generator):
        for step in itertools.count():
            yield from [torch.tensor(-1.0 if step == 4 else 1.0, dtype=torch.float64)] * 5


class Dividing(Rooted):
    """G has a quotient of numbers, by zero in every batch of step 5, and a weight that hides it."""

    def lower_loss(self, x, y, batch):
        with torch.no_grad():
            weight = torch.ones(()).double() * (1 + 1 / (1 / (1.0 + batch.item())))
        return Parts.lower_loss(self, x, y, None) * weight


class Ending(Parts):
    """Whose batches cannot be read from step 5 on."""

    def upper_batches(self, generator):
        yield from [None] * 4
        raise ValueError("the file ends here")


@pytest.mark.parametrize("problem", [Rooted(), Dividing(), Ending()])
def test_an_error_is_that_of_the_step_itself(problem):
    said = []
    for mode in ("off", "step"):
        s = replace(setup(problem, Implicit(solver=FIXED), steps=8), compile=mode)
        state = start(s)
        with pytest.raises((ArithmeticError, RuntimeError, ValueError), match=r"\S") as caught:
            list(run(s, state))
        said.append((caught.type, str(caught.value), state.step))
    assert said[0] == said[1]
    assert said[0][2] == 4


class Deciding:
    """G's weight is what `weight` makes of a batch: one number for twelve steps, then others."""

    def __init__(self, weight):
        self.weight = weight

    def init(self, streams):
        return {"b": torch.linspace(0.1, 0.9, 3)}, {"b": torch.linspace(1.3, 0.7, 3)}

    def upper_loss(self, x, y, batch):
        return (y["b"] - 1).square().sum()

    def lower_loss(self, x, y, batch):
        return (y["b"] - x["b"]).square().sum() * self.weight(batch, y)

    def upper_batches(self, generator):
        return itertools.repeat(None)

    def lower_batches(self, generator):
        for step in itertools.count():
            value = 1.0 if step < 12 else 0.3 + step % 3 / 10
            yield from [torch.tensor([value, 1.0, 1.0], dtype=torch.float64)] * 5


def caught(batch, y):
    """What a root is where there is none."""
    try:
        return torch.linalg.cholesky(torch.diag(batch.double() - 0.95))[0, 0]
    except RuntimeError:
        return 2.0


def outside(batch, y):
    """What an entry is where there is none."""
    try:
        return torch.ones(2)[(3 * (1 - batch)).long()].sum()
    except IndexError:
        return 2.0


@pytest.mark.parametrize(
    "weight",
    [
        lambda batch, y: 2.0 if (batch > 0.9).all().item() else 1.0,
        lambda batch, y: (batch[0].item() / (0.3 + y["b"].square())).sum(),
        lambda batch, y: 1 + (y["b"].square() / batch[0].item()).sum(),
        lambda batch, y: 1 + (batch[0].item() - y["b"]).square().sum() / 10,
        lambda batch, y: 1 + (batch[0].item() * y["b"]).square().sum() / 9,
        lambda batch, y: torch.unique_consecutive(batch, return_counts=True)[1].sum() / 3,
        lambda batch, y: torch.tensor_split(batch, (batch * 2).long()[:1])[0].sum() + 1,
        lambda batch, y: (
            torch.tensor_split(batch, tensor_indices_or_sections=(batch * 2).long()[:1])[0].sum()
            + 1
        ),
        caught,
        outside,
    ],
    ids=[
        "bool",
        "over",
        "by",
        "minus",
        "times",
        "unique",
        "split",
        "split by name",
        "caught",
        "outside",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_a_loss_makes_of_numbers_is_what_it_makes_of_them_without(weight, dtype):
    lower = Gradient(steps=5, optimizer=SGD(lr=0.05))
    s = setup(Deciding(weight), OneStep(), steps=16, dtype=dtype, lower=lower)
    plain, compiled = ended(s), ended(replace(s, compile="step"))
    compiled[0].warned.pop("compile", None)
    require_same(plain, compiled)


# the step of x


class Kept(Parts):
    """With a projection of its own."""

    def project_upper(self, x):
        return {name: entry.clamp(-2, 2) for name, entry in x.items()}


class Own:
    """Somebody's optimizer, x − rate · h, at a rate that Python remembers."""

    differentiable = True

    def __init__(self, after):
        self.calls, self._after = 0, after

    def init(self, y):
        return {}

    def step(self, y, gradient, state):
        self.calls += 1
        rate = 0.05 if self.calls <= self._after else 0.001
        return {n: y[n] - rate * gradient[n] for n in y}, state


def upper_of(optimizer, **options):
    s = setup(LOGISTIC, Implicit(solver=FIXED), steps=8)
    return replace(s, upper=replace(s.upper, optimizer=optimizer, **options))


@pytest.mark.parametrize(
    ("s", "calls"),
    [
        (upper_of(TorchOptimizer(optimizer="Adam", options={"lr": 0.05})), 1),
        (upper_of(SGD(lr=0.1), schedule=Schedule(name="ConstantLR")), 1),
        (upper_of(Adam(lr=0.1)), 0),
        (upper_of(Adam(lr=0.1), clip=Clip(norm=1e-5)), 0),
        (setup(Kept(), Implicit(solver=FIXED)), 1),
    ],
    ids=["torch's", "schedule", "adam", "clip", "project_upper"],
)
def test_what_python_says_of_the_step_of_x_is_asked_at_every_step(s, calls, monkeypatch):
    """A rate that changes, an optimizer that writes in place, the problem's own projection; else it is in the record."""
    both(s)
    asked, step = [], replayed.moved
    monkeypatch.setattr(replayed, "moved", lambda *given: asked.append(None) or step(*given))
    ended(replace(s, compile="step"))
    # of one that is replayed: the first step, the record with what it is compared with, the first replay, the last
    assert len(asked) == (s.upper.steps if calls else 5)


@pytest.mark.parametrize("after", [2, 5])
def test_an_optimizer_that_remembers_is_called_once_at_every_step(after):
    plain = ended(upper_of(Own(after)))
    ours = Own(after)
    compiled = ended(replace(upper_of(ours), compile="step"))
    require_same(plain, compiled)
    assert ours.calls == 8
    assert len(compiled[2]) == 1


# what cannot be recorded


class Reading(Parts):
    """Reads y past torch's dispatch, which no record would see."""

    def lower_loss(self, x, y, batch):
        weight = 1 + y["w"].detach().numpy()[0, 0] ** 2
        return super().lower_loss(x, y, batch) * weight


class Drawing(Penalty):
    """An estimator that draws random numbers, and does not use them."""

    def estimate(self, losses, at, state):
        torch.randn(3, generator=torch.Generator().manual_seed(0))
        return super().estimate(losses, at, state)


@pytest.mark.parametrize(
    ("s", "reason"),
    [
        (setup(Reading(), Implicit(solver=FIXED)), r"test_replayed.py:\d+ reads numbers by numpy"),
        (setup(LOGISTIC, Drawing()), r"test_replayed.py:\d+ draws random numbers"),
        (setup(LOGISTIC, lower="lbfgs", steps=8), "depart from those recorded"),
    ],
    ids=["numpy", "random", "a line search"],
)
def test_what_no_record_holds_is_said_and_taken_without(s, reason):
    plain, compiled = ended(s), ended(replace(s, compile="step"))
    assert compiled[0].warned.pop("compile") == 0
    require_same(plain, compiled)
    (said,) = compiled[3]
    assert said.startswith("runtime.compile: from here on steps are taken as with off: ")
    assert re.search(reason, said)


def test_several_ranks_are_unfit():
    s = setup(LOGISTIC)
    assert unfit(s) is None

    class Two:
        is_alone = False

    object.__setattr__(s, "ranks", Two())
    assert "ranks" in unfit(s)


# from a recipe, and what is said


def test_a_recipe_asks_for_it_and_it_is_no_part_of_what_a_run_is():
    text = "problem: quadratic"
    off, step = loads(text), loads(text, ["runtime.compile=step"])
    assert (assemble(off).compile, assemble(step).compile) == ("off", "step")
    assert off.hash == step.hash
    with pytest.raises(RecipeError, match="'off', 'step' or 'inductor'"):
        replace(setup(), compile="scan")


def test_the_terminal_says_what_was_recorded_and_the_record_does_not(tmp_path):
    out = io.StringIO()
    receiver = ConsoleReceiver(Console(file=out, width=80))
    writer = JSONLines().open(tmp_path, None)
    for event in run_events():
        receiver.receive(event)
        writer.receive(event)
    writer.close()
    said = [line for line in out.getvalue().splitlines() if "recorded" in line]
    assert len(said) == 4
    assert re.match(r"step 2 recorded, to be replayed: \d+ operations, \d", said[0])
    assert re.match(r"step 3 recorded \(2: another shape of lower batches\): ", said[1])
    assert "traced" not in (tmp_path / "events.jsonl").read_text()


def run_events():
    s = replace(setup(Noisy(), Implicit(solver=FIXED)), compile="step")
    return [*run(s, start(s))]
