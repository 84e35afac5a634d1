"""The demo of S-HR-VQVAE end to end in small, and a study that is killed, gone on with, and refuses another recipe."""
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fvlm.app import frame_demo
from fvlm.app.frame_arms import PREDICTOR_ARMS, QUANTIZER_ARMS, joint_by, parameters_of, predicted_with, stage_name
from fvlm.app.frame_demo import code_picture, frame_demo_recipe, frame_report, plain_results, run_frame_demo, s_hr_vqvae_part, said
from fvlm.app.frame_study import HR_VQVAE_DIGITS, S_HR_VQVAE_DIGITS, S_HR_VQVAE_KTH, FrameStudy, by_seed_and_clip, future_of, gigaflops_of, judge_quantizer, of_arm, quantizer_table
from fvlm.core import ConfigError, InputError
from fvlm.models.hr_vqvae import HRVQVAE
from fvlm.models.rivals import RIVALS
from fvlm.recipes.frame_clips import FrameClips
from fvlm.recipes.frame_prediction import moving_mnist_stride8, open_clips, tiny_digits
from fvlm.training.records import read_records


def short(training, steps):
    return replace(training, steps=steps, val_every=steps, save_every=None)


BASE = tiny_digits()
SMALL = replace(BASE, train_clips=8, val_clips=2, test_clips=3, frames_training=short(BASE.frames_training, 6), codes_training=short(BASE.codes_training, 3),
                joint_training=short(BASE.joint_training, 2), rival_training=short(BASE.rival_training, 3))
DEMO = replace(frame_demo_recipe(3), train_clips=8, val_clips=2, test_clips=3, test_future_frames=7)


@pytest.fixture(scope="module")
def demo():
    return run_frame_demo(DEMO, progress=False)


def test_demo_again_is_the_same(demo):
    again = plain_results(run_frame_demo(DEMO, progress=False))
    first = plain_results(demo)
    for found in (first, again):
        found.pop("seconds")
    assert json.dumps(first) == json.dumps(again)
    assert set(first["rows"]) == {"copy_last", "linear", "mean_frame", "greedy", "one sample", "ceiling"} and len(first["usage"]) == 3


def test_report_is_one_file_without_network(demo):
    page = frame_report(demo).html()
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?:https?:)?//""", page)
    for words in ("codes of level 3", "a constant picture", "copy-last", "ceiling", "further than trained", "One seed", said(demo.result)[:40]):
        assert words in page or words in page.replace("&#39;", "'"), words


def test_the_strongest_of_those_that_learn_nothing_is_named(demo):
    trivial = {row: demo.result.per_horizon(row).mean() for row in frame_demo.TRIVIAL}
    assert f"Against {frame_demo.ROWS[min(trivial, key=trivial.get)]}, the strongest" in said(demo.result)


def test_code_picture_gives_every_code_its_colour():
    picture = code_picture(torch.arange(16).view(4, 4), 16, 32)
    assert picture.shape == (32, 32, 3) and picture.dtype == torch.uint8
    assert len({tuple(p) for p in picture.view(-1, 3).tolist()}) == 16 and (picture[:8, :8] == picture[0, 0]).all()


def test_videos_are_refused_in_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="makes its own clips"):
        s_hr_vqvae_part(SimpleNamespace(videos=tmp_path, out=tmp_path, seeds=None, steps=None))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    arms = {name: (QUANTIZER_ARMS | PREDICTOR_ARMS)[name] for name in ("tree", "flat", "trivial", "disjoint", "joint")}
    arms["conv_lstm"] = replace(PREDICTOR_ARMS["conv_lstm"], same_seconds=False)  # on a busy machine a budget of seconds is any number of steps
    study = FrameStudy(question="?", arms=arms, seeds=(0, 1), settings=lambda: {"tiny": SMALL})
    first = study.run("digits", study.settings(), root=root, work=root / "work", shard=(0, 2))
    second = study.run("digits", study.settings(), root=root, work=root / "work", shard=(1, 2))
    return study, root, first, second


def test_shards_share_the_grid_and_stages_are_trained_once(study):
    grid, root, first, second = study
    assert not set(first) & set(second) and len(first) == 6 and len(second) == 5 and all("seed0" in run or run == "tiny--trivial" for run in first)
    assert grid.run("digits", grid.settings(), root=root, work=root / "work") == []
    stages = sorted(path.name.rsplit("-", 1)[0] for path in (root / "work" / "frames").iterdir())
    assert stages == sorted(f"{stage}-seed{seed}" for seed in (0, 1) for stage in ("frames", "frames", "codes", "joint", "conv_lstm"))


def test_a_lost_record_is_made_again_from_the_store(study, monkeypatch):
    grid, root, *_ = study
    path = root / "digits" / "tiny--joint--seed1.json"
    before = json.loads(path.read_text())
    path.unlink()
    monkeypatch.setattr("fvlm.recipes.frame_stages.train", lambda *args, **named: pytest.fail("a finished stage was trained again"))
    assert grid.run("digits", grid.settings(), root=root, work=root / "work") == ["tiny--joint--seed1"]
    after = json.loads(path.read_text())
    assert all(before[key] == after[key] for key in ("config", "metrics", "metrics_by_clip", "data_fingerprint", "parameters"))


def test_another_recipe_is_refused_by_name(study):
    grid, root, *_ = study
    with pytest.raises(ConfigError, match="tiny--tree--seed0: was run with another recipe"):
        grid.run("digits", {"tiny": replace(SMALL, data_seed=1)}, root=root, work=root / "work")
    with pytest.raises(ConfigError, match="expected 0 to 1"):
        grid.run("digits", grid.settings(), root=root, shard=(2, 2))


def test_tables_say_what_the_records_say(study):
    grid, root, *_ = study
    records = read_records(root, "digits")
    result = future_of(records)
    runs = of_arm(records)["disjoint"]
    assert result.values["disjoint"]["mse"].shape == (2, 3, 5)
    assert result.per_horizon("disjoint").mean() == pytest.approx(np.mean([r.metrics["greedy/mse"] for r in runs]), rel=1e-4)
    assert result.values["disjoint"]["ssim"].mean() == pytest.approx(np.mean([r.metrics["greedy/ssim"] for r in runs]), rel=1e-4)
    linear = result.values["linear"]["mse"]
    assert linear.shape == (1, 3, 5) and (linear[..., 0] != linear[..., 4]).all()  # frame by frame, not a mean repeated
    for row in ("copy_last", "linear", "disjoint, one sample", "joint, ceiling", "conv_lstm"):
        assert f"| {row} |" in result.table()
    quantizers = [record for record in records if record.config["stage"] == "frames"]
    table = quantizer_table(quantizers)
    assert table.count("\n") == 3 and "| flat | 2 |" in table
    assert f"{by_seed_and_clip(of_arm(quantizers)['tree'], 'level3/mse').mean():.5f}" in table
    assert grid.table([], "tiny") is None
    assert grid.table([r for r in records if r.config["stage"] == "codes"], "tiny") is None
    with pytest.raises(InputError, match="expected the cell `trivial` too"):
        future_of([r for r in records if r.config["stage"] == "codes"])
    told, truth = result.values["told_the_path"], result.values["truth"]
    assert told["mse"].mean() < result.per_horizon("copy_last").mean() and set(truth) >= {"centre", "speed", "likeness", "bounce"}
    assert result.gigaflops["disjoint"] > 0 and result.gigaflops["conv_lstm"] > 0 and "copy_last" not in result.gigaflops
    assert result.parameters["conv_lstm"] == of_arm(records)["conv_lstm"][0].parameters and result.parameters["copy_last"] == 0 and result.parameters["mean_frame"] == 32 * 32


def test_operations_of_a_prediction_are_all_counted():
    rival = RIVALS["conv_lstm"][0].tiny()
    window, config = torch.rand(1, 5, 1, 16, 16), rival.config
    sites, width, folded = (16 // config.patch_size) ** 2, config.widths[0], config.patch_size**2
    steps = config.context_frames + 2 - 1
    wanted = steps * 2 * 9 * (folded + width) * 4 * width * sites + 2 * 2 * width * folded * sites
    assert gigaflops_of(rival, window, 3) == pytest.approx(wanted / 2 / 1e9, rel=1e-9)
    with torch.inference_mode():
        assert gigaflops_of(rival, window, 3) == pytest.approx(wanted / 2 / 1e9, rel=1e-9)


def test_what_matters_most_is_run_first(study):
    grid, *_ = study
    order = replace(grid, last=("flat",)).order()
    assert order[:5] == [("tree", 0), ("trivial", 0), ("disjoint", 0), ("joint", 0), ("conv_lstm", 0)] and order[-2:] == [("flat", 0), ("flat", 1)]
    assert len(order) == len(set(order)) == 11 and ("trivial", 1) not in order
    for real in (S_HR_VQVAE_DIGITS, S_HR_VQVAE_KTH):
        cells = real.order()
        assert cells[0] == ("trivial", 0) and {arm for arm, _ in cells} == set(real.arms) and [seed for arm, seed in cells if arm == "joint"] == [0, 1, 2]


def test_records_of_other_clips_are_not_compared(study):
    _, root, *_ = study
    records = read_records(root, "digits")
    with pytest.raises(InputError, match="different clips"):
        of_arm([records[0], replace(records[1], data_fingerprint="other")])


def test_judging_a_quantizer(study):
    clips = open_clips(SMALL, progress=False).test
    model = HRVQVAE(SMALL.quantizer).eval()
    numbers, by_clip = judge_quantizer(model, clips, batch_size=2)
    frames = clips.batch([0])["frames"]
    assert by_clip["level3/mse"][clips.clip_names[0]] == pytest.approx(float((model.reconstruct(frames) - frames).square().mean()), rel=1e-4)
    assert numbers["level1/codes"] == 4 and 0 <= numbers["level2/changes_moving"] <= 1 and 1 <= numbers["level3/perplexity"] <= numbers["level3/codes_used"]
    still = FrameClips(clips.frames[:1].repeat(3, 1, 1, 1), [0], 3, [0], ["still"])
    found, _ = judge_quantizer(model, still)
    assert found["level1/changes_still"] == 0 and "level1/changes_moving" not in found


def test_a_stage_is_named_after_what_it_depends_on():
    clips = open_clips(SMALL, progress=False)
    plain = stage_name(SMALL, "codes", clips, 0)
    assert stage_name(joint_by(1.0)(SMALL), "codes", clips, 0) == plain
    assert stage_name(replace(SMALL, test_future_frames=9), "codes", clips, 0) == plain
    others = {stage_name(predicted_with(depth=1)(SMALL), "codes", clips, 0), stage_name(SMALL, "codes", clips, 1), stage_name(SMALL, "joint", clips, 0),
              stage_name(SMALL, "codes", open_clips(replace(SMALL, data_seed=1), progress=False), 0)}
    assert len(others) == 4 and plain not in others


def test_every_arm_of_every_study_makes_a_model():
    for study in (HR_VQVAE_DIGITS, S_HR_VQVAE_DIGITS, S_HR_VQVAE_KTH):
        assert len(study.seeds) >= 3
        for recipe in study.settings().values():
            for name, arm in study.arms.items():
                study.described(recipe, name, 0)
    ours = parameters_of(moving_mnist_stride8(), "codes")
    for arm in (arm for arm in PREDICTOR_ARMS.values() if arm.stage != "trivial"):
        changed = arm.change(moving_mnist_stride8())
        if "as many parameters" in arm.what:
            assert abs(parameters_of(changed, arm.stage) / ours - 1) < 0.1
        elif arm.stage in RIVALS:
            assert arm.same_seconds
