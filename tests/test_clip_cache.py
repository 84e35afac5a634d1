"""The clip cache and its checked rows: right frames or one sentence, whatever happens to files, writers and disks."""
import multiprocessing
import os
import pickle
import signal
import sys
import warnings

import numpy as np
import pytest
import torch

from fvlm.checked_rows import CheckedRows, content_key, file_stamp, write_rows
from fvlm.core import ConfigError, InputError, VideoError
from fvlm.data import clip_cache
from fvlm.data.clip_cache import ClipCache
from fvlm.data.clips import VideoFolder
from fvlm.data.video import decode, read_clip
from tests.peak_memory import check_peak_is_flat


def write(path, count=40, size=(32, 48), seed=0):
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    ground = np.random.default_rng(seed).integers(0, 200, (*size, 3))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25, width=size[1], height=size[0], pix_fmt="yuv420p")
        for t in range(count):
            picture = np.ascontiguousarray(np.roll(ground, 2 * t, 1).astype(np.uint8))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture
def film(tmp_path):
    return write(tmp_path / "films" / "a b.mp4")


@pytest.fixture
def cache(tmp_path):
    return ClipCache(tmp_path / "cache")


def forked(function, *arguments):
    "A child process at work on the function, and the end of the pipe on which it sends what that returns or raises."
    def run(out):
        warnings.simplefilter("ignore")
        try:
            out.send(function(*arguments))
        except Exception as error:
            out.send(error)

    context = multiprocessing.get_context("fork")
    mine, its = context.Pipe(duplex=False)
    child = context.Process(target=run, args=(its,))
    child.start()
    its.close()
    return child, mine


def answer(child, pipe):
    "(exit code, what it sent or None)."
    try:
        said = pipe.recv()
    except EOFError:
        said = None
    child.join(60)
    return child.exitcode, said


def frame_files(cache):
    return sorted((cache.dir / "frames").iterdir())


@pytest.fixture
def decoded(monkeypatch):
    "Counts the calls that decode."
    seen = []
    real = clip_cache.decode
    monkeypatch.setattr(clip_cache, "decode", lambda path, *rest, **named: seen.append(str(path)) or real(path, *rest, **named))
    return seen


# --- checked rows


@pytest.mark.parametrize("dtype, row", [("uint8", (5, 7, 3)), ("<f2", (11,)), ("float32", ())])
@pytest.mark.parametrize("count, block, shard_bytes", [(1, 1, 1), (23, 4, 100), (23, 100, 2**20), (64, 8, 1000)])
def test_rows_come_back_for_any_type_block_and_shard(tmp_path, monkeypatch, dtype, row, count, block, shard_bytes):
    monkeypatch.setattr("fvlm.checked_rows.SHARD_BYTES", shard_bytes)
    rows = np.random.default_rng(0).integers(0, 200, (count, *row)).astype(dtype)
    assert write_rows(tmp_path / "rows.npy", (rows[i : i + block] for i in range(0, count, block)), {"note": "x"}) == count
    held = CheckedRows(tmp_path / "rows.npy")
    held.check()
    assert len(held) == count and held.facts["note"] == "x" and held.dtype == np.dtype(dtype) and not held.map().flags.writeable
    np.testing.assert_array_equal(held.map(), rows)
    order = np.random.default_rng(1).integers(0, count, 30)
    np.testing.assert_array_equal(CheckedRows(tmp_path / "rows.npy").take(order), rows[order])
    np.testing.assert_array_equal(held.take(np.arange(count)), rows)
    np.testing.assert_array_equal(np.load(tmp_path / "rows.npy"), rows)
    np.testing.assert_array_equal(held.take([count - 1, 0]), rows[[count - 1, 0]])
    assert len(held.facts["shards"]) == -(-count // held.facts["rows_per_shard"])


def test_every_byte_answers_for_itself(tmp_path):
    path = tmp_path / "rows.npy"
    write_rows(path, [np.arange(700, dtype=np.uint8).reshape(100, 7)], {})
    sound = path.read_bytes()
    for offset in range(len(sound)):
        damaged = bytearray(sound)
        damaged[offset] ^= 1 << offset % 8
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="rows.npy"):
            CheckedRows(path).check()
    for length in [*range(0, len(sound), 7), len(sound) - 1]:
        path.write_bytes(sound[:length])
        with pytest.raises(InputError, match="cut short|differs"):
            CheckedRows(path).check()


def test_only_the_shards_that_are_read_are_hashed(tmp_path, monkeypatch):
    monkeypatch.setattr("fvlm.checked_rows.SHARD_BYTES", 40)
    write_rows(tmp_path / "rows.npy", [np.arange(400, dtype=np.uint8).reshape(100, 4)], {})
    data = bytearray((tmp_path / "rows.npy").read_bytes())
    start = CheckedRows(tmp_path / "rows.npy").facts["start"]
    data[start + 4 * 55] ^= 1
    (tmp_path / "rows.npy").write_bytes(data)
    held = CheckedRows(tmp_path / "rows.npy")
    held.take([0, 49, 60, 99])
    with pytest.raises(InputError, match="rows 50 to 59 differ"):
        held.take([52])


@pytest.mark.parametrize("blocks, says", [([], "got none"), ([np.zeros((0, 3))], "got none"), ([np.zeros((2, 3)), np.zeros((2, 4))], "at row 2"), ([np.zeros(2), np.zeros(2, int)], "at row 2")])
def test_blocks_that_do_not_fit_are_refused(tmp_path, blocks, says):
    with pytest.raises(InputError, match=says):
        write_rows(tmp_path / "rows.npy", blocks, {})


def test_a_content_is_not_a_name_or_a_time(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 5000)
    (tmp_path / "b").write_bytes(b"x" * 5000)
    os.utime(tmp_path / "b", (1, 1))
    (tmp_path / "c").write_bytes(b"x" * 4999 + b"y")
    assert content_key(tmp_path / "a") == content_key(tmp_path / "b") != content_key(tmp_path / "c")
    assert file_stamp(tmp_path / "a") != file_stamp(tmp_path / "b")
    (tmp_path / "big").write_bytes(bytes(9 * 2**20))
    before = content_key(tmp_path / "big")
    with open(tmp_path / "big", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\1")
    assert content_key(tmp_path / "big") != before
    for name, content in (("p/1.png", b"1"), ("p/2.png", b"2"), ("q/1.png", b"2"), ("q/2.png", b"1")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert content_key(tmp_path / "p") != content_key(tmp_path / "q") and file_stamp(tmp_path / "p") != file_stamp(tmp_path / "q")
    for ask in (content_key, file_stamp):
        with pytest.raises(InputError, match="nowhere"):
            ask(tmp_path / "nowhere")


# --- frames


@pytest.mark.parametrize("size, stride", [(None, 1), (16, 1), ((20, 24), 3)])
def test_frames_are_the_decoded_ones(film, tmp_path, size, stride):
    cache = ClipCache(tmp_path / "cache", size=size, stride=stride)
    expected = read_clip(film, stride=stride, size=size)
    for held in (cache, ClipCache(tmp_path / "cache", size=size, stride=stride)):
        frames = held.frames(film)
        assert isinstance(frames, np.memmap) and frames.dtype == np.uint8 and not frames.flags.writeable
        np.testing.assert_array_equal(frames, expected)
        wanted = np.array([0, 9, 3, 9, 36])
        assert torch.equal(held.read(film, wanted), expected[wanted // stride])
        held.read(film, [0])[:] = 7  # a copy of the caller's own
        assert torch.equal(held.read(film, [0]), read_clip(film, [0], size=size)) and held.notes == []


def test_blocks_join_without_a_seam(film, cache, monkeypatch):
    monkeypatch.setattr(clip_cache, "DECODE_BYTES", 1)  # the smallest block, 32 frames: the clip of 40 takes two
    np.testing.assert_array_equal(cache.frames(film), read_clip(film))


def test_the_second_reading_decodes_nothing(film, cache, decoded):
    cache.read(film, [3, 4])
    first = len(decoded)
    cache.read(film, [8, 9, 20])
    cache.frames(film)
    ClipCache(cache.dir).read(film, range(40))
    assert first > 0 and len(decoded) == first


def test_a_copy_is_the_same_clip_and_another_size_or_stride_is_not(film, cache, decoded):
    cache.frames(film)
    copy = film.with_name("copy.mp4")
    copy.write_bytes(film.read_bytes())
    count = len(decoded)
    cache.frames(copy)
    assert len(decoded) == count and len(frame_files(cache)) == 1
    for options in (dict(size=16), dict(stride=2)):
        ClipCache(cache.dir, **options).frames(film)
    assert len(frame_files(cache)) == 3


def test_other_decoders_have_frames_of_their_own(film, cache, decoded, monkeypatch):
    cache.frames(film)
    count = len(decoded)
    monkeypatch.setattr(clip_cache, "_decoders", lambda: "frames1-av999")
    later = ClipCache(cache.dir)
    later.frames(film)
    assert len(decoded) > count and later.notes == [] and len(frame_files(cache)) == 2


@pytest.mark.parametrize("indices, says", [([], "indices"), ([-1], "indices"), ([[1]], "indices"), ([3], "stride 2")])
def test_indices_that_cannot_be(film, tmp_path, indices, says):
    with pytest.raises(InputError, match=says):
        ClipCache(tmp_path / "cache", stride=2).read(film, indices)


def test_past_the_end_names_the_file_and_its_frames(film, cache):
    for _ in range(2):
        with pytest.raises(VideoError, match="frame 40 was asked for, but the cache holds frames 0 to 39"):
            cache.read(film, [0, 40])


def test_a_film_that_cannot_be_read_leaves_nothing(tmp_path, cache):
    (tmp_path / "zeros.mp4").write_bytes(bytes(3000))
    for path in (tmp_path / "zeros.mp4", tmp_path / "nowhere.mp4"):
        for ask in (cache.frames, lambda p: cache.read(p, [0]), cache.get):
            if ask == cache.get and path.exists():
                assert cache.get(path) is None
                continue
            with pytest.raises(VideoError, match=path.name):
                ask(path)
    assert not (cache.dir / "frames").exists() or frame_files(cache) == []


@pytest.mark.parametrize("options, says", [(dict(stride=0), "stride"), (dict(size=0), "size"), (dict(max_bytes=-1), "max_bytes")])
def test_bad_arguments_are_named(tmp_path, options, says):
    with pytest.raises(ConfigError, match=says):
        ClipCache(tmp_path, **options)


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="dir"):
        ClipCache(tmp_path / "file")


# --- damage


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


def swap(path):
    "The whole and sound frames of another film under this one's name."
    write_rows(path, [np.zeros((40, 32, 48, 3), np.uint8)], {"key": "another"})


@pytest.mark.parametrize("damage", [cut, flip, empty, swap])
@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("how", ["read", "frames"])
def test_damage_is_found_said_and_repaired(film, cache, damage, fresh, how):
    cache.frames(film)
    (file,) = frame_files(cache)
    damage(file)
    os.utime(file, (1, 1))  # a different time, as any change leaves: also for a process that has the file open
    reader = ClipCache(cache.dir) if fresh else cache
    with pytest.warns(UserWarning, match="decoded again"):
        found = reader.frames(film) if how == "frames" else reader.read(film, range(40))
    np.testing.assert_array_equal(found, read_clip(film))
    assert len(reader.notes) == 1 and str(film) in reader.notes[0]
    assert len(frame_files(cache)) == 1
    later = ClipCache(cache.dir)
    np.testing.assert_array_equal(later.get(film), read_clip(film))
    assert later.notes == []


def test_a_file_that_shrinks_under_its_reader_does_not_kill_it(film, cache):
    "Touching a map beyond the end of its file would end a process with SIGBUS: in one of its own, so that this is seen."
    def read_twice():
        reader = ClipCache(cache.dir)
        reader.read(film, range(40))
        (file,) = frame_files(cache)
        os.truncate(file, 100)
        return int(reader.read(film, range(40)).sum())

    cache.frames(film)
    assert answer(*forked(read_twice)) == (0, int(read_clip(film).sum()))


@pytest.mark.parametrize("fresh", [True, False])
def test_an_edited_film_is_decoded_again_and_said(film, cache, fresh):
    before = np.array(cache.frames(film))
    write(film, count=35, seed=5)
    os.utime(film, (1, 1))
    reader = ClipCache(cache.dir) if fresh else cache
    with pytest.warns(UserWarning, match="a b.mp4 has changed since it was cached"):
        frames = reader.frames(film)
    assert len(frames) == 35 and not np.array_equal(frames[:35], before[:35])
    np.testing.assert_array_equal(frames, read_clip(film))
    assert len(frame_files(cache)) == 2 and cache.tidy() == 0 and cache.tidy(older_than=-1) > 0 and len(frame_files(cache)) == 1
    assert ClipCache(cache.dir).get(film) is not None


def test_tidy_can_forget_films_that_are_gone(film, cache):
    cache.frames(film)
    film.unlink()
    assert cache.tidy(older_than=-1) == 0 and cache.tidy(older_than=-1, gone=True) > 0 and frame_files(cache) == []


def test_a_moved_folder_keeps_its_frames(film, cache, decoded):
    cache.frames(film)
    moved = film.parent.rename(film.parent.with_name("moved")) / film.name
    later, count = ClipCache(cache.dir), len(decoded)
    later.frames(moved)
    assert len(decoded) == count and later.tidy(older_than=-1, gone=True) == 0 and len(frame_files(cache)) == 1


# --- writers


def test_two_writers_end_with_one_good_file(tmp_path, cache):
    films = [write(tmp_path / "films" / f"{k}.mp4", seed=k) for k in range(4)]
    line = multiprocessing.get_context("fork").Barrier(3)

    def fill():
        own = ClipCache(cache.dir)
        line.wait(60)
        return [int(own.frames(path).sum()) for path in films], own.notes

    writers = [forked(fill) for _ in range(3)]
    expected = [int(read_clip(path).sum()) for path in films]
    assert [answer(*writer) for writer in writers] == [(0, (expected, []))] * 3
    assert len(frame_files(cache)) == 4 and cache.tidy(older_than=-1) == 0
    for path in films:
        np.testing.assert_array_equal(cache.get(path), read_clip(path))


def test_a_writer_between_another_ones_blocks(film, cache, monkeypatch):
    "The second writer finishes while the first is half way: one good file, and the first goes on."
    monkeypatch.setattr(clip_cache, "DECODE_BYTES", 1)
    real, entered = clip_cache.decode, []

    def interrupted(path, *rest, **named):
        entered.append(path)
        if len(entered) == 2:
            other = ClipCache(cache.dir)
            np.testing.assert_array_equal(other.frames(film), read_clip(film))
        return real(path, *rest, **named)

    monkeypatch.setattr(clip_cache, "decode", interrupted)
    np.testing.assert_array_equal(cache.frames(film), read_clip(film))
    assert len(frame_files(cache)) == 1 and cache.notes == []


def test_a_killed_writer_leaves_no_clip(film, cache, monkeypatch):
    real = clip_cache.decoded_blocks

    def dying(*arguments, **named):
        yield next(real(*arguments, **named))
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(clip_cache, "decoded_blocks", dying)
    assert answer(*forked(lambda: ClipCache(cache.dir).frames(film))) == (-signal.SIGKILL, None)
    monkeypatch.undo()
    assert cache.get(film) is None and cache.notes == [] and len(frame_files(cache)) == 1, "an unfinished part"
    assert cache.tidy() == 0 and cache.tidy(older_than=-1) > 0 and frame_files(cache) == []
    np.testing.assert_array_equal(cache.frames(film), read_clip(film))


def test_a_film_that_breaks_half_way_leaves_no_clip(film, cache, monkeypatch):
    monkeypatch.setattr(clip_cache, "DECODE_BYTES", 1)
    real, calls = clip_cache.decode, []

    def failing(path, *rest, **named):
        calls.append(path)
        if len(calls) == 2:
            raise VideoError(path, "a frame in the middle cannot be decoded")
        return real(path, *rest, **named)

    monkeypatch.setattr(clip_cache, "decode", failing)
    with pytest.raises(VideoError, match="in the middle"):
        cache.frames(film)
    assert frame_files(cache) == [] and cache.get(film) is None


# --- room


def test_a_full_disk_is_one_clear_error_and_old_clips_stay(tmp_path, cache):
    small, large = write(tmp_path / "films" / "small.mp4", count=5), write(tmp_path / "films" / "large.mp4", count=60, size=(64, 64))
    cache.frames(small)
    def fill():
        import resource

        read_clip(large)  # the decoder has its room; the limit is for what the cache writes
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        ClipCache(cache.dir).frames(large)

    code, error = answer(*forked(fill))
    assert code == 0 and isinstance(error, InputError) and "cannot be written (File too large); clips already in it are untouched" in str(error)
    assert len(frame_files(cache)) == 1 and cache.get(large) is None
    np.testing.assert_array_equal(ClipCache(cache.dir).get(small), read_clip(small))


def test_a_disk_that_is_too_small_is_known_beforehand(film, cache, monkeypatch, decoded):
    monkeypatch.setattr(clip_cache.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100_000})())
    with pytest.raises(InputError, match=r"needs 0.2 MB, and the disk of .* has 0.1 MB free"):
        cache.frames(film)
    with pytest.raises(InputError, match="1 clips need 0.2 MB, and there is room for 0.1 MB"):
        cache.fill([film], progress=False)
    assert decoded == []


def test_a_read_only_folder_still_reads(film, cache, monkeypatch):
    cache.frames(film)
    other = write(film.with_name("other.mp4"), seed=3)

    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(clip_cache, "written_whole", refused)
    monkeypatch.setattr(clip_cache.os, "access", lambda path, mode: False)
    later = ClipCache(cache.dir)
    np.testing.assert_array_equal(later.frames(film), read_clip(film))
    with pytest.raises(InputError, match="cannot be written .Permission denied"):
        later.frames(other)


def test_a_limit_is_kept_and_said_once(tmp_path, decoded, monkeypatch):
    films = [write(tmp_path / "films" / f"{k}.mp4", seed=k) for k in range(3)]
    one = 40 * 32 * 48 * 3
    cache = ClipCache(tmp_path / "cache", max_bytes=int(2.5 * one))
    with pytest.raises(InputError, match="max_bytes: 3 clips need 0.6 MB, and there is room for 0.5 MB"):
        cache.fill(films, progress=False)
    assert decoded == []
    with pytest.warns(UserWarning, match="is full") as caught:
        for _ in range(2):
            for path in films:
                assert torch.equal(cache.read(path, [1, 5]), read_clip(path, [1, 5]))
    assert len(caught) == 1 and len(frame_files(cache)) == 2 and cache.bytes() <= 2.5 * one
    probed = []
    monkeypatch.setattr(clip_cache, "probe", lambda path: probed.append(path))
    cache.read(films[2], [0])
    assert probed == [], "what is outside is remembered"
    monkeypatch.undo()
    with pytest.raises(InputError, match="max_bytes"):
        cache.frames(films[2])


def test_plan_and_fill(tmp_path):
    for k in range(3):
        write(tmp_path / "films" / f"{k}.mp4", seed=k)
    folder = VideoFolder(tmp_path / "films", cache=ClipCache(tmp_path / "cache", size=16))
    cache = folder.cache
    cache.frames(folder.clips[0].path)
    broken = folder.clips[2].path
    plan = cache.plan(folder)
    assert plan.bytes == 2 * 40 * 16 * 16 * 3 and len(plan.cached) == 1 and len(plan.done) == 2 and "2 clips to decode, 0.1 MB" in str(plan)
    broken.write_bytes(bytes(2000))
    report = cache.fill(folder, progress=False)
    assert len(report.done) == 1 and [path for path, _ in report.bad] == [str(broken)]
    assert len(folder.clips) == 2 and folder.bad[-1][0] == broken, "set aside in the folder, too"
    again = cache.fill(folder, progress=False)
    assert again.done == () and len(again.cached) == 2 and again.bytes == 0
    with pytest.raises(InputError, match="clips"):
        cache.plan(str(tmp_path))


# --- a folder over it


@pytest.fixture
def folder(tmp_path):
    for k in range(3):
        write(tmp_path / "films" / f"person {k}" / "a.mp4", seed=k)
    return VideoFolder(tmp_path / "films", cache=ClipCache(tmp_path / "cache", size=16), gap=3)


def test_a_folder_reads_the_same_windows_from_its_cache(folder, decoded):
    bare = VideoFolder(folder.root, size=16, gap=3)
    for k in (0, 30, 74, 31, 1):
        mine, theirs = folder[k], bare[k]
        assert torch.equal(mine["video"], theirs["video"]) and mine["name"] == theirs["name"] and mine["indices"].tolist() == theirs["indices"].tolist()
    count = len(decoded)
    for k in range(len(folder)):
        folder[k]
    assert len(decoded) == count == 3


def test_a_size_is_given_once(tmp_path, folder):
    with pytest.raises(ConfigError, match="size: got 20"):
        VideoFolder(folder.root, size=20, cache=folder.cache)
    assert len(VideoFolder(folder.root, size=16, cache=folder.cache).clips) == 3


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_read_and_fill_it(folder, start):
    from torch.utils.data import DataLoader

    folder[0]  # a map is open in the parent
    folder.cache.frames(folder.clips[0].path)
    context = multiprocessing.get_context(start)
    loader = DataLoader(folder, batch_size=25, num_workers=2, multiprocessing_context=context, collate_fn=lambda items: items) if start == "fork" else \
        DataLoader(folder, batch_size=25, num_workers=2, multiprocessing_context=context)
    seen = 0
    for batch in loader:
        videos = batch["video"] if start == "spawn" else torch.stack([item["video"] for item in batch])
        for video in videos:
            number, first = folder.windows[seen]
            expected = read_clip(folder.clips[number].path, first + 3 * np.arange(6), size=16)
            assert torch.equal(video, expected)
            seen += 1
    assert seen == len(folder) and len(frame_files(folder.cache)) == 3


def test_it_keeps_no_file_open_and_can_be_pickled(folder):
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    for k in range(0, len(folder), 5):
        folder[k]
    assert before is None or len(os.listdir("/proc/self/fd")) == before
    again = pickle.loads(pickle.dumps(folder.cache))
    assert torch.equal(again.read(folder.clips[0].path, [4]), read_clip(folder.clips[0].path, [4], size=16))


def test_a_folder_of_pictures_is_a_clip_too(tmp_path, cache):
    "Where `decode` reads them."
    from PIL import Image

    place = tmp_path / "pictures"
    place.mkdir()
    for k in range(6):
        Image.fromarray(np.random.default_rng(k).integers(0, 255, (16, 20, 3)).astype(np.uint8)).save(place / f"{k:03d}.png")
    try:
        expected = decode(place).frames
    except VideoError:
        pytest.skip("decode reads no folders of pictures")
    np.testing.assert_array_equal(cache.frames(place), expected)
    Image.fromarray(np.zeros((16, 20, 3), np.uint8)).save(place / "003.png")
    os.utime(place / "003.png", (1, 1))
    with pytest.warns(UserWarning, match="has changed"):
        assert not cache.read(place, [3]).any()


def test_sequences_of_one_array_share_its_hash_and_notice_an_edit(tmp_path, monkeypatch):
    "Ten thousand sequences lie in one large file: it is hashed once, and again when it has changed."
    path, hashed = tmp_path / "stack.npy", []
    frames = np.random.default_rng(0).integers(0, 255, (10, 4, 16, 16)).astype(np.uint8)  # time first
    np.save(path, frames)
    monkeypatch.setattr(clip_cache, "content_key", lambda file: hashed.append(file) or content_key(file))
    cache = ClipCache(tmp_path / "cache")
    for n in (0, 3, 0):
        assert np.array_equal(cache.frames(f"{path}#{n:05d}")[..., 0], frames[:, n])
    names = {clip_cache.clip_content(f"{path}#{n:05d}") for n in range(4)}
    assert len(hashed) == 1 and len(names) == 4
    np.save(path, frames[:, ::-1])
    os.utime(path, ns=(0, 10**18))
    with pytest.warns(UserWarning, match="has changed since it was cached"):
        assert np.array_equal(cache.frames(f"{path}#00000")[..., 0], frames[:, 3])
    assert len(hashed) == 2 and not names & {clip_cache.clip_content(f"{path}#{n:05d}") for n in range(4)}


PEAK = """
    import resource, sys
    from fvlm.data import clip_cache
    from fvlm.data.clips import VideoFolder
    clip_cache.DECODE_BYTES = 1  # the smallest blocks, so that a short clip shows what a long one does
    for folder in sys.argv[2:]:
        videos = VideoFolder(folder, cache=clip_cache.ClipCache(sys.argv[1]))
        for k in range(0, len(videos), 7):
            videos[k]
        assert videos.cache.plan(videos).done == (), "every clip is there"
        print(sum(entry.frames for entry in videos.clips), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    """


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak as Linux reports it")
def test_peak_memory_does_not_grow_with_length_or_number_of_clips(tmp_path):
    "Filled and read through: ten times the frames are 92 MB, well above a tenth of the process: holding them would be seen."
    check_peak_is_flat(tmp_path, write, PEAK, (240, 320))
