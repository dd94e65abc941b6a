"""Attributes that have changed since a record was made."""

import torch

from bilevel.replay.python_state import PythonState


class Owner:
    def __init__(self):
        self.count, self.data, self.rows = 0, torch.zeros(2), [0]
        self.part, self.options, self.batches = Part(), {"rate": 1.0, 2: 0.5}, iter([0])
        self.net = torch.nn.Sequential(torch.nn.Linear(2, 2))
        strength = 1.0

        def weight():
            return strength

        def stronger():
            nonlocal strength
            strength = 2.0

        self.weight, self.stronger = weight, stronger


class Part:
    rate = 0.1

    def __init__(self):
        self.rate = 0.1


def changed(change):
    owner = Owner()
    state = PythonState(owner)
    assert state.changed() is None
    change(owner)
    return state.changed()


def test_numbers_tensors_and_closures_are_seen():
    assert changed(lambda owner: setattr(owner, "count", 1)) == "count"
    assert changed(lambda owner: setattr(owner, "data", torch.zeros(2))) == "data"
    assert changed(lambda owner: setattr(owner.part, "rate", 0.2)) == "rate"
    assert changed(lambda owner: owner.stronger()) == "strength"


def test_entries_of_dicts_what_is_replaced_and_what_is_new_are_seen():
    assert changed(lambda owner: owner.options.update(rate=2.0)) == "rate"
    assert changed(lambda owner: owner.options.update({2: 0.1})) == "2"
    assert changed(lambda owner: setattr(owner, "options", {"rate": 1.0})) == "options"
    assert changed(lambda owner: setattr(owner, "part", Part())) == "part"
    assert changed(lambda owner: setattr(owner, "own", 1.0)) == "own"
    assert changed(lambda owner: owner.net.eval()) == "training"
    other = torch.nn.Parameter(torch.zeros(2))
    assert changed(lambda owner: setattr(owner.net[0], "bias", other)) == "bias"


def test_what_is_new_is_told_apart():
    owner = Owner()
    state = PythonState(owner)
    owner.own = 1.0
    assert (state.replaced(), state.added()) == (None, "own")


class Around:
    """A problem that is made of another one."""

    def __init__(self, problem):
        self.problem = problem


def test_a_problem_that_is_made_of_others_is_looked_through():
    owner = Owner()
    owner.part.options = {"rate": 1.0}
    state = PythonState(Around(Around(Around(Around(owner)))))
    assert state.changed() is None
    owner.part.options["rate"] = 2.0
    assert state.changed() == "rate"


def test_what_is_the_same_is_not_and_entries_of_lists_are_not_looked_at():
    assert changed(lambda owner: setattr(owner, "count", 0)) is None
    assert changed(lambda owner: owner.data.add_(1)) is None  # a replay reads what is in it
    assert changed(lambda owner: owner.rows.append(1)) is None
    assert changed(lambda owner: setattr(owner, "batches", iter([0]))) is None  # as an epoch ends
    assert changed(lambda owner: owner.options.update(other=1.0)) is None
