"""The attention explorer seen from Python: what goes to the browser, what its page holds, and one sentence for every mistake."""
import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image
from traitlets import TraitError

from fvlm.core import ConfigError, InputError, ShapeError, VideoError
from fvlm.encoders.embeddings import FrameEmbedder
from fvlm.encoders.keys_values import VisionEncoder
from fvlm.instruments.attention_cube import AttentionCube, Cells, tempered
from fvlm.instruments.attention_explorer import EAGER_BYTES, AttentionExplorer, fitting
from fvlm.instruments.live_picture import STATIC
from fvlm.models.foveated_vlm import FoveatedVLM
from fvlm.models.sc_vfp import SCVFP, SCVFPConfig
from tests.widget_pages import state_of

SCRIPT = STATIC / "attention_explorer.js"


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def clip(frames=3, height=30, width=40):
    return torch.randint(0, 256, (frames, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def two(frames=3):
    return [AttentionCube.from_array("coarse", drawn(2, frames, 3, 17, 17), grid=(4, 4), prefix=1), AttentionCube.from_array("fine", drawn(2, frames, 3, 64, 64, seed=1), grid=(8, 8))]


def large(layers=12, heads=12, frames=8, side=16, fetch=None):
    n, cells = side**2, Cells.grid(side, side)
    return AttentionCube(name="large", layers=layers, heads=heads, frames=frames, keys=cells, queries=cells, fetch=fetch or (lambda layer, frame: np.full((heads, n, n), 1 / n, np.float32)))


@pytest.fixture
def explorer():
    return AttentionExplorer(two(), clip(), title="two <passes>")


# --- what goes along ---------------------------------------------------------------------------------------------------

def test_all_chunks_of_a_small_cube_go_along_as_logarithms(explorer):
    assert set(explorer._chunks) == {f"{cube}:{layer}:{frame}" for cube in range(2) for layer in range(2) for frame in range(3)} and explorer.whole
    logs = np.frombuffer(explorer._chunks["1:1:2"], np.float16).reshape(3, 64, 64)
    assert np.allclose(np.exp(logs.astype(float)), explorer.cubes[1].attention(1, 2), rtol=4e-3)


def test_the_drawing_code_is_small_and_alone():
    code, style = SCRIPT.read_text(encoding="utf-8"), (STATIC / "attention_explorer.css").read_text(encoding="utf-8")
    assert len(code.encode()) <= 60_000
    assert not re.search(r"https?:|//cdn|@import|\bimport\s*[({'\"]|\bfetch\(|url\(|XMLHttpRequest", code + style)
    assert code.count("export default") == 1 and "</script" not in code


def test_the_colours_are_viridis():
    from matplotlib import colormaps

    table = re.search(r'const VIRIDIS = "([0-9a-f]+)"', SCRIPT.read_text(encoding="utf-8"))[1]
    came = np.array([int(table[i: i + 2], 16) for i in range(0, len(table), 2)]).reshape(256, 3)
    assert np.array_equal(came, (colormaps["viridis"](np.arange(256))[:, :3] * 255).round().astype(int))


def test_a_large_cube_opens_with_one_chunk():
    cube = large()
    explorer = AttentionExplorer(cube, clip(8, 240, 320))
    opened = sum(map(len, explorer._chunks.values())) + sum(map(len, explorer._pictures)) + len(str(explorer._esm)) + len(str(explorer._css))
    assert cube.nbytes > 150e6 and list(explorer._chunks) == ["0:11:0"] and opened < 10e6 and not explorer.whole
    assert "151 MB of attention" in explorer._about["notes"][0]
    with pytest.raises(InputError, match="mean over layers needs all"):
        explorer.layer = -1


def test_chunks_are_sent_when_asked_for_and_errors_become_sentences():
    def fetch(layer, frame):
        if layer == 2:
            raise OSError("the disk is gone")
        return np.full((12, 256, 256), 1 / 256 if layer != 1 else 0.1)

    explorer, sent = AttentionExplorer(large(fetch=fetch), clip(8)), []
    explorer.send = lambda content, buffers=None: sent.append((content, buffers))
    explorer._handle_custom_msg({"want": [[0, 5, 7], [0, 6, 0]]}, [])
    assert [content for content, _ in sent] == [{"kind": "chunk", "name": "0:5:7"}, {"kind": "chunk", "name": "0:6:0"}]
    assert np.allclose(np.exp(np.frombuffer(sent[0][1][0], np.float16).astype(float)), 1 / 256, rtol=4e-3)
    explorer._handle_custom_msg({"want": [[0, 1, 0]]}, [])
    explorer._handle_custom_msg({"want": [[0, 2, 0]]}, [])
    assert [(content["kind"], content["name"]) for content, _ in sent[2:]] == [("error", "0:1:0"), ("error", "0:2:0")]
    assert "'large', layer 2, frame 1: a row sums to 25.6, expected 1" in sent[2][0]["text"] and sent[3][0]["text"] == "OSError: the disk is gone"


def test_a_chunk_too_large_loses_askers_and_says_so():
    thin = fitting(large(1, 12, 1, 32))
    assert thin.chunk_bytes <= EAGER_BYTES and thin.queries.rows == 11 and thin.keys.count == 1024 and "121 of 1024 patches ask" in thin.note
    explorer = AttentionExplorer(large(1, 12, 1, 32), clip(1))
    assert any("121 of 1024 patches ask" in note for note in explorer._about["notes"])
    assert fitting(large(side=8)).queries.count == 64
    time = AttentionCube(name="long", layers=1, heads=8, frames=1, keys=Cells.time(1000), queries=Cells.time(1000), fetch=lambda layer, frame: None)
    with pytest.raises(InputError, match="one layer of one frame is 16 MB"):
        fitting(time)


# --- traits ------------------------------------------------------------------------------------------------------------

def test_traits_say_what_is_shown(explorer):
    explorer.layer, explorer.head, explorer.frame, explorer.query, explorer.temperature = 1, 2, 1, 6, 2.0
    expected = tempered(explorer.cubes[0].attention(1, 1)[2, 1 + 6], 2.0)
    assert np.allclose(explorer.shown(), expected) and np.allclose(explorer.shown("coarse"), expected)
    explorer.head = "mean"
    assert explorer.head == -1 and explorer.shown("fine").shape == (64,)
    explorer.layer = "mean"
    assert explorer.layer == -1
    with pytest.raises(InputError, match="'coarse', 'fine'"):
        explorer.shown("medium")


def test_one_place_on_two_grids(explorer):
    for query in range(16):
        explorer.query = query
        row, column = divmod(query, 4)
        token = explorer.token(explorer.cubes[1])
        assert divmod(token, 8) == (2 * row + 1, 2 * column + 1)
    explorer.query = -1
    assert explorer.token(explorer.cubes[0]) == 0 and explorer.token(explorer.cubes[1]) is None
    with pytest.raises(InputError, match="choose a patch"):
        explorer.shown("fine")
    explorer.picture()


@pytest.mark.parametrize("name, value", [("query", 16), ("query", -2), ("layer", 2), ("head", 3), ("head", -2), ("frame", 3), ("frame", -1), ("temperature", 0.2), ("temperature", 5.0), ("opacity", 1.5), ("slot", 17), ("layer", "top"), ("temperature", float("nan"))])
def test_values_that_are_none(explorer, name, value):
    before = getattr(explorer, name)
    with pytest.raises(ConfigError, match=name):
        setattr(explorer, name, value)
    assert getattr(explorer, name) == before
    with pytest.raises(TraitError):
        explorer.frame = "first"


def test_observers_hear_the_browser(explorer):
    heard = []
    explorer.observe(lambda change: heard.append((change["name"], change["new"])), names=["query", "layer", "frame", "playing"])
    explorer.set_state({"query": 3, "layer": 0, "frame": 2})
    assert set(heard) == {("query", 3), ("layer", 0), ("frame", 2)} and explorer.frame == 2


# --- pages and pictures ------------------------------------------------------------------------------------------------

def test_a_page_holds_everything_and_asks_for_nothing(explorer, tmp_path):
    explorer.query, explorer.layer, explorer.temperature = 5, 0, 2.0
    path = explorer.save_html(tmp_path / "explorer.html")
    text = path.read_text(encoding="utf-8")
    state = state_of(text)
    assert (chunks := state["_chunks"]) == explorer._chunks and state["_pictures"] == explorer._pictures and state["query"] == 5 and state["temperature"] == 2.0 and state["_about"]["eager"]
    assert not re.search(r"https?://|src=|@import|url\(", text) and text.count("<script") == text.count("</script>") == 4
    assert "two &lt;passes&gt;" in text and "two <passes>" not in text
    data = sum(map(len, chunks.values())) + sum(map(len, explorer._pictures))
    assert path.stat().st_size <= data + 200_000


def test_a_page_of_random_attention_is_no_larger_than_allowed(tmp_path):
    "The worst case for compression: every weight its own."
    cube = AttentionCube.from_array("noise", torch.randn(2, 6, 4, 144, 144, generator=torch.Generator().manual_seed(0)).mul(3).softmax(-1), grid=(12, 12))
    yy, xx = np.mgrid[0:270, 0:480]
    smooth = np.stack([np.stack([xx // 2, yy, 40 * t + 0 * xx], -1) for t in range(6)]).astype(np.uint8)
    explorer = AttentionExplorer(cube, smooth)
    size = explorer.save_html(tmp_path / "noise.html").stat().st_size
    assert size <= cube.nbytes + sum(map(len, explorer._pictures)) + 200_000


def test_a_page_of_a_fetched_cube_holds_all_of_it(tmp_path):
    explorer = AttentionExplorer(large(3, 4, 3, 16).only(layers=[0, 2]), clip(3))
    assert not explorer.whole or len(explorer._chunks) == 6
    lazy = AttentionExplorer(large(6, 4, 3, 16), clip(3))
    assert not lazy.whole
    state = state_of(lazy.save_html(tmp_path / "all.html").read_text(encoding="utf-8"))
    assert len(state["_chunks"]) == 18 and state["_about"]["eager"] and state["_about"]["notes"] == []
    with pytest.raises(InputError, match="would hold 9 MB of attention, at most 5 are allowed.*only"):
        lazy.save_html(tmp_path / "less.html", max_megabytes=5)
    assert not (tmp_path / "less.html").exists()


def test_pictures_open(explorer, tmp_path):
    still = Image.open(explorer.save_png(tmp_path / "still.png"))
    assert still.format == "PNG" and still.width > 700 and np.asarray(still).std() > 10
    before = np.asarray(explorer.picture())
    explorer.frame = 2
    assert not np.array_equal(before, np.asarray(explorer.picture()))


def test_the_bundle_has_a_still_picture(explorer):
    data, metadata = explorer._repr_mimebundle_()
    assert Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).width > 700 and len(data["image/png"]) < 200_000
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"] == explorer.model_id and data["text/plain"] == "two <passes>"


# --- models ------------------------------------------------------------------------------------------------------------

def test_from_a_vision_transformer():
    encoder = VisionEncoder.tiny()
    explorer = AttentionExplorer.from_model(encoder, clip(2))
    assert explorer.cubes[0].keys == Cells.grid(4, 4, prefix=1) and explorer._about["title"] == "random_tiny_keys"
    assert AttentionExplorer.from_model(encoder.model, clip(1)).cubes[0].layers == 2


def test_from_a_foveated_model():
    model = FoveatedVLM.tiny(num_queries=2).train()
    explorer = AttentionExplorer.from_model(model, clip(4))
    assert [cube.name for cube in explorer.cubes] == ["coarse", "fine"] and model.training and explorer.layer == explorer.head == -1
    paths = [cube["path"] for cube in explorer._about["cubes"]]
    assert np.shape(paths) == (2, 4, 2) and 0 < np.min(paths) and np.max(paths) < 1
    before = explorer.shown("fine")
    explorer.query = 3
    assert np.array_equal(before, explorer.shown("fine")), "a patch that is compared is not a patch that asks"
    explorer.slot = 1
    assert not np.array_equal(before, explorer.shown("fine"))
    explorer.picture()


def test_from_sc_vfp():
    model, embedder = SCVFP(SCVFPConfig.preset("tiny", embed_dim=32, context_frames=3)), FrameEmbedder.tiny()
    explorer = AttentionExplorer.from_model(model, clip(8), embedder=embedder, gap=2)
    cube = explorer.cubes[0]
    assert cube.frames == 4 and cube.seen[1] == (1, 3, 5) and explorer._about["labels"][1] == "2 to 6" and explorer.query == 2
    explorer.picture()
    with pytest.raises(InputError, match="embedder: SC-VFP sees embeddings"):
        AttentionExplorer.from_model(model, clip(8))
    with pytest.raises(InputError, match="needs 7"):
        AttentionExplorer.from_model(model, clip(5), embedder=embedder, gap=3)


# --- mistakes ----------------------------------------------------------------------------------------------------------

def test_cubes_and_frames_that_do_not_belong_together(tmp_path):
    one, other = two()
    time = AttentionCube.from_array("time", drawn(1, 3, 1, 4, 4))
    for cubes, frames, error, words in (
        ([], clip(), InputError, "expected at least one AttentionCube"), ([drawn(2, 2)], clip(), InputError, "Tensor, expected at least one"), ([one, one], clip(), InputError, "different ones"),
        ([one, time], clip(), InputError, "an explorer of their own"), (two(2) + [AttentionCube.from_array("x", drawn(1, 3, 1, 4, 4), grid=(2, 2))], clip(2), InputError, "'x' has 3 moments"),
        (one, clip(4), ShapeError, "got 4, cube 'coarse' needs 3, one a moment"), (time, clip(3), ShapeError, "needs 4"), (one, torch.rand(2, 3, 4, 5, 6), InputError, "video"),
    ):
        with pytest.raises(error, match=words):
            AttentionExplorer(cubes, frames)
    with pytest.raises(ShapeError, match="labels: got 2"):
        AttentionExplorer(one, clip(), labels=["a", "b"])
    with pytest.raises(VideoError):
        AttentionExplorer.from_model(VisionEncoder.tiny(), tmp_path / "nothing.mp4")
    with pytest.raises(InputError, match="vision transformer"):
        AttentionExplorer.from_model(torch.nn.Linear(2, 2), clip())
