"""Runs taken by themselves and from records, which must be the same."""

from dataclasses import replace

from bilevel.events import Stepped, Traced, Warned
from bilevel.run.engine import run, start
from bilevel.run.replayed import is_same
from tests.run.setups import same


def ended(s, state=None):
    """(state, steps, what was recorded, why steps were taken by themselves) of a run."""
    state = state or start(s)
    events = list(run(s, state))
    found = [[e for e in events if isinstance(e, kind)] for kind in (Stepped, Traced, Warned)]
    return state, *found[:2], [e.message for e in found[2] if e.kind == "compile"]


def require_same(one, other):
    for name in ("x", "y", "lower", "upper", "estimator", "totals", "warned"):
        assert same(getattr(one[0], name), getattr(other[0], name)), name
    assert len(one[1]) == len(other[1])
    for a, b in zip(one[1], other[1], strict=True):
        assert is_same(replace(a, seconds=0.0), replace(b, seconds=0.0))


def both(s, traces=1):
    """A run as it is and one from records, which must be the same."""
    plain, compiled = ended(s), ended(replace(s, compile="step"))
    require_same(plain, compiled)
    assert compiled[3] == []
    assert len(compiled[2]) == traces
    return compiled
