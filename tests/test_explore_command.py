"""`fvlm explore`: a page of an encoder, of a foveated VLM and of SC-VFP, and one sentence for every mistake."""
import re
from dataclasses import asdict, replace

import numpy as np
import pytest
from PIL import Image

from fvlm.app import cli
from fvlm.app.explore_command import ExploreCommand, default_size, frames_to_show, kind_of_run
from fvlm.app.foveation_commands import save_foveation_run
from fvlm.core import ConfigError, InputError, VideoError, WeightsError
from fvlm.data.worlds import BouncingSprites
from fvlm.encoders.embedding_windows import Standardiser
from fvlm.encoders.embeddings import FrameEmbedder
from fvlm.files import write_json
from fvlm.models.foveated_vlm import FoveatedVLM
from fvlm.models.sc_vfp import SCVFP, SCVFPConfig
from fvlm.recipes.foveated_vlm import load_parts, tiny
from fvlm.training.recipes import EncoderChoice, sc_vfp
from tests.hostile_videos import write_video
from tests.widget_pages import state_of

FRAMES = BouncingSprites(num_clips=1, num_frames=40, seed=3)[0]["frames"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("clip") / "balls.mp4", FRAMES)


@pytest.fixture
def tiny_encoder(monkeypatch):
    "Random weights in place of real ones, whatever the name."
    monkeypatch.setattr(FrameEmbedder, "from_pretrained", classmethod(lambda cls, name, *args, **options: FrameEmbedder.tiny(pooling="mean")))
    monkeypatch.setitem(cli.COMMANDS, "explore", ("fvlm.app.explore_command:ExploreCommand", "a page"))


def test_which_frames(clip):
    assert frames_to_show(clip, 4) == [0, 13, 26, 39] and frames_to_show(clip, 1) == [0] and frames_to_show(clip, 100) == list(range(40))
    assert frames_to_show(clip, 4, 3) == [0, 3, 6, 9] and frames_to_show(clip, 9, 10) == [0, 10, 20, 30]
    for wrong in (dict(count=0), dict(count=4, stride=0)):
        with pytest.raises(ConfigError):
            frames_to_show(clip, **wrong)


def test_twelve_patches_a_side():
    assert default_size("dinov2_small") == 168 and default_size("vit_base_patch16_224") == 192
    with pytest.raises(ConfigError, match="near: "):
        default_size("vit_bose_patch16_224")


def test_an_encoders_page(clip, tiny_encoder, tmp_path, capsys):
    page, still = tmp_path / "e.html", tmp_path / "e.png"
    assert cli.main(["explore", str(clip), "--out", str(page), "--picture", str(still), "--frames", "3", "--layers", "2"]) == 0
    said, state = capsys.readouterr(), state_of(page.read_text())
    assert "3 frames, patch to patch (1 layers, 2 heads)" in said.out and "balls.mp4" in said.out
    (cube,) = state["_about"]["cubes"]
    assert cube["numbers"] == [2] and cube["frames"] == 3 and state["_about"]["labels"] == ["frame 0", "frame 20", "frame 39"] and not re.search("https?://", page.read_text())
    assert Image.open(still).format == "PNG"


def test_a_foveated_runs_page(clip, tmp_path, capsys):
    recipe = tiny()
    parts = load_parts(recipe)
    model = FoveatedVLM(recipe.model.changed(embed_dim=parts.encoder.embed_dim, hidden_size=parts.language_model.hidden_size), parts.encoder, parts.language_model)
    save_foveation_run(tmp_path / "run", model, recipe, 3)
    assert ExploreCommand(clip=clip, run_folder=tmp_path / "run", out=tmp_path / "g.html", quiet=True).run() == 0
    about = state_of((tmp_path / "g.html").read_text())["_about"]
    assert [cube["name"] for cube in about["cubes"]] == ["coarse", "fine"] and about["cubes"][1]["frames"] == recipe.frames and about["cubes"][1]["path"] is not None
    assert about["labels"][1] == f"frame {int(about['labels'][0].split()[1]) + recipe.gap}"


def test_a_predictors_page(clip, tmp_path, monkeypatch):
    embedder = FrameEmbedder.tiny(pooling="mean")
    monkeypatch.setattr(EncoderChoice, "load", lambda self, **options: embedder)
    recipe, folder = replace(sc_vfp(), context_frames=3, gap=4), tmp_path / "run"
    SCVFP(SCVFPConfig.preset("tiny", embed_dim=32, context_frames=3)).save_pretrained(folder / "model")
    write_json(folder / "run.json", dict(format=1, recipe=asdict(recipe), standardiser=Standardiser.fit([np.random.default_rng(0).normal(size=(50, 32)).astype("float32")]).state(),
                                         encoder_fingerprint=embedder.fingerprint, data_fingerprint="", sides={}))
    assert ExploreCommand(clip=clip, run_folder=folder, out=tmp_path / "t.html", frames=6, quiet=True).run() == 0
    about = state_of((tmp_path / "t.html").read_text())["_about"]
    assert about["cubes"][0]["seen"] == [[0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5]] and about["labels"][1] == "4 to 12"
    with pytest.raises(VideoError, match="gives 2 frames, 30 apart; one window of this run needs 3"):
        ExploreCommand(clip=clip, run_folder=folder, stride=30, out=tmp_path / "t.html", quiet=True).run()


@pytest.mark.parametrize("words, said", [
    (["nowhere.mp4"], "clip: expected a video file, got nowhere.mp4"), (["CLIP", "--run", "nowhere"], "run: nowhere is not the folder of a finished run"), (["CLIP", "--layers", "3"], "layers: got 3, expected some of 1 to 2"),
    (["CLIP", "--frames", "0"], "frames: got 0"), (["CLIP", "--max-megabytes", "0.001"], "2 layers x 2 heads x 8 frames x 17 x 17 tokens are 0.0185 MB, the page may hold 0.001; take a smaller --size"),
    (["CLIP", "--device", "tpu"], "device: got 'tpu'"), (["CLIP", "--encoder", "dinov2_smal"], "near: dinov2_small"),
])
def test_mistakes_are_one_sentence(words, said, clip, tiny_encoder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [str(clip) if word == "CLIP" else word for word in words]
    assert cli.main(["explore", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error, error
    assert not (tmp_path / "explorer.html").exists()


def test_folders_that_are_no_runs(tmp_path):
    write_json(tmp_path / "run.json", {"format": 1, "system": "hr_vqvae"})
    with pytest.raises(InputError, match="holds a run without attention"):
        kind_of_run(tmp_path)


def test_help_has_examples(tiny_encoder, capsys):
    assert cli.main(["explore", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "fvlm explore my_clip.mp4 --run runs/captions" in shown and "--max-megabytes" in shown


def test_weights_that_are_missing_are_named(clip, tmp_path, monkeypatch):
    monkeypatch.setenv("FVLM_HOME", str(tmp_path / "empty"))
    with pytest.raises(WeightsError, match="fvlm weights get dinov2_small_saliency"):
        ExploreCommand(clip=clip, out=tmp_path / "e.html", quiet=True).run()


@pytest.mark.pretrained
def test_real_weights(clip, tmp_path):
    try:
        assert ExploreCommand(clip=clip, out=tmp_path / "e.html", size=70, frames=2, quiet=True).run() == 0
    except WeightsError as error:
        pytest.skip(str(error)[:80])
    state = state_of((tmp_path / "e.html").read_text())
    assert state["_about"]["cubes"][0]["layers"] == 12 and state["_pictures"][0][:2] == b"\xff\xd8"
