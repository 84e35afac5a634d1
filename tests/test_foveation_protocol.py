"""Four ratios or none, verdict words by their intervals, trivial rows on the same frames, and the way from models to errors."""
import math
from dataclasses import replace

import numpy as np
import pytest
from tests.random_clips import RandomClips

from fvlm.core import ConfigError, InputError, NonFiniteError, ShapeError, generator
from fvlm.evidence.foveation_protocol import FoveationErrors, Ratio, coarse_over_fine, foveation_protocol, measure
from fvlm.evidence.query_swaps import path_errors
from fvlm.models.foveated_vlm import FoveatedVLM


def made(ratio=1.0, seeds=4, clips=40, frames=5, noise=0.05, seed=0):
    "Coarse and fine errors with a planted ratio."
    draw = np.random.default_rng(seed)
    fine = np.exp(0.3 * draw.standard_normal((seeds, clips, frames)))
    return fine * ratio * np.exp(noise * draw.standard_normal(fine.shape)), fine


def errors(**changes):
    coarse, fine = made()
    given = dict(fine=fine, coarse=coarse, untrained_coarse=1.3 * fine, joint_fine=fine, joint_coarse=coarse, swapped={"own": fine, "static": 1.2 * fine})
    return FoveationErrors(**{**given, **changes})


# --- one ratio -------------------------------------------------------------------------------------------------------

def interval(low, high):
    return Ratio(estimate=math.sqrt(low * high), low=low, high=high, detectable=1.1, per_frame=(1.0,), first_frame=3, seeds=3, clips=9, confidence=0.95)


@pytest.mark.parametrize("low, high, word", [
    (0.97, 1.03, "no effect"), (0.99, 1.01, "no effect"), (0.9699, 1.0, "not decided"), (1.0, 1.0301, "not decided"), (1.02, 1.20, "not decided"), (1.05, 1.3, "not decided"),
    (1.0501, 1.3, "helps"), (1.2, 9.0, "helps"), (0.5, 0.9, "hurts"), (0.9, 0.96, "not decided"), (0.5, 2.0, "not decided"),
])
def test_words_follow_the_interval_alone(low, high, word):
    ratio = interval(low, high)
    assert ratio.verdict == word and word in str(ratio)
    assert ("could have seen 1.100" in str(ratio)) == (word == "not decided")


def test_the_estimate_is_the_geometric_mean_of_clip_ratios():
    coarse, fine = made(1.2, noise=0.3)
    found = coarse_over_fine(coarse, fine)
    by_hand = np.exp(np.log(coarse[..., 2:].mean(-1) / fine[..., 2:].mean(-1)).mean())
    assert found.estimate == pytest.approx(by_hand, rel=1e-12) and found.low < by_hand < found.high
    assert found.per_frame == pytest.approx(np.exp(np.log(coarse / fine).mean((0, 1))).tolist())
    turned = coarse_over_fine(fine, coarse)
    assert turned.estimate == pytest.approx(1 / found.estimate), "twice as bad and half as bad are equally far from 1"


def test_frames_before_the_headline_do_not_count():
    coarse, fine = made()
    shouting = coarse.copy()
    shouting[..., :2] *= 100
    assert coarse_over_fine(shouting, fine).estimate == coarse_over_fine(coarse, fine).estimate
    assert coarse_over_fine(shouting, fine, first_frame=2).estimate > 5


def test_the_interval_knows_seeds_and_clips():
    draw = np.random.default_rng(1)
    fine = np.exp(0.3 * draw.standard_normal((5, 40, 5)))
    steady = coarse_over_fine(fine * 1.1, fine)
    assert steady.low == pytest.approx(1.1) == steady.high
    by_seed = coarse_over_fine(fine * np.exp(0.2 * draw.standard_normal((5, 1, 1))), fine)
    by_clip = coarse_over_fine(fine * np.exp(0.2 * draw.standard_normal((1, 40, 1))), fine)
    assert by_seed.high / by_seed.low > by_clip.high / by_clip.low > 1.03, "five draws of a seed say less than forty of a clip"
    assert "one seed" in str(coarse_over_fine(*(x[:1] for x in made())))


def test_errors_that_no_logarithm_takes():
    coarse, fine = made()
    for bad, error in ((np.zeros_like(fine), InputError), (-fine, InputError), (np.where(fine > 1, np.nan, fine), NonFiniteError), (fine[0, 0], ShapeError), (fine[:, :5], ShapeError)):
        with pytest.raises(error):
            coarse_over_fine(coarse, bad)
    with pytest.raises(ConfigError, match="first_frame"):
        coarse_over_fine(coarse, fine, first_frame=6)


# --- all four --------------------------------------------------------------------------------------------------------

def test_all_four_or_none():
    found = foveation_protocol(errors())
    assert list(found.ratios) == ["R0", "R1", "R2", "R3"]
    assert [found.ratios[name].verdict for name in found.ratios] == ["helps", "no effect", "no effect", "helps"]
    assert found.verdict().startswith("foveation has no effect") and "R0 and R3 alone would have said that it helps" in found.verdict()
    for name in found.ratios:
        assert f"| {name} |" in found.table()
    assert found.figure().width > 200 and found.error_figure().width > 200
    with pytest.raises(TypeError):
        FoveationErrors(fine=np.ones((1, 2, 3)))
    with pytest.raises(InputError, match="R3 is not left out"):
        errors(swapped={"own": made()[1]})


def test_the_verdict_is_r2s():
    plenty = errors(coarse=1.3 * made()[1], untrained_coarse=made()[1])
    assert foveation_protocol(plenty).verdict().startswith("foveation helps") and "alone" not in foveation_protocol(plenty).verdict()
    worse = errors(coarse=0.8 * made()[1])
    assert foveation_protocol(worse).verdict().startswith("foveation hurts")
    dim = errors(coarse=made(1.04, noise=0.2)[0])
    assert "not decided" in foveation_protocol(dim).verdict() and "could have seen" in foveation_protocol(dim).verdict()


def test_trivial_rows_that_win_are_named():
    fine = made()[1]
    good, bad = np.full((40, 5), 0.01), np.full((40, 5), 9.0)
    good[:, 0] = np.nan
    found = foveation_protocol(errors(trivial={"copy_last": good, "ridge": bad}))
    assert "copy_last does at least as well" in found.verdict() and "ridge does" not in found.verdict()
    assert "| copy_last | 0.0100 |" in found.table() and found.error_figure().width > 200 and fine.mean() > 0.01


def test_shapes_and_frames_that_do_not_fit():
    with pytest.raises(ShapeError, match="one shape"):
        errors(coarse=made(clips=39)[0])
    with pytest.raises(ShapeError, match="one shape"):
        errors(swapped={"static": made(seeds=3)[0]})
    with pytest.raises(ShapeError, match="trivial"):
        errors(trivial={"ridge": np.ones((3, 5))})
    with pytest.raises(ConfigError, match="first_frame"):
        foveation_protocol(errors(), first_frame=1)
    column = {name: value[..., 2:].mean(-1, keepdims=True) for name, value in vars(errors()).items() if isinstance(value, np.ndarray)}
    headline = replace(errors(), **column, swapped={"static": 1.2 * column["fine"]})
    assert foveation_protocol(headline, first_frame=1).ratios["R0"].estimate == pytest.approx(foveation_protocol(errors()).ratios["R0"].estimate)


# --- models ----------------------------------------------------------------------------------------------------------

def test_from_models_to_the_protocol():
    clips = RandomClips(6, 4)
    models = [{arm: FoveatedVLM.tiny(seed, trained_pass=arm) for arm in ("fine", "coarse", "both")} for seed in (0, 1)]
    found = measure(models, clips, batch_size=4)
    assert found.fine.shape == (2, 6, 4) and np.allclose(found.swapped["own"], found.fine, rtol=1e-5)
    assert np.allclose(found.untrained_coarse, found.coarse, rtol=1e-5), "untrained twins are one model"
    assert np.allclose(found.fine, found.joint_fine, rtol=1e-5)
    assert foveation_protocol(found).ratios["R2"].seeds == 2
    alone = path_errors(models[0]["coarse"], clips, passes="coarse", batch_size=1)
    assert set(alone) == {"coarse"} and np.allclose(alone["coarse"], found.coarse[0], rtol=1e-5)
    with pytest.raises(InputError, match="has no 'both'"):
        measure([{"fine": models[0]["fine"], "coarse": models[0]["coarse"]}], clips)
    with pytest.raises(InputError, match="was trained on 'coarse'"):
        measure([{**models[0], "fine": models[0]["coarse"]}], clips)
