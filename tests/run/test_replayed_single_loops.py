"""Steps of single-loop methods from a record: rows by block, counters, and a full pass now and then."""

from dataclasses import replace

import pytest
import torch

from bilevel.events import Stepped
from bilevel.lower.gradient import Gradient
from bilevel.optimizers import SGD
from bilevel.registry.build import build
from bilevel.run import replayed
from bilevel.run.engine import Setup, restore, run, start
from bilevel.run.upper import Upper
from bilevel.scalars.table import RowTable
from tests.run.replays import BLOCKS, both, ended, require_same
from tests.run.setups import frozen, same


def setup(steps, **estimator):
    made = build("estimators", {"name": "single_loop", "lower_lr": 0.2, **estimator})
    upper = Upper(steps=steps, optimizer=SGD(lr=0.1))
    return Setup(BLOCKS, Gradient(), upper, made, dtype=torch.float64)


def every(name, **options):
    return {f"{q}_direction": {"name": name, **options} for q in ("lower", "adjoint", "upper")}


@pytest.mark.parametrize(
    ("estimator", "traces"),
    [
        ({}, 1),
        (every("saga"), 1),
        (every("storm"), 1),
        (every("average"), 1),
        (every("spider", period=5), 2),
        # of which the first drew one batch twice
        ({"order": "sequential", "lower_steps": 2, "adjoint_steps": 2}, 2),
        ({"order": "sequential", "adjoint": "series", "adjoint_steps": 2}, 2),
    ],
    ids=["soba", "saba", "storm", "average", "srba", "sequential", "series"],
)
def test_a_run_from_records_is_the_run(estimator, traces):
    """Blocks come in any order, and twice in a row; a full pass of SPIDER has a record of its own."""
    state, *_ = both(setup(13, **estimator), traces=traces)
    if estimator == every("saga"):
        assert len(state.estimator["memory"]["lower"]["lower"]["rows"]) > 3


def test_a_row_that_is_looked_up_unseen_is_one_of_that_block_alone(monkeypatch):
    """Negative control: without a table that follows the number each block is another record."""
    row = RowTable.row
    monkeypatch.setattr(RowTable, "row", lambda self, number: row(self, int(number)))
    s = setup(9, **every("saga"))
    plain, compiled = ended(s), ended(replace(s, compile="step"))
    compiled[0].warned.pop("compile", None)
    require_same(plain, compiled)
    assert len(compiled[2]) > 3


def test_a_run_with_tables_is_resumed_as_without_records():
    plain = ended(setup(11, **every("saga")))
    s = replace(setup(11, **every("saga")), compile="step")
    state = start(s)
    for event in run(s, state):
        if isinstance(event, Stepped) and event.step == 6:
            break
    resumed = ended(s, restore(s, frozen(state.save())))
    assert same(resumed[0].save(), plain[0].save())
    assert len(resumed[2]) <= 2  # that which makes a table of the dict, and the one after it


def test_a_way_that_is_rare_is_recorded_once_it_is_known_to_come_again(monkeypatch):
    monkeypatch.setattr(replayed, "SELDOM", 3)
    monkeypatch.setattr(replayed, "TIMES", 2)
    _, _, traces, _ = both(setup(18, **every("spider", period=5)), traces=2)
    assert [trace.step for trace in traces] == [2, 11]  # full passes are 1, 6, 11 and 16


def test_a_random_series_is_recorded_once_for_each_length():
    """And once more, since blocks are drawn twice in the first record and not in others."""
    both(setup(16, order="sequential", adjoint="random_series", adjoint_steps=3), traces=4)
