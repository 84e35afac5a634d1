"""The embedding cache: exact rows, whole clips, and every bad day we could think of."""
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
import warnings

import numpy as np
import pytest
import torch

from fvlm.core import ConfigError, InputError, NonFiniteError, ShapeError, VideoError
from fvlm.data import embedding_cache
from fvlm.data.embedding_cache import EmbeddingCache, clip_key


def rows_of(n, d, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def blocks(rows, size):
    return (rows[i:i + size] for i in range(0, len(rows), size))


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def row_file(folder):
    (path,) = folder.glob("*/*.npy")
    return path


def python(code, *arguments, **options):
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize("n, d, block, shard", [(1, 1, 1, 1), (7, 3, 2, 3), (12, 5, 4, 4), (12, 5, 5, 3), (12, 5, 100, 5), (4097, 2, 100, 4096)])
def test_rows_come_back_exactly_for_any_block_and_shard_size(tmp_path, n, d, block, shard):
    rows = rows_of(n, d)
    cache = EmbeddingCache(tmp_path, rows_per_shard=shard)
    stored = cache.add("clip", "encoder", blocks(rows, block), d)
    again = EmbeddingCache(tmp_path).get("clip", "encoder")
    for found in (stored, again):
        assert isinstance(found, np.memmap) and not found.flags.writeable and found.dtype == np.float16
        np.testing.assert_array_equal(found, rows.astype(np.float16))
    (index,) = cache.entries()
    assert len(index["shards"]) == -(-n // shard) and index["rows"] == n and index["dim"] == d


def test_rows_lie_at_a_fixed_stride_in_a_plain_npy_file(tmp_path):
    rows = rows_of(20, 6)
    EmbeddingCache(tmp_path).add("clip", "encoder", [rows], 6)
    raw = row_file(tmp_path).read_bytes()
    start = len(raw) - 20 * 6 * 2
    np.testing.assert_array_equal(np.frombuffer(raw, "<f2", count=6, offset=start + 13 * 12), rows[13].astype(np.float16))
    np.testing.assert_array_equal(np.load(row_file(tmp_path)), rows.astype(np.float16))


def test_torch_blocks_of_any_float_type_are_accepted(tmp_path):
    rows = torch.from_numpy(rows_of(9, 4))
    cache = EmbeddingCache(tmp_path)
    stored = cache.add("clip", "encoder", [rows[:3], rows[3:5].bfloat16(), rows[5:].requires_grad_()], 4)
    np.testing.assert_array_equal(stored[5:], rows[5:].detach().half().numpy())


def test_another_clip_or_encoder_finds_nothing(tmp_path):
    cache = EmbeddingCache(tmp_path)
    cache.add("clip", "encoder", [rows_of(4, 2)], 2)
    assert cache.get("clip", "encoder ") is None and cache.get("clip2", "encoder") is None and cache.notes == []


@pytest.mark.parametrize("bad, what", [(65505.0 * 1.1, "does not fit float16"), (-1e6, "does not fit float16"), (float("nan"), "is not finite"), (float("inf"), "is not finite")])
def test_numbers_that_float16_cannot_hold_are_refused_with_their_place(tmp_path, bad, what):
    rows = rows_of(10, 4)
    rows[7, 2] = bad
    cache = EmbeddingCache(tmp_path)
    with pytest.raises(NonFiniteError, match=rf"row 7, dimension 2 {what}"):
        cache.add("clip", "encoder", blocks(rows, 3), 4)
    assert files(tmp_path) == [] and cache.get("clip", "encoder") is None


def test_the_largest_half_is_kept(tmp_path):
    assert EmbeddingCache(tmp_path).add("clip", "encoder", [np.full((1, 1), 65504.0)], 1)[0, 0] == 65504


@pytest.mark.parametrize("rows, error", [([np.zeros((3, 5))], ShapeError), ([np.zeros(4)], ShapeError), ([np.zeros((2, 4)), np.zeros((2, 3))], ShapeError), ([], InputError), ([np.zeros((0, 4))], InputError)])
def test_blocks_of_the_wrong_shape_or_none_at_all_leave_nothing(tmp_path, rows, error):
    with pytest.raises(error, match="rows"):
        EmbeddingCache(tmp_path).add("clip", "encoder", rows, 4)
    assert files(tmp_path) == []


@pytest.mark.parametrize("call", [lambda c: c.get("", "f"), lambda c: c.get("k", None), lambda c: c.add("k", "f", [], 0), lambda c: EmbeddingCache(c.dir, rows_per_shard=0)])
def test_bad_arguments_are_named(tmp_path, call):
    with pytest.raises(InputError, match="clip_key|fingerprint|dim|rows_per_shard"):
        call(EmbeddingCache(tmp_path))


def test_a_writer_that_fails_half_way_leaves_the_cache_as_it_was(tmp_path):
    cache = EmbeddingCache(tmp_path)
    cache.add("whole", "encoder", [rows_of(5, 3)], 3)
    before = files(tmp_path)

    def dying():
        yield rows_of(5, 3)
        raise RuntimeError("the encoder died")

    with pytest.raises(RuntimeError, match="the encoder died"):
        cache.add("half", "encoder", dying(), 3)
    assert files(tmp_path) == before and cache.get("half", "encoder") is None


def test_a_killed_writer_leaves_no_clip_and_tidy_sweeps_up_after_it(tmp_path):
    writer = python(
        """
        import sys, time, numpy as np
        from fvlm.data.embedding_cache import EmbeddingCache
        def rows():
            for i in range(10**6):
                yield np.ones((1000, 8), np.float32)
                if i == 20:
                    print("going", flush=True)
                time.sleep(0.001)
        EmbeddingCache(sys.argv[1]).add("clip", "encoder", rows(), 8)
        """, tmp_path)
    assert writer.stdout.readline().strip() == "going", writer.stderr.read()
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    cache = EmbeddingCache(tmp_path)
    assert cache.get("clip", "encoder") is None and cache.notes == []
    cache.add("other", "encoder", [rows_of(3, 8)], 8)
    assert cache.tidy() == 0, "young files may belong to a writer at work"
    assert cache.tidy(older_than=-1) > 0
    assert len(files(tmp_path)) == 2 and cache.get("other", "encoder") is not None


def damage_truncate(index, rows):
    os.truncate(rows, rows.stat().st_size - 3)


def damage_flip(index, rows):
    content = bytearray(rows.read_bytes())
    content[-1] ^= 1
    rows.write_bytes(content)


def damage_empty(index, rows):
    rows.write_bytes(b"")


def damage_unlink(index, rows):
    rows.unlink()


def damage_other_shape(index, rows):
    np.save(rows, np.zeros((3, 3), np.float16))


def damage_pickle(index, rows):
    np.save(rows, np.array([{}], dtype=object), allow_pickle=True)


def damage_index_garbage(index, rows):
    index.write_text("{")


def damage_index_list(index, rows):
    index.write_text("[]")


def damage_index_other(index, rows):
    index.write_text(json.dumps({**json.loads(index.read_text()), "fingerprint": "another"}))


def damage_index_keys(index, rows):
    index.write_text(json.dumps({"clip_key": "clip", "fingerprint": "encoder", "dtype": "float16"}))


DAMAGES = [value for name, value in list(globals().items()) if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__.removeprefix("damage_"))
def test_damage_is_reported_once_counts_as_missing_and_is_repaired_by_adding(tmp_path, damage):
    rows = rows_of(50, 4)
    EmbeddingCache(tmp_path, rows_per_shard=16).add("clip", "encoder", [rows], 4)
    EmbeddingCache(tmp_path).add("untouched", "encoder2", [rows], 4)
    (index,) = (path for path in tmp_path.glob("*/*.json") if json.loads(path.read_text())["clip_key"] == "clip")
    damage(index, index.with_name(json.loads(index.read_text())["file"]))
    cache = EmbeddingCache(tmp_path)
    with pytest.warns(UserWarning, match="to be embedded again"):
        assert cache.get("clip", "encoder") is None
    assert len(cache.notes) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(cache.add("clip", "encoder", [rows], 4), rows.astype(np.float16))
        assert EmbeddingCache(tmp_path).get("clip", "encoder") is not None
        assert EmbeddingCache(tmp_path).get("untouched", "encoder2") is not None
    cache.tidy(older_than=-1)
    assert len(list(tmp_path.glob("*/*.npy"))) == 2, "no orphan rows"


def test_the_damaged_shard_is_named(tmp_path):
    EmbeddingCache(tmp_path, rows_per_shard=16).add("clip", "encoder", [rows_of(50, 4)], 4)
    damage_flip(None, row_file(tmp_path))
    with pytest.warns(UserWarning, match="rows 48 to 49 differ"):
        EmbeddingCache(tmp_path).get("clip", "encoder")
    assert EmbeddingCache(tmp_path, verify=False).get("clip", "encoder") is not None, "verify=False trusts the disk"


def test_an_index_cannot_point_outside_its_folder(tmp_path):
    np.save(tmp_path / "secret.npy", np.zeros((5, 2), np.float16))
    cache = EmbeddingCache(tmp_path / "cache")
    cache.add("clip", "encoder", [rows_of(5, 2)], 2)
    (index,) = (tmp_path / "cache").glob("*/*.json")
    index.write_text(json.dumps({**json.loads(index.read_text()), "file": "../../secret.npy"}))
    with pytest.warns(UserWarning, match="cannot be mapped"):
        assert EmbeddingCache(tmp_path / "cache").get("clip", "encoder") is None


def test_a_full_disk_is_one_clear_error_and_old_clips_stay(tmp_path):
    writer = python(
        """
        import resource, signal, sys, numpy as np
        from fvlm.core import InputError
        from fvlm.data.embedding_cache import EmbeddingCache
        cache = EmbeddingCache(sys.argv[1])
        cache.add("small", "encoder", [np.ones((10, 8))], 8)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            cache.add("large", "encoder", (np.ones((1000, 8)) for _ in range(100)), 8)
        except InputError as error:
            print(error)
        """, tmp_path)
    out, err = writer.communicate(timeout=60)
    assert "cannot be written" in out and "untouched" in out, err
    cache = EmbeddingCache(tmp_path)
    assert cache.get("large", "encoder") is None and cache.get("small", "encoder").shape == (10, 8) and len(files(tmp_path)) == 2


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(InputError, match="dir: expected a folder"):
        EmbeddingCache(tmp_path / "taken")


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_still_reads_and_says_that_it_cannot_write(tmp_path):
    EmbeddingCache(tmp_path).add("clip", "encoder", [rows_of(4, 2)], 2)
    for folder in (*tmp_path.glob("*"), tmp_path):
        folder.chmod(0o555)
    cache = EmbeddingCache(tmp_path)
    assert cache.get("clip", "encoder") is not None
    with pytest.raises(InputError, match="cannot be written"):
        cache.add("other", "encoder", [rows_of(4, 2)], 2)
    for folder in (tmp_path, *tmp_path.glob("*")):
        folder.chmod(0o755)


def test_of_two_interleaved_writers_the_first_to_finish_wins(tmp_path):
    one, two = EmbeddingCache(tmp_path), EmbeddingCache(tmp_path)
    first, second = rows_of(6, 3, seed=1), rows_of(6, 3, seed=2)

    def interrupted():
        yield first[:3]
        two.add("clip", "encoder", [second], 3)
        yield first[3:]

    stored = one.add("clip", "encoder", interrupted(), 3)
    np.testing.assert_array_equal(stored, second.astype(np.float16))
    assert len(files(tmp_path)) == 2


def test_many_processes_writing_the_same_clips_agree(tmp_path):
    code = """
        import sys, numpy as np
        from fvlm.data.embedding_cache import EmbeddingCache
        cache = EmbeddingCache(sys.argv[1])
        for turn in range(20):
            cache.add(f"clip {turn}", "encoder", [np.full((100, 4), turn + int(sys.argv[2]) / 8)] * 3, 4)
        """
    writers = [python(code, tmp_path, number) for number in range(3)]
    for writer in writers:
        _, err = writer.communicate(timeout=120)
        assert writer.returncode == 0, err
    cache = EmbeddingCache(tmp_path)
    for turn in range(20):
        rows = cache.get(f"clip {turn}", "encoder")
        assert rows.shape == (300, 4) and (rows == rows[0, 0]).all() and rows[0, 0] - turn in (0, 0.125, 0.25)
    cache.tidy(older_than=-1)
    assert len(list(tmp_path.glob("*/*.npy"))) == 20 and cache.notes == []


def test_maps_are_reused_bounded_and_not_pickled(tmp_path):
    cache = EmbeddingCache(tmp_path, open_maps=2)
    for number in range(4):
        cache.add(f"clip {number}", "encoder", [rows_of(3, 2, number)], 2)
    assert cache.get("clip 3", "encoder") is cache.get("clip 3", "encoder") and len(cache._maps) == 2
    copy = pickle.loads(pickle.dumps(cache))
    assert len(copy._maps) == 0
    np.testing.assert_array_equal(copy.get("clip 0", "encoder"), rows_of(3, 2, 0).astype(np.float16))


def test_about_is_kept_and_may_be_filled_while_rows_stream(tmp_path):
    notes = []

    def rows():
        yield rows_of(3, 2)
        notes.append("a late note")

    cache = EmbeddingCache(tmp_path)
    cache.add("clip", "encoder", rows(), 2, about={"notes": notes})
    assert cache.about("clip", "encoder") == {"notes": ["a late note"]}


# clip_key


def test_a_key_is_content_not_name_or_time(tmp_path):
    a, b = tmp_path / "a.mp4", tmp_path / "b.mp4"
    a.write_bytes(b"x" * 1000)
    b.write_bytes(b"x" * 1000)
    os.utime(b, (time.time() - 1e6,) * 2)
    assert clip_key(a) == clip_key(b)
    b.write_bytes(b"x" * 999 + b"y")
    assert clip_key(a) != clip_key(b)
    assert len({clip_key(a), clip_key(a, stride=2), clip_key(a, flip=True), clip_key(a, stride=2, flip=True)}) == 4


@pytest.mark.parametrize("where", [0, -1, "half"])
def test_a_large_file_is_sampled_from_first_byte_to_last(tmp_path, monkeypatch, where):
    monkeypatch.setattr("fvlm.checked_rows.BLOCK_BYTES", 1024)  # "large" begins at 16 KiB
    path = tmp_path / "large.mp4"
    content = bytearray(np.random.default_rng(0).bytes(100_000))
    path.write_bytes(content)
    before = clip_key(path)
    offset = 8 * (100_000 - 1024) // 15 + 10 if where == "half" else where
    content[offset] ^= 1
    path.write_bytes(content)
    assert clip_key(path) != before
    path.write_bytes(content + b"!")
    assert clip_key(path) not in (before,)


def test_a_key_of_nothing_is_a_video_error(tmp_path):
    (tmp_path / "dangling.mp4").symlink_to(tmp_path / "gone.mp4")
    for path in (tmp_path / "missing.mp4", tmp_path / "dangling.mp4", tmp_path):
        with pytest.raises(VideoError, match="cannot be read"):
            clip_key(path)
    with pytest.raises(ConfigError, match="stride"):
        clip_key(tmp_path / "x", stride=0)
