"""LinkedView: its numbers against the arrays that came in, models' intermediates, page and picture, bad input."""
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from fvlm.core import ConfigError, InputError, NonFiniteError, ShapeError, generator, numpy_generator
from fvlm.instruments.linked_view import LinkedView, head_map
from fvlm.objectives.attention_statistics import normalised_entropy
from tests.widget_pages import is_one_sentence, state_of

FRAMES = numpy_generator(0, "frames").integers(0, 256, (4, 16, 24, 3), dtype=np.uint8)


def attention(*shape, seed=0):
    return torch.softmax(3 * torch.randn(*shape, generator=generator(seed, "attention")), -1)


@pytest.fixture
def view():
    heat = attention(2, 3, 4, 15).unflatten(-1, (3, 5))
    return LinkedView(FRAMES, heat, numpy_generator(0, "points").normal(size=(2, 3, 7, 2)))


def test_entropy_of_the_heat(view):
    rows = torch.from_numpy(view.heat).flatten(3)
    assert np.allclose(view.entropy, normalised_entropy(rows).mean(2), atol=1e-6)
    uniform = LinkedView(FRAMES, np.full((1, 2, 4, 3, 5), 0.3), np.zeros((1, 2, 2)))
    assert np.allclose(uniform.entropy, 1)
    over_time = LinkedView(FRAMES, np.full((1, 2, 4, 1, 1), 0.25), np.zeros((1, 2, 2)))
    assert np.allclose(over_time.entropy, 1) and np.allclose(over_time._scene["shares"], 0.25)
    one_hot = np.zeros((1, 1, 4, 1, 1))
    one_hot[:, :, 2] = 1
    assert LinkedView(FRAMES, one_hot, np.zeros((1, 1, 2))).entropy == pytest.approx(0)


def test_what_the_browser_gets_is_what_came_in(view):
    scene = view._scene
    levels = np.frombuffer(view._heat, np.uint8).reshape(2, 3, 4, 3, 5) / 255 * np.array(scene["peaks"])[:, :, None, None, None]
    assert np.abs(levels - view.heat).max() <= view.heat.max() / 255
    assert len(scene["points"]) == 2 * 3 * 7 and scene["points"][7][:2] == [0, 1]
    assert np.allclose(scene["entropy"], view.entropy) and (scene["rows"], scene["columns"]) == (3, 5) and scene["shares"] is None
    json.dumps(scene)


def test_time_attention_of_sc_vfp():
    from fvlm.models.sc_vfp import SCVFP

    model = SCVFP.tiny().eval()
    with torch.no_grad():
        outputs = model({"embeddings": torch.randn(6, 5, 16, generator=generator(0, "embeddings"))}, intermediates=True)
    film = np.concatenate([FRAMES, FRAMES[:1]])
    view = LinkedView.from_outputs(outputs, film, clip=2, query=3)
    for layer in range(2):
        assert np.allclose(view.heat[layer, :, :, 0, 0], outputs["attention"][layer][2, :, 3])
        assert np.allclose(view.entropy[layer], normalised_entropy(outputs["attention"][layer][2]).mean(1), atol=1e-6)
    assert view.points.shape[:2] == (2, 2) and "output" in view.points_note
    by_rows = LinkedView.from_outputs(outputs, film, points="attention")
    assert "attention row" in by_rows.points_note


def test_patch_attention_of_a_vit():
    layers = [attention(4, 2, 7, 7, seed=i) for i in range(3)]
    view = LinkedView.from_outputs({"attention": layers}, FRAMES, grid=(2, 3), prefix=1, query=0)
    assert np.allclose(view.heat[1, 0, 2], layers[1][2, 0, 0, 1:].reshape(2, 3))
    assert np.allclose(view.entropy[2], normalised_entropy(layers[2]).mean((0, 2)), atol=1e-6)


def test_foveated_attention():
    from fvlm.models.foveated_vlm import FoveatedVLM

    model = FoveatedVLM.tiny(num_queries=2).eval()
    with torch.no_grad():
        outputs = model({"frames": torch.rand(1, 4, 3, 32, 32)}, passes="both", intermediates=True)
    layers, places = outputs["attention"], outputs["attention"][0].shape[-1]
    grid = model.encoder.grid
    view = LinkedView.from_outputs(outputs, FRAMES, grid=grid, prefix=places - grid[0] * grid[1], query=1)
    assert np.allclose(view.heat[-1, 1, 3], layers[-1][0, 3, 1, 1, places - grid[0] * grid[1]:].reshape(grid), atol=1e-6)


def test_a_map_is_reproducible_and_keeps_neighbours():
    centres = 20 * torch.eye(4)[None, :, None]
    vectors = centres + torch.randn(1, 4, 12, 4, generator=generator(0, "noise"))
    one, two = head_map(vectors, seed=3), head_map(vectors, seed=3)
    assert np.array_equal(one, two)
    within = np.linalg.norm(one - one.mean(2, keepdims=True), axis=-1).max()
    middles = one.mean(2)[0]
    between = min(np.linalg.norm(middles[i] - middles[j]) for i in range(4) for j in range(i))
    assert between > within


def test_a_map_of_equal_vectors_is_one_place():
    assert not head_map(torch.ones(1, 2, 3, 5)).any()


def test_the_selection_stays_inside(view):
    view.layer, view.head, view.frame = 1, 2, 3
    for name, value in (("layer", 2), ("head", -1), ("frame", 4)):
        with pytest.raises(ConfigError, match=name):
            setattr(view, name, value)
    assert (view.layer, view.head, view.frame) == (1, 2, 3)


def test_page_and_picture(view, tmp_path):
    view.layer, view.head, view.frame = 1, 2, 3
    page = view.save_html(tmp_path / "v.html").read_text(encoding="utf-8")
    state = state_of(page)
    assert (state["layer"], state["head"], state["frame"]) == (1, 2, 3) and state["_heat"] == view._heat and state["_sheet"] == view._sheet
    assert not re.search(r'(?:src|href|import|fetch)[=(\s]+["\']?(?:https?:)?//', page)
    assert Image.open(view.save_png(tmp_path / "v.png")).size == view.picture().size
    assert view.picture().tobytes() != (setattr(view, "head", 0), view.picture())[1].tobytes()
    data, _ = view._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data and len(data["image/png"]) > 1000


OUT = {"attention": [attention(1, 2, 4, 4)]}
P = np.zeros((2, 3, 2))
BAD = {
    "four axes": (lambda: LinkedView(FRAMES, np.ones((2, 3, 4, 5)), P), ShapeError, "expected 5 axes"),
    "a frame too few": (lambda: LinkedView(FRAMES[:3], np.ones((2, 3, 4, 3, 5)), P), ShapeError, "axis T should be 3"),
    "NaN": (lambda: LinkedView(FRAMES, np.full((2, 3, 4, 3, 5), np.nan), P), NonFiniteError, "heat"),
    "negative": (lambda: LinkedView(FRAMES, -np.ones((2, 3, 4, 3, 5)), P), InputError, "weights >= 0"),
    "no head": (lambda: LinkedView(FRAMES, np.ones((2, 0, 4, 3, 5)), np.zeros((2, 0, 2))), InputError, "at least one"),
    "points of other heads": (lambda: LinkedView(FRAMES, np.ones((2, 3, 4, 3, 5)), np.zeros((3, 2, 2))), ShapeError, "points"),
    "points NaN": (lambda: LinkedView(FRAMES, np.ones((2, 3, 4, 3, 5)), P + np.nan), NonFiniteError, "points"),
    "entropy of other heads": (lambda: LinkedView(FRAMES, np.ones((2, 3, 4, 3, 5)), P, np.zeros((3, 2))), ShapeError, "entropy"),
    "a head that gives nothing": (lambda: LinkedView(FRAMES, np.zeros((2, 3, 4, 3, 5)), P), InputError, "pass it"),
    "no attention": (lambda: LinkedView.from_outputs({"prediction": 1}, FRAMES), InputError, "intermediates=True"),
    "not probabilities": (lambda: LinkedView.from_outputs({"attention": [torch.ones(1, 2, 4, 4)]}, FRAMES), InputError, "sum to 1"),
    "no heads": (lambda: LinkedView.from_outputs(OUT, FRAMES, points="heads"), InputError, 'expected "heads"'),
    "no such clip": (lambda: LinkedView.from_outputs(OUT, FRAMES, clip=1), ConfigError, "clip"),
    "no such query": (lambda: LinkedView.from_outputs(OUT, FRAMES, query=4), ConfigError, "query"),
    "no such points": (lambda: LinkedView.from_outputs(OUT, FRAMES, points="head"), ConfigError, "did you mean 'heads'"),
    "no grid": (lambda: LinkedView.from_outputs({"attention": [attention(1, 4, 2, 3, 9)]}, FRAMES), InputError, "grid: expected"),
    "another grid": (lambda: LinkedView.from_outputs({"attention": [attention(4, 2, 9, 9)]}, FRAMES, grid=(3, 3), prefix=1), ShapeError, "10 places, the attention has 9"),
    "three axes": (lambda: LinkedView.from_outputs({"attention": [attention(2, 4, 4)]}, FRAMES), ShapeError, r"\(B,H,T,T\)"),
    "too few for a map": (lambda: head_map(torch.rand(1, 2, 2, 3)), InputError, "at least 5"),
    "NaN in a map": (lambda: head_map(torch.full((1, 2, 3, 3), torch.nan)), NonFiniteError, "vectors"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case):
    is_one_sentence(*BAD[case])
