"""Contracts of the predictor of frames: what each stage may touch, soft codewords, horizons, the physics term, what is kept in a folder, one clear error each."""
import copy

import pytest
import torch

from fvlm.blocks.codebook_tree import CodebookTree
from fvlm.blocks.pixelcnn import SpatiotemporalPixelCNN
from fvlm.core import ConfigError, InputError, NonFiniteError, ShapeError, WeightsError, generator
from fvlm.models.hr_vqvae import HRVQVAE
from fvlm.models.s_hr_vqvae import SHRVQVAE, SHRVQVAEConfig, brightness_centres, constant_velocity_loss, expected_codewords


def clip(frames=5, clips=2, stream="clip"):
    return torch.rand(clips, frames, 1, 16, 16, generator=generator(0, stream))


def started(**changes):
    "A tiny model whose codebooks have seen frames."
    painter = HRVQVAE.tiny()
    painter.train()({"frames": clip(6, 8, "start")})
    return SHRVQVAE(painter.eval(), channels=16, depth=2, attention_every=2, num_heads=2, context_frames=3, **changes)


# --- who learns ------------------------------------------------------------------------------------------------------

def step(model, batch):
    "One step of plain descent on whatever wants it; the parameters that were handed a gradient."
    model.train()
    model.loss(model(batch), batch)["loss"].backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()}


@pytest.mark.parametrize("changes", [dict(), dict(gumbel_hard=True, physics_weight=0.1), dict(embeddings="learned")], ids=str)
@pytest.mark.parametrize("stage", ["disjoint", "joint"])
def test_each_stage_moves_its_parts_and_no_other_bit(stage, changes):
    model = started(**changes).train_stage(stage)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reached = step(model, {"frames": clip()})
    may = {name for name, _ in model.named_parameters() if name.startswith("pixelcnn.") or (stage == "joint" and name.startswith("hr_vqvae.decoder."))}
    assert reached == may
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved <= may and any(name.startswith("hr_vqvae.decoder") for name in moved) == (stage == "joint")
    for name in ("hr_vqvae.quantizer.codebooks", "hr_vqvae.quantizer.counts", "hr_vqvae.encoder.0.weight"):
        assert torch.equal(model.state_dict()[name], before[name]), name


def test_the_pixel_term_alone_reaches_the_predictor_and_the_decoder():
    model, batch = started().train_stage("joint"), {"frames": clip()}
    outputs = model(batch)
    (outputs["prediction"] - batch["frames"][:, 3:]).square().mean().backward()
    assert all(p.grad.any() for p in model.pixelcnn.trunk.blocks[0].frame.parameters()) and all(p.grad is None for p in model.hr_vqvae.encoder.parameters())
    assert all(p.grad is not None for p in model.hr_vqvae.decoder.parameters())


def test_stages_can_be_changed_and_training_mode_never_reaches_the_codebooks():
    model = started().train()
    assert model.stage == "disjoint" and model.pixelcnn.training and not model.hr_vqvae.quantizer.training
    model.train_stage("joint")
    assert model.hr_vqvae.decoder[0].weight.requires_grad and not model.hr_vqvae.encoder[0].weight.requires_grad
    model.train_stage("disjoint")
    assert not any(p.requires_grad for p in model.hr_vqvae.parameters()) and all(p.requires_grad for p in model.pixelcnn.parameters())
    assert not model.eval().pixelcnn.training


def test_weight_nought_makes_joint_training_disjoint_for_the_predictor():
    "With joint_weight 0 the predictor's gradient is that of the codes alone."
    model, batch = started(joint_weight=0.0), {"frames": clip()}
    gradients = []
    for stage in ("disjoint", "joint"):
        model.zero_grad()
        model.train_stage(stage)
        model.loss(model(batch), batch)["loss"].backward()
        gradients.append([p.grad.clone() for p in model.pixelcnn.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients))


def test_the_loss_is_the_sum_of_its_named_terms():
    model, batch = started(joint_weight=0.5, physics_weight=0.25).train_stage("joint"), {"frames": clip()}
    terms = model.loss(model(batch), batch)
    total = terms["codes"] + 0.5 * terms["reconstruction"] / model.config.hr_vqvae.data_variance + 0.25 * terms["physics"]
    assert torch.allclose(terms["loss"], total) and torch.allclose(terms["codes"], terms["loss_1"] + terms["loss_2"] + terms["loss_3"])
    assert all(value.ndim == 0 for value in terms.values())
    disjoint = model.train_stage("disjoint")
    assert set(disjoint.loss(disjoint(batch), batch)) == {"loss", "codes", *(f"{kind}_{i}" for kind in ("loss", "accuracy") for i in (1, 2, 3))}


def test_ready_codes_are_the_same_as_frames():
    model, frames = started(), clip()
    from_frames, from_codes = model({"frames": frames}), model({"codes": model.encode(frames)})
    assert torch.equal(from_frames["logits"], from_codes["logits"]) and torch.equal(from_frames["codes"], from_codes["codes"])
    assert from_frames["logits"].shape == (2, 2, 3, 4, 4, 4)


def test_training_learns_to_repeat():
    "Clips that stand still: the codes of the next frame are those of the last."
    model = started()
    still = clip(1, 6, "still").expand(-1, 5, -1, -1, -1)
    batch, optimizer = {"codes": model.encode(still)}, torch.optim.Adam(model.pixelcnn.parameters(), lr=1e-2)
    first = model.loss(model(batch), batch)["loss"].item()
    for _ in range(120):
        optimizer.zero_grad()
        terms = model.loss(model(batch), batch)
        terms["loss"].backward()
        optimizer.step()
    assert terms["loss"] < 0.3 * first
    predicted = model.predict(still[:, :3], 2, greedy=True)
    assert (predicted - model.hr_vqvae.reconstruct(still)[:, :2]).square().mean() < 0.01


# --- soft codewords --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("books", ["path", "code", "shared"])
def test_certain_logits_are_the_plain_lookup_at_every_level(books):
    tree = CodebookTree(5, 3, 3, books)
    codes = torch.randint(3, (2, 4, 3, 2, 2), generator=generator(1))
    sure = 200 * torch.nn.functional.one_hot(codes, 3).float()
    wanted = tree.lookup(codes.movedim(2, -1)).movedim(-1, 2)
    for options in (dict(noise=False), dict(generator=generator(2)), dict(hard=True, generator=generator(2)), dict(tau=0.1, noise=False)):
        assert torch.allclose(expected_codewords(sure, codes, tree, **options), wanted, atol=1e-6)


def test_soft_codewords_are_the_mixture_of_the_open_book():
    tree = CodebookTree(5, 3, 2, "path")
    codes, logits = torch.tensor([2, 0]).view(1, 1, 2, 1, 1), torch.randn(1, 1, 2, 1, 1, 3, generator=generator(3), requires_grad=True)
    shares = logits.softmax(-1).view(2, 3)
    wanted = shares[0] @ tree.codebooks[:3] + shares[1] @ tree.codebooks[3 + 2 * 3:3 + 3 * 3]
    found = expected_codewords(logits, codes, tree, noise=False).flatten()
    assert torch.allclose(found, wanted)
    assert torch.allclose(torch.autograd.grad(found[0], logits)[0], torch.autograd.grad(wanted[0], logits)[0])


def test_the_gumbel_mixture_averages_to_the_draws_and_hard_is_one_codeword():
    tree = CodebookTree(2, 3, 1)
    codes, logits = torch.zeros(1, 5000, 1, 1, 1, dtype=torch.long), torch.tensor([1.0, 0.0, -1.0]).expand(1, 5000, 1, 1, 1, 3)
    hard = expected_codewords(logits, codes, tree, hard=True, generator=generator(4)).view(5000, 2)
    distance = torch.cdist(hard, tree.codebooks).min(1)
    assert distance.values.max() < 1e-6
    share = torch.bincount(distance.indices, minlength=3) / 5000
    assert (share - logits[0, 0, 0, 0, 0].softmax(0)).abs().max() < 0.03


# --- prediction ------------------------------------------------------------------------------------------------------

def test_predictions_have_any_horizon_and_their_draws_a_key():
    model, context = started().eval(), clip(4)
    for seen, frames in ((1, 1), (4, 2), (2, 9)):
        future = model.predict(context[:, :seen], frames, generator=generator(5))
        assert future.shape == (2, frames, 1, 16, 16) and 0 <= future.min() and future.max() <= 1 and not future.requires_grad
    one, again, other = (model.predict(context, 3, generator=generator(key)) for key in (6, 6, 7))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(model.predict(context, 3, greedy=True), model.predict(context, 3, top_k=1, generator=generator(8)))
    assert torch.equal(model.predict(context, 4, greedy=True)[:, :2], model.predict(context, 2, greedy=True))


def test_a_prediction_is_the_decoded_sample_and_fewer_levels_are_coarser():
    model, context = started().eval(), clip(4)
    before = context.clone()
    codes = model.pixelcnn.sample(model.encode(context), 2, generator=generator(9))
    assert torch.equal(model.predict(context, 2, generator=generator(9)), model.hr_vqvae.decode_codes(codes))
    assert torch.equal(model.predict(context, 2, generator=generator(9), levels=1), model.hr_vqvae.decode_codes(codes[:, :, :1]))
    assert torch.equal(context, before)


def test_building_and_predicting_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    model = SHRVQVAE.tiny()
    model.predict(clip(), 1, greedy=True)
    assert torch.equal(torch.get_rng_state(), state)
    same, other = SHRVQVAE.tiny(), SHRVQVAE.tiny(seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), same.state_dict().values()))
    assert not torch.equal(model.pixelcnn.answer, other.pixelcnn.answer)


# --- physics ---------------------------------------------------------------------------------------------------------

def dots(track, size=16):
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return torch.stack([torch.exp(-((x - a) ** 2 + (y - b) ** 2) / 3) for a, b in track]).view(1, -1, 1, size, size)


def test_centres_are_where_the_light_is():
    centres, light = brightness_centres(dots([(5, 8), (7, 6)]))
    assert torch.allclose(centres, torch.tensor([[[5.0, 8.0], [7.0, 6.0]]]), atol=1e-3) and (light > 0).all()


def test_constant_velocity_is_free_a_bounce_too_and_a_jerk_is_not():
    straight = dots([(4 + t, 8) for t in range(6)])
    bounce = dots([(4 + min(t, 6 - t), 8) for t in range(6)])
    jerk = dots([(4 + t + 2 * (t == 4), 8) for t in range(6)])
    assert constant_velocity_loss(straight[:, 2:], straight) < 1e-4 and constant_velocity_loss(bounce[:, 2:], bounce) < 1e-4
    found = jerk[:, 2:].clone().requires_grad_()
    loss = constant_velocity_loss(found, straight)
    loss.backward()
    assert loss > 1 and found.grad.any()


@pytest.mark.parametrize("frames, context", [(0.0, 3), (1.0, 3), (0.5, 1), (0.5, 0)])
def test_nothing_to_judge_costs_nothing_and_is_finite(frames, context):
    truth = torch.full((1, context + 2, 1, 8, 8), frames)
    found = truth[:, context:].clone().requires_grad_()
    loss = constant_velocity_loss(found, truth)
    loss.backward()
    assert loss.abs() < 1e-6 and torch.isfinite(found.grad).all()


# --- a folder --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("embeddings", ["tree", "learned"])
def test_a_folder_gives_the_model_back(tmp_path, embeddings):
    model, context = started(embeddings=embeddings).eval(), clip()
    model.save_pretrained(tmp_path)
    again = SHRVQVAE.from_pretrained(tmp_path)
    assert again.config == model.config and not again.training
    assert torch.equal(again.predict(context, 2, generator=generator(10)), model.predict(context, 2, generator=generator(10)))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    with pytest.raises(WeightsError, match="model.safetensors"):
        SHRVQVAE.from_pretrained(tmp_path)


def test_a_copy_shares_nothing():
    model = started()
    other = copy.deepcopy(model)
    step(model, {"frames": clip()})
    assert not torch.equal(model.pixelcnn.answer, other.pixelcnn.answer)


# --- bad input -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("call, error, says", [
    (lambda m: m.predict(clip()[:, :0], 1), InputError, "at least one clip of at least one frame"),
    (lambda m: m.predict(clip() * float("nan"), 1), NonFiniteError, "context"),
    (lambda m: m.predict(clip()[..., :12], 1), ShapeError, "axis W should be 16, got 12"),
    (lambda m: m.predict(clip() * 255, 1), InputError, "expected \\[0, 1\\]"),
    (lambda m: m.predict(clip(), 0), ConfigError, "frames: got 0"),
    (lambda m: m.predict(clip(), 1, levels=4), ConfigError, "levels: got 4"),
    (lambda m: m.predict(clip(), 1, temperature=0), InputError, "greedy=True"),
    (lambda m: m({"frames": clip(3)}), InputError, "got 3 frames, expected more than the 3 of the context"),
    (lambda m: m({"frames": clip() * float("nan")}), NonFiniteError, "frames"),
    (lambda m: m({}), InputError, 'expected a dict with "frames"'),
    (lambda m: m({"codes": torch.full((1, 5, 3, 4, 4), 4)}), InputError, "codes from 4 to 4, expected 0 to 3"),
    (lambda m: m({"codes": torch.zeros(1, 5, 3, 5, 4, dtype=torch.long)}), ShapeError, "axis h should be 4, got 5"),
    (lambda m: m.train_stage("joint")({"codes": torch.zeros(1, 5, 3, 4, 4, dtype=torch.long)}), InputError, 'expected a dict with "frames"'),
    (lambda m: m.train_stage("Joint"), ConfigError, "did you mean 'joint'"),
])
def test_bad_input(call, error, says):
    with pytest.raises(error, match=says):
        call(SHRVQVAE.tiny())


@pytest.mark.parametrize("values, says", [
    (dict(embeddings="trees"), "did you mean 'tree'"), (dict(context_frames=0), "context_frames: got 0"), (dict(joint_weight=-1), "joint_weight"), (dict(gumbel_tau=0), "gumbel_tau"),
    (dict(physics_weight=-1), "physics_weight"), (dict(chanels=3), "did you mean 'channels'"), (dict(hr_vqvae=dict(stride=3)), "stride: got 3"),
])
def test_bad_settings(values, says):
    with pytest.raises(ConfigError, match=says):
        SHRVQVAEConfig.from_dict(values)


def test_parts_that_do_not_fit():
    painter = HRVQVAE.tiny()
    with pytest.raises(ConfigError, match="grid of \\(4, 5\\)"):
        SHRVQVAE(painter, SpatiotemporalPixelCNN(4, 3, grid=(4, 5), channels=8, depth=1))
    stale = SpatiotemporalPixelCNN(4, 3, grid=(4, 4), channels=8, depth=1, tree=HRVQVAE.tiny(seed=5).quantizer)
    with pytest.raises(ConfigError, match="not those of hr_vqvae"):
        SHRVQVAE(painter, stale)
