"""Every method over ranks is that of one rank on the whole batch, and the same bits on each rank.

The batches have 7 rows, which no number of ranks here divides.
"""

import pytest
import torch

from bilevel import ranks as over
from bilevel import registry
from bilevel.registry import presets
from bilevel.sharding.parts import Collect
from tests.over_ranks import tables

FEW = {"name": "lbfgs", "steps": 5}
"""Its pairs are differences of neighbours: near the solution they are little more than rounding."""
TIGHT = {"name": "cg", "tolerance": 1e-13}
TASKWISE = {"name": "task_cg", "tolerance": 1e-13}
LEARNED = {
    "name": "sgd",
    "lr": {"upper": "rate", "transform": "softplus"},
    "momentum": {"upper": "keep", "transform": "sigmoid"},
}
MOMENTUM = {"name": "sgd", "lr": 0.1, "momentum": 0.9}


def plain(names):
    return {name: {"estimator": name} for name in names}


def implicit(**options):
    return {"estimator": {"name": "implicit", **options}}


def lower(**options):
    return {"name": "gradient", "steps": 3, **options}


BLOCKS = {"saba", "srba", "vrbo", "soba", "sustain", "mrbo", "ma_soba", "fsla", "stocbio", "ttsa"}
BLOCKS |= {"bsa", "amigo", "single_loop"}
STARTED = {"fomaml", "reptile", "maml", "imaml"}
INNER = {"name": "gradient", "steps": 4, "optimizer": {"name": "sgd", "lr": 0.01}}
ESTIMATORS = {
    **plain(registry.references("estimators")),
    **plain(presets.of("estimators")),
    "kkt": {"problem": "Constrained", "estimator": "kkt", "lower": "augmented_lagrangian"},
    "value_function": {"estimator": {"name": "value_function", "lower": INNER}},
    "bvfsm": {"estimator": {"name": "bvfsm", "lower": INNER}},
    **{name: {"problem": "Classes", "estimator": name} for name in BLOCKS},
    **{name: {"problem": "Started", "estimator": name} for name in STARTED},
    **{n: {"estimator": n, "lower": FEW} for n in ("shine", "shine_block", "shine_refined")},
    "iaptt": {"problem": "LearnedStart", "estimator": "iaptt"},
}
LINEAR = {name: implicit(solver=name) for name in registry.references("linear")}
PRECONDITIONERS = {
    **{name: implicit(preconditioner=name) for name in registry.references("preconditioners")},
    "diagonal": {"problem": "Diagonal", **implicit(preconditioner="diagonal")},
    "lbfgs_pairs": {"lower": FEW, **implicit(solver=TIGHT, preconditioner="lbfgs_pairs")},
    "kfac": implicit(solver=TIGHT, preconditioner="kfac"),
    "ekfac": implicit(solver=TIGHT, preconditioner={"name": "kfac", "eigenvalues": "diagonal"}),
}
MEMORY = {
    mode: {"estimator": {"name": "unroll", "memory": mode}}
    for mode in ("store", "recompute", "checkpoint", "traced", "mixed", "reversible")
}
MEMORY["reversible"] |= {"lower": lower(optimizer=MOMENTUM)}
DIRECTIONS = {
    name: {
        "problem": "Classes",
        "estimator": {"name": "single_loop"}
        | {f"{what}_direction": name for what in ("lower", "adjoint", "upper")},
    }
    for name in registry.references("directions")
}
LOWER = {
    **{name: {"lower": name, "estimator": "one_step"} for name in registry.references("lower")},
    "augmented_lagrangian": ESTIMATORS["kkt"],
    "iterate": {"problem": "Mapped", "lower": "iterate", "estimator": "fixed_point"},
    "proximal": {"problem": "Proximal", "lower": "proximal", "estimator": "fixed_point"},
}
OTHERS = {
    "gauss_newton": {"problem": "Model", **implicit(curvature="gauss_newton")},
    "target_error": implicit(target_error=1e-3),
    "constrained gap": {
        "problem": "Constrained",
        "estimator": "regularised_gap",
        "lower": "augmented_lagrangian",
    },
    "projected": {"problem": "Projected", "estimator": "fixed_point"},
    "projected, traced": {
        "problem": "Projected",
        "estimator": {"name": "unroll", "memory": "traced"},
    },
    "learned steps": {
        "problem": "Stepped",
        "lower": lower(optimizer=LEARNED),
        "estimator": "unroll",
    },
    "adam, mixed": {
        "lower": lower(optimizer="adam"),
        "estimator": {"name": "unroll", "memory": "mixed"},
    },
    "accumulated": {
        "problem": "Classes",
        **implicit(),
        "upper": {"accumulate": 2},
        "lower": lower(accumulate=2),
    },
    "odd shapes, one_step": {"problem": "Odd", "estimator": "one_step"},
    "odd shapes, mixed": {"problem": "Odd", "estimator": {"name": "unroll", "memory": "mixed"}},
    "tasks, by task_cg": {"problem": "OverTasks", **implicit(solver=TASKWISE)},
    "tasks, unrolled": {"problem": "OverTasks", "estimator": "unroll"},
}
GROUPS = {
    "estimator": ESTIMATORS,
    "linear": LINEAR,
    "preconditioner": PRECONDITIONERS,
    "memory": MEMORY,
    "direction": DIRECTIONS,
    "lower": LOWER,
    "other": OTHERS,
}
CASES = {
    f"{group}: {name}": case for group, cases in GROUPS.items() for name, case in cases.items()
}
THREE = ("estimator: implicit", "estimator: penalty", "memory: traced", "preconditioner: kfac")
THREE += ("direction: saga", "lower: gradient")


FOUR = ("estimator: implicit", "linear: minres", "linear: neumann", "estimator: penalty")
FOUR += ("estimator: one_step", "estimator: sama", "memory: store", "memory: recompute")
FOUR += ("memory: checkpoint", "memory: traced", "preconditioner: recycled", "other: projected")
FOUR += ("other: learned steps",)

IN_PARTS = [n for n in CASES if n.removeprefix("estimator: ") not in presets.of("estimators")]
"""Named methods are made of components that are here by themselves."""
WHOLE = ("kkt", "shine", "betty", "lbfgs", "augmented_lagrangian", "constrained gap", "newton")
WHOLE += ("dense", "task_cg", "tasks, by task_cg", "kfac", "ekfac", "nystrom")
"""What works with all of y at once."""


@pytest.fixture(scope="module")
def both():
    """On two ranks, each with all of y; with its rows; with its rows of x too and graphs without wholes."""
    parts, again = {"shard": 2, "only": IN_PARTS}, {"shard": 2, "keep": "again", "x_from": 0}
    return tables(CASES, 2, {}, parts, {**again, "only": FOUR})


@pytest.fixture(scope="module")
def two(both):
    return both[0]


@pytest.fixture(scope="module")
def three():
    return tables({name: CASES[name] for name in THREE}, 3, {}, {"shard": 3})


@pytest.fixture(scope="module")
def four():
    return tables({name: CASES[name] for name in FOUR}, 4, {"shard": 2})[0]


def require_same(name, found):
    """Off by no more than rounding, and the same bits; a method that differs amplifies by 1e3."""
    if "RequirementError" in str(found[0]):
        pytest.skip(str(found[0]))
    assert not [one for one in found if isinstance(one, str)], found
    most = 1e-11 if "zeroth_order" in name or "pzobo" in name else 1e-12
    assert max(off for off, _ in found) <= most
    first = found[0][1]
    for _, other in found[1:]:
        for level, params in first.items():
            for key, entry in params.items():
                assert torch.equal(entry, other[level][key]), f"{level}[{key!r}] differs"


@pytest.mark.parametrize("name", CASES)
def test_on_two_ranks(name, two):
    require_same(name, two[name])


@pytest.mark.parametrize("name", THREE)
def test_on_three_ranks(name, three):
    require_same(name, three[0][name])


# y in parts


def is_whole(name):
    return name.partition(": ")[2].startswith(WHOLE)


@pytest.mark.parametrize("name", IN_PARTS)
def test_on_two_ranks_that_hold_y_together(name, both):
    found = both[1][name]
    if not is_whole(name):
        require_same(name, found)
        return
    if "RequirementError" in str(found[0]):
        pytest.skip(str(found[0]))
    for said in found:
        assert "ProblemError: " in said
        assert "works with all of y at once, and with runtime.mesh.shard = 2" in said
        assert "or set runtime.mesh.shard=1" in said


@pytest.mark.parametrize("name", [name for name in THREE if not is_whole(name)])
def test_on_three_ranks_that_hold_y_together(name, three):
    """The three rows of an entry are one a rank."""
    require_same(name, three[1][name])


@pytest.mark.parametrize("name", FOUR)
def test_on_two_teams_of_two_ranks(name, four):
    require_same(name, four[name])


@pytest.mark.parametrize("name", FOUR)
def test_on_two_ranks_that_hold_x_too_and_gather_again(name, both):
    if "learned" in name:
        said = (
            "x['keep.bias'] of shape (1,) is for y['bias'] of shape (3,), and ranks hold the rows"
        )
        assert all(said in one for one in both[2][name])
        return
    require_same(name, both[2][name])


AGAIN = ("memory: mixed", "memory: traced", "estimator: implicit", "other: odd shapes, mixed")


@pytest.fixture(scope="module")
def again():
    return tables({name: CASES[name] for name in AGAIN}, 2, {"shard": 2, "keep": "again"})[0]


@pytest.mark.parametrize("name", AGAIN)
def test_on_two_ranks_that_gather_y_again(name, again):
    require_same(name, again[name])


# controls: what would be wrong is seen


def seen(name, **mesh):
    """What a case that is wrong is told by: a rank's error, or a number that is off."""
    rows = tables({name: CASES[name]}, 2, mesh)[0][name]
    try:
        require_same(name, rows)
    except AssertionError:
        words = [row.partition(":")[0] if isinstance(row, str) else "off" for row in rows]
        (told,) = {*words}
        return told
    return ""


@pytest.mark.parametrize(
    ("name", "target", "wrong", "told"),
    [
        (
            "preconditioner: kfac",
            "preconditioners.kfac.ranks.here",
            lambda: over.ALONE,
            "RankError",
        ),
        ("estimator: implicit", "problem.spread.over.leave", lambda ranks, v: v, "off"),
        ("estimator: implicit", "problem.spread.over.enter", lambda ranks, v: [*v], "RankError"),
    ],
)
def test_a_sum_that_is_left_out_is_seen(name, target, wrong, told, monkeypatch):
    monkeypatch.setattr(f"bilevel.{target}", wrong)
    assert seen(name) == told


@pytest.mark.parametrize(
    ("name", "target", "wrong", "told"),
    [
        ("linear: cg", "Team.total", lambda team, value: value, "RankError"),
        ("linear: cg", "Gather.backward", Collect.backward, "off"),
        ("other: learned steps", "over.enter", lambda ranks, values: [*values], "RankError"),
    ],
)
def test_a_sum_over_parts_that_is_left_out_is_seen(name, target, wrong, told, monkeypatch):
    """Dots of a rank's own rows, a gradient of its own rows of the batch, a rate's of its own rows."""
    monkeypatch.setattr(f"bilevel.sharding.parts.{target}", wrong)
    assert seen(name, shard=2) == told
