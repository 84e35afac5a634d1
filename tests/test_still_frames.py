"""Folders of pictures and arrays are films like any other."""
import numpy as np
import pytest
import torch
from PIL import Image

from fvlm.core import ConfigError, VideoError
from fvlm.data.still_frames import is_still, picture_files, split_item
from fvlm.data.video import decode, probe, read_clip

RNG = np.random.default_rng(0)
FRAMES = RNG.integers(0, 256, (12, 20, 30, 3), dtype=np.uint8)


@pytest.mark.parametrize("suffix, grey", [("tif", False), ("png", False), ("bmp", False), ("png", True), ("tif", True)])
def test_a_folder_of_pictures(tmp_path, suffix, grey):
    for t, frame in enumerate(FRAMES):
        Image.fromarray(frame[..., 0] if grey else frame).save(tmp_path / f"img_{t + 1}.{suffix}")
    (tmp_path / "._img_1.tif").write_bytes(b"left by another system")
    (tmp_path / "notes.txt").write_text("not a picture")
    want = torch.from_numpy(np.repeat(FRAMES[..., :1], 3, -1) if grey else FRAMES)
    clip, info = decode(tmp_path, [11, 0, 9, 9]), probe(tmp_path)
    assert torch.equal(clip.frames, want[[11, 0, 9, 9]]) and clip.backend == "pictures" and "25 frames a second" in clip.notes[0]
    assert (info.frames, info.fps, info.height, info.width, info.codec, info.backend) == (12, 25.0, 20, 30, suffix, "pictures")
    assert np.allclose(clip.timestamps, np.array([11, 0, 9, 9]) / 25) and torch.equal(read_clip(tmp_path), want)


def test_jpeg_is_what_pillow_says_and_resizing_is_that_of_films(tmp_path):
    for t, frame in enumerate(FRAMES):
        Image.fromarray(frame).save(tmp_path / f"{t:05d}.JPG", format="JPEG")
    assert np.array_equal(read_clip(tmp_path, [4])[0].numpy(), np.asarray(Image.open(tmp_path / "00004.JPG")))
    np.save(tmp_path / "same.npy", read_clip(tmp_path).numpy())
    assert torch.equal(read_clip(tmp_path, stride=5, size=(8, 9)), read_clip(tmp_path / "same.npy", stride=5, size=(8, 9)))


def test_the_order_is_that_of_the_numbers(tmp_path):
    names = ["2.png", "10.png", "1.png", "a3.png", "a20.png", "A100.png"]
    for name in names:
        Image.fromarray(FRAMES[0]).save(tmp_path / name)
    assert [file.name for file in picture_files(tmp_path)] == ["1.png", "2.png", "10.png", "a3.png", "a20.png", "A100.png"]


def test_rates_strides_and_padding(tmp_path):
    np.save(tmp_path / "film.npy", FRAMES)
    clip = decode(tmp_path / "film.npy", fps=5, native_fps=10)
    assert clip.indices.tolist() == [0, 2, 4, 6, 8, 10] and clip.notes == () and probe(tmp_path / "film.npy", native_fps=10).duration == pytest.approx(1.2)
    looped = decode(tmp_path / "film.npy", [10, 13], pad="loop")
    assert looped.indices.tolist() == [10, 1] and "pad='loop'" in looped.notes[0] and torch.equal(looped.frames[1], torch.from_numpy(FRAMES[1]))
    with pytest.raises(VideoError, match="frame 12 was asked for, but there are 12 frames"):
        decode(tmp_path / "film.npy", [12])


@pytest.mark.parametrize("array, item, want", [
    (FRAMES, None, FRAMES), (FRAMES[..., 0], None, FRAMES[..., :1].repeat(3, -1)), (FRAMES[..., :1], None, FRAMES[..., :1].repeat(3, -1)),
    (np.stack([FRAMES[..., 0], FRAMES[..., 1]], 1), 1, FRAMES[..., 1:2].repeat(3, -1)), (np.stack([FRAMES, 255 - FRAMES]), 1, 255 - FRAMES),
])
def test_layouts_of_arrays(tmp_path, array, item, want):
    np.save(tmp_path / "film.npy", array)
    path = tmp_path / ("film.npy" if item is None else f"film.npy#{item}")
    assert np.array_equal(read_clip(path).numpy(), want) and probe(path).frames == 12 and decode(path, [3]).backend == "npy"
    clip = read_clip(path, [1])
    clip += 1  # ours to write to: the file is not behind it
    assert np.array_equal(np.load(tmp_path / "film.npy"), array)


def test_a_name_that_really_ends_so(tmp_path):
    np.save(tmp_path / "film.npy", FRAMES)
    (tmp_path / "film.npy#2").write_bytes(b"something else")
    assert split_item(tmp_path / "film.npy#2") == (tmp_path / "film.npy#2", None) and split_item("x.npy#3") [1] == 3
    assert is_still("x.npy#3") and is_still(tmp_path) and not is_still("x.mp4") and not is_still("x.mp4#3")


@pytest.mark.parametrize("name, make, says", [
    ("float.npy", lambda p: np.save(p, FRAMES / 255), "float64, expected uint8"), ("flat.npy", lambda p: np.save(p, FRAMES[0, 0, 0]), "shape"),
    ("many.npy", lambda p: np.save(p, np.zeros((4, 5, 6, 7), np.uint8)), "file.npy#0"), ("many.npy#5", lambda p: None, "no such file"),
    ("empty.npy", lambda p: np.save(p, FRAMES[:0]), "none of them empty"), ("zero.npy", lambda p: p.touch(), "cannot be read as an array"),
    ("text.npy", lambda p: p.write_text("hello"), "cannot be read as an array"), ("folder.npy", lambda p: p.mkdir(), "without pictures"),
    ("short.npy", lambda p: (np.save(p, FRAMES), p.write_bytes(p.read_bytes()[:1000])), "cannot be read as an array"),
    ("objects.npy", lambda p: np.save(p, np.array([{}], dtype=object), allow_pickle=True), "cannot be read as an array"),
    ("pictures", lambda p: (p.mkdir(), (p / "1.png").write_bytes(b"\x89PNG broken")), "1.png cannot be read"),
    ("deep", lambda p: (p.mkdir(), Image.fromarray(np.zeros((4, 4), np.uint16) + 300).save(p / "1.png")), "expected 8 bits"),
    ("sizes", lambda p: (p.mkdir(), [Image.fromarray(FRAMES[0, : 10 + k]).save(p / f"{k}.png") for k in range(2)]), "pass size="),
    ("nothing", lambda p: p.mkdir(), "without pictures"), ("folders", lambda p: (p / "1.png").mkdir(parents=True), "not a regular file"),
])
def test_what_cannot_be_read_is_one_error(tmp_path, name, make, says):
    make(tmp_path / name)
    with pytest.raises(VideoError, match=says) as caught:
        decode(tmp_path / name)
    assert caught.value.path == str(tmp_path / name) and "\n" not in str(caught.value)


def test_options_that_do_not_belong(tmp_path):
    np.save(tmp_path / "film.npy", FRAMES)
    with pytest.raises(ConfigError, match="native_fps"):
        decode(tmp_path / "film.mp4", native_fps=10)
    with pytest.raises(ConfigError, match="native_fps"):
        decode(tmp_path / "film.npy", native_fps=0)
    with pytest.raises(VideoError, match="decord cannot read"):
        decode(tmp_path / "film.npy", backend="decord")
