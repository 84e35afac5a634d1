"A user's own folder, by the two commands a user types first: twenty videos of mixed kinds, some of them broken, and an account of every one."
import sys
from pathlib import Path

import pytest

from fvlm.app.cli import main
from fvlm.core import cache_dir
from fvlm.training.saved_runs import open_run

sys.path.append(str(Path(__file__).parent))
from test_extraction import own_folder  # noqa: E402, F401  (a fixture: the folder, frames by good film, names of broken ones)


@pytest.fixture
def home(pretrained_vit, tmp_path, monkeypatch):
    "A cache folder of this test's own that has the real weights, and no embeddings."
    real, own = cache_dir(), tmp_path / "fvlm_home"
    own.mkdir()
    for name in ("weights", "wheels"):
        if (real / name).is_dir():
            (own / name).symlink_to(real / name, target_is_directory=True)
    monkeypatch.setenv("FVLM_HOME", str(own))
    return own


def lines(capsys):
    return [line.strip() for line in capsys.readouterr().out.splitlines()]


def test_embed(home, own_folder, capsys):  # noqa: F811
    root, good, broken = own_folder
    assert main(["embed", str(root), "--image-size", "70", "--quiet"]) == 0
    told = lines(capsys)
    summary = next(line for line in told if "clips embedded" in line)
    assert summary.startswith(f"15 clips embedded ({sum(good.values()) + 4} frames") and "5 bad, 2 skipped" in summary
    assert {line.split(": ")[1] for line in told if line.startswith("bad:")} == broken
    assert all(len(line.split(": ", 2)[2]) > 4 for line in told if line.startswith("bad:")), "each with a reason"
    assert {"bad: summer 1/a letter.avi: a text file, not a video", "bad: summer 1/empty.mp4: empty file", "bad: summer 1/a picture.mov: a PNG picture, not a video"} <= set(told)
    assert {"skipped: 2 files (.jpg): not a video by its name", "skipped: 1 file (.txt): not a video by its name"} <= set(told)
    listed = (home / "embeddings" / "bad_files.jsonl").read_text(encoding="utf-8")
    assert all(name.split("/")[1] in listed for name in broken) and listed.count("\n") == len(broken)

    assert main(["embed", str(root), "--image-size", "70", "--quiet"]) == 0
    assert any(line.startswith("0 clips embedded (0 frames), 15 already cached, 5 bad, 2 skipped") for line in lines(capsys))


def test_train(home, own_folder, tmp_path, capsys):  # noqa: F811
    root, good, broken = own_folder
    small = ["--encoder.image-size", "70", "--context-frames", "3", "--gap", "2", "--size.width", "16", "--size.num-heads", "2", "--size.ffn-dim", "16", "--size.depth", "1",
             "--training.steps", "6", "--training.val-every", "3"]
    assert main(["train", "sc_vfp", "--videos", str(root), "--out", str(tmp_path / "run"), "--no-progress", *small]) == 0
    told = lines(capsys)
    aside = dict(line.removeprefix("set aside ").split(": ", 1) for line in told if line.startswith("set aside"))
    assert set(aside) == set(broken) and all(len(reason) > 4 for reason in aside.values())
    by_file = {name.rsplit("/", 1)[-1]: reason for name, reason in aside.items()}
    assert by_file["a letter.avi"] == "a text file, not a video" and by_file["empty.mp4"] == "empty file"
    assert "too short for one window: glimpse.mp4 (4 frames)" in told
    sides = {line.split()[0]: int(line.split()[1]) for line in told if " windows" in line}
    assert set(sides) == {"train", "val", "test"} and sum(sides.values()) == len(good)
    assert any(line.startswith("ridge") for line in told) and any(line.startswith("scmhsa") for line in told)
    assert open_run(tmp_path / "run").recipe.videos == str(root)
