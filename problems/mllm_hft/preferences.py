"""CHiP's preference losses: a true caption is preferred to a hallucinated one, and so is its picture.

Fu et al., CHiP: Cross-modal Hierarchical Direct Preference Optimization for Multimodal LLMs,
ICLR 2025, arXiv:2501.16629, on direct preference optimization (Rafailov et al., 2023,
arXiv:2305.18290), with the sequential divergence of Zeng et al., ICML 2024, arXiv:2404.11999.

π is the policy, ref the model that it began as, w the preferred and l the rejected response to one
picture, w|noisy the preferred one to a noisy picture. ℓ(y) = Σ_t (log π(y_t) − log ref(y_t)) over
the counted tokens, and KL(y) = Σ_t KL(ref(·|y_<t) ‖ π(·|y_<t)). In two losses:

`chip`           the sum of a visual, a response, a segment and a token term
`chip_released`  the released code: all of them inside one sigmoid

They differ in the segment weights too: the mean over tokens where changed ones weigh more, and the
plain sum of weighted tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from .losses import mean

BETA = 0.1
CHANGED = 4.0
"""What a token of a changed segment weighs; an unchanged one weighs 1."""
TOKEN = 0.1
NOISE_STEP, NOISE_STEPS = 500, 1000


@dataclass(frozen=True)
class Response:
    """Log-probabilities of one response a pair, token by token."""

    policy: Float[Tensor, "pair token"]
    reference: Float[Tensor, "pair token"]
    """Of the model that the policy began as: constants, computed once."""
    counted: Bool[Tensor, "pair token"]
    """The tokens of the response; its prompt and padding are not."""
    changed: Bool[Tensor, "pair token"]
    """The tokens in which the preferred and the rejected response differ."""

    def gain(self, changed: float = 1.0) -> Float[Tensor, "pair"]:
        """Σ_t m_t (log π(y_t) − log ref(y_t)), where m_t is `changed` for a changed token, else 1."""
        return (self._weights(changed) * (self.policy - self.reference)).sum(1)

    def mean_gain(self, changed: float) -> Float[Tensor, "pair"]:
        """The same over Σ_t m_t: what a token gains on average."""
        return self.gain(changed) / self._weights(changed).sum(1)

    def _weights(self, changed: float) -> Float[Tensor, "pair token"]:
        each = torch.where(self.changed, changed, 1.0).to(self.policy)
        return each.masked_fill(~self.counted, 0.0)


@dataclass(frozen=True)
class Preference:
    """What both losses are computed from, of a batch of pairs."""

    chosen: Response
    rejected: Response
    noisy: Response
    """The preferred response, given the noisy picture; `changed` and `counted` as in `chosen`."""
    chosen_kl: Float[Tensor, "pair"]
    rejected_kl: Float[Tensor, "pair"]


def chip(
    pairs: Preference,
    *,
    beta: float = BETA,
    segment: float = 1.0,
    token: float = TOKEN,
    changed: float = CHANGED,
    weights: Float[Tensor, "pair"] | None = None,
) -> Float[Tensor, ""]:
    """The mean over pairs of L_v + L_r + segment · L_s + token · L_k, each times its weight if given.

    σ is the logistic function.

    L_v = −log σ(β (ℓ(w) − ℓ(w|noisy)))
    L_r = −log σ(β (ℓ(w) − ℓ(l)))
    L_s = −log σ(β (ℓ̄(w) − ℓ̄(l)))   ℓ̄ the mean over tokens, changed ones of weight `changed`
    L_k = β (KL(l) − sg KL(w))        sg: no gradient, so that KL(w) is a constant offset

    L_k has the sign of the released code's logit, and of Zeng et al.: the policy stays near the
    reference along the rejected response. That sign and the weights `segment` and `token` were
    compared with the code alone (`token` is its tok_beta), not with the formulas of the paper. Three
    forwards with gradient (w, l, w|noisy; KL is of the same logits).
    """
    logits = {
        "visual": pairs.chosen.gain() - pairs.noisy.gain(),
        "response": pairs.chosen.gain() - pairs.rejected.gain(),
        "segment": pairs.chosen.mean_gain(changed) - pairs.rejected.mean_gain(changed),
    }
    terms = {name: -logsigmoid(beta * value) for name, value in logits.items()}
    kept = beta * (pairs.rejected_kl - pairs.chosen_kl.detach())
    each = terms["visual"] + terms["response"] + segment * terms["segment"] + token * kept
    return mean(each, weights)


def chip_released(
    pairs: Preference,
    *,
    beta: float = BETA,
    token: float = TOKEN,
    changed: float = CHANGED,
    weights: Float[Tensor, "pair"] | None = None,
) -> Float[Tensor, ""]:
    """−log σ(β [ℓ(w) − ℓ(l) + ℓ(w) − ℓ(w|noisy) − token (KL(l) − sg KL(w))]), mean over pairs.

    Every ℓ is a sum in which a changed token weighs `changed`; KL is not weighed. Signs, weights and
    defaults are those of `LLAVADPOTrainer.chip_loss` and scripts/chip.sh of LVUGAI/CHiP. It differs
    from them in

    1. the noisy picture's reference: there Σ_t log ref(y_t|noisy), already summed over the tokens, is
       multiplied by Σ_t m_t; here each token has its weight, so that π = ref has the logit 0;
    2. the changed tokens: there a common run of fewer than three tokens is changed as well, and what
       one response has and the other lacks in the same place is not (`changed_tokens`).

    The gradient leaves out that of KL(w), which the value depends on: it is not the gradient of this
    loss, and a second derivative is that of neither.
    """
    chosen = pairs.chosen.gain(changed)
    text = chosen - pairs.rejected.gain(changed)
    visual = chosen - pairs.noisy.gain(changed)
    kept = pairs.rejected_kl - pairs.chosen_kl.detach()
    return mean(-logsigmoid(beta * (text + visual - token * kept)), weights)


def log_probabilities(
    logits: Float[Tensor, "row token word"], ids: Int[Tensor, "row token"]
) -> Float[Tensor, "row token"]:
    """log p(ids[:, j]) by logits[:, j], as `Network.logits` gives them."""
    return logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def sequence_kl(
    reference: Float[Tensor, "row token word"],
    logits: Float[Tensor, "row token word"],
    counted: Bool[Tensor, "row token"],
) -> Float[Tensor, "row"]:
    """Σ_t KL(ref_t ‖ π_t) over the counted tokens, from the logits of both."""
    known, policy = reference.log_softmax(-1), logits.log_softmax(-1)
    return ((known.exp() * (known - policy)).sum(-1) * counted).sum(1)


def changed_tokens(chosen: Sequence[int], rejected: Sequence[int]) -> tuple[list[bool], list[bool]]:
    """Which tokens of either response are outside the blocks that both have in common."""
    marks = [True] * len(chosen), [True] * len(rejected)
    for block in SequenceMatcher(None, chosen, rejected, autojunk=False).get_matching_blocks():
        for side, start in zip(marks, (block.a, block.b), strict=True):
            side[start : start + block.size] = [False] * block.size
    return marks


def kept_signal(step: int = NOISE_STEP) -> float:
    """ᾱ after `step` of 1,000 steps of forward diffusion: the share of the variance that is signal.

    β_i = 10⁻⁵ + (5·10⁻³ − 10⁻⁵) σ(z_i), z evenly from −6 to 6: the schedule of visual contrastive
    decoding (Leng et al., CVPR 2024, arXiv:2311.16922), whose noise CHiP's released code takes.
    """
    z = torch.linspace(-6, 6, NOISE_STEPS, dtype=torch.float64)
    rates = 1e-5 + (5e-3 - 1e-5) * z.sigmoid()
    return math.exp(float((-rates[: step + 1]).log1p().sum()))


def diffused(
    features: Float[Tensor, "row place feature"],
    noise: Float[Tensor, "row place feature"],
    spread: Float[Tensor, "feature"],
    step: int = NOISE_STEP,
) -> Float[Tensor, "row place feature"]:
    """√ᾱ x + √(1 − ᾱ) · spread · noise: the noisy picture, where pictures are cached as features.

    CHiP puts noise into pixels, which then pass the vision tower; here it goes into what the tower
    gave. `spread`, the standard deviation of each feature over the data, makes signal and noise as
    large to each other as they are in pixels of unit variance; `noise` is standard normal.
    """
    kept = kept_signal(step)
    return kept**0.5 * features + (1 - kept) ** 0.5 * spread * noise
