"""Facts that follow the file, and an allowance that a false header cannot raise."""
from fractions import Fraction

import numpy as np
import pytest

from fvlm.data.file_facts import FileFacts, examine
from fvlm.data.frame_requests import Watch
from tests.hostile_videos import film, write

QUICK = {"options": {"g": "8", "bf": "2", "preset": "veryfast"}}


class Pulse(Watch):
    beats = 0

    def beat(self):
        self.beats += 1


def test_a_file_is_examined_once_until_it_changes(tmp_path):
    copy = write(tmp_path / "copy.mp4", film(3), **QUICK)
    first, second = Pulse(), Pulse()
    assert len(examine(str(copy), first).pts) == 24 and examine(str(copy), second).rate == pytest.approx(25)
    assert first.beats and not second.beats
    write(copy, film(3)[:5], **QUICK)
    assert len(examine(str(copy)).pts) == 5


def test_the_allowance_grows_with_honest_work_and_not_with_claims():
    facts = dict(pts=np.arange(1000), keys=np.arange(0, 1000, 100), packets=1000, time_base=Fraction(1, 25), rate=25.0, codec="h264", ordered=True, steady=True, seekable=True, pixel_format="yuv420p")
    honest = FileFacts(**facts, height=1000, width=1000, bytes=10**8)
    assert honest.decoding_seconds(np.array([0])) == pytest.approx(0.25) and honest.decoding_seconds(np.array([99])) == pytest.approx(25)
    assert honest.decoding_seconds(np.arange(50, 82)) == pytest.approx(82 / 4) and honest.decoding_seconds(np.array([99, 199])) == pytest.approx(50)
    assert FileFacts(**facts, height=16000, width=16000, bytes=10**4).decoding_seconds(np.arange(1000)) <= 0.2
