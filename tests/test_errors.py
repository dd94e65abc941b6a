"""What a caller catches: every error of ours is also the builtin that fits."""

import pytest

from bilevel import errors

BUILTINS = {
    "RecipeError": ValueError,
    "ProblemError": ValueError,
    "RequirementError": ImportError,
    "CheckError": RuntimeError,
    "ConvergenceError": ArithmeticError,
    "CheckpointError": RuntimeError,
    "RankError": RuntimeError,
    "LostRankError": RuntimeError,
    "UserCodeError": RuntimeError,
    "TrackerError": RuntimeError,
}


def test_every_error_is_in_the_table():
    ours = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type)
        and value.__module__ == errors.__name__
        and not issubclass(value, Warning)
    }
    assert ours - {"BilevelError"} == set(BUILTINS)


@pytest.mark.parametrize(("name", "builtin"), BUILTINS.items())
def test_each_is_caught_as_its_builtin_and_says_what_it_was_given(name, builtin):
    kind = getattr(errors, name)
    with pytest.raises(builtin, match=r"^what is wrong$") as caught:
        raise kind("what is wrong")
    assert isinstance(caught.value, errors.BilevelError)
    others = {ValueError, ImportError, RuntimeError, ArithmeticError, OSError} - {builtin}
    assert not isinstance(caught.value, tuple(others))


NAMES = ["adam", "box_qp", "cg", "gradient", "iterations", "neumann", "none", "optimizer", "sgd"]


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("iteratons", ["iterations"]),
        ("sdg", ["sgd"]),
        ("sgt", ["sgd"]),
        ("CG", ["cg"]),
        ("Adamm", ["adam"]),
        ("iters", ["iterations"]),
        ("optim", ["optimizer"]),
        ("box", ["box_qp"]),
        ("newton", []),
        ("lion", []),
        ("o", []),
        ("", []),
    ],
)
def test_a_name_is_near_where_it_is_a_slip_or_an_abbreviation(name, near):
    assert errors.nearest(name, NAMES) == near


def test_the_likest_comes_first_and_two_at_most():
    assert errors.nearest("steps", ["step", "stops", "steps_", "stepsize"]) == ["steps_", "step"]


def test_an_unknown_name_that_is_near_to_none_is_told_all():
    assert errors.unknown("newton", ["none", "cg"], "estimator") == (
        "'newton': unknown estimator. Known: cg, none."
    )
