"""What a problem's own methods give: other shapes, names and kinds end a run where they are given."""

import itertools
import random
from contextlib import nullcontext

import numpy
import pytest
import torch

from bilevel import tree
from bilevel.errors import ProblemError
from bilevel.estimators import FixedPoint, Implicit
from bilevel.lower import Gradient, Proximal
from bilevel.problem import LearnedStart, OverTasks
from bilevel.problem.answers import require_form
from bilevel.run.engine import Setup, prepare, run, start
from bilevel.run.upper import Upper
from bilevel.testing import reference_at, scene_at
from tests.problem.fits import Fit

X, Y = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([0.3, 0.1, -1.2])
OTHER = torch.tensor([[1.0]])
AS_Y = r"must return y as \{'y': \(3,\) float32\}; got "
AS_X = r"must return x as \{'x': \(3,\) float32\}; got "


class Plain:
    def init(self, streams):
        return {"x": X.clone()}, {"y": Y.clone()}

    def upper_loss(self, x, y, batch):
        return (y["y"] - 1).square().sum() + x["x"].square().sum()

    def lower_loss(self, x, y, batch):
        return (y["y"] - x["x"]).square().sum()

    def upper_batches(self, stream):
        return itertools.repeat(None)

    lower_batches = upper_batches


def mine(base=Plain, **methods):
    return type("Mine", (base,), methods)()


def ends(problem, lower=None):
    estimator = FixedPoint() if lower else Implicit()
    setup = Setup(problem, lower or Gradient(steps=2), Upper(steps=2), estimator, seed=0)
    for _ in prepare(setup):
        pass
    state = start(setup)
    for _ in run(setup, state):
        pass
    return state


WRONG = {
    "lower_start": [
        (lambda self, x, y: {"y": torch.zeros(1)}, AS_Y + r"\{'y': \(1,\) float32\}"),
        (lambda self, x, y: {"z": y["y"]}, AS_Y + r"\{'z': \(3,\) float32\}"),
        (lambda self, x, y: {**y, "z": y["y"]}, AS_Y + r"\{'y': \(3,\) float32, 'z': "),
        (lambda self, x, y: {"y": y["y"].numpy()}, AS_Y + r"\{'y': a ndarray\}"),
        (lambda self, x, y: y["y"], AS_Y + r"\(3,\) float32"),
        (lambda self, x, y: None, AS_Y + "a NoneType; it has no `return`"),
    ],
    "project_upper": [
        (lambda self, x: None, AS_X + "a NoneType; it has no `return`"),
        (lambda self, x: {"x": OTHER}, AS_X + r"\{'x': \(1, 1\) float32\}"),
    ],
    "project_lower": [
        (lambda self, y: None, AS_Y + "a NoneType; it has no `return`"),
        (lambda self, y: {"y": OTHER}, AS_Y + r"\{'y': \(1, 1\) float32\}"),
    ],
    "prox_lower": [
        (lambda self, x, y, step: None, AS_Y + "a NoneType; it has no `return`"),
        (lambda self, x, y, step: {"y": OTHER}, AS_Y + r"\{'y': \(1, 1\) float32\}"),
    ],
}
CASES = [(name, *case) for name, cases in WRONG.items() for case in cases]


@pytest.mark.parametrize(("name", "method", "said"), CASES)
def test_what_has_another_form_is_named(name, method, said):
    lower = Proximal(steps=2) if name == "prox_lower" else None
    with pytest.raises(ProblemError, match=rf"^Mine\.{name} {said}"):
        ends(mine(**{name: method}), lower)


RIGHT = {
    "lower_start": lambda self, x, y: {"y": x["x"] + 0.0},
    "project_upper": lambda self, x: tree.map(lambda p: p.clamp(-1, 1), x),
    "project_lower": lambda self, y: tree.map(lambda p: p.clamp(-1, 1), y),
    "prox_lower": lambda self, x, y, step: tree.scale(1 / (1 + step), y),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_has_the_form_is_taken(name):
    lower = Proximal(steps=2) if name == "prox_lower" else None
    assert ends(mine(**{name: RIGHT[name]}), lower).step == 2


def test_a_start_comes_in_the_dtype_of_the_run_as_init_does():
    fixed = torch.full((3,), 0.25, dtype=torch.float64)
    ended = ends(mine(lower_start=lambda self, x, y: {"y": fixed}))
    single = ends(mine(lower_start=lambda self, x, y: {"y": fixed.float()}))
    assert ended.y["y"].dtype == torch.float32
    assert torch.equal(ended.y["y"], single.y["y"])
    # control: what a projection gives has the dtype of what it was given
    with pytest.raises(ProblemError, match=r"project_upper must return x as .*float32.*float64"):
        ends(mine(project_upper=lambda self, x: {"x": x["x"].double()}))


def test_one_that_goes_wrong_later_is_named_too():
    calls = itertools.count()
    late = mine(project_upper=lambda self, x: x if next(calls) < 1 else None)
    with pytest.raises(ProblemError, match=r"^Mine\.project_upper must return x as"):
        ends(late)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_another_device():  # pragma: no cover
    with pytest.raises(ProblemError, match=r"got \{'y': \(3,\) float32 on cuda:0\}"):
        ends(mine(lower_start=lambda self, x, y: {"y": y["y"].cuda()}))


def test_a_device_is_told_where_it_is_not_the_cpu():
    given = {"y": torch.empty(3, device="meta")}
    with pytest.raises(ProblemError, match=r"got \{'y': \(3,\) float32 on meta\}$"):
        require_form(given, {"y": Y}, "Mine.lower_start", "y")


# nested variables, and problems that are made of others


class Nested(Plain):
    def init(self, streams):
        return {"x": X.clone()}, {"layer": [Y.clone(), torch.zeros(2)]}

    def upper_loss(self, x, y, batch):
        return (y["layer"][0] - 1).square().sum() + x["x"].square().sum()

    def lower_loss(self, x, y, batch):
        return (y["layer"][0] - x["x"]).square().sum() + y["layer"][1].square().sum()


def test_nested_ones_are_told_by_their_dotted_names():
    given = mine(Nested, lower_start=lambda self, x, y: {"layer": [x["x"], torch.zeros(1)]})
    said = r"^Mine\.lower_start must return y as \{'layer.0': \(3,\) float32, 'layer.1': \(2,\) .*\(1,\)"
    with pytest.raises(ProblemError, match=said):
        ends(given)
    with pytest.raises(ProblemError, match=r"^Mine\.lower_start must return y as .*a NoneType"):
        ends(mine(Nested, lower_start=lambda self, x, y: None))
    ends(mine(Nested, lower_start=lambda self, x, y: {"layer": [x["x"], torch.zeros(2)]}))


@pytest.mark.parametrize("batched", [True, False])
def test_the_problem_of_one_task_is_named(batched):
    class Task(Fit):
        def lower_start(self, x, y):
            return {"y": x["x"][:1], "offset": y["offset"]}

    with pytest.raises(ProblemError, match=r"^Task\.lower_start must return y as \{'y': \(3,\)"):
        ends(OverTasks(problem=Task(), num_tasks=2, batched=batched))


def test_the_problem_whose_start_is_learned_is_named():
    given = LearnedStart(problem=mine(project_lower=lambda self, y: None))
    with pytest.raises(ProblemError, match=r"^Mine\.project_lower must return y as"):
        ends(given)


# init, episodes, figures


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (({"x": [1.0, 2.0]}, {"y": Y}), r"x\['x.0'\] must be a floating-point tensor, got float"),
        (({"x": X}, {"y": {"z": None}}), r"y\['y.z'\] must be a floating-point tensor, got None"),
        (({"x": X}, None), "y must be a dict"),
        (({"x": X.int()}, {"y": Y}), r"x\['x'\] must be a floating-point tensor, got torch.int32"),
    ],
)
@pytest.mark.parametrize("around", [lambda p: p, lambda p: LearnedStart(problem=p)])
def test_an_init_of_something_else(made, said, around):
    with pytest.raises(ProblemError, match=rf"^Mine\.init: {said}"):
        start(Setup(around(mine(init=lambda self, streams: made)), Gradient(), Upper(), Implicit()))


@pytest.mark.parametrize("pair", [None, torch.zeros(2), (1,), (1, 2, 3), "ab", {"a": 1, "b": 2}])
@pytest.mark.parametrize("around", [lambda p: p, lambda p: OverTasks(problem=p, num_tasks=2)])
def test_episodes_that_are_no_pairs(pair, around):
    given = mine(episodes=lambda self, stream: itertools.repeat(pair))
    with pytest.raises(
        ProblemError, match=r"^Mine\.episodes must yield pairs \(lower batch, upper"
    ):
        ends(around(given))


@pytest.mark.parametrize("pair", [(None, None), [torch.zeros(2), None]])
def test_episodes_that_are(pair):
    assert ends(mine(episodes=lambda self, stream: itertools.repeat(pair))).step == 2


@pytest.mark.parametrize("name", ["upper_batches", "lower_batches"])
def test_episodes_without_batches_are_told_what_to_write(name):
    pairs = {"episodes": lambda self, stream: itertools.repeat((None, None)), name: None}
    with pytest.raises(ProblemError) as caught:
        ends(mine(**pairs))
    said = str(caught.value)
    assert said.startswith(
        f"Mine is not a Problem: it lacks {name}, needed beside episodes, since "
    )
    assert (
        "return (upper for _, upper in self.episodes(stream)), and (lower for lower, _ in" in said
    )
    with pytest.raises(ProblemError, match=f"it lacks {name}; see"):  # control
        ends(mine(**{name: None}))


@pytest.mark.parametrize("found", [3, None, ["a"], {3: "a"}])
def test_figures_that_are_none(found):
    with pytest.raises(
        ProblemError, match=r"^Mine\.figures must return a dict of name: matplotlib"
    ):
        ends(mine(figures=lambda self, x, y: found))


def test_figures_that_are():
    assert ends(mine(figures=lambda self, x, y: {"a": "a figure"})).step == 2


# closed forms


def scene(problem, lower=None, dtype=torch.float64):
    setup = Setup(problem, lower or Gradient(steps=2), Upper(), Implicit(), dtype=dtype)
    state = start(setup)
    return scene_at(setup, state, state.x, torch.Generator())


def test_a_lower_solution_of_another_form():
    for found in ({"y": X[:, None]}, {"z": X.double()}, {"y": X}, {"y": X.numpy()}, None):
        with pytest.raises(
            ProblemError, match=r"^Mine\.lower_solution must return y as \{'y': \(3,"
        ):
            scene(mine(lower_solution=lambda self, x, found=found: found))


def test_a_nested_lower_solution_of_another_form():
    right = mine(
        Nested, lower_solution=lambda self, x: {"layer": [x["x"], torch.zeros(2).to(x["x"])]}
    )
    scene(right)
    for found in ({"layer": [X.double()]}, None):
        with pytest.raises(
            ProblemError, match=r"^Mine\.lower_solution must return y as \{'layer.0'"
        ):
            scene(mine(Nested, lower_solution=lambda self, x, found=found: found))


def test_a_hypergradient_of_another_form():
    for found in ({"x": X[:1].double()}, {"z": X.double()}, {"x": X}, None):
        given = mine(hypergradient=lambda self, x, found=found: found)
        with pytest.raises(
            ProblemError, match=r"^Mine\.hypergradient must return x as \{'x': \(3,"
        ):
            reference_at(scene(given))


class Two(Plain):
    def init(self, streams):
        return {"x": X.clone(), "w": X[:2].clone()}, {"y": Y.clone()}


def test_a_hypergradient_in_another_order_is_put_in_that_of_x():
    def closed(self, x):
        return {"w": torch.full_like(x["w"], 2.0), "x": torch.full_like(x["x"], 1.0)}

    found = reference_at(scene(mine(Two, hypergradient=closed)))
    assert found.truth.tolist() == [1, 1, 1, 2, 2]


# what init draws


def random_start(self, streams):
    """Modules, numpy and Python's own draws, none of which takes a generator of the run."""
    layer = torch.nn.Linear(3, 1)
    w = layer.weight[0] + random.random() + torch.from_numpy(numpy.random.randn(3)).float()
    return {"x": w.detach()}, {"y": torch.randn(3)}


@pytest.mark.parametrize("around", [lambda p: p, lambda p: LearnedStart(problem=p)])
def test_what_init_draws_from_a_global_random_state_is_of_the_seed(around):
    def began(seed):
        setup = Setup(around(mine(init=random_start)), Gradient(), Upper(), Implicit(), seed=seed)
        state = start(setup)
        return {**state.x, **state.y}

    first, second, other = began(3), began(3), began(4)
    assert tree.equal(first, second)
    for name in ("x", "y"):
        assert not torch.isclose(first[name], other[name]).any()
    torch.manual_seed(5)  # a caller's own seed is neither used nor lost
    state = torch.get_rng_state()
    assert tree.equal(began(3), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_random_states_of_a_caller_are_as_before():
    def states():
        return (
            random.getstate(),
            numpy.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist(),
        )

    def fails(self, streams):
        random_start(self, streams)
        raise KeyError("mine")

    before = states()
    for init, error in ((random_start, None), (fails, KeyError)):
        with pytest.raises(error) if error else nullcontext():
            start(Setup(mine(init=init), Gradient(), Upper(), Implicit()))
        assert states() == before
