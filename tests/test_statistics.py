"""Statistics: against scipy and analytic cases, planted effects, invariances, one clear error a mistake."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from scipy import stats

from fvlm.core import ConfigError, InputError, NonFiniteError, ShapeError, numpy_generator
from fvlm.evidence.statistics import (
    holm,
    minimum_detectable_effect,
    paired_bootstrap,
    runs_needed,
    sign_flip_test,
    smallest_p_value,
    spread,
)


def draw(*stream):
    return numpy_generator(0, "test_statistics", *stream)


def errors(seeds, clips, *stream):
    return draw("errors", *stream).gamma(4.0, 0.25, size=(seeds, clips))


# spread --------------------------------------------------------------------------------------------------------------


def test_spread_recovers_planted_components():
    g = draw("components")
    found = [spread(0.5 + 0.3 * g.standard_normal((8, 1)) + 0.2 * g.standard_normal((1, 50)) + 0.1 * g.standard_normal((8, 50))) for _ in range(200)]
    for name, truth in (("mean", 0.5), ("seed", 0.3), ("clip", 0.2), ("cell", 0.1)):
        values = np.array([getattr(x, name) for x in found])
        if name != "mean":
            values = values**2
            truth **= 2
        assert values.mean() == pytest.approx(truth, abs=4 * values.std() / math.sqrt(200))


def test_standard_error_is_the_true_one_on_average():
    g = draw("error")
    tables = [0.3 * g.standard_normal((6, 1)) + 0.2 * g.standard_normal((1, 9)) + 0.5 * g.standard_normal((6, 9)) for _ in range(600)]
    truth = 0.3**2 / 6 + 0.2**2 / 9 + 0.5**2 / 54
    assert np.mean([spread(x).standard_error ** 2 for x in tables]) == pytest.approx(truth, rel=0.12)
    assert np.var([x.mean() for x in tables]) == pytest.approx(truth, rel=0.25)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_one_source_alone_is_students_interval(axis, confidence):
    x = draw("student").normal(size=12)
    student = stats.ttest_1samp(x, 0).confidence_interval(confidence)
    noise = spread(x[:, None] if axis == 0 else x[None])
    assert noise.mean - noise.half_width(confidence) == pytest.approx(student.low)
    assert noise.standard_error == pytest.approx(stats.sem(x))
    assert (noise.clip if axis == 0 else noise.seed) is None and noise.cell == 0


# the interval ----------------------------------------------------------------------------------------------------------


def test_one_seed_equals_scipy_bca():
    d = draw("bca").lognormal(0, 1, 40)
    ours = paired_bootstrap(d, np.zeros(40), small_sample=False, resamples=40_000)
    theirs = stats.bootstrap((d,), np.mean, n_resamples=40_000, method="BCa", rng=1, vectorized=True, batch=4000).confidence_interval
    width = theirs.high - theirs.low
    assert abs(ours.low - theirs.low) < 0.02 * width and abs(ours.high - theirs.high) < 0.03 * width
    assert ours.high - ours.estimate > 1.2 * (ours.estimate - ours.low)  # it follows the skew


def test_ratio_equals_scipy_bca():
    a, b = errors(1, 60, 1)[0], errors(1, 60, 2)[0]
    ours = paired_bootstrap(a, b, statistic="ratio", small_sample=False, resamples=40_000)
    theirs = stats.bootstrap((a, b), lambda x, y, axis: x.mean(axis) / y.mean(axis), paired=True, n_resamples=40_000, method="BCa", rng=1, vectorized=True, batch=4000).confidence_interval
    width = theirs.high - theirs.low
    assert abs(ours.low - theirs.low) < 0.03 * width and abs(ours.high - theirs.high) < 0.03 * width


@pytest.mark.parametrize("axis", [0, 1])
def test_gaussian_one_source_equals_student(axis):
    x = draw("gauss").normal(0.3, 1, size=(400, 1) if axis == 0 else (1, 400))
    ours, student = paired_bootstrap(x, np.zeros_like(x)), stats.ttest_1samp(x.ravel(), 0).confidence_interval()
    assert ours.low == pytest.approx(student.low, abs=0.006) and ours.high == pytest.approx(student.high, abs=0.006)


def test_crossed_resampling_is_crossed():
    from fvlm.evidence.statistics import _resampled_means

    g = draw("crossed")
    by_seed, by_clip = g.standard_normal((6, 1)), g.standard_normal((1, 10))
    (means,) = _resampled_means([by_seed + by_clip], 40_000, g)
    assert means.mean() == pytest.approx((by_seed + by_clip).mean(), abs=0.01)
    assert means.var() == pytest.approx(by_seed.var() / 6 + by_clip.var() / 10, rel=0.03)  # the plug-in variance of Owen (2007)


def test_blocks_of_resamples_do_not_bias(monkeypatch):
    wide = draw("wide").normal(size=(2, 90_000)) + 1.0
    interval = paired_bootstrap(wide, np.zeros((1, 90_000)), resamples=100)  # several blocks of 22 resamples
    assert interval.resamples == 100 and interval.low < interval.estimate < interval.high


def test_estimates_and_their_relations():
    a, b = errors(4, 30, 1), 1.5 * errors(4, 30, 2)
    difference, ratio, skill = (paired_bootstrap(a, b, statistic=s) for s in ("difference", "ratio", "skill"))
    assert difference.estimate == pytest.approx(a.mean() - b.mean())
    assert ratio.estimate == pytest.approx(a.mean() / b.mean())
    assert (skill.estimate, skill.low, skill.high) == pytest.approx((1 - ratio.estimate, 1 - ratio.high, 1 - ratio.low))
    assert (difference.null, ratio.null, skill.null) == (0, 1, 0)
    for x in (difference, ratio, skill):
        assert x.low < x.estimate < x.high and x.excludes(x.low - 1e-9) and not x.excludes(x.estimate)
    assert 0 < ratio.low and ratio.detectable < 1 and skill.detectable == pytest.approx(1 - ratio.detectable)
    assert difference.detectable == pytest.approx(minimum_detectable_effect(a - b))


def test_units_swaps_and_order():
    a, b = errors(5, 20, 1), errors(5, 20, 2)
    x = paired_bootstrap(a, b)
    scaled = paired_bootstrap(1000 * a, 1000 * b)
    assert (scaled.low, scaled.high) == pytest.approx((1000 * x.low, 1000 * x.high))
    swapped = paired_bootstrap(b, a)
    assert (swapped.low, swapped.high) == pytest.approx((-x.high, -x.low), rel=0.02, abs=1e-3)
    assert paired_bootstrap(a, b) == x and paired_bootstrap(a, b, seed=1) != x  # by seed, and nothing else
    shift = errors(5, 20, 3)
    moved = paired_bootstrap(a + shift, b + shift)  # what both arms share cancels
    assert (moved.low, moved.high) == pytest.approx((x.low, x.high))


def test_pairing_matters():
    difficulty = draw("hard").gamma(1.0, 1.0, size=(1, 50))
    a, b = difficulty + 0.05 + 0.01 * draw(1).normal(size=(5, 50)), difficulty + 0.01 * draw(2).normal(size=(5, 50))
    assert paired_bootstrap(a, b).excludes()
    assert not paired_bootstrap(a, b[:, ::-1]).excludes()  # other clips: the pairing is gone


def test_an_arm_without_seeds_is_paired_with_every_seed():
    a, b = errors(5, 20, 1), errors(1, 20, 2)
    expected = paired_bootstrap(a, np.repeat(b, 5, 0))
    assert paired_bootstrap(a, b) == paired_bootstrap(a, b[0]) == expected
    assert expected.seeds == 5 and expected.note == ""
    assert paired_bootstrap(b, a).estimate == pytest.approx(-expected.estimate)
    assert "other seeds" in paired_bootstrap(a[:1], b).note and "other clips" in paired_bootstrap(a[:, :1], b[:, :1]).note


@pytest.mark.parametrize(("seeds", "truth"), [(3, 0.4), (5, 0.4), (20, 0.4)])
def test_planted_effects_are_covered(seeds, truth):
    hits, plain, repeats = 0, 0, 250
    for i in range(repeats):
        g = draw("planted", seeds, truth, i)
        d = truth + 0.3 * g.standard_normal((seeds, 1)) + 0.8 * g.standard_normal((1, 30)) + 0.3 * g.standard_normal((seeds, 30))
        hits += not paired_bootstrap(d, np.zeros((1, 30)), resamples=300).excludes(truth)
        plain += not paired_bootstrap(d, np.zeros((1, 30)), resamples=300, small_sample=False).excludes(truth)
    assert 0.91 <= hits / repeats <= 0.99  # 95 % within three counting errors; with 3 seeds the truth is nearer to 97 %
    if seeds == 3:
        assert hits > plain + 0.04 * repeats  # without the stretch three seeds promise too much


def test_degenerate_tables():
    same = errors(3, 8)
    x = paired_bootstrap(same, same)
    assert (x.estimate, x.low, x.high, x.detectable) == (0, 0, 0, 0) and not x.excludes()
    one = paired_bootstrap(same + 0.5, same)
    assert one.low == pytest.approx(0.5) and one.high == pytest.approx(0.5) and one.excludes()
    assert paired_bootstrap(same, 2 * same, statistic="ratio").estimate == pytest.approx(0.5)


def test_report_and_record():
    x = paired_bootstrap(errors(5, 20, 1), errors(5, 20, 2))
    assert "5 seeds x 20 clips" in str(x) and "95%" in str(x) and "detectable" in str(x)
    assert json.loads(json.dumps(asdict(x)))["low"] == x.low  # plain Python numbers, for the run record


def test_tensors_are_welcome():
    a, b = errors(3, 8, 1), errors(3, 8, 2)
    assert paired_bootstrap(torch.tensor(a, requires_grad=True), torch.tensor(b)) == paired_bootstrap(a, b)


def test_bad_tables():
    good = errors(3, 8)
    for hole in (np.nan, np.inf):
        bad = good.copy()
        bad[1, 4] = hole
        with pytest.raises(NonFiniteError, match="a: 1 of 24 .* seed 1, clip 4"):
            paired_bootstrap(bad, good)
        with pytest.raises(NonFiniteError, match="b: "):
            paired_bootstrap(good, bad)
        with pytest.raises(NonFiniteError, match="differences"):
            spread(bad)
    for other in (errors(2, 8), errors(3, 7), errors(3, 1)):
        with pytest.raises(ShapeError, match=r"a and b: .*\(3, 8\)"):
            paired_bootstrap(good, other)
    for shape in ((0,), (3, 0), (2, 3, 4), ()):
        with pytest.raises(ShapeError, match="a: expected errors of shape"):
            paired_bootstrap(np.zeros(shape), good)
    with pytest.raises(ShapeError, match="no spread"):
        paired_bootstrap([0.1], [0.2])


def test_bad_options():
    good = errors(3, 8)
    with pytest.raises(ConfigError, match="did you mean 'ratio'"):
        paired_bootstrap(good, good, statistic="ratios")
    for wrong in ({"resamples": 10}, {"confidence": 95}, {"resamples": 1000.5}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            paired_bootstrap(good, good, **wrong)
    for statistic in ("ratio", "skill"):
        for a, b in ((-good, good), (good, -good), (good, 0 * good), (0 * good, good)):
            with pytest.raises(InputError, match="errors >= 0 with means above 0"):
                paired_bootstrap(a, b, statistic=statistic)
    sparse = np.zeros((1, 8))
    sparse[0, 0] = 1.0
    with pytest.raises(InputError, match="use the difference"):
        paired_bootstrap(good, sparse, statistic="ratio")


# power -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [3, 5, 10, 50])
@pytest.mark.parametrize(("power", "alpha"), [(0.8, 0.05), (0.9, 0.01)])
def test_detectable_effect_against_the_noncentral_t(n, power, alpha):
    d = draw("nct", n).normal(size=n)
    effect = minimum_detectable_effect(d, power, alpha) / stats.sem(d)
    bar = stats.t.ppf(1 - alpha / 2, n - 1)
    assert stats.nct.sf(bar, n - 1, effect) == pytest.approx(power, abs=2e-3)


def test_detectable_effect_is_detected_that_often():
    g = draw("power")
    pilot = spread(g.normal(size=(6, 25)) + 0.5 * g.normal(size=(6, 1)) + 0.5 * g.normal(size=(1, 25)))
    effect = minimum_detectable_effect(g.normal(size=(6, 25)) + 0.5 * g.normal(size=(6, 1)) + 0.5 * g.normal(size=(1, 25)))
    assert pilot.standard_error < effect < 6 * pilot.standard_error
    called = []
    for _ in range(400):
        x = 0.9 + 0.5 * g.normal(size=(6, 1)) + 0.5 * g.normal(size=(1, 25)) + g.normal(size=(6, 25))
        noise = spread(x)
        called.append((abs(noise.mean) > noise.half_width(), minimum_detectable_effect(x)))
    rate, detectable = np.mean([c for c, _ in called]), np.median([e for _, e in called])
    assert detectable == pytest.approx(0.9, rel=0.2) and 0.7 < rate < 0.97  # an effect near the detectable one is called about that often


def test_runs_needed():
    g = draw("runs")
    pilot = g.normal(size=(6, 1)) + 0.1 * g.normal(size=(1, 40)) + 0.1 * g.normal(size=(6, 40))
    counts = [runs_needed(pilot, effect) for effect in (3.0, 1.5, 0.7)]
    assert counts == sorted(counts) and counts[0] >= 2
    from dataclasses import replace

    from fvlm.evidence.statistics import _detectable

    for effect, n in zip((3.0, 1.5, 0.7), counts):
        assert _detectable(replace(spread(pilot), seeds=n), 0.8, 0.05) <= effect
        assert n == 2 or _detectable(replace(spread(pilot), seeds=n - 1), 0.8, 0.05) > effect
    only_clips = 0.001 * g.normal(size=(6, 1)) + g.normal(size=(1, 10))
    assert runs_needed(only_clips, 0.1) is None  # no number of seeds replaces clips


def test_bad_power_arguments():
    good = errors(3, 8)
    for wrong in ({"power": 1.0}, {"alpha": 0.0}, {"power": float("nan")}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            minimum_detectable_effect(good, **wrong)
    with pytest.raises(ConfigError, match="effect"):
        runs_needed(good, 0.0)
    with pytest.raises(ShapeError, match="at least 2 seeds"):
        runs_needed(good[0], 0.1)
    with pytest.raises(ShapeError, match="no spread"):
        minimum_detectable_effect([1.0])


# tests -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 9, 13])
@pytest.mark.parametrize("alternative", ["two-sided", "less", "greater"])
def test_exact_sign_flips_against_scipy(n, alternative):
    d = draw("flips", n).normal(0.4, 1, n)
    ours = sign_flip_test(d, alternative=alternative)
    if n > 1:
        theirs = stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative=alternative, vectorized=True).pvalue
        assert ours == pytest.approx(theirs, abs=1e-12)
    assert ours >= smallest_p_value(n, alternative)
    assert sign_flip_test(np.arange(1.0, n + 1), alternative="greater") == smallest_p_value(n, "greater") == 0.5**n


def test_random_sign_flips():
    d = draw("many").normal(0.25, 1, 60)
    theirs = stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=50_000, vectorized=True, rng=0, batch=5000).pvalue
    assert sign_flip_test(d, resamples=50_000) == pytest.approx(theirs, abs=0.006)
    assert sign_flip_test(d) == sign_flip_test(d) and 0 < sign_flip_test(d + 100, resamples=1000) == pytest.approx(1 / 1001)


def test_ties_and_zeros_count():
    assert sign_flip_test([0.0, 0.0, 0.0]) == 1.0
    assert sign_flip_test([0.1, 0.2, 0.3]) == 0.25  # rounding must not lose the observed pattern itself
    assert sign_flip_test([0.1] * 10) == 2 / 1024
    assert sign_flip_test([1.0, 0.0]) == 1.0


def test_sign_flips_keep_their_level():
    g = draw("level")
    p = np.array([sign_flip_test(g.laplace(size=8)) for _ in range(400)])
    assert (p <= 0.05).mean() < 0.085 and abs(np.median(p) - 0.5) < 0.08


def test_bad_differences():
    with pytest.raises(ShapeError, match="average over clips"):
        sign_flip_test(errors(3, 8))
    with pytest.raises(ShapeError, match="expected"):
        sign_flip_test([])
    with pytest.raises(NonFiniteError):
        sign_flip_test([1.0, float("nan")])
    with pytest.raises(ConfigError, match="alternative"):
        sign_flip_test([1.0], alternative="both")
    with pytest.raises(ConfigError, match="n: got 0"):
        smallest_p_value(0)


def test_holm():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.9, 0.8]), [1.0, 1.0])
    np.testing.assert_allclose(holm([0.02]), [0.02])
    assert holm({"x": 0.01, "y": 0.5}) == {"x": 0.02, "y": 0.5}
    p = draw("holm").uniform(size=50)
    adjusted = holm(p)
    assert (adjusted >= p).all() and (adjusted <= np.minimum(1, 50 * p) + 1e-12).all()  # never milder than p, never harsher than Bonferroni
    assert (np.diff(adjusted[np.argsort(p)]) >= 0).all()
    for level in (0.05, 0.3):  # the step-down procedure itself, written out
        rejected = set()
        for rank, i in enumerate(np.argsort(p)):
            if p[i] > level / (50 - rank):
                break
            rejected.add(i)
        assert rejected == set(np.flatnonzero(adjusted <= level))
    for wrong in ([], [0.1, 1.1], [-0.1], [float("nan")], [[0.1]], {}):
        with pytest.raises(InputError, match="p_values"):
            holm(wrong)
