"""The recipes, cells and grid of SC-VFP's questions."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from fvlm.app.sc_vfp_questions import SC_VFP_QUESTIONS, question_settings
from fvlm.core import ConfigError, InputError
from fvlm.evidence.experiment import fitted_baseline, judge
from fvlm.evidence.sc_vfp_cells import AHEAD, compared, errors_ahead, question_table, run_questions
from fvlm.models.baselines import CopyLast
from fvlm.objectives.attention_statistics import head_cosine
from fvlm.recipes.question_windows import AheadTraining, WindowsOfClips, drawn_clips, long_windows, rolled, with_clip_share
from fvlm.recipes.sc_vfp_questions import QUESTION_ARMS, QuestionRecipe, SharedKeyValueAttention, WithRidge, question_base, question_config, question_model
from fvlm.training.embedding_splits import EmbeddedClip, make_splits
from fvlm.training.head_watch import HEAD_STATISTICS, HeadWatch, head_statistics, watched_series
from fvlm.training.loop import TrainEvent
from fvlm.training.records import read_records


@pytest.fixture(scope="module")
def splits():
    draw = np.random.default_rng(0)
    clips = [EmbeddedClip(name=f"walk{i}", group=f"walk{i}", rows=np.cumsum(draw.normal(size=(50, 16)), 0).astype(np.float16)) for i in range(9)]
    return make_splits(clips, lambda g: {"walk5": "val", "walk6": "test", "walk7": "test", "walk8": "test"}.get(g, "train"), encoder="toy", gap=2, gap_jitter=1)


def base(steps=8, **training):
    full = question_base("worlds")
    return replace(full, gap=2, size=replace(full.size, width=16, num_heads=4, ffn_dim=32, mlp_dims=(), depth=2), training=replace(full.training, steps=steps, val_every=4, precision="fp32", **training))


@pytest.mark.parametrize("arm", QUESTION_ARMS)
def test_every_arm_is_built_predicts_and_trains(arm, splits):
    ridge = fitted_baseline("ridge", splits) if arm.endswith("ridge") else None
    model = question_model(QuestionRecipe(base=base(), arm=arm), 16, 0, ridge)
    batch = splits.train.batch(range(8))
    out = model.eval()(batch)["prediction"]
    if arm.endswith("on_ridge"):
        torch.testing.assert_close(out, ridge(batch)["prediction"])
        assert not model.skip.weight.requires_grad
    model.loss(model(batch), batch)["loss"].backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.encoder.parameters()) or model.config.predict == "residual"
    assert out.shape == (8, 16)


def test_with_ridge_is_no_worse_than_either_on_the_clips_its_weight_was_fitted_on(splits):
    ridge, model = fitted_baseline("ridge", splits), question_model(QuestionRecipe(base=base()), 16, 3).eval()
    with torch.no_grad():
        model.mlp[-1].weight.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    context, target = splits.val.context, splits.val.targets
    mixed = WithRidge.fitted(model, ridge, context, target)
    error = lambda p: float((p({"embeddings": context})["prediction"].detach() - target).square().mean())
    grid = [error(WithRidge(model, ridge, w)) for w in np.linspace(0, 1, 21)]
    assert error(mixed) <= min(grid) + 1e-6 and 0 <= mixed.weight <= 1
    assert mixed.num_parameters == model.num_parameters + ridge.num_parameters
    torch.testing.assert_close(WithRidge(model, ridge, 0.0)({"embeddings": context})["prediction"], ridge({"embeddings": context})["prediction"])
    with pytest.raises(ConfigError, match="weight"):
        WithRidge(model, ridge, 1.5)


def test_an_arm_on_ridge_wants_the_ridge():
    with pytest.raises(ConfigError, match="ridge"):
        question_model(QuestionRecipe(base=base(), arm="mhsa_on_ridge"), 16, 0)


def test_ranks_lie_between_ordinary_and_full_width():
    width = {arm: question_config(QuestionRecipe(base=base(), arm=arm), 16).head_dim for arm in ("rank2", "rank4", "scmhsa")}
    assert width == {"rank2": 8, "rank4": 16, "scmhsa": None}


def test_equal_seeds_give_equal_models_and_arms_differ_in_their_attention_only():
    one, same, other = (question_model(QuestionRecipe(base=base(), arm="scmhsa"), 16, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters()))
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))
    ignored = {"attention", "head_dim", "ffn_dim", "linear_skip", "head_dropout"}
    configs = [{k: v for k, v in vars(question_config(QuestionRecipe(base=base(), arm=arm), 16)).items() if k not in ignored} for arm in QUESTION_ARMS]
    assert all(config == configs[0] for config in configs)


def test_shared_keys_and_values_are_attention():
    block, x = SharedKeyValueAttention(16, 4), torch.randn(2, 5, 16)
    out, seen = block.with_intermediates(x)
    torch.testing.assert_close(out, block(x))
    torch.testing.assert_close(seen["attention"].sum(-1), torch.ones(2, 4, 5))
    assert seen["heads"].shape == (2, 4, 5, 16)
    with pytest.raises(ConfigError):
        SharedKeyValueAttention(16, 0)


@pytest.mark.parametrize("wrong, said", [(dict(arm="mhsaa"), "mhsa"), (dict(clip_share=0), "clip_share"), (dict(clip_share=1.5), "clip_share"), (dict(similarity_kind="cos3"), "cos2"),
                                         (dict(trained_ahead=0), "trained_ahead"), (dict(trained_ahead=2, similarity_weight=1.0), "similarity")])
def test_wrong_recipes_are_refused(wrong, said):
    with pytest.raises(ConfigError, match=said):
        QuestionRecipe(base=base(), **wrong)


def test_a_share_is_drawn_by_seed_is_nested_and_leaves_the_other_sides_alone(splits):
    assert drawn_clips(20, 0.1, 3) == drawn_clips(20, 0.1, 3) and len({tuple(drawn_clips(20, 0.1, s)) for s in range(9)}) > 3
    for seed in range(5):
        assert set(drawn_clips(20, 0.1, seed)) < set(drawn_clips(20, 0.25, seed)) < set(drawn_clips(20, 0.5, seed))
    less = with_clip_share(splits, 0.4, 1)
    assert with_clip_share(splits, 1.0, 1) is splits and len(less.clips["train"]) == 2
    assert less.test is splits.test and less.val is splits.val and less.standardiser is splits.standardiser
    names = [c.name for c in splits.clips["train"]]
    owners = {names[i] for i in less.train.batch(range(len(less.train)))["clip"].tolist()}
    assert owners == {c.name for c in less.clips["train"]}
    assert len(less.train.context) == len(less.train.targets) == len(less.train) < len(splits.train)
    assert less.train.fingerprint != with_clip_share(splits, 0.4, 2).train.fingerprint or drawn_clips(5, 0.4, 1) == drawn_clips(5, 0.4, 2)


def test_a_selection_without_a_window_is_refused(splits):
    with pytest.raises(ConfigError, match="window"):
        WindowsOfClips(splits.train, [99])


def test_one_step_of_a_rollout_is_the_prediction_and_training_ahead_reaches_every_step(splits):
    recipe = QuestionRecipe(base=base(), trained_ahead=3)
    model = question_model(recipe, 16, 0).train()
    windows = long_windows(splits, "train", recipe.base, 3)
    batch = windows.batch(range(6))
    assert batch["embeddings"].shape == (6, 7, 16)
    torch.testing.assert_close(rolled(CopyLast(), batch["embeddings"][:, :5], 3), batch["embeddings"][:, 4:5].expand(-1, 3, -1))
    ahead = AheadTraining(model.eval(), 3)
    found = ahead(batch)["prediction"]
    torch.testing.assert_close(found[:, 0], model({"embeddings": batch["embeddings"][:, :5]})["prediction"])
    expected = torch.stack([batch["embeddings"][:, 5], batch["embeddings"][:, 6], batch["target"]], 1)
    torch.testing.assert_close(ahead.loss({"prediction": found}, batch)["loss"], (found - expected).square().mean())


def test_the_first_step_ahead_is_the_error_of_the_frame_that_comes(splits):
    recipe = base()
    windows = long_windows(splits, "test", recipe, AHEAD)
    ahead = errors_ahead(CopyLast(), windows)
    assert sorted(ahead) == [f"ahead_{k}" for k in range(1, AHEAD + 1)]
    for clip, error in ahead["ahead_1"].items():
        i = windows.clip_names.index(clip)
        batch = windows.batch((windows.clip_of_window == i).nonzero().flatten())
        assert error == pytest.approx(float((batch["embeddings"][:, 4] - batch["embeddings"][:, 5]).square().mean()), rel=1e-5)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_the_statistics_of_heads_are_all_there_whatever_the_weight_of_the_loss(splits, weight):
    model = question_model(QuestionRecipe(base=base(), similarity_weight=weight), 16, 0).eval()
    found = head_statistics(model, splits.test.context[:20])
    assert set(found) == set(HEAD_STATISTICS) and all(np.isfinite(v) for v in found.values())
    assert 0 <= found["head_divergence"] <= np.log(2) and 0 <= found["head_cosine_squared"] <= 1 and found["attention_entropy"] <= np.log(5) + 1e-5
    context, alike = splits.test.context[:20], []
    hidden = [model.encoder.embed(context) + model.encoder.positions, *model({"embeddings": context})["hidden"]]
    for block, x in zip(model.encoder.blocks, hidden):
        x = block.norm1(x)
        torch.testing.assert_close(block.attention.contributions(x).sum(1) + block.attention.proj.bias, block.attention(x), rtol=1e-4, atol=1e-5)
        table = head_cosine(block.attention.contributions(x), squared=True)
        alike.append(float(table[torch.triu(torch.ones(4, 4, dtype=torch.bool), 1)].mean()))
    assert found["contribution_cosine_squared"] == pytest.approx(np.mean(alike), rel=1e-5)


def test_post_norm_blocks_are_read_as_they_are(splits):
    post = replace(base(), size=replace(base().size, norm="post"))
    model = question_model(QuestionRecipe(base=post), 16, 0).eval()
    seen = {}
    model.encoder.blocks[0].attention.register_forward_pre_hook(lambda module, args: seen.setdefault("x", args[0]))
    context = splits.test.context[:10]
    model({"embeddings": context})
    torch.testing.assert_close(seen["x"], model.encoder.embed(context) + model.encoder.positions)
    assert set(head_statistics(model, context)) == set(HEAD_STATISTICS)


def settings_for(b, **more):
    return {"half": {arm: QuestionRecipe(base=b, arm=arm, clip_share=0.5) for arm in ("mhsa", "scmhsa")},
            "all": {"mhsa": QuestionRecipe(base=b, arm="mhsa"), "scmhsa_ahead3": QuestionRecipe(base=b, trained_ahead=3), "scmhsa_on_ridge": QuestionRecipe(base=b, arm="scmhsa_on_ridge"), "scmhsa_with_ridge": QuestionRecipe(base=b, arm="scmhsa_with_ridge"), "five_with_ridge": QuestionRecipe(base=b, arm="five_with_ridge"), **more}}


def test_a_grid_can_be_stopped_shared_and_resumed_and_refuses_another_recipe(splits, tmp_path):
    opened = []

    def open_data(recipe):
        opened.append(recipe)
        return splits, None

    settings = settings_for(base())
    cells = run_questions("toy", settings, (0, 1), open_data, root=tmp_path / "whole", progress=False)
    assert len(cells) == 2 * (4 + 2) + 4 + 2 * 5 and len(opened) == 1
    assert cells.index("all--mhsa--seed0") < cells.index("half--mhsa--seed1"), "seed by seed"
    assert run_questions("toy", settings, (0, 1), open_data, root=tmp_path / "whole", progress=False) == []
    odd = {"all": {"scmhsa_ahead3": settings["all"]["scmhsa_ahead3"]}}
    assert run_questions("toy", odd, (0, 1), open_data, root=tmp_path / "whole", progress=False) == [], "baselines know nothing of arms"
    halves = [run_questions("toy", settings, (0, 1), open_data, root=tmp_path / "shared", shard=(k, 2), progress=False) for k in (0, 1)]
    assert sorted(sum(halves, [])) == sorted(cells)
    for a, b in zip(read_records(tmp_path / "whole", "toy"), read_records(tmp_path / "shared", "toy")):
        assert (a.run, a.metrics, a.config) == (b.run, b.metrics, b.config)
    with pytest.raises(ConfigError, match="another recipe"):
        run_questions("toy", settings_for(base(steps=9)), (0,), open_data, root=tmp_path / "whole", progress=False)
    with pytest.raises(ConfigError, match="shard"):
        run_questions("toy", settings, (0,), open_data, root=tmp_path, shard=(2, 2))


def test_a_setting_has_one_base(splits, tmp_path):
    with pytest.raises(InputError, match="one base"):
        run_questions("toy", settings_for(base(), odd=QuestionRecipe(base=base(steps=9))), (0,), lambda r: (splits, None), root=tmp_path)


def test_records_say_what_was_run_and_hold_no_path(splits, tmp_path):
    b = replace(base(), videos=str(tmp_path))
    run_questions("toy", {"all": {"scmhsa": QuestionRecipe(base=b), "mhsa": QuestionRecipe(base=b, arm="mhsa")}}, (0, 1), lambda r: (splits, None), root=tmp_path, progress=False)
    records = read_records(tmp_path, "toy")
    assert str(tmp_path) not in json.dumps([r.config for r in records])
    scmhsa = next(r for r in records if r.run == "all--scmhsa--seed1")
    assert scmhsa.config["arm"] == "scmhsa" and scmhsa.config["base"]["training"]["seed"] == 1 and scmhsa.config["kept_at_step"] in (4, 8)
    assert set(scmhsa.conventions) == set(scmhsa.metrics) and scmhsa.timing["processor_seconds"] > 0
    assert next(r for r in records if r.run == "all--ridge").config["arm"] == "ridge"
    found = compared(records, "all--scmhsa", "all--copy_last")
    assert found.difference.seeds == 2 and found.difference.clips == 3
    assert compared(records, "all--nobody", "all--ridge") is None and compared(records, "all--ridge", "all--copy_last", "head_cosine") is None
    table = question_table(records, "all")
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]][:4] == ["mean", "copy_last", "linear", "ridge"]
    assert question_table(records, "none") is None
    trained = next(r for r in records if r.run == "all--copy_last").metrics_by_clip["standardised_mse"]
    assert trained == pytest.approx(judge(CopyLast(), splits.test)["standardised_mse"])


def test_watching_changes_nothing_and_is_kept_step_by_step(splits, tmp_path):
    arms = {"scmhsa": QuestionRecipe(base=base()), "watched-0": QuestionRecipe(base=base(), arm="watched"), "hybrid": QuestionRecipe(base=base(), arm="hybrid"),
            "hybrid_gate": QuestionRecipe(base=base(), arm="hybrid_gate"), "scmhsa_head_dropout": QuestionRecipe(base=base(), arm="scmhsa_head_dropout")}
    run_questions("toy", {"all": arms}, (0,), lambda r: (splits, None), root=tmp_path, progress=False)
    found = {r.run.split("--")[1]: r for r in read_records(tmp_path, "toy")}
    for plain, watched in (("scmhsa", "watched-0"), ("hybrid", "hybrid_gate")):
        assert found[plain].metrics_by_clip == found[watched].metrics_by_clip
        assert not watched_series(found[plain]) and {0} <= set(watched_series(found[watched])["head_divergence"][0])
    assert {"gate_1", "gate_2"} <= set(watched_series(found["hybrid_gate"])) and "gate_1" not in watched_series(found["watched-0"])
    assert watched_series(found["hybrid_gate"])["gate_1"][1][0] == 0.5 and "*_at_*" in found["watched-0"].conventions
    assert found["scmhsa_head_dropout"].metrics != found["scmhsa"].metrics
    model = question_model(arms["scmhsa_head_dropout"], 16, 0)
    assert all(block.attention.drop_heads.p == 0.2 for block in model.encoder.blocks)


def test_a_watch_looks_when_it_is_time_and_leaves_the_model_in_its_mode(splits):
    model, watch = question_model(QuestionRecipe(base=base(), arm="hybrid_gate"), 16, 0).train(), HeadWatch(splits.val.context[:8], every=10)
    for step in (5, 10, 15, 20):
        watch(TrainEvent(step=step, steps=20, epoch=1.0, loss=0.0, rows=[], model=model))
    assert model.training and sorted({name.rpartition("_at_")[2] for name in watch.found}) == ["10", "20"]


def test_the_second_encoder_is_read_at_all_clips_and_existing_settings_keep_their_recipes():
    settings = question_settings()
    for data in ("kth", "ucf"):
        encoder = question_base(data, "lite0").encoder
        assert (encoder.weights, encoder.layer, encoder.pooling, encoder.image_size) == ("efficientnet_lite0", None, "mean", 112)
        assert f"{data}-lite0-100" in settings
    assert {"kth-patches-5", "ucf-cls-5"} <= set(settings) and {"watched-0", "watched-0.1", "watched-1", "hybrid_gate"} <= set(settings["ucf-cls-100"])


def test_the_study_names_its_cells_by_what_they_are():
    settings = question_settings()
    for name, arms in settings.items():
        data, read_out, percent = name.split("-")
        for arm, recipe in arms.items():
            assert recipe.clip_share == int(percent) / 100 and recipe.base == question_base(data, read_out)
            assert arm in (recipe.arm, f"{recipe.similarity_kind}-{recipe.similarity_weight:g}", f"watched-{recipe.similarity_weight:g}") or arm == f"{recipe.arm}_ahead{recipe.trained_ahead}"
    assert SC_VFP_QUESTIONS.settings() == settings and len(SC_VFP_QUESTIONS.seeds) >= 5
