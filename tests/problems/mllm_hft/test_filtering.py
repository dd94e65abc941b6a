"""The pictures that a model of the clean ones finds likeliest stay, and batches are drawn from these alone."""

import pytest
import torch

from bilevel.errors import ProblemError, RecipeError
from bilevel.rng import Streams, stream
from bilevel_problems.mllm_hft import filtering, formulations
from bilevel_problems.mllm_hft.sources.mixture import Mixture
from bilevel_problems.mllm_hft.sources.shapes import Shapes
from tests.problems.mllm_hft.miniature import miniature, prepared

pytest.importorskip("transformers", reason="the model is transformers' own")
pytest.importorskip("peft", reason="LoRA goes through peft")

pytestmark = pytest.mark.usefixtures("cache")

MIXED = Mixture(parts={"true": Shapes(), "odd": Shapes(invented=1.0)}, clean=Shapes())


def test_batches_are_drawn_from_those_with_the_least_loss(monkeypatch):
    losses = torch.tensor([5.0, 1, 5, 1, 5, 1, 5, 1, 5, 5, 5, 2])
    monkeypatch.setattr(filtering, "_losses", lambda network, at, data, device: losses)
    problem = prepared(formulation="joint", source=MIXED, kept=5 / 12, lower_batch=4)
    train = problem._prepared.train
    assert train.drawn_from is not None
    assert train.drawn_from.tolist() == [1, 3, 5, 7, 11]
    batches, seen = problem.lower_batches(stream(0, "l")), set()
    for _ in range(8):
        batch = next(batches)
        for part in (batch["task"]["features"], batch["contrast"]["features"]):
            seen |= {
                (train.pictures.features == each).flatten(1).all(1).int().argmax().item()
                for each in part
            }
        assert "origin" not in batch["task"]  # likely pictures of one source may be few
    assert seen == {1, 3, 5, 7, 11}


def test_the_loss_of_a_picture_is_the_mean_over_its_answer_tokens():
    problem = prepared(formulation="task_only", source=MIXED)
    network, data = problem._prepared.loaded.network, problem._prepared.train
    _, y = problem.init(Streams(0))
    found = filtering._losses(network, y, data, torch.device("cpu"))
    for index in (0, 7):
        one = torch.tensor([index])
        batch = {**data.pictures.take(one), **data.dialogues.take(one)}
        expected = float(formulations.task(network, y, batch))
        assert float(found[index]) == pytest.approx(expected, rel=1e-5)
    assert found.std() > 1e-3  # control: they are not all alike


def test_the_filter_learns_from_clean_pictures_and_is_cached(monkeypatch):
    calls, losses = [], filtering._losses
    monkeypatch.setattr(filtering, "_losses", lambda *given: calls.append(given) or losses(*given))
    monkeypatch.setattr(filtering, "STEPS", 3)
    options = {"formulation": "task_only", "source": MIXED, "kept": 0.5, "warm_up_rate": 0.01}
    first, again = prepared(**options), prepared(**options)
    assert len(calls) == 1
    assert torch.equal(first._prepared.train.drawn_from, again._prepared.train.drawn_from)
    _, at, data, _ = calls[0]
    start = first.before()
    assert any(not torch.equal(value, start[name]) for name, value in at.items() if name in start)
    assert len(data.pictures) == 12  # all training pictures are judged


@pytest.mark.parametrize(
    "options",
    [{"formulation": "joint", "queue": 3}, {"formulation": "joint", "contrast_loss": "chip"}],
)
def test_what_draws_from_all_pictures_is_refused_beside_it(options):
    with pytest.raises(RecipeError, match="kept below 1 with a queue, or with a preference"):
        miniature(kept=0.5, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"formulation": "task_weighted"}, "and kept: 1"),
        (
            {"formulation": "task_only", "weights": {"odd": 2.0}},
            "training pictures come from one source",
        ),
    ],
)
def test_weights_of_sources_are_refused_beside_it(options, said):
    with pytest.raises(ProblemError, match=said):
        prepared(kept=0.5, source=MIXED, **options)
