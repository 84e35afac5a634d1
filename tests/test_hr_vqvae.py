"""Contracts of HR-VQVAE: shapes, terms, gradients, codebooks that stay, training and resuming, saving, bad input."""
import dataclasses

import pytest
import torch

from fvlm.core import ConfigError, InputError, NonFiniteError, ShapeError
from fvlm.models.hr_vqvae import PRESETS, QUANTIZERS, HRVQVAE, HRVQVAEConfig
from fvlm.training.loop import TrainConfig, train


def frames_like_digits(clips=6, T=4, C=1, size=16, seed=0):
    draw, frames = torch.Generator().manual_seed(seed), torch.zeros(clips, T, C, size, size)
    for clip in frames:
        y, x = torch.randint(0, size - 6, (2,), generator=draw).tolist()
        for t in range(T):
            clip[t, :, y : y + 5, min(x + t, size - 5) : min(x + t, size - 5) + 5] = torch.rand(C, 1, 1, generator=draw) / 2 + 0.5
    return frames


class Frames:
    "A data set of single frames."

    def __init__(self, frames):
        self.frames = frames.flatten(0, 1)[:, None]

    def __len__(self):
        return len(self.frames)

    def batch(self, indices):
        return {"frames": self.frames[indices]}


def arm(name, seed=0, **changes):
    return HRVQVAE(HRVQVAEConfig.preset("tiny", **changes).with_quantizer(name), seed=seed)


def every_tensor(model):
    return {name: x.clone() for name, x in model.state_dict().items()}


@pytest.mark.parametrize("name", list(QUANTIZERS))
@pytest.mark.parametrize("stride, size, channels", [(2, 8, 1), (4, 16, 1), (4, 16, 3), (8, 32, 1), (16, 32, 3)])
def test_shapes(name, stride, size, channels):
    model = arm(name, stride=stride, image_size=size, channels=channels).eval()
    L, side = model.config.num_levels, size // stride
    frames = torch.rand(2, 3, channels, size, size)
    outputs, codes = model({"frames": frames}), model.encode(frames)
    assert codes.shape == (2, 3, L, side, side) and codes.dtype == torch.int64 and 0 <= codes.min() and codes.max() < model.config.num_codes
    assert torch.equal(codes, outputs["codes"]) and outputs["reconstruction"].shape == frames.shape
    assert outputs["latents"].shape == outputs["quantized"].shape == (2, 3, 8, side, side) and outputs["level_errors"].shape == (L,)
    assert torch.equal(model.lookup(codes), outputs["quantized"])
    assert torch.equal(model.decode(outputs["quantized"]), model.reconstruct(frames)) and model.reconstruct(frames, 1).shape == frames.shape


def test_codewords_and_bytes_on_paper():
    count = {name: (len(arm(name).quantizer.codebooks), arm(name).config.bytes_per_frame) for name in QUANTIZERS}
    assert count == {"tree": (4 + 16 + 64, 12.0), "flat": (12, 12.0), "single": (64, 12.0)}
    assert HRVQVAEConfig.preset("grey64_stride8", num_codes=8).bytes_per_frame == 8 * 8 * 3 * 3 / 8


@pytest.mark.parametrize("preset", list(PRESETS))
def test_presets(preset):
    config = HRVQVAEConfig.preset(preset)
    model = HRVQVAE(config).eval()
    frames = torch.rand(1, 1, config.channels, config.image_size, config.image_size)
    assert model.encode(frames).shape == (1, 1, 3, *config.grid) and model.num_parameters < 2e6


@pytest.mark.parametrize("name", list(QUANTIZERS))
@pytest.mark.parametrize("training", [False, True])
def test_terms_add_up_and_are_those_of_the_equation(name, training):
    model, batch = arm(name), {"frames": frames_like_digits()}
    model.train()({"frames": frames_like_digits(seed=1)})  # k-means
    model.train(training)
    books = model.quantizer.codebooks.clone()
    outputs = model(batch)
    terms, beta = model.loss(outputs, batch), 0.25
    levels = [float(terms[f"commitment_{i}"]) for i in range(1, model.config.num_levels + 1)]
    assert float(terms["commitment"].detach()) == pytest.approx(sum(levels) + float(terms["commitment_sum"]), rel=1e-5)
    assert float(terms["loss"].detach()) == pytest.approx(float(terms["reconstruction"].detach()) / model.config.data_variance + float(terms["commitment"].detach()), rel=1e-6)
    assert set(terms) == {"loss", "reconstruction", "commitment", "commitment_sum", *(f"{kind}_{i}" for kind in ("commitment", "perplexity") for i in range(1, len(levels) + 1))}
    # by hand, with the books as they were before the step
    moved, model.quantizer.codebooks = model.quantizer.codebooks, books
    words = model.quantizer.codewords(outputs["codes"].movedim(2, -1))
    model.quantizer.codebooks = moved
    left = outputs["latents"].detach().movedim(2, -1)
    for i, expected in enumerate(levels):
        left = left - words[..., i, :]
        assert expected == pytest.approx(beta * float(left.square().mean()), rel=1e-4, abs=1e-9)
    assert torch.equal(books, model.quantizer.codebooks) is not training


def test_the_gradient_reaches_encoder_and_decoder_and_goes_straight_through():
    model, batch = HRVQVAE.tiny(), {"frames": frames_like_digits()}
    model.loss(model(batch), batch)["loss"].backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert not any(b.requires_grad for b in model.buffers())


def test_only_a_forward_pass_in_training_mode_moves_the_codebooks():
    model, frames = HRVQVAE.tiny(), frames_like_digits()
    model.train()({"frames": frames})
    before = every_tensor(model)
    model.encode(frames), model.reconstruct(frames), model.decode_codes(model.encode(frames))
    assert model.quantizer.training, "encode left the quantiser in evaluation mode"
    model.eval()({"frames": frames})
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    model.train()({"frames": frames})
    assert not torch.equal(before["quantizer.codebooks"], model.quantizer.codebooks)


def test_the_first_batch_starts_the_books_as_the_quantiser_itself_would():
    model, other, batch = HRVQVAE.tiny(), HRVQVAE.tiny(), {"frames": frames_like_digits()}
    model(batch)
    other.quantizer(other.latents(batch["frames"]).movedim(2, -1))
    assert torch.equal(model.quantizer.codebooks, other.quantizer.codebooks) and torch.equal(model.quantizer.counts, other.quantizer.counts)


def test_a_clip_does_not_depend_on_its_neighbours():
    model, frames = HRVQVAE.tiny().eval(), frames_like_digits()
    assert torch.equal(model.encode(frames)[2:3], model.encode(frames[2:3]))


def test_training_uses_every_book_is_repeatable_and_goes_on_from_a_checkpoint(tmp_path):
    data = {"train": Frames(frames_like_digits(40)), "val": Frames(frames_like_digits(8, seed=1))}
    config = TrainConfig(steps=120, batch_size=24, learning_rate=1e-2, val_every=60, save_every=60, restore_best=False)
    whole = HRVQVAE.tiny()
    result = train(whole, data, config, out=tmp_path / "whole", progress=False)
    rows = [row for row in result.history if row["split"] == "val"]
    assert rows[-1]["reconstruction"] < 0.5 * float(data["val"].frames.var()) and {"perplexity_3", "commitment_3"} <= set(rows[-1])
    usage = whole.usage(whole.encode(data["train"].frames))
    assert all(level.books_used == level.books for level in usage), "dead parents"

    def stop(event):
        return event.step == 60

    part = HRVQVAE.tiny()
    train(part, data, config, out=tmp_path / "part", progress=False, callbacks=[stop])
    resumed = HRVQVAE.tiny()  # the seed must be the same: restarts draw from it
    train(resumed, data, config, out=tmp_path / "part", resume="auto", progress=False)
    assert all(torch.equal(a, b) for a, b in zip(every_tensor(whole).values(), every_tensor(resumed).values()))
    assert int(whole.quantizer.restarts) > 0


def test_bfloat16_keeps_the_codebooks_in_float32():
    model, batch = HRVQVAE.tiny(), {"frames": frames_like_digits()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(batch)
        model.loss(outputs, batch)["loss"].backward()
    assert outputs["quantized"].dtype == outputs["reconstruction"].dtype == model.quantizer.codebooks.dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("name", list(QUANTIZERS))
def test_saved_and_read_again(tmp_path, name):
    model = arm(name, seed=3)
    model({"frames": frames_like_digits()})
    model.save_pretrained(tmp_path)
    again = HRVQVAE.from_pretrained(tmp_path)
    assert again.config == model.config and not again.training
    for key, x in model.state_dict().items():
        assert torch.equal(x, again.state_dict()[key]) and x.dtype == again.state_dict()[key].dtype, key


def test_the_seed_decides_alone():
    torch.manual_seed(0)
    first = every_tensor(HRVQVAE.tiny(seed=1))
    torch.manual_seed(1)
    assert all(torch.equal(x, first[name]) for name, x in every_tensor(HRVQVAE.tiny(seed=1)).items())
    assert not torch.equal(first["encoder.0.weight"], every_tensor(HRVQVAE.tiny(seed=2))["encoder.0.weight"])


def rejected(error, text, call):
    with pytest.raises(error, match=text) as caught:
        call()
    assert isinstance(caught.value, InputError) and len(str(caught.value).splitlines()) == 1


def test_bad_frames():
    model, good = HRVQVAE.tiny().eval(), torch.rand(1, 2, 1, 16, 16)
    rejected(ShapeError, "axis H should be 16", lambda: model.encode(torch.rand(1, 2, 1, 20, 16)))
    rejected(ShapeError, "axis C should be 1", lambda: model({"frames": torch.rand(1, 2, 3, 16, 16)}))
    rejected(ShapeError, "5 axes", lambda: model.encode(good[0]))
    rejected(InputError, "at least one frame", lambda: model.encode(good[:, :0]))
    rejected(InputError, "at least one clip", lambda: model({"frames": good[:0]}))
    rejected(InputError, "divide bytes by 255", lambda: model.encode((good * 255).byte()))
    rejected(InputError, "values from", lambda: model.encode(good * 255))
    bad = good.clone()
    bad[0, 1, 0, 3, 4] = float("nan")
    rejected(NonFiniteError, "1 of 512", lambda: model({"frames": bad}))
    rejected(NonFiniteError, "1 of 512", lambda: model.encode(bad))
    rejected(InputError, 'expected a dict with "frames"', lambda: model({"video": good}))
    rejected(InputError, "got Tensor", lambda: model(good))


def test_bad_codes():
    model = HRVQVAE.tiny().eval()
    good = torch.zeros(1, 2, 3, 4, 4, dtype=torch.long)
    rejected(InputError, "got codes from 0 to 4", lambda: model.decode_codes(good.index_fill(4, torch.tensor([1]), 4)))
    rejected(InputError, "got codes from -1", lambda: model.decode_codes(good - 1))
    rejected(ShapeError, "axis h should be 4", lambda: model.decode_codes(good[:, :, :, :3]))
    rejected(ShapeError, "1 to 3 levels", lambda: model.decode_codes(good.repeat(1, 1, 2, 1, 1)))
    rejected(InputError, "whole numbers", lambda: model.decode_codes(good.float()))
    rejected(ShapeError, "axis D should be 8", lambda: model.decode(torch.rand(1, 2, 7, 4, 4)))
    rejected(ConfigError, "levels: got 4", lambda: model.reconstruct(torch.rand(1, 2, 1, 16, 16), 4))


@pytest.mark.parametrize("changes, text", [
    ({"stride": 3}, "stride"), ({"image_size": 18}, "multiple of stride"), ({"channels": 0}, "channels"), ({"width": 7}, "even"), ({"quantizer": "trees"}, "did you mean 'tree'"),
    ({"quantizer": "single"}, "with_quantizer"), ({"data_variance": 0.0}, "data_variance"), ({"num_codes": 0}, "num_codes"), ({"decay": 1.0}, "decay"), ({"codes": 3}, "config field"),
])
def test_bad_configurations(changes, text):
    rejected(ConfigError, text, lambda: HRVQVAE.tiny(**changes))


def test_single_does_not_remember_its_levels():
    rejected(ConfigError, "expected to start from", lambda: HRVQVAEConfig.preset("tiny").with_quantizer("single").with_quantizer("tree"))
    assert dataclasses.asdict(HRVQVAEConfig.preset("tiny").with_quantizer("flat").with_quantizer("tree")) == dataclasses.asdict(HRVQVAEConfig.preset("tiny"))
