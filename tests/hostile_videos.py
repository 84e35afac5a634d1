"""Broken films by seed: small sources of many kinds, nine ways to break one, sixty files that are dirty in other ways, and a referee.

`python -m tests.hostile_videos FOLDER COUNT` writes them, to be looked at or fed to another reader.
"""
import gzip
import io
import json
import os
import struct
import subprocess
import sys
import threading
import wave
import zipfile
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np

# name -> (suffix, codec, pixel format, options, variable rate)
SOURCES = {
    "h264_mp4": ("mp4", "libx264", "yuv420p", {"g": "8", "bf": "2", "preset": "veryfast"}, False),
    "mpeg4_mp4": ("mp4", "mpeg4", "yuv420p", {"g": "8"}, False),
    "variable_mp4": ("mp4", "libx264", "yuv420p", {"g": "8", "preset": "veryfast"}, True),
    "av1_mp4": ("mp4", "libsvtav1", "yuv420p", {"g": "8", "preset": "12"}, False),
    "h264_mkv": ("mkv", "libx264", "yuv420p", {"g": "8", "bf": "2", "preset": "veryfast"}, False),
    "ffv1_mkv": ("mkv", "ffv1", "bgr0", {}, False),
    "variable_mkv": ("mkv", "mpeg4", "yuv420p", {"g": "8"}, True),
    "vp8_webm": ("webm", "libvpx", "yuv420p", {"g": "8", "deadline": "realtime", "cpu-used": "8"}, False),
    "vp9_webm": ("webm", "libvpx-vp9", "yuv420p", {"g": "8", "deadline": "realtime", "cpu-used": "8"}, False),
    "h264_mov": ("mov", "libx264", "yuv420p", {"g": "8", "preset": "veryfast"}, False),
    "mjpeg_mov": ("mov", "mjpeg", "yuvj420p", {}, False),
    "mpeg4_avi": ("avi", "mpeg4", "yuv420p", {"g": "8"}, False),
    "h264_avi": ("avi", "libx264", "yuv420p", {"g": "8", "bf": "2", "preset": "veryfast"}, False),
}


def write(path, frames, codec="libx264", pixel_format="yuv420p", options=None, variable=False, rate=25):
    "Write uint8 (T,H,W,3) frames as a video file."
    import av

    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:  # the same bytes on every run: no dates, no random names
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.codec_context.thread_count = 1
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixel_format
        if variable:
            stream.codec_context.time_base = Fraction(1, 1000)
        for t, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            if variable:
                frame.pts, frame.time_base = 40 * t + 60 * max(0, t - 10), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return Path(path)


def write_video(path, frames):
    "Write a uint8 (T,H,W,3) tensor as the plainest of films, in a folder that is made if need be; its path."
    path.parent.mkdir(parents=True, exist_ok=True)
    return write(path, frames.numpy(), codec="mpeg4")


def write_sound(path):
    "Write a file with sound and no picture."
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        for k in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 44100, k * 1024
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def film(seed, num_frames=24, size=64):
    "uint8 (T,H,W,3): a generated world that never stands still."
    from fvlm.data.worlds import PhotoPan

    return PhotoPan(num_clips=1, num_frames=num_frames, size=size, seed=seed)[0]["frames"].numpy()


def sources(folder) -> dict[str, bytes]:
    "The bytes of every source that this machine can encode, and `missing`: the names of the others."
    import av

    made = {}
    frames = film(0)
    for name, (suffix, codec, pixel_format, options, variable) in SOURCES.items():
        if codec in av.codecs_available:
            made[name] = write(Path(folder) / f"source_{name}.{suffix}", frames, codec, pixel_format, options, variable).read_bytes()
    return made


# --- nine ways to break a film ---------------------------------------------------------------------------------------

def truncate(data, rng):
    "Lose the end, the beginning, or a piece in between."
    a, b = sorted(rng.integers(1, len(data), 2).tolist())
    return [data[:b], data[a:], data[:a] + data[b:]][rng.integers(3)]


def flip_bits(data, rng):
    "One to forty bits anywhere."
    out = bytearray(data)
    for k in rng.integers(0, len(out), rng.integers(1, 41)):
        out[k] ^= 1 << int(rng.integers(8))
    return bytes(out)


def zero_run(data, rng):
    "Runs of zeros, as a disk leaves them."
    out = bytearray(data)
    for start in rng.integers(0, len(out), rng.integers(1, 4)):
        out[start : start + 512] = bytes(len(out[start : start + 512]))
    return bytes(out)


def swap_chunks(data, rng):
    "Two pieces change places."
    a, b, c, d = sorted(rng.integers(0, len(data), 4).tolist())
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def duplicate_chunk(data, rng):
    "A piece twice, as a broken download leaves it."
    a, b = sorted(rng.integers(0, len(data), 2).tolist())
    return data[:b] + data[a:b] + data[b:]


def fuzz_header(data, rng):
    "Bytes of the first and last two kilobytes, where sizes and counts are."
    out = bytearray(data)
    for _ in range(rng.integers(1, 13)):
        k = int(rng.integers(0, min(2048, len(out))))
        out[k if rng.integers(2) else len(out) - 1 - k] = int(rng.choice([0, 255, 127, 128, rng.integers(256)]))
    return bytes(out)


def insert_garbage(data, rng):
    "Noise pushed in between."
    a = int(rng.integers(0, len(data)))
    return data[:a] + rng.bytes(int(rng.integers(1, 3000))) + data[a:]


def fuzz_times(data, rng):
    "What holds times: tables of MP4 and MOV, block times of Matroska, headers and index of AVI."
    out = bytearray(data)
    marks = [k for mark in (b"stts", b"ctts", b"mdhd", b"elst", b"mvhd", b"idx1", b"strh", b"\xa3", b"\xe7") for k in _all(data, mark)]
    for k in rng.choice(marks, min(len(marks), int(rng.integers(1, 9))), replace=False) if marks else []:
        for _ in range(rng.integers(1, 5)):
            at = int(k) + int(rng.integers(2, 40))
            if at < len(out):
                out[at] = int(rng.integers(256))
    return bytes(out)


def _all(data, mark):
    at = data.find(mark)
    while at >= 0:
        yield at
        at = data.find(mark, at + 1)


def wrong_suffix(data, rng):
    "Another suffix than its own (`mutant` gives it), and a scratch now and then."
    return flip_bits(data, rng) if rng.integers(3) == 0 else data


MUTATORS = (truncate, flip_bits, zero_run, swap_chunks, duplicate_chunk, fuzz_header, insert_garbage, fuzz_times, wrong_suffix)


def mutant(folder, made: dict[str, bytes], number: int) -> Path:
    "Broken film `number`, the same on every run: sources and mutators in turn, the rest by its own generator."
    rng = np.random.default_rng([20, number])
    mutator = MUTATORS[number % len(MUTATORS)]
    name = list(made)[(number // len(MUTATORS)) % len(made)]
    suffix = SOURCES[name][0]
    if mutator is wrong_suffix:
        suffix = [s for s in ("mp4", "mkv", "webm", "mov", "avi", "ts", "flv", "y4m") if s != suffix][rng.integers(7)]
    path = Path(folder) / f"{number:04d}_{mutator.__name__}_{name}.{suffix}"
    path.write_bytes(mutator(made[name], rng))
    return path


# --- sixty dirty files -----------------------------------------------------------------------------------------------

def dirty_files(folder, made: dict[str, bytes]) -> dict[str, tuple[Path, str]]:
    'Name -> (path, what must come of it: "error", "frames" or "either").'
    import av
    from PIL import Image

    folder, found, frames, rng = Path(folder), {}, film(1), np.random.default_rng(21)
    mp4, mkv, avi = made["h264_mp4"], made["ffv1_mkv"], made["mpeg4_avi"]

    def add(name, data=None, expect="error"):
        path = folder / name
        if data is not None:
            path.write_bytes(data)
        found[name] = (path, expect)
        return path

    def box(kind, body, size=None):
        return struct.pack(">I", len(body) + 8 if size is None else size) + kind + body

    # nothing, and things that are no films
    add("empty.mp4", b"")
    add("one_byte.mp4", b"\0")
    add("newline.mkv", b"\n")
    add("zeros.mp4", bytes(5000))
    add("noise.mp4", rng.bytes(5000))
    add("noise.avi", b"RIFF" + rng.bytes(5000))
    add("letter.mp4", b"Dear reader, " * 100)
    add("page.mp4", b"<!DOCTYPE html><html><body><h1>404 Not Found</h1></body></html>")
    add("pointer.mp4", b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n")
    add("list.mp4", b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.mp4\n")
    add("concat.mp4", b"ffconcat version 1.0\nfile '/etc/passwd'\n")
    add("manifest.mp4", b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"></MPD>')
    add("subtitles.mkv", b"1\n00:00:01,000 --> 00:00:02,000\nHello\n")
    add("utf16.mp4", "Dear reader, ".encode("utf-16") * 50)
    for kind in ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF"):
        Image.fromarray(frames[0]).save(add(f"{kind}.mp4"), format=kind)
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        archive.writestr("film.mp4", mp4)
    add("zip.mp4", memory.getvalue())
    add("gzip.mp4", gzip.compress(mp4, mtime=0))
    add("document.mp4", b"%PDF-1.7\n" + rng.bytes(500))
    add("program.mp4", b"\x7fELF" + rng.bytes(500))
    memory = io.BytesIO()
    np.save(memory, frames)
    add("array.mp4", memory.getvalue())
    with wave.open(str(add("wave.avi")), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(16000))
    write_sound(add("sound_only.mp4"))
    # places that are no files
    add("folder.mp4").mkdir()
    add("dangling.mp4").symlink_to(folder / "nowhere")
    add("loop.mp4").symlink_to(folder / "loop.mp4")
    os.mkfifo(add("fifo.mp4"))
    add("missing.mp4")
    add("device.mp4").symlink_to("/dev/zero")
    # headers that promise what is not there
    add("only_ftyp.mp4", mp4[:32])
    add("no_moov.mp4", mp4.replace(b"moov", b"free"), "either")
    add("no_mdat.mp4", mp4[: mp4.find(b"mdat") - 4] + mp4[mp4.find(b"moov") - 4 :], "either")
    add("half.mp4", mp4[: len(mp4) // 2])
    add("half.mkv", mkv[: len(mkv) // 2], "either")
    add("half.avi", avi[: len(avi) // 2], "either")
    add("huge_box.mp4", box(b"ftyp", b"isom\0\0\2\0") + box(b"moov", rng.bytes(64), size=0x7FFFFFFF))
    add("endless_box.mp4", box(b"ftyp", b"isom\0\0\2\0") + b"\0\0\0\1mdat" + b"\xff" * 8 + bytes(64))
    nested = b""
    for _ in range(2000):
        nested = box(b"moov", nested)
    add("nested.mp4", box(b"ftyp", b"isom\0\0\2\0") + nested)
    at = mp4.find(b"stsz")
    add("many_sizes.mp4", mp4[: at + 12] + b"\x7f\xff\xff\xff" + mp4[at + 16 :], "either")
    at = mp4.find(b"stts")
    add("many_times.mp4", mp4[: at + 8] + b"\x0f\xff\xff\xff" + mp4[at + 12 :], "either")
    at = mp4.find(b"avc1")
    add("wide.mp4", mp4[: at + 28] + struct.pack(">HH", 65535, 65535) + mp4[at + 32 :], "either")
    add("other_codec.mp4", mp4.replace(b"avc1", b"mp4v"), "either")
    add("unknown_codec.mp4", mp4.replace(b"avc1", b"zzzz"))
    # films that are unusual, and right
    plain = {"options": {"preset": "veryfast"}}
    write(add("one_frame.mp4", expect="frames"), frames[:1], **plain)
    write(add("one_pixel.mkv", expect="frames"), frames[:, :1, :1], "ffv1", "bgr0")
    write(add("odd.mkv", expect="frames"), frames[:, :47, :63], "ffv1", "bgr0")
    write(add("grey.mkv", expect="frames"), frames, "ffv1", "gray")
    write(add("ten_bits.mp4", expect="frames"), frames, "libx264", "yuv420p10le", {"preset": "veryfast"})
    write(add("still.mp4", expect="frames"), np.repeat(frames[:1], 20, 0), **plain)
    write(add("black.mp4", expect="frames"), np.zeros_like(frames), **plain)
    write(add("wide_strip.mkv", expect="frames"), np.tile(frames[:4, :2], (1, 1, 40, 1)), "ffv1", "bgr0")
    write(add("läufer 走る 🎬.mp4", expect="frames"), frames, **plain)
    add("-i %03d [x] 'y'.mkv", mkv, "frames")
    add("link.mkv", expect="frames").symlink_to(folder / "odd.mkv")
    add("raw.y4m", b"YUV4MPEG2 W64 H64 F25:1 Ip A1:1 C420jpeg\n" + b"".join(b"FRAME\n" + rng.bytes(64 * 96) for _ in range(3)), "frames")
    add("padded.mkv", mkv + bytes(3000), "either")
    assert len(found) == 60, len(found)
    return found


# --- the referee: one plain PyAV pass, in a process that may die -----------------------------------------------------

class Referee:
    "What a plain loop over PyAV sees in a file; None where it fails, hangs or dies."

    def __init__(self, seconds=10.0):
        self.seconds, self.process = seconds, None

    def look(self, path) -> dict | None:
        "dict(times of packets, frames as [time, corrupt, crc]) or None."
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen([sys.executable, __file__, "--referee"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        timer = threading.Timer(self.seconds, self.process.kill)
        timer.start()
        try:
            self.process.stdin.write(json.dumps(str(path)) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline() or "null")
        except BrokenPipeError:
            return None
        finally:
            timer.cancel()

    def close(self):
        "End the process."
        if self.process is not None:
            self.process.kill()
            self.process.communicate()


def _referee():
    import av

    for line in sys.stdin:
        try:
            path = json.loads(line)
            with av.open(path, metadata_errors="ignore") as container:
                packets = [p.pts for p in container.demux(container.streams.best("video")) if p.size and not p.is_discard]
            seen = []
            with av.open(path, metadata_errors="ignore") as container:
                stream = container.streams.best("video")
                stream.thread_type = "NONE"
                for packet in container.demux(stream):
                    try:
                        decoded = packet.decode()
                    except av.error.FFmpegError:
                        continue
                    for frame in decoded:
                        pixels = frame.to_ndarray(format="rgb24")
                        if frame.rotation % 360:
                            pixels = np.ascontiguousarray(np.rot90(pixels, frame.rotation // 90))
                        seen.append([frame.pts, bool(frame.is_corrupt), zlib.crc32(pixels.tobytes())])
            answer = {"packets": packets, "frames": seen, "codec": stream.codec_context.name}
        except (av.error.FFmpegError, OSError, ValueError, AttributeError, OverflowError):
            answer = None
        print(json.dumps(answer), flush=True)


def unreported(clip, seen: dict | None) -> str | None:
    """What the referee saw in a clip without notes that the clip should have told; None if all is well.

    Damaged VP8 is a case of its own: what its decoder shows depends on what it decoded before, so that a seek and a walk from the start
    differ, and neither a flag nor a time betrays it. "vp8:" marks that.
    """
    if clip.notes or seen is None:
        return None
    times = sorted(seen["packets"], key=lambda t: (t is None, t or 0))
    if None in times or len(set(times)) != len(times):
        return "the times of the packets are no times"
    by_time = {}
    for pts, corrupt, crc in seen["frames"]:
        by_time.setdefault(pts, (corrupt, crc))
    for k, i in enumerate(clip.indices.tolist()):
        corrupt, crc = by_time.get(times[i], (None, None))
        if crc is None:
            return f"frame {i} was shown, and no decoder puts one out at its time"
        if corrupt:
            return f"frame {i} is marked corrupt"
        if zlib.crc32(clip.frames[k].contiguous().numpy().tobytes()) != crc:
            return f"{'vp8: ' if seen['codec'] == 'vp8' else ''}frame {i} differs from what a plain pass shows at its time"
    return None


if __name__ == "__main__":
    if sys.argv[1:] == ["--referee"]:
        _referee()
    else:
        target = Path(sys.argv[1])
        target.mkdir(parents=True, exist_ok=True)
        bytes_of = sources(target)
        print(len([mutant(target, bytes_of, n) for n in range(int(sys.argv[2]))]), "mutants,", len(dirty_files(target, bytes_of)), "dirty files")
