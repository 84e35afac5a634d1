"""Windows over embeddings: the exact rows, ranges, standardising by training clips alone."""
import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fvlm.core import ConfigError, InputError, NonFiniteError, ShapeError
from fvlm.data.embedding_cache import EmbeddingCache
from fvlm.encoders.embedding_windows import EmbeddingWindows, Standardiser


def clips_of(*lengths, dim=4, seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=(n, dim)) * np.arange(1, dim + 1) + 10).astype(np.float32) for n in lengths]


def expected_windows(clips, m, gap, step, ranges):
    "The definition, written as loops."
    found = []
    for number, rows in enumerate(clips):
        for first, stop in (ranges[number] if ranges and ranges[number] is not None else [(0, len(rows))]):
            for start in range(first, min(stop, len(rows)), step):
                indices = [start + gap * k for k in range(m + 1)]
                if indices[-1] < min(stop, len(rows)):
                    found.append((number, start, rows[indices[:-1]], rows[indices[-1]]))
    return found


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4), m=st.integers(1, 5), gap=st.integers(1, 5), step=st.integers(1, 4), ranged=st.booleans())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_windows_are_the_definition_row_for_row(lengths, m, gap, step, ranged):
    clips = clips_of(*lengths)
    ranges = [[(0, n // 2), (n // 2 + 1, n)] if k % 2 == 0 else None for k, n in enumerate(lengths)] if ranged else None
    expected = expected_windows(clips, m, gap, step, ranges)
    if not expected:
        with pytest.raises(InputError, match="no clip gives a window"):
            EmbeddingWindows(clips, context_frames=m, gap=gap, step=step, ranges=ranges)
        return
    windows = EmbeddingWindows(clips, context_frames=m, gap=gap, step=step, ranges=ranges)
    assert len(windows) == len(expected)
    batch = windows.batch(range(len(windows)))
    for i, (clip, start, context, target) in enumerate(expected):
        item = windows[i]
        assert (item["clip"], item["start"]) == (clip, start) == (int(batch["clip"][i]), int(batch["start"][i]))
        np.testing.assert_array_equal(item["embeddings"], context)
        np.testing.assert_array_equal(item["target"], target)
    np.testing.assert_array_equal(batch["embeddings"], np.stack([e[2] for e in expected]))
    np.testing.assert_array_equal(windows.targets, np.stack([e[3] for e in expected]))
    np.testing.assert_array_equal(windows.context, batch["embeddings"])
    assert windows.clip_of_window.tolist() == [e[0] for e in expected]


def test_no_window_leaves_its_range_even_by_the_target():
    clip = np.arange(100, dtype=np.float32)[:, None]
    windows = EmbeddingWindows([clip], ranges=[[(0, 30), (40, 75)]])
    rows = torch.cat([windows.context[..., 0], windows.targets], 1)
    inside = ((rows >= 0) & (rows < 30)).all(1) | ((rows >= 40) & (rows < 75)).all(1)
    assert inside.all() and len(windows) == 10 + 15 and rows.max() == 74


@pytest.mark.parametrize("kind", ["numpy32", "numpy16", "torch", "cache"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_any_kind_of_array_gives_float32_batches(tmp_path, kind, dtype):
    clips = [c.astype(np.float16) for c in clips_of(30, 25)]
    cache = EmbeddingCache(tmp_path)
    arrays = {"numpy32": [c.astype(np.float32) for c in clips], "numpy16": clips, "torch": [torch.from_numpy(c) for c in clips],
              "cache": [cache.add(str(i), "e", [c], 4) for i, c in enumerate(clips)]}[kind]
    standardiser = Standardiser.fit(arrays)
    windows = EmbeddingWindows(arrays, standardiser=standardiser, dtype=dtype)
    item, batch = windows[3], windows.batch([3, 0, 3])
    assert item["embeddings"].dtype == item["target"].dtype == torch.float32 and isinstance(item["clip"], int)
    assert torch.equal(batch["embeddings"][0], item["embeddings"]) and torch.equal(batch["embeddings"][2], item["embeddings"])
    torch.testing.assert_close(item["target"], standardiser.apply(clips[0][23].astype(np.float32)))
    torch.testing.assert_close(windows.targets[3], item["target"])


def test_a_batch_takes_lists_arrays_tensors_and_slices():
    windows = EmbeddingWindows(clips_of(40))
    reference = windows.batch([2, 3, 4])["target"]
    for indices in (np.array([2, 3, 4]), torch.tensor([2, 3, 4]), slice(2, 5), range(2, 5), (2, 3, 4)):
        assert torch.equal(windows.batch(indices)["target"], reference)
    assert windows.batch([])["embeddings"].shape == (0, 5, 4)
    assert torch.equal(windows[-1]["target"], windows[len(windows) - 1]["target"])


def test_changing_a_batch_does_not_change_the_set():
    windows = EmbeddingWindows(clips_of(40))
    before = windows[0]["embeddings"].clone()
    windows.batch([0])["embeddings"].fill_(7)
    windows[0]["target"].fill_(7)
    assert torch.equal(windows[0]["embeddings"], before) and not (windows.matrix == 7).any()


def test_a_data_loader_with_workers_gives_the_same_as_batch():
    windows = pickle.loads(pickle.dumps(EmbeddingWindows(clips_of(30, 26))))
    loaded = list(torch.utils.data.DataLoader(windows, batch_size=4))
    assert torch.equal(torch.cat([b["embeddings"] for b in loaded]), windows.context)
    assert torch.equal(torch.cat([b["clip"] for b in loaded]), windows.clip_of_window)


def test_short_clips_are_named_and_the_rest_goes_on():
    windows = EmbeddingWindows(clips_of(30, 20, 21), clip_names=["long", "short", "just"])
    assert windows.short == ["short"] and windows.clip_of_window.unique().tolist() == [0, 2] and len(windows) == 11


# the standardiser


def test_fit_is_the_mean_and_deviation_of_all_rows_also_far_from_zero():
    clips = [c * 1e-3 + 1e4 for c in clips_of(50, 3, 200)]
    whole = np.concatenate(clips).astype(np.float64)
    found = Standardiser.fit(clips)
    np.testing.assert_allclose(found.mean, whole.mean(0), rtol=1e-7)
    np.testing.assert_allclose(found.std, whole.std(0), rtol=1e-4)


def test_a_dimension_that_never_moves_becomes_zero_not_infinite():
    clips = clips_of(30)
    clips[0][:, 2] = 3.5
    standardiser = Standardiser.fit(clips)
    assert standardiser.std[2] == 1
    z = standardiser.apply(clips[0])
    assert torch.isfinite(z).all() and z[:, 2].abs().max() == 0


def test_apply_and_invert_are_inverse_and_the_state_is_json():
    clips = clips_of(40)
    standardiser = Standardiser.fit(clips)
    again = Standardiser.from_state(json.loads(json.dumps(standardiser.state())))
    assert torch.equal(again.mean, standardiser.mean) and torch.equal(again.std, standardiser.std)
    torch.testing.assert_close(again.invert(again.apply(clips[0])), torch.from_numpy(clips[0]))


@pytest.mark.parametrize("state", [{}, {"mean": [0.0]}, {"mean": [0.0], "std": [0.0]}, {"mean": [0.0], "std": [1.0, 1.0]}, {"mean": [float("nan")], "std": [1.0]}, {"mean": [0.0], "std": [1.0], "x": 1}])
def test_a_state_that_is_none_is_refused(state):
    with pytest.raises(InputError, match="state"):
        Standardiser.from_state(state)


# bad input


@pytest.mark.parametrize("build, error, what", [
    (lambda c: EmbeddingWindows([]), InputError, "arrays: got no clip"),
    (lambda c: EmbeddingWindows([c[:, 0]]), InputError, "arrays"),
    (lambda c: EmbeddingWindows([c, c[:, :2]]), ShapeError, r"arrays\[1\]"),
    (lambda c: EmbeddingWindows([c, c[:0]]), ShapeError, r"arrays\[1\]"),
    (lambda c: EmbeddingWindows([c, np.full_like(c, np.nan)]), NonFiniteError, r"arrays\[1\]"),
    (lambda c: EmbeddingWindows([c], context_frames=0), ConfigError, "context_frames"),
    (lambda c: EmbeddingWindows([c], gap=0), ConfigError, "gap"),
    (lambda c: EmbeddingWindows([c], step=0), ConfigError, "step"),
    (lambda c: EmbeddingWindows([c], dtype=torch.int8), ConfigError, "dtype"),
    (lambda c: EmbeddingWindows([c], ranges=[]), InputError, "ranges"),
    (lambda c: EmbeddingWindows([c], clip_names=["a", "b"]), InputError, "clip_names"),
    (lambda c: EmbeddingWindows([c], standardiser=Standardiser.fit([c[:, :2]])), ShapeError, "standardiser"),
    (lambda c: EmbeddingWindows([c[:15]]), InputError, "spans 21 rows, the longest clip has 15"),
    (lambda c: EmbeddingWindows([c]).batch([-1]), InputError, "indices"),
    (lambda c: EmbeddingWindows([c]).batch([20]), InputError, "indices"),
    (lambda c: EmbeddingWindows([c]).batch([[0]]), InputError, "indices"),
    (lambda c: EmbeddingWindows([c])[20], IndexError, "index"),
    (lambda c: Standardiser.fit([]), InputError, "train_arrays"),
    (lambda c: Standardiser.fit([c, c[:, :2]]), ShapeError, r"train_arrays\[1\]"),
    (lambda c: Standardiser.fit([c, c / 0]), NonFiniteError, r"train_arrays\[1\]"),
])
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_bad_input_is_one_clear_error(build, error, what):
    with pytest.raises(error, match=what):
        build(clips_of(40)[0])
