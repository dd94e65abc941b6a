"""CHiP's losses against numbers by hand, autograd, and planted errors."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from bilevel_problems.mllm_hft.preferences import (
    Preference,
    Response,
    changed_tokens,
    chip,
    chip_released,
    diffused,
    kept_signal,
    log_probabilities,
    sequence_kl,
)


def response(policy, reference, counted, changed) -> Response:
    as_numbers = (torch.tensor(v, dtype=torch.float64) for v in (policy, reference))
    return Response(*as_numbers, torch.tensor(counted), torch.tensor(changed))


def pairs() -> Preference:
    """One pair of three places: the first is the prompt, whose entries must not count.

    w: gains 1, 2 with the second changed        ℓ 3    weighted by 4: 1 + 8 = 9, mean 9/5
    l: gains −1, 0.5 with the first changed      ℓ −½   weighted by 4: −4 + ½ = −3½, mean −0.7
    w|noisy: gains 0.5, 0 with the second        ℓ ½    weighted by 4: ½
    """
    prompt, place = 9.0, [[False, True, True]]
    chosen = response([[prompt, -1.0, -1.0]], [[0.0, -2.0, -3.0]], place, [[True, False, True]])
    rejected = response([[prompt, -4.0, -1.0]], [[0.0, -3.0, -1.5]], place, [[True, True, False]])
    noisy = response([[prompt, -2.0, -3.0]], [[0.0, -2.5, -3.0]], place, [[True, False, True]])
    kl = (torch.tensor([value], dtype=torch.float64) for value in (0.3, 0.8))
    return Preference(chosen, rejected, noisy, *kl)


def minus_log_sigmoid(value: float) -> float:
    return math.log(1 + math.exp(-value))


def test_the_sum_of_four_terms_by_hand():
    visual = minus_log_sigmoid(0.1 * (3 - 0.5))
    answer = minus_log_sigmoid(0.1 * (3 + 0.5))
    segment = minus_log_sigmoid(0.1 * (1.8 + 0.7))
    token = 0.1 * (0.8 - 0.3)
    got = chip(pairs(), beta=0.1, segment=3.0, token=0.2, changed=4.0)
    assert float(got) == pytest.approx(visual + answer + 3 * segment + 0.2 * token, rel=1e-12)
    defaults = visual + answer + segment + 0.1 * token
    assert float(chip(pairs())) == pytest.approx(defaults, rel=1e-12)


def test_the_released_loss_by_hand():
    logit = (9 + 3.5) + (9 - 0.5) - 0.2 * (0.8 - 0.3)
    got = chip_released(pairs(), beta=0.1, token=0.2, changed=4.0)
    assert float(got) == pytest.approx(minus_log_sigmoid(0.1 * logit), rel=1e-12)
    defaults = minus_log_sigmoid(0.1 * ((9 + 3.5) + (9 - 0.5) - 0.1 * 0.5))
    assert float(chip_released(pairs())) == pytest.approx(defaults, rel=1e-12)


def test_the_token_term_falls_with_the_rejected_divergence_alone():
    """As in the released code: logit −= tok_beta (KL(l) − KL(w)), the loss −log σ(β logit)."""
    for loss in (chip, chip_released):
        at = replace(pairs(), rejected_kl=torch.tensor([0.8], dtype=torch.float64).requires_grad_())
        near = torch.tensor([0.3], dtype=torch.float64).requires_grad_()
        at = replace(at, chosen_kl=near)
        value = loss(at)
        (slope,) = torch.autograd.grad(value, at.rejected_kl, retain_graph=True)
        logit = (9 + 3.5) + (9 - 0.5) - 0.1 * (0.8 - 0.3)
        by_hand = {
            chip: 0.1 * 0.1,  # token · β
            chip_released: 0.1 * 0.1 / (1 + math.exp(0.1 * logit)),  # β tok_beta σ(−β logit)
        }
        assert float(slope) == pytest.approx(by_hand[loss], rel=1e-12)
        assert torch.autograd.grad(value, near, allow_unused=True) == (None,)


def test_a_policy_that_is_its_reference():
    """Every logit is 0: log 2 a sigmoid, whatever the weights."""
    same = {
        name: replace(side, policy=side.reference)
        for name, side in vars(pairs()).items()
        if isinstance(side, Response)
    }
    zero = torch.zeros(1, dtype=torch.float64)
    at = Preference(**same, chosen_kl=zero, rejected_kl=zero)
    assert float(chip(at, segment=2.0)) == pytest.approx(4 * math.log(2))
    assert float(chip_released(at)) == pytest.approx(math.log(2))


@pytest.mark.parametrize("loss", [chip, chip_released])
@pytest.mark.parametrize(
    "wrong",
    {
        "the prompt counts": lambda p: replace(
            p, chosen=replace(p.chosen, counted=torch.ones_like(p.chosen.counted))
        ),
        "the noisy picture is clean": lambda p: replace(p, noisy=p.chosen),
        "the divergences exchanged": lambda p: replace(
            p, chosen_kl=p.rejected_kl, rejected_kl=p.chosen_kl
        ),
        "no reference": lambda p: replace(
            p, chosen=replace(p.chosen, reference=torch.zeros_like(p.chosen.reference))
        ),
        "another segment": lambda p: replace(
            p, chosen=replace(p.chosen, changed=~p.chosen.changed)
        ),
    }.items(),
    ids=lambda item: item[0],
)
def test_planted_errors_change_the_value(loss, wrong):
    """Each by more than the tolerance of the calculations by hand."""
    _, plant = wrong
    assert abs(float(loss(plant(pairs())) - loss(pairs()))) > 1e-3


def toy() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Logits of a policy and a reference on two rows of three places, five words."""
    g = torch.Generator().manual_seed(0)
    policy, reference = (torch.randn(6, 3, 5, generator=g, dtype=torch.float64) for _ in range(2))
    ids = torch.randint(5, (6, 3), generator=g)
    counted = torch.tensor([[True, True, True], [False, True, True]] * 3)
    changed = torch.tensor([[False, True, False], [True, True, False]] * 3)
    return policy, reference, ids, counted, changed


def of_logits(logits: Tensor) -> Preference:
    """Rows 0–1 are w, 2–3 l, 4–5 w|noisy."""
    _, reference, ids, counted, changed = toy()
    policy, known = (log_probabilities(value, ids) for value in (logits, reference))
    sides = [
        Response(policy[rows], known[rows], counted[rows], changed[rows])
        for rows in (slice(0, 2), slice(2, 4), slice(4, 6))
    ]
    kl = sequence_kl(reference, logits, counted)
    return Preference(*sides, kl[:2], kl[2:4])


def test_log_probabilities_and_divergence_by_hand():
    half = torch.tensor([[[0.0, 0.0], [math.log(3.0), 0.0]]])
    assert log_probabilities(half, torch.tensor([[1, 0]])).exp().tolist() == [
        pytest.approx([0.5, 0.75])
    ]
    known = torch.zeros_like(half)
    expected = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    both = torch.tensor([[True, True]])
    assert sequence_kl(known, half, both).tolist() == pytest.approx([expected])
    assert sequence_kl(known, half, ~both).tolist() == [0.0]
    turned = float(sequence_kl(half, known, both))  # the divergence is not symmetric
    assert turned != pytest.approx(expected, rel=0.05)


def test_first_and_second_derivatives():
    """Without the terms that hold a stop-gradient the loss is a function like any other."""
    logits = toy()[0].requires_grad_()
    for loss in (chip, chip_released):
        assert gradcheck(lambda at, loss=loss: loss(of_logits(at), token=0.0), (logits,))
        assert gradgradcheck(lambda at, loss=loss: loss(of_logits(at), token=0.0), (logits,))


def test_the_gradient_leaves_out_the_preferred_divergence_and_nothing_else():
    logits = toy()[0].requires_grad_()
    constant = of_logits(logits).chosen_kl.detach()

    def with_constant(loss, at: Tensor) -> Tensor:
        return loss(replace(of_logits(at), chosen_kl=constant), token=0.7)

    for loss in (chip, chip_released):
        (got,) = torch.autograd.grad(loss(of_logits(logits), token=0.7), logits)
        assert gradcheck(lambda at, loss=loss: with_constant(loss, at), (logits,))
        (expected,) = torch.autograd.grad(with_constant(loss, logits), logits)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        assert not gradcheck(
            lambda at, loss=loss: loss(of_logits(at), token=0.7), (logits,), raise_exception=False
        )


def test_a_step_down_raises_the_preferred_and_lowers_the_rejected():
    logits = toy()[0].requires_grad_()
    for loss in (chip, chip_released):
        (slope,) = torch.autograd.grad(loss(of_logits(logits), token=0.0), logits)
        before, after = (of_logits(at) for at in (logits, logits - slope))
        assert (after.chosen.gain() > before.chosen.gain()).all()
        assert (after.rejected.gain() < before.rejected.gain()).all()
        assert (after.noisy.gain() < before.noisy.gain()).all()


def test_changed_tokens_are_outside_the_common_blocks():
    words = (
        ["one", "red", "circle", "and", "two", "blue", "squares"],
        ["one", "green", "circle", "and", "two", "squares"],
    )
    ids = {word: i for i, word in enumerate({*words[0], *words[1]})}
    chosen, rejected = changed_tokens(*([ids[word] for word in line] for line in words))
    assert [w for w, c in zip(words[0], chosen, strict=True) if c] == ["red", "blue"]
    assert [w for w, c in zip(words[1], rejected, strict=True) if c] == ["green"]
    assert changed_tokens([1, 2], [1, 2]) == ([False, False], [False, False])
    assert changed_tokens([], [7]) == ([], [True])


def test_noise_of_step_500():
    """ᾱ by the product of 501 factors, and the variance of what comes out."""
    product = 1.0
    for i in range(501):
        product *= 1 - (1e-5 + (5e-3 - 1e-5) / (1 + math.exp(6 - 12 * i / 999)))
    assert kept_signal(500) == pytest.approx(product, rel=1e-9)
    assert kept_signal(0) == pytest.approx(1 - 1e-5 - 4.99e-3 / (1 + math.exp(6)), rel=1e-9)
    assert kept_signal(999) < kept_signal(500) < kept_signal(0)
    g = torch.Generator().manual_seed(0)
    spread = torch.tensor([0.5, 4.0], dtype=torch.float64)
    clean, noise = (torch.randn(400, 50, 2, generator=g, dtype=torch.float64) for _ in range(2))
    noisy = diffused(spread * clean, noise, spread)
    # The variance stays; 20,000 draws: four standard errors are 4 · √(2 / 20,000) = 4 %.
    assert (noisy.var((0, 1)) / spread**2).tolist() == pytest.approx([1, 1], abs=0.04)
    correlation = (noisy * clean).mean((0, 1)) / spread
    assert correlation.tolist() == pytest.approx([product**0.5] * 2, abs=0.04)
