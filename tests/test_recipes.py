"""Recipes are complete, arms are what they say, and what is missing is one sentence."""
from dataclasses import asdict, replace

import pytest

from fvlm.core import ConfigError, InputError, WeightsError
from fvlm.models.sc_vfp import SCVFP
from fvlm.training.recipes import ARMS, RECIPES, EncoderChoice, SCVFPRecipe, load_recipe, model_config, open_folder, sc_vfp
from fvlm.training.saved_runs import from_plain, open_run


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_complete_and_survives_json(name):
    recipe = load_recipe(name)
    assert from_plain(SCVFPRecipe, asdict(recipe)) == recipe
    assert RECIPES[name].__doc__.count("Source:") == RECIPES[name].__doc__.count("Cost:") == 1


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_builds_and_differs_only_in_attention(arm):
    recipe = replace(sc_vfp(), arm=arm)
    config, base = model_config(recipe, 384), model_config(replace(recipe, arm="mhsa"), 384)
    differ = {f for f in asdict(config) if getattr(config, f) != getattr(base, f)}
    assert differ <= {"attention", "head_dim", "similarity_weight"} | ({"ffn_dim"} if arm == "mhsa_wide" else set())
    assert arm == "mhsa" or differ


@pytest.mark.parametrize("width, heads", [(64, 2), (256, 8), (384, 6)])
def test_wide_arm_matches_parameters(width, heads):
    recipe = replace(sc_vfp(), size=replace(sc_vfp().size, width=width, num_heads=heads))
    wide, full = (sum(p.numel() for p in SCVFP(model_config(replace(recipe, arm=a), 384)).parameters()) for a in ("mhsa_wide", "scmhsa"))
    assert wide == pytest.approx(full, rel=2e-3)


def test_wrong_words():
    with pytest.raises(ConfigError, match="did you mean 'sc_vfp'"):
        load_recipe("scvfp")
    with pytest.raises(ConfigError, match="arm: got 'mhs'"):
        replace(sc_vfp(), arm="mhs")
    with pytest.raises(ConfigError, match="gap"):
        replace(sc_vfp(), gap=0)
    with pytest.raises(InputError, match="existing folder"):
        open_folder(replace(sc_vfp(), videos="nowhere"))
    with pytest.raises(ConfigError, match="unknown field colour"):
        from_plain(SCVFPRecipe, asdict(sc_vfp()) | {"colour": 1})


def test_kth_without_the_data_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("FVLM_DATA", str(tmp_path))
    with pytest.raises(InputError, match="FVLM_DATA"):
        open_folder(replace(sc_vfp(), videos="kth"))


def test_missing_weights_name_every_way(monkeypatch, tmp_path):
    monkeypatch.setenv("FVLM_HOME", str(tmp_path))
    with pytest.raises(WeightsError, match="fvlm weights get dinov2_small_saliency"):
        EncoderChoice().load()
    with pytest.raises(WeightsError, match="bikes"):
        open_folder(sc_vfp())


@pytest.mark.parametrize("spoil, words", [
    (lambda d: (d / "run.json").unlink(), "not the folder of a finished run"),
    (lambda d: (d / "run.json").write_text("{"), "expected a JSON file"),
    (lambda d: (d / "run.json").write_text('{"format": 1}'), "expected the keys"),
    (lambda d: (d / "model" / "model.safetensors").write_bytes(b"\0" * 64), "model.safetensors"),
    (lambda d: (d / "model" / "config.json").write_text('{"embed_dim": -3}'), "embed_dim"),
])
def test_spoiled_runs_are_refused(tmp_path, spoil, words):
    import numpy as np

    from fvlm.training.embedding_splits import SIDES, EmbeddedClip, make_splits
    from fvlm.training.saved_runs import save_run

    rng = np.random.default_rng(0)
    clips = [EmbeddedClip(name=n, group=n, rows=rng.standard_normal((40, 8))) for n in SIDES]
    splits = make_splits(clips, {n: n for n in SIDES}, encoder="none")
    recipe = replace(sc_vfp(), size=replace(sc_vfp().size, width=16, depth=1, num_heads=2, ffn_dim=16, mlp_dims=()))
    run = save_run(tmp_path / "run", SCVFP(model_config(recipe, 8), seed=0), recipe, splits, "none")
    assert open_run(run).recipe == recipe
    spoil(run)
    with pytest.raises(InputError, match=words):
        open_run(run)
