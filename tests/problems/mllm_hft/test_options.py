"""Every option changes the lower loss or the variables of a formulation, or is refused under it."""

from __future__ import annotations

import copy
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from bilevel import tree
from bilevel.errors import RecipeError
from bilevel.rng import Streams, stream
from bilevel_problems.mllm_hft.formulations import FORMS
from bilevel_problems.mllm_hft.models.tiny import Tiny
from bilevel_problems.mllm_hft.options import OF_HACL, SOMETIMES, read
from bilevel_problems.mllm_hft.problem import HierarchicalFineTuning
from bilevel_problems.mllm_hft.sources.mixture import Mixture
from bilevel_problems.mllm_hft.sources.shapes import Shapes
from tests.problems.mllm_hft.miniature import miniature

pytest.importorskip("transformers", reason="the model is transformers' own")
pytest.importorskip("peft", reason="LoRA goes through peft")


@pytest.fixture(scope="module", autouse=True)
def one_model(tmp_path_factory):
    """One model for the module, copied wherever one is opened."""
    opened, kept = Tiny.open, []

    def copied(self, source, encoder, seed, device):
        if not kept:
            kept.append((yield from opened(self, source, encoder, seed, device)))
        return replace(kept[0], network=copy.deepcopy(kept[0].network))

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BILEVEL_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(Tiny, "open", copied)
        yield


OTHER: dict[str, Any] = {
    "contrast_loss": "chip",
    "negatives": "batch",
    "queue": 3,
    "heads": "hacl",
    "text_head": "residual",
    "contrast": 2.0,
    "anchor": 0.25,
    "learned": ("kinds",),
    "clean": 0.5,
    "weights": {"invented": 3.0},
}
"""Another value than the default."""
OF_DATA_AND_MODEL = {
    *("source", "encoder", "model", "seed", "train", "upper", "warm_up", "warm_up_rate"),
    *("contrast_first", "kept"),
    *("lower_batch", "upper_batch", "upper_turns", "formulation"),
}
"""What every formulation is made of: its data, the model that it begins at, F's batches."""
OF_MEASURES = {"test", "split", "questions", "generate_answers", "caption_tokens"}
SIZES = {"contrast_batch", "micro_batch"}
"""The first is ignored where there is no contrast, since recipes carry it along; the second changes
losses by rounding."""


def mixture() -> Mixture:
    return Mixture(parts={"true": Shapes(), "invented": Shapes(invented=1.0)}, clean=Shapes())


def outcome(formulation: str, **options: Any) -> tuple[set[str], tuple[int, ...], float]:
    """Names and sizes of the variables, and G at a point off the start."""
    problem = miniature(formulation=formulation, source=mixture(), **options)
    for _ in problem.prepare():
        pass
    x, y = problem.init(Streams(0))
    sizes = tuple(value.numel() for value in {**x, **y}.values())
    batch = next(problem.lower_batches(stream(0, "b")))
    away = tree.map(lambda value: value + 0.02 * torch.ones_like(value), y)
    return {*x, "|", *y}, sizes, float(problem.lower_loss(x, away, batch))


@pytest.fixture(scope="module")
def usual():
    found: dict[str, Any] = {}

    def of(formulation: str) -> Any:
        return found.setdefault(formulation, outcome(formulation))

    return of


@pytest.mark.parametrize("option", OTHER)
@pytest.mark.parametrize("formulation", FORMS)
def test_an_option_changes_something_or_is_refused(formulation, option, usual):
    changed = {option: OTHER[option]}
    if option in SOMETIMES - read(FORMS[formulation]):
        with pytest.raises(RecipeError, match=rf"{option} (with|names)"):
            miniature(formulation=formulation, **changed)
    else:
        assert outcome(formulation, **changed) != usual(formulation)


def test_every_option_is_accounted_for():
    names = {field.name for field in fields(HierarchicalFineTuning)}
    assert names == {*OTHER} | OF_DATA_AND_MODEL | OF_MEASURES | SIZES
    assert {*OTHER} == {*SOMETIMES, "weights"}


def test_the_same_settings_give_the_same_loss(usual):
    """Control: what changed above was the option."""
    assert outcome("two_variable") == usual("two_variable")


@pytest.mark.parametrize("option", sorted(OF_HACL))
@pytest.mark.parametrize("loss", ["chip", "chip_released"])
def test_options_of_hacl_are_refused_with_a_preference(loss, option):
    with pytest.raises(RecipeError, match=f"{option} with contrast_loss {loss}: .*hacl"):
        miniature(contrast_loss=loss, **{option: OTHER[option]})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"formulation": "weighted", "anchor": 3.0},
            "anchor with formulation weighted: .* use formulation two_variable or proximal",
        ),
        (
            {"formulation": "task_only", "queue": 4, "contrast_loss": "chip"},
            "with formulation task_only: .* use formulation two_variable or",
        ),
        ({"formulation": "simple", "clean": 0.5}, "clean .* use formulation task_only or joint"),
        ({"formulation": "weighted", "clean": 0.5}, "level does not see"),
        (
            {"formulation": "two_variable", "learned": ("lambda", "tau")},
            "learned names lambda, .* it has tau, kinds",
        ),
        (
            {"formulation": "weighted", "contrast_loss": "chip", "learned": ("tau",)},
            "learned names tau, .* it has lambda, kinds, sources",
        ),
    ],
)
def test_the_refusal_names_what_reads_it(options, said):
    with pytest.raises(RecipeError, match=said):
        miniature(**options)


def test_steps_of_the_contrast_read_what_the_contrast_does_before_the_task_alone():
    first: dict[str, Any] = {"formulation": "task_only", "contrast_first": 3}
    made = miniature(**first, heads="hacl", text_head="residual", queue=4, negatives="batch")
    assert made.heads == "hacl"
    assert miniature(**first, contrast_loss="chip").contrast_loss == "chip"
    for option in ("queue", "heads"):
        with pytest.raises(RecipeError, match=f"{option} with formulation task_only"):
            miniature(**{**first, "contrast_first": 0}, **{option: OTHER[option]})
        with pytest.raises(RecipeError, match=f"{option} with "):
            miniature(**first, contrast_loss="chip", **{option: OTHER[option]})
    with pytest.raises(RecipeError, match="contrast with formulation task_only"):
        miniature(**first, contrast=2.0)


@pytest.mark.parametrize("formulation", FORMS)
def test_a_size_is_carried_along(formulation):
    assert miniature(formulation=formulation, contrast_batch=7).contrast_batch == 7


@pytest.mark.parametrize("number", [3, 1, 0, -2])
def test_an_odd_number_of_questions_is_refused_under_its_own_name(number):
    """And by `validate`, before a model is loaded: half of them are answered yes."""
    with pytest.raises(RecipeError, match=r"\.questions = .*must be (a multiple of 2|≥ 2)"):
        miniature(questions=number)
    assert miniature(questions=4).questions == 4
