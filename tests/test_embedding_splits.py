"""Nothing of one group stands on both sides, and the units come from training clips alone."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from fvlm.core import ConfigError, InputError, NonFiniteError
from fvlm.training.embedding_splits import SIDES, EmbeddedClip, drawn_split, make_splits, published_split


def walk(name, group=None, seed=0, frames=40, **more):
    rows = np.random.default_rng(seed).standard_normal((frames, 4)).cumsum(0)
    return EmbeddedClip(name=name, group=group or name, rows=rows.astype(np.float16), **more)


THREE = {"a": "train", "b": "val", "c": "test"}


def three(**more):
    return [walk(n, seed=i, **more) for i, n in enumerate("abc")]


@settings(max_examples=40, deadline=None)
@given(groups=st.lists(st.integers(0, 6), min_size=3, max_size=20), seed=st.integers(0, 99))
def test_no_group_on_two_sides(groups, seed):
    if len(set(groups)) < 3:
        with pytest.raises(InputError, match="both sides"):
            drawn_split(groups, seed=seed)
        return
    rule = drawn_split(groups, seed=seed)
    clips = [walk(f"clip{i}", str(g), seed=i) for i, g in enumerate(groups)]
    splits = make_splits(clips, rule, encoder="none", gap=2)
    seen = [{c.group for c in splits.clips[side]} for side in SIDES]
    assert all(seen) and not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    assert sum(len(splits.clips[side]) for side in SIDES) == len(clips)


def test_a_split_depends_on_the_seed_and_not_on_the_order():
    names = [f"g{i}" for i in range(12)]
    assert drawn_split(names, seed=1) == drawn_split(names[::-1], seed=1)
    assert drawn_split(names, seed=1) != drawn_split(names, seed=2)


def test_standardiser_never_sees_val_or_test():
    before = make_splits(three(), THREE, encoder="none").standardiser
    clips = three()
    clips[1], clips[2] = walk("b", seed=77), walk("c", seed=78)
    after = make_splits(clips, THREE, encoder="none").standardiser
    assert torch.equal(before.mean, after.mean) and torch.equal(before.std, after.std)
    clips[0] = walk("a", seed=79)
    assert not torch.equal(before.mean, make_splits(clips, THREE, encoder="none").standardiser.mean)


def test_rows_outside_the_ranges_count_for_nothing():
    clips = three(ranges=((5, 35),))
    base = make_splits(clips, THREE, encoder="none", gap=2)
    for clip in clips:
        clip.rows[:5] = 1000
        clip.rows[35:] = -1000
    same = make_splits(clips, THREE, encoder="none", gap=2)
    assert torch.equal(base.standardiser.mean, same.standardiser.mean)
    assert torch.equal(base.test.context, same.test.context) and torch.equal(base.test.targets, same.test.targets)


def test_fingerprint_changes_with_what_matters():
    base = make_splits(three(), THREE, encoder="none").fingerprint
    assert base == make_splits(three(), THREE, encoder="none").fingerprint
    assert base != make_splits(three(), THREE, encoder="other").fingerprint
    assert base != make_splits(three(), {"a": "val", "b": "train", "c": "test"}, encoder="none").fingerprint
    assert base != make_splits(three(), THREE, encoder="none", gap=3).fingerprint


@pytest.mark.parametrize("rule, error, words", [
    ({"a": "train", "b": "train", "c": "test"}, InputError, "no clip for val"),
    ({"a": "train", "b": "valid", "c": "test"}, ConfigError, "side_of"),
])
def test_bad_rules(rule, error, words):
    with pytest.raises(error, match=words):
        make_splits(three(), rule, encoder="none")


def test_short_and_non_finite_clips_are_named():
    clips = three()
    clips[2] = walk("c", frames=10)
    with pytest.raises(InputError, match="test clips: .*no clip gives a window"):
        make_splits(clips, THREE, encoder="none")
    clips = three()
    clips[1].rows[3, 2] = np.nan
    with pytest.raises((NonFiniteError, InputError), match=r"\(b\)"):
        make_splits(clips, THREE, encoder="none")


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (0.5, 0.6, 0.2), (-0.1, 0.6, 0.5)])
def test_bad_fractions(fractions):
    with pytest.raises(ConfigError, match="fractions"):
        drawn_split("abcd", fractions=fractions)


def folder_of(*pairs):
    from types import SimpleNamespace

    return SimpleNamespace(clips=[SimpleNamespace(name=f"{k}.avi", group=group, split=split) for k, (group, split) in enumerate(pairs)])


def test_a_published_split_is_kept_and_validation_comes_from_training_groups():
    given = published_split(folder_of(("a", "train"), ("b", "val"), ("c", "test"), ("a", "train")))
    assert given == {"a": "train", "b": "val", "c": "test"}
    train = [(f"g{k}", "train") for k in range(10)]
    sides = published_split(folder_of(*train, ("t", "test")))
    assert sides["t"] == "test" and sorted(sides.values()).count("val") == 2 and sorted(sides.values()).count("train") == 8
    assert sides == published_split(folder_of(*train, ("t", "test"))) and sides != published_split(folder_of(*train, ("t", "test")), seed=1)


@pytest.mark.parametrize("pairs, said", [([("a", "train"), ("a", "test")], "two sides"), ([("a", "train"), ("b", None)], "on no side"), ([("a", "test")], "no training side")])
def test_a_published_split_that_is_none(pairs, said):
    with pytest.raises(InputError, match=said):
        published_split(folder_of(*pairs))
