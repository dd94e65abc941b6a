"""A run from Python: the numbers of a recipe's, what it returns, and how it stops."""

import subprocess
import sys

import numpy
import pytest
import torch

import bilevel
from bilevel import recipe as recipes
from bilevel.errors import ConvergenceError, RecipeError, RequirementError
from bilevel.estimators import Implicit, Unroll
from bilevel.events import Finished, Started, Stepped
from bilevel.linear import CG
from bilevel.lower import LBFGS, Gradient, Newton
from bilevel.optimizers import SGD, Adam
from bilevel.recipe.assemble import assemble
from bilevel.run import Setup, Upper, engine
from bilevel.run.targets import EarlyStop
from tests.run.setups import EXACT, Plain


def test_it_takes_the_steps_that_it_says():
    # x − 0.25 · 2 (x − 1) halves the distance to 1: 3, 2, 1.5, 1.25
    result = bilevel.minimize(Plain(), steps=3, **EXACT)
    assert result.x["x"].item() == pytest.approx(1.25, rel=1e-6)
    assert result.y["y"].item() == pytest.approx(1.5, rel=1e-6)
    assert [e.upper_loss for e in result.history] == pytest.approx([4.0, 1.0, 0.25])
    columns = result.columns()
    assert columns["hypergradient_norm"] == pytest.approx([4.0, 2.0, 1.0])
    assert columns["step"] == [1, 2, 3]
    assert {len(column) for column in columns.values()} == {3}
    assert (result.reason, dict(result.metrics), result.warned) == ("done", {}, ())


def test_its_numbers_are_those_of_the_recipe():
    recipe = recipes.loads("problem: quadratic", ["upper.steps=4", "seed=3", "evaluate.every=2"])
    setup = assemble(recipe)
    state = engine.start(setup)
    expected = [e for e in engine.run(setup, state) if isinstance(e, Stepped)]
    result = bilevel.minimize("quadratic", steps=4, seed=3, evaluate_every=2)
    assert [e.upper_loss for e in result.history] == [e.upper_loss for e in expected]
    assert all(torch.equal(result.x[name], entry) for name, entry in state.x.items())
    assert [e.step for e in result.evaluations] == [0, 2, 4]
    assert result.metrics == result.evaluations[-1].metrics


def test_components_are_taken_by_name_by_mapping_and_as_they_are():
    named = bilevel.iterate(
        {"name": "quadratic", "num_upper": 3},
        estimator={"name": "implicit", "solver": {"name": "cg", "iterations": 7}},
        lower="lbfgs",
        upper={"name": "adam", "lr": 0.3},
        dtype="float64",
    ).setup
    assert named.estimator == Implicit(solver=CG(iterations=7))
    assert isinstance(named.lower, LBFGS)
    assert named.upper == Upper(optimizer=Adam(lr=0.3))
    assert named.name == "quadratic"
    assert (named.problem.num_upper, named.dtype) == (3, torch.float64)
    preset = bilevel.iterate("quadratic", estimator="soba", upper=Upper(steps=7)).setup
    assert type(preset.estimator).__name__ == "SingleLoop"
    assert preset.upper.steps == 7
    assert bilevel.iterate("quadratic", upper=Upper(steps=7), steps=9).setup.upper.steps == 9
    setup = Setup("quadratic", "newton", Upper(), "unroll")
    assert (type(setup.lower), type(setup.estimator)) == (Newton, Unroll)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"estimator": "implicitt"}, RecipeError, r"estimator: 'implicitt': .* mean 'implicit'"),
        ({"estimator": Implicit}, RecipeError, r"Implicit, a class; .* instance: Implicit\(…\)"),
        ({"estimator": None}, RecipeError, "estimator = null; expected an instance, a name"),
        ({"lower": 3}, RecipeError, "lower = 3; expected an instance, a name .augm"),
        ({"upper": SGD}, RecipeError, "upper = SGD, a class"),
        ({"upper": {"name": "sgd", "rl": 1.0}}, RecipeError, "upper.rl: unknown key. .*lr"),
        (
            {"lower": CG()},
            RecipeError,
            r"lower = CG\(.*; CG is none of lower .* lacks init, offers",
        ),
        ({"upper": 3}, RecipeError, "upper = 3; expected an instance, a name"),
        ({"steps": 0}, RecipeError, "^steps = 0; must be > 0$"),
        ({"steps": True}, RecipeError, "^steps = True; must be an integer$"),
        ({"seed": "a"}, RecipeError, "^seed = 'a'; must be an integer ≥ 0$"),
        ({"seed": -1}, RecipeError, "^seed = -1; must be an integer ≥ 0$"),
        ({"seed": True}, RecipeError, "^seed = True; must be an integer ≥ 0$"),
        ({"evaluate_every": -1}, RecipeError, "^evaluate_every = -1; must be ≥ 0$"),
        ({"evaluate_every": "a"}, RecipeError, "^evaluate_every = 'a'; must be an integer$"),
        ({"evaluate_held": 2}, RecipeError, "^evaluate_held = 2; must be True or False$"),
        ({"dtype": "float16"}, RecipeError, "^dtype = 'float16'; must be 'float32', 'float64' or"),
        ({"dtype": torch.int32}, RecipeError, "^dtype = 'int32'; must be 'float32', 'float64' or"),
        ({"autocast": "float16"}, RecipeError, "^autocast = 'float16'; float16 overflows"),
        ({"compile": True}, RecipeError, "^compile = True; must be 'off', 'step' or 'inductor'$"),
        (
            {"device": "gpu"},
            RecipeError,
            "^device = 'gpu'; must be auto, cpu, cuda, cuda:N or mps$",
        ),
        ({"device": torch.device("meta")}, RecipeError, "^device = 'meta'; must be auto, cpu, "),
        ({"stop": EarlyStop}, RecipeError, "stop = EarlyStop, a class; expected an instance"),
        ({"best": 3}, RecipeError, "best = 3; must be a mapping of options"),
        ({"progress": "yes"}, RecipeError, "^progress = 'yes'; must be True, False or 'auto'$"),
        ({"device": "cuda:99"}, RequirementError, "device = 'cuda:99', but torch"),
        ({"stepps": 3}, TypeError, "stepps"),
    ],
)
def test_a_wrong_argument_is_named(options, error, words):
    with pytest.raises(error, match=words):
        bilevel.minimize("quadratic", **options)


def test_all_wrong_arguments_are_said_at_once_and_nothing_is_computed():
    class Untouched(Plain):
        def __getattribute__(self, name):
            raise AssertionError(name)

    problem = Untouched()
    with pytest.raises(RecipeError) as caught:
        bilevel.iterate(problem, seed=-1, device="gpu", steps=0)
    assert str(caught.value).splitlines() == [
        "3 errors",
        "  seed = -1; must be an integer ≥ 0",
        "  device = 'gpu'; must be auto, cpu, cuda, cuda:N or mps",
        "  steps = 0; must be > 0",
    ]


@pytest.mark.parametrize(
    ("argument", "option"),
    [
        ("device", "runtime.device"),
        ("dtype", "runtime.dtype"),
        ("autocast", "runtime.autocast"),
        ("compile", "runtime.compile"),
        ("seed", "seed"),
        ("evaluate_every", "evaluate.every"),
    ],
)
def test_a_recipe_refuses_an_argument_in_the_same_words(argument, option):
    for value in (-1, "float16"):
        with pytest.raises(RecipeError) as python:
            bilevel.iterate("quadratic", **{argument: value})
        with pytest.raises(RecipeError) as recipe:
            recipes.loads("problem: quadratic", [f"{option}={value}"])
        assert str(python.value).partition("; ")[2] == str(recipe.value).partition("; ")[2] != ""


def test_a_set_up_by_hand_is_held_to_the_same():
    with pytest.raises(RecipeError, match="seed = 'a'; must be an integer ≥ 0"):
        Setup("quadratic", "newton", Upper(), "unroll", seed="a")


def test_a_device_a_dtype_and_an_integer_may_be_those_of_torch_and_numpy():
    given = {"device": torch.ones(1).device, "dtype": torch.float64, "seed": numpy.int64(3)}
    run = bilevel.iterate("quadratic", steps=numpy.int32(2), evaluate_every=numpy.int64(1), **given)
    assert (run.setup.device.type, run.setup.dtype, run.setup.seed) == ("cpu", torch.float64, 3)
    assert (run.setup.upper.steps, run.setup.evaluate_every) == (2, 1)
    assert type(run.setup.seed) is int  # whose text a stream is derived from


def test_iterating_gives_events_and_lets_x_be_read_between_them():
    run = bilevel.iterate(Plain(), steps=3, **EXACT)
    assert run.x == {}
    seen = [run.x["x"].item() for event in run if isinstance(event, Stepped)]
    assert seen == pytest.approx([2.0, 1.5, 1.25])
    assert run.result().reason == "done"
    kinds = [type(event) for event in bilevel.iterate(Plain(), steps=1, **EXACT)]
    assert (kinds[0], kinds[-1]) == (Started, Finished)


class Stops(Plain):
    def __init__(self, error, after):
        self.error, self.left = error, after

    def upper_batches(self, stream):
        for _ in range(self.left + 1):  # one more: losses are looked at before the first step
            yield None
        raise self.error


def test_an_interrupt_returns_the_steps_that_were_taken():
    with pytest.warns(UserWarning, match="interrupted after 2 of 9 steps"):
        result = bilevel.minimize(Stops(KeyboardInterrupt(), 1), steps=9, **EXACT)
    assert (result.reason, len(result.history)) == ("interrupted", 2)
    assert result.x["x"].item() == pytest.approx(1.5)
    with pytest.raises(KeyboardInterrupt):  # nothing to return
        bilevel.minimize(Stops(KeyboardInterrupt(), -1), steps=9, **EXACT)


def test_after_an_error_the_iteration_keeps_what_there_is():
    run = bilevel.iterate(Stops(ConvergenceError("far away"), 1), steps=9, **EXACT)
    with pytest.raises(ConvergenceError, match="far away"):
        list(run)
    assert len(run.result().history) == 2
    assert run.x["x"].item() == pytest.approx(1.5)


def test_a_warning_of_the_run_is_a_python_warning():
    indefinite = {"estimator": Implicit(damping=-0.0), "lower": Gradient(steps=1)}

    class Bent(Plain):
        def lower_loss(self, x, y, batch):
            return (y["y"] - x["x"]) ** 2 - 2 * y["y"] ** 2

    with pytest.warns(UserWarning, match="step 1: .*not positive definite"):
        result = bilevel.minimize(Bent(), steps=1, upper=SGD(lr=0.1), **indefinite)
    assert "curvature" in [event.kind for event in result.warned]


def test_a_script_that_is_no_terminal_prints_nothing_unless_asked():
    code = "import bilevel; bilevel.minimize('quadratic', steps=3, progress={})"
    for wanted, lines in (("'auto'", 0), ("False", 0), ("True", 4)):
        result = subprocess.run(
            [sys.executable, "-c", code.format(wanted)], capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout == ""
        assert len(result.stderr.splitlines()) == lines
    assert result.stderr.splitlines()[-1].startswith("step 3/3  F ")
