"""Frames out of files: exact, the same from both readers, and one error that names the file when they cannot be had."""
import csv
import itertools
import os
import struct
import subprocess
import sys
import time
from collections import Counter

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fvlm.core import ConfigError, InputError, VideoError
from fvlm.data.video import VIDEO_SUFFIXES, decode, frame_indices, probe, read_clip
from tests.hostile_videos import write_sound

BACKENDS = ("auto", "decord", "pyav")


def film(count=24, height=48, width=64):
    rng = np.random.default_rng(7)
    ground = np.add.outer(np.arange(height), np.arange(width))
    frames = np.stack([np.stack([(ground * 2 + 9 * t) % 256, (ground + 5 * t) % 256, np.full_like(ground, 10 * t % 256)], -1) for t in range(count)])
    frames[:, :8, :8] = rng.integers(0, 256, (count, 8, 8, 3))
    return torch.from_numpy(frames.astype(np.uint8))


def write(path, frames, codec="ffv1", pixel_format="bgr0", rate=25, times=None, audio=False, **options):
    from fractions import Fraction

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options={k: str(v) for k, v in options.items()})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixel_format
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for k, array in enumerate(frames.numpy()):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[k], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    "One film in many files."
    folder, frames = tmp_path_factory.mktemp("films"), film()
    h264 = dict(codec="libx264", pixel_format="yuv420p", g=8, bf=2)
    made = {
        "lossless": write(folder / "lossless.mkv", frames),
        "odd": write(folder / "odd.mkv", frames[:, :47, :63]),
        "h264_mp4": write(folder / "h264.mp4", frames, **h264),
        "h264_mkv": write(folder / "h264.mkv", frames, **h264),
        "h264_avi": write(folder / "h264.avi", frames, **h264),
        "mpeg4_mp4": write(folder / "mpeg4.mp4", frames, "mpeg4", "yuv420p"),
        "mpeg4_mkv": write(folder / "mpeg4.mkv", frames, "mpeg4", "yuv420p"),
        "mpeg4_avi": write(folder / "mpeg4.avi", frames, "mpeg4", "yuv420p"),
        "one": write(folder / "one.mp4", frames[:1], **h264),
        "speck": write(folder / "speck.mkv", frames[:, :1, :1]),
        "fine_time": write(folder / "variable.mkv", frames, times=list(itertools.accumulate([0] + [40] * 11 + [100] * 12))),
    }
    return frames, made


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["lossless", "odd"])
def test_a_lossless_film_comes_back_bit_for_bit(films, name, backend):
    frames, made = films
    clip = decode(made[name], backend=backend)
    want = frames if name == "lossless" else frames[:, :47, :63]
    assert torch.equal(clip.frames, want) and clip.frames.dtype == torch.uint8 and clip.frames.is_contiguous()
    assert clip.indices.tolist() == list(range(24)) and np.allclose(clip.timestamps, np.arange(24) / 25, atol=2e-3)
    assert clip.backend == ("decord" if backend == "auto" else backend) and clip.notes == ()


@pytest.mark.parametrize("name", ["lossless", "odd", "h264_mp4", "h264_mkv", "mpeg4_mp4", "mpeg4_mkv", "mpeg4_avi", "fine_time", "one"])
def test_both_readers_agree_on_everything(films, name):
    _, made = films
    n = probe(made[name]).frames
    for request in ({}, {"indices": [n - 1, 0, n // 2, 0]}, {"stride": 5}, {"size": 32}, {"size": (20, 30), "indices": [0]}):
        a, b = (decode(made[name], backend=backend, **request) for backend in ("decord", "pyav"))
        assert torch.equal(a.frames, b.frames) and np.array_equal(a.indices, b.indices) and np.allclose(a.timestamps, b.timestamps, atol=1e-4), (name, request)


@given(st.lists(st.integers(0, 23), min_size=1, max_size=6), st.sampled_from(["lossless", "h264_mp4", "h264_mkv", "mpeg4_avi", "h264_avi"]), st.sampled_from(["auto", "pyav"]))
def test_any_indices_in_any_order_are_those_frames(films, indices, name, backend):
    _, made = films
    whole = whole_film(made[name])
    clip = decode(made[name], indices, backend=backend)
    assert torch.equal(clip.frames, whole[indices]) and clip.indices.tolist() == indices


WHOLE = {}


def whole_film(path):
    "Every frame as PyAV's decoder puts them out: the plainest loop there is."
    if path not in WHOLE:
        with av.open(str(path)) as container:
            WHOLE[path] = torch.from_numpy(np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]))
    return WHOLE[path]


def test_a_container_without_times_is_counted_by_pyav_and_says_so(films):
    _, made = films
    clip = decode(made["h264_avi"], [20, 3])
    assert clip.backend == "pyav" and "timestamps" in clip.notes[0] and torch.equal(clip.frames, whole_film(made["h264_avi"])[[20, 3]])
    assert np.allclose(clip.timestamps, [0.8, 0.12]) and probe(made["h264_avi"]).backend == "pyav"
    with pytest.raises(VideoError, match="timestamps"):
        read_clip(made["h264_avi"], [20], backend="decord")


def test_decord_fails_and_pyav_takes_over_only_when_asked(films):
    _, made = films
    clip = decode(made["speck"])
    assert clip.backend == "pyav" and "decord" in clip.notes[0] and torch.equal(clip.frames, film()[:, :1, :1])
    with pytest.raises(VideoError, match="decord"):
        decode(made["speck"], backend="decord")


def test_a_reader_that_cannot_be_imported(films, monkeypatch):
    frames, made = films
    monkeypatch.setitem(sys.modules, "decord", None)
    clip = decode(made["lossless"], [2], isolated=False)
    assert clip.backend == "pyav" and "cannot be imported" in clip.notes[0] and torch.equal(clip.frames, frames[[2]])


def test_repeated_frames_get_a_second_opinion(tmp_path):
    frames = film()
    frames[10] = frames[9]
    clip = decode(write(tmp_path / "still.mkv", frames))
    assert clip.backend == "pyav" and torch.equal(clip.frames, frames) and "frames 9 and 10 equal" in clip.notes[0]
    named = decode(tmp_path / "still.mkv", backend="decord")
    assert named.backend == "decord" and "frames 9 and 10 equal" in named.notes[0]


@pytest.mark.parametrize("seed", range(6))
def test_bits_flipped_in_a_film_never_give_an_unreported_repeat(tmp_path, seed):
    rng = np.random.default_rng(seed)
    codec, pixel_format, suffix = [("ffv1", "bgr0", "mkv"), ("mpeg4", "yuv420p", "mp4"), ("libx264", "yuv420p", "mkv")][seed % 3]
    data = bytearray(write(tmp_path / f"whole.{suffix}", film(), codec, pixel_format).read_bytes())
    for k in rng.integers(len(data) // 4, len(data) * 3 // 4, 12):
        data[k] ^= int(rng.integers(1, 256))
    path = tmp_path / f"flipped.{suffix}"
    path.write_bytes(data)
    try:
        clip = decode(path)
    except VideoError as error:
        assert path.name in str(error)
    else:
        assert clip.notes or not [k for k in range(len(clip.frames) - 1) if torch.equal(clip.frames[k], clip.frames[k + 1])]


def test_variable_rate(films):
    _, made = films
    info, clip = probe(made["fine_time"]), decode(made["fine_time"])
    assert np.allclose(np.diff(clip.timestamps), [0.04] * 11 + [0.1] * 12, atol=2e-3)
    assert info.fps == pytest.approx(23 / 1.64, rel=0.01)
    picked = decode(made["fine_time"], fps=10)
    ticks = np.arange(len(picked.indices)) / 10
    best = np.abs(clip.timestamps[None] - ticks[:, None]).min(1)
    assert np.allclose(np.abs(picked.timestamps - ticks), best, atol=2e-3) and len(ticks) == 17


@pytest.mark.parametrize("turn, rotated", [((0, 1, -1, 0), 3), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)])
def test_a_film_taken_sideways_is_shown_upright(films, tmp_path, turn, rotated):
    _, made = films
    data = bytearray(made["h264_mp4"].read_bytes())
    at = data.find(b"tkhd") + 44  # past type, version, times, number, duration, layer and volume: the display matrix
    a, b, c, d = (65536 * n for n in turn)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path = tmp_path / "phone.mp4"
    path.write_bytes(data)
    clip, info = decode(path, [0, 5]), probe(path)
    assert torch.equal(clip.frames, torch.rot90(whole_film(made["h264_mp4"])[[0, 5]], rotated, (1, 2)))
    assert (info.height, info.width) == tuple(clip.frames.shape[1:3])


def test_probe_says_what_is_there(films):
    _, made = films
    info = probe(made["h264_mp4"])
    assert (info.frames, info.width, info.height, info.codec, info.backend) == (24, 64, 48, "h264", "pyav") and probe(made["lossless"]).backend == "decord"
    assert info.fps == pytest.approx(25, rel=1e-3) and info.duration == pytest.approx(24 / 25, rel=1e-3) and info.path == str(made["h264_mp4"])
    assert probe(made["one"]).frames == 1


@pytest.mark.parametrize("request_, says", [
    (dict(indices=[]), "indices"), (dict(indices=[-1]), "indices"), (dict(indices=[0.5]), "indices"), (dict(indices="01"), "indices"), (dict(indices=3), "indices"),
    (dict(indices=[True]), "indices"), (dict(indices=[[0, 1]]), "indices"), (dict(stride=0), "stride"), (dict(stride=1.5), "stride"), (dict(fps=0), "fps"), (dict(fps=float("nan")), "fps"),
    (dict(fps=5, stride=2), "fps and stride"), (dict(indices=[0], fps=5), "indices and fps"), (dict(indices=[0], stride=5), "indices and stride"),
    (dict(size=0), "size"), (dict(size=(1, 2, 3)), "size"), (dict(size="big"), "size"), (dict(size=1.5), "size"), (dict(backend="opencv"), "backend"), (dict(fps=50), "fps"),
])
def test_a_wrong_argument_is_named(films, request_, says):
    with pytest.raises(InputError, match=says) as caught:
        read_clip(films[1]["lossless"], **request_)
    assert not isinstance(caught.value, VideoError) and "\n" not in str(caught.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_past_the_end_is_an_error_that_names_the_file(films, backend):
    for name in ("lossless", "h264_mp4") + (("h264_avi",) if backend != "decord" else ()):
        with pytest.raises(VideoError, match="frame 24 was asked for, but there are 24 frames") as caught:
            read_clip(films[1][name], [0, 24], backend=backend)
        assert caught.value.path == str(films[1][name])


def bad_files(folder):
    frames = film()
    (folder / "empty.mp4").touch()
    (folder / "letter.mp4").write_text("Dear reader, " * 100)
    (folder / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.mp4\n")
    (folder / "concat.mp4").write_text("ffconcat version 1.0\nfile '/etc/passwd'\n")
    (folder / "zeros.mp4").write_bytes(bytes(5000))
    (folder / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    for kind in ("PNG", "JPEG", "BMP", "TIFF", "WEBP"):
        Image.fromarray(frames[0].numpy()).save(folder / f"{kind}.mp4", format=kind)
    write_sound(folder / "sound.mp4")
    whole = write(folder.parent / f"{folder.name}.mp4", frames, "libx264", "yuv420p").read_bytes()
    (folder / "torn.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "folder.mp4").mkdir()
    (folder / "dangling.mp4").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe.mp4")
    return [*sorted(folder.iterdir()), folder / "missing.mp4"]


def test_what_is_not_a_video_is_one_error_in_a_moment(tmp_path):
    (tmp_path / "bad").mkdir()
    for path in bad_files(tmp_path / "bad"):
        for ask in (probe, read_clip, lambda p: read_clip(p, [0], backend="decord"), lambda p: read_clip(p, [0], backend="pyav")):
            began = time.perf_counter()
            with pytest.raises(VideoError) as caught:
                ask(path)
            message = str(caught.value)
            assert not path.stem.isupper() or f"a {path.stem.replace('WEBP', 'WebP')} picture" in message
            assert time.perf_counter() - began < 5 and path.name in message and "\n" not in message and len(message) > len(str(path)) + 8 and "0x" not in message


@pytest.mark.parametrize("cut", [0.3, 0.6, 0.9])
def test_a_torn_film_gives_true_frames_or_one_error(films, tmp_path, cut):
    for name in ("lossless", "h264_mkv", "mpeg4_avi"):
        data = films[1][name].read_bytes()
        path = tmp_path / f"torn{films[1][name].suffix}"
        path.write_bytes(data[: int(len(data) * cut)])
        whole = whole_film(films[1][name])
        try:
            n = probe(path).frames
            clip = decode(path, list(range(0, max(n - 2, 1), 3)))
        except VideoError as error:
            assert path.name in str(error)
        else:
            assert torch.equal(clip.frames, whole[clip.indices]) or clip.notes


def test_unicode_spaces_and_names_like_options(films, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("läufer 走る 🎬.mkv", "-i.mkv", "concat:a|b.mkv", "file:x.mkv", "a%03d.mkv"):
        (tmp_path / name).write_bytes(films[1]["lossless"].read_bytes())
        for backend in BACKENDS:
            assert torch.equal(read_clip(name, [1, 2], backend=backend), films[0][1:3])
    with pytest.raises(InputError, match="path"):
        read_clip(3)


def test_a_link_is_followed_and_no_permission_is_said(films, tmp_path):
    (tmp_path / "link.mkv").symlink_to(films[1]["lossless"])
    assert torch.equal(read_clip(tmp_path / "link.mkv", [0]), films[0][:1])
    if os.geteuid():
        (tmp_path / "locked.mkv").write_bytes(films[1]["lossless"].read_bytes())
        (tmp_path / "locked.mkv").chmod(0)
        with pytest.raises(VideoError, match="cannot be read"):
            read_clip(tmp_path / "locked.mkv")


def test_no_reader_is_kept(films):
    handles = lambda: len(os.listdir("/proc/self/fd"))  # noqa: E731
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("no /proc")
    for name in ("lossless", "h264_avi", "speck"):
        read_clip(films[1][name], [0])
        before = handles()
        for _ in range(5):
            read_clip(films[1][name], [3])
            with pytest.raises(VideoError):
                read_clip(films[1][name], [99])
        assert handles() <= before


def test_importing_brings_no_decoder():
    code = "import sys, fvlm.data.video; print([m for m in ('decord', 'av', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@given(st.integers(1, 300), st.floats(1, 60), st.floats(0.5, 60))
def test_frame_indices_are_ascending_nearest_and_inside(num_frames, native, wanted):
    if wanted > native * (1.01 if num_frames > 1 else 1e9):
        with pytest.raises(ConfigError):
            frame_indices(num_frames, native, fps=wanted)
        return
    found = frame_indices(num_frames, native, fps=wanted)
    assert found.dtype == np.int64 and found[0] == 0 and found.min() >= 0 and found.max() < num_frames and (np.diff(found) >= 0).all()
    ticks = np.arange(len(found)) / wanted
    assert (np.abs(found / native - ticks) <= 0.52 / native).all() and (num_frames - 1) / native - ticks[-1] < 1 / wanted + 1e-6


def test_frame_indices_at_the_native_rate_are_all():
    for rate in (23.976, 25.0, 29.97):
        assert frame_indices(500, rate, fps=rate).tolist() == list(range(500))
    assert frame_indices(7, 25.0).tolist() == list(range(7)) and frame_indices(7, None, stride=3).tolist() == [0, 3, 6]


@pytest.mark.parametrize("turn, rotated", [((0, 1, -1, 0), 3), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)])
def test_both_readers_turn_a_sideways_film(tmp_path, turn, rotated):
    upright = write(tmp_path / "upright.mp4", film(24, 84, 112), "libx264", "yuv420p", g=8, bf=2)
    data = bytearray(upright.read_bytes())
    at = data.find(b"tkhd") + 44
    a, b, c, d = (65536 * n for n in turn)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "phone.mp4").write_bytes(data)
    by_decord, by_pyav = (read_clip(tmp_path / "phone.mp4", [0, 5, 23], backend=backend) for backend in ("decord", "pyav"))
    assert torch.equal(by_decord, by_pyav) and torch.equal(by_pyav, torch.rot90(whole_film(upright)[[0, 5, 23]], rotated, (1, 2)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_past_the_end_by_name(films, backend):
    for name in ("lossless", "h264_mp4"):
        whole = whole_film(films[1][name])
        for pad, want in (("repeat", [22, 23, 23, 23]), ("loop", [22, 23, 0, 7])):
            clip = decode(films[1][name], [22, 23, 24, 31], pad=pad, backend=backend)
            assert clip.indices.tolist() == want and torch.equal(clip.frames, whole[want]) and any(f"pad={pad!r}" in note for note in clip.notes)
        assert decode(films[1][name], [22, 23], pad="loop", backend=backend).notes == ()


def test_more_than_memory_holds_is_refused_before_it_is_filled(films, monkeypatch):
    monkeypatch.setattr("fvlm.data.video._free_bytes", lambda: 2.0**20)
    with pytest.raises(VideoError, match="need .* GB of memory"):
        decode(films[1]["lossless"], list(range(24)) * 12, size=600)
    assert len(decode(films[1]["lossless"], [0]).frames) == 1  # what is small is not even weighed


@pytest.mark.clips
def test_every_shared_clip_is_what_a_plain_pass_shows(shared_clips):
    """Sampled frames of every clip: those of PyAV's own loop at the same places, whichever reader gave them.

    A place is the rank of a frame's time; in a container without usable times, its number in the order of output.
    """
    videos = shared_clips / "videos"
    paths = sorted(path for path in videos.rglob("*") if path.suffix in VIDEO_SUFFIXES)
    if not paths:
        pytest.skip("no videos in the folder of real clips")
    readers, told = Counter(), {}
    for path in paths:
        info = probe(path)
        few = sorted({0, 1, min(info.frames // 2, 60), min(info.frames - 1, 90)})  # not far in: the plain pass decodes up to there
        clip = decode(path, few)
        readers[clip.backend] += 1
        told[path.relative_to(videos).as_posix()] = clip
        counts_output = any("no usable timestamps" in note for note in clip.notes)
        with av.open(str(path), metadata_errors="ignore") as container:
            times = [] if counts_output else sorted(p.pts for p in container.demux(container.streams.best("video")) if p.size and not p.is_discard)
        wanted = {(i if counts_output else times[i]): k for k, i in enumerate(few)}
        with av.open(str(path), metadata_errors="ignore") as container:
            stream = container.streams.best("video")  # some files hold several
            stream.thread_type = "AUTO"
            for number, frame in enumerate(container.decode(stream)):
                k = wanted.pop(number if counts_output else frame.pts, None)
                if k is not None:
                    assert torch.equal(clip.frames[k], torch.from_numpy(frame.to_ndarray(format="rgb24"))), (path, few[k])
                if not wanted:
                    break
        assert not wanted, (path, wanted)
        if info.codec == "h264" and not clip.notes and readers["decord"] < 10 and min(info.height, info.width) > 32:  # decord would have said the same
            assert torch.equal(decode(path, few, backend="decord").frames, clip.frames), path
            readers["decord"] += 1
    assert readers["decord"] and readers["pyav"]
    for name in (name for name in told if name.startswith("openstl/")):  # 32 x 32: more than decord can take
        with pytest.raises(VideoError, match="decord"):
            decode(videos / name, [0], backend="decord")
        assert told[name].backend == "pyav"
    if "opencv/box.mp4" in told:  # its frames leave the decoder in another order than their times
        assert told["opencv/box.mp4"].backend == "pyav" and "another order" in told["opencv/box.mp4"].notes[0]


@pytest.mark.clips
def test_sizes_and_counts_are_those_of_the_manifest(shared_clips):
    videos = shared_clips / "videos"
    with open(videos / "MANIFEST.tsv", encoding="utf-8") as file:
        rows = {row["file"]: row for row in csv.DictReader(file, delimiter="\t")}
    sample = [name for start in ("kth/", "ucf101/", "kinetics400/", "hmdb51/", "msvd/", "openstl/") for name in sorted((n for n in rows if n.startswith(start)), key=lambda n: int(rows[n]["bytes"]))[:1]]
    if not sample:
        pytest.skip("none of the expected data sets in MANIFEST.tsv")
    for name in sample:
        info = probe(videos / name)
        assert info.frames == int(rows[name]["frames"]) and (info.width, info.height) == (int(rows[name]["w"]), int(rows[name]["h"]))


def test_the_sample_clips(sample_clips):
    for path in sample_clips.values():
        a, b = (decode(path, [0, 40, 41, 100], size=64, backend=backend) for backend in ("decord", "pyav"))
        assert torch.equal(a.frames, b.frames) and a.notes == b.notes == ()
