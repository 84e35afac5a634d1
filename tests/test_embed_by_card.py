"""`fvlm embed --card`: what is embedded is what the card finds, pictures in folders too."""
import numpy as np
import pytest
from PIL import Image

from fvlm.app.cli import main


@pytest.fixture
def tree(tmp_path):
    "Two tiny clips in UCSD's own layout: folders of numbered tif pictures."
    draw = np.random.default_rng(0)
    for part, clip in (("Train", "Train001"), ("Test", "Test001")):
        folder = tmp_path / "ucsd" / "UCSDped1" / part / clip
        folder.mkdir(parents=True)
        for k in range(4):
            Image.fromarray(draw.integers(0, 255, (158, 238), dtype=np.uint8)).save(folder / f"{k + 1:03d}.tif")
    return tmp_path / "ucsd"


def test_folders_of_pictures_are_embedded_by_their_card(tree, wheel_file, tmp_path, capsys):
    wheel_file("dinov2_small_saliency")
    words = ["embed", str(tree), "--card", "ucsd_pedestrian", "--image-size", "70", "--download", "--quiet", "--out", str(tmp_path / "rows")]
    assert main(words) == 0
    assert "2 clips embedded (8 frames" in capsys.readouterr().out
    assert main(words) == 0
    assert "0 clips embedded" in capsys.readouterr().out


def test_an_unknown_card_is_one_sentence(tree, capsys):
    assert main(["embed", str(tree), "--card", "ucsd", "--quiet"]) == 2
    assert "ucsd_pedestrian" in capsys.readouterr().err
