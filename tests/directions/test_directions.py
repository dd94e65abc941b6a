"""Directions against their formulas and identities."""

from dataclasses import replace
from types import SimpleNamespace

import torch

from bilevel.directions.average import Average
from bilevel.directions.saga import Saga
from bilevel.directions.spider import Spider
from bilevel.directions.storm import Storm
from bilevel.registry.build import build


def vector(*values):
    return {"a": torch.tensor(values, dtype=torch.float64)}


def made(now, before=None, full=None, block=(0, 1)):
    """A draw of given values; what is not given must not be asked for."""

    def give(value):
        def call():
            assert value is not None, "asked for what it does not need"
            return value

        return call

    shares = {} if now is None else {"lower": now}
    return SimpleNamespace(
        now=give(now),
        before=give(before),
        full=give(full),
        shares=lambda: shares,
        block=lambda share: block,
    )


def test_storm_at_momentum_one_is_the_draw():
    d, memory = Storm(momentum=1.0).take(made(vector(1.0)), {})
    d, memory = Storm(momentum=1.0).take(made(vector(5.0)), memory)
    assert d == vector(5.0)
    assert not Storm(momentum=1.0).looks_back


def test_storm_follows_its_formula_and_its_own_draw_first():
    d, memory = Storm(momentum=0.25).take(made(vector(2.0)), {})
    assert d == vector(2.0)
    d, _ = Storm(momentum=0.25).take(made(vector(3.0), before=vector(1.0)), memory)
    assert d == vector(3.0 + 0.75 * (2.0 - 1.0))


def test_spider_telescopes_to_the_full_direction():
    """One block: d_t is q(z_t) exactly, by a pass every fourth time and differences between."""
    points, memory, passes = [1.0, 4.0, -2.0, 0.5, 3.0, 7.0], {}, 0
    for t, point in enumerate(points):
        full = vector(point**2) if t % 4 == 0 else None
        before = vector(points[t - 1] ** 2) if t % 4 else None
        now = vector(point**2) if t % 4 else None
        d, memory = Spider(period=4).take(made(now, before, full), memory)
        passes += full is not None
        assert d == vector(point**2)
    assert passes == 2


def test_spider_keeps_the_error_of_no_batch_while_z_rests():
    d, memory = Spider(period=9).take(made(None, full=vector(3.0)), {})
    for noise in (10.0, -4.0):
        d, memory = Spider(period=9).take(made(vector(noise), vector(noise)), memory)
    assert d == vector(3.0)


def test_saga_is_the_full_direction_once_its_table_is_full_at_rest():
    rows, memory = [1.0, 5.0, -3.0], {}
    for block, value in enumerate(rows):
        _, memory = Saga().take(made(vector(value), block=(block, 3)), memory)
    for block, value in enumerate(rows):
        d, _ = Saga().take(made(vector(value), block=(block, 3)), memory)
        assert d == vector(1.0)


def test_saga_writes_into_no_state_it_was_given():
    _, memory = Saga().take(made(vector(1.0), block=(0, 2)), {})
    kept = {"mean": memory["lower"]["mean"]["a"].clone(), "rows": set(memory["lower"]["rows"])}
    Saga().take(made(vector(7.0), block=(1, 2)), memory)
    Saga().take(made(vector(9.0), block=(0, 2)), memory)
    assert torch.equal(memory["lower"]["mean"]["a"], kept["mean"])
    assert set(memory["lower"]["rows"]) == kept["rows"]
    assert memory["lower"]["rows"]["0"] == vector(1.0)


LAGGED = build("estimators", "ma_soba").upper_direction


def test_average_forgets_at_its_weight():
    _, memory = Average(weight=0.25).take(made(vector(4.0)), {})
    d, _ = Average(weight=0.25).take(made(vector(8.0)), memory)
    assert d == vector(0.75 * 4.0 + 0.25 * 8.0)


def test_a_lagged_average_has_every_draw_but_the_present():
    draws, plain, lagged = (4.0, 8.0, -2.0, 7.0), [], []
    for direction, taken in ((Average(weight=0.25), plain), (replace(LAGGED, weight=0.25), lagged)):
        memory = {}
        for value in draws:
            d, memory = direction.take(made(vector(value)), memory)
            taken.append(d)
    assert lagged == [vector(4.0), *plain[:-1]]
    assert LAGGED.lagged  # what ma_soba moves along
