"""Attributes that have changed since a record was made."""

import torch

from bilevel.replay.python_state import PythonState


class Owner:
    def __init__(self):
        self.count, self.data, self.rows = 0, torch.zeros(2), [0]
        self.part = Part()
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


def test_what_is_the_same_is_not_and_entries_of_lists_are_not_looked_at():
    assert changed(lambda owner: setattr(owner, "count", 0)) is None
    assert changed(lambda owner: owner.data.add_(1)) is None  # a replay reads what is in it
    assert changed(lambda owner: owner.rows.append(1)) is None
