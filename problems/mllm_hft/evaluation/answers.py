"""Measures of yes/no answers: POPE, AMBER's discriminative part, and what a blind rule scores.

POPE: Li et al., EMNLP 2023, arXiv:2305.10355. AMBER: Wang et al., 2023, arXiv:2311.07397.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bilevel.errors import ConvergenceError, ProblemError

Metrics = dict[str, float]
_WORD = re.compile(r"[a-z]+(?:'t)?")
_SENTENCE_END = re.compile(r"[.\n!]")
_NO = frozenset({"no", "not", "none", "cannot", "nope"})
_NOT = re.compile(
    r"[a-z]+n't|(?:is|are|was|were|do|does|did|has|have|had|wo|would|ca|could|should)nt"
)
_YES = frozenset({"yes", "yeah", "yep"})
_REFUSES = re.compile(
    r"\b(?:can(?:not|'t|t|\snot)|couldn't|could\snot|unable\sto|not\sable\sto|(?:im|not\s)possible\sto)\s"
    r"(?:\w+\s)?(?:tell|say|determine|answer|help|assist|know|confirm|be\s(?:sure|certain))\b"
    r"|\b(?:do|did)(?:n't|nt|\snot)\sknow\b|\bno\sidea\b"
    r"|\bnot\s(?:entirely\s|quite\s|very\s|really\s|so\s)?(?:sure|certain|clear)\b"
)
"""An answer that it cannot be told: neither yes nor no."""


def pope(scores: Float[Tensor, "question"], answers: Bool[Tensor, "question"]) -> Metrics:
    """Yes/no answers, yes where score > 0; "yes" is the positive class.

    accuracy (TP + TN) / n; precision TP / (TP + FP); recall TP / (TP + FN); F1 their harmonic
    mean; yes-ratio (TP + FP) / n; AUC of the score, which does not move with the yes-ratio.
    A fraction 0 / 0 is 0, so where nothing is asked all are 0 and AUC is 0.5; ±∞ is an answer.

    Raises:
        ConvergenceError: a score is NaN, which is neither yes nor no.
        ProblemError: as many scores as answers are needed.
    """
    if scores.shape != answers.shape or scores.dim() != 1:
        raise ProblemError(
            f"pope: scores of shape {tuple(scores.shape)} and answers of shape "
            f"{tuple(answers.shape)}; must be one score and one answer a question"
        )
    refuse_nan("pope", scores, "scores")
    said, answers = scores > 0, answers.bool()
    found = _confusion(said, answers)
    return {**found, "auc": auc(scores[answers], scores[~answers])}


def pope_parsed(said: Sequence[str], answers: Bool[Tensor, "question"]) -> Metrics:
    """POPE's measures of generated answers, read by `parse_answer`.

    As in the published script an answer that says neither, a refusal too, is a yes; `unparsed` is
    the share of these. There is no AUC: a text has no score.
    """
    if len(said) != len(answers):
        raise ProblemError(f"pope: {len(said)} texts for {len(answers)} questions")
    read = [parse_answer(text) for text in said]
    yes = torch.tensor([answer is not False for answer in read], dtype=torch.bool)
    unparsed = share(sum(answer is None for answer in read), len(read))
    return {**_confusion(yes, answers.bool()), "unparsed": unparsed}


def parse_answer(text: str) -> bool | None:
    """What the first sentence of a generated answer says: yes, no, or neither (None).

    No where it holds "no", "not", "none" or a verb with "n't", else yes where it holds "yes". Neither
    where it says that it cannot tell ("I can't tell", "I'm not sure"), unless it begins with yes or no. Case and
    punctuation do not matter, nor does a number before the answer ("1. No").
    """
    plain = text.lower().replace("\u2019", "'")
    sentence = next((part for part in _SENTENCE_END.split(plain) if _WORD.search(part)), "")
    words = _WORD.findall(sentence)
    told = _REFUSES.sub("", " ".join(words)).split()
    if len(told) < len(words):  # it refuses: what it begins with is its answer, if anything is
        words = [word for word in words[:1] if word in _YES | {"no", "nope"}]
    if any(word in _NO or _NOT.fullmatch(word) for word in words):
        return False
    return True if _YES.intersection(words) else None


def blind(
    names: Sequence[str],
    answers: Bool[Tensor, "question"],
    pictures: Sequence[int],
    folds: int = 5,
) -> Metrics:
    """What a rule scores that sees the asked name and no picture: the floor of a split.

    The rule answers as most other questions about that name are answered, and where there is none
    or a tie, as most questions are (yes if that is a tie, too). It is cross-validated: pictures
    go to `folds` folds in turn, and a fold is answered by a rule that was fitted on the others.
    `blind_auc` is that of the share of yes, (yes + ½) / (asked + 1).
    """
    if not len(names) == len(answers) == len(pictures):
        raise ProblemError(
            f"blind: {len(names)} names, {len(answers)} answers and {len(pictures)} pictures; "
            "must be one of each a question"
        )
    order = {picture: place for place, picture in enumerate(dict.fromkeys(pictures))}
    fold = [order[picture] % folds for picture in pictures]
    truth = answers.tolist()
    scores = torch.zeros(len(names), dtype=torch.float64)
    said = torch.zeros(len(names), dtype=torch.bool)
    for held_out in set(fold):
        asked: Counter[str] = Counter()
        yes: Counter[str] = Counter()
        for name, answer, own in zip(names, truth, fold, strict=True):
            if own != held_out:
                asked[name] += 1
                yes[name] += answer
        usual = 2 * yes.total() >= asked.total()
        for i, name in enumerate(names):
            if fold[i] == held_out:
                excess = 2 * yes[name] - asked[name]
                said[i] = excess > 0 or (excess == 0 and usual)
                scores[i] = (yes[name] + 0.5) / (asked[name] + 1)
    right = float((said == answers.bool()).double().sum())
    truths = answers.bool()
    return {
        "blind_accuracy": share(right, len(names)),
        "blind_auc": auc(scores[truths], scores[~truths]),
    }


def amber_discriminative(
    said: Bool[Tensor, "question"], answers: Bool[Tensor, "question"]
) -> Metrics:
    """AMBER's accuracy, precision, recall and F1: "no" is the positive class there.

    What is asked for is mostly not in the picture, so that precision says how many refusals were
    right and recall how many lures were refused. A fraction 0 / 0 is 0.
    """
    if said.shape != answers.shape:
        raise ProblemError(f"amber: {len(said)} answers given for {len(answers)} questions")
    found = _confusion(~said.bool(), ~answers.bool())
    return {name: found[name] for name in ("accuracy", "precision", "recall", "f1")}


def auc(positive: Float[Tensor, "p"], negative: Float[Tensor, "n"]) -> float:
    """P(positive > negative) + P(equal) / 2 over all pairs: the area under the ROC curve.

    0.5, what chance gives, where one side is empty. By ranks: O(n log n). Raises
    `ConvergenceError` where a score is NaN.
    """
    refuse_nan("auc", torch.cat([positive, negative]), "scores")
    if not len(positive) or not len(negative):
        return 0.5
    _, places, counts = torch.cat([positive, negative]).unique(
        return_inverse=True, return_counts=True
    )
    ends = counts.cumsum(0).double()
    ranks = ends - (counts.double() - 1) / 2
    total = ranks[places[: len(positive)]].sum()
    p, n = len(positive), len(negative)
    return float((total - p * (p + 1) / 2) / (p * n))


def refuse_nan(measure: str, values: Tensor, what: str) -> None:
    """Raises `ConvergenceError` that says how many of the values are NaN."""
    if bad := int(values.isnan().sum()):
        raise ConvergenceError(
            f"{measure}: {bad} of {values.numel()} {what} are NaN; the model's weights or its "
            "arithmetic overflowed: lower the step sizes, or compute in a wider dtype"
        )


def share(part: float, whole: float) -> float:
    """part / whole, and 0 / 0 is 0."""
    return part / whole if whole else 0.0


def _confusion(said: Bool[Tensor, "question"], answers: Bool[Tensor, "question"]) -> Metrics:
    n = len(answers)
    hits = float((said & answers).sum())
    precision, recall = share(hits, float(said.sum())), share(hits, float(answers.sum()))
    return {
        "accuracy": share(float((said == answers).sum()), n),
        "precision": precision,
        "recall": recall,
        "f1": share(2 * precision * recall, precision + recall),
        "yes_ratio": share(float(said.sum()), n),
    }
