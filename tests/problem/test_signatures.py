"""Methods of a problem that a run would not call, or not as they are written."""

import itertools

import pytest
import torch
from torch import nn

import bilevel
from bilevel import registry
from bilevel.errors import ProblemError
from bilevel.events import Warned
from bilevel.problem import LearnedStart
from bilevel.problem.protocol import OPTIONAL
from bilevel.problem.signatures import ARGUMENTS, misspelt, refuse_arguments
from bilevel.registry.build import build


class Plain:
    def init(self, streams):
        return {"x": torch.ones(2)}, {"y": torch.zeros(2)}

    def upper_loss(self, x, y, batch):
        return (y["y"] - 1).square().sum()

    def lower_loss(self, x, y, batch):
        return (y["y"] - x["x"]).square().sum()

    def upper_batches(self, stream):
        return itertools.repeat(None)

    lower_batches = upper_batches


def mine(base=Plain, **methods):
    return type("Mine", (base,), {"__module__": __name__, **methods})()


def taking(name):
    """A method with the arguments of an optional one."""
    methods = {
        1: lambda self, a: {},
        2: lambda self, a, b: {},
        3: lambda self, a, b, c: {},
        4: lambda self, a, b, c, d: {},
    }
    return methods[len(ARGUMENTS[name])]


SLIPS = [
    ("evalute", "evaluate"),
    ("evaluates", "evaluate"),
    ("evalaute", "evaluate"),
    ("lower_solutions", "lower_solution"),
    ("project_uper", "project_upper"),
    ("projectLower", "project_lower"),
    ("lower_project", "project_lower"),
    ("hypergradients", "hypergradient"),
    ("figure", "figures"),
    ("lower_constrains", "lower_constraints"),
]


@pytest.mark.parametrize(("name", "meant"), SLIPS)
@pytest.mark.parametrize("around", [lambda p: p, lambda p: LearnedStart(problem=p)])
def test_a_misspelt_optional_method_is_told_with_the_right_name(name, meant, around):
    (said,) = misspelt(around(mine(**{name: taking(meant)})))
    assert said.startswith(f"Mine.{name} is not a method that a run calls. Did you mean '{meant}'?")


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_letter_too_few_is_seen_in_every_name(name):
    slip = name[:-2] + name[-1]
    assert [said for said in misspelt(mine(**{slip: taking(name)})) if name in said]


def test_a_run_warns_of_it_once_and_goes_on():
    problem = mine(evalute=lambda self, x, y: {"far": 1.0})
    with pytest.warns(UserWarning, match=r"step 0: Mine\.evalute .* Did you mean 'evaluate'"):
        result = bilevel.minimize(problem, steps=2)
    assert [event.kind for event in result.warned] == ["misspelt"]
    assert len(result.history) == 2


class Library(nn.Module):
    def evalute(self, x, y):
        return {}


Library.__module__ = "elsewhere.models"


@pytest.mark.parametrize(
    "problem",
    [
        mine(),
        mine(evaluate=taking("evaluate"), evaluates=taking("evaluate")),  # a helper beside it
        mine(_evalute=taking("evaluate")),
        mine(evalute=property(lambda self: 1 / 0)),
        mine(figure=lambda self, name, size, place: None),  # other arguments
        mine(figure=lambda self: None),
        mine(lower_part=taking("lower_start"), lower_mask=taking("lower_map")),
        mine(draw=taking("evaluate"), accuracy=taking("evaluate"), replace=taking("place")),
        type("Mine", (Plain, Library), {"__module__": __name__})(),
    ],
)
def test_methods_of_the_user_and_of_a_library_are_left_alone(problem):
    assert misspelt(problem) == []
    events = [*bilevel.iterate(problem, steps=1)]
    assert not [event for event in events if isinstance(event, Warned)]


SHIPPED = [
    name for name in registry.names("problems") if name not in ("learned_start", "over_tasks")
]


@pytest.mark.parametrize("name", SHIPPED)
def test_problems_that_come_with_it_are_right(name):
    problem = build("problems", name)
    refuse_arguments(problem)
    assert misspelt(problem) == []


@pytest.mark.parametrize(
    ("name", "method", "said"),
    [
        (
            "evaluate",
            lambda self, x: {},
            r"evaluate\(x\) is called as evaluate\(x, y\), by position",
        ),
        ("evaluate", lambda self, y, x: {}, r"evaluate\(y, x\) is called as evaluate\(x, y\)"),
        ("figures", lambda self, x, y, *, size: {}, r"figures\(x, y, \*, size\) is called as"),
        ("project_lower", lambda self: {}, r"project_lower\(\) is called as project_lower\(y\)"),
        ("lower_loss", lambda self, y, x, batch: 0, r"lower_loss\(y, x, batch\) is called as"),
        (
            "prox_lower",
            lambda self, x, y: y,
            r"prox_lower\(x, y\) is called as prox_lower\(x, y, step\)",
        ),
        (
            "prepare",
            lambda self, device, path: [],
            r"prepare\(device, path\) is called as prepare\(device\)",
        ),
    ],
)
def test_other_arguments_are_refused_before_anything_is_computed(name, method, said):
    problem = mine(**{name: method, "init": lambda self, streams: 1 / 0})
    with pytest.raises(ProblemError, match=rf"^Mine\.{said}"):
        bilevel.minimize(problem, steps=1)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("evaluate", lambda self, a, b, *more, size=1, **others: {"z": 1.0}),
        ("evaluate", staticmethod(lambda x, y: {"z": 1.0})),
        ("project_upper", lambda self, y: y),
        ("prepare", lambda self: iter(())),
        ("prepare", lambda self, device=None: iter(())),
    ],
)
def test_arguments_of_other_names_and_more_with_defaults_are_taken(name, method):
    assert len(bilevel.minimize(mine(**{name: method}), steps=1).history) == 1
