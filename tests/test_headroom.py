"""The probe before training: known answers, splits by clip, and one clear error for what does not fit."""
import numpy as np
import pytest
import torch

from fvlm.core import ConfigError, InputError, NonFiniteError, ShapeError, generator
from fvlm.evidence.headroom import headroom, probe_errors, trivial_rows, views_of

SPLIT = {"train": range(60), "val": range(60, 80), "test": range(80, 110)}


def world(rule, n=110, T=5, N=6, D=4, noise=0.3, seed=0):
    "Patches, shares of the place that matters, and targets that follow `rule` of the frame before."
    draw = generator(seed, "world")
    patches = torch.randn(n, T, N, D, generator=draw)
    location = torch.nn.functional.one_hot(torch.randint(N, (n, T), generator=draw), N).float()
    seen = {"mean": patches.mean(2) * N**0.5, "place": (location[..., None] * patches).sum(2), "first": patches[:, :, 0], "nothing": torch.zeros(n, T, D)}[rule]
    return patches, location, torch.cat([torch.zeros(n, 1, D), seen[:, :-1]], 1) + noise * torch.randn(n, T, D, generator=draw)


@pytest.mark.parametrize("rule, verdict, fine", [("mean", "no headroom", None), ("place", "headroom:", "true_location"), ("first", "headroom:", "all_patches"), ("nothing", "no headroom", None)])
def test_known_answers(rule, verdict, fine):
    patches, location, target = world(rule)
    found = headroom(views_of(patches, location=location), target, SPLIT)
    assert str(found).startswith(verdict), str(found)
    assert fine in (None, found.fine) and found.coarse == "mean_pool" and found.low <= found.estimate <= found.high
    if rule == "place":
        assert abs(np.nanmean(found.errors["true_location"]) - 0.09) < 0.02 and 5 < found.estimate < 15
    assert found.table().count("\n") == 4 and found.figure().width > 100


def test_frames_are_shifted_by_one_and_frame_1_is_out():
    patches, location, target = world("place")
    errors, _ = probe_errors(views_of(patches, location=location)["true_location"], target, SPLIT)
    assert errors.shape == (30, 5) and np.isnan(errors[:, 0]).all() and (errors[:, 1:] < 1.5).all()
    unshifted = torch.cat([target[:, 1:], target[:, :1]], 1)  # the latent of the same frame: a probe that looked ahead would do well
    late, _ = probe_errors(views_of(patches, location=location)["true_location"], unshifted, SPLIT)
    assert np.nanmean(late) > 3 * np.nanmean(errors)


def test_what_is_known_anyway_counts_for_every_view():
    patches, location, target = world("nothing")
    target = torch.cat([target[:, :1], target[:, :1] + 0.01 * torch.randn(110, 4, 4, generator=generator(1, "still"))], 1)
    found = headroom(views_of(patches, location=location), target, SPLIT, beside=target)
    alone = headroom(views_of(patches, location=location), target, SPLIT)
    assert np.nanmean(found.errors["mean_pool"]) < 0.05 * np.nanmean(alone.errors["mean_pool"])


def test_test_clips_are_not_used_for_fitting():
    patches, location, target = world("place")
    view = views_of(patches, location=location)["mean_pool"]
    changed = target.clone()
    changed[80] += 10
    one, two = (probe_errors(view, t, SPLIT)[0] for t in (target, changed))
    assert np.array_equal(one[1:, 1:], two[1:, 1:]) and (two[0, 1:] > one[0, 1:]).all()


def test_constant_features_and_more_features_than_rows():
    patches, location, target = world("place")
    wide = torch.cat([patches, torch.ones(110, 5, 6, 80)], -1)
    errors, _ = probe_errors(views_of(wide)["all_patches"], target, {"train": range(10), "val": range(60, 80), "test": range(80, 110)})
    assert np.isfinite(errors[:, 1:]).all() and errors[:, 1:].mean() < 2


def test_bad_input():
    patches, location, target = world("place")
    views = views_of(patches, location=location)
    with pytest.raises(InputError, match="no clip in two parts"):
        headroom(views, target, {"train": range(60), "val": range(50, 80), "test": range(80, 110)})
    with pytest.raises(InputError, match="train, val and test"):
        headroom(views, target, {"train": range(60), "test": range(80, 110)})
    with pytest.raises(InputError, match="at least one other"):
        headroom({"mean_pool": views["mean_pool"]}, target, SPLIT)
    with pytest.raises(ShapeError, match="target"):
        headroom(views, target[:, :3], SPLIT)
    with pytest.raises(ConfigError, match="first_frame"):
        headroom(views, target, SPLIT, first_frame=1)
    with pytest.raises(NonFiniteError, match="target"):
        headroom(views, target.clone().fill_(float("nan")), SPLIT)
    with pytest.raises(ShapeError, match="location"):
        views_of(patches, location=location[:, :, :3])
    with pytest.raises(NonFiniteError, match="mean_pool"):
        views_of(patches * float("inf"))


def test_trivial_rows_by_hand():
    steps = torch.arange(6.0)[None, :, None, None, None] * torch.randn(30, 1, 2, 1, 1, generator=generator(0, "steps")) + 1
    rows = trivial_rows(steps[:15], steps[15:20], steps[20:])
    assert {name: values.shape for name, values in rows.items()} == dict.fromkeys(("copy_last", "linear", "ridge"), (10, 6))
    assert np.isnan(rows["copy_last"][:, 0]).all() and np.isfinite(rows["copy_last"][:, 1:]).all()
    by_hand = (steps[20:, 1:] - steps[20:, :-1]).square().mean((2, 3, 4)).numpy()
    assert np.allclose(rows["copy_last"][:, 1:], by_hand, rtol=1e-5)
    assert np.nanmax(rows["linear"]) < 1e-9 and np.nanmax(rows["ridge"]) < 1e-4, "constant speed: both know the rule"
    with pytest.raises(ShapeError, match="val"):
        trivial_rows(steps, steps[:, :4], steps)
    with pytest.raises(NonFiniteError, match="train"):
        trivial_rows(steps * float("nan"), steps, steps)
