"""Pictures and charts: any dialect of frames in, PIL images out, one clear error for nonsense."""

import base64
import io
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from fvlm import show
from fvlm.core import ConfigError, InputError, NonFiniteError, ShapeError
from fvlm.show import as_frames, beside, curves, flow_image, frame_strip, heat_map_over_frame, marked_frame, matrix, png_base64, scatter, stacked

BYTES = np.random.default_rng(0).integers(0, 256, (5, 12, 16, 3), dtype=np.uint8)
FLOATS = BYTES.transpose(0, 3, 1, 2) / np.float32(255)


@pytest.mark.parametrize(
    "video",
    [BYTES, torch.tensor(BYTES), FLOATS, torch.tensor(FLOATS), torch.tensor(FLOATS).double(), torch.tensor(FLOATS).requires_grad_(), list(BYTES), list(torch.tensor(FLOATS)), BYTES.transpose(0, 3, 1, 2), FLOATS.transpose(0, 2, 3, 1)],
)
def test_every_dialect_is_the_same_video(video):
    assert np.array_equal(as_frames(video), BYTES)


@pytest.mark.parametrize("frame", [BYTES[0], FLOATS[0], torch.tensor(FLOATS[0]), Image.fromarray(BYTES[0])])
def test_one_frame_is_a_video_of_one(frame):
    assert np.array_equal(as_frames(frame), BYTES[:1])


def test_grey_bool_and_half_precision():
    assert as_frames(BYTES[..., 0]).shape == (5, 12, 16, 3)
    assert as_frames(FLOATS[:, 0]).shape == (5, 12, 16, 3)
    assert as_frames(FLOATS[:, :1]).shape == as_frames(BYTES[..., :1]).shape == (5, 12, 16, 3)
    assert set(np.unique(as_frames(BYTES[0, ..., 0] > 100))) == {0, 255}
    assert as_frames(torch.tensor(FLOATS).bfloat16()).dtype == np.uint8


def test_the_usual_reading_wins_where_two_are_possible():
    assert as_frames(np.zeros((2, 3, 8, 3), np.uint8)).shape == (2, 3, 8, 3)
    assert as_frames(np.zeros((2, 3, 8, 3))).shape == (2, 8, 3, 3)


def test_floats_are_rounded_not_cut():
    assert as_frames(np.array([[0.0, 0.5, 0.9999, 1.0005, -0.0005]]))[0, 0, :, 0].tolist() == [0, 128, 255, 255, 0]


@pytest.mark.parametrize(
    ("video", "error", "words"),
    [
        (np.zeros((2, 5, 3, 8, 8), np.uint8), ShapeError, "(2, 5, 3, 8, 8)"),
        (np.zeros((5, 8, 8, 4), np.uint8), ShapeError, "expected (T,H,W,C)"),
        (np.zeros((0, 8, 8, 3), np.uint8), ShapeError, "(0, 8, 8, 3)"),
        (np.zeros(8, np.uint8), ShapeError, "(8,)"),
        (np.full((5, 3, 8, 8), 255.0), InputError, "expected [0, 1]"),
        (np.full((5, 3, 8, 8), -1.0), InputError, "expected [0, 1]"),
        (np.zeros((5, 8, 8, 3), np.int64), InputError, "int64"),
        (np.full((5, 3, 8, 8), np.nan), NonFiniteError, "NaN"),
        ("clip.mp4", InputError, "str"),
        (None, InputError, "NoneType"),
        ([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9, 3), np.uint8)], ShapeError, "differ"),
    ],
)
def test_frames_that_are_none(video, error, words):
    with pytest.raises(error, match="^video: ") as caught:
        frame_strip(video)
    assert words in str(caught.value)


def test_strip_is_balanced_and_complete():
    one = frame_strip(BYTES[:1], height=48)
    assert one.size == (64, 48)
    wide = frame_strip(np.repeat(BYTES, 2, 0), columns=8, height=48)
    assert wide.size == (5 * 68 - 4, 2 * 52 - 4)
    pixels = np.asarray(frame_strip(BYTES, columns=3, height=12))
    assert np.array_equal(pixels[:12, :16], BYTES[0]) and np.array_equal(pixels[16:28, 20:36], BYTES[4])


def test_long_clip_is_thinned_to_its_ends():
    long = np.arange(100, dtype=np.uint8)[:, None, None, None] * np.ones((1, 12, 16, 3), np.uint8)
    pixels = np.asarray(frame_strip(long, max_frames=4, columns=4, height=12))
    assert pixels[0, 0, 0] == 0 and pixels[0, -1, 0] == 99 and pixels.shape == (30, 76, 3)


def test_strip_labels():
    assert frame_strip(BYTES, labels=list("abcde"), height=48).height == 66
    assert frame_strip(BYTES, labels=["a label far too long for so small a frame"] * 5, height=48).width == frame_strip(BYTES, height=48).width
    with pytest.raises(ShapeError, match="labels: 2 for 5"):
        frame_strip(BYTES, labels=["a", "b"])
    for name, value in (("columns", 0), ("height", 2), ("max_frames", 0), ("columns", 1.5)):
        with pytest.raises(ConfigError, match=name):
            frame_strip(BYTES, **{name: value})


def test_heat_is_where_it_should_be():
    heat = np.zeros((4, 4))
    heat[1, 2] = 1.0
    pixels = np.asarray(heat_map_over_frame(np.zeros((64, 64, 3), np.uint8), heat, alpha=1, legend=False, height=64, smooth=False)).astype(int)
    assert np.array_equal(np.argwhere(pixels[..., 0] > 200)[[0, -1]], [[16, 32], [31, 47]])  # viridis ends in yellow
    faint, none = (heat_map_over_frame(BYTES[0], h, value_range=(0, 100), legend=False) for h in (heat, heat * 0))
    assert np.abs(np.asarray(faint).astype(int) - np.asarray(none)).max() < 8  # a shared scale keeps a weak map weak
    assert heat_map_over_frame(BYTES[0], np.full((4, 4), 0.25)).height == 254  # constant map, legend below


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"heat": np.zeros(16)}, ShapeError, "heat"),
        ({"heat": np.zeros((1, 4, 4))}, ShapeError, "heat"),
        ({"heat": np.full((4, 4), np.inf)}, NonFiniteError, "heat"),
        ({"frame": BYTES}, ShapeError, "frame: got 5"),
        ({"alpha": 1.5}, ConfigError, "alpha"),
        ({"value_range": (1, 0)}, ConfigError, "value_range"),
        ({"value_range": (0, float("nan"))}, ConfigError, "value_range"),
    ],
)
def test_heat_that_does_not_fit(change, error, words):
    arguments = {"frame": BYTES[0], "heat": np.zeros((4, 4)), **change}
    with pytest.raises(error) as caught:
        heat_map_over_frame(arguments.pop("frame"), arguments.pop("heat"), **arguments)
    assert words in str(caught.value)


def test_colours_go_by_order():
    def has(image, colour):
        rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
        return bool((np.abs(np.asarray(image).astype(int) - rgb).max(-1) < 6).any())

    two = curves({"a": [1, 2, 3], "b": [3, 2, 1]})
    assert has(two, show.PALETTE[0]) and has(two, show.PALETTE[1]) and not has(two, show.PALETTE[2])
    assert len(set(show.PALETTE)) == 7


def test_curves_take_every_form():
    x = np.linspace(1, 2, 5)
    size = curves({"y": [1, 2]}).size
    assert size == (600, 320)
    forms = {"list": [1.0, 2.0], "tensor": torch.rand(5) + 0.1, "one": [1.0], "xy": (x, x), "band": (x, x, x - 0.1, x + 0.1), "tuple of numbers": (1.0, 2.0, 3.0)}
    assert curves({f"{name} {i}": value for i in range(3) for name, value in forms.items()}, log_y=True, title="t", x_label="x", y_label="y").size == size
    assert curves({"y": (1.0, 2.0)}).tobytes() == curves({"y": [1.0, 2.0]}).tobytes()


@pytest.mark.parametrize(
    ("series", "log_y", "error"),
    [({}, False, InputError), ([1, 2], False, InputError), ({"a": []}, False, ShapeError), ({"a": [[1, 2]]}, False, ShapeError), ({"a": 3.0}, False, ShapeError), ({"a": ([1, 2], [1])}, False, ShapeError), ({"a": [1, float("inf")]}, False, NonFiniteError), ({"a": [1, 0]}, True, InputError), ({"a": ["x"]}, False, InputError)],
)
def test_curves_that_cannot_be_drawn(series, log_y, error):
    with pytest.raises(error, match="series"):
        curves(series, log_y=log_y)


def test_matrix_and_scatter():
    assert matrix(torch.rand(3, 4), title="t", row_labels=list("abc"), column_labels=["a long label"] * 4).height == 320
    assert matrix([[0.0]]).height == 320 and matrix(np.random.rand(40, 40) - 0.5).height == 320
    assert scatter(torch.rand(9, 2)).size == scatter(np.random.rand(9, 2), np.arange(9)).size == scatter(np.random.rand(9, 2), torch.rand(9)).size == (460, 360)
    for bad, error in (([1.0], ShapeError), (np.zeros((0, 3)), ShapeError), ([[np.nan]], NonFiniteError)):
        with pytest.raises(error, match="values"):
            matrix(bad)
    with pytest.raises(ShapeError, match="row_labels: 1 for 2"):
        matrix(np.eye(2), row_labels=["a"])
    for bad, error in ((np.zeros((3, 3)), ShapeError), (np.zeros((0, 2)), ShapeError), ([[0, np.nan]], NonFiniteError)):
        with pytest.raises(error, match="points"):
            scatter(bad)
    with pytest.raises(ShapeError, match="labels"):
        scatter(np.zeros((3, 2)), ["a"])


def test_flow_colours():
    field = np.zeros((2, 8, 8), np.float32)
    assert (np.asarray(flow_image(field, legend=False)) == 255).all()
    field[1] = 2  # down
    down, up = (np.asarray(flow_image(s * field, legend=False))[4, 4].astype(int) for s in (1, -1))
    assert np.abs(down - up).max() > 100
    slow = np.asarray(flow_image(field, max_speed=20, legend=False))[4, 4]
    assert slow.min() > 200
    for bad, error in ((np.zeros((3, 2, 8, 8)), ShapeError), (np.zeros((8, 8)), ShapeError), (np.full((2, 8, 8), np.nan), NonFiniteError)):
        with pytest.raises(error, match="flow"):
            flow_image(bad)
    with pytest.raises(ConfigError, match="max_speed"):
        flow_image(field, max_speed=-1)


def test_marks_go_where_the_object_is():
    masks = np.zeros((1, 12, 16), bool)
    masks[0, 2:8, 4:10] = True
    blank = np.zeros((12, 16, 3), np.uint8)
    changed = np.argwhere(np.asarray(marked_frame(blank, masks=masks, height=120)).any(-1))
    assert np.array_equal([changed.min(0), changed.max(0)], [[20, 40], [79, 99]])
    dot = np.asarray(marked_frame(blank, paths=[[[7.5, 5.5]]], height=120))
    assert dot[60, 80].any() and not dot[10, 10].any()
    with pytest.raises(ShapeError, match="masks"):
        marked_frame(blank, masks=masks[:, :6])
    with pytest.raises(ShapeError, match="paths"):
        marked_frame(blank, paths=np.zeros((3, 2)))


def test_joining():
    a, b = Image.new("RGB", (10, 20)), Image.new("L", (30, 8))
    assert beside(a, b, gap=4).size == (44, 20) and stacked(a, b, gap=4).size == (30, 32)
    assert beside(BYTES[0]).size == (16, 12)
    assert np.asarray(stacked(BYTES[0], BYTES[1], gap=0)).tobytes() == BYTES[:2].tobytes()
    with pytest.raises(InputError, match="images"):
        beside()


def test_png_base64_is_lossless():
    picture = beside(BYTES[0])
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(png_base64(picture))))), BYTES[0])
    with pytest.raises(InputError, match="image"):
        png_base64(BYTES[0])


def test_drawing_is_free_of_global_state_and_torch():
    code = "import sys; from fvlm.show import curves, matrix; curves({'a': [1, 2]}); matrix([[1.0]]); print(sorted({'torch', 'matplotlib.pyplot'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_threads_draw_the_same():
    pictures = {}
    threads = [threading.Thread(target=lambda i=i: pictures.update({i: curves({"a": [1, 2, 3]}).tobytes()})) for i in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert len(pictures) == 4 and len(set(pictures.values())) == 1
