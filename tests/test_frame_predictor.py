"""Contracts of predictors of frames: folding, the rows that learn nothing on paper, a subclass of one method."""
import pytest
import torch
from torch import nn

from fvlm.core import ConfigError, InputError
from fvlm.models.frame_predictor import FramePredictor, FramePredictorConfig, PixelCopyLast, PixelLinear, PixelMean, fold_patches


def test_rows_that_learn_nothing_on_paper():
    ramp = torch.tensor([0.1, 0.3, 0.5]).view(1, 3, 1, 1, 1).expand(2, 3, 1, 4, 4)
    assert torch.equal(PixelCopyLast().predict(ramp, 2), ramp[:, -1:].expand(-1, 2, -1, -1, -1))
    torch.testing.assert_close(PixelLinear().predict(ramp, 4)[0, :, 0, 0, 0], torch.tensor([0.7, 0.9, 1.0, 1.0]))


def test_the_mean_is_that_of_its_fit_and_wants_one():
    frames = torch.rand(3, 5, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    found = PixelMean().fit(frames)
    assert found.num_parameters == 2 * 4 * 4
    torch.testing.assert_close(found.predict(frames[:2] * 0, 3), frames.mean((0, 1)).expand(2, 3, -1, -1, -1))
    with pytest.raises(InputError, match="before fit"):
        PixelMean().predict(frames, 1)


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_a_patch_becomes_channels_row_by_row(patch):
    frames = torch.rand(2, 3, 8, 4, generator=torch.Generator().manual_seed(0))
    found = fold_patches(frames, patch)
    assert found.shape == (2, 3 * patch**2, 8 // patch, 4 // patch) and found.is_contiguous(memory_format=torch.channels_last)
    for k in range(3 * patch**2):
        c, y, x = k // patch**2, k // patch % patch, k % patch
        assert torch.equal(found[:, k], frames[:, c, y::patch, x::patch])


class Brighter(FramePredictor):
    config_class = FramePredictorConfig

    def __init__(self, config):
        super().__init__(config)
        self.step = nn.Parameter(torch.tensor(0.4))

    def rolled(self, context, frames):
        return torch.stack([context[:, -1] + k * self.step for k in range(1, frames + 1)], 1)


def test_a_subclass_says_only_how_it_rolls():
    model, frames = Brighter(FramePredictorConfig(image_size=8, context_frames=2, future_frames=3)), torch.full((2, 5, 1, 8, 8), 0.5)
    outputs = model({"frames": frames})
    assert outputs["prediction"].shape == (2, 3, 1, 8, 8) and model.num_parameters == 1
    torch.testing.assert_close(outputs["prediction"].detach()[0, :, 0, 0, 0], torch.tensor([0.9, 1.3, 1.7]))  # not cut
    torch.testing.assert_close(model.loss(outputs, {"frames": frames})["loss"].detach(), torch.tensor([0.16, 0.64, 1.44]).mean())
    assert model.predict(frames, 4)[0, :, 0, 0, 0].tolist() == pytest.approx([0.9, 1, 1, 1])  # cut
    with pytest.raises(ConfigError, match="frames: got 0"):
        model.predict(frames, 0)
    with pytest.raises(ConfigError, match="multiple of patch_size=4"):
        FramePredictorConfig(image_size=30)
