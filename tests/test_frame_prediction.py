"""Contracts of the clips, recipes and stages of predicting frames: windows, sides, fingerprints, resuming, refusing, budgets, bad input."""
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fvlm.core import ConfigError, InputError, ShapeError, shared_data
from fvlm.data.clips import VideoFolder
from fvlm.data.worlds import BouncingSprites, MovingDigits
from fvlm.models.hr_vqvae import HRVQVAE, HRVQVAEConfig
from fvlm.recipes.frame_clips import FrameClips, WorldClips, as_channels, held_videos, held_world
from fvlm.recipes.frame_prediction import FRAME_RECIPES, FramePredictionRecipe, load_frame_recipe, open_clips, tiny_digits
from fvlm.recipes.frame_stages import STAGES, finished_stage, run_stage, same_seconds, stage_data, stage_settings, steps_within
from fvlm.training.checkpoints import CheckpointMismatch
from fvlm.training.loop import TrainConfig


def quick(**changes):
    "The tiny recipe with a few steps a stage, in 16 pixels."
    def steps(n):
        return TrainConfig(steps=n, batch_size=8, learning_rate=3e-3, val_every=n // 2, save_every=n // 2)

    return replace(tiny_digits(), **{**dict(
        image_size=32, train_clips=10, val_clips=4, test_clips=4, quantizer=HRVQVAEConfig.preset("tiny", image_size=32, stride=8),
        frames_training=steps(8), codes_training=steps(4), joint_training=steps(4), rival_training=steps(4)), **changes})


def rejected(error, text, call):
    with pytest.raises(error, match=text) as caught:
        call()
    assert isinstance(caught.value, InputError) and len(str(caught.value).splitlines()) == 1


# --- clips -----------------------------------------------------------------------------------------------------------

def numbered(total=40, size=4):
    return torch.arange(total, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, size, size).clone()


@pytest.mark.parametrize("gap", [1, 3])
def test_windows_are_the_frames_they_say(gap):
    clips = FrameClips(numbered(), [0, 5, 20], 4, [0, 0, 1], ["a", "b"], gap=gap)
    batch = clips.batch(torch.tensor([2, 0]))
    assert (batch["frames"][:, :, 0, 0, 0] * 255).round().tolist() == [[20 + gap * t for t in range(4)], [gap * t for t in range(4)]]
    assert batch["clip"].tolist() == [1, 0] and batch["frames"].dtype == torch.float32 and clips[-1]["frames"].shape == (4, 1, 4, 4)
    singles = clips.singles()
    expected = sorted({s + gap * t for s in (0, 5, 20) for t in range(4)})
    assert (singles.batch(torch.arange(len(singles)))["frames"][:, 0, 0, 0, 0] * 255).round().tolist() == expected and singles.length == 1
    with pytest.raises(IndexError):
        clips[3]


def test_shorter_windows_subsets_and_answers():
    answers = {"masks": torch.arange(24).view(4, 6)}
    clips = FrameClips(numbered(), [0, 6, 12, 18], 6, [0, 1, 2, 3], list("abcd"), answers=answers)
    assert clips.window(2)[1]["frames"].shape[0] == 2 and clips.window(2).answers["masks"].tolist() == [[0, 1], [6, 7], [12, 13], [18, 19]]
    some = clips.subset(2)
    assert some.starts.tolist() == [0, 18] and some.answers["masks"][:, 0].tolist() == [0, 18] and len(clips) == 4 and len(clips.subset(99)) == 4


def test_codes_are_those_of_each_frame():
    clips = held_world(MovingDigits(num_clips=2, num_frames=5, size=32), 1)
    model = HRVQVAE.tiny(image_size=32).train()
    coded, alone = clips.with_codes(model, batch_frames=3), clips.with_codes(model, frames_too=False)
    assert model.training and torch.equal(coded.batch([1])["codes"], model.eval().encode(clips.batch([1])["frames"]))
    assert set(alone.batch([0])) == {"clip", "codes"} and set(coded.batch([0])) == {"clip", "codes", "frames"} and coded.batch([0])["codes"].dtype == torch.int64


def test_the_fingerprint_covers_everything():
    clips = FrameClips(numbered(), [0, 5], 4, [0, 1], ["a", "b"])
    other_frame = numbered()
    other_frame[39] = 0
    others = [FrameClips(other_frame, [0, 5], 4, [0, 1], ["a", "b"]), FrameClips(numbered(), [0, 6], 4, [0, 1], ["a", "b"]), FrameClips(numbered(), [0, 5], 4, [0, 0], ["a", "b"]),
              FrameClips(numbered(), [0, 5], 4, [0, 1], ["a", "c"]), FrameClips(numbered(), [0, 5], 4, [0, 1], ["a", "b"], gap=2), clips.window(3), clips.subset(1)]
    assert len({clips.fingerprint, *(o.fingerprint for o in others)}) == 8
    assert FrameClips(numbered(), [0, 5], 4, [0, 1], ["a", "b"]).fingerprint == clips.fingerprint


@pytest.mark.parametrize("channels", [1, 3])
def test_held_and_streamed_worlds_are_one(channels):
    world = BouncingSprites(num_clips=3, num_frames=4, size=32)
    held, streamed = held_world(world, channels), WorldClips(world, channels)
    for name, x in held.batch([2, 0]).items():
        assert torch.equal(x, streamed.batch([2, 0])[name])
    single = streamed.singles().batch([0, 1, 2])["frames"]
    assert single.shape == (3, 1, channels, 32, 32) and torch.equal(single, streamed.singles().batch([0, 1, 2])["frames"])
    assert streamed.fingerprint != streamed.singles().fingerprint != WorldClips(replace(world, seed=1), channels).singles().fingerprint


def test_grey_stays_grey():
    grey = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(-1, -1, -1, 3)
    assert torch.equal(as_channels(grey, 1)[:, 0], grey[..., 0]) and torch.equal(as_channels(grey, 3), grey.movedim(-1, 1))
    rejected(ConfigError, "channels", lambda: as_channels(grey, 2))


@pytest.mark.parametrize("gap", [1, 2])
def test_windows_of_videos(tmp_path, gap):
    items = []
    for name, ranges in (("b", ((0, 9), (20, 30))), ("a", None)):
        (tmp_path / name).mkdir()
        for t in range(30):
            Image.fromarray(np.full((8, 8, 3), 8 * t + (name == "b"), np.uint8)).save(tmp_path / name / f"{t:03}.png")
        items.append(SimpleNamespace(name=name, path=tmp_path / name, label=None, group=name, split=None, caption=None, ranges=ranges))
    folder = VideoFolder.from_items(items, context_frames=3, gap=gap, step=2)
    clips = held_videos(folder, 8)
    assert len(clips) == len(folder)
    for i in range(len(folder)):
        video = folder[i]
        assert torch.equal((clips[i]["frames"][:, 0] * 255).round().byte(), video["video"][..., 0]) and clips.clip_names[int(clips.clips[i])] == video["name"]
    assert len(clips.frames) < 60


def test_bad_clips():
    rejected(ShapeError, "expected torch.uint8", lambda: FrameClips(torch.zeros(4, 1, 2, 2), [0], 2, [0], ["a"]))
    rejected(InputError, "do not fit", lambda: FrameClips(numbered(), [37], 4, [0], ["a"]))
    rejected(InputError, "at least one window", lambda: FrameClips(numbered(), [], 4, [], []))
    rejected(ConfigError, "length", lambda: FrameClips(numbered(), [0], 4, [0], ["a"]).window(5))
    rejected(ConfigError, "count", lambda: FrameClips(numbered(), [0], 4, [0], ["a"]).subset(0))


# --- recipes ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", list(FRAME_RECIPES))
def test_every_recipe_can_be_written_down(name):
    recipe = load_frame_recipe(name)
    for stage in (*STAGES, "conv_lstm", "simvp"):
        json.dumps(stage_settings(recipe, stage), allow_nan=False)
    assert recipe.rival_config("simvp").future_frames == recipe.future_frames and FRAME_RECIPES[name].__doc__.count("Source:") and "Cost" in FRAME_RECIPES[name].__doc__


def test_sides_differ_and_the_test_is_longer_and_has_answers():
    clips = open_clips(quick(), progress=False)
    assert (clips.train.length, clips.val.length, clips.test.length) == (6, 6, 8) and set(clips.test.answers) == {"masks", "trajectories"}
    firsts = [{bytes(part.frames[int(i)].numpy()) for i in part.starts} for part in (clips.train, clips.val, clips.test)]
    assert not (firsts[0] & firsts[1] or firsts[0] & firsts[2] or firsts[1] & firsts[2])
    assert open_clips(quick(), progress=False).train.fingerprint == clips.train.fingerprint != open_clips(quick(data_seed=1), progress=False).train.fingerprint


def test_moving_mnist_by_its_rule():
    clips = open_clips(FramePredictionRecipe(train_clips=2, val_clips=1, test_clips=2), progress=False)
    assert clips.train[0]["frames"].shape == (20, 1, 64, 64) and clips.test.answers["trajectories"].shape == (2, 20, 2, 2)
    assert "digits" in clips.source or "MNIST" in clips.source


def test_kth_by_its_card(shared_clips):
    if not (shared_clips / "videos" / "kth").is_dir():
        pytest.skip("no KTH there")
    clips = open_clips(replace(load_frame_recipe("kth"), train_clips=6, val_clips=4, test_clips=6), progress=False)
    persons = {side: {part.clip_names[int(c)][6:8] for c in part.clips} for side, part in (("train", clips.train), ("val", clips.val), ("test", clips.test))}
    assert max(persons["train"] | persons["val"]) <= "16" < min(persons["test"]) and not persons["train"] & persons["val"]
    assert clips.train[0]["frames"].shape == (30, 1, 64, 64) and not clips.test.answers


def test_kth_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv("FVLM_DATA", str(tmp_path))
    assert shared_data() == tmp_path
    rejected(InputError, "videos/kth", lambda: open_clips(load_frame_recipe("kth"), progress=False))
    assert "scikit-learn" in open_clips(FramePredictionRecipe(train_clips=1, val_clips=1, test_clips=1), progress=False).source


@pytest.mark.parametrize("changes, text", [
    ({"data": "movingmnist"}, "did you mean 'moving_mnist'"), ({"context_frames": 0}, "context_frames"), ({"image_size": 32}, "quantizer.image_size"), ({"channels": 3}, "quantizer.channels"),
    ({"channels": 2}, "channels"), ({"test_future_frames": 3}, "test_future_frames"), ({"rivals": {"convlstm": {}}}, "did you mean 'conv_lstm'"), ({"rivals": {"simvp": {"depth": -1}}}, "depth"),
    ({"joint_weight": -0.1}, "joint_weight"), ({"image_size": 32, "quantizer": HRVQVAEConfig(image_size=32)}, "expected 64"),
])
def test_bad_recipes(changes, text):
    rejected(ConfigError, text, lambda: FramePredictionRecipe(**changes))


# --- stages ----------------------------------------------------------------------------------------------------------

def tensors(model):
    return {name: x.clone() for name, x in model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    recipe, root = quick(), tmp_path_factory.mktemp("run")
    clips = open_clips(recipe, progress=False)
    return recipe, clips, root, {stage: run_stage(recipe, stage, clips, root, progress=False) for stage in STAGES}


def test_stages_move_what_they_should(trained):
    _, _, _, done = trained
    inner = {stage: found.model if stage == "frames" else found.model.hr_vqvae for stage, found in done.items()}
    for name, moves in (("encoder", ()), ("quantizer", ()), ("decoder", ("joint",))):
        for before, stage in (("frames", "codes"), ("codes", "joint")):
            assert equal(tensors(getattr(inner[before], name)), tensors(getattr(inner[stage], name))) == (stage not in moves), (name, stage)
    assert not equal(tensors(done["codes"].model.pixelcnn), tensors(done["joint"].model.pixelcnn))
    assert all(not found.model.training and found.seconds > 0 for found in done.values()) and done["joint"].best["reconstruction"] > 0


def test_a_finished_stage_is_read(trained):
    recipe, clips, root, done = trained
    before = (root / "joint" / "log.jsonl").read_bytes()
    for stage in STAGES:
        again = run_stage(recipe, stage, clips, root, progress=False)
        assert equal(tensors(again.model), tensors(done[stage].model)) and (again.steps, again.best) == (done[stage].steps, done[stage].best)
    assert (root / "joint" / "log.jsonl").read_bytes() == before
    assert same_seconds(recipe, root) == pytest.approx(done["frames"].seconds + done["codes"].seconds)


@pytest.mark.parametrize("stage", ["frames", "codes", "joint", "simvp"])
def test_a_stage_that_was_stopped_goes_on_to_the_same_bits(trained, stage, tmp_path):
    recipe, clips, root, done = trained
    for earlier in STAGES:
        if stage in STAGES and STAGES.index(earlier) < STAGES.index(stage):
            (tmp_path / earlier).symlink_to(root / earlier)
    whole = done[stage] if stage in done else run_stage(recipe, stage, clips, tmp_path / "whole", progress=False)
    stopped = run_stage(recipe, stage, clips, tmp_path, callbacks=[lambda event: event.step == event.steps // 2], progress=False)
    assert not (tmp_path / stage / "finished").exists() and stopped.steps == whole.steps // 2
    rest = run_stage(recipe, stage, clips, tmp_path, progress=False)
    assert equal(tensors(rest.model), tensors(whole.model)) and rest.steps == whole.steps and rest.seconds > stopped.seconds


def test_another_recipe_is_refused_where_it_matters(trained, tmp_path):
    recipe, clips, root, _ = trained
    wider = replace(recipe, predictor=replace(recipe.predictor, depth=1))
    assert run_stage(wider, "frames", clips, root, progress=False).steps == 8
    rejected(CheckpointMismatch, "predictor.depth", lambda: run_stage(wider, "codes", clips, root, progress=False))
    rejected(CheckpointMismatch, "seed", lambda: run_stage(recipe, "frames", clips, root, seed=1, progress=False))
    rejected(CheckpointMismatch, "joint_weight", lambda: finished_stage(replace(recipe, joint_weight=1.0), "joint", root))
    run_stage(recipe, "conv_lstm", clips, tmp_path, callbacks=[lambda event: event.step == 2], progress=False)
    other = replace(recipe, rival_training=replace(recipe.rival_training, learning_rate=1e-4))
    rejected(CheckpointMismatch, "begun with another recipe.*learning_rate", lambda: run_stage(other, "conv_lstm", clips, tmp_path, progress=False))
    rejected(InputError, "run 'frames' first", lambda: run_stage(recipe, "codes", clips, tmp_path, progress=False))
    rejected(ConfigError, "did you mean 'joint'", lambda: run_stage(recipe, "joints", clips, tmp_path, progress=False))
    rejected(ConfigError, "a budget is for rivals", lambda: run_stage(recipe, "frames", clips, tmp_path, seconds=1.0, progress=False))


def test_a_budget_in_seconds_becomes_steps_and_is_kept(trained, tmp_path, monkeypatch):
    recipe, clips, _, _ = trained
    from fvlm.recipes import frame_stages

    monkeypatch.setattr(frame_stages, "steps_within", lambda *arguments: 6)
    stopped = run_stage(recipe, "conv_lstm", clips, tmp_path, seconds=1.5, callbacks=[lambda event: event.step == 3], progress=False)
    monkeypatch.setattr(frame_stages, "steps_within", lambda *arguments: 99)
    rest = run_stage(recipe, "conv_lstm", clips, tmp_path, seconds=70.0, progress=False)
    assert (stopped.steps, rest.steps) == (3, 6) and run_stage(recipe, "conv_lstm", clips, tmp_path, progress=False).steps == 6


def test_timing_leaves_the_model_alone(trained):
    recipe, clips, _, done = trained
    model, state = done["codes"].model, torch.get_rng_state()
    before = tensors(model)
    data = stage_data(recipe, "codes", clips, model)["train"]
    assert steps_within(0.0, model, data, recipe.codes_training) == 1 < steps_within(100.0, model, data, recipe.codes_training)
    assert equal(before, tensors(model)) and not model.training and torch.equal(state, torch.get_rng_state())


def test_streamed_clips_train_too(tmp_path):
    recipe = quick(stream=True)
    clips = open_clips(recipe, progress=False)
    assert isinstance(clips.train, WorldClips)
    for stage in STAGES[:2]:
        assert run_stage(recipe, stage, clips, tmp_path, progress=False).steps > 0
