"""The problem as the engine sees it, in every formulation."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bilevel import tree
from bilevel.errors import ProblemError, RecipeError
from bilevel.events import Drawn, Evaluated, Finished, Progress, Stepped, Tabulated
from bilevel.rng import Streams, stream
from bilevel.run import engine
from bilevel_problems.mllm_hft import formulations
from bilevel_problems.mllm_hft.formulations import FORMS, project
from bilevel_problems.mllm_hft.losses import LOG_TAU_RANGE, Negatives
from bilevel_problems.mllm_hft.models.network import call
from bilevel_problems.mllm_hft.sources.mixture import Mixture
from bilevel_problems.mllm_hft.sources.photos import FOLDER
from bilevel_problems.mllm_hft.sources.shapes import Shapes
from tests.problems.mllm_hft.miniature import miniature, prepared, setup

pytest.importorskip("transformers", reason="the model is transformers' own")
pytest.importorskip("peft", reason="LoRA goes through peft")

pytestmark = pytest.mark.usefixtures("cache")

MIXED = Mixture(parts={"true": Shapes(), "odd": Shapes(pairing=1)}, clean=Shapes())


@pytest.mark.parametrize("formulation", FORMS)
def test_two_steps_of_the_engine(formulation):
    problem = prepared(formulation=formulation, source=MIXED)
    made = setup(problem)
    events = list(engine.run(made, engine.start(made)))
    steps = [event for event in events if isinstance(event, Stepped)]
    assert len(steps) == 2
    assert all(math.isfinite(event.upper_loss + event.lower_loss) for event in steps)
    moved = any(event.hypergradient_norm > 0 for event in steps)
    assert moved == bool(FORMS[formulation].upper)
    first, last = [event.metrics for event in events if isinstance(event, Evaluated)]
    assert first.keys() == last.keys()
    assert first["task_loss"] != last["task_loss"]
    groups = {name.split("/")[0] for name in first}
    assert {"pope_random", "pope_popular", "pope_adversarial", "chair", "gap"} <= groups
    drawn = {event.name: event.figure for event in events if isinstance(event, Drawn)}
    assert len(drawn["embeddings"].axes) == 4
    assert len(drawn["captions"].axes) == 2 * min(8, len(problem._prepared.evaluation.scenes))
    assert isinstance(events[-1], Finished)


def test_weights_of_sources_alone_are_refused_where_there_is_one_source():
    with pytest.raises(ProblemError, match=r"task_weighted learns weights of sources.*mixture"):
        prepared(formulation="task_weighted")


def test_preparing_reports_stages_and_the_language_models_accuracy(monkeypatch, tmp_path):
    monkeypatch.setenv("BILEVEL_CACHE", str(tmp_path))
    events = list(miniature().prepare())
    assert all(isinstance(event, Progress) for event in events)
    stages = {event.stage for event in events}
    assert {"vision encoder", "picture features", "language model", "projector"} <= stages
    assert any("held-out question accuracy" in event.note for event in events)
    again = list(miniature().prepare())
    assert not any(event.note.startswith("loss") for event in again)  # all from the cache


def test_before_prepare_it_says_so():
    with pytest.raises(ProblemError, match=r"prepare\(\)"):
        miniature().init(Streams(0))


def test_levels_hold_what_the_table_says():
    problem = prepared(formulation="two_variable")
    x, y = problem.init(Streams(0))
    assert {"log_tau", "kind_scores"} <= x.keys()
    assert all(".lora_" in name for name in x.keys() - {"log_tau", "kind_scores"})
    assert all(".lora_" not in name for name in y)
    x, y = prepared(formulation="joint").init(Streams(0))
    assert x == {}
    assert {"log_tau", "image_head.weight"} <= y.keys()


def test_the_lower_loss_of_two_variable_is_contrast_and_anchor():
    problem = prepared(formulation="two_variable", anchor=0.5)
    free = prepared(formulation="two_variable", anchor=0.0)
    x, y = problem.init(Streams(0))
    batch = next(problem.lower_batches(stream(0, "b")))
    assert set(batch) == {"contrast"}
    assert float(problem.lower_loss(x, y, batch)) == pytest.approx(
        float(free.lower_loss(x, y, batch))
    )
    away = tree.map(lambda value: value + 0.1, y)
    size = tree.size({n: v for n, v in y.items() if "projector" in n})
    anchored, loose = (float(p.lower_loss(x, away, batch)) for p in (problem, free))
    assert anchored - loose == pytest.approx(0.25 * 0.01 * size, rel=1e-3)


def test_the_anchor_of_proximal_is_an_upper_variable():
    problem = prepared(formulation="proximal", anchor=0.5)
    x, y = problem.init(Streams(0))
    learned = {n: v for n, v in x.items() if n.startswith("anchor.")}
    assert {n.removeprefix("anchor.") for n in learned} == {n for n in y if "projector" in n}
    held = prepared(formulation="two_variable", anchor=0.5)
    batch = next(problem.lower_batches(stream(0, "b")))
    away = tree.map(lambda value: value + 0.1, y)
    rest = {n: v for n, v in x.items() if n not in learned}
    assert float(problem.lower_loss(x, away, batch)) == float(held.lower_loss(rest, away, batch))
    leaf = {n: v.clone().requires_grad_() for n, v in learned.items()}
    loss = problem.lower_loss({**x, **leaf}, away, batch)
    found = torch.autograd.grad(loss, list(leaf.values()))
    for value in found:  # −μ (α − α_0) = −0.5 · 0.1
        torch.testing.assert_close(value, torch.full_like(value, -0.05))
    assert float(problem.upper_loss(x, y, next(problem.upper_batches(stream(0, "u"))))) > 0


def test_pairs_of_one_picture_are_masked_in_the_lower_loss():
    problem = prepared(formulation="two_variable")
    x, y = problem.init(Streams(0))
    batch = next(problem.lower_batches(stream(0, "b")))["contrast"]
    assert len(set(batch["picture"].tolist())) == len(batch["picture"])
    against = batch["against"]

    def loss(pairs, hallucinated) -> float:
        changed = {**batch, "against": Negatives(pairs, hallucinated)}
        return float(problem.lower_loss(x, y, {"contrast": changed}))

    none = torch.zeros_like(against.pairs)
    assert loss(none, against.hallucinated) < float(problem.lower_loss(x, y, {"contrast": batch}))
    with pytest.raises(ProblemError, match="no negative"):
        loss(none, torch.zeros_like(against.hallucinated))


def test_a_queue_holds_other_pictures_as_the_model_starts():
    """At the start the loss is that of fresh embeddings; afterwards the states are constants."""
    problem = prepared(formulation="weighted", queue=7)
    x, y = problem.init(Streams(0))
    batch = next(problem.lower_batches(stream(0, "b")))["contrast"]
    queue, train = batch["queue"], problem._prepared.train
    seen = [*batch["picture"].tolist(), *queue["picture"].tolist()]
    assert sorted(set(seen)) == sorted(seen)
    assert len(seen) == 4 + 7
    network = problem._prepared.loaded.network

    def embedded(at, index):
        lines = train.captions.take(index)
        image = call(network, at, "image", **train.pictures.take(index))
        text = call(network, at, "text", ids=lines["ids"][:, 0], mask=lines["mask"][:, 0])
        return image, text

    def heads(at):
        return [call(network, at, f"{s}_head", input=queue[s]) for s in ("image", "text")]

    for got, fresh in zip(heads(y), embedded(y, queue["picture"]), strict=True):
        torch.testing.assert_close(got, fresh, rtol=1e-5, atol=1e-6)
    moved = {n: v if "head" in n else v + 0.1 for n, v in y.items()}
    for got, start in zip(heads(moved), heads(y), strict=True):
        assert torch.equal(got, start)
    same = (
        train.captions.line[batch["picture"], 0][:, None]
        == train.captions.line[queue["picture"], 0]
    )
    assert torch.equal(batch["against"].queue, ~same)
    bare = {n: v for n, v in batch.items() if n != "queue"}
    losses = [
        float(formulations.contrast(network, {**problem._prepared.constants, **x, **y}, b))
        for b in (batch, bare)
    ]
    assert losses[0] > losses[1] + 0.1
    made = setup(problem)
    assert sum(isinstance(e, Stepped) for e in engine.run(made, engine.start(made))) == 2


@pytest.mark.parametrize("formulation", ["two_variable", "weighted"])
@pytest.mark.parametrize(("loss", "sigmoids"), [("chip", 3), ("chip_released", 1)])
def test_a_preference_in_the_place_of_the_contrast(formulation, loss, sigmoids):
    own = {"contrast": 1.0} if formulation == "weighted" else {"anchor": 0.0}
    problem = prepared(formulation=formulation, contrast_loss=loss, **own)
    x, y = problem.init(Streams(0))
    assert not {"log_tau", "image_head.weight", "text_head.weight"} & {*x, *y}
    assert "kind_scores" in x
    batch = next(problem.lower_batches(stream(0, "b")))
    network = problem._prepared.loaded.network
    at = {**problem._prepared.constants, **x, **y}
    value = float(formulations.preferred(network, at, batch["contrast"], loss))
    assert value == pytest.approx(sigmoids * math.log(2), rel=1e-5)  # the model is its reference
    scores = torch.arange(len(x["kind_scores"])).float()
    weights = (scores.softmax(0) * len(scores))[batch["contrast"]["kind"]]
    weighed = formulations.preferred(
        network, {**at, "kind_scores": scores}, batch["contrast"], loss
    )
    assert float(weighed) == pytest.approx(float(weights.mean()) * value, rel=1e-5)
    made = setup(problem)
    state = engine.start(made)
    steps = [event for event in engine.run(made, state) if isinstance(event, Stepped)]
    assert len(steps) == 2
    assert steps[0].lower_loss != steps[1].lower_loss
    told, _ = problem.place("cpu", torch.float32)
    assert "a lower gradient" in told.note


def test_negatives_of_the_whole_batch_and_hacls_heads():
    own = prepared(formulation="two_variable")
    whole = prepared(formulation="two_variable", negatives="batch")
    x, y = own.init(Streams(0))
    batches = [next(p.lower_batches(stream(0, "b"))) for p in (own, whole)]
    assert batches[1]["contrast"]["against"].hallucinated.ndim == 3
    assert float(whole.lower_loss(x, y, batches[1])) > float(own.lower_loss(x, y, batches[0]))
    narrow = prepared(formulation="two_variable", heads="hacl", negatives="batch")
    _, y = narrow.init(Streams(0))
    assert {y["image_head.weight"].shape, y["text_head.weight"].shape} == {(4, 16)}
    assert y["text_head.bias"].shape == (4,)
    made = setup(narrow)
    assert sum(isinstance(e, Stepped) for e in engine.run(made, engine.start(made))) == 2


def test_weighted_is_task_plus_lambda_times_contrast():
    problem = prepared(formulation="weighted", contrast=0.5)
    x, y = problem.init(Streams(0))
    batch = next(problem.lower_batches(stream(0, "b")))

    def loss(strength: float) -> float:
        changed = {**x, "log_lambda": torch.tensor(math.log(strength))}
        return float(problem.lower_loss(changed, y, batch))

    contrast = loss(2.0) - loss(1.0)
    assert contrast > 0
    assert loss(0.5) == pytest.approx(loss(1.0) - contrast / 2, rel=1e-5)
    joint = prepared(formulation="joint", contrast=0.5)
    at = {**y, "log_tau": x["log_tau"]}
    assert float(joint.lower_loss({}, at, batch)) == pytest.approx(loss(0.5), rel=1e-6)


def mixed(**options):
    source = Mixture(parts={"true": Shapes(), "invented": Shapes(invented=1.0)}, clean=Shapes())
    return prepared(source=source, **options)


def test_weighted_weighs_sources_and_sees_them_in_equal_numbers():
    """G is linear in the weights: Σ_s w_s (L_T,s + λ L_C,s), each term seen by switching to it."""
    problem = mixed(formulation="weighted", contrast_batch=4)
    x, y = problem.init(Streams(0))
    assert x["source_scores"].tolist() == [0.0, 0.0]
    batch = next(problem.lower_batches(stream(0, "b")))
    for part in ("task", "contrast"):
        assert torch.bincount(batch[part]["origin"]).tolist() == [2, 2]
    assert "origin" not in next(problem.upper_batches(stream(0, "u")))

    def loss(weights: list[float]) -> float:
        scores = torch.tensor(weights).log()
        return float(problem.lower_loss({**x, "source_scores": scores}, y, batch))

    one, other = loss([2 - 1e-6, 1e-6]), loss([1e-6, 2 - 1e-6])  # weights have the total 2
    assert loss([1.0, 1.0]) == pytest.approx((one + other) / 2, rel=1e-5)
    assert loss([1.5, 0.5]) == pytest.approx(0.75 * one + 0.25 * other, rel=1e-5)
    assert abs(one - other) > 1e-3
    joint = mixed(formulation="joint", contrast_batch=4)
    at = {**y, "log_tau": x["log_tau"]}
    assert float(joint.lower_loss({}, at, batch)) == pytest.approx(loss([1.0, 1.0]), rel=1e-6)
    measured = problem._learned({**x, **y})
    assert measured["learned/weight_true"] == measured["learned/weight_invented"] == 1.0


def test_weights_of_sources_are_given_by_name():
    problem = mixed(formulation="weighted", weights={"invented": 3.0})
    x, y = problem.init(Streams(0))
    measured = problem._learned({**x, **y})
    assert measured["learned/weight_invented"] == pytest.approx(1.5)
    assert measured["learned/weight_true"] == pytest.approx(0.5)
    with pytest.raises(ProblemError, match=r"names web; .* come from true, invented"):
        mixed(formulation="joint", weights={"web": 2.0})


def test_what_is_not_learned_stays_as_it_begins():
    problem = mixed(formulation="weighted", learned=("sources",))
    x, y = problem.init(Streams(0))
    assert x.keys() == {"source_scores"}
    every = mixed(formulation="weighted")
    more, _ = every.init(Streams(0))
    assert more.keys() == {"log_lambda", "log_tau", "kind_scores", "source_scores"}
    batch = next(problem.lower_batches(stream(0, "b")))
    fixed = float(problem.lower_loss(x, y, batch))
    assert fixed == float(every.lower_loss(more, y, batch))
    assert fixed != float(every.lower_loss({**more, "log_lambda": torch.tensor(0.0)}, y, batch))


def test_one_source_has_no_weights():
    problem = prepared(formulation="weighted")
    x, _ = problem.init(Streams(0))
    assert x.keys() == {"log_lambda", "log_tau", "kind_scores"}


def test_upper_and_lower_levels_see_different_pictures():
    problem = prepared(formulation="weighted")
    upper = next(problem.upper_batches(stream(0, "u")))["features"]
    train = problem._prepared.train.pictures.features
    assert not any(torch.equal(picture, other) for picture in upper for other in train)
    lower = next(problem.lower_batches(stream(0, "l")))["contrast"]["features"]
    assert all(any(torch.equal(picture, other) for other in train) for picture in lower)


def test_batches_are_a_function_of_their_stream():
    problem = prepared(formulation="joint")

    def draw(seed: int):
        batches = problem.lower_batches(stream(seed, "l"))
        return [next(batches) for _ in range(2)]

    first, again, other = draw(0), draw(0), draw(1)
    assert torch.equal(first[1]["task"]["ids"], again[1]["task"]["ids"])
    assert not torch.equal(first[0]["task"]["features"], first[1]["task"]["features"])
    assert not torch.equal(first[0]["task"]["features"], other[0]["task"]["features"])


def test_the_clean_share_comes_from_upper_data_and_is_for_baselines():
    problem = prepared(formulation="task_only", clean=0.5)
    batch = next(problem.lower_batches(stream(0, "l")))["task"]
    upper = problem._prepared.upper.pictures.features
    clean = [any(torch.equal(picture, other) for other in upper) for picture in batch["features"]]
    assert clean == [False, False, True, True]
    assert math.isfinite(
        float(problem.lower_loss({}, problem.init(Streams(0))[1], {"task": batch}))
    )
    with pytest.raises(RecipeError, match="does not see"):
        miniature(formulation="weighted", clean=0.5)


def test_losses_are_pure():
    problem = prepared(formulation="weighted")
    x, y = problem.init(Streams(0))
    batch = next(problem.lower_batches(stream(0, "l")))
    before = tree.clone({**x, **y})
    first = float(problem.lower_loss(x, y, batch))
    problem.lower_loss(x, tree.map(lambda value: value + 1, y), batch)
    assert float(problem.lower_loss(x, y, batch)) == first
    assert all(torch.equal(value, before[name]) for name, value in {**x, **y}.items())


def test_projection_holds_the_scalars():
    far = {
        "log_tau": torch.tensor(3.0),
        "log_lambda": torch.tensor(-99.0),
        "kind_scores": torch.tensor([50.0, 40.0, 45.0]),
        "other": torch.tensor(7.0),
    }
    got = project(far)
    assert float(got["log_tau"]) == pytest.approx(LOG_TAU_RANGE[1])
    assert float(got["log_lambda"]) == pytest.approx(math.log(1e-3))
    weights = got["kind_scores"].exp()
    assert float(weights.max() / weights.min()) == pytest.approx(10.0, rel=1e-5)
    assert float(got["other"]) == 7.0
    sources = project({"source_scores": torch.tensor([50.0, 40.0])})["source_scores"].exp()
    assert float(sources.max() / sources.min()) == pytest.approx(100.0, rel=1e-5)
    near = {"kind_scores": torch.tensor([0.3, -0.1, -0.2])}
    torch.testing.assert_close(project(near)["kind_scores"], near["kind_scores"])


def test_a_saved_checkpoint_runs_two_steps(checkpoint):
    from bilevel_problems.mllm_hft.models.checkpoint import Checkpoint

    template = "USER: <image>\n{prompt} ASSISTANT:"
    model = Checkpoint(path=checkpoint, template=template, rank=2, embedding=8)
    problem = prepared(encoder=None, model=model)
    made = setup(problem)
    events = list(engine.run(made, engine.start(made)))
    assert sum(isinstance(event, Stepped) for event in events) == 2


SMALL = [
    "problem.train=12",
    "problem.upper=8",
    "problem.test=8",
    "problem.questions=2",
    "problem.warm_up=2",
    "problem.lower_batch=4",
    "problem.contrast_batch=4",
    "problem.upper_batch=4",
    "problem.model.hidden=16",
    "problem.model.layers=1",
    "problem.model.steps=2",
    "problem.model.batch=4",
    "problem.model.scenes=8",
    "lower.steps=1",
    "upper.steps=2",
]


@pytest.mark.parametrize("name", ["mllm_hft", "mllm_hft_photos"])
def test_shipped_recipes_run_for_two_steps(name):
    """As shipped but for sizes; the encoders are the recipes' own kinds."""
    from bilevel import recipe
    from bilevel.recipe.assemble import assemble

    if name.endswith("photos"):
        if not Path(FOLDER).is_dir():
            pytest.skip("needs the photographs: apt-get install tuxpaint-stamps-default")
        pytest.importorskip("efficientnet_lite_pytorch", reason="ImageNet weights of the encoder")
        small = SMALL
    else:
        small = [*SMALL, "problem.encoder.steps=2", "problem.encoder.scenes=16"]
    path = Path(__file__).parents[3] / "recipes" / f"{name}.yaml"
    made = assemble(recipe.load(path, small))
    prepared_events = list(engine.prepare(made))
    assert prepared_events
    events = list(engine.run(made, engine.start(made)))
    assert sum(isinstance(event, Stepped) for event in events) == 2
    before, after = [event.metrics for event in events if isinstance(event, Evaluated)]
    assert before["task_loss"] != after["task_loss"]


@pytest.mark.parametrize("options", [{}, {"queue": 5}, {"contrast_loss": "chip"}])
def test_a_resumed_run_is_the_run_that_was_not_stopped(options):
    made = setup(prepared(formulation="weighted", **options), steps=3)
    whole = engine.start(made)
    list(engine.run(made, whole))
    first = engine.start(made)
    for event in engine.run(made, first):
        if isinstance(event, Stepped) and event.step == 1:
            saved = copy.deepcopy(first.save())
            break
    second = engine.restore(made, saved)
    list(engine.run(made, second))
    for name, value in whole.y.items():
        assert torch.equal(value, second.y[name]), name
    assert any(not torch.equal(value, saved["y"][name]) for name, value in whole.y.items())


def test_files_on_disk_and_a_checkpoint_run_two_steps(checkpoint, tmp_path):
    """POPE's questions about COCO's pictures, training captions from LLaVA's layout."""
    from bilevel_problems.mllm_hft.models.checkpoint import Checkpoint
    from bilevel_problems.mllm_hft.sources.by_split import BySplit
    from bilevel_problems.mllm_hft.sources.coco import Coco
    from bilevel_problems.mllm_hft.sources.llava import Llava
    from bilevel_problems.mllm_hft.sources.pope import Pope
    from tests.problems.mllm_hft.sources import layouts

    files = layouts.coco(
        tmp_path / "coco",
        {i: [18 if i % 2 else 17] for i in range(1, 7)},
        {i: ["one red dog ." if i % 2 else "two cats ."] for i in range(1, 7)},
    )
    asked = [(i, "dog", "yes" if i % 2 else "no") for i in range(1, 5)]
    talk = [
        (str(i), f"{i}.png", ["describe the picture", "one dog , two cats ."]) for i in range(6)
    ]
    source = BySplit(
        train=Llava(path=layouts.llava(tmp_path / "llava", talk)),
        upper=Coco(**layouts.coco(tmp_path / "upper", {9: [3], 8: [1]}, {9: ["a car ."]})),
        test=Pope(popular=layouts.pope(tmp_path / "p.json", asked), about=Coco(**files)),
    )
    template = "USER: <image>\n{prompt} ASSISTANT:"
    model = Checkpoint(path=checkpoint, template=template, rank=2, embedding=8)
    problem = prepared(encoder=None, model=model, source=source, generate_answers=True)
    made = setup(problem)
    events = list(engine.run(made, engine.start(made)))
    measured = [event.metrics for event in events if isinstance(event, Evaluated)][-1]
    assert {"pope_popular/accuracy", "pope_popular/parsed_accuracy"} <= measured.keys()
    assert measured["pope_popular/blind_accuracy"] <= 0.5  # the name says nothing here
    assert "chair/chair_i" in measured
    assert not any(name.startswith("pope_random") for name in measured)
    tables = {event.name: event.rows for event in events if isinstance(event, Tabulated)}
    assert {name: len(rows) for name, rows in tables.items()} == dict.fromkeys(
        ("questions", "captions", "pictures"), 4
    )


def test_two_runs_are_compared_in_pairs_by_their_rows(tmp_path):
    """Rows give the measures again, and the bootstrap of docs/mllm_data.md their difference."""
    from bilevel.sinks.rows import RowFiles

    accuracy = {}
    for name, seed in (("a", 0), ("b", 1)):
        made = setup(prepared(formulation="weighted"), steps=1)
        receiver = RowFiles().open(tmp_path / name, None)
        for event in engine.run(made, engine.start(replace(made, seed=seed))):
            receiver.receive(event)
            if isinstance(event, Evaluated):
                accuracy[name] = event.metrics["pope_random/accuracy"]
        assert event.step == 1
        assert (tmp_path / name / "rows" / "start" / "captions.jsonl").is_file()
    page = (Path(__file__).parents[3] / "docs" / "mllm_data.md").read_text(encoding="utf-8")
    (block,) = [
        b for b in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "accuracy_gain" in b
    ]
    names: dict = {}
    exec(block, names)
    a, b = tmp_path / "a", tmp_path / "b"
    right = names["right_answers"](a, "pope_random")
    assert sum(map(sum, right.values())) / sum(map(len, right.values())) == accuracy["a"]
    gain, low, high = names["accuracy_gain"](b, a, "pope_random")
    assert gain == pytest.approx(accuracy["b"] - accuracy["a"])
    assert low <= gain <= high
    assert names["accuracy_gain"](a, a, "pope_random") == (0, 0, 0)


def test_what_is_pretrained_on_scenes_refuses_files(tmp_path):
    from bilevel_problems.mllm_hft.sources.jsonl import Jsonl

    with pytest.raises(ProblemError, match=r"model tiny is pretrained .* use model checkpoint"):
        list(miniature(source=Jsonl(path=str(tmp_path / "unread.jsonl"))).prepare())


def test_models_stand_side_by_side_in_one_projection():
    problem = prepared()
    before = problem.before()
    other = {name: 1.5 * value + 0.1 for name, value in before.items()}
    found = problem.side_by_side({"before": before, "again": before, "other": other})
    planes = found["embeddings"].axes[:3]
    assert [axis.get_title().strip() for axis in planes] == ["before", "again", "other"]
    clouds = [
        torch.cat([torch.as_tensor(dots.get_offsets()) for dots in axis.collections])
        for axis in planes
    ]
    assert torch.equal(clouds[0], clouds[1])
    assert not torch.allclose(clouds[0], clouds[2])
