"""Optical flow: the direction of the warp, gradients, and estimates against the exact flow of worlds."""
import builtins
import sys

import pytest
import torch

from fvlm.core import ConfigError, InputError, NonFiniteError, ShapeError
from fvlm.data.worlds import BouncingSprites, MovingDigits, PhotoPan
from fvlm.encoders.optical_flow import FLOW_METHODS, brightness, estimate_flow, explained, warp


def field(x, y, *shape):
    "A constant flow (..., 2, H, W)."
    *lead, H, W = shape
    return torch.tensor([float(x), float(y)])[:, None, None].expand(*lead, 2, H, W).clone()


# --- warp ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("x", "y"), [(2, 0), (0, 2), (-1, 3), (-2, -1), (0, 0)])
def test_a_known_translation_carries_frame_t_to_t_plus_1(x, y):
    wide = torch.rand(3, 30, 40, generator=torch.Generator().manual_seed(0))
    first = wide[:, 5:25, 5:35]
    second = wide[:, 5 - y:25 - y, 5 - x:35 - x]  # what was at p is now at p + (x, y)
    flow = field(x, y, 20, 30)
    inner = (..., slice(3, -3), slice(3, -3))
    assert torch.allclose(warp(first, flow)[inner], second[inner], atol=1e-5)
    assert torch.allclose(warp(second, flow, back=True)[inner], first[inner], atol=1e-5)
    if x or y:
        assert not torch.allclose(warp(second, flow)[inner], first[inner], atol=1e-2)


def test_half_a_pixel_is_the_mean_of_two():
    frame = torch.tensor([[[0.0, 1.0, 4.0, 4.0]]])
    assert torch.allclose(warp(frame, field(0.5, 0, 1, 4)), torch.tensor([[[0.0, 0.5, 2.5, 4.0]]]), atol=1e-6)
    assert torch.allclose(warp(frame, field(0.5, 0, 1, 4), back=True), torch.tensor([[[0.5, 2.5, 4.0, 4.0]]]), atol=1e-6)


def test_outside_the_frame_the_edge_repeats():
    frame = torch.arange(6.0).view(1, 1, 6)
    assert torch.allclose(warp(frame, field(100, 0, 1, 6)), torch.zeros(1, 1, 6)) and torch.allclose(warp(frame, field(-100, 0, 1, 6)), torch.full((1, 1, 6), 5.0))


@pytest.mark.parametrize("lead", [(), (4,), (2, 3)])
def test_leading_axes_are_independent(lead):
    draw = torch.Generator().manual_seed(1)
    frame, flow = torch.rand(*lead, 4, 6, 5, generator=draw), torch.randn(*lead, 2, 6, 5, generator=draw)
    whole = warp(frame, flow)
    assert whole.shape == frame.shape
    for index in torch.cartesian_prod(*(torch.arange(n) for n in lead)).reshape(-1, len(lead)).tolist() if lead else []:
        assert torch.allclose(whole[tuple(index)], warp(frame[tuple(index)], flow[tuple(index)]), atol=1e-6)


def test_gradients_reach_the_flow_and_the_frame():
    draw = torch.Generator().manual_seed(2)
    frame, flow = torch.rand(1, 2, 5, 5, dtype=torch.float64, generator=draw, requires_grad=True), (torch.rand(1, 2, 5, 5, dtype=torch.float64, generator=draw) * 0.4 + 0.3).requires_grad_()
    assert torch.autograd.gradcheck(lambda f, u: warp(f, u)[..., 1:-1, 1:-1], (frame, flow), eps=1e-6, atol=1e-5)


def test_one_pixel_frames():
    assert torch.equal(warp(torch.ones(1, 1, 1), torch.zeros(2, 1, 1)), torch.ones(1, 1, 1))


@pytest.mark.parametrize(("frame", "flow", "error", "name"), [
    (torch.zeros(3, 8, 8), torch.zeros(2, 8, 7), ShapeError, "flow"),
    (torch.zeros(3, 8, 8), torch.zeros(3, 8, 8), ShapeError, "flow"),
    (torch.zeros(2, 3, 8, 8), torch.zeros(1, 2, 8, 8), ShapeError, "flow"),
    (torch.zeros(8, 8), torch.zeros(2, 8, 8), ShapeError, "frame"),
    (torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(2, 8, 8), InputError, "frame"),
    (torch.zeros(3, 8, 8), torch.full((2, 8, 8), float("nan")), NonFiniteError, "flow"),
    (torch.zeros(3, 0, 8), torch.zeros(2, 0, 8), InputError, "frame"),
])
def test_bad_input_to_warp_is_one_error_naming_the_argument(frame, flow, error, name):
    with pytest.raises(error, match=f"^{name}: "):
        warp(frame, flow)


def test_worlds_flow_obeys_the_convention():
    clip = BouncingSprites(num_clips=1, num_frames=4, whole_pixels=True)[0]
    frames, alone = clip["frames"].permute(0, 3, 1, 2).float() / 255, clip["masks"].float().sum(1, keepdim=True)
    seen = (warp(alone[1:], clip["flow"], back=True) > 0.999) & (alone[:-1] > 0.5)  # object before and object after
    wrong = ((warp(frames[1:], clip["flow"], back=True) - frames[:-1]).abs().amax(1, keepdim=True) > 0.01) & seen
    assert wrong.float().sum() < 0.02 * seen.float().sum()


# --- estimates -------------------------------------------------------------------------------------------------------

def endpoint_error(estimate, truth, where):
    return (estimate - truth).norm(dim=1)[where].mean().item()


def test_estimated_flow_is_close_to_exact_flow():
    pytest.importorskip("skimage")
    for world, bound in ((MovingDigits, 0.15), (BouncingSprites, 0.15), (PhotoPan, 0.3)):
        clip = world(num_clips=1, num_frames=3)[0]
        flow = estimate_flow(clip["frames"])
        assert flow.shape == clip["flow"].shape and flow.dtype == torch.float32
        moving = clip["flow"].norm(dim=1) > 0
        error = endpoint_error(flow, clip["flow"], moving)
        assert error < bound < endpoint_error(torch.zeros_like(flow), clip["flow"], moving), world.__name__
        assert endpoint_error(flow.flip(1), clip["flow"], moving) > 3 * error  # x first
        assert endpoint_error(-flow, clip["flow"], moving) > 3 * error  # forward


@pytest.mark.parametrize("method", FLOW_METHODS)
def test_a_static_clip_has_no_flow_and_estimates_repeat(method):
    pytest.importorskip("skimage")
    still = BouncingSprites(num_clips=1, num_frames=2, size=32, static=True)[0]["frames"]
    assert estimate_flow(still, method=method).abs().max() == 0
    clip = PhotoPan(num_clips=1, num_frames=2, size=32)[0]["frames"]
    assert torch.equal(estimate_flow(clip, method=method), estimate_flow(clip, method=method))


def test_the_rule_only_removes_motion():
    pytest.importorskip("skimage")
    clip = BouncingSprites(num_clips=1, num_frames=2)[0]
    every, kept = (estimate_flow(clip["frames"], least_gain=gain) for gain in (None, 0.002))
    changed = (every != kept).any(1)
    assert changed.any() and not kept.norm(dim=1)[changed].any()
    nowhere = torch.ones_like(clip["flow"][:, 0], dtype=torch.bool)
    assert endpoint_error(kept, clip["flow"], nowhere) < 0.7 * endpoint_error(every, clip["flow"], nowhere)


def test_explained_prefers_stillness_where_both_explain():
    first = torch.zeros(20, 40)
    first[5:15, 5:15] = torch.rand(10, 10, generator=torch.Generator().manual_seed(0))
    second = warp(first[None], field(2, 0, 20, 40))[0]
    seen = explained(first, second, field(2, 0, 20, 40), 0.002)
    assert seen[7:13, 7:13].all() and not seen[:, 24:].any()


def test_brightness_weighs_colours():
    colours = torch.tensor([[[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]]], dtype=torch.uint8)
    assert torch.allclose(brightness(colours)[0, 0], torch.tensor([0.299, 0.587, 0.114, 1.0]), atol=1e-6)


@pytest.mark.parametrize(("video", "options", "error", "name"), [
    (torch.zeros(1, 32, 32, 3, dtype=torch.uint8), {}, ShapeError, "video"),
    (torch.zeros(2, 8, 32, 3, dtype=torch.uint8), {}, ShapeError, "video"),
    (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), {}, ShapeError, "video"),
    (torch.zeros(2, 32, 32, 3), {}, InputError, "video"),
    (torch.zeros(2, 32, 32, 3, dtype=torch.uint8), {"method": "ikl"}, ConfigError, "method"),
    (torch.zeros(2, 32, 32, 3, dtype=torch.uint8), {"least_gain": -1}, ConfigError, "least_gain"),
])
def test_bad_input_to_estimate_is_one_error_naming_the_argument(video, options, error, name):
    with pytest.raises(error, match=f"^{name}: "):
        estimate_flow(video, **options)


def test_without_scikit_image_the_error_says_how_to_install_it(monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.startswith("skimage"):
            raise ImportError("No module named 'skimage'")
        return real(name, *rest, **more)

    for module in [m for m in sys.modules if m.split(".")[0] == "skimage"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match="pip install 'scikit-image"):
        estimate_flow(torch.zeros(2, 32, 32, 3, dtype=torch.uint8))
    assert torch.equal(warp(torch.ones(1, 4, 4), torch.zeros(2, 4, 4)), torch.ones(1, 4, 4))
