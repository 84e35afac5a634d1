"""The foveated VLM from a terminal: train, caption, demo; and one sentence for every mistake."""
import json
import re
from dataclasses import asdict, replace

import pytest
import torch

from fvlm.app import foveation_commands as commands
from fvlm.app.cli import main, parse
from fvlm.app.demo import PARTS, DemoCommand
from fvlm.app.foveation_commands import (
    CaptionCommand, TrainFoveationCommand, caption_page, check_speaks, gaze_at, judged, open_foveation_run, read_foveation_run, save_foveation_run, shown_clip,
)
from fvlm.app.foveation_demo import codec_at_hand, compared_heads, demo_recipe, foveation_report, plain_results, run_foveation_demo, videos_of
from fvlm.app.report import Report
from fvlm.app.sc_vfp_commands import TrainCommand
from fvlm.blocks.prediction_heads import HEADS
from fvlm.core import ConfigError, InputError, VideoError, WeightsError
from fvlm.data.worlds import BouncingSprites
from fvlm.recipes.foveated_vlm import FoveationRecipe, load_parts, open_clips, tiny, train_twin
from tests.hostile_videos import write_video

FRAMES = BouncingSprites(num_clips=1, num_frames=40, seed=3)[0]["frames"]


def speaking(**changes):
    "The tiny recipe with words."
    recipe = tiny()
    return replace(recipe, words=True, model=recipe.model.changed(caption_weight=1.0, prediction_weight=0.5, **changes))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A folder with a run, its clips and a video."
    folder, recipe = tmp_path_factory.mktemp("run"), speaking()
    parts = load_parts(recipe)
    sides = open_clips(recipe, parts, dir=folder / "encoded", progress=False)
    model, _ = train_twin(recipe, parts, sides["train"], trained_pass="both", seed=0, progress=False)
    save_foveation_run(folder / "run", model.eval(), recipe, len(sides["train"]))
    write_video(folder / "clip.mp4", FRAMES)
    return folder, sides, model


# --- run folders -----------------------------------------------------------------------------------------------------

def test_a_run_says_the_same_after_it_was_opened(run):
    folder, sides, model = run
    opened = open_foveation_run(folder / "run")
    assert opened.recipe == speaking() and opened.trained_on == f"{len(sides['train'])} clips of “sprites”" and not opened.model.training
    assert judged(opened.model, opened.recipe, sides["test"]) == judged(model, opened.recipe, sides["test"])


def test_a_run_of_clips_that_are_gone_still_opens(run, tmp_path):
    folder, _, model = run
    (tmp_path / "my clips").mkdir()
    save_foveation_run(tmp_path / "run", model, replace(speaking(), source=str(tmp_path / "my clips")), 3)
    (tmp_path / "my clips").rmdir()
    assert read_foveation_run(tmp_path / "run")[1] == "3 clips of “my clips”"


@pytest.mark.parametrize("about, said", [
    (None, "fvlm train captions --out"), ({"format": 1, "recipe": {}, "standardiser": {}}, "another kind of run"),
    ({"format": 2, "system": "foveated_vlm", "recipe": {}, "trained_on": ""}, "format 1"),
    ({"format": 1, "system": "foveated_vlm", "recipe": {"fraems": 3}, "trained_on": ""}, "unknown field fraems"), ([], "another kind of run"),
])
def test_other_folders_are_refused_in_one_sentence(about, said, tmp_path):
    if about is not None:
        (tmp_path / "run.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match=said):
        read_foveation_run(tmp_path)


def test_a_run_around_other_parts_is_refused(run, tmp_path):
    folder, _, model = run
    save_foveation_run(tmp_path / "run", model, speaking(), 3)
    about = json.loads((tmp_path / "run" / "model" / "parts.json").read_text())
    (tmp_path / "run" / "model" / "parts.json").write_text(json.dumps(about | {"encoder": "0" * 64}))
    with pytest.raises(WeightsError, match="encoder.*trained around another one"):
        open_foveation_run(tmp_path / "run")


# --- clips and gaze --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("count, indices, note", [
    (40, [13, 17, 21, 25], ""), (13, [0, 4, 8, 12], ""), (12, [1, 4, 7, 10], "3 apart instead of 4"), (4, [0, 1, 2, 3], "1 apart instead of 4"), (2, [0, 1], "2 frames instead of 4")])
def test_which_frames_a_clip_is_shown_with(count, indices, note, tmp_path):
    shown = shown_clip(write_video(tmp_path / "a.mp4", FRAMES[:count]), frames=4, gap=4, image_size=32)
    assert shown.indices == indices and note in shown.note and bool(note) == bool(shown.note)
    assert shown.batch["frames"].shape == (1, len(indices), 3, 32, 32) and 0 <= shown.batch["frames"].min() and shown.batch["frames"].max() <= 1
    assert len(shown.pictures) == len(indices)


def test_a_clip_of_one_frame_and_a_file_that_is_none(tmp_path):
    with pytest.raises(VideoError, match="has 1 frame; the model needs at least 2"):
        shown_clip(write_video(tmp_path / "one.mp4", FRAMES[:1]), frames=4, gap=4, image_size=32)
    (tmp_path / "notes.mp4").write_text("not a video")
    with pytest.raises(VideoError):
        shown_clip(tmp_path / "notes.mp4", frames=4, gap=4, image_size=32)


def test_gaze_is_that_of_the_passes(run):
    folder, _, model = run
    shown = shown_clip(folder / "clip.mp4", frames=4, gap=4, image_size=32)
    gaze = gaze_at(model, shown)
    assert gaze.grid == model.encoder.grid and torch.allclose(gaze.fine.sum(1), torch.ones(4)) and torch.allclose(gaze.coarse.sum(1), torch.ones(4))
    assert not torch.allclose(gaze.fine, gaze.coarse) and all(1 <= n <= 16 for n in gaze.patches("fine"))
    with torch.no_grad():
        model_again = open_foveation_run(folder / "run").model
        model_again.q_static.add_(1.0)
        moved = gaze_at(model_again, shown)
    assert not torch.allclose(moved.coarse, gaze.coarse)
    report = Report("x")
    gaze.scrubber(report)
    assert report.html().count("data:image") >= 12


# --- caption ---------------------------------------------------------------------------------------------------------

def test_caption_by_command(run, tmp_path, capsys):
    folder, _, _ = run
    words = ["caption", str(folder / "clip.mp4"), "--run", str(folder / "run"), "--max-words", "6"]
    assert main([*words, "--json", "--out", str(tmp_path / "caption.html")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["frames"] == [13, 17, 21, 25] and told["note"] == "" and len(told["caption"]) <= 6
    assert main(words) == 0 and capsys.readouterr().out.splitlines()[0] in (told["caption"], "(nothing: the end of the text was the likeliest first word)")
    page = (tmp_path / "caption.html").read_text()
    assert "clip.mp4" in page and "clips of “sprites”" in page and not re.search(r"""(?:src|href)\s*=\s*["'](?:https?:)?//""", page)
    for mode in ("coarse", "one_stream", "two_stream"):
        assert main([*words, "--json", "--mode", mode]) == 0
        assert json.loads(capsys.readouterr().out)["mode"] == mode


def test_a_question_reaches_the_model(run):
    folder, _, _ = run
    opened = open_foveation_run(folder / "run")
    shown = shown_clip(folder / "clip.mp4", frames=4, gap=4, image_size=32)
    gazes = [gaze_at(opened.model, shown, text=commands.asked(question, opened.model)) for question in ("", "red ball", "blue star")]
    assert commands.asked(" ", opened.model) == {}
    assert torch.equal(gazes[0].coarse, gazes[1].coarse) and not torch.allclose(gazes[1].fine, gazes[2].fine)
    assert "asked about: red ball" in caption_page(opened, shown, "x", "red ball", commands.asked("red ball", opened.model)).html()


@pytest.mark.parametrize("words, said", [
    (["nowhere.mp4"], "no such file"), (["FOLDER"], "give one file of it"), (["CLIP", "--run", "nowhere"], "fvlm train captions --out nowhere"), (["CLIP", "--max-words", "0"], "max_words: got 0"),
    (["CLIP", "--run", "RUN", "--max-words", "5000"], "the language model has 256"), (["BROKEN", "--run", "RUN"], "broken.mp4"), (["ONE", "--run", "RUN"], "has 1 frame")])
def test_caption_mistakes_are_one_line(run, words, said, tmp_path, capsys):
    folder, _, _ = run
    (tmp_path / "broken.mp4").write_text("not a video")
    places = {"CLIP": folder / "clip.mp4", "RUN": folder / "run", "FOLDER": folder, "BROKEN": tmp_path / "broken.mp4", "ONE": write_video(tmp_path / "one.mp4", FRAMES[:1])}
    assert main(["caption", *(str(places.get(word, word)) for word in words)]) == 2
    out, err = capsys.readouterr()
    assert said in err and err.count("\n") == 1 and err.startswith("error: ") and out == ""


def test_mistakes_are_found_before_weights_are_loaded(run, monkeypatch):
    folder, _, _ = run
    monkeypatch.setattr(commands, "load_parts", lambda *args, **named: pytest.fail("weights were loaded first"))
    for clip in ("nowhere.mp4", str(folder / "run" / "run.json")):
        with pytest.raises(InputError):
            CaptionCommand(clip=commands.Path(clip), run_folder=folder / "run").run()


def test_a_silent_run_and_an_untrained_pass_are_refused():
    with pytest.raises(ConfigError, match="not to speak"):
        check_speaks(tiny())
    with pytest.raises(ConfigError, match="coarse pass was not trained; expected 'coarse_fine'"):
        check_speaks(speaking(trained_pass="fine"), "coarse")
    with pytest.raises(ConfigError, match="fine pass was not trained; expected 'coarse'"):
        check_speaks(speaking(trained_pass="coarse"), "two_stream")
    for trained, mode in (("fine", "one_stream"), ("coarse", "coarse"), ("both", "coarse"), ("both", "coarse_fine")):
        check_speaks(speaking(trained_pass=trained), mode)


# --- train -----------------------------------------------------------------------------------------------------------

def test_the_first_word_of_train_chooses_the_command():
    assert type(parse("train", ["captions", "--out", "x"])) is TrainFoveationCommand
    assert type(parse("train", ["sc_vfp", "--out", "x"])) is TrainCommand
    made = parse("train", ["gaze", "--training.steps", "7", "--model.num-queries", "4"])
    assert made.recipe.source == "cued" and made.recipe.training.steps == 7 and made.recipe.model.num_queries == 4 and made.out.name == "gaze"
    with pytest.raises(ConfigError, match="did you mean 'captions'"):
        TrainCommand.chosen(["capttions"])


def test_train_and_go_on_by_command(own_home, tmp_path, capsys, monkeypatch):
    words = ["train", "tiny", "--words", "--model.caption-weight", "1", "--out", str(tmp_path / "run"), "--no-progress", "--world-clips", "12"]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "held out" in told and "copy-last" in told and "said" in told and f"fvlm caption CLIP --run {tmp_path / 'run'}" in told
    assert open_foveation_run(tmp_path / "run").recipe.words
    assert main(words) == 2 and "holds a finished run" in capsys.readouterr().err
    assert main([*words, "--overwrite", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert set(again) == {"errors", "captions"} and {row["clip"].split("/")[0] for row in again["captions"]} == {"sprites"}
    assert f"{again['errors']['fine']:.4f}" in told


def test_captions_need_captions(own_home, tmp_path, capsys):
    clips = tmp_path / "clips"
    clips.mkdir()
    for i in range(4):
        write_video(clips / f"{i}.mp4", FRAMES.roll(i, 1))
    assert main(["train", "tiny", "--source", str(clips), "--words", "--model.caption-weight", "1", "--out", str(tmp_path / "run"), "--no-progress"]) == 2
    assert "no clip of" in (err := capsys.readouterr().err) and "has a caption;" in err
    assert main(["train", "tiny", "--model.caption-weight", "1", "--out", str(tmp_path / "run"), "--no-progress"]) == 2
    assert "words=False" in capsys.readouterr().err
    assert main(["train", "captions", "--source", "sprits", "--dry-run"]) == 2


def test_sources_can_be_joined(tmp_path):
    recipe = replace(tiny(), source="sprites+cued", world_clips=8)
    sides = open_clips(recipe, load_parts(recipe), dir=tmp_path, progress=False)
    assert {name.split("/")[0] for side in sides.values() for name in side.names} == {"sprites", "cued"}
    with pytest.raises(ConfigError, match="did you mean 'cued'"):
        replace(tiny(), source="sprites+cuedd")


def test_dry_run_shows_the_recipe_and_loads_nothing(capsys, monkeypatch):
    monkeypatch.setattr(commands, "load_parts", lambda *args, **named: pytest.fail("weights were loaded"))
    assert main(["train", "captions", "--dry-run", "--training.steps", "9"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["training"]["steps"] == 9 and shown["model"]["caption_weight"] == 1.0 and set(shown) == set(asdict(tiny()))


# --- demo ------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder, recipe = tmp_path_factory.mktemp("demo"), replace(tiny(), world_clips=21)
    videos = [write_video(folder / "a.mp4", FRAMES), write_video(folder / "one.mp4", FRAMES[:1])]
    made = lambda: run_foveation_demo(recipe, load_parts(recipe), videos, dir=folder / "encoded", head_steps=3, progress=False)
    return made(), made


def test_demo_finds_the_same_again(demo):
    found, made = demo
    first, second = (plain_results(x) for x in (found, made()))
    seconds = first.pop("seconds"), second.pop("seconds")
    assert first == second and set(seconds[0]) == set(seconds[1])
    assert set(first["ratios"]) == {"R0", "R1", "R2", "R3"} and {row["head"] for row in first["heads"]} == set(HEADS) and first["clips"] == {"train": 12, "val": 3, "test": 6}
    assert first["set_aside"][0][0] == "one.mp4" and list(first["gaze"]) == ["a.mp4"]
    json.dumps(first, allow_nan=False)


def test_demo_page_is_one_honest_file(demo, tmp_path):
    found, _ = demo
    page = foveation_report(found).save(tmp_path / "report.html", quiet=True).read_text()
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?:https?:)?//""", page)
    for words in ("too few to judge foveation", "R0", "R2", "copy-last", "ridge", "spatial authority", "a.mp4", "one.mp4", "decide nothing", "frame 1"):
        assert words.lower() in page.lower(), words
    assert "nan" not in re.sub(r"base64,[^\"']+", "", page).lower().split()


def test_heads_alone_learn_and_are_of_one_size():
    draw = torch.Generator().manual_seed(0)

    def half_everywhere(n):
        return torch.randn(n, 5, 24, generator=draw), torch.randn(n, 5, 4, 4, 4, generator=draw), torch.full((n, 5, 4, 4, 4), 0.5)

    train, test = half_everywhere(8), half_everywhere(4)
    short, long, again = ({row.head: row for row in compared_heads(train, test, steps=steps, samples=4, directions=4, width=16)} for steps in (1, 40, 40))
    assert set(short) == set(HEADS) and again == long
    assert all(long[name].error < short[name].error for name in HEADS)
    assert all(-0.5 <= row.authority <= 1 for row in long.values())
    assert max(row.parameters for row in long.values()) < 1.5 * min(row.parameters for row in long.values())


def test_demo_looks_at_nothing_and_says_so(demo, tmp_path):
    _, _ = demo
    with pytest.raises(InputError, match="none of 1 could be looked at"):
        recipe = replace(tiny(), world_clips=21, training=replace(tiny().training, steps=1))
        run_foveation_demo(recipe, load_parts(recipe), [tmp_path / "nothing.mp4"], dir=tmp_path / "encoded", seeds=1, head_steps=1, progress=False)
    with pytest.raises(InputError):
        videos_of(tmp_path)


def test_every_part_of_the_demo_is_there(tmp_path, capsys):
    for place in PARTS.values():
        assert callable(__import__("fvlm.app.sc_vfp_commands", fromlist=["named"]).named(place))
    for name in PARTS:
        assert parse("demo", ["--part", name]).part == name
    for words, said in ((["--seeds", "0"], "seeds: got 0"), (["--steps", "-1"], "steps: got -1"), (["--videos", str(tmp_path / "no")], "no such folder")):
        assert main(["demo", "--part", "fvlm", *words]) == 2
        assert said in capsys.readouterr().err
    assert DemoCommand().seeds is None and demo_recipe().encoder == "dinov2_small_saliency" and codec_at_hand() in ("taesd", "dct")
