"""The child that decodes: what it does when it hangs, dies or swells, and that it is nobody's but its parent's."""
import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from fvlm.core import ConfigError, InputError, VideoError
from fvlm.data.decode_worker import DecodeWorker, own_worker
from fvlm.data.frame_requests import Sink, wanted_frames
from fvlm.data.video import decode, probe, read_clip
from tests.hostile_videos import film, write

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the decode worker needs a POSIX system")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")


class Nothing(Sink):
    def __init__(self, act=lambda: None):
        self.act, self.given = act, 0

    def expect(self, total):
        self.total = total

    def give(self, slots, frames):
        self.given += len(slots)
        self.act()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return str(write(tmp_path_factory.mktemp("films") / "film.mp4", film(3), options={"g": "8", "bf": "2", "preset": "veryfast"}))


@pytest.fixture
def worker():
    made = DecodeWorker(seconds=1.5)
    yield made
    made.close()


def gone(pid):
    "Whether a process has ended and was reaped by its parent."
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_the_same_frames_as_without_a_child(path, worker):
    for request in ({}, {"indices": [7, 3, 3, 23, 0]}, {"stride": 5, "size": 20}, {"fps": 7}, {"indices": [22, 30], "pad": "loop"}):
        for backend in ("auto", "decord", "pyav"):
            a, b = (decode(path, backend=backend, isolated=isolated, **request) for isolated in (worker, False))
            assert torch.equal(a.frames, b.frames) and a.indices.tolist() == b.indices.tolist() and a.notes == b.notes and a.backend == b.backend
            assert np.array_equal(a.timestamps, b.timestamps)
    assert probe(path, isolated=worker) == probe(path, isolated=False) and worker.starts == 1


def test_frames_larger_than_the_ring_and_more_than_fit_it(tmp_path, worker):
    worker.seconds = 30.0  # nothing is late here, however busy the machine
    large = np.random.default_rng(0).integers(0, 255, (3, 1, 1, 3)).astype(np.uint8) * np.ones((1, 3400, 3400, 1), np.uint8)
    large[:, ::2] //= 2
    place = write(tmp_path / "large.mkv", large, "ffv1", "bgr0")
    assert torch.equal(read_clip(place, isolated=worker), torch.from_numpy(large))
    many = (np.arange(300) % 251).astype(np.uint8).repeat(48 * 64 * 3).reshape(300, 48, 64, 3)
    many[:, ::2] //= 3
    place = write(tmp_path / "many.mkv", many, "ffv1", "bgr0")
    for backend in ("decord", "pyav"):
        assert torch.equal(read_clip(place, backend=backend, isolated=worker), torch.from_numpy(many))


def test_a_hang_is_ended_and_the_next_request_is_served(path, worker):
    worker.probe(path)
    stopped = worker.pid
    os.kill(stopped, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(VideoError, match="film.mp4: decoder took more than 1.5 s"):
        decode(path, isolated=worker)
    assert 1.4 < time.monotonic() - began < 6 and gone(stopped)
    assert len(decode(path, isolated=worker).frames) == 24 and worker.starts == 2


@linux
def test_a_child_that_stands_still_is_ended_before_its_time(path, monkeypatch):
    monkeypatch.setattr("fvlm.data.decode_worker.STILL_SECONDS", 0.6)
    patient = DecodeWorker(seconds=30)
    patient.probe(path)
    os.kill(patient.pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(VideoError, match="stood still"):
        decode(path, isolated=patient)
    assert time.monotonic() - began < 6
    patient.close()


def test_a_hang_while_a_long_request_is_sent(path, worker):
    worker.probe(path)
    os.kill(worker.pid, signal.SIGSTOP)
    with pytest.raises(VideoError, match="took more than"):
        worker.read(path, wanted_frames([0] * 100_000), Nothing())  # more than a pipe holds


@pytest.mark.parametrize("signal_", [signal.SIGSEGV, signal.SIGKILL, signal.SIGABRT])
def test_a_crash_is_one_error(path, worker, signal_):
    sink = Nothing(lambda: os.kill(worker.pid, signal_))
    with pytest.raises(VideoError, match=rf"decoder died \(signal {int(signal_)}\)") as caught:
        worker.read(path, wanted_frames([0, 1] * 100), sink, backend="pyav")
    assert caught.value.path == path and worker.pid is None
    assert len(decode(path, isolated=worker).frames) == 24


def test_pyav_takes_over_when_decord_kills_the_child(tmp_path, worker):
    path = str(write(tmp_path / "film.mkv", film(3), "ffv1", "bgr0"))

    def once():
        if worker.starts == 1:
            os.kill(worker.pid, signal.SIGSEGV)

    reading = worker.read(path, wanted_frames([0, 1] * 100), Nothing(once))
    assert reading.backend == "pyav" and reading.notes[0] == "decord: decoder died (signal 11)" and worker.starts == 2


@linux
def test_a_file_that_needs_too_much_memory(tmp_path):
    black = np.zeros((3, 6000, 6000, 3), np.uint8)
    place = write(tmp_path / "huge.mp4", black, options={"preset": "ultrafast"})
    small = DecodeWorker(memory_mb=250)
    with pytest.raises(VideoError, match="needed more than 250 MB"):
        decode(place, isolated=small)
    assert decode(place, [0], isolated=True).frames.shape == (1, 6000, 6000, 3)
    small.close()


def test_a_mistake_here_leaves_a_clean_start(path, worker):
    def wrong():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        worker.read(path, wanted_frames(), Nothing(wrong))
    assert worker.pid is None and len(decode(path, isolated=worker).frames) == 24


def test_an_error_of_the_file_or_the_request_costs_no_child(path, worker, tmp_path):
    (tmp_path / "empty.mp4").touch()
    for ask, kind in ((lambda: decode(tmp_path / "empty.mp4", isolated=worker), VideoError), (lambda: decode(path, [99], isolated=worker), VideoError),
                      (lambda: decode(path, fps=500, isolated=worker), ConfigError)):
        with pytest.raises(kind):
            ask()
    assert worker.starts == 1 and worker.pid is not None
    for wrong in ("yes", 1, None):
        with pytest.raises(InputError, match="isolated"):
            decode(path, isolated=wrong)
    with pytest.raises(ConfigError, match="seconds"):
        DecodeWorker(seconds=0)


def test_threads_take_turns(path, worker):
    whole, wrong = decode(path, isolated=worker).frames, []

    def read(k):
        for i in range(k, 24, 4):
            if not torch.equal(decode(path, [i], isolated=worker).frames[0], whole[i]):
                wrong.append(i)

    threads = [threading.Thread(target=read, args=(k,)) for k in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong and worker.starts == 1


class Films(torch.utils.data.Dataset):
    "Frames by the process's own worker; says which processes took part."

    def __init__(self, path):
        self.path = path

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return {"frames": read_clip(self.path, [i]), "reader": os.getpid(), "child": own_worker().pid}


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_in_the_workers_of_a_loader(path, method):
    whole, mine = read_clip(path), own_worker().pid
    seen = list(torch.utils.data.DataLoader(Films(path), batch_size=None, num_workers=1 if method == "spawn" else 2, multiprocessing_context=method))
    assert all(torch.equal(item["frames"][0], whole[i]) for i, item in enumerate(seen))
    children = {item["child"] for item in seen}
    assert mine not in children and len(children) == len({item["reader"] for item in seen})
    assert all(gone(child) for child in children)
    assert torch.equal(read_clip(path, [5])[0], whole[5]) and own_worker().pid == mine


def test_a_copy_by_pickle_starts_its_own(path, worker):
    decode(path, [0], isolated=worker)
    copy = pickle.loads(pickle.dumps(worker))
    assert copy.pid is None and (copy.seconds, copy.memory_mb) == (worker.seconds, worker.memory_mb)


@linux
def test_nothing_is_left_when_the_parent_ends(path):
    code = ("import os, sys, fvlm.data.decode_worker as d; from fvlm.data.frame_requests import wanted_frames; w = d.own_worker(); w.probe(sys.argv[1]); print(w.pid, flush=True);"
            "os.kill(os.getpid(), 9) if sys.argv[2] == 'killed' else None")
    for how in ("normally", "killed"):
        done = subprocess.run([sys.executable, "-c", code, path, how], capture_output=True, text=True, timeout=60)
        assert done.stderr == "" and gone(int(done.stdout)), how


@linux
def test_the_child_is_small_and_knows_no_torch(path, worker):
    for backend in ("decord", "pyav"):
        decode(path, backend=backend, isolated=worker)
    maps = open(f"/proc/{worker.pid}/maps").read()
    assert "libtorch" not in maps and "libcu" not in maps and "decord" in maps and worker._resident() < 250


def test_nothing_is_printed(tmp_path):
    whole = write(tmp_path / "film.mp4", film(6), options={"g": "24", "preset": "veryfast"}).read_bytes()
    for start in range(900, 2300, 200):  # some of these places make the decoder complain
        data = bytearray(whole)
        data[start : start + 24] = bytes(byte ^ 0x5A for byte in data[start : start + 24])
        (tmp_path / f"film{start}.mp4").write_bytes(data)
    code = """
import sys
from fvlm.core import VideoError
from fvlm.data.video import decode
for path in sys.argv[1:]:
    try:
        print(*decode(path).notes)
    except VideoError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, *sorted(map(str, tmp_path.iterdir()))], capture_output=True, text=True, timeout=120)
    assert done.stderr == "" and "complained" in done.stdout and done.returncode == 0
