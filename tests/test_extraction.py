"""Extraction: idempotent, resumable, broken files set aside, memory flat in length and in number of clips."""
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fvlm.core import ConfigError, InputError, VideoError
from fvlm.data.clips import VideoFolder
from fvlm.data.embedding_cache import EmbeddingCache, clip_key
from fvlm.data.video import read_clip
from fvlm.encoders.embeddings import FrameEmbedder
from fvlm.encoders.extraction import embed_clip, embed_folder
from tests.peak_memory import check_peak_is_flat


def write_video(path, frames, size=(32, 64), seed=0):
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 120, size=(*size, 3))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25, width=size[1], height=size[0], pix_fmt="yuv420p")
        for t in range(frames):
            picture = (np.roll(noise, t, 1) + 2 * (t % 60)).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode())
    return path


class Counting(torch.nn.Module):
    "A tiny embedder that counts the frames it is given and may refuse to go on."

    def __init__(self, stop_after=None):
        super().__init__()
        self.inner, self.seen, self.stop_after = FrameEmbedder.tiny(), 0, stop_after
        self.fingerprint, self.embed_dim, self.largest = self.inner.fingerprint, self.inner.embed_dim, 0

    def forward(self, video):
        self.seen, self.largest = self.seen + len(video), max(self.largest, len(video))
        if self.stop_after is not None and self.seen > self.stop_after:
            raise KeyboardInterrupt
        return self.inner(video)


def smallest_blocks(monkeypatch):
    "As few frames decoded at a time as can be, wherever the blocks are cut."
    monkeypatch.setattr("fvlm.data.clip_cache.DECODE_BYTES", 1)
    monkeypatch.setattr("fvlm.data.embedding_cache.DECODE_BYTES", 1, raising=False)


@pytest.fixture
def folder(tmp_path):
    write_video(tmp_path / "videos" / "a.mp4", 40, seed=1)
    write_video(tmp_path / "videos" / "sub" / "b.mp4", 30, seed=2)
    write_video(tmp_path / "videos" / "sub" / "ü c.avi", 25, seed=3)
    return tmp_path / "videos"


@pytest.fixture
def cache(tmp_path):
    return EmbeddingCache(tmp_path / "cache")


@pytest.mark.parametrize("stride, flip, batch", [(1, False, 32), (1, False, 7), (3, False, 4), (4, True, 32)])
def test_rows_are_the_embeddings_of_the_decoded_frames(folder, cache, stride, flip, batch):
    embedder = FrameEmbedder.tiny()
    rows = embed_clip(folder / "a.mp4", embedder, cache, stride=stride, flip=flip, batch_frames=batch)
    video = read_clip(folder / "a.mp4", stride=stride)
    expected = embedder(video.flip(2) if flip else video)[0]
    torch.testing.assert_close(torch.from_numpy(rows.astype(np.float32)), expected, atol=2e-3, rtol=2e-3)


def test_blocks_join_without_a_seam(folder, cache, monkeypatch):
    smallest_blocks(monkeypatch)  # of 32 frames: the clip of 40 takes two
    rows = embed_clip(folder / "a.mp4", FrameEmbedder.tiny(), cache)
    expected = FrameEmbedder.tiny()(read_clip(folder / "a.mp4"))[0]
    torch.testing.assert_close(torch.from_numpy(rows.astype(np.float32)), expected, atol=2e-3, rtol=2e-3)


def test_a_second_run_embeds_nothing_and_a_new_clip_only_itself(folder, cache):
    embedder = Counting()
    first = embed_folder(folder, embedder, cache, progress=False)
    assert first.done == ("a.mp4", "sub/b.mp4", "sub/ü c.avi") and first.frames == embedder.seen == 95 and first.cached == () and first.bad == ()
    assert first.bytes == 95 * 32 * 2 and "3 clips embedded" in first.note
    second = embed_folder(folder, embedder, EmbeddingCache(cache.dir), progress=False)
    assert second.done == () and second.cached == first.done and second.frames == 0 and embedder.seen == 95
    write_video(folder / "new.mp4", 10, seed=4)
    assert embed_folder(folder, embedder, cache, progress=False).done == ("new.mp4",) and embedder.seen == 105
    assert {name: rows.shape for name, rows in second.rows(cache).items()} == {"a.mp4": (40, 32), "sub/b.mp4": (30, 32), "sub/ü c.avi": (25, 32)}


def test_another_encoder_stride_or_flip_has_rows_of_its_own(folder, cache):
    embed_folder(folder, FrameEmbedder.tiny(), cache, progress=False)
    for options in (dict(embedder=FrameEmbedder.tiny(seed=1)), dict(stride=2), dict(flip=True)):
        report = embed_folder(folder, **(dict(embedder=FrameEmbedder.tiny(), cache=cache, progress=False) | options))
        assert len(report.done) == 3, options


def test_shards_share_a_folder_and_leave_nothing_out(folder, cache):
    parts = [embed_folder(folder, FrameEmbedder.tiny(), cache, shard=(k, 3), progress=False) for k in range(3)]
    names = [name for part in parts for name in part.done]
    whole = embed_folder(folder, FrameEmbedder.tiny(), cache, progress=False)
    assert len(names) == len(set(names)) and set(whole.keys) == {n for part in parts for n in part.keys} and not whole.done
    assert sorted(name for part in parts for name, _ in part.bad) == sorted(name for name, _ in whole.bad)
    for wrong in ((3, 3), (-1, 2), (0, 0)):
        with pytest.raises(ConfigError, match="shard"):
            embed_folder(folder, FrameEmbedder.tiny(), cache, shard=wrong, progress=False)


def test_an_interrupted_run_goes_on_where_it_was(folder, cache):
    with pytest.raises(KeyboardInterrupt):
        embed_folder(folder, Counting(stop_after=50), cache, progress=False)
    assert len(cache.entries()) == 1
    embedder = Counting()
    report = embed_folder(folder, embedder, cache, progress=False)
    assert report.cached == ("a.mp4",) and embedder.seen == 55


def test_broken_files_are_set_aside_and_the_run_goes_on(folder, cache):
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("not a video\n" * 50)
    (folder / "gone.mp4").symlink_to(folder / "nowhere.mp4")
    whole = (folder / "a.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    report = embed_folder(folder, FrameEmbedder.tiny(), cache, progress=False)
    assert len(report.done) == 3 and {name for name, _ in report.bad} == {"empty.mp4", "text.mp4", "gone.mp4", "cut.mp4"}
    assert all(reason for _, reason in report.bad) and "bad: cut.mp4" in str(report)
    listed = [json.loads(line) for line in (cache.dir / "bad_files.jsonl").read_text().splitlines()]
    assert {entry["path"] for entry in listed} == {str(folder / name) for name, _ in report.bad}
    write_video(folder / "cut.mp4", 12, seed=9)
    again = embed_folder(folder, FrameEmbedder.tiny(), cache, progress=False)
    listed = [json.loads(line) for line in (cache.dir / "bad_files.jsonl").read_text().splitlines()]
    assert again.done == ("cut.mp4",) and len(listed) == 3


def test_a_clip_that_fails_half_way_leaves_no_rows(folder, cache, monkeypatch):
    import fvlm.data.video

    real, calls = fvlm.data.video.decode, []

    def failing(path, indices, **rest):
        calls.append(len(indices))
        if len(calls) == 2:
            raise VideoError(path, "a frame in the middle cannot be decoded")
        return real(path, indices, **rest)

    smallest_blocks(monkeypatch)
    monkeypatch.setattr("fvlm.data.video.decode", failing)
    monkeypatch.setattr("fvlm.data.clip_cache.decode", failing)
    report = embed_folder(folder, FrameEmbedder.tiny(), cache, progress=False)
    assert report.bad == (("a.mp4", "a frame in the middle cannot be decoded"),) and len(report.done) == 2
    assert cache.get(clip_key(folder / "a.mp4"), FrameEmbedder.tiny().fingerprint) is None


def test_a_video_folder_is_taken_with_its_names_and_its_bad_files(folder, cache):
    (folder / "text.mp4").write_text("not a video\n" * 50)
    videos = VideoFolder(folder, context_frames=2, gap=2)
    report = embed_folder(videos, FrameEmbedder.tiny(), cache, progress=False)
    assert set(report.keys) == {entry.name for entry in videos.clips} and [name for name, _ in report.bad] == ["text.mp4"]


def items_of(folder, names, **facts):
    return [SimpleNamespace(**{"name": f"clip {k}", "path": folder / name, "label": "walk", "group": None, "split": None, "caption": None, "ranges": None, **facts}) for k, name in enumerate(names)]


def test_items_of_a_data_set_are_taken_by_their_own_names(folder, cache):
    (folder / "broken.mp4").write_bytes(bytes(3000))
    items = items_of(folder, ["a.mp4", "sub/b.mp4", "broken.mp4", "sub/ü c.avi"])
    items[3].ranges = [(0, 4)]
    videos = VideoFolder.from_items(items, context_frames=2, gap=2)
    report = embed_folder(videos, FrameEmbedder.tiny(), cache, progress=False)
    assert report.done == ("clip 0", "clip 1") and [name for name, _ in report.bad] == ["broken.mp4"]
    assert report.skipped == (("clip 3", "25 frames, but no range of them holds a window of 5 in a row"),)
    assert {name: rows.shape for name, rows in report.rows(cache).items()} == {"clip 0": (40, 32), "clip 1": (30, 32)}


def test_two_segments_of_one_film_are_embedded_once(folder, cache):
    items = items_of(folder, ["a.mp4", "a.mp4"])
    items[0].ranges, items[1].ranges = [(0, 20)], [(20, 40)]
    embedder = Counting()
    report = embed_folder(VideoFolder.from_items(items, context_frames=2, gap=2), embedder, cache, progress=False)
    assert report.done == ("clip 0",) and report.cached == ("clip 1",) and embedder.seen == 40 and report.keys["clip 0"] == report.keys["clip 1"]


def test_damaged_rows_are_embedded_again_with_a_note(folder, cache):
    report = embed_folder(folder, FrameEmbedder.tiny(), cache, progress=False)
    victim = max(cache.dir.glob("*/*.npy"), key=lambda path: path.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-100])
    fresh = EmbeddingCache(cache.dir)
    with pytest.warns(UserWarning, match="embedded again"):
        again = embed_folder(folder, FrameEmbedder.tiny(), fresh, progress=False)
    assert again.done == ("a.mp4",) and len(again.notes) == 1 and "embedded again" in again.notes[0]
    assert report.rows(fresh)["a.mp4"].shape == (40, 32)


@pytest.mark.parametrize("call, what", [
    (lambda folder, cache: embed_folder(folder / "nowhere", FrameEmbedder.tiny(), cache), "nowhere"),
    (lambda folder, cache: embed_folder(folder / "a.mp4", FrameEmbedder.tiny(), cache), "a.mp4"),
    (lambda folder, cache: embed_folder(folder.parent / "empty", FrameEmbedder.tiny(), cache), "no video files"),
    (lambda folder, cache: embed_folder(folder, FrameEmbedder.tiny(), cache, stride=0), "stride"),
    (lambda folder, cache: embed_folder(folder, FrameEmbedder.tiny(), cache, batch_frames=0), "batch_frames"),
    (lambda folder, cache: embed_clip(folder / "nowhere.mp4", FrameEmbedder.tiny(), cache), "nowhere.mp4"),
])
def test_bad_input_is_one_clear_error(folder, cache, call, what):
    (folder.parent / "empty").mkdir()
    with pytest.raises(InputError, match=what):
        call(folder, cache)


def test_a_lost_row_file_is_an_error_not_a_gap(folder, cache):
    report = embed_folder(folder, FrameEmbedder.tiny(), cache, progress=False)
    for path in cache.dir.glob("*/*"):
        path.unlink()
    with pytest.raises(InputError, match="no longer holds 3 of 3 clips"):
        report.rows(EmbeddingCache(cache.dir))


KINDS = [("mp4", "mpeg4", "yuv420p"), ("avi", "mpeg4", "yuv420p"), ("mkv", "libx264", "yuv420p"), ("mov", "mjpeg", "yuvj420p"), ("webm", "libvpx", "yuv420p"),
         ("mpg", "mpeg2video", "yuv420p"), ("mkv", "ffv1", "gray"), ("mp4", "libx264", "yuv444p")]


def write_kind(path, suffix, codec, pixels, frames, seed):
    "A film of one of the kinds that people have on their disks; None where this build of the library cannot write it."
    import av

    path = path.with_suffix(f".{suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 120, size=(32, 48, 3))
    try:
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=25, width=48, height=32, pix_fmt=pixels)
            for t in range(frames):
                picture = np.ascontiguousarray((np.roll(noise, t, 1) + 2 * t).astype(np.uint8))
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    except (av.error.FFmpegError, ValueError, RuntimeError):
        return write_video(path.with_suffix(".mp4"), frames, seed=seed)
    return path


@pytest.fixture
def own_folder(tmp_path):
    "Twenty videos of mixed kinds in nested folders with spaces; five of them broken, one a glimpse; and things that are no videos."
    root, good = tmp_path / "my films", {}
    for k in range(14):
        path = write_kind(root / f"summer {k % 3}" / f"day {k % 2}" / f"film {k:02d}", *KINDS[k % len(KINDS)], frames=12 + k, seed=k)
        good[path.relative_to(root).as_posix()] = 12 + k
    write_video(root / "glimpse.mp4", 4, seed=99)
    whole = (root / next(iter(good))).read_bytes()
    broken = {"empty.mp4": b"", "cut in half.mp4": whole[: len(whole) // 2], "a letter.avi": b"Dear all, this is no film.\n" * 9, "zeros.mkv": bytes(5000), "a picture.mov": b"\x89PNG\r\n\x1a\n" + bytes(99)}
    for name, content in broken.items():
        (root / "summer 1" / name).write_bytes(content)
    (root / "notes.txt").write_text("not looked at")
    (root / "summer 2" / "IMG 1.jpg").write_bytes(b"\xff\xd8\xff")
    (root / "summer 2" / "IMG 2.JPG").write_bytes(b"\xff\xd8\xff")
    return root, good, {f"summer 1/{name}" for name in broken}


def test_a_users_own_folder(own_folder, cache):
    root, good, broken = own_folder
    report = embed_folder(root, FrameEmbedder.tiny(), cache, progress=False)
    assert set(report.done) == {*good, "glimpse.mp4"} and {name for name, _ in report.bad} == broken and len(good) + 1 + len(broken) == 20
    assert {name: len(rows) for name, rows in report.rows(cache).items()} == {**good, "glimpse.mp4": 4}
    text = str(report)
    assert text.startswith("15 clips embedded") and "5 bad, 2 skipped" in text and "a letter.avi: a text file, not a video" in text
    assert report.skipped == (("2 files (.jpg)", "not a video by its name"), ("1 file (.txt)", "not a video by its name"))
    assert len((cache.dir / "bad_files.jsonl").read_text().splitlines()) == 5


def test_a_users_own_folder_through_windows(own_folder, cache):
    root, good, broken = own_folder
    videos = VideoFolder(root, context_frames=3, gap=2, bad_files=cache.dir / "bad_files.jsonl")
    report = embed_folder(videos, FrameEmbedder.tiny(), cache, progress=False)
    assert set(report.done) == set(good) and {name for name, _ in report.bad} == broken
    assert report.skipped == (("glimpse.mp4", "4 frames, but no range of them holds a window of 7 in a row"),)
    listed = [json.loads(line)["path"] for line in (cache.dir / "bad_files.jsonl").read_text().splitlines()]
    assert sorted(listed) == sorted(str(root / name) for name in broken), "each is on the list once, whoever found it"


PEAK = """
    import resource, sys
    from types import SimpleNamespace
    from fvlm.data import clip_cache, embedding_cache
    from fvlm.data.clips import VideoFolder, find_videos
    from fvlm.encoders.embeddings import FrameEmbedder
    from fvlm.encoders.extraction import embed_folder
    embedding_cache.DECODE_BYTES = clip_cache.DECODE_BYTES = 1  # the smallest blocks, so that a short clip shows what a long one does
    cache, embedder = embedding_cache.EmbeddingCache(sys.argv[1]), FrameEmbedder.tiny()
    def items(folder):
        return [SimpleNamespace(name=name, path=path, label=None, group=None, split=None, caption=None, ranges=None) for name, path in find_videos(folder).items()]

    for folder in sys.argv[2:]:
        videos = VideoFolder.from_items(items(folder)) if folder.endswith("many") else folder
        report = embed_folder(videos, embedder, cache, progress=False)
        assert not report.bad, report
        print(report.frames, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    """


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak as Linux reports it")
def test_peak_memory_does_not_grow_with_length_or_number_of_clips(tmp_path):
    "Ten times the frames decode to 133 MB, well above a tenth of the process: holding them would be seen."
    check_peak_is_flat(tmp_path, write_video, PEAK, (288, 384))
