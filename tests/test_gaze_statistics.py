"""A gaze against the answer key: exact on known maps, chance where it is flat, NaN where nothing is in sight, and a gradient to be taught by."""
import numpy as np
import pytest
import torch

from fvlm.core import ConfigError, InputError, ShapeError
from fvlm.objectives.gaze_statistics import chance_of, gaze_of, mass_on, patch_cover, points_at, saccade_lag


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


def test_objects_are_counted_side_by_side_and_one_out_of_sight_is_not_a_number():
    attention = torch.tensor([0.5, 0.3, 0.1, 0.1, 0.0]).expand(1, 1, 2, 1, 5)  # a class token, four patches
    cover = torch.tensor([[[[1.0, 0, 0, 0], [0, 0.2, 0, 1.0], [0, 0, 0, 0]]]])
    gaze = gaze_of([attention, attention], patches=4).unsqueeze(2)
    torch.testing.assert_close(mass_on(gaze, cover)[0, 0, :2], torch.tensor([0.6, 0.2]))
    assert points_at(gaze, cover)[0, 0, :2].tolist() == [1.0, 0.0]  # the class token is no place
    assert all(found(gaze, cover)[0, 0, 2].isnan() for found in (mass_on, points_at)) and chance_of(cover)[0, 0].tolist()[:2] == [0.25, 0.5]


def test_half_precision_attention_is_taken():
    rows = torch.softmax(torch.randn(2, 3, 4, 1, 82), -1)
    torch.testing.assert_close(gaze_of([rows.bfloat16()], patches=81), gaze_of([rows], patches=81), atol=2e-3, rtol=0.02)


def test_an_object_out_of_sight_teaches_nothing():
    logits = torch.randn(2, 4, requires_grad=True)
    mass_on(torch.softmax(logits, -1), torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]])).nansum().backward()
    assert logits.grad.isfinite().all() and logits.grad[0].abs().max() > 0 == logits.grad[1].abs().max()


def test_bad_arguments_are_named():
    with pytest.raises(ShapeError, match="masks"):
        patch_cover(torch.ones(3, dtype=torch.bool), (2, 2))
    with pytest.raises(InputError, match="no layers"):
        gaze_of([], patches=3)
    with pytest.raises(ConfigError, match="cue_frame"):
        saccade_lag(torch.ones(4), torch.ones(4), cue_frame=4)
