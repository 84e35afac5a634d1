"""Where a gaze lies against the answer key: exact on planted gazes, and never better than what the reference explains."""
import numpy as np
import pytest
import torch

from fvlm.core import ConfigError, InputError, ShapeError, generator
from fvlm.evidence.object_gaze import chance_of, gaze_of, gaze_report, mass_on, patch_cover, points_at, saccade_lag


def test_cover_is_the_share_of_a_patch():
    mask = torch.zeros(2, 8, 12, dtype=torch.bool)
    mask[1, :4, :3] = True
    mask[1, 4, 6] = True
    cover = patch_cover(mask, (2, 2))
    assert torch.allclose(cover, torch.tensor([[0, 0, 0, 0], [12 / 24, 0, 0, 1 / 24]]))
    assert mass_on(torch.tensor([[0.25] * 4, [0.1, 0.2, 0.3, 0.4]]), cover)[1] == pytest.approx(0.5)
    assert mass_on(torch.full((2, 4), 0.25), cover)[0].isnan() and chance_of(cover)[1] == 0.5


def test_gaze_leaves_prefix_tokens_out_and_averages_what_was_used():
    a = torch.tensor([0.5, 0.1, 0.2, 0.2]).expand(1, 2, 3, 1, 4)  # one prefix token
    b = torch.tensor([0.0, 0.0, 1.0, 0.0]).expand(1, 2, 3, 1, 4)
    gaze = gaze_of([a, b], patches=3)
    assert torch.allclose(gaze[0, 0], torch.tensor([0.1, 1.2, 0.2]) / 1.5) and torch.allclose(gaze_of([a, b], patches=3, layers=[1])[0, 1], torch.tensor([0.0, 1.0, 0.0]))
    with pytest.raises(InputError, match="prefix tokens alone"):
        gaze_of([torch.tensor([1.0, 0, 0, 0]).expand(1, 1, 1, 1, 4)], patches=3)
    with pytest.raises(InputError, match="sum to 1"):
        gaze_of([2 * a], patches=3)


def test_pointing_shares_ties():
    cover = torch.tensor([0.0, 0.5, 0.0, 0.0])
    assert points_at(torch.tensor([0.1, 0.6, 0.2, 0.1]), cover) == 1 and points_at(torch.tensor([0.6, 0.2, 0.1, 0.1]), cover) == 0
    assert points_at(torch.full((4,), 0.25), cover) == 0.25


@pytest.mark.parametrize("mass, cue, expected", [([1, 1, 1, 1], 0, 0), ([0, 0, 1, 1], 0, 2), ([0, 0, 1, 1], 1, 1), ([1, 1, 1, 0], 0, np.inf), ([1, 0, 1, 1], 0, 2), ([0, float("nan"), 1, 1], 0, 1)])
def test_lag_is_where_it_stays(mass, cue, expected):
    assert saccade_lag(torch.tensor(mass, dtype=torch.float32), torch.full((4,), 0.1), cue_frame=cue) == expected


def planted(kind, clips=16, frames=5, patches=36):
    draw = generator(3, kind)
    cover = torch.zeros(clips, frames, patches)
    place = torch.randint(patches, (clips, frames), generator=draw)
    cover.scatter_(-1, place[..., None], 1.0)
    noise = torch.randn(cover.shape, generator=draw)
    logits = {"follows": 4 * cover + noise, "avoids": -4 * cover + 0.1 * noise, "habit": torch.arange(36.0).expand_as(cover) / 9}[kind]
    return torch.softmax(logits, -1), cover


def test_verdicts_of_planted_gazes():
    assert "follows the object" in gaze_report(*planted("follows")).verdict()
    assert "avoids the object" in gaze_report(*planted("avoids")).verdict()
    habit = gaze_report(*planted("habit"))
    assert "No tie" in habit.verdict() and habit.over_elsewhere.low < 0 < habit.over_elsewhere.high


def test_the_report_is_the_same_again_and_counts_from_the_first_frame():
    gaze, cover = planted("follows")
    one, two = gaze_report(gaze, cover, seed=1), gaze_report(gaze, cover, seed=1)
    assert one.over_elsewhere == two.over_elsewhere and one.table() == two.table()
    gaze[:, 0] = 1 / 36
    assert gaze_report(gaze, cover, seed=1).over_elsewhere == one.over_elsewhere


def test_bad_input_is_named():
    gaze, cover = planted("follows")
    with pytest.raises(ShapeError, match="cover"):
        gaze_report(gaze, cover[:, :3])
    with pytest.raises(ConfigError, match="at least two"):
        gaze_report(gaze[:1], cover[:1])
    with pytest.raises(ConfigError, match="first"):
        gaze_report(gaze, cover, first=5)
    with pytest.raises(InputError, match="never in sight"):
        gaze_report(gaze, torch.cat([cover[:-1], torch.zeros(1, 5, 36)]))
    with pytest.raises(InputError, match="gaze"):
        gaze_report(gaze * float("nan"), cover)
