"""The planted tasks are what they claim, twins differ in the trained pass alone, records come back, and the full run holds its verdicts."""
from pathlib import Path

import numpy as np
import pytest
import torch

from fvlm.core import ConfigError, InputError
from fvlm.evidence.foveation_protocol import foveation_protocol, planted_study, recorded_errors
from fvlm.evidence.headroom import headroom, views_of
from fvlm.evidence.query_swaps import path_errors, foveation_value, mask_weights
from fvlm.recipes.planted_foveation import (
    ARMS, NOISE, SEEDS, TASKS, PlantedRecipe, planted_clips, planted_data, planted_encoder, planted_model, planted_twins, read_planted, write_planted,
)

SPLIT = {"train": range(250), "val": range(250, 300), "test": range(300, 400)}


@pytest.mark.parametrize("task", TASKS)
def test_clips_are_clips(task):
    clips, again, other = planted_clips(task, 5, seed=1), planted_clips(task, 5, seed=1), planted_clips(task, 5, seed=2)
    assert clips.frames.shape == (5, 5, 3, 36, 36) and clips.latents.shape == (5, 5, 3, 1, 1) and clips.masks.shape == (5, 5, 36, 36)
    assert 0 <= clips.frames.min() and clips.frames.max() <= 1 and clips.masks.flatten(2).any(-1).all()
    assert torch.equal(clips.frames, again.frames) and torch.equal(clips.latents, again.latents) and not torch.equal(clips.frames, other.frames)
    many = planted_clips(task, 500, seed=3).latents[:, 1:]
    assert abs(many.mean()) < 0.1 and abs(many.var() - 1) < 0.06


def test_the_ground_names_the_next_place_and_the_dot_is_the_answer():
    clips = planted_clips("search", 200, seed=4)
    assert (clips.masks.float().mean((2, 3)) == pytest.approx(1 / 9)), "one tile of nine"
    middle = torch.arange(6, 36, 12)
    dots, tiles = (clips.frames[..., middle + by, :][..., middle + by].flatten(3) for by in (0, -4))
    place = clips.masks[..., middle, :][..., middle].flatten(2).int().argmax(-1)
    assert not (place[:, 1:] == place[:, :-1]).all(), "the place moves"
    ground = clips.frames[..., 0, 0]
    named = (tiles[:, 1:] - ground[:, :-1, :, None]).abs().sum(2).argmin(-1)
    assert torch.equal(named, place[:, 1:])
    seen = dots.gather(3, place[:, :, None, None].expand(-1, -1, 3, 1))[..., 0]
    rest = clips.latents[:, 1:, :, 0, 0] - (1 - NOISE["search"]) ** 0.5 * 12**0.5 * (seen[:, :-1] - 0.5)
    assert abs(rest.square().mean() - NOISE["search"]) < 0.02
    assert abs(torch.corrcoef(torch.stack([rest.flatten(), clips.latents[:, :-1, :, 0, 0].flatten()]))[0, 1]) < 0.05, "the latent before says nothing"


def test_information_forces_the_answer():
    encoder, found = planted_encoder(), {}
    for task in TASKS:
        clips = planted_clips(task, 400, seed=5)
        kept = encoder.keys_values(clips.frames)
        found[task] = headroom(views_of(kept.patches, cls=kept.cls, location=mask_weights(clips.masks, encoder.grid)), clips.latents, SPLIT, beside=clips.latents)
    assert str(found["weather"]).startswith("no headroom") and str(found["search"]).startswith("headroom") and found["search"].low > 2
    assert found["search"].fine == "true_location"


def test_twins_share_everything_but_the_trained_pass():
    encoder = planted_encoder()
    arms = {arm: planted_model(encoder, arm, seed=2) for arm in ARMS}
    for arm in ("coarse", "both"):
        assert all(torch.equal(a, b) for a, b in zip(arms["fine"].state_dict().values(), arms[arm].state_dict().values()))
        assert arms[arm].config == arms["fine"].config.changed(trained_pass=arm)
    assert planted_encoder().fingerprint == encoder.fingerprint != planted_encoder(seed=1).fingerprint


def test_training_is_the_same_bits_and_encoder_stays_frozen():
    recipe = PlantedRecipe(task="search", train_clips=80, test_clips=10, steps=3, batch_size=16)
    data = planted_data(recipe)
    before = data.encoder.fingerprint
    one, two = (planted_twins(recipe, data, 7, arms=("fine",))["fine"] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))
    assert data.encoder.fingerprint == before and not torch.equal(one.q_static, planted_model(data.encoder, "fine", 7).q_static)


def test_bad_input(tmp_path):
    with pytest.raises(ConfigError, match="task: got 'rain'"):
        planted_clips("rain", 3)
    with pytest.raises(ConfigError, match="num_frames"):
        planted_clips("search", 3, num_frames=2)
    with pytest.raises(ConfigError, match="steps"):
        PlantedRecipe(steps=0)
    with pytest.raises(ConfigError, match="arm"):
        planted_model(planted_encoder(), "all")
    with pytest.raises(InputError, match="expected the same seeds"):
        read_planted(tmp_path, "search")
    recipe, model = PlantedRecipe(task="search"), planted_model(planted_encoder(), "fine")
    for seed, arms in ((0, ARMS), (1, ("fine",))):
        for arm in arms:
            write_planted(tmp_path, recipe, arm, seed, {"fine": np.ones((2, 5))}, model=model, data_fingerprint="x")
    with pytest.raises(InputError, match="expected the same seeds"):
        read_planted(tmp_path, "search")


def test_a_small_run_goes_from_clips_to_protocol_and_back(tmp_path):
    recipe = PlantedRecipe(task="weather", train_clips=400, test_clips=20, steps=60, batch_size=32, learning_rate=3e-3)
    protocol = planted_study(recipe, (0, 1), root=tmp_path)
    assert list(protocol.ratios) == ["R0", "R1", "R2", "R3"] and set(protocol.errors.trivial) == {"copy_last", "linear", "ridge"}
    assert protocol.ratios["R0"].estimate > 1.03 > protocol.ratios["R2"].estimate > 0.97, protocol.verdict()
    recorded = foveation_protocol(recorded_errors(tmp_path, "weather"), first_frame=1)
    for name, ratio in protocol.ratios.items():
        assert recorded.ratios[name].estimate == pytest.approx(ratio.estimate, rel=1e-4) and recorded.ratios[name].low == pytest.approx(ratio.low, rel=1e-4)
    frames = read_planted(tmp_path, "weather")[1]["coarse/coarse"]
    assert np.allclose(frames, protocol.errors.coarse.mean(1), rtol=1e-5)


def holds(task, protocol):
    "The claims of both tasks."
    ratios, errors = protocol.ratios, protocol.errors
    if task == "weather":
        assert ratios["R0"].low > 1.05 and ratios["R2"].verdict == "no effect", protocol.table()
        return
    assert ratios["R2"].low > 1.05, protocol.table()
    for kind in ("static", "time_shuffled", "other_clip", "random"):
        assert foveation_value(errors.swapped, kind, first_frame=protocol.first_frame).interval.low > 0, kind


@pytest.mark.parametrize("task", TASKS)
def test_the_record_holds_its_verdict(task):
    holds(task, foveation_protocol(recorded_errors(Path(__file__).resolve().parents[1] / "results", task), first_frame=1))


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_the_full_run_holds_its_verdict(task):
    holds(task, planted_study(PlantedRecipe(task=task), range(SEEDS[task])))


def test_the_fine_twin_learns_what_the_coarse_one_cannot():
    "A part of the full search: one seed, half of the steps, the first signs."
    recipe = PlantedRecipe(task="search", steps=200)
    data = planted_data(recipe)
    models = planted_twins(recipe, data, 1, arms=("fine", "coarse"))
    fine, coarse = (path_errors(models[arm], data.test, passes=passes)[arm][:, 2:].mean() for arm, passes in (("fine", "both"), ("coarse", "coarse")))
    assert coarse > 1.05 * fine, (coarse, fine)
