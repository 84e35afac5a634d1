"""Contracts of the rivals: shapes, horizons, no peeking, learning, saving, bad input, beside the rows that learn nothing."""
import dataclasses

import pytest
import torch

from fvlm.core import ConfigError, InputError, NonFiniteError, ShapeError
from fvlm.models.frame_predictor import PixelCopyLast, PixelLinear
from fvlm.models.rivals import RIVALS, ConvLSTM, ConvLSTMConfig, SimVP, SimVPConfig
from fvlm.training.loop import TrainConfig, train

MODELS = [ConvLSTM, SimVP]


def clips(n=4, T=8, C=1, size=16, seed=0):
    draw, found = torch.Generator().manual_seed(seed), torch.zeros(n, T, C, size, size)
    for clip in found:
        x, y = torch.randint(0, size - 8, (2,), generator=draw).tolist()
        for t in range(T):
            clip[t, :, y : y + 5, x + t // 2 : x + t // 2 + 4] = 1.0
    return found


class Clips:
    def __init__(self, frames):
        self.frames = frames

    def __len__(self):
        return len(self.frames)

    def batch(self, indices):
        return {"frames": self.frames[indices]}


@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize("C, context, future", [(1, 3, 2), (3, 1, 1), (1, 2, 5)])
def test_shapes_and_horizons(model_class, C, context, future):
    model, frames = model_class.tiny(channels=C, context_frames=context, future_frames=future).eval(), clips(C=C)
    assert model({"frames": frames})["prediction"].shape == (4, future, C, 16, 16)
    assert model({"frames": frames}, future_frames=7)["prediction"].shape == (4, 7, C, 16, 16)
    far = model.predict(frames[:, :context], 11)
    assert far.shape == (4, 11, C, 16, 16) and 0 <= far.min() and far.max() <= 1 and not far.requires_grad
    assert torch.equal(far[:, :2], model.predict(frames[:, :context], 2))
    assert torch.equal(model.predict(frames, 2), model.predict(frames[:, -context:], 2))


@pytest.mark.parametrize("model_class", MODELS)
def test_the_future_is_not_looked_at_and_clips_are_alone(model_class):
    model, frames = model_class.tiny().eval(), clips()
    other = frames.clone()
    other[:, 3:] = torch.rand_like(other[:, 3:])
    other[1, :3] = 0.5
    a, b = model({"frames": frames})["prediction"], model({"frames": other})["prediction"]
    assert torch.equal(a[2:], b[2:]) and not torch.equal(a[1], b[1])
    frames = frames.requires_grad_()
    model({"frames": frames})["prediction"].square().sum().backward()
    assert not frames.grad[:, 3:].any() and all(frames.grad[:, t].any() for t in range(3))


@pytest.mark.parametrize("model_class", MODELS)
def test_beyond_the_trained_horizon_it_is_fed_its_own_predictions(model_class):
    model, frames = model_class.tiny(future_frames=1, context_frames=1).eval(), clips()
    first = model.rolled(frames[:, :1], 1)
    if model_class is SimVP:  # without a state, one frame on is the same as starting again from the prediction
        assert torch.allclose(model.rolled(frames[:, :1], 2)[:, 1:], model.rolled(first.clamp(0, 1), 1), atol=1e-6)
    assert not torch.equal(model.rolled(frames[:, :1], 2)[:, 1], first[:, 0])


@pytest.mark.parametrize("model_class", MODELS)
def test_every_parameter_gets_a_gradient_and_it_learns(model_class, tmp_path):
    model, data = model_class.tiny(), {"train": Clips(clips(32)), "val": Clips(clips(8, seed=1))}
    batch = data["train"].batch(torch.arange(4))
    model.loss(model(batch), batch)["loss"].backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    model.zero_grad()
    result = train(model, data, TrainConfig(steps=40, batch_size=16, learning_rate=1e-2, val_every=20), out=tmp_path, progress=False)
    assert result.best_metric < 0.7 * float(data["val"].frames.square().mean()) and result.history[-1]["step"] == 40


@pytest.mark.parametrize("model_class", MODELS)
def test_the_loss_is_the_mean_squared_error_of_the_right_frames(model_class):
    model, frames = model_class.tiny(), clips()
    prediction = frames[:, 3:5] + 0.5
    assert float(model.loss({"prediction": prediction}, {"frames": frames})["loss"]) == pytest.approx(0.25)


@pytest.mark.parametrize("model_class", MODELS)
def test_saved_and_read_again(model_class, tmp_path):
    model, frames = model_class.tiny(seed=2), clips()
    model.save_pretrained(tmp_path)
    again = model_class.from_pretrained(tmp_path)
    assert again.config == model.config and torch.equal(again.predict(frames, 4), model.eval().predict(frames, 4))
    assert not torch.equal(model_class.tiny(seed=3).eval().predict(frames, 4), model.predict(frames, 4))


@pytest.mark.parametrize("model_class", MODELS)
def test_bfloat16(model_class):
    model, batch = model_class.tiny(), {"frames": clips()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.loss(model(batch), batch)["loss"]
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_parameters_on_paper():
    config = ConvLSTMConfig()
    gates = [(16 + 64) * 9 * 256 + 256, 128 * 9 * 256 + 256]
    assert ConvLSTM(config).num_parameters == sum(gates) + 64 * 16 + 16
    assert {name: config_class for name, (_, config_class) in RIVALS.items()} == {"conv_lstm": ConvLSTMConfig, "simvp": SimVPConfig}


def rejected(error, text, call):
    with pytest.raises(error, match=text) as caught:
        call()
    assert isinstance(caught.value, InputError) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("predictor", [ConvLSTM.tiny(), SimVP.tiny(), PixelCopyLast(), PixelLinear()], ids=["conv_lstm", "simvp", "copy_last", "linear"])
def test_bad_contexts(predictor):
    good = clips()[:, :3]
    rejected(InputError, "at least one frame", lambda: predictor.predict(good[:, :0], 2))
    rejected(ShapeError, "5 axes", lambda: predictor.predict(good[0], 2))
    rejected(InputError, "divide bytes", lambda: predictor.predict((good * 255).byte(), 2))
    rejected(NonFiniteError, "NaN or Inf", lambda: predictor.predict(good.index_fill(1, torch.tensor([1]), float("inf")), 2))
    rejected(ConfigError, "frames: got 0", lambda: predictor.predict(good, 0))
    if hasattr(predictor, "config"):
        rejected(ShapeError, "axis W should be 16", lambda: predictor.predict(good[..., :8], 2))
        rejected(ShapeError, "axis C should be 1", lambda: predictor.predict(good.expand(-1, -1, 3, -1, -1), 2))
        rejected(InputError, "got 2 frames, expected at least the 3", lambda: predictor.predict(good[:, :2], 2))
        rejected(InputError, 'expected a dict with "frames"', lambda: predictor({"clips": good}))
        rejected(InputError, "3 of the context and the 2", lambda: predictor.loss(predictor({"frames": good}), {"frames": good}))
        rejected(ConfigError, "future_frames", lambda: predictor({"frames": good}, future_frames=0))


@pytest.mark.parametrize("config_class, changes, text", [
    (ConvLSTMConfig, {"context_frames": 0}, "context_frames"), (SimVPConfig, {"context_frames": 0}, "context_frames"), (SimVPConfig, {"future_frames": 0}, "future_frames"),
    (ConvLSTMConfig, {"image_size": 30}, "multiple of patch_size"), (SimVPConfig, {"image_size": 18, "patch_size": 3, "width": 8}, None), (SimVPConfig, {"image_size": 6}, "multiple of 2 x"),
    (ConvLSTMConfig, {"kernel_size": 4}, "odd"), (ConvLSTMConfig, {"widths": ()}, "widths"), (ConvLSTMConfig, {"widths": (0,)}, "widths"), (SimVPConfig, {"depth": -1}, "depth"), (SimVPConfig, {"dept": 1}, "did you mean 'depth'"),
])
def test_bad_configurations(config_class, changes, text):
    if text is None:
        assert dataclasses.asdict(config_class.from_dict(changes))["patch_size"] == 3
    else:
        rejected(ConfigError, text, lambda: config_class.from_dict(changes))
