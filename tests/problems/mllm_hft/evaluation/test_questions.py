"""Questions are balanced and truly answered, and each strategy asks what it says it asks."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from bilevel.errors import ProblemError
from bilevel.rng import stream
from bilevel_problems.mllm_hft.evaluation.questions import (
    STRATEGIES,
    cooccurrence,
    questions,
)
from bilevel_problems.mllm_hft.sources.protocol import Scene, Thing
from bilevel_problems.mllm_hft.sources.shapes import PAIRS, Shapes

SOURCE = Shapes()
NAMES = SOURCE.vocabulary
PARTNER = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}
TRAIN = SOURCE.scenes(2000, biased=True, generator=stream(0, "train"))
TEST = SOURCE.scenes(1000, biased=False, generator=stream(0, "test"))
TOGETHER = cooccurrence(TRAIN, NAMES)


def ask(strategy, *, per_scene=4, scenes=TEST, together=TOGETHER, seed=0):
    return questions(
        scenes,
        strategy=strategy,
        vocabulary=NAMES,
        per_scene=per_scene,
        generator=stream(seed, "ask"),
        cooccurrence=together,
    )


def scene(*names):
    return Scene(tuple(Thing(name, "red", 0.5, 0.5) for name in names), "", {})


@pytest.mark.parametrize("per_scene", [2, 6])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_answers_are_true_and_as_many_yes_as_no_in_every_scene(strategy, per_scene):
    asked = ask(strategy, per_scene=per_scene)
    balance = Counter()
    for question in asked:
        assert question.answer == (question.name in TEST[question.scene].names)
        assert question.text in (f"is there a {question.name} ?", f"is there an {question.name} ?")
        balance[question.scene] += 1 if question.answer else -1
    assert set(balance) == set(range(len(TEST)))
    assert not any(balance.values())
    assert len({(q.scene, q.name) for q in asked}) == len(asked)
    sizes = [min(per_scene // 2, len(s.names)) for s in TEST]
    assert len(asked) == 2 * sum(sizes)


def test_cooccurrence_counts_scenes():
    vocabulary = ("a", "b", "c")
    counted = cooccurrence([scene("a", "b", "b"), scene("b"), scene("c", "b")], vocabulary)
    assert counted.tolist() == [[1, 1, 0], [1, 3, 1], [0, 1, 1]]


def test_cooccurrence_finds_the_pairs_of_training_scenes_alone():
    def partners(together):
        found = together.clone().fill_diagonal_(0).argmax(1).tolist()
        return sum(NAMES[j] == PARTNER[NAMES[i]] for i, j in enumerate(found))

    assert partners(TOGETHER) == len(NAMES)
    assert partners(cooccurrence(TEST, NAMES)) < len(NAMES) / 2  # negative control


def test_popular_asks_the_most_frequent_absent_names():
    asked = [q for q in ask("popular") if not q.answer]
    for index, scene in enumerate(TEST):
        half = min(2, len(scene.names))
        expected = [name for name in NAMES if name not in scene.names][:half]
        assert [q.name for q in asked if q.scene == index] == expected


def test_adversarial_asks_the_name_that_stands_with_those_present():
    (yes, no) = ask("adversarial", per_scene=2, scenes=[scene("cross")])
    assert (yes.name, no.name) == ("cross", "circle")
    (_, no) = ask("adversarial", per_scene=2, scenes=[scene("cross", "circle")])
    assert no.name == "moon"  # the partner is there: the next most frequent company


def prior_fooled(asked):
    """How often a language prior (the partner is there) would say yes to what is not there."""
    wrong = [q for q in asked if not q.answer]
    return sum(PARTNER[q.name] in TEST[q.scene].names for q in wrong) / len(wrong)


def test_adversarial_questions_fool_the_prior_and_random_ones_do_not():
    assert prior_fooled(ask("adversarial", per_scene=2)) > 0.8
    assert prior_fooled(ask("random", per_scene=2)) < 0.4  # negative control


def test_random_asks_every_absent_name_alike():
    counts = Counter(q.name for q in ask("random", per_scene=2) if not q.answer)
    expected = len(TEST) / len(NAMES)
    assert all(abs(counts[name] - expected) < 4 * expected**0.5 for name in NAMES)
    popular = Counter(q.name for q in ask("popular", per_scene=2) if not q.answer)
    assert max(popular.values()) > expected + 4 * expected**0.5  # negative control


def test_questions_about_files_are_put_as_pope_puts_them_and_as_the_source_asks():
    names = ("kite", "hour", "uniform", "skis")
    there = Scene((), "", {}, objects=frozenset(names[:2]), ask="{question} Answer in a word.")

    def asked(scene):
        found = questions(
            [scene], strategy="popular", vocabulary=names, per_scene=4, generator=stream(0, "a")
        )
        return {q.name: q.text for q in found}

    assert asked(there) == {
        "kite": "Is there a kite in the image? Answer in a word.",
        "hour": "Is there an hour in the image? Answer in a word.",
        "uniform": "Is there a uniform in the image? Answer in a word.",
        "skis": "Are there skis in the image? Answer in a word.",
    }
    drawn = replace(there, ask=None)  # negative control: the closed language
    assert asked(drawn)["kite"] == "is there a kite ?"


def test_questions_are_pure_in_the_generator():
    assert ask("random") == ask("random")
    assert ask("random") != ask("random", seed=1)


@pytest.mark.parametrize("per_scene", [0, 1, 3, -2])
def test_an_unbalanced_number_is_refused(per_scene):
    with pytest.raises(ProblemError, match="even"):
        ask("random", per_scene=per_scene)


@pytest.mark.parametrize("together", [None, torch.zeros(2, 2)])
def test_adversarial_without_its_counts_is_refused(together):
    with pytest.raises(ProblemError, match="cooccurrence"):
        ask("adversarial", together=together)
    assert ask("popular", together=together)  # who needs none is asked for none


def test_an_unknown_strategy_is_refused():
    with pytest.raises(ProblemError, match="adversarial"):
        ask("hard")
