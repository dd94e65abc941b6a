"""What a problem draws from the global random states in its own methods is of the run's seed."""

import random

import numpy
import pytest
import torch
from torch.utils.data import DataLoader

from bilevel.events import Evaluated, Progress, Warned
from bilevel.rng import Seeded, stream
from bilevel.run.engine import prepare, restore, run, start
from tests.run.setups import Noisy, frozen, setup


def draw():
    """A number of each of the three, none of which takes a generator of the run."""
    return [float(torch.rand(())), float(numpy.random.rand()), random.random()]


def states():
    return torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist(), random.getstate()


class Drawing(Noisy):
    """Draws wherever the run calls it once in a while."""

    def __init__(self):
        object.__setattr__(self, "drawn", {})

    def prepare(self, device):
        self.drawn["prepare"] = []
        for done in range(3):
            self.drawn["prepare"] += draw()
            yield Progress("prepare", done)

    def place(self, device, dtype):
        self.drawn["place"] = draw()

    def evaluate(self, x, y):
        for done in range(2):
            self.drawn.setdefault("evaluate", []).extend(draw())
            yield Progress("evaluate", done)
        return dict(zip("abc", draw(), strict=True))

    def figures(self, x, y):
        self.drawn["figures"] = draw()
        return {}


class AtOnce(Drawing):
    def prepare(self):
        self.drawn["prepare"] = draw()
        return []

    def evaluate(self, x, y):
        self.drawn.setdefault("evaluate", []).extend(draw())
        return dict(zip("abc", draw(), strict=True))


def end(problem, seed, between=lambda: None):
    scene = setup(problem(), seed=seed, steps=2, evaluate_every=1)
    measures = []
    for _ in prepare(scene):
        between()
    for event in run(scene, start(scene)):
        between()
        if isinstance(event, Evaluated):
            measures.append(dict(event.metrics))
    return scene.problem.drawn, measures


@pytest.mark.parametrize("problem", [Drawing, AtOnce])
def test_draws_of_a_problems_methods_are_of_the_seed(problem):
    (first, measures), other = end(problem, 3), end(problem, 4)[0]
    assert first.keys() == {"prepare", "place", "evaluate", "figures"}
    for name, numbers in first.items():
        assert not set(numbers) & set(other[name])
    torch.manual_seed(5)
    assert end(problem, 3) == (first, measures)
    assert len(measures) == 3
    assert measures[0] == measures[1] == measures[2]  # of one draw: they differ by x and y alone


@pytest.mark.parametrize("problem", [Drawing, AtOnce])
def test_who_drives_a_run_has_states_of_their_own(problem):
    before = states()
    expected = end(problem, 3)
    assert states() == before
    # who draws between two events changes nothing, and finds what they had
    mine = []
    assert end(problem, 3, lambda: mine.append(draw())) == expected
    torch.set_rng_state(torch.tensor(before[0], dtype=torch.uint8))
    random.setstate(before[2])
    alone = [[float(torch.rand(())), random.random()] for _ in mine]
    assert [[a, c] for a, _, c in mine] == alone


def test_a_resumed_run_measures_what_one_in_one_go_does():
    scene, saved, expected = setup(AtOnce(), evaluate_every=2), None, []
    state = start(scene)
    for event in run(scene, state):
        if isinstance(event, Evaluated):
            expected.append(dict(event.metrics))
        saved = frozen(state.save()) if state.step == 3 and saved is None else saved
    draw()
    found = [e for e in run(scene, restore(scene, saved)) if isinstance(e, Evaluated)]
    assert [dict(event.metrics) for event in found] == expected[-2:]


def test_states_are_put_back_where_a_step_fails_or_is_the_last_taken():
    def steps():
        draw()
        yield 1
        draw()
        raise KeyError("mine")

    before, closed = states(), Seeded(0, "a").each(steps())
    assert next(closed) == 1
    assert states() == before
    with pytest.raises(KeyError):
        next(closed)
    assert states() == before


def test_a_generator_that_is_left_is_closed():
    ended = []

    def steps():
        try:
            yield 1
        finally:
            ended.append(True)

    outer = Seeded(0, "a").each(steps())
    next(outer)
    outer.close()
    assert ended == [True]


def test_another_name_is_another_draw():
    found = []
    for name in ("a", "a", "b"):
        with Seeded(3, name):
            found.append(draw())
    assert found[0] == found[1]
    assert not set(found[0]) & set(found[2])


class OfTheWorld(Noisy):
    def lower_batches(self, generator):
        while True:
            yield torch.randn(5, 3)


class OfNumpy(Noisy):
    def upper_batches(self, generator):
        while True:
            yield torch.from_numpy(numpy.random.randn(5, 3))

    def lower_batches(self, generator):
        while True:
            yield torch.tensor([[random.gauss() for _ in range(3)]])


class InOrder(Noisy):
    """A loader without workers takes a seed for them, and gives the same batches."""

    def lower_batches(self, generator):
        while True:
            yield from DataLoader(torch.randn(20, 3, generator=stream(0, "data")), 6)


class Somewhere(Noisy):
    def lower_start(self, x, y):
        return {"w": torch.randn_like(y["w"])}


@pytest.mark.parametrize(
    ("problem", "loose"),
    [
        (Noisy, None),
        (InOrder, None),
        (OfTheWorld, "lower_batches draw"),
        (OfNumpy, "upper_batches and lower_batches draw"),
        (Somewhere, "lower_start draw"),
    ],
)
def test_batches_and_starts_of_a_global_random_state_are_warned_of(problem, loose):
    scene, before = setup(problem(), steps=1), states()
    said = [e.message for e in run(scene, start(scene)) if isinstance(e, Warned)]
    assert [message.partition(" from ")[0] for message in said] == ([loose] if loose else [])
    if problem is Noisy:
        assert states() == before
