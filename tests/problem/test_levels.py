"""A problem and what it offers, found once; and what becomes of it in problems made of problems."""

import itertools
import re
from pathlib import Path

import pytest
import torch

from bilevel import hypergradient, solve_lower, tree
from bilevel.errors import ProblemError, RecipeError
from bilevel.estimators.fixed_point import FixedPoint
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.shine import Shine
from bilevel.estimators.unroll import Unroll
from bilevel.lower.gradient import Gradient
from bilevel.lower.lbfgs import LBFGS
from bilevel.lower.newton import Newton
from bilevel.lower.proximal import Proximal
from bilevel.problem.from_modules import FromModules
from bilevel.problem.learned_start import PREFIX, LearnedStart
from bilevel.problem.levels import Levels, require_offers
from bilevel.problem.over_tasks import OverTasks
from bilevel.problem.over_tasks import at as part_of
from bilevel.problem.protocol import OPTIONAL
from bilevel.rng import Streams
from bilevel.types import RESTRICTIONS, LowerSolution, Structure
from bilevel_problems.box_qp import BoxQP
from bilevel_problems.lasso import Lasso


class Bare:
    """x = {"p"}, y = {"q"} of two numbers, and no optional method but `episodes`."""

    def init(self, streams):
        return {"p": torch.tensor([2.0, 3.0])}, {"q": torch.tensor([0.5, -1.0])}

    def upper_loss(self, x, y, batch):
        return (y["q"] - batch).square().sum() + 0 * x["p"].sum()

    def lower_loss(self, x, y, batch):
        return (y["q"] - x["p"] * batch).square().sum()

    def upper_batches(self, stream):
        return itertools.repeat(torch.tensor([1.0, 2.0]))

    def lower_batches(self, stream):
        return self.upper_batches(stream)

    def episodes(self, stream):
        return ((torch.tensor([k, 1.0]), torch.tensor([1.0, k])) for k in itertools.count(1.0))


METHODS = {
    "prepare": lambda self: iter(()),
    "place": lambda self, device, dtype: None,
    "part": lambda self, batch, rank, ranks: (batch, 1 / ranks),
    "lower_start": lambda self, x, y: {"q": 3 * x["p"] + y["q"]},
    "lower_solution": lambda self, x: {"q": x["p"]},
    "hypergradient": lambda self, x: {"p": 2 * x["p"]},
    "evaluate": lambda self, x, y: {"size": float((x["p"] * y["q"]).sum())},
    "figures": lambda self, x, y: {"figure": (x["p"] * y["q"]).sum()},
    "export": lambda self, x, y, folder, merged: (x["p"] * y["q"], folder, merged),
    "episodes": Bare.episodes,
    "project_upper": lambda self, x: tree.map(lambda p: p.clamp(max=1.0), x),
    "project_lower": lambda self, y: tree.map(lambda q: q.clamp(min=0.0), y),
    "prox_lower": lambda self, x, y, step: {"q": y["q"] - step * x["p"]},
    "lower_map": lambda self, x, y, batch: {"q": (x["p"] * y["q"]).sin() + batch},
    "lower_constraints": lambda self, x, y, batch: {
        "equality": (y["q"].sum() - x["p"].sum()).reshape(1),
        "inequality": y["q"] - batch,
    },
    "lower_diagonal": lambda self, x, y, batch: {"q": x["p"].exp() + 0 * y["q"] + batch},
}
"""One of each optional method; each depends on all of its arguments."""

ARGUMENTS = {
    "prepare": (),
    "place": ("device", "dtype"),
    "part": ("batch", "rank", "ranks"),
    "lower_start": ("x", "y"),
    "lower_solution": ("x",),
    "hypergradient": ("x",),
    "evaluate": ("x", "y"),
    "figures": ("x", "y"),
    "export": ("x", "y", "folder", "merged"),
    "episodes": ("stream",),
    "project_upper": ("x",),
    "project_lower": ("y",),
    "prox_lower": ("x", "y", "step"),
    "lower_map": ("x", "y", "batch"),
    "lower_constraints": ("x", "y", "batch"),
    "lower_diagonal": ("x", "y", "batch"),
}

REFUSED = {
    ("LearnedStart", "lower_start"),
    ("OverTasks", "lower_solution"),
    ("OverTasks", "hypergradient"),
    ("OverTasks", "export"),
    ("FromModules", "place"),  # has one of its own
}

X = {"p": torch.tensor([2.0, 3.0])}
Y = {"q": torch.tensor([0.5, -1.0])}
TASKS = {"q": torch.tensor([[0.5, -1.0], [0.25, 2.0], [-3.0, 0.1]])}
BATCHES = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
STARTED = {**X, f"{PREFIX}q": torch.tensor([7.0, -8.0])}


def toy(*names):
    return type("Toy", (Bare,), {name: METHODS[name] for name in names})()


def from_modules(names):
    def loss(upper, lower, batch):
        return lower.parameters["q"].sum()

    upper, lower = torch.nn.ParameterDict(X), torch.nn.ParameterDict(Y)
    methods = {name: lambda *given, m=METHODS[name]: m(None, *given) for name in names}
    for name in {"evaluate", "figures"} & {*names}:
        methods[name] = lambda upper, lower, m=METHODS[name]: m(
            None, upper.parameters, lower.parameters
        )
    repeat = lambda stream: itertools.repeat(None)  # noqa: E731
    return FromModules(upper, lower, loss, loss, repeat, repeat, methods)


WRAPPED = {
    "LearnedStart": lambda names: LearnedStart(problem=toy(*names)),
    "OverTasks": lambda names: OverTasks(problem=toy(*names, "episodes"), num_tasks=3),
    "FromModules": from_modules,
}


def test_the_tables_here_are_of_every_optional_method():
    assert METHODS.keys() == ARGUMENTS.keys() == OPTIONAL.keys()


@pytest.mark.parametrize("name", OPTIONAL)
def test_the_page_names_each(name):
    page = Path(__file__).parents[2] / "docs" / "problem.md"
    assert f"`{name}({', '.join(ARGUMENTS[name])})`" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", OPTIONAL)
def test_levels_find_what_a_problem_has_and_nothing_else(name):
    with_it, without = Levels(toy(name)), Levels(toy())
    assert name in with_it
    assert with_it.get(name) is not None
    assert (name in without) == (name == "episodes")  # the control


def test_what_is_no_problem_is_refused_by_what_it_lacks():
    class Half:
        def init(self, streams): ...

    expected = (
        "Half is not a Problem: it lacks upper_loss, lower_loss, upper_batches, lower_batches"
    )
    with pytest.raises(ProblemError, match=expected):
        Levels(Half())


@pytest.mark.parametrize("name", OPTIONAL)
@pytest.mark.parametrize("wrapper", WRAPPED)
def test_a_problem_made_of_a_problem_keeps_each_method_or_refuses_it_by_name(wrapper, name):
    if (wrapper, name) in REFUSED:
        with pytest.raises((RecipeError, ProblemError), match=name):
            WRAPPED[wrapper]((name,))
        return
    assert name in Levels(WRAPPED[wrapper]((name,)))
    own = {
        "LearnedStart": {"lower_start"},
        "OverTasks": {"episodes", "part"},
        "FromModules": {"place"},
    }
    if name != "episodes":  # which the problem here always has
        assert (name in Levels(WRAPPED[wrapper](()))) == (name in own[wrapper])


@pytest.mark.parametrize(
    "name",
    sorted(OPTIONAL.keys() - {"prepare", "place", "part", "episodes", "lower_start", "export"}),
)
def test_a_learned_start_calls_each_method_with_the_x_of_the_problem_itself(name):
    given = {"x": X, "y": Y, "step": 0.3, "batch": torch.tensor([1.0, 2.0])}
    arguments = [given[argument] for argument in ARGUMENTS[name]]
    expected = METHODS[name](None, *arguments)
    ours = [STARTED if argument is X else argument for argument in arguments]
    got = Levels(LearnedStart(problem=toy(name))).get(name)(*ours)
    if name in ("hypergradient", "project_upper"):  # in the names of x and z
        rest = torch.zeros(2) if name == "hypergradient" else STARTED[f"{PREFIX}q"]
        expected = {**expected, f"{PREFIX}q": rest}
    assert got.keys() == expected.keys()
    for key, entry in expected.items():
        assert torch.equal(torch.as_tensor(got[key]), torch.as_tensor(entry))


def test_a_learned_start_exports_with_the_x_of_the_problem_itself():
    got, *rest = LearnedStart(problem=toy("export")).export(STARTED, Y, "folder", True)
    assert torch.equal(got, X["p"] * Y["q"])
    assert rest == ["folder", True]


def test_a_learned_start_projects_z_as_y_is_projected():
    moved = LearnedStart(problem=toy("project_lower")).project_upper(STARTED)
    assert torch.equal(moved[f"{PREFIX}q"], torch.tensor([7.0, 0.0]))
    assert torch.equal(moved["p"], X["p"])


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(
    "name", [n for n, a in ARGUMENTS.items() if "y" in a and n not in ("figures", "export")]
)
def test_tasks_take_each_method_task_by_task(name, batched):
    given = {"x": X, "y": TASKS, "step": 0.3, "batch": BATCHES}
    problem = OverTasks(problem=toy(name, "episodes"), num_tasks=3, batched=batched)
    got = Levels(problem).get(name)(*(given[argument] for argument in ARGUMENTS[name]))
    one_by_one = []
    for task in range(3):
        here = {**given, "y": part_of(TASKS, task), "batch": BATCHES[task]}
        one_by_one.append(METHODS[name](None, *(here[a] for a in ARGUMENTS[name])))
    for key in one_by_one[0]:
        entries = [torch.as_tensor(one[key]) for one in one_by_one]
        expected = torch.stack(entries).mean() if name == "evaluate" else torch.stack(entries)
        torch.testing.assert_close(torch.as_tensor(got[key]), expected)


def test_tasks_show_the_figures_of_the_first():
    got = OverTasks(problem=toy("figures", "episodes"), num_tasks=3).figures(X, TASKS)
    assert got == {"figure": (X["p"] * TASKS["q"][0]).sum()}


def test_modules_are_given_to_measures_as_to_losses():
    problem = from_modules(("evaluate",))
    assert problem.evaluate(X, Y) == METHODS["evaluate"](None, X, Y)
    with pytest.raises(ProblemError, match=r"'evalute' is not an optional method"):
        FromModules(None, None, None, None, None, None, {"evalute": None})


def test_the_start_of_a_lasso_keeps_its_proximal_map():
    plain, learned = Lasso(), LearnedStart(problem=Lasso())
    x, y = learned.init(Streams(0))
    own_x, _ = plain.init(Streams(0))
    for key, entry in plain.prox_lower(own_x, y, 0.3).items():
        assert torch.equal(learned.prox_lower(x, y, 0.3)[key], entry)
    assert Levels(learned).structure.restrictions == {"prox_lower"}
    for solver in (LBFGS(), Newton(), Gradient()):  # which would solve a problem without it
        with pytest.raises(ProblemError, match=r"has prox_lower, and \w+ would ignore it"):
            require_offers(solver, Levels(learned).structure)
    require_offers(Proximal(), Levels(learned).structure)


def test_restrictions_are_named_as_the_methods_they_come_from():
    assert Structure().restrictions == frozenset()
    for name in RESTRICTIONS:
        assert Levels(toy(name)).structure.restrictions == {name}
    assert Levels(toy("lower_map", "lower_diagonal")).structure.restrictions == frozenset()


@pytest.mark.untrusted("few lower steps, whatever they come to")
def test_a_lower_solution_stands_for_y_and_brings_path_pairs_and_batch():
    x = {"p": torch.tensor([0.3, -0.2], dtype=torch.float64)}
    y = {"q": torch.zeros(2, dtype=torch.float64)}
    batch = torch.tensor([1.5, 0.5], dtype=torch.float64)

    def upper(x, y, _):
        return (y["q"] - 1).square().sum()

    def lower(x, y, scale):
        return (scale * y["q"] - x["p"]).square().sum()

    steps = solve_lower(lower, x, y, solver=Gradient(steps=5), batch=batch, record=True)
    got = hypergradient(upper, lower, x, steps, estimator=Unroll())
    by_hand = {"p": x["p"].clone().requires_grad_()}
    q = y["q"].requires_grad_()
    for _ in range(5):
        (g,) = torch.autograd.grad(lower(by_hand, {"q": q}, batch), q, create_graph=True)
        q = q - 0.1 * g
    (expected,) = torch.autograd.grad(upper(by_hand, {"q": q}, None), by_hand["p"])
    torch.testing.assert_close(got.hypergradient["p"], expected, rtol=1e-12, atol=0)

    solved = solve_lower(lower, x, y, solver=LBFGS(), batch=batch)
    assert solved.pairs
    right = hypergradient(upper, lower, x, solved, estimator=Implicit()).hypergradient["p"]
    shine = hypergradient(upper, lower, x, solved, estimator=Shine(update="block"))
    torch.testing.assert_close(shine.hypergradient["p"], right, rtol=1e-5, atol=1e-8)
    # a batch that is given stands above that of the solution
    other = hypergradient(upper, lower, x, solved, estimator=Implicit(), lower_batch=2 * batch)
    assert not torch.allclose(other.hypergradient["p"], right)
    # the point alone has neither path nor pairs
    for estimator, lacks in ((Unroll(), "lower steps"), (Shine(), "pairs")):
        with pytest.raises(ProblemError, match=lacks):
            hypergradient(
                upper, lower, x, LowerSolution(solved.y, batch=batch), estimator=estimator
            )


def test_what_would_be_ignored_is_refused_from_python():
    box = BoxQP()
    x, y = box.init(Streams(0))
    structure = Levels(box).structure
    given = {
        "upper_batch": next(box.upper_batches(None)),
        "lower_batch": next(box.lower_batches(None)),
        "structure": structure,
    }
    losses = box.upper_loss, box.lower_loss
    with pytest.raises(
        ProblemError, match=re.escape("Implicit does not support project_lower and would ignore it")
    ):
        hypergradient(*losses, x, box.lower_solution(x), estimator=Implicit(), **given)
    free = hypergradient(*losses, x, box.lower_solution(x), estimator=FixedPoint(), **given)
    truth = box.hypergradient(x)
    assert tree.norm(tree.sub(free.hypergradient, truth)) <= 1e-6 * tree.norm(truth)
    with pytest.raises(ProblemError, match=r"has project_lower, and LBFGS would ignore it"):
        solve_lower(box.lower_loss, x, y, solver=LBFGS(), structure=structure)
