"""The two trained examples: what lies in the package is what its file says, bad folders are named, a rerun gives the same bytes."""
import json
import shutil
from dataclasses import replace

import pytest
import torch

from fvlm.core import ConfigError, WeightsError
from fvlm.recipes.example_models import EXAMPLES, FIRST_FRAME, example_clip, example_clips, example_encoder, example_facts, example_folder, example_model, train_example

SHORT = {name: replace(recipe, train_clips=24, val_clips=8, test_clips=6, steps=3) for name, recipe in EXAMPLES.items()}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "A folder of each example, trained for a moment."
    root = tmp_path_factory.mktemp("examples")
    return {name: train_example(name, out=root / name, recipe=recipe, progress=False) for name, recipe in SHORT.items()}


def errors_of(name, clips, model):
    "(clips,) the error that example.json records."
    batch = clips.inputs.batch(torch.arange(len(clips.inputs)))
    with torch.no_grad():
        if name == "sc_vfp":
            return (model(batch)["prediction"] - batch["target"]).square().mean(-1).view(len(clips), -1).mean(1)
        return model.errors(model(batch, passes="both"), batch)["fine"][:, FIRST_FRAME - 1:].mean(1)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_recorded_errors_are_those_of_the_files(name):
    clips = example_clips(name, num_clips=12)
    now, said = errors_of(name, clips, example_model(name)), torch.tensor(example_facts(name)["errors_by_clip"]["model"][:12])
    assert torch.allclose(now, said, atol=2e-3), (now, said)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_beats_every_rival(name):
    facts = example_facts(name)
    assert {"model", "mean", "copy_last", "linear", "ridge"} <= set(facts["errors"])
    assert all(facts["errors"]["model"] < 0.6 * error for rival, error in facts["errors"].items() if rival != "model"), facts["errors"]
    assert all(abs(sum(rows) / len(rows) - facts["errors"][key]) < 1e-4 for key, rows in facts["errors_by_clip"].items())


def test_the_fine_gaze_lands_where_it_has_to():
    gaze = example_facts("fvlm")["gaze"]
    assert gaze["fine_strongest_patch_is_the_wanted_tile"] > 0.95 and gaze["coarse_strongest_patch_is_the_wanted_tile"] < 0.3
    assert gaze["fine_attention_on_the_wanted_tile"] > 4 * gaze["chance"]


def test_the_package_holds_two_megabytes_at_most():
    assert sum(path.stat().st_size for name in EXAMPLES for path in example_folder(name).iterdir()) < 2_000_000


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_rerun_gives_the_same_bytes_and_leaves_the_global_generator(name, small, tmp_path):
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    again = train_example(name, out=tmp_path, recipe=SHORT[name], progress=False)
    assert torch.equal(before, torch.random.get_rng_state())
    assert (again / "example.json").read_bytes() == (small[name] / "example.json").read_bytes()
    other = train_example(name, out=tmp_path / "other", recipe=replace(SHORT[name], seed=1), progress=False)
    assert example_facts(name, folder=other)["sha256"]["model.safetensors"] != example_facts(name, folder=again)["sha256"]["model.safetensors"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_folder_of_your_own_is_read_like_the_packages(name, small):
    clips = example_clips(name, folder=small[name])
    assert torch.allclose(errors_of(name, clips, example_model(name, folder=small[name])), torch.tensor(example_facts(name, folder=small[name])["errors_by_clip"]["model"]), atol=1e-4)
    assert not example_model(name, folder=small[name]).training
    assert example_encoder(name, folder=small[name]).embed_dim == 32


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_clip_is_the_same_however_many_are_made(name):
    clip, clips = example_clip(name, 2), example_clips(name, num_clips=5)
    assert torch.equal(clip.frames, clips.clip(2).frames) and all(torch.equal(x, clips.clip(2).batch[key]) for key, x in clip.batch.items() if key not in ("keys", "values"))
    assert clip.frames.dtype == torch.uint8 and clip.masks.dtype == torch.bool and clip.masks.shape == clip.frames.shape[:3]
    assert all(len(x) == 1 for x in clip.batch.values())


def test_frames_and_window_belong_together():
    clips = example_clips("sc_vfp", num_clips=3)
    clip = clips.clip(1, start=4)
    assert torch.equal(clip.frames, clips.frames[1, 4:10])
    assert torch.allclose(clip.batch["embeddings"][0], clips.embeddings[1, 4:9], atol=1e-6) and torch.allclose(clip.batch["target"][0], clips.embeddings[1, 9], atol=1e-6)
    with pytest.raises(ConfigError, match="start"):
        clips.clip(1, start=15)
    with pytest.raises(ConfigError, match="number"):
        clips.clip(3)


def test_masks_of_the_search_are_one_tile_from_frame_two_on():
    clips = example_clips("fvlm", num_clips=4)
    assert (clips.masks[:, 1:].flatten(2).sum(-1) == 144).all()


@pytest.mark.parametrize("file", ["model.safetensors", "encoder.safetensors", "config.json"])
@pytest.mark.parametrize("harm", ["gone", "changed"])
def test_a_damaged_file_is_named(file, harm, small, tmp_path):
    folder = shutil.copytree(small["fvlm"], tmp_path / "copy")
    if harm == "gone":
        (folder / file).unlink()
    else:
        (folder / file).write_bytes((folder / file).read_bytes()[:-1] + b"x")
    with pytest.raises(WeightsError, match=f"{file}.*train_example"):
        example_model("fvlm", folder=folder)


def test_bad_input_is_named(small, tmp_path):
    for call in (example_model, example_facts, example_encoder, example_clips, example_clip, example_folder):
        with pytest.raises(ConfigError, match="sc_vpf"):
            call("sc_vpf")
    with pytest.raises(ConfigError, match="name"):
        train_example("nobody", out=tmp_path)
    with pytest.raises(ConfigError, match="recipe.name"):
        train_example("fvlm", out=tmp_path, recipe=EXAMPLES["sc_vfp"])
    with pytest.raises(WeightsError, match="no example.json"):
        example_model("fvlm", folder=tmp_path)
    with pytest.raises(WeightsError, match="format 1 of the example 'sc_vfp'"):
        example_model("sc_vfp", folder=small["fvlm"])
    with pytest.raises(ConfigError, match="num_clips"):
        example_clips("fvlm", num_clips=EXAMPLES["fvlm"].test_clips + 1)
    with pytest.raises(ConfigError, match="number"):
        example_clip("fvlm", -1)
    with pytest.raises(ConfigError, match="steps"):
        replace(EXAMPLES["fvlm"], steps=0)
    (tmp_path / "example.json").write_text(json.dumps([1]))
    with pytest.raises(WeightsError, match="example.json"):
        example_facts("fvlm", folder=tmp_path)
