"""Nothing that a video file can do hangs, kills or silently falsifies a run: the campaign, a sample of it in every run and all of it with --slow."""
import os
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fvlm.core import VideoError
from fvlm.data.decode_worker import DecodeWorker
from fvlm.data.video import decode, probe
from tests.hostile_videos import MUTATORS, SOURCES, Referee, dirty_files, mutant, sources, unreported

MUTANTS, SAMPLE = 1000, 60


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "The sources, encoded once."
    bytes_of = sources(tmp_path_factory.mktemp("sources"))
    assert len(bytes_of) >= 8, f"this machine encodes only {sorted(bytes_of)}"
    return bytes_of


@pytest.fixture(scope="module")
def judges():
    "A worker with the usual caps, and the referee."
    worker, referee = DecodeWorker(), Referee()
    yield worker, referee
    worker.close()
    referee.close()


def resident_mb():
    "Megabytes this process holds."
    status = Path("/proc/self/status")
    return int(status.read_text().split("VmRSS:")[1].split()[0]) / 1e3 if status.exists() else 0.0


def ordeal(paths, worker, referee, seed=0):
    "Every path probed and decoded. Returns counts of what came of it, what was wrong, and the longest time."
    rng, counts, wrong, longest, reasons = np.random.default_rng(seed), Counter(), [], 0.0, Counter()
    for path, expected in paths:
        began, clip, indices = time.perf_counter(), None, None
        starts = worker.starts
        try:
            info = probe(path, isolated=worker)
            if rng.integers(2):  # half of them by a few frames in any order, so that seeks are tried too
                indices = rng.integers(0, info.frames, min(info.frames, 6))
            clip = decode(path, indices, isolated=worker)
            wanted = info.frames if indices is None else len(indices)
            if tuple(clip.frames.shape) != (wanted, info.height, info.width, 3):
                wrong.append(f"{path.name}: {tuple(clip.frames.shape)} for {wanted} frames of {info.height} x {info.width}")
            outcome = f"frames by {clip.backend}" + (", with notes" if clip.notes else "")
        except VideoError as error:
            outcome = "one typed error"
            reasons[error.reason.split(";")[0].split(":")[0][:60]] += 1
            if "\n" in str(error) or not error.reason or path.name not in str(error):
                wrong.append(f"{path.name}: says {str(error)!r}")
        except Exception as error:  # what must never come out
            outcome = "another exception"
            wrong.append(f"{path.name}: {type(error).__name__}: {error}")
        seconds = time.perf_counter() - began
        longest = max(longest, seconds)
        counts[outcome] += 1
        counts["decoders ended"] += max(0, worker.starts - max(starts, 1))
        if seconds > 10:
            wrong.append(f"{path.name}: took {seconds:.1f} s")
        if expected != "either" and (expected == "frames") != (clip is not None):
            wrong.append(f"{path.name}: expected {expected}, got {outcome}")
        if clip is not None and (told := unreported(clip, referee.look(path))):
            counts["damaged VP8 that no flag betrays"] += told.startswith("vp8:")
            told.startswith("vp8:") or wrong.append(f"{path.name}: {told}, and nothing was said")
    return counts, wrong, longest, reasons


def report(name, number, counts, longest, grown, reasons=None):
    print(f"\n{name}: {number} files, longest {longest:.1f} s, memory grew by {grown:.0f} MB")
    for outcome, count in [*sorted(counts.items()), *([(f"   {why}", n) for why, n in reasons.most_common(12)] if reasons else [])]:
        print(f"  {count:5d} {outcome}")


def test_the_sources_are_read_without_a_note(made, tmp_path, judges):
    for name, data in made.items():
        path = tmp_path / f"{name}.{SOURCES[name][0]}"
        path.write_bytes(data)
        clip = decode(path, isolated=judges[0])
        assert len(clip.frames) == 24 and (clip.notes == () or name == "h264_avi"), (name, clip.notes)
        assert unreported(clip, judges[1].look(path)) is None


def test_the_referee_would_notice(made, tmp_path, judges):
    from dataclasses import replace

    path = tmp_path / "film.mp4"
    path.write_bytes(made["h264_mp4"])
    clip, seen = decode(path, isolated=judges[0]), judges[1].look(path)
    assert unreported(clip, seen) is None
    frames = clip.frames.clone()
    frames[5] = frames[4]
    assert "frame 5 differs" in unreported(replace(clip, frames=frames), seen)
    seen["frames"][7][1] = True
    assert "marked corrupt" in unreported(clip, seen) and unreported(replace(clip, notes=("so it is",)), seen) is None
    del seen["frames"][3]
    assert "no decoder" in unreported(clip, seen)


def test_a_sample_of_broken_films(made, tmp_path, judges):
    before = resident_mb()
    numbers = range(0, SAMPLE * 7, 7)  # 7 meets every mutator and every source
    counts, wrong, longest, reasons = ordeal(((mutant(tmp_path, made, n), "either") for n in numbers), *judges)
    grown = resident_mb() - before
    report("broken films, a sample", SAMPLE, counts, longest, grown)
    assert not wrong, "\n".join(wrong)
    assert len({n % len(MUTATORS) for n in numbers}) == len(MUTATORS) and grown < 200
    assert counts["one typed error"] and sum(n for what, n in counts.items() if what.startswith("frames"))


def test_sixty_dirty_files(made, tmp_path, judges):
    counts, wrong, longest, reasons = ordeal(dirty_files(tmp_path, made).values(), *judges)
    report("dirty files", 60, counts, longest, 0)
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_a_thousand_broken_films(made, tmp_path, judges):
    decode(mutant(tmp_path, made, 8), isolated=judges[0])
    before, pid = resident_mb(), os.getpid()
    counts, wrong, longest, reasons = ordeal(((mutant(tmp_path, made, n), "either") for n in range(MUTANTS)), *judges, seed=1)
    grown = resident_mb() - before
    report("broken films", MUTANTS, counts, longest, grown, reasons)
    assert not wrong, f"{len(wrong)} wrong:\n" + "\n".join(wrong)
    assert grown < 200 and os.getpid() == pid and counts["damaged VP8 that no flag betrays"] <= 5
