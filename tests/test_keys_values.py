"""VisionEncoder and KeysValues: the encoder's own features and [CLS], layouts, streams, precision, training levels, fingerprints, bad input."""
import copy

import pytest
import torch
from torch import nn

from fvlm.core import ConfigError, InputError, NonFiniteError, ShapeError
from fvlm.encoders.embeddings import FrameEmbedder, Preprocessing
from fvlm.encoders.keys_values import KeysValues, VisionEncoder

TINY = dict(image_size=28, patch_size=7, embed_dim=32, depth=3, heads=2)


def frames(b=2, t=3, size=28, seed=0):
    return torch.rand(b, t, 3, size, size, generator=torch.Generator().manual_seed(seed))


def embedder_of(encoder, pooling="cls"):
    dtype = "fp32" if encoder.dtype == torch.float32 else "bf16"
    return FrameEmbedder(encoder.model, name=encoder.name, preprocessing=encoder.preprocessing, pooling=pooling, dtype=dtype)


def softmax(layer, scores):
    return scores.softmax(-1)


def walk(encoder, kept, state, weigh=softmax):
    maps = []
    for layer in range(encoder.depth):
        state, attention = encoder.query_step(layer, state, kept, weigh)
        maps.append(attention)
    return encoder.finish(state), maps


def vit(**changes):
    from timm.models.vision_transformer import VisionTransformer

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VisionTransformer(**dict(img_size=28, patch_size=7, embed_dim=32, depth=2, num_heads=2, num_classes=0) | changes)
        for name, value in model.state_dict().items():
            if "norm" not in name:
                value.normal_(0, 0.3)
    return model


# --- the encoder's own numbers ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", [{}, dict(qk_norm=True), dict(scale_attn_norm=True), dict(init_values=0.5), dict(reg_tokens=3), dict(pre_norm=True), dict(no_embed_class=True),
                                     dict(qkv_bias=False), dict(class_token=False, global_pool="avg")], ids=lambda c: ",".join(c) or "plain")
def test_features_are_the_embedders_and_a_cls_query_ends_as_cls(changes):
    model = vit(**changes)
    source = FrameEmbedder(model, name="variant", preprocessing=Preprocessing(size=28), pooling="mean", dtype="fp32")
    encoder, video = VisionEncoder(source), frames()
    kept = encoder.keys_values(video)
    own = model.forward_features(source.preprocessing(video.flatten(0, 1))).unflatten(0, (2, 3))
    torch.testing.assert_close(kept.patches, own[:, :, kept.prefix:], atol=1e-5, rtol=0)
    assert kept.keys.shape == kept.values.shape == (2, 3, 2, 2, model.num_prefix_tokens + 16, 16) and kept.prefix == model.num_prefix_tokens
    if model.cls_token is None:
        assert kept.cls is None and "cls" not in kept.as_batch()
        with pytest.raises(ConfigError, match="no class token"):
            encoder.cls_state()
        return
    torch.testing.assert_close(kept.patches, source.patches(video), atol=1e-5, rtol=0)
    torch.testing.assert_close(kept.cls, embedder_of(encoder)(video), atol=1e-5, rtol=0)
    end, _ = walk(encoder, kept, encoder.cls_state().expand(2, 3, 1, -1))
    torch.testing.assert_close(end[:, :, 0], kept.cls, atol=1e-4, rtol=0)
    assert not torch.allclose(walk(encoder, kept.without_prefix(), encoder.cls_state().expand(2, 3, 1, -1))[0][:, :, 0], kept.cls, atol=1e-3), "attention does nothing here"


def test_every_patch_token_walked_as_a_query_ends_as_that_patch():
    "The stronger oracle: all tokens at once as queries, each attending over all keys, are the encoder itself."
    encoder, video = VisionEncoder.tiny(**TINY), frames(1, 2)
    kept = encoder.keys_values(video)
    state = encoder._tokens(encoder.preprocessing(video[0]))[None]
    end, _ = walk(encoder, kept, state)
    torch.testing.assert_close(end[:, :, 1:], kept.patches, atol=1e-4, rtol=0)


def test_real_weights(pretrained_vit):
    encoder, video = VisionEncoder.from_pretrained(dtype="fp32"), frames(1, 2, 60)
    kept = encoder.keys_values(video)
    own = FrameEmbedder.from_pretrained("dinov2_small_saliency", dtype="fp32")
    torch.testing.assert_close(kept.patches, own.patches(video), atol=1e-5, rtol=0)
    with torch.no_grad():
        end, _ = walk(encoder, kept, encoder.cls_state().expand(1, 2, 1, -1))
    torch.testing.assert_close(end[:, :, 0], own(video), atol=1e-4, rtol=0)
    assert (encoder.embed_dim, encoder.depth, encoder.num_heads, encoder.head_dim, encoder.grid, encoder.prefix) == (384, 12, 6, 64, (16, 16), 1)
    assert VisionEncoder.from_pretrained(image_size=252, dtype="fp32").grid == (18, 18)
    with pytest.raises(ConfigError, match="image_size: got 225"):
        VisionEncoder.from_pretrained(image_size=225)


# --- layouts, streams, precision -------------------------------------------------------------------------------------

def test_frames_batches_chunks_and_streams_agree():
    encoder, video = VisionEncoder.tiny(**TINY), frames(2, 5)
    kept = encoder.keys_values(video)
    query = torch.randn(2, 5, 4, 32, generator=torch.Generator().manual_seed(1))
    whole, _ = walk(encoder, kept, query)
    stream = torch.cat([walk(encoder, encoder.keys_values(video[:, t:t + 1]), query[:, t:t + 1])[0] for t in range(5)], 1)
    torch.testing.assert_close(stream, whole, atol=1e-5, rtol=0)
    for i in range(4):  # queries do not see each other
        torch.testing.assert_close(walk(encoder, kept, query[:, :, i:i + 1])[0], whole[:, :, i:i + 1], atol=1e-5, rtol=0)
    encoder.batch_frames = 3
    for name, tensor in encoder.keys_values(video).as_batch().items():
        torch.testing.assert_close(tensor, kept.as_batch()[name], atol=1e-5, rtol=0, msg=name)
    part = kept.frames(slice(2, 4))
    assert torch.equal(part.keys, kept.keys[:, 2:4]) and torch.equal(part.cls, kept.cls[:, 2:4])
    decoded = (video[0].permute(0, 2, 3, 1) * 255).round().to(torch.uint8)
    torch.testing.assert_close(encoder.keys_values(decoded).keys, encoder.keys_values(decoded.permute(0, 3, 1, 2)[None].float() / 255).keys, atol=1e-5, rtol=0)


def test_one_frame_changed_changes_that_frame_alone():
    encoder, video = VisionEncoder.tiny(**TINY), frames(2, 4)
    before = encoder.keys_values(video)
    video[1, 2] = 1 - video[1, 2]
    after = encoder.keys_values(video)
    moved = (before.keys != after.keys).flatten(2).any(-1)
    assert moved.tolist() == [[False] * 4, [False, False, True, False]]


def test_a_batch_put_back_and_made_contiguous_gives_the_same():
    encoder = VisionEncoder.tiny(**TINY)
    kept = encoder.keys_values(frames())
    batch = {name: tensor.contiguous() for name, tensor in kept.as_batch().items()}
    back = KeysValues.from_batch(batch, prefix=encoder.prefix, grid=encoder.grid)
    query = torch.randn(2, 3, 2, 32)
    assert torch.allclose(walk(encoder, back, query)[0], walk(encoder, kept, query)[0], atol=1e-6)
    assert kept.layer(1)[0].is_contiguous() and back.layer(1)[0].is_contiguous() and back.keys.shape == kept.keys.shape and torch.equal(back.layer(1)[0], kept.layer(1)[0])
    bare = kept.without_prefix()
    assert bare.prefix == 0 and bare.cls is None and torch.equal(bare.keys, kept.keys[..., 1:, :]) and bare.keys.data_ptr() != kept.keys.data_ptr()
    assert torch.equal(bare.patches, kept.patches) and bare.without_prefix().keys.shape == bare.keys.shape


def test_bfloat16_storage_and_bfloat16_weights():
    exact, video = VisionEncoder.tiny(**TINY), frames()
    stored = exact.keys_values(video, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in stored.as_batch().values()} == {torch.bfloat16}
    for name, tensor in exact.keys_values(video).to(torch.bfloat16).as_batch().items():
        assert torch.equal(tensor, stored.as_batch()[name])
    query = torch.randn(2, 3, 2, 32, generator=torch.Generator().manual_seed(2))
    reference = walk(exact, exact.keys_values(video), query)[0]
    spread = (reference - reference.mean((0, 1, 2))).norm(dim=-1).mean()
    half = VisionEncoder.tiny(**TINY, dtype="bf16")
    torch.testing.assert_close(half.keys_values(video).patches.float(), embedder_of(half).patches(video), atol=1e-5, rtol=0)
    for encoder, kept in ((exact, stored), (half, half.keys_values(video)), (half, half.keys_values(video, dtype=torch.float32))):
        end, maps = walk(encoder, kept, query)
        assert end.dtype == torch.float32 and maps[0].dtype == torch.float32
        assert (end - reference).norm(dim=-1).mean() < 0.05 * spread
    with torch.autocast("cpu", torch.bfloat16):
        learned = query.clone().requires_grad_()
        end, _ = walk(exact, exact.keys_values(video), learned)
        end.float().square().sum().backward()
    assert (end.float() - reference).norm(dim=-1).mean() < 0.05 * spread and learned.grad.isfinite().all()


# --- frozen and trained ----------------------------------------------------------------------------------------------

def test_frozen_by_default_and_levels():
    encoder = VisionEncoder.tiny(**TINY)
    assert not any(p.requires_grad for p in encoder.parameters()) and not encoder.train().training
    names = {name for name, _ in encoder.model.named_parameters()}
    for level, expected in (("last:1", {n for n in names if n.startswith(("blocks.2.", "norm."))}), ("last:2", {n for n in names if n.startswith(("blocks.1.", "blocks.2.", "norm."))}),
                            ("all", names), ("none", set())):
        assert encoder.train_level(level) is encoder
        assert {name for name, p in encoder.model.named_parameters() if p.requires_grad} == expected
    assert encoder.train_level("all").train().training and not encoder.train_level("none").training


def test_gradients_reach_what_is_trained_and_equal_those_of_the_model_itself():
    encoder, video = VisionEncoder.tiny(**TINY).train_level("last:2"), frames(1, 2)
    kept = encoder.keys_values(video)
    assert kept.layer(1)[0].grad_fn is not None
    walk(encoder, kept, encoder.cls_state().expand(1, 2, 1, -1))[0].square().sum().backward()
    ours = {name: p.grad.clone() for name, p in encoder.model.named_parameters() if p.grad is not None}
    encoder.model.zero_grad()
    encoder.model.forward_features(encoder.preprocessing(video[0]))[:, 0].square().sum().backward()
    theirs = {name: p.grad for name, p in encoder.model.named_parameters() if p.grad is not None}
    assert set(ours) == set(theirs) and all(name.startswith(("blocks.1.", "blocks.2.", "norm.")) for name in ours)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-3, rtol=1e-3, msg=name)
    with torch.no_grad():
        assert not encoder.keys_values(video).keys.requires_grad


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
def test_a_frozen_encoder_makes_no_graph_unless_the_frames_ask_for_one():
    encoder, video = VisionEncoder.tiny(**TINY), frames(1, 2)
    kept = encoder.keys_values(video)
    assert not kept.keys.requires_grad and not kept.keys.is_inference()
    query = torch.randn(1, 2, 1, 32, requires_grad=True)
    walk(encoder, kept, query)[0].pow(3).sum().backward()
    assert query.grad.abs().sum() > 0 and all(p.grad is None for p in encoder.parameters())
    video.requires_grad_()
    encoder.keys_values(video).keys[:, 0].sum().backward()
    assert video.grad[:, 0].abs().sum() > 0 and not video.grad[:, 1].any()


# --- fingerprints ----------------------------------------------------------------------------------------------------

def test_building_one_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    VisionEncoder.tiny(**TINY)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_fingerprint_follows_the_weights():
    encoder = VisionEncoder.tiny(**TINY)
    assert encoder.fingerprint == VisionEncoder.tiny(**TINY).fingerprint == encoder.started_from
    others = [VisionEncoder.tiny(1, **TINY), VisionEncoder.tiny(**TINY, dtype="bf16"), VisionEncoder.tiny(**TINY | {"image_size": 35}), VisionEncoder.tiny(**TINY | {"heads": 4})]
    assert len({e.fingerprint for e in (encoder, *others)}) == 5
    encoder.train_level("all")
    assert encoder.fingerprint == encoder.started_from, "opened, not yet changed"
    with torch.no_grad():
        encoder.model.norm.bias.add_(0.1)
    assert encoder.train_level("none").fingerprint != encoder.started_from == VisionEncoder.tiny(**TINY).fingerprint


def test_loading_weights_changes_the_fingerprint_and_loading_none_does_not():
    encoder, other = VisionEncoder.tiny(**TINY), VisionEncoder.tiny(1, **TINY)
    whole = nn.ModuleDict({"encoder": encoder, "head": nn.Linear(2, 2)})
    whole.load_state_dict({name: value for name, value in whole.state_dict().items() if name.startswith("head")}, strict=False)
    assert encoder.fingerprint == encoder.started_from
    whole.load_state_dict({f"encoder.{name}": value for name, value in other.state_dict().items()}, strict=False)
    assert encoder.fingerprint != encoder.started_from == VisionEncoder.tiny(**TINY).fingerprint
    assert copy.deepcopy(encoder).fingerprint == encoder.fingerprint


# --- bad input -------------------------------------------------------------------------------------------------------

def test_bad_input():
    encoder, video = VisionEncoder.tiny(**TINY), frames()
    kept = encoder.keys_values(video)
    for error, pattern, wrong in (
        (ConfigError, "image_size: got 30, expected a multiple of patch_size 7", lambda: VisionEncoder.tiny(image_size=30)),
        (ConfigError, "embed_dim: got 33, expected a multiple of heads 2", lambda: VisionEncoder.tiny(embed_dim=33)),
        (ConfigError, "depth: got 0", lambda: VisionEncoder.tiny(depth=0)),
        (ConfigError, "level: got 'last:4', expected 'none', 'all' or 'last:N' with N in 1..3", lambda: encoder.train_level("last:4")),
        (ConfigError, "level: got 'last:'", lambda: encoder.train_level("last:")),
        (ConfigError, "level: got 'last:0'", lambda: encoder.train_level("last:0")),
        (ConfigError, "level: got 'some'", lambda: encoder.train_level("some")),
        (ConfigError, "level: 'all' needs float32 weights", lambda: VisionEncoder.tiny(dtype="bf16").train_level("all")),
        (InputError, "frames: float values from", lambda: encoder.keys_values(video * 255)),
        (ShapeError, "frames: expected", lambda: encoder.keys_values(video[0])),
        (NonFiniteError, "frames: hold NaN or Inf", lambda: encoder.keys_values(video / 0)),
        (ShapeError, "keys: hold 17 tokens a frame, expected 0 prefix tokens and 4 x 4 patches", lambda: KeysValues.from_batch(kept.as_batch(), prefix=0, grid=(4, 4))),
        (ShapeError, "values: got", lambda: KeysValues(kept.keys, kept.values[:, :2], 1, (4, 4))),
        (ShapeError, "keys: expected 6 axes", lambda: KeysValues(kept.keys[0], kept.values[0], 1, (4, 4))),
        (InputError, "batch: has no 'values', it holds 'keys'", lambda: KeysValues.from_batch({"keys": kept.keys}, prefix=1, grid=(4, 4))),
    ):
        with pytest.raises(error, match=pattern):
            wrong()


def test_other_architectures_are_refused():
    class Cnn(nn.Module):
        num_features = 4

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 4, stride=4)

        def forward_features(self, x):
            return self.conv(x)

    from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer

    parallel = VisionTransformer(img_size=28, patch_size=7, embed_dim=32, depth=1, num_heads=2, num_classes=0, block_fn=ParallelScalingBlock)
    for model in (Cnn(), parallel):
        with pytest.raises(ConfigError, match="queries cannot walk through it"):
            VisionEncoder(FrameEmbedder(model, name="other", preprocessing=Preprocessing(size=28), pooling="mean", dtype="fp32"))
