"""Latents: one interface for every codec, exact inversion of the weight-free one, where weights come from, one clear error each."""
import json
import math
import os

import pytest
import torch
from safetensors.torch import save_file

from fvlm.core import ConfigError, InputError, NonFiniteError, ShapeError, WeightsError, generator
from fvlm.encoders import latents as module
from fvlm.encoders.latents import CODEC_WEIGHTS, CODECS, LATENT_GRID, CodecWeights, DCTCodec, KLCodec, TinyCodec, load_codec, on_grid, resolve_codec
from fvlm.files import sha256_of
from fvlm.objectives.metrics import psnr

DATA = os.environ.get("FVLM_DATA")  # the real one, before the fixture below hides it


@pytest.fixture(autouse=True)
def nothing_around(tmp_path, monkeypatch):
    "An empty cache, no shared data and no hub."
    monkeypatch.setenv("FVLM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FVLM_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def photo(*lead, height=24, width=40, seed=0):
    "Soft random frames (*lead,3,H,W) in [0,1], with edges and saturated corners."
    draw = generator(seed, "photo")
    x = torch.nn.functional.interpolate(torch.rand(math.prod(lead), 3, 5, 7, generator=draw), size=(height, width), mode="bicubic").clamp(0, 1)
    x[:, :, : height // 3, : width // 3] = torch.rand(len(x), 3, 1, 1, generator=draw).round()
    return x.unflatten(0, lead)


MAKERS = {"dct": DCTCodec, "dct_grey": lambda: DCTCodec(grey=True), "tiny": TinyCodec.tiny, "kl": KLCodec.tiny}


@pytest.fixture(scope="module")
def made():
    return {name: make() for name, make in MAKERS.items()}


every = pytest.mark.parametrize("name", MAKERS)


# --- the interface ---------------------------------------------------------------------------------------------------

@every
def test_shapes_types_and_ranges(made, name):
    codec, frames = made[name], photo(2, 3)
    z = codec.encode(frames)
    assert z.shape == (2, 3, *codec.latent_shape((24, 40))) == (2, 3, 4, 3, 5) and z.dtype == torch.float32
    assert torch.equal(z, on_grid(z)) and z.abs().max() < 128 and not z.requires_grad
    back = codec.decode(z)
    assert back.shape == frames.shape and back.dtype == torch.float32 and 0 <= back.min() and back.max() <= 1
    wild = codec.decode(50 * z)
    assert 0 <= wild.min() and wild.max() <= 1


@every
def test_frames_do_not_see_each_other_and_batches_do_not_matter(made, name):
    codec, frames = made[name], photo(1, 5)
    whole = codec.encode(frames)
    codec.batch_frames, kept = 2, codec.batch_frames
    try:
        assert torch.allclose(codec.encode(frames), whole, atol=1e-4) and codec.psnr(frames) == pytest.approx(float(psnr(codec.decode(whole), frames, data_range=1)), abs=1e-2)
    finally:
        codec.batch_frames = kept
    assert torch.allclose(codec.encode(frames[:, 3:4]), whole[:, 3:4], atol=1e-4)
    assert torch.equal(codec.encode(frames), whole)  # the mean, not a sample


@every
def test_gradients_go_through_decode_and_stop_at_the_codec(made, name):
    codec = made[name]
    z = (0.1 * torch.randn(1, 1, 4, 2, 2, generator=generator(0, name))).requires_grad_()
    codec.decode(z).square().mean().backward()
    assert z.grad.abs().sum() > 0 and not any(p.requires_grad for p in codec.parameters())
    assert not codec.train().training


@every
@pytest.mark.parametrize(("frames", "error", "says"), [
    (torch.zeros(1, 1, 3, 20, 24), ConfigError, r"image_size: got \(20, 24\), expected multiples of 8"),
    (torch.zeros(1, 1, 3, 24, 33), ConfigError, "image_size: "),
    (torch.zeros(1, 3, 24, 24), ShapeError, "frames: expected 5 axes"),
    (torch.zeros(1, 1, 1, 24, 24), ShapeError, "frames: axis 3 should be 3"),
    (torch.zeros(1, 1, 3, 24, 24, dtype=torch.uint8), InputError, "frames: got torch.uint8"),
    (torch.full((1, 1, 3, 24, 24), 255.0), InputError, "frames: values run from"),
    (torch.full((1, 1, 3, 24, 24), -1.0), InputError, "frames: values run from"),
    (torch.full((1, 1, 3, 24, 24), float("nan")), NonFiniteError, "frames: "),
    (torch.zeros(1, 0, 3, 24, 24), InputError, "frames: .*empty"),
])
def test_bad_frames_are_one_error_naming_them(made, name, frames, error, says):
    for call in (made[name].encode, made[name].psnr):
        with pytest.raises(error, match=f"^{says}"):
            call(frames)


@every
@pytest.mark.parametrize(("z", "error"), [
    (torch.zeros(1, 1, 3, 4, 4), ShapeError), (torch.zeros(1, 4, 4, 4), ShapeError), (torch.zeros(1, 1, 4, 0, 4), ShapeError),
    (torch.zeros(1, 1, 4, 4, 4, dtype=torch.int64), ShapeError), (torch.full((1, 1, 4, 4, 4), float("inf")), NonFiniteError),
])
def test_bad_latents_are_one_error_naming_them(made, name, z, error):
    with pytest.raises(error, match="^latents: "):
        made[name].decode(z)


def test_fingerprints_tell_codecs_apart(made):
    others = [TinyCodec.tiny(seed=1), TinyCodec.tiny(dtype="bf16"), TinyCodec.tiny(scaling=0.5)]
    prints = [codec.fingerprint for codec in (*made.values(), *others)]
    assert len(set(prints)) == len(prints) and TinyCodec.tiny().fingerprint == made["tiny"].fingerprint
    assert all(codec.fingerprint[:12] in codec.describe() for codec in made.values())


def test_differences_of_latents_are_exact():
    a, b = on_grid(60 * torch.randn(2, 100_000, generator=generator(0, "grid"))).clamp(-127, 127)
    assert torch.equal(a + (b - a), b)
    for dtype in (torch.bfloat16, torch.float16):
        x, y = a.to(dtype).float(), b.to(dtype).float()
        assert torch.equal(x + (y - x), y)


# --- the weight-free codec -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_inverse_up_to_truncation(grey, seed):
    codec = DCTCodec(grey=grey)
    for frames in (photo(1, 2, seed=seed), torch.rand(1, 1, 3, 16, 16, generator=generator(seed, "noise")), torch.rand(1, 1, 3, 16, 16, generator=generator(seed, "poster")).round()):
        once = codec.decode(codec.encode(frames))
        assert (codec.decode(codec.encode(once)) - once).abs().max() < 1e-5


def test_the_coefficients_are_those_of_the_cosine_transform():
    from scipy.fft import dctn

    frames = 0.4 + 0.2 * torch.rand(1, 1, 3, 8, 8, generator=generator(0, "block"))  # far from black and white: nothing is shrunk
    y, cb, cr = (torch.einsum("c,chw->hw", torch.tensor(w), frames[0, 0]).double().numpy() for w in ([0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]))
    a, b, r = (dctn(plane, norm="ortho") / 8 for plane in (y, cb, cr))
    colour = [(a[0, 0] - 0.5) * 4, b[0, 0] * 16, r[0, 0] * 16, a[0, 1] * 32]
    grey = [(a[0, 0] - 0.5) * 4, a[0, 1] * 32, a[1, 0] * 32, a[2, 0] * 32]
    assert torch.allclose(DCTCodec().encode(frames).flatten().double(), torch.tensor(colour), atol=2 * LATENT_GRID)
    assert torch.allclose(DCTCodec(grey=True).encode(frames).flatten().double(), torch.tensor(grey), atol=2 * LATENT_GRID)


def test_flat_colours_survive_and_white_and_black_are_exact():
    colours = torch.tensor([[0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0.3, 0.6, 0.2]]).view(1, 6, 3, 1, 1).expand(1, 6, 3, 8, 16)
    assert (DCTCodec().decode(DCTCodec().encode(colours)) - colours).abs().max() < 1e-5
    assert DCTCodec().encode(colours)[0, :2, 0].unique().tolist() == [-2.0, 2.0]
    grey = DCTCodec(grey=True)
    assert torch.equal(grey.decode(grey.encode(colours[:, :2])), colours[:, :2]) and grey.psnr(colours[:, :1]) == math.inf


def test_the_grey_codec_decodes_to_grey():
    back = DCTCodec(grey=True).decode(DCTCodec(grey=True).encode(photo(1, 1)))
    assert torch.equal(back[:, :, 0], back[:, :, 1]) and torch.equal(back[:, :, 0], back[:, :, 2])


def test_photographs_keep_a_useful_quality():
    from fvlm.data.worlds import photograph

    frame = torch.tensor(photograph("china", 256)[:256, :256]).permute(2, 0, 1)[None, None]
    assert 18 < DCTCodec().psnr(frame) < 26 and 0.4 < DCTCodec().encode(frame).std() < 2


# --- the codecs with weights -----------------------------------------------------------------------------------------

def test_pixels_go_in_and_out_on_the_models_scale(made):
    class Echo(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.seen, self.weight = [], torch.nn.Parameter(torch.zeros(1))

        def encode(self, x):
            self.seen.append(x)
            z = torch.nn.functional.avg_pool2d(x, 8)
            return type("Out", (), {"latents": torch.cat([z, z[:, :1]], 1)})

        def decode(self, z):
            return type("Out", (), {"sample": torch.nn.functional.interpolate(z[:, :3], scale_factor=8)})

    echo = Echo()
    codec = TinyCodec(echo, name="echo", scaling=0.25)
    flat = torch.tensor([0.0, 0.5, 1.0]).view(1, 1, 3, 1, 1).expand(1, 1, 3, 8, 8)
    z = codec.encode(flat)
    assert [echo.seen[0].min(), echo.seen[0].max()] == [-1, 1] and z.flatten().tolist() == [-0.25, 0, 0.25, -0.25]
    assert torch.allclose(codec.decode(z), flat)


def test_the_mean_is_encoded_not_a_sample(made):
    frames = photo(1, 1)
    model = made["kl"].model
    mean = model.encode(frames[0] * 2 - 1).latent_dist.mean
    assert torch.allclose(made["kl"].encode(frames)[0], mean, atol=1e-4)


def test_bf16_is_near_and_says_so():
    frames = photo(1, 1)
    full, half = TinyCodec.tiny(), TinyCodec.tiny(dtype="bf16")
    difference = (full.encode(frames) - half.encode(frames)).abs().max()
    assert 0 < difference < 0.1 * full.encode(frames).std() + 0.02 and half.about["dtype"] == "bf16" and half.encode(frames).dtype == torch.float32


def test_building_a_codec_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    TinyCodec.tiny()
    KLCodec.tiny()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def small(monkeypatch, tmp_path):
    "Two small codecs by name, and a file with weights for each."
    files = {}
    for name, cls in (("taesd", TinyCodec), ("sd_vae_ft_mse", KLCodec)):
        record = CodecWeights(name=name, hub="nobody/nothing", config=cls.smallest, scaling=0.5)
        monkeypatch.setitem(CODEC_WEIGHTS, name, record)
        files[name] = tmp_path / f"{name}_given.safetensors"
        save_file({k: v.contiguous() for k, v in cls.tiny().model.state_dict().items()}, files[name])
    return files


@pytest.mark.parametrize(("name", "cls"), [("taesd", TinyCodec), ("sd_vae_ft_mse", KLCodec)])
def test_a_path_is_loaded_and_reported(small, name, cls):
    codec = load_codec(name, path=small[name])
    assert type(codec) is cls and codec.weights_sha256 == sha256_of(small[name]) and codec.scaling == 0.5
    assert codec.source.startswith(f"{name} from path:")
    frames = photo(1, 1)
    assert torch.allclose(codec.encode(frames), 0.5 * cls.tiny().encode(frames), atol=1e-4)


def test_eight_bit_files_and_older_names_are_understood(small, tmp_path):
    state = TinyCodec.tiny().model.state_dict()
    save_file({k: (v.to(torch.float8_e4m3fn) if v.ndim == 4 else v).contiguous() for k, v in state.items()}, tmp_path / "fp8.safetensors")
    codec = load_codec("taesd", path=tmp_path / "fp8.safetensors")
    assert {p.dtype for p in codec.model.parameters()} == {torch.float32} and torch.equal(codec.model.encoder.layers[0].weight, state["encoder.layers.0.weight"].to(torch.float8_e4m3fn).float())
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state, renamed = KLCodec.tiny().model.state_dict(), {}
    for key, value in state.items():
        for new, old in older.items():
            if f".{new}." in key:
                key, value = key.replace(new, old), value[..., None, None] if value.ndim == 2 else value
        renamed[key] = value.contiguous().clone()
    assert sum("query" in key for key in renamed) == 4
    save_file(renamed, tmp_path / "older.safetensors")
    codec = load_codec("sd_vae_ft_mse", path=tmp_path / "older.safetensors")
    assert all(torch.equal(value, state[key]) for key, value in codec.model.state_dict().items())


def test_the_order_is_path_cache_shared_data_hub(small, tmp_path, monkeypatch):
    monkeypatch.setitem(CODEC_WEIGHTS, "taesd", CodecWeights(name="taesd", hub="nobody/nothing", config=TinyCodec.smallest, scaling=1.0, shared_sha256=sha256_of(small["taesd"])))
    with pytest.raises(WeightsError, match=r"taesd: no weights found. Tried: path: none given; cache: not there; shared data: not there; hub: nobody/nothing: not fetched .*download=True.*path=.*FVLM_DATA.*'dct'"):
        load_codec("taesd")
    shared = tmp_path / "data" / "weights" / "taesd.safetensors"
    shared.parent.mkdir(parents=True)
    shared.write_bytes(small["taesd"].read_bytes())
    found = resolve_codec("taesd")
    assert (found.source, found.path) == ("shared data", shared) and found.note == "path: none given; cache: not there; shared data: there"
    cached = tmp_path / "home" / "weights" / "taesd.safetensors"
    cached.parent.mkdir(parents=True, exist_ok=True)
    cached.write_bytes(small["taesd"].read_bytes())
    cached.with_suffix(".json").write_text(json.dumps({"sha256": sha256_of(cached), "source": "somewhere"}))
    assert resolve_codec("taesd").source == "cache" and resolve_codec("taesd", path=small["taesd"]).source == "path"
    cached.write_bytes(b"damaged")
    with pytest.raises(WeightsError, match="sha256"):
        resolve_codec("taesd")
    cached.unlink()
    shared.write_bytes(b"other")
    with pytest.raises(WeightsError, match="taesd.safetensors has sha256"):
        resolve_codec("taesd")


def test_what_the_hub_gives_is_kept_with_its_hash(small, tmp_path, monkeypatch):
    digest = sha256_of(small["taesd"])
    blob = tmp_path / digest
    blob.write_bytes(small["taesd"].read_bytes())
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, file, **options: str(blob))
    assert resolve_codec("taesd").source == "hub" and resolve_codec("taesd").source == "cache"
    assert json.loads((tmp_path / "home" / "weights" / "taesd.json").read_text())["sha256"] == digest
    (tmp_path / ("0" * 64)).write_bytes(b"something else")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, file, **options: str(tmp_path / ("0" * 64)))
    (tmp_path / "home" / "weights" / "taesd.safetensors").unlink()
    with pytest.raises(WeightsError, match="the hub client recorded"):
        resolve_codec("taesd")


@pytest.mark.parametrize("name", ["taesd", "sd_vae_ft_mse"])
def test_weights_that_do_not_fit_are_named(small, name, tmp_path):
    other = {"taesd": "sd_vae_ft_mse", "sd_vae_ft_mse": "taesd"}[name]
    with pytest.raises(WeightsError, match=f"^{name}: .*does not fit Autoencoder.*missing .* and [0-9]+ more"):
        load_codec(name, path=small[other])
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not a file of tensors")
    with pytest.raises(WeightsError, match="cannot be read as safetensors"):
        load_codec(name, path=broken)
    with pytest.raises(WeightsError, match="^path: expected an existing .safetensors"):
        load_codec(name, path=tmp_path / "absent.safetensors")


@pytest.mark.parametrize(("call", "says"), [
    (lambda: load_codec("taesdd"), "name: got 'taesdd'.*mean 'taesd'"),
    (lambda: load_codec("dct", path="x.safetensors"), "path: .*has no weights"),
    (lambda: TinyCodec.tiny(dtype="fp16"), "dtype: "),
    (lambda: DCTCodec(batch_frames=0), "batch_frames: "),
    (lambda: DCTCodec().latent_shape(225), "image_size: got 225"),
    (lambda: DCTCodec().latent_shape(0), "image_size: "),
    (lambda: resolve_codec("dct"), "name: "),
])
def test_bad_options_are_one_error_naming_them(call, says):
    with pytest.raises(ConfigError, match=f"^{says}"):
        call()


def test_every_name_has_a_codec():
    assert set(CODECS) == {"dct", "dct_grey", *CODEC_WEIGHTS} and load_codec("dct").name == "dct" and load_codec("dct_grey").grey


def test_taesd_of_the_shared_data(monkeypatch):
    monkeypatch.delenv("FVLM_DATA") if DATA is None else monkeypatch.setenv("FVLM_DATA", DATA)
    from fvlm.core import shared_data

    folder = shared_data()
    if folder is None or not (folder / "weights" / "taesd.safetensors").is_file():
        pytest.skip("no taesd.safetensors in a folder of shared data")
    codec = load_codec("taesd", dtype="auto")
    from fvlm.data.worlds import photograph

    frame = torch.tensor(photograph("china", 128)[:128, :128]).permute(2, 0, 1)[None, None]
    assert codec.source.startswith("taesd from shared data") and codec.latent_shape(256) == (4, 32, 32) and 17 < codec.psnr(frame) < 30
    assert module.sha256_of(folder / "weights" / "taesd.safetensors") == codec.weights_sha256
