"""The interval covers as often as it says, on simulated data with a known effect and with none; verdicts follow it."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from bilevel.studying import statistics
from bilevel.studying.statistics import Answers, Interval, ends, interval, verdict

STUDIES = 300


def studies(effect, seeds, units, *, between, within, shift=0.0):
    """[study] of (values, resampled): differences of a mean, each seed with its own effect and its own units."""
    generator = np.random.default_rng(7)
    for _ in range(STUDIES):
        own = effect + between * generator.standard_normal(seeds)
        cases = own[:, None] + within * generator.standard_normal((seeds, units)) + shift
        picked = generator.integers(units, size=(seeds, 150, units))
        yield cases.mean(1), [row[drawn].mean(1) for row, drawn in zip(cases, picked, strict=True)]


def covered(effect, found):
    return np.mean([each.low <= effect <= each.high for each in found])


@pytest.fixture(autouse=True)
def fewer_draws(monkeypatch):
    monkeypatch.setattr(statistics, "DRAWS", 1500)


@pytest.mark.parametrize("effect", [0.0, 0.03])
@pytest.mark.parametrize("seeds", [5, 10])
def test_the_interval_covers_the_effect(effect, seeds):
    """0.95 within three standard errors of 300 studies; wider is allowed, as units count twice."""
    cases = studies(effect, seeds, 40, between=0.02, within=0.05)
    found = [interval(values, resampled) for values, resampled in cases]
    assert covered(effect, found) >= 0.95 - 3 * (0.95 * 0.05 / STUDIES) ** 0.5
    assert covered(effect + 0.1, found) < 0.05  # control: another effect is not covered


def test_units_alone_would_be_too_narrow_and_plain_percentiles_of_few_seeds_too(monkeypatch):
    """Controls of the coverage above: the two mistakes that the interval is made against."""
    cases = list(studies(0.0, 5, 40, between=0.02, within=0.05))
    units = [np.quantile(np.mean(resampled, 0), [0.025, 0.975]) for _, resampled in cases]
    assert np.mean([low <= 0 <= high for low, high in units]) < 0.75
    monkeypatch.setattr(statistics, "ends", lambda n: (0.025, 0.975))
    plain = [interval(values) for values, _ in cases]
    assert covered(0.0, plain) < 0.91


def test_seeds_alone_cover_too():
    found = [interval(values) for values, _ in studies(0.0, 10, 40, between=0.02, within=0.05)]
    assert 0.95 + 3 * 0.0126 >= covered(0.0, found) >= 0.95 - 3 * 0.0126


def test_pairing_takes_out_what_arms_share():
    """Seeds that are hard for both arms widen a difference of means, and not the mean of differences."""
    generator = np.random.default_rng(3)
    hard = 0.1 * generator.standard_normal(10)
    one = hard + 0.02 + 0.005 * generator.standard_normal(10)
    other = hard + 0.005 * generator.standard_normal(10)
    paired, apart = interval(one - other), interval(one - generator.permutation(other))
    assert paired.low is not None
    assert paired.high is not None
    assert apart.low is not None
    assert 0.0 < paired.low < 0.02 < paired.high < 0.03
    assert apart.low < 0


@pytest.mark.parametrize(
    ("low", "high", "maximize", "said"),
    [
        (0.011, 0.03, True, "win"),
        (0.001, 0.03, True, "win"),
        (0.001, 0.03, False, "loss"),
        (-0.03, -0.001, True, "loss"),
        (-0.03, -0.001, False, "win"),
        (-0.004, 0.009, True, "tie"),
        (0.002, 0.009, True, "tie"),  # different, and by less than matters
        (-0.004, 0.011, True, "undecided"),
        (None, None, True, "undecided"),
    ],
)
def test_verdicts(low, high, maximize, said):
    assert verdict(Interval(0.0, low, high, 5), 0.01, maximize) == said


def test_verdicts_of_simulated_studies_err_as_often_as_the_level_says():
    """With no effect and much data: ties, and hardly a win; with a large one: wins."""
    none = [
        verdict(interval(*each), 0.01, True)
        for each in studies(0.0, 10, 40, between=0.004, within=0.02)
    ]
    large = [
        verdict(interval(*each), 0.01, True)
        for each in studies(0.0, 10, 40, between=0.004, within=0.02, shift=0.03)
    ]
    assert none.count("tie") > 0.9 * STUDIES
    assert none.count("win") + none.count("loss") < 0.05 * STUDIES
    assert large.count("win") > 0.99 * STUDIES


def test_ends_are_those_of_the_published_formula():
    """n = 10: t_9 at 2.5 % is −2.262157, times √(10/9) = −2.384512, of which Φ is 0.008551."""
    assert ends(10)[0] == pytest.approx(0.008551, abs=2e-6)
    assert ends(10)[1] == pytest.approx(1 - 0.008551, abs=2e-6)
    assert ends(100_000)[0] == pytest.approx(0.025, abs=1e-5)


def test_fewer_than_three_seeds_have_no_interval():
    assert interval([1.0, 3.0]) == Interval(2.0, None, None, 2)
    assert interval([1.0, 2.0, 3.0]).low is not None
    assert np.isnan(interval([]).mean)


def test_the_same_numbers_give_the_same_interval():
    assert interval([1.0, 2.0, 4.0]) == interval([1.0, 2.0, 4.0])


def drawn_answers(ties=False):
    generator = np.random.default_rng(5)
    label = generator.random(60) < 0.5
    score = generator.standard_normal(60) + label
    return Answers(np.arange(60) // 2, score.round(0) if ties else score, label)


@pytest.mark.parametrize("ties", [False, True])
def test_the_measure_is_the_area_under_the_weighted_curve(ties):
    found = drawn_answers(ties)
    weights = np.random.default_rng(6).integers(0, 3, size=(4, 60)).astype(float)
    expected = [roc_auc_score(found.label, found.score, sample_weight=row) for row in weights]
    np.testing.assert_allclose(found.measure(weights), expected, rtol=1e-12)
    plain = Answers(found.unit, found.score, None)
    means = [np.average(found.score, weights=row) for row in weights]
    np.testing.assert_allclose(plain.measure(weights), means, rtol=1e-12)


def test_units_are_drawn_whole_and_alike_for_every_arm(monkeypatch):
    found = drawn_answers()
    other = Answers(found.unit, found.score + 1, found.label)
    one, two = (each.resampled(50, np.random.default_rng(1)) for each in (found, other))
    np.testing.assert_array_equal(
        one, two
    )  # a shift changes no order: the same pictures were drawn
    seen = []
    monkeypatch.setattr(Answers, "measure", lambda self, w: seen.append(w) or np.zeros(len(w)))
    found.resampled(20, np.random.default_rng(2))
    (weights,) = seen
    np.testing.assert_array_equal(weights[:, ::2], weights[:, 1::2])
    assert (weights.sum(1) == 60).all()
    assert len(np.unique(weights[:, ::2].sum(1))) == 1
