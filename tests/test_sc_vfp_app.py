"""From a folder with broken files to a page; and train, evaluate, predict by the command line with real weights."""
import json
import re
import shutil
from dataclasses import replace

import pytest
import torch

from fvlm.app.demo import demo_report, first_real, look, plain_table, run_demo
from fvlm.app.explore_command import predict_page
from fvlm.app.sc_vfp_commands import SC_VFP_KTH, STUDIES, TrainCommand, named
from fvlm.core import ConfigError, InputError, VideoError
from fvlm.data.embedding_cache import EmbeddingCache
from fvlm.data.video import probe
from fvlm.data.worlds import BouncingSprites
from fvlm.encoders.embeddings import FrameEmbedder
from fvlm.evidence.experiment import BASELINES
from fvlm.training.recipes import ARMS, ModelSize, load_recipe
from fvlm.training.saved_runs import SavedRun
from tests.hostile_videos import write_video


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Six good clips, one too short, one text file, one empty file, in folders with spaces."
    root = tmp_path_factory.mktemp("videos") / "my videos"
    world = BouncingSprites(num_clips=6, num_frames=40, seed=0)
    for i in range(6):
        write_video(root / f"day {i % 2}" / f"clip {i}.mp4", world[i]["frames"])
    write_video(root / "short.mp4", world[0]["frames"][:8])
    (root / "notes.mp4").write_text("not a video")
    (root / "empty.avi").write_bytes(b"")
    return root


SMALL = replace(load_recipe("sc_vfp"), size=ModelSize(width=16, depth=1, num_heads=2, ffn_dim=16, mlp_dims=()))
SMALL = replace(SMALL, training=replace(SMALL.training, steps=6, val_every=3))


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    recipe = replace(SMALL, videos=str(folder))
    return run_demo(recipe, out, seeds=2, embedder=FrameEmbedder.tiny(), cache=EmbeddingCache(out / "cache"), download=False, progress=False), recipe


def test_demo_on_a_folder_with_broken_files(run, folder):
    found, _ = run
    assert {row.name for row in found.rows} == {*BASELINES, "mhsa", "scmhsa", "scmhsa_similarity"}
    assert sorted(path.name for path, _ in found.bad) == ["empty.avi", "notes.mp4"]
    assert sum(len(clips) for clips in found.splits.clips.values()) == 6
    assert str(folder) not in plain_table(found.rows)


def test_report_is_one_file_without_network(run, tmp_path):
    found, recipe = run
    page = demo_report(found, recipe).save(tmp_path / "report.html", quiet=True).read_text()
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?:https?:)?//""", page)
    for words in ("copy_last", "ridge", "scmhsa_similarity", "notes.mp4", "random_tiny", "cannot"):
        assert words in page
    assert "nan" not in re.sub(r"base64,[^\"']+", "", page).lower().split()


def test_look_names_truth_and_copy(run):
    found, recipe = run
    seen = look(found.trained["scmhsa"].model, found.splits, first_real(found.splits), moments=5)
    assert len(seen.truth) == len(seen.predicted) == len(seen.copied) == len(seen.errors["prediction"]) == 5
    assert all(t >= recipe.context_frames * recipe.gap for t in seen.target_frames) and 0 <= seen.copies <= 1
    truth = torch.stack(seen.truth).float()
    assert truth.std() > 0 and not torch.equal(truth, torch.stack(seen.copied).float())


def test_predict_page_wants_enough_frames(run, folder):
    found, recipe = run
    saved = SavedRun(model=found.trained["scmhsa"].model, recipe=recipe, standardiser=found.splits.standardiser, encoder_fingerprint="", data_fingerprint="", sides={})
    clip = folder / "short.mp4"
    with pytest.raises(VideoError, match="needs at least 21"):
        predict_page(saved, torch.zeros(8, 32), clip, probe(clip))
    good = folder / "day 0" / "clip 0.mp4"
    page = predict_page(saved, found.encoder(BouncingSprites(num_clips=1, num_frames=40, seed=0)[0]["frames"])[0], good, probe(good), moments=3, ahead=2).html()
    assert "After the last frame" in page and "copy-last" in page


def test_too_few_clips_is_one_sentence(folder, tmp_path):
    with pytest.raises(InputError, match="both sides of a split"):
        run_demo(replace(SMALL, videos=str(folder / "day 0"), group=r"(clip) \d"), tmp_path, embedder=FrameEmbedder.tiny(), cache=EmbeddingCache(tmp_path / "c"), download=False, progress=False)


def test_train_takes_a_recipe_first():
    with pytest.raises(ConfigError, match="expected one of sc_vfp"):
        TrainCommand.chosen([])
    with pytest.raises(ConfigError, match="did you mean 'sc_vfp'"):
        TrainCommand.chosen(["sc_vpf"])
    assert TrainCommand.chosen(["sc_vfp_paper", "--arm", "mhsa"])[0].recipe.size.depth == 6


@pytest.mark.parametrize("words, said", [
    (["--videos", "wurlds"], "did you mean 'worlds'"), (["--videos", "worlds", "--resume", "atuo"], "expected 'auto'"), (["--videos", "worlds", "--card", "ktth"], "kth")])
def test_typos_are_told_before_anything_is_loaded(words, said, monkeypatch, capsys, tmp_path):
    from fvlm.app.cli import main
    from fvlm.training.recipes import EncoderChoice

    monkeypatch.setattr(EncoderChoice, "load", lambda *args, **named: pytest.fail("the encoder was loaded first"))
    assert main(["train", "sc_vfp", *words, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_studies_are_there_and_name_real_arms():
    assert set(SC_VFP_KTH.arms) <= set(ARMS) and len(SC_VFP_KTH.seeds) >= 5 and named(STUDIES["sc_vfp_kth"]) is SC_VFP_KTH
    for place in STUDIES.values():
        study = named(place)
        assert study.question[-1] in "?." and study.settings() and callable(study.run) and callable(study.table)


def test_train_evaluate_predict_by_command(wheel_file, folder, tmp_path, capsys):
    wheel_file("dinov2_small_saliency")
    from fvlm.app.cli import main

    run = tmp_path / "run"
    small = ["--encoder.image-size", "70", "--size.width", "16", "--size.num-heads", "2", "--size.ffn-dim", "16", "--size.depth", "1", "--training.steps", "6", "--training.val-every", "3"]
    assert main(["train", "sc_vfp", "--videos", str(folder), "--out", str(run), "--download", "--no-progress", *small]) == 0
    told = capsys.readouterr().out
    assert "dinov2_small_saliency" in told and "set aside notes.mp4" in told and "too short for one window" in told and "ridge" in told
    assert main(["evaluate", "--run", str(run), "--json"]) == 0
    judged = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert judged["scmhsa"] == pytest.approx(float(re.search(r"^scmhsa\s+([\d.]+)", told, re.M)[1]), abs=1e-4)
    assert main(["predict", str(folder / "day 1" / "clip 1.mp4"), "--run", str(run), "--out", str(tmp_path / "future.html"), "--moments", "3"]) == 0
    assert (tmp_path / "future.html").stat().st_size > 10_000
    capsys.readouterr()
    assert main(["predict", str(folder / "notes.mp4"), "--run", str(run)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error:") and "notes.mp4" in error and "\n" not in error
    half = tmp_path / "half"
    whole = [*["train", "sc_vfp", "--videos", str(folder), "--no-progress", "--json"], *small, "--training.save-every", "3"]
    assert main([*whole, "--out", str(half)]) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert main([*whole, "--out", str(half)]) == 2  # a finished run is not trained over by a forgotten option
    assert "holds a finished run" in capsys.readouterr().err
    shutil.rmtree(half / "step-00000006")
    assert main([*whole, "--out", str(half), "--resume", "auto"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == first
    assert [json.loads(line)["step"] for line in (half / "log.jsonl").read_text().splitlines() if '"train"' in line][-1] == 6
    assert main([*whole, "--out", str(half), "--resume", "auto", "--training.learning-rate", "0.01"]) == 2
    assert "learning_rate: 0.01 here, 0.001 in the checkpoint" in capsys.readouterr().err
    write_video(folder / "day 0" / "another.mp4", BouncingSprites(num_clips=1, num_frames=40, seed=7)[0]["frames"])
    assert main(["evaluate", "--run", str(run)]) == 2
    assert "have changed since" in capsys.readouterr().err
