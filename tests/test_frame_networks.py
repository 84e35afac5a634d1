"""Frames to a grid and back: shapes, reach, and what is said of frames that are none."""
import pytest
import torch

from fvlm.blocks.frame_networks import REACHES, STRIDES, ResidualBlock, checked_frames, frame_decoder, frame_encoder, frames_of
from fvlm.core import ConfigError, InputError, NonFiniteError, ShapeError


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize("norm", ["none", "frame"])
def test_there_and_back(stride, reach, norm):
    sizes = dict(channels=3, embed_dim=5, stride=stride, width=8, depth=1, norm=norm)
    grid = frame_encoder(**sizes, reach=reach)(torch.rand(2, 3, 32, 48))
    assert grid.shape == (2, 5, 32 // stride, 48 // stride) and frame_decoder(**sizes)(grid).shape == (2, 3, 32, 48)


@pytest.mark.parametrize(("stride", "depth"), [(4, 0), (4, 2), (8, 1)])
@pytest.mark.parametrize("reach", REACHES)
def test_a_site_sees_what_the_formula_says(stride, depth, reach):
    x = torch.rand(8, 1, 128, 128, generator=torch.Generator().manual_seed(0)).requires_grad_()  # eight pictures: a ReLU may be shut in one
    frame_encoder(channels=1, embed_dim=4, stride=stride, width=16, depth=depth, reach=reach)(x)[:, :, 64 // stride, 64 // stride].square().sum().backward()
    (kernel, inner), seen = REACHES[reach], (x.grad != 0).any(0)[0]
    assert int(seen.any(0).sum()) == int(seen.any(1).sum()) == 1 + (kernel - 1) * (stride - 1) + 2 * depth * (inner - 1) * stride
    if reach == "site":
        assert seen[64:64 + stride, 64:64 + stride].all()


def test_a_norm_over_the_frame_ties_everything():
    x = torch.rand(1, 1, 64, 64).requires_grad_()
    frame_encoder(channels=1, embed_dim=4, width=8, reach="site", norm="frame")(x)[0, 0, 0, 0].backward()
    assert (x.grad != 0).float().mean() > 0.9


def test_a_block_that_adds_nothing_is_the_identity():
    block, x = ResidualBlock(4), torch.rand(2, 4, 5, 6)
    torch.nn.init.zeros_(block.second.weight), torch.nn.init.zeros_(block.second.bias)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize(("change", "said"), [(dict(stride=3), "stride: got 3"), (dict(stride=32), "stride: got 32"), (dict(reach="far"), "reach: got 'far'"), (dict(norm="batch"), "norm: got 'batch'"),
                                              (dict(width=1), "width: got 1")])
def test_sizes_that_are_none(change, said):
    with pytest.raises(ConfigError, match=said):
        frame_encoder(**{**dict(channels=1, embed_dim=4, width=8), **change})
    if "reach" not in change:
        with pytest.raises(ConfigError, match=said):
            frame_decoder(**{**dict(channels=1, embed_dim=4, width=8), **change})


def test_frames_that_are_none():
    good = torch.rand(1, 2, 1, 8, 8)
    assert checked_frames("x", good) is good and frames_of({"frames": good}, C=1, H=8, W=8) is good
    for wrong, error, said in ((good[0], ShapeError, "x: expected 5 axes"), ((good * 255).byte(), InputError, "x: got torch.uint8"), (good[:, :0], InputError, "at least one frame"),
                               (good * 255, InputError, "x: got values from"), (good - 1, InputError, "x: got values from"), (good / 0, NonFiniteError, "x: 128 of 128 values")):
        with pytest.raises(error, match=said):
            checked_frames("x", wrong)
    for wrong, said in (({}, r"got keys \[\]"), (good, "got Tensor")):
        with pytest.raises(InputError, match=said):
            frames_of(wrong)
    with pytest.raises(ShapeError, match=r'batch\["frames"\]: axis H should be 9'):
        frames_of({"frames": good}, H=9)
