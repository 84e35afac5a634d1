"""Recipes of the foveated VLM: everything that is named can be built, twins start alike, the clips are grouped, bad names are one sentence."""
from dataclasses import replace

import numpy as np
import pytest
import torch

from fvlm.core import ConfigError, InputError, shared_data
from fvlm.models.foveation_config import FoveationConfig
from fvlm.evidence.query_swaps import path_errors
from fvlm.recipes.foveated_vlm import FOVEATION_RECIPES, MOVING, SOURCES, TWINS, FoveationRecipe, _clips_of, build, load_foveation_recipe, load_parts, open_clips, read_by, target_shape_of, train_twin
from fvlm.training.records import plain_data


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    recipe = load_foveation_recipe("tiny")
    parts = load_parts(recipe)
    return recipe, parts, open_clips(recipe, parts, dir=tmp_path_factory.mktemp("clips"), progress=False)


@pytest.mark.parametrize("name", FOVEATION_RECIPES)
def test_a_recipe_is_plain_data_and_says_where_it_comes_from(name):
    recipe = load_foveation_recipe(name)
    assert plain_data(recipe)["frames"] == recipe.frames and recipe == load_foveation_recipe(name)
    told = FOVEATION_RECIPES[name].__doc__
    assert ("Source:" in told and "Deviations:" in told) or name == "tiny"


def test_the_phases_are_the_sources_and_add_up():
    one, two, three = (load_foveation_recipe(f"phase{n}").model for n in (1, 2, 3))
    assert one.temperature == 0.1 and one.encoder_train == "none" and one.contrastive_weight > 0
    assert (two.top_k, two.num_queries, two.entropy_margin_weight > 0, two.temperature) == (16, 4, True, 0.1)
    assert three.target == "flow" and three.top_k == 16


@pytest.mark.parametrize("target", ["latent", "delta", "flow", "patches", "pixels"])
def test_every_target_trains_a_step(opened, tmp_path, target):
    recipe, parts, _ = opened
    there = replace(recipe, model=recipe.model.changed(target=target), training=replace(recipe.training, steps=1))
    sides = open_clips(there, parts, dir=tmp_path, progress=False)
    model, result = train_twin(there, parts, sides["train"], trained_pass="fine", seed=0, progress=False)
    assert model.config.target_shape == target_shape_of(there, parts) and result.history[-1]["fine"] > 0
    errors = path_errors(model, sides["test"])
    assert errors["fine"].shape == (len(sides["test"]), there.frames) and np.isfinite(errors["fine"][:, 1:]).all()


@pytest.mark.parametrize("head", ["film", "mlp", "cross_attention", "spatial_film", "spatial_transformer"])
def test_matched_heads_have_the_parameters_of_film(opened, head):
    recipe, parts, _ = opened
    wide = replace(recipe, match_heads=True, model=FoveationConfig(query_dim=24, head=head))
    count = lambda model: sum(p.numel() for p in model.head.parameters())
    film = count(build(replace(wide, model=FoveationConfig(query_dim=24, head="film")), parts))
    assert abs(count(build(wide, parts)) / film - 1) < 0.05


def test_twins_of_a_seed_start_alike_and_seeds_differ(opened):
    recipe, parts, _ = opened
    twins = [dict(build(recipe, parts, trained_pass=name, seed=1).named_parameters()) for name in TWINS]
    assert all(torch.equal(x, other[name]) for other in twins[1:] for name, x in twins[0].items())
    assert not torch.equal(build(recipe, parts, seed=2).q_static, twins[0]["q_static"])


def test_training_leaves_the_shared_parts_alone(opened):
    recipe, parts, sides = opened
    before = {name: x.clone() for name, x in parts.language_model.state_dict().items()}
    trained = replace(recipe, model=recipe.model.changed(language_train="all"))
    model, _ = train_twin(trained, parts, sides["train"], trained_pass="both", seed=0, progress=False)
    assert all(torch.equal(x, before[name]) for name, x in parts.language_model.state_dict().items())
    assert any(not torch.equal(x, before[name]) for name, x in model.language_model.state_dict().items())


def test_the_same_run_again_is_the_same(opened):
    recipe, parts, sides = opened
    runs = [path_errors(train_twin(recipe, parts, sides["train"], trained_pass="fine", seed=3, progress=False)[0], sides["test"])["fine"] for _ in range(2)]
    assert np.array_equal(*runs)


@pytest.mark.parametrize("name", ["phase1", "phase2", "phase3"])
def test_a_phase_trains_all_its_twins(opened, tmp_path, name):
    tiny, parts, _ = opened
    phase = load_foveation_recipe(name)
    there = replace(tiny, source="sprites", model=phase.model.changed(query_dim=24, head_width=16, language_train="none", top_k=phase.model.top_k and 4), training=replace(tiny.training, steps=1))
    sides = open_clips(there, parts, dir=tmp_path, progress=False)
    for twin in TWINS:
        _, result = train_twin(there, parts, sides["train"], trained_pass=twin, seed=0, progress=False)
        assert result.history[-1]["loss"] > 0 and ("contrastive" in result.history[-1]) == (twin != "coarse")


def test_words_come_when_asked(opened, tmp_path):
    recipe, parts, _ = opened
    cued = replace(recipe, source="cued", words=True, model=recipe.model.changed(caption_weight=1.0, prediction_weight=0.5))
    sides = open_clips(cued, parts, dir=tmp_path, progress=False)
    item = sides["train"][0]
    assert {"caption", "text", "text_mask"} <= set(item) and parts.language_model.tokenizer.decode(item["text"][item["text_mask"]].tolist()) in sides["train"].clips[0].caption
    _, result = train_twin(cued, parts, sides["train"], trained_pass="fine", seed=0, progress=False)
    assert result.history[-1]["caption"] > 0


def test_a_model_reads_what_it_needs():
    assert read_by(FoveationConfig()) == ("keys", "values", "latents")
    assert "video" in read_by(FoveationConfig(encoder_train="all")) and "keys" not in read_by(FoveationConfig(encoder_train="all"))
    assert "patches" in read_by(FoveationConfig(contrastive_weight=0.1))
    assert {"patches", "cls"} <= set(read_by(FoveationConfig(attention_mode="shallow")))


def test_bad_recipes_are_named():
    with pytest.raises(InputError, match="source"):
        FoveationRecipe(source="vidoes")
    with pytest.raises(ConfigError, match="frames"):
        FoveationRecipe(frames=1)
    with pytest.raises(ConfigError, match="recipe: got 'haeds'.*heads"):
        load_foveation_recipe("haeds")
    with pytest.raises(ConfigError, match="trained_pass"):
        recipe = load_foveation_recipe("tiny")
        build(recipe, load_parts(recipe), trained_pass="neither")


def test_real_clips_keep_persons_and_groups_together():
    if shared_data() is None:
        pytest.skip("real clips: no folder with shared data beside the checkout, and FVLM_DATA names none")
    clips = _clips_of(load_foveation_recipe("heads"), download=False, progress=False)
    assert {clip.name.split("/")[0] for clip in clips} <= set(MOVING) and len(clips) > 100 and all(clip.caption for clip in clips)
    persons = {clip.group for clip in clips if clip.name.startswith("kth")}
    assert persons == {f"person{n:02d}" for n in range(1, 26)} and {"ucf101"} == {clip.name.split("/")[0] for clip in clips if "_g01" in clip.group}
    assert set(SOURCES) == {"videos", "samples", "sprites", "cued"}
