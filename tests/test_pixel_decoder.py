"""The decoder of embeddings: shapes, gradients, what it refuses, and its file."""

import pytest
import torch

from fvlm.core import ConfigError, InputError, NonFiniteError, ShapeError, WeightsError
from fvlm.models.pixel_decoder import PRESETS, PixelDecoder, PixelDecoderConfig


def batch_for(config, n=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    batch = {"vector": torch.randn(n, config.embed_dim, generator=draw), "frame": torch.rand(n, config.channels, config.image_size, config.image_size, generator=draw)}
    if config.grid:
        batch["patches"] = torch.randn(n, config.grid[0] * config.grid[1], config.embed_dim, generator=draw)
    return batch


CONFIGS = {
    "tiny": PixelDecoderConfig.preset("tiny"),
    "vector": PixelDecoderConfig.preset("tiny", grid=None),
    "grid of the first map": PixelDecoderConfig.preset("tiny", grid=(4, 4)),
    "uneven grid": PixelDecoderConfig.preset("tiny", grid=(2, 3)),
    "grey": PixelDecoderConfig.preset("tiny", channels=1),
    "one width": PixelDecoderConfig.preset("tiny", widths=(8,)),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_frame_of_the_asked_size_in_the_unit_range_and_every_part_trains(config):
    model, batch = PixelDecoder(config), batch_for(config)
    outputs = model(batch)
    assert outputs["prediction"].shape == batch["frame"].shape
    assert outputs["prediction"].min() >= 0 and outputs["prediction"].max() <= 1
    assert [tuple(m.shape[1:]) for m in outputs["maps"]] == [(w, config.coarsest * 2**i, config.coarsest * 2**i) for i, w in enumerate(config.widths)]
    terms = model.loss(outputs, batch)
    assert terms["loss"].item() == pytest.approx((outputs["prediction"] - batch["frame"]).square().mean().item())
    terms["loss"].backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_the_sizes_of_the_presets():
    assert {name: PixelDecoder(PixelDecoderConfig.preset(name)).num_parameters for name in PRESETS}["dino64"] > 1_000_000
    assert PixelDecoder(PixelDecoderConfig.preset("dino64")).num_parameters < 3_000_000
    assert PixelDecoder.tiny().num_parameters < 20_000


def test_frozen_it_passes_gradients_on_and_keeps_none():
    model = PixelDecoder.tiny()
    batch = batch_for(model.config)
    model.loss(model(batch), batch)["loss"].backward()
    model.frozen()
    assert not model.training and all(p.grad is None and not p.requires_grad for p in model.parameters())
    asked = {**batch, "vector": batch["vector"].clone().requires_grad_(), "patches": batch["patches"].clone().requires_grad_()}
    model.loss(model(asked), asked)["loss"].backward()
    assert asked["vector"].grad.abs().sum() > 0 and asked["patches"].grad.abs().sum() > 0
    assert all(p.grad is None for p in model.parameters())


def test_the_gradient_on_the_vector_is_the_derivative():
    model = PixelDecoder(PixelDecoderConfig.preset("tiny", grid=None)).double().frozen()
    frame = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        model.modulate.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    error = lambda v: (torch.nn.functional.pixel_shuffle(_raw(model, v), 2).sigmoid() - frame).square().mean()
    assert torch.autograd.gradcheck(error, (x,))


def _raw(model, vector):
    "The same path as `forward` in float64, which casts to float32 before the sigmoid."
    z = model.mix(model.lay_out(vector).unflatten(-1, (model.config.laid_out, 4, 4)))
    turns = model.modulate(vector)[..., None, None].split([2 * w for w in model.config.widths], 1)
    for stage, turn in zip((*model.stages, model.paint), turns):
        scale, shift = turn.chunk(2, 1)
        z = (1 + scale) * torch.nn.functional.gelu(z) + shift
        z = stage(z) if stage is model.paint else stage(torch.nn.functional.interpolate(z, scale_factor=2))
    return z


def test_forward_is_that_path():
    model = PixelDecoder(PixelDecoderConfig.preset("tiny", grid=None))
    with torch.no_grad():
        model.modulate.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    batch = batch_for(model.config)
    torch.testing.assert_close(model(batch)["prediction"], torch.nn.functional.pixel_shuffle(_raw(model, batch["vector"]), 2).sigmoid())


def test_patches_stay_in_their_places():
    model = PixelDecoder(PixelDecoderConfig.preset("tiny", image_size=32, grid=(8, 8))).eval()
    batch = {"vector": torch.zeros(1, 16), "patches": torch.zeros(1, 64, 16)}
    still = model(batch)["prediction"]
    moved = batch["patches"].clone()
    moved[0, 7] = 5.0  # top right, if row-major
    change = (model({**batch, "patches": moved})["prediction"] - still).detach().abs().sum((0, 1))
    assert change[:16, 16:].sum() > 0.99 * change.sum()


def test_a_seed_is_a_decoder():
    same = [PixelDecoder.tiny(seed=s).state_dict() for s in (3, 3, 4)]
    assert all(torch.equal(same[0][k], same[1][k]) for k in same[0])
    assert any(not torch.equal(same[0][k], same[2][k]) for k in same[0])
    before = torch.random.get_rng_state()
    PixelDecoder.tiny()
    assert torch.equal(before, torch.random.get_rng_state())


def test_saved_and_read_back(tmp_path):
    model = PixelDecoder.tiny(seed=5).eval()
    model.save_pretrained(tmp_path)
    again = PixelDecoder.from_pretrained(tmp_path)
    assert again.config == model.config and again.config.grid == (2, 2)
    batch = batch_for(model.config)
    assert torch.equal(model(batch)["prediction"], again(batch)["prediction"])
    (tmp_path / "model.safetensors").write_bytes(b"no numbers")
    with pytest.raises(WeightsError):
        PixelDecoder.from_pretrained(tmp_path)


GOOD = batch_for(CONFIGS["tiny"])


@pytest.mark.parametrize(("wrong", "error", "says"), [
    ({"vector": torch.zeros(3, 15)}, ShapeError, r'batch\["vector"\]: axis D should be 16, got 15'),
    ({"vector": torch.zeros(16)}, ShapeError, r'batch\["vector"\]'),
    ({"vector": torch.full((3, 16), float("nan"))}, NonFiniteError, r'batch\["vector"\]'),
    ({"patches": torch.zeros(3, 9, 16)}, ShapeError, r'batch\["patches"\]: axis P should be 4, got 9'),
    ({"patches": torch.zeros(2, 4, 16)}, ShapeError, r'batch\["patches"\]: axis B should be 3, got 2'),
    ({"patches": torch.full((3, 4, 16), float("inf"))}, NonFiniteError, r'batch\["patches"\]'),
])
def test_one_clear_error_names_the_input(wrong, error, says):
    with pytest.raises(error, match=says):
        PixelDecoder.tiny()({**GOOD, **wrong})


@pytest.mark.parametrize(("wrong", "error", "says"), [
    ({"frame": torch.zeros(3, 3, 64, 64)}, ShapeError, r'batch\["frame"\]: axis H should be 16, got 64'),
    ({"frame": torch.zeros(3, 1, 16, 16)}, ShapeError, r'batch\["frame"\]: axis C should be 3, got 1'),
    ({"frame": torch.full((3, 3, 16, 16), float("nan"))}, NonFiniteError, r'batch\["frame"\]'),
    ({"frame": torch.full((3, 3, 16, 16), 255.0)}, InputError, r"expected frames in \[0, 1\]"),
])
def test_one_clear_error_names_the_frame(wrong, error, says):
    model = PixelDecoder.tiny()
    with pytest.raises(error, match=says):
        model.loss(model(GOOD), {**GOOD, **wrong})


def test_missing_inputs_are_named():
    with pytest.raises(InputError, match="'vector' and 'patches'"):
        PixelDecoder.tiny()({"vector": GOOD["vector"]})
    with pytest.raises(InputError, match='expected "frame"'):
        PixelDecoder.tiny().loss({"prediction": GOOD["frame"]}, {})


@pytest.mark.parametrize("wrong", [dict(image_size=18), dict(grid=(2,)), dict(grid=4), dict(grid=(0, 2)), dict(widths=()), dict(widths=(0, 8)), dict(embed_dim=0), dict(channels=0), dict(width=3)])
def test_a_configuration_that_cannot_be(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        PixelDecoderConfig.preset("tiny", **wrong)
