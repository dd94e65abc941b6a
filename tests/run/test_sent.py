"""What ranks send in an upper step: the table of the page on many devices, in scalars."""

import re
from pathlib import Path

import pytest

from bilevel.problem.spread import spread
from bilevel.run import Setup, Upper, engine
from bilevel.run.upper_step import advance
from bilevel.sharding.parts import teams
from tests.over_ranks import CLASSES, FEATURES, Classes, Whole
from tests.ranks import on_ranks

K, T, S = 3, 4, 5
Nx, Ny = FEATURES + CLASSES, CLASSES * (FEATURES + 1)
LOWER = {"name": "gradient", "steps": K, "optimizer": {"name": "sgd", "lr": 0.1}}
INNER = {"name": "gradient", "steps": S, "optimizer": {"name": "sgd", "lr": 0.01}}
CG = {"name": "cg", "iterations": T, "tolerance": 0.0}
METHODS = {
    "implicit": {"name": "implicit", "solver": CG, "start": "cold"},
    "implicit, warm": {"name": "implicit", "solver": CG},
    "one_step": {"name": "one_step"},
    "penalty": {"name": "penalty", "lower": INNER},
    "unroll, store": {"name": "unroll"},
    "unroll, recompute": {"name": "unroll", "memory": "recompute"},
    "single_loop": {"name": "single_loop"},
}
PAGE = Path(__file__).parents[2] / "docs" / "many_devices.md"


def told(text=None):
    """method ↦ (what it sends of the size of y, of x, of y where that is in parts), by the page."""
    rows = re.findall(
        r"^\| `([^|]+)` \| ([^|]+) · Ny \| ([^|]+) · Nx \| ([^|]+) · Ny \|$",
        text or PAGE.read_text("utf-8"),
        re.MULTILINE,
    )
    values = {"K": K, "T": T, "S": S}

    def number(words):
        made = re.sub(r"(\d)([KTS])", r"\1*\2", words)
        return eval(made, {"__builtins__": {}}, values)

    return {name: (number(y), number(x), number(part)) for name, y, x, part in rows}


class Both:
    """Both losses are of every entry of x and y."""

    def upper_loss(self, x, y, batch):
        return super().upper_loss(x, y, batch) + x["class"].square().sum()


PROBLEMS = {True: type("Blocks", (Both, Classes), {}), False: type("One", (Both, Whole), {})}


def sent(name, ranks):
    """(multiples of Ny, of Nx, other scalars, the event's own count, in bytes) of the second step."""
    setup = Setup(
        spread(PROBLEMS[name == "single_loop"](), ranks), LOWER, Upper(steps=9), METHODS[name],
        ranks=ranks,
    )  # fmt: skip
    state = engine.start(setup)
    list(advance(setup, state))  # the first compares whole and parts, too
    sizes, note = [], ranks.ledger.note

    def noting(values):
        sizes.append(sum(value.numel() for value in values))
        note(values)

    ranks.ledger.note = noting
    event = list(advance(setup, state))[-1]
    ranks.ledger.note = note
    rest = [size for size in sizes if size not in (Nx, Ny)]
    return sizes.count(Ny), sizes.count(Nx), rest, event.sent, len(sizes)


@pytest.fixture(scope="module")
def measured():
    """On two ranks, each with all of y, and with its rows."""

    def work(ranks):
        meshes = ranks, teams(ranks, shard=2)
        return [{name: sent(name, mesh) for name in METHODS} for mesh in meshes]

    return on_ranks(2, work)


def test_every_method_is_on_the_page():
    assert told().keys() == METHODS.keys()


@pytest.mark.parametrize("name", METHODS)
def test_what_is_sent_is_what_the_page_says(name, measured):
    for one, _ in measured:
        y, x, rest, event, calls = one[name]
        assert (y, x) == told()[name][:2]
        # beside them the losses' values, and the message in which two ranks compare eight integers
        assert sorted(rest) == [*[1] * (len(rest) - 1), 16]
        assert event.calls == calls
        assert event.bytes == 4 * (y * Ny + x * Nx + len(rest) - 1) + 8 * 16
    assert measured[0][0][name] == measured[1][0][name]


@pytest.mark.parametrize("name", METHODS)
def test_what_is_sent_of_y_in_parts_is_what_the_page_says(name, measured):
    for _, one in measured:
        y, x, rest, event, calls = one[name]
        assert (x, y) == told()[name][1:]
        assert sorted(rest) == [*[1] * (len(rest) - 1), 16]
        assert event.calls == calls
    assert measured[0][1][name] == measured[1][1][name]


def test_a_page_that_says_otherwise_would_be_seen():
    said = told("| `penalty` | K + 2S + 3 · Ny | 3 · Nx | 2K + 4S + 5 · Ny |")
    assert said == {"penalty": (K + 2 * S + 3, 3, 2 * K + 4 * S + 5)}
    assert said["penalty"] != told()["penalty"]
