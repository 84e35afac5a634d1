"""The grid resumes, refuses to mix, and its table is what the records say."""
from dataclasses import replace

import numpy as np
import pytest

from fvlm.core import ConfigError, InputError, NonFiniteError, ShapeError
from fvlm.evidence.experiment import BASELINES, comparison, errors_of, fitted_baseline, judge, markdown_table, over_clips, run_grid
from fvlm.instruments.nearest_frames import nearest_frames
from fvlm.models.baselines import CopyLast
from fvlm.training.embedding_splits import EmbeddedClip, make_splits
from fvlm.training.recipes import sc_vfp
from fvlm.training.records import read_records

rng = np.random.default_rng(0)
CLIPS = [EmbeddedClip(name=f"c{i}", group=f"c{i}", rows=rng.standard_normal((30 + i, 6)).cumsum(0)) for i in range(9)]
SPLITS = make_splits(CLIPS, {f"c{i}": ("train", "val", "test")[i % 3] for i in range(9)}, encoder="none", gap=1)
RECIPE = replace(sc_vfp(), gap=1, size=replace(sc_vfp().size, width=16, depth=1, num_heads=2, ffn_dim=16, mlp_dims=()),
                 training=replace(sc_vfp().training, steps=4, val_every=2))


def grid(root, **more):
    arguments = dict(arms=["mhsa"], seeds=[0, 1], open_data=lambda r: (SPLITS, None), root=root, progress=False)
    return run_grid("study", {"here": RECIPE}, **arguments | more)


def test_judge_is_the_mean_over_each_clips_windows():
    by_clip = judge(CopyLast(), SPLITS.test)["standardised_mse"]
    windows = SPLITS.test
    for number, name in enumerate(windows.clip_names):
        mine = (windows.clip_of_window == number).nonzero().flatten()
        batch = windows.batch(mine)
        expected = ((batch["embeddings"][:, -1] - batch["target"]) ** 2).mean()
        assert by_clip[name] == pytest.approx(float(expected), rel=1e-5)
    assert over_clips(by_clip) == pytest.approx(np.mean(list(by_clip.values())))


def test_a_killed_grid_ends_in_the_same_table(tmp_path):
    whole = grid(tmp_path / "whole")
    assert len(whole) == len(BASELINES) + 2
    part = grid(tmp_path / "part", seeds=[0])
    (tmp_path / "part" / "study" / "here--ridge.json").unlink()
    rest = grid(tmp_path / "part")
    assert sorted(rest) == ["here--mhsa--seed1", "here--ridge"] and "here--mhsa--seed0" in part
    assert grid(tmp_path / "part") == []
    rows = [comparison(read_records(tmp_path / side, "study"), "here") for side in ("whole", "part")]
    for a, b in zip(*rows):
        assert replace(a, seconds=0) == replace(b, seconds=0)


def test_shards_share_the_cells(tmp_path):
    first, second = (grid(tmp_path, shard=(k, 2)) for k in (0, 1))
    assert not set(first) & set(second) and len(first) + len(second) == len(BASELINES) + 2
    with pytest.raises(ConfigError, match="shard"):
        grid(tmp_path, shard=(2, 2))


def test_another_recipe_under_an_old_name_is_refused(tmp_path):
    grid(tmp_path, seeds=[0])
    with pytest.raises(ConfigError, match="another recipe"):
        run_grid("study", {"here": replace(RECIPE, step=2)}, ["mhsa"], [0], lambda r: (SPLITS, None), root=tmp_path, progress=False)


def test_rows_of_different_data_are_not_compared(tmp_path):
    grid(tmp_path, seeds=[0])
    other = make_splits(CLIPS, {f"c{i}": ("test", "val", "train")[i % 3] for i in range(9)}, encoder="none", gap=1)
    grid(tmp_path, seeds=[0, 1], open_data=lambda r: (other, None))
    with pytest.raises(InputError, match="different data"):
        comparison(read_records(tmp_path, "study"), "here")
    with pytest.raises(InputError, match="no copy_last"):
        comparison(read_records(tmp_path, "study"), "elsewhere")


def test_table_has_every_row_and_no_skill_over_itself(tmp_path):
    grid(tmp_path)
    rows = {r.name: r for r in comparison(read_records(tmp_path, "study"), "here")}
    assert set(rows) == {*BASELINES, "mhsa"} and rows["mhsa"].seeds == 2 and rows["copy_last"].over_copy_last is None and rows["copy_last"].skill == 0
    errors = errors_of([r for r in read_records(tmp_path, "study") if "mhsa" in r.run])[0]
    assert errors.shape == (2, 3) and rows["mhsa"].standardised_mse == pytest.approx(errors.mean())
    assert rows["mhsa"].skill == pytest.approx(1 - errors.mean() / rows["copy_last"].standardised_mse)
    assert markdown_table(list(rows.values())).count("\n") == len(rows) + 1


def test_ridge_penalty_comes_from_val():
    ridge = fitted_baseline("ridge", SPLITS)
    best = min(ridge.path, key=lambda pair: pair[1])
    assert ridge.alpha == best[0] and len(ridge.path) > 10


def test_nearest_frames_refuses_nonsense():
    import torch

    bank = torch.eye(4)
    with pytest.raises(ShapeError, match="bank"):
        nearest_frames(bank[:, :3], bank)
    with pytest.raises(NonFiniteError, match="queries"):
        nearest_frames(bank * float("nan"), bank)
    with pytest.raises(InputError, match="k: got 5"):
        nearest_frames(bank, bank, k=5)
    with pytest.raises(InputError, match="k: got 4"):
        nearest_frames(bank, bank, k=4, exclude=torch.eye(4, dtype=torch.bool))
