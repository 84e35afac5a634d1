"""The verdict on a gaze over clips: right on planted gazes, and never better than what the reference explains."""
import pytest
import torch

from fvlm.core import ConfigError, InputError, ShapeError, generator
from fvlm.evidence.object_gaze import gaze_report


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
