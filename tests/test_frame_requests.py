"""What may be asked of a film, and what is refused before any file is opened."""
import numpy as np
import pytest

from fvlm.core import ConfigError, InputError, VideoError
from fvlm.data.frame_requests import Delivery, Sink, Unreadable, checked_path, wanted_frames


def test_padding_is_named():
    times = np.arange(10) / 25
    for pad, want in (("repeat", [8, 9, 9, 9]), ("loop", [8, 9, 0, 5])):
        wanted = wanted_frames([8, 9, 10, 15], pad=pad)
        assert wanted.resolve("x", times).tolist() == want and "2 of 4 frames lie past the end, the first of them frame 10" in wanted.padding_note(np.array(want))[0]
    assert wanted_frames([0, 9], pad="loop").padding_note(np.array([0, 9])) == ()
    with pytest.raises(VideoError, match="frame 15 was asked for"):
        wanted_frames([8, 15]).resolve("x", times)
    with pytest.raises(ConfigError, match="pad.*'loops'.*did you mean 'loop'"):
        wanted_frames([0], pad="loops")


def test_paths_that_are_none():
    for wrong in (3, None, b"x.mp4", True, "a\0b.mp4"):
        with pytest.raises(InputError, match="path"):
            checked_path(wrong)
    with pytest.raises(VideoError, match="cannot be read|no such file"):
        checked_path("x" * 5000 + ".mp4")


class Nowhere(Sink):
    def expect(self, total):
        self.total = total

    def give(self, slots, frames):
        pass


def test_a_film_that_changes_its_size_needs_leave():
    small, large = np.zeros((1, 8, 8, 3), np.uint8), np.zeros((1, 16, 8, 3), np.uint8)
    for same_size in (True, False):
        delivery = Delivery(Nowhere(), wanted_frames(same_size=same_size), np.arange(2))
        delivery.give([0], small)
        if same_size:
            with pytest.raises(Unreadable, match="change size"):
                delivery.give([1], large)
        else:
            delivery.give([1], large)


def test_a_frame_given_anew_is_looked_at_anew():
    film = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    delivery = Delivery(Nowhere(), wanted_frames(), np.arange(4))
    delivery.suspect([0, 1, 2, 3], film * np.array([1, 0, 1, 1], np.uint8)[:, None, None, None])
    assert delivery.doubts("x") == ("x gives frame 1 all of one value (1 such frames)",)
    delivery.suspect([0, 1, 2, 3], film)
    assert delivery.doubts("x") == ()
