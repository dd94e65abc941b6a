"""Components: options by name, from the class itself and from classes of users."""

import copy
import inspect
import pickle
import traceback
from dataclasses import replace
from typing import Annotated

import pydantic
import pytest
import torch
from pydantic import Field

from bilevel import registry
from bilevel.components import component
from bilevel.errors import RENAMED, RecipeError
from bilevel.estimators import Implicit
from bilevel.linear.cg import CG
from bilevel.lower import Gradient
from bilevel.optimizers.differentiable import SGD, Adam
from bilevel.optimizers.torch_optim import TorchOptimizer
from bilevel.registry.build import build
from bilevel.run.targets import Best, EarlyStop

REGISTERED = [(group, name) for group in registry.groups() for name in registry.names(group)]


@pytest.mark.parametrize(("group", "name"), REGISTERED, ids=lambda part: part)
def test_every_registered_component_takes_its_options_by_name(group, name):
    cls = registry.find(group, name)
    kinds = {p.kind for p in inspect.signature(cls).parameters.values()}
    assert kinds <= {inspect.Parameter.KEYWORD_ONLY}
    with pytest.raises(TypeError, match=rf"^{cls.__name__}\(0\.5\): options are given by name"):
        cls(0.5)


def test_the_refusal_says_which_options_take_the_value():
    with pytest.raises(TypeError) as caught:
        CG(50)
    hint = "write CG(iterations=50) or CG(tolerance=50)"
    assert str(caught.value) == f"CG(50): options are given by name; {hint}"
    with pytest.raises(TypeError, match=r"its options are iterations, tolerance$"):
        CG(20, 1e-3)
    with pytest.raises(TypeError, match=r"write Adam\(lr=0.1\) or Adam\(beta1=0.1\)"):
        Adam(0.1)


@component
class Mine:
    first: int = Field(default=1, ge=0)
    second: Annotated[int, Field(ge=0)] = 2
    third: float = Field(3.0)
    later: "Later | None" = None


@component
class Child(Mine):
    fourth: int = Field(default=4)


SEEN = []


@component
class Made:
    n: int = Field(default=1)

    def __new__(cls, **options):
        SEEN.append(options)
        return object.__new__(cls)


@component
class Bare:
    pass


def test_so_do_components_of_users():
    for cls in (Mine, Child, Made):
        with pytest.raises(TypeError, match="given by name"):
            cls(5)
    with pytest.raises(TypeError, match=r"Bare.5.: options are given by name; it has no options"):
        Bare(5)
    assert Made(n=3).n == 3
    assert SEEN[-1] == {"n": 3}
    assert (Child(fourth=7, first=3).first, Child(fourth=7).fourth) == (3, 7)


class Later:
    pass


def test_a_class_that_pydantic_completes_later_is_no_exception():
    pydantic.dataclasses.rebuild_dataclass(Mine, force=True)
    assert Mine(first=2, later=Later()).first == 2
    with pytest.raises(TypeError, match="given by name"):
        Mine(5)


def test_what_copies_a_component_is_not_disturbed():
    solver = CG(iterations=3)
    assert copy.deepcopy(solver) == copy.copy(solver) == pickle.loads(pickle.dumps(solver))
    assert pydantic.TypeAdapter(SGD).validate_python({"lr": 0.5}, strict=False) == SGD(lr=0.5)


@pytest.mark.parametrize("requires_grad", [True, False])
def test_a_tensor_is_not_cut_to_a_number(requires_grad):
    lr = torch.tensor(0.5, requires_grad=requires_grad)
    with pytest.raises(
        TypeError, match=r"^SGD\(lr=…\) must be a number, got a tensor .* lr=tensor.item"
    ):
        SGD(lr=lr)
    with pytest.raises(TypeError, match=r"^CG\(iterations=…\) must be a number, got a tensor"):
        CG(iterations=torch.tensor(3))
    assert SGD(lr=lr.item()).lr == 0.5
    message = r"options\['lr'\] is a tensor that requires grad"
    if requires_grad:
        with pytest.raises(ValueError, match=message):
            TorchOptimizer(optimizer="SGD", options={"lr": lr})
    else:
        TorchOptimizer(optimizer="SGD", options={"lr": lr})


def test_a_component_may_have_a_field_for_a_tensor():
    @component
    class Known:
        target: torch.Tensor
        size: float = 1.0

    assert Known(target=torch.ones(2)).target.tolist() == [1, 1]
    with pytest.raises(TypeError, match=r"Known\(size=…\)"):
        Known(target=torch.ones(2), size=torch.ones(()))


RENAMED_OF = [
    (name, old, new)
    for name in registry.names("estimators")
    for old, news in RENAMED.items()
    for new in news
    for known in [registry.find("estimators", name).__pydantic_fields__]
    if new in known and old not in known
]


def test_every_renamed_option_is_one_of_an_estimator():
    assert {old for _, old, _ in RENAMED_OF} == set(RENAMED)


@pytest.mark.parametrize(("name", "old", "new"), RENAMED_OF, ids=lambda part: part)
def test_an_old_option_is_answered_with_the_new_one(name, old, new):
    made = registry.find("estimators", name)
    with pytest.raises(TypeError, match=rf"'{old}': unknown option\. Did you mean '{new}'\?"):
        made(**{old: 1.0})
    with pytest.raises(RecipeError, match=rf"{old}: unknown key\. Did you mean '{new}'\?"):
        build("estimators", {"name": name, old: 1.0})


def test_an_unknown_option_is_answered_with_the_nearest_or_all():
    with pytest.raises(TypeError, match=r"CG\(iteration=…\): .*Did you mean 'iterations'\?"):
        CG(iteration=50)
    with pytest.raises(TypeError, match=r"unknown option\. Known: iterations, tolerance"):
        CG(xyz=50)
    assert CG(iterations=50).iterations == 50  # negative control


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Implicit(solver=CG), r"got the class CG: give solver=CG\(\)"),
        (lambda: Implicit(solver="cg"), r"got the string 'cg'.*bilevel ls linear"),
        (lambda: Implicit(preconditioner="jacobi"), r"got the string 'jacobi'.*ls preconditioners"),
    ],
)
def test_a_component_is_neither_its_class_nor_its_name(make, said):
    with pytest.raises(TypeError, match=said):
        make()
    # control: a component, and a string where one is an option
    assert Implicit(solver=CG(), curvature="hessian").curvature == "hessian"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SGD(lr=0.0), "SGD.lr = 0.0; must be > 0 or a Learned"),
        (lambda: Implicit(damping=-1), "Implicit.damping = -1; must be ≥ 0"),
        (lambda: CG(iterations=0), "CG.iterations = 0; must be > 0"),
        (lambda: CG(iterations=True), "CG.iterations = True; must be an integer"),
        (lambda: Gradient(optimizer=3), "Gradient.optimizer = 3; must be a component of type "),
        (lambda: Gradient(clip={"norm": 1.0}), "Gradient.clip = {'norm': 1.0}; must be a Clip"),
        (lambda: replace(SGD(), lr=-1.0), "SGD.lr = -1.0; must be > 0 or a Learned"),
        (lambda: SGD(nesterov=True), "SGD: nesterov needs momentum > 0"),
        (lambda: Best(mode="max"), "Best.measure: missing; there is no default"),
        (
            lambda: EarlyStop(measure="F", mode="up", patience=0),
            "2 errors\n  EarlyStop.mode = 'up'; must be 'max' or 'min'\n  EarlyStop.patience = 0; ",
        ),
        (lambda: Mine(first=-1), "Mine.first = -1; must be ≥ 0"),
        (
            lambda: Child(fourth="a", first=-1),
            "2 errors\n  Child.first = -1; must be ≥ 0\n  Child.",
        ),
    ],
)
def test_a_wrong_option_is_said_in_the_words_of_a_recipe(make, said):
    for _ in range(2):
        with pytest.raises(RecipeError) as caught:
            make()
        assert str(caught.value).startswith(said)
        assert "pydantic" not in "".join(traceback.format_exception(caught.value))


def test_a_recipe_says_where_and_in_its_own_words():
    spec = {"name": "gradient", "optimizer": {"name": "sgd", "lr": 0.0}, "clip": 3}
    with pytest.raises(RecipeError) as caught:
        build("lower", spec, "lower")
    assert str(caught.value).splitlines() == [
        "2 errors",
        "  lower.optimizer.lr = 0.0; must be > 0 or a mapping of Learned's options",
        "  lower.clip = 3; must be a mapping of Clip's options",
    ]
