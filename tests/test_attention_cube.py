"""Attention cubes: closed forms, parts of a cube, and one sentence for what is no attention."""
import math

import numpy as np
import pytest
import torch

from fvlm.core import ConfigError, InputError, NonFiniteError, ShapeError
from fvlm.instruments.attention_cube import AttentionCube, Cells, check_rows, fixation, tempered


def drawn(*shape, seed=0, scale=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).softmax(-1)


# --- places ------------------------------------------------------------------------------------------------------------

def test_tokens_have_names_and_places():
    cells = Cells.grid(2, 3, prefix=3)
    assert cells.prefix == ("CLS", "register 1", "register 2") and (cells.count, cells.total) == (6, 9)
    assert cells.name_of(0) == "CLS" and cells.name_of(3) == "row 1, column 1" and cells.name_of(8) == "row 2, column 3"
    assert Cells.time(4).name_of(3) == "frame 4" and Cells.tokens(2).name_of(1) == "query 2" and Cells.grid(2, 2, prefix=0).prefix == ()
    with pytest.raises(ConfigError, match="rows"):
        Cells.grid(0, 3)


def test_fixation_closed_forms():
    corner, whole = np.zeros(12), np.ones(12)
    corner[11] = 2.0
    assert np.allclose(fixation(corner, (3, 4)), [7 / 8, 5 / 6]) and np.allclose(fixation(corner, (3, 4), "peak"), [7 / 8, 5 / 6])
    assert np.allclose(fixation(whole, (3, 4)), [0.5, 0.5])
    assert fixation(np.ones((2, 5, 12)), (3, 4)).shape == (2, 5, 2)
    assert np.allclose(fixation(torch.eye(4)[[0, 3]], (2, 2), "peak"), [[0.25, 0.25], [0.75, 0.75]])
    with pytest.raises(ShapeError, match="12 cells"):
        fixation(whole, (3, 3))
    with pytest.raises(InputError, match="all of them are 0"):
        fixation(np.zeros(4), (2, 2))
    with pytest.raises(ConfigError, match="peak"):
        fixation(whole, (3, 4), "middle")


# --- weights -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tau", [0.25, 0.7, 1.0, 4.0])
def test_temperature_is_softmax_of_scores(tau):
    scores = torch.randn(5, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 4
    assert np.allclose(tempered(scores.softmax(-1).numpy(), tau), (scores / tau).softmax(-1).numpy(), atol=1e-12)


def test_temperature_keeps_zeros_and_limits():
    row = np.array([0.0, 0.25, 0.75])
    assert np.allclose(tempered(row, 1.0), row) and tempered(row, 3.0)[0] == 0
    assert np.allclose(tempered(row, 0.01), [0, 0, 1]) and np.allclose(tempered(row, 1e6), [0, 0.5, 0.5], atol=1e-5)
    with pytest.raises(ConfigError, match="temperature"):
        tempered(row, 0.0)


def test_half_precision_logarithms_keep_the_tail():
    weights = drawn(1, 1, 3, 64, 64, scale=6.0)
    cube = AttentionCube.from_array("x", weights, grid=(8, 8))
    logs = cube.log_weights(0, 0)
    assert logs.dtype == np.float16
    back = tempered(np.exp(logs.astype(float)), 4.0)
    assert np.abs(back / tempered(weights[0, 0].numpy(), 4.0) - 1).max() < 0.005
    assert np.isneginf(AttentionCube.from_array("x", np.eye(4)[None, None, None], grid=(2, 2)).log_weights(0, 0)[0, 0, 1])


def test_means_are_of_tempered_heads_and_layers():
    weights = drawn(2, 3, 4, 9, 9)
    cube = AttentionCube.from_array("x", weights, grid=(3, 3))
    assert np.allclose(cube.shown(1, 2, 0, 5), weights[1, 0, 2, 5], atol=1e-6)
    assert np.allclose(cube.shown(1, -1, 2, 5), weights[1, 2, :, 5].mean(0), atol=1e-6)
    assert np.allclose(cube.shown(-1, -1, 2, 5), weights[:, 2, :, 5].mean((0, 1)), atol=1e-6)
    assert np.allclose(cube.shown(0, -1, 2, 5, 2.0), np.mean([tempered(weights[0, 2, h, 5].numpy(), 2.0) for h in range(4)], 0), atol=1e-6)
    assert math.isclose(cube.shown().sum(), 1, rel_tol=1e-9)


def test_a_fetched_cube_is_checked_when_it_is_fetched():
    asked = []

    def fetch(layer, frame):
        asked.append((layer, frame))
        return np.full((2, 4, 4), 0.25 if layer == 0 else 0.5)

    cube = AttentionCube(name="late", layers=2, heads=2, frames=3, keys=Cells.grid(2, 2), queries=Cells.grid(2, 2), fetch=fetch)
    assert asked == [] and cube.nbytes == 2 * 3 * 2 * 4 * 4 * 2
    assert np.allclose(cube.attention(0, 2), 0.25) and asked == [(0, 2)]
    with pytest.raises(InputError, match=r"'late', layer 2, frame 1: a row sums to 2, expected 1; take the weights after the softmax"):
        cube.attention(1, 0)
    with pytest.raises(ConfigError, match="frame"):
        cube.attention(0, 3)
    wrong = AttentionCube(name="late", layers=1, heads=2, frames=1, keys=Cells.grid(2, 2), queries=Cells.grid(2, 2), fetch=lambda layer, frame: np.full((2, 4, 5), 0.2))
    with pytest.raises(ShapeError, match=r"expected \(heads, Q, N\) = \(2, 4, 4\)"):
        wrong.attention(0, 0)


@pytest.mark.parametrize("rows, words", [
    (np.array([0.5, np.nan]), "1 of 2 weights are NaN or Inf"), (np.array([1.5, -0.5]), "below 0.*softmax"), (np.array([0.6, 0.6]), "sums to 1.2, expected 1"),
    (np.array(["a"]), "expected attention weights"), (np.zeros((2, 0)), "expected attention weights"), (np.array([0.5, np.inf]), "NaN or Inf"),
])
def test_what_is_no_attention(rows, words):
    with pytest.raises(InputError, match=f"here: .*{words}"):
        check_rows("here", rows)


def test_nan_is_named_with_its_layer():
    weights = drawn(3, 2, 2, 4, 4)
    weights[2, 1, 0, 3, 3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"cube 'x', layer 3: 1 of 64"):
        AttentionCube.from_array("x", weights, grid=(2, 2))


def test_half_precision_attention_is_rescaled():
    rows = check_rows("here", drawn(4, 200).to(torch.bfloat16))
    assert rows.dtype == np.float32 and np.allclose(rows.sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize("shape, options, words", [
    ((1, 4, 4), dict(grid=(2, 2)), r"expected \(layers, frames, heads, Q, N\)"), ((1, 1, 1, 4, 4), dict(grid=(2, 3)), "a grid of 2 x 3 and 0 prefix tokens are 6"),
    ((1, 1, 1, 5, 5), dict(grid=(2, 2)), "check grid and prefix"), ((1, 1, 1, 3, 4), dict(grid=(2, 2), query_grid=(2, 2)), "3 queries, but query_grid"),
])
def test_shapes_that_do_not_fit(shape, options, words):
    with pytest.raises(ShapeError, match=words):
        AttentionCube.from_array("x", drawn(*shape), **options)


def test_kinds_that_do_not_fit():
    with pytest.raises(InputError, match="frames at frames"):
        AttentionCube(name="x", layers=1, heads=1, frames=1, keys=Cells.time(4), queries=Cells.grid(2, 2), fetch=lambda layer, frame: None)


def test_queries_by_their_number():
    assert AttentionCube.from_array("x", drawn(1, 1, 1, 5, 5), grid=(2, 2), prefix=1).queries == Cells.grid(2, 2, prefix=1)
    assert AttentionCube.from_array("x", drawn(1, 1, 1, 3, 4), grid=(2, 2)).queries == Cells.tokens(3)
    assert AttentionCube.from_array("x", drawn(1, 1, 1, 9, 4), grid=(2, 2), query_grid=(3, 3)).queries == Cells.grid(3, 3)
    assert AttentionCube.from_array("x", drawn(1, 1, 1, 4, 4)).keys == Cells.time(4)


# --- parts of a cube ---------------------------------------------------------------------------------------------------

def test_only_keeps_the_numbers_of_layers():
    weights = drawn(4, 3, 2, 4, 4)
    cube = AttentionCube.from_array("x", weights, grid=(2, 2)).only(layers=[3, 1], frames=[2])
    assert (cube.layers, cube.frames, cube.numbers) == (2, 1, (4, 2))
    assert np.allclose(cube.attention(0, 0), weights[3, 2], atol=1e-6) and np.allclose(cube.attention(1, 0), weights[1, 2], atol=1e-6)
    assert cube.only(layers=[1]).numbers == (2,)
    for wrong in (dict(layers=[4]), dict(layers=[]), dict(frames=[-1])):
        with pytest.raises(ConfigError, match="only"):
            cube.only(**wrong)


def test_thinned_keeps_middle_askers_and_all_keys():
    weights = drawn(1, 1, 2, 37, 37)
    cube = AttentionCube.from_array("x", weights, grid=(6, 6), prefix=1)
    thin = cube.thinned(3)
    assert (thin.queries.rows, thin.queries.columns, thin.queries.prefix) == (2, 2, ("CLS",)) and "4 of 36 patches ask" in thin.note
    kept = [0, *(1 + r * 6 + c for r in (1, 4) for c in (1, 4))]
    assert np.allclose(thin.attention(0, 0), weights[0, 0][:, kept], atol=1e-6)
    with pytest.raises(InputError, match="nothing can be thinned"):
        AttentionCube.from_array("x", drawn(1, 1, 1, 3, 4), grid=(2, 2)).thinned(2)
