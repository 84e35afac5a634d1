"""The readers beneath `decode`: no torch, no false trust, and facts that follow the file."""
import subprocess
import sys

import numpy as np
import pytest

from fvlm.data import frame_readers
from fvlm.data.file_facts import FileFacts, decoded_frames, examine
from fvlm.data.frame_readers import describe, read_decord, read_frames, read_pyav
from fvlm.data.frame_requests import Sink, Unreadable, Wanted, Watch, wanted_frames
from tests.hostile_videos import film, write

QUICK = {"options": {"g": "8", "bf": "2", "preset": "veryfast"}}


class Shelf(Sink):
    def expect(self, total):
        self.frames = [None] * total

    def give(self, slots, frames):
        assert len(slots) == len(frames) and frames.dtype == np.uint8
        for slot, frame in zip(slots, frames):
            self.frames[slot] = frame.copy()


class Ears(Watch):
    def __init__(self, *complaints):
        self.steps, self.beats, self.lines = [], 0, list(complaints)

    def step(self, name, seconds=0.0):
        self.steps.append((name, seconds))

    def beat(self):
        self.beats += 1

    def complaints(self):
        self.asked = getattr(self, "asked", 0) + 1
        return self.lines if self.asked == 2 else []  # the first time clears what was there before


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return str(write(tmp_path_factory.mktemp("films") / "film.mp4", film(3), **QUICK))


def test_no_torch_comes_with_the_readers():
    code = "import sys, fvlm.data.frame_readers, fvlm.data.decode_child, fvlm.data.decode_worker; print([m for m in ('torch', 'av', 'decord', 'PIL') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("order", [[0, 2, 1, 3], [5, 5, 5], [23, 0, 12, 1, 22], [3, 1, 2, 0, 4]])
def test_slots_are_positions_in_the_request(path, order):
    whole, some = Shelf(), Shelf()
    read_frames(path, Wanted(), whole)
    for backend in ("auto", "decord", "pyav"):
        reading = read_frames(path, wanted_frames(order), some, backend=backend)
        assert reading.indices.tolist() == order and all(np.array_equal(some.frames[k], whole.frames[i]) for k, i in enumerate(order))


def test_a_complaint_on_the_terminal_is_a_doubt(path, tmp_path):
    lossless = str(write(tmp_path / "film.mkv", film(3), "ffv1", "bgr0"))
    for place, first, name in ((path, "pyav", "PyAV"), (lossless, "decord", "decord")):
        quiet = read_frames(place, Wanted(), Shelf(), watch=Ears())
        assert (quiet.backend, quiet.notes) == (first, ())
        told = read_frames(place, Wanted(), Shelf(), watch=Ears("[h264 @ 0x55] error while decoding MB 3 4"))
        assert told.backend == "pyav" and told.notes[0] == f"{name}: the decoder complained 1 times, first: error while decoding MB 3 4"


@pytest.mark.parametrize("options", [{"bf": "0"}, {"bf": "2"}, {"bf": "4", "x264-params": "b-pyramid=normal:b-adapt=0"}, {"bf": "3", "x264-params": "interlaced=1"}, {"bf": "2", "x264-params": "open-gop=1"}])
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_frames_left_out_change_no_frame_that_was_asked_for(tmp_path, suffix, options):
    place = str(write(tmp_path / f"film.{suffix}", film(3), options={"g": "12", "preset": "veryfast", **options}))
    plain, some = Shelf(), Shelf()
    plain.frames = [frame.to_ndarray(format="rgb24") for frame in decoded_frames(place, Watch())]
    assert len(plain.frames) == 24
    for order in ([5], [11], [9, 10, 11], [21, 22, 23], [13, 16, 19, 22], [2, 7, 20], [22, 10, 10, 0], list(range(3, 19))):
        reading = read_frames(place, wanted_frames(order), some)
        assert reading.backend == "pyav" and all(np.array_equal(some.frames[k], plain.frames[i]) for k, i in enumerate(order)), order


def test_a_decoder_that_spares_is_asked_again_for_what_it_lost(path, monkeypatch):
    whole, spared, real, passes = Shelf(), Shelf(), decoded_frames, []
    read_frames(path, Wanted(), whole)

    def lossy(path, watch, damage=None, seek=None, needed=frozenset()):
        passes.append(needed)
        return (frame for frame in real(path, watch, damage, seek, needed) if not needed or frame.pts != max(needed))

    count = sum(1 for _ in real(path, Watch(), needed=frozenset([int(examine(path).pts[23])])))
    assert count < 24  # it does leave out
    monkeypatch.setattr(frame_readers, "decoded_frames", lossy)
    reading = read_frames(path, wanted_frames([12, 13, 14]), spared)
    assert [bool(needed) for needed in passes] == [True, False] and reading.notes == ()
    assert all(np.array_equal(a, b) for a, b in zip(spared.frames, whole.frames[12:15], strict=True))


def test_repeats_and_blank_frames_of_h264_are_told(tmp_path):
    for name, change, says in (("black", lambda f: np.where(np.arange(24)[:, None, None, None] == 9, 0, f), "PyAV gives frame 9 all of one value (1 such frames)"),
                               ("still", lambda f: f[[*range(10), 9, *range(11, 24)]], "PyAV gives frames 9 and 10 equal byte for byte (1 such pairs)")):
        frames = change(film(4)).astype(np.uint8)
        place = str(write(tmp_path / f"{name}.mp4", frames, "libx264rgb", "rgb24", options={"g": "8", "bf": "2", "qp": "0"}))
        for indices in (None, [8, 9, 10, 11]):
            reading = read_frames(place, wanted_frames(indices), Shelf())
            assert (reading.backend, reading.notes) == ("pyav", (says,))
        assert read_frames(place, wanted_frames([3, 4, 5]), Shelf()).notes == ()


def test_blank_frames_and_repeats_are_doubts(tmp_path):
    for name, change, says in (("black", lambda f: np.where(np.arange(24)[:, None, None, None] == 9, 0, f), "frame 9 all of one value"),
                               ("still", lambda f: f[[*range(10), 9, *range(11, 24)]], "frames 9 and 10 equal")):
        frames = change(film(4)).astype(np.uint8)
        shelf = Shelf()
        reading = read_frames(str(write(tmp_path / f"{name}.mkv", frames, "ffv1", "bgr0")), Wanted(), shelf)
        assert reading.backend == "pyav" and says in reading.notes[0] and np.array_equal(np.stack(shelf.frames), frames)


def test_decord_is_refused_when_its_index_is_not_the_files(path):
    facts = examine(path)
    for wrong in (facts.pts[:-1], facts.pts + np.arange(24) * 500):
        other = FileFacts(**{**{k: getattr(facts, k) for k in facts.__dataclass_fields__}, "pts": wrong})
        with pytest.raises(Unreadable, match="differs from the .* times in the file"):
            read_decord(path, Wanted(), Shelf(), facts=other)


@pytest.mark.parametrize("pixel_format, codec", [("yuv420p10le", "libx264"), ("yuv411p", "ffv1"), ("yuv420p", "libvpx-vp9")])
def test_what_decord_shows_otherwise_is_read_by_pyav_without_a_note(tmp_path, pixel_format, codec):
    place = str(write(tmp_path / "film.mkv", film(5)[:6], codec, pixel_format))
    reading = read_frames(place, Wanted(), Shelf())
    assert (reading.backend, reading.notes, describe(place)["backend"]) == ("pyav", (), "pyav")


def test_out_of_order_and_stray_seeks_are_told(path, monkeypatch):
    facts = examine(path)
    fields = {k: getattr(facts, k) for k in facts.__dataclass_fields__}
    for change, says in (({"ordered": False}, "another order"), ({"seekable": False}, "seeks do not land")):
        monkeypatch.setattr(frame_readers, "examine", lambda *_, change=change: FileFacts(**{**fields, **change}))
        shelf = Shelf()
        reading = read_frames(path, wanted_frames([20]), shelf)
        assert reading.backend == "pyav" and says in reading.notes[0]


def flagged(place):
    "Numbers of the frames that a plain pass of the decoder marks as corrupt; none when it gives up."
    import av

    try:
        with av.open(str(place)) as container:
            return [k for k, frame in enumerate(container.decode(video=0)) if frame.is_corrupt]
    except av.error.FFmpegError:
        return []


def test_corrupt_frames_and_what_is_built_on_them(tmp_path):
    place = tmp_path / "film.mp4"
    whole = write(place, film(6), options={"g": "24", "bf": "0", "preset": "veryfast"}).read_bytes()
    seen = 0
    for start in range(len(whole) // 4, 3 * len(whole) // 4, len(whole) // 24):  # where the damage shows depends on the encoder's version
        data = bytearray(whole)
        data[start : start + 16] = bytes(byte ^ 0x5A for byte in data[start : start + 16])
        place.write_bytes(data)
        if flagged(place) and min(flagged(place)) < 23:
            seen += 1
            reading, doubts = read_pyav(str(place), wanted_frames([23]), Shelf())  # the last frame alone: the damage lies before it
            assert any("corrupt" in doubt for doubt in doubts) and reading.indices.tolist() == [23], (start, doubts)
    assert seen, "no damage that the decoder marks: nothing was shown"
