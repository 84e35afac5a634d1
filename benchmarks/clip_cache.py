"""Bar iv, the clip cache: windows of 16 frames at random starts in the second epoch, against bare decord on the same files and starts.

The rival opens `decord.VideoReader(path)` and calls `get_batch(...).asnumpy()`. The cache has been filled by a first epoch; the bar is for
a process that goes on to its second one, and a row for information is for a new process, whose first reading of every shard is hashed. Both
sides give frames of native size, and the frames are compared before anything is timed.
"""
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.reader import FRAMES, bare, cores, jobs, sources
from benchmarks.timing import Table, compare, geometric_mean

WINDOWS_A_CLIP = 4


def windows(paths) -> list:
    "(path, indices): some random windows of every file that bare decord reads rightly."
    from fvlm.data.video import probe

    rng, found = np.random.default_rng(1), []
    for path, indices in jobs(paths)[0]:
        last = probe(path).frames - FRAMES
        starts = [int(indices[0]), *rng.integers(0, last + 1, WINDOWS_A_CLIP - 1).tolist()]
        found += [(path, np.arange(start, start + FRAMES)) for start in starts]
    return found


def peak(
    folder: str,  # of videos
    cache: str,  # folder of the cache, filled and read through
) -> int:
    "Peak memory in kB of this process after an epoch that fills the cache and one that reads it."
    from fvlm.data import clip_cache
    from fvlm.data.clips import VideoFolder

    clip_cache.DECODE_BYTES = 1  # the smallest blocks: what grows is then the clips
    videos = VideoFolder(folder, context_frames=15, gap=1, step=16, cache=clip_cache.ClipCache(cache))
    for _ in range(2):
        for k in range(len(videos)):
            videos[k]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def memory_growth() -> float:
    "Peak memory over ten times the clips, as a multiple of that over one time."
    from benchmarks.embedding_cache import write_clips

    peaks = []
    with tempfile.TemporaryDirectory() as place:
        seeds = Path(place) / "seeds"
        seeds.mkdir()
        clips = write_clips(seeds)
        for name, copies in (("some", 3), ("ten times as many", 30)):
            folder = Path(place) / name
            folder.mkdir()
            for number in range(copies):
                for clip in clips:  # an empty box behind the last one: other contents, the same film
                    (folder / f"{number}-{clip.name}").write_bytes(clip.read_bytes() + (12).to_bytes(4, "big") + b"free" + number.to_bytes(4, "big"))
            code = "import sys; from benchmarks.clip_cache import peak; print(peak(*sys.argv[1:]))"
            done = subprocess.run([sys.executable, "-c", code, str(folder), f"{place}/cache of {name}"], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
            peaks.append(int(done.stdout))
    return peaks[1] / peaks[0]


def main() -> Table:
    "One row a source and one over all, on one core and on two; then a new process, and memory."
    from fvlm.data.clip_cache import ClipCache

    table = Table("clip_cache")
    with tempfile.TemporaryDirectory() as place:
        cache = ClipCache(place)
        work = {source: windows(paths) for source, paths in sources().items()}
        for count in (n for n in (1, 2) if n <= len(os.sched_getaffinity(0))):
            runs, fresh = [], []
            with cores(count):
                for source, ours in work.items():
                    if not ours:
                        continue
                    same = lambda: all(np.array_equal(cache.read(p, i).numpy(), bare(p, i)) for p, i in ours)  # noqa: B023,E731
                    theirs = lambda: [bare(p, i) for p, i in ours]  # noqa: B023,E731
                    runs.append(compare(source, ours=lambda: [cache.read(p, i) for p, i in ours], theirs=theirs, check=same, rounds=5, threads=(count,)))  # noqa: B023
                    table.add(f"{source}: {len(ours)} windows of {FRAMES} frames", runs[-1])

                    def new_process(ours=ours):
                        "Everything a new process does: name the contents, read the papers, hash the shards."
                        later = ClipCache(place)
                        return [later.read(p, i) for p, i in ours]

                    fresh.append(compare(source, ours=new_process, theirs=theirs, check=None, rounds=5, threads=(count,)))
            if runs:
                table.add("all sources, geometric mean, second epoch", geometric_mean("clip_cache", *runs), bar=20, aim=60)
                table.add("all sources, geometric mean, first epoch of a new process, every shard hashed", geometric_mean("new process", *fresh))
    growth = memory_growth()
    return table.fact("peak memory over ten times the clips", f"{growth:.3f}x", bar="<= 1.1x", holds=growth <= 1.1)


if __name__ == "__main__":
    table = main()
    table.write()
    print(table.markdown())
