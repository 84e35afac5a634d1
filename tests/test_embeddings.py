"""FrameEmbedder: the matrix of layers, poolings and precisions against timm, the fingerprint, bad input."""
import hashlib
import json

import pytest
import torch
from torch import nn

from fvlm.core import ConfigError, InputError, NonFiniteError, ShapeError
from fvlm.encoders import embeddings
from fvlm.encoders.embeddings import FrameEmbedder, Preprocessing, fast_dtype, state_sha256


def clip(t=5, h=40, w=56, seed=0):
    return torch.randint(0, 256, (t, h, w, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def as_batch(video):
    return video.permute(0, 3, 1, 2)[None].float() / 255


class Cnn(nn.Module):
    num_features = 6

    def __init__(self):
        super().__init__()
        self.conv, self.drop = nn.Conv2d(3, 6, 4, stride=4), nn.Dropout(0.5)

    def forward_features(self, x):
        return self.drop(self.conv(x))


class ChannelsLast(Cnn):
    def forward_features(self, x):
        return super().forward_features(x).permute(0, 2, 3, 1)


@pytest.mark.parametrize("layer", [None, 1, 2])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_every_layer_and_pooling_equals_timm_with_the_final_norm(layer, pooling):
    embedder, video = FrameEmbedder.tiny(layer=layer, pooling=pooling), clip()
    model = embedder.model
    x = model._pos_embed(model.patch_embed(embedder.preprocessing(video.permute(0, 3, 1, 2))))
    for block in model.blocks[: layer or 2]:
        x = block(x)
    x = model.norm(x)
    expected = x[:, 0] if pooling == "cls" else x[:, 1:].mean(1)
    torch.testing.assert_close(embedder(video)[0], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(embedder.patches(video)[0], x[:, 1:], atol=1e-5, rtol=1e-5)


def test_preprocessing_is_the_named_one():
    video = clip(2, 50, 30)
    x = video.permute(0, 3, 1, 2).float() / 255
    expected = nn.functional.interpolate(x, size=(32, 32), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    expected = (expected - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    torch.testing.assert_close(Preprocessing(size=32)(video.permute(0, 3, 1, 2)), expected)


def test_large_frames_are_resized_in_parts_with_the_same_result(monkeypatch):
    video = clip(7).permute(0, 3, 1, 2)
    whole = Preprocessing(size=32)(video)
    monkeypatch.setattr(embeddings, "RESIZE_PIXELS", 1)
    assert torch.equal(Preprocessing(size=32)(video), whole)


def test_bytes_floats_batches_and_batch_sizes_agree():
    embedder, video = FrameEmbedder.tiny(), clip(6)
    reference = embedder(video)
    assert reference.shape == (1, 6, 32) and reference.dtype == torch.float32
    batch = as_batch(video)
    for other in (embedder(batch), embedder(video.permute(0, 3, 1, 2)[None]), embedder(batch.view(2, 3, *batch.shape[2:])).view(1, 6, 32), embedder(batch.double())):
        torch.testing.assert_close(other, reference, atol=1e-5, rtol=1e-5)
    embedder.batch_frames = 4
    torch.testing.assert_close(embedder(video), reference, atol=1e-5, rtol=1e-5)


def test_frames_do_not_see_each_other():
    embedder, video = FrameEmbedder.tiny(), clip(4)
    before = embedder(video)
    video[2] = 255 - video[2]
    after = embedder(video)
    assert torch.equal(before[:, [0, 1, 3]], after[:, [0, 1, 3]]) and not torch.equal(before[:, 2], after[:, 2])


def test_it_stays_frozen_and_its_output_may_be_trained_on():
    embedder = FrameEmbedder.tiny()
    outer = nn.Sequential(embedder, nn.Linear(32, 1)).train()
    assert not any(module.training for module in embedder.modules()) and not any(p.requires_grad for p in embedder.parameters())
    outer(as_batch(clip())).sum().backward()
    assert outer[1].weight.grad is not None and all(p.grad is None for p in embedder.parameters())


def test_bf16_is_close_and_comes_out_as_float32():
    exact, rough = FrameEmbedder.tiny()(clip()), FrameEmbedder.tiny(dtype="bf16")(clip())
    assert rough.dtype == torch.float32
    assert 0 < float((exact - rough).norm() / exact.norm()) < 0.03


def test_auto_names_what_it_chose(monkeypatch):
    assert fast_dtype() in ("fp32", "bf16") and FrameEmbedder.tiny(dtype="auto").dtype == fast_dtype() and fast_dtype("meta") == "fp32"
    for chosen in ("fp32", "bf16"):
        monkeypatch.setattr(embeddings, "fast_dtype", lambda device="cpu": chosen)
        assert FrameEmbedder.tiny(dtype="auto").dtype == chosen


def test_auto_keeps_a_cnn_in_float32(monkeypatch):
    monkeypatch.setattr("fvlm.encoders.embeddings.fast_dtype", lambda device="cpu": "bf16")
    assert FrameEmbedder(Cnn(), name="cnn", preprocessing=Preprocessing(size=16), pooling="mean").dtype == "fp32"
    assert FrameEmbedder.tiny(dtype="auto").dtype == "bf16"


def test_a_cnn_gives_the_spatial_mean():
    embedder, video = FrameEmbedder(Cnn(), name="cnn", preprocessing=Preprocessing(size=16), pooling="mean", dtype="fp32"), clip()
    expected = embedder.model.conv(embedder.preprocessing(video.permute(0, 3, 1, 2)))
    torch.testing.assert_close(embedder(video)[0], expected.mean((2, 3)), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(embedder.patches(video)[0], expected.flatten(2).transpose(1, 2))


# the fingerprint


def variants():
    yield FrameEmbedder.tiny()
    yield FrameEmbedder.tiny(seed=1)
    yield FrameEmbedder.tiny(layer=1)
    yield FrameEmbedder.tiny(pooling="mean")
    yield FrameEmbedder.tiny(dtype="bf16")
    model = FrameEmbedder.tiny().model
    for changes in (dict(preprocessing=Preprocessing(size=32, interpolation="bilinear")), dict(preprocessing=Preprocessing(size=32, mean=(0.5, 0.5, 0.5))), dict(positions="other"), dict(weights_sha256="0" * 64)):
        yield FrameEmbedder(model, **(dict(name="random_tiny", preprocessing=Preprocessing(size=32), dtype="fp32") | changes))
    yield FrameEmbedder(model, name="other_name", preprocessing=Preprocessing(size=32), dtype="fp32")


def test_every_choice_is_in_the_fingerprint(monkeypatch):
    prints = [embedder.fingerprint for embedder in variants()]
    assert len(set(prints)) == len(prints)
    assert [embedder.fingerprint for embedder in variants()] == prints
    monkeypatch.setattr(FrameEmbedder, "code_version", "0")
    assert FrameEmbedder.tiny().fingerprint != prints[0]


def test_the_fingerprint_is_a_hash_of_plain_data_and_of_nothing_else():
    about = FrameEmbedder.tiny().about
    assert json.loads(json.dumps(about)) == {**about, "preprocessing": {k: list(v) if isinstance(v, tuple) else v for k, v in about["preprocessing"].items()}}
    assert FrameEmbedder.tiny().fingerprint == hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def test_the_last_layer_by_number_and_by_default_are_one():
    assert FrameEmbedder.tiny(layer=2).fingerprint == FrameEmbedder.tiny().fingerprint


def test_a_weight_that_changes_changes_the_hash():
    model = FrameEmbedder.tiny().model
    before = state_sha256(model)
    with torch.no_grad():
        model.blocks[1].mlp.fc2.bias[3] += 1e-6
    assert state_sha256(model) != before


def test_building_one_touches_no_global_state():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    threads = torch.get_num_threads()
    embedder = FrameEmbedder.tiny()
    embedder(clip())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    assert FrameEmbedder.tiny().fingerprint == embedder.fingerprint
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("registers", [0, 3])
def test_a_transformer_without_a_class_token_gives_its_patches(registers):
    from timm.models.vision_transformer import VisionTransformer

    with torch.random.fork_rng():
        model = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0, class_token=False, reg_tokens=registers, global_pool="avg")
    with pytest.raises(ConfigError, match="no class token"):
        FrameEmbedder(model, name="patches only", preprocessing=Preprocessing(size=32), dtype="fp32")
    embedder, video = FrameEmbedder(model, name="patches only", preprocessing=Preprocessing(size=32), pooling="mean", dtype="fp32"), clip()
    expected = model.forward_features(embedder.preprocessing(video.permute(0, 3, 1, 2)))[:, registers:]
    torch.testing.assert_close(embedder.patches(video)[0], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(embedder(video)[0], expected.mean(1), atol=1e-5, rtol=1e-5)


def test_frames_that_require_gradients_are_taken_without_a_warning():
    import warnings

    frames = as_batch(clip()).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flat, _ = embeddings.as_frames(frames)
    assert flat.requires_grad


# bad input


@pytest.mark.parametrize("frames, error, what", [
    (as_batch(clip()) * 255, InputError, r"expected \[0, 1\]"),
    (as_batch(clip()) - 0.5, InputError, r"expected \[0, 1\]"),
    (as_batch(clip()).fill_(float("nan")), NonFiniteError, "NaN or Inf"),
    (as_batch(clip()).index_fill(1, torch.tensor([2]), float("inf")), NonFiniteError, "NaN or Inf"),
    (as_batch(clip())[0], ShapeError, r"\(B,T,3,H,W\)"),
    (as_batch(clip())[:, :, :1], ShapeError, r"\(B,T,3,H,W\)"),
    (clip()[:0], ShapeError, "not empty"),
    (clip().float(), ShapeError, r"\(B,T,3,H,W\)"),
    (as_batch(clip()).long(), InputError, "uint8 or float"),
    (clip().numpy(), InputError, "torch tensor"),
], ids=range(10))
def test_bad_frames_are_named(frames, error, what):
    with pytest.raises(error, match="frames.*" + what):
        FrameEmbedder.tiny()(frames)


@pytest.mark.parametrize("build, what", [
    (lambda: FrameEmbedder.tiny(layer=0), "layer"),
    (lambda: FrameEmbedder.tiny(layer=3), "layer"),
    (lambda: FrameEmbedder.tiny(pooling="max"), "pooling"),
    (lambda: FrameEmbedder.tiny(dtype="fp8"), "dtype"),
    (lambda: FrameEmbedder(Cnn(), name="cnn"), "pooling"),
    (lambda: FrameEmbedder(Cnn(), name="cnn", pooling="mean", layer=2), "layer"),
    (lambda: FrameEmbedder(nn.Linear(3, 3), name="linear"), "model"),
    (lambda: Preprocessing(size=0), "size"),
    (lambda: Preprocessing(interpolation="nearest"), "interpolation"),
    (lambda: Preprocessing(fit="crop"), "fit"),
    (lambda: Preprocessing(std=(1.0, 0.0, 1.0)), "std"),
    (lambda: FrameEmbedder.from_pretrained("dinov2_smal"), "name"),
])
def test_bad_choices_are_named(build, what):
    with pytest.raises((ConfigError, InputError), match=what):
        build()


def test_a_map_with_the_channels_elsewhere_is_refused():
    with pytest.raises(ShapeError, match="forward_features"):
        FrameEmbedder(ChannelsLast(), name="cnn", pooling="mean", dtype="fp32", preprocessing=Preprocessing(size=16))(clip())
