"""Cubes from models: a transformer's own weights, both passes of a foveated model, windows over time, and what has no attention to show."""
import numpy as np
import pytest
import timm
import torch

from fvlm.core import ConfigError, InputError, ShapeError
from fvlm.encoders.embeddings import FrameEmbedder
from fvlm.encoders.keys_values import VisionEncoder
from fvlm.instruments.attention_cube import Cells
from fvlm.instruments.model_cubes import attention_used, cubes_of, from_fvlm, from_sc_vfp, from_vit, over_windows
from fvlm.models.foveated_vlm import FoveatedVLM
from fvlm.models.sc_vfp import SCVFP


def clip(frames=2, height=30, width=40, seed=0):
    return torch.randint(0, 256, (frames, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def by_the_block(vit, images, layer):
    "What a block's attention put out, and the values and projection it used."
    seen = {}
    attn = vit.blocks[layer].attn
    hook = attn.register_forward_hook(lambda module, given, out: seen.update(into=given[0], out=out))
    with torch.inference_mode():
        vit.forward_features(images)
    hook.remove()
    return attn, seen


@pytest.mark.parametrize("options", [dict(), dict(qk_norm=True), dict(class_token=False, global_pool="avg"), dict(reg_tokens=2), dict(num_heads=1)])
def test_weights_times_values_are_the_blocks_own_output(options):
    torch.manual_seed(0)
    vit = timm.models.vision_transformer.VisionTransformer(**{"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 0, **options}).eval()
    for p in vit.parameters():
        torch.nn.init.normal_(p, std=0.4)
    images = torch.randn(2, 3, 32, 32)
    weights = attention_used(vit, images)
    assert len(weights) == 2 and weights[0].shape == (2, options.get("num_heads", 4), 16 + vit.num_prefix_tokens, 16 + vit.num_prefix_tokens)
    for layer in range(2):
        attn, seen = by_the_block(vit, images, layer)
        with torch.inference_mode():
            v = attn.qkv(seen["into"]).unflatten(-1, (3, attn.num_heads, attn.head_dim))[:, :, 2].transpose(1, 2)
            out = attn.proj((weights[layer] @ v).transpose(1, 2).flatten(2))
        assert torch.allclose(out, seen["out"], atol=1e-4, rtol=1e-4)
        assert attn.fused_attn and not attn.attn_drop._forward_pre_hooks


def test_other_transformers_of_timm_show_their_weights():
    "Rotary positions, relative biases and SwiGLU are whatever the module does before its softmax."
    for name in ("eva02_tiny_patch14_224", "beit_base_patch16_224"):
        vit = timm.create_model(name, pretrained=False, num_classes=0, img_size=56 if "eva" in name else 32).eval()
        cube = from_vit(vit, clip(1))
        assert cube.keys == cube.queries and cube.keys.prefix == ("CLS",) and np.allclose(cube.attention(0, 0).sum(-1), 1, atol=1e-5)


def test_a_transformer_keeps_its_mode_and_runs_a_frame_once():
    encoder = VisionEncoder.tiny(depth=3)
    encoder.model.train()
    runs = []
    encoder.model.register_forward_pre_hook(lambda *_: runs.append(1))
    hook = encoder.model.blocks[0].register_forward_pre_hook(lambda *_: runs.append(1))
    cube = from_vit(encoder, clip(3))
    assert len(runs) == 1 and encoder.model.training
    for layer in range(3):
        cube.attention(layer, 0), cube.attention(layer, 2)
    assert len(runs) == 2, "a frame that was seen once is not run again for its other layers"
    hook.remove()


def test_kept_frames_are_bounded():
    encoder = VisionEncoder.tiny(depth=1)
    cube, runs = from_vit(encoder, clip(4), keep_bytes=1), []
    encoder.model.blocks[0].register_forward_pre_hook(lambda *_: runs.append(1))
    for frame in (0, 1, 1, 0):
        cube.attention(0, frame)
    assert len(runs) == 2


def test_embedder_encoder_and_bare_model_agree():
    encoder = VisionEncoder.tiny()
    pictures = clip(2, 28, 28)
    bare = from_vit(encoder.model, pictures)
    assert np.allclose(from_vit(encoder, pictures).attention(1, 1), bare.attention(1, 1), atol=1e-6)
    assert from_vit(FrameEmbedder.tiny(), clip(2)).keys == Cells.grid(4, 4, prefix=1)


def test_models_without_one_grid_of_patches_are_refused():
    with pytest.raises(InputError, match="expected a vision transformer of timm"):
        from_vit(timm.create_model("resnet18", pretrained=False), clip(1))
    swin = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False, num_classes=0)
    with pytest.raises(InputError):
        from_vit(swin, clip(1))


def test_both_passes_of_a_foveated_model():
    model = FoveatedVLM.tiny(num_queries=2).eval()
    with torch.inference_mode():
        outputs = model({"frames": torch.rand(2, 3, 3, 28, 28)}, passes="both", intermediates=True)
    coarse, fine = from_fvlm(outputs, grid=model.encoder.grid, clip=1)
    assert (coarse.name, fine.name, fine.queries, fine.keys) == ("coarse", "fine", Cells.tokens(2), Cells.grid(4, 4, prefix=1))
    assert (fine.layers, fine.frames, fine.heads) == (2, 3, 2)
    assert np.allclose(fine.attention(1, 2), outputs["attention"][1][1, 2], atol=1e-6) and np.allclose(coarse.attention(0, 1), outputs["attention_coarse"][0][1, 1], atol=1e-6)
    (alone,) = from_fvlm({"attention": outputs["attention"]}, grid=model.encoder.grid)
    assert alone.name == "fine"
    with pytest.raises(InputError, match="intermediates=True"):
        from_fvlm({"hidden": None}, grid=(4, 4))
    with pytest.raises(ShapeError, match="fewer than the 9 x 9"):
        from_fvlm(outputs, grid=(9, 9))


def test_sc_vfp_over_time():
    model = SCVFP.tiny().eval()
    outputs = model({"embeddings": torch.randn(3, 5, 16)}, intermediates=True)
    cube = from_sc_vfp(outputs)
    assert (cube.layers, cube.frames, cube.heads, cube.keys) == (2, 3, 2, Cells.time(5)) and cube.seen[2] == (2, 3, 4, 5, 6)
    assert np.allclose(cube.attention(1, 2), outputs["attention"][1][2].detach(), atol=1e-6)
    assert from_sc_vfp(outputs["attention"], seen=np.arange(15).reshape(3, 5) * 2).seen[1] == (10, 12, 14, 16, 18)
    with pytest.raises(ShapeError, match="seen"):
        from_sc_vfp(outputs, seen=np.zeros((2, 5)))
    with pytest.raises(InputError, match="intermediates=True"):
        from_sc_vfp({"prediction": None})
    with pytest.raises(ShapeError, match=r"\(B,heads,M,M\)"):
        from_sc_vfp([torch.rand(2, 3, 4)])


def test_every_window_of_a_clip():
    model = SCVFP.tiny().eval()
    rows, M = torch.randn(11, 16), model.config.context_frames
    cube, labels = over_windows(model, rows, gap=2)
    assert cube.frames == len(labels) == 11 - 2 * (M - 1) and cube.seen[1] == tuple(range(1, 2 * M, 2)) and labels[1] == f"2 to {2 * M}"
    alone = model({"embeddings": rows[None, 1:2 * M:2]}, intermediates=True)["attention"][1][0]
    assert np.allclose(cube.attention(1, 1), alone.detach(), atol=1e-6)
    assert over_windows(model, rows[:M], names=[10 * i for i in range(M)])[1] == [f"0 to {10 * (M - 1)}"]
    with pytest.raises(InputError, match=f"clip: 11 frames, a window needs {3 * (M - 1) + 1} "):
        over_windows(model, rows, gap=3)
    with pytest.raises(ConfigError, match="gap"):
        over_windows(model, rows, gap=0)


def test_a_model_is_known_by_what_it_has():
    encoder, foveated = VisionEncoder.tiny(), FoveatedVLM.tiny()
    foveated.train()
    (patches,), none = cubes_of(encoder, clip(2))
    assert (patches.name, none) == ("patch to patch", None)
    cubes, none = cubes_of(foveated, clip(3, 28, 28))
    assert [cube.name for cube in cubes] == ["coarse", "fine"] and none is None and foveated.training, "the model is left in the mode it was in"
    with pytest.raises(InputError, match="embedder: SC-VFP sees embeddings"):
        cubes_of(SCVFP.tiny(), clip(9))
