"""The stopwatch: two callables side by side in one process, equal first and timed after, and only ratios come out.

    from benchmarks.timing import Table, compare, geometric_mean

    def main() -> Table:
        table = Table("attention")
        rows = compare("folded", ours=lambda: folded(x), theirs=lambda: loop(x), check=lambda: close(folded(x), loop(x)))
        table.add("folded against a loop", rows, bar=1.7, aim=2.0)
        return table

A ratio is theirs / ours: two means twice as fast. `check` asserts, or returns False when the two sides differ. Machines
are shared and noisy, so both sides are timed in turn (A,B then B,A) and the median and quartiles of the rounds are kept.
"""
import math
import os
import platform
import statistics
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "results" / "benchmarks"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    "Ratios theirs / ours of one pair at one thread count, one a round."

    name: str  # what was compared
    threads: int  # torch's thread count while timing
    ratios: tuple[float, ...]  # theirs / ours, one a round
    ours_seconds: float  # median seconds of one call of ours: for sizing a run, not for quoting

    @property
    def median(self) -> float:
        "The middle ratio."
        return statistics.median(self.ratios)

    @property
    def quartiles(self) -> tuple[float, float]:
        "First and third quartile of the ratios."
        if len(self.ratios) < 2:
            return self.ratios[0], self.ratios[0]
        first, _, third = statistics.quantiles(self.ratios, n=4, method="inclusive")
        return first, third


@contextmanager
def thread_count(
    threads: int,  # torch's intra-op threads inside the block
):
    "Run a block on a fixed number of torch threads and put the old number back, whatever happens."
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compare(
    name: str,  # what is compared, for the table and for errors
    ours,  # callable without arguments
    theirs,  # callable without arguments, the same work
    *,
    check,  # asserts that both sides give equal output (or returns False if they do not); None: nothing to compare
    rounds: int = 7,  # pairs timed, at least five
    threads=(1, 2),  # thread counts; those beyond the machine's cores are left out
    min_seconds: float = 0.05,  # a sample repeats its call until it lasts this long
) -> list[Comparison]:
    """One Comparison a thread count, rounds interleaved A,B,B,A,A,B and equality asserted before the first of them.

    Raises: AssertionError naming the comparison if `check` fails, ValueError if there are fewer than five rounds.
    """
    if rounds < 5:
        raise ValueError(f"rounds: got {rounds}, expected at least 5")
    found = []
    usable = [n for n in threads if n <= (os.cpu_count() or 1)] or [1]
    for count in usable:
        with thread_count(count):
            if check is not None:
                assert check() is not False, f"{name}: the two sides differ at {count} thread(s); nothing was timed"
            calls = {side: _calls_for(side, min_seconds) for side in (ours, theirs)}
            samples = []
            for turn in range(rounds):
                order = (ours, theirs) if turn % 2 == 0 else (theirs, ours)
                seconds = {side: _seconds(side, calls[side]) for side in order}
                samples.append((seconds[ours], seconds[theirs]))
        ratios = tuple(b / a for a, b in samples)
        found.append(Comparison(name=name, threads=count, ratios=ratios, ours_seconds=statistics.median(a for a, _ in samples)))
    return found


def _calls_for(side, min_seconds: float) -> int:
    side()  # warm: allocator, primitive caches, packed weights
    once = _seconds(side, 1)
    return max(1, min(10_000, math.ceil(min_seconds / max(once, 1e-7))))


def _seconds(side, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        side()
    return (time.perf_counter() - start) / calls


def geometric_mean(
    name: str,  # what the mean is of
    *runs: list[Comparison],  # results of `compare`, one a shape
) -> list[Comparison]:
    "The geometric mean over shapes, round by round and thread count by thread count, as one result of `compare`."
    merged = []
    for same_threads in zip(*runs, strict=True):
        assert len({c.threads for c in same_threads}) == 1, f"{name}: thread counts differ between shapes"
        rounds = zip(*(c.ratios for c in same_threads), strict=True)
        ratios = tuple(statistics.geometric_mean(round_) for round_ in rounds)
        merged.append(Comparison(name=name, threads=same_threads[0].threads, ratios=ratios,
                                 ours_seconds=sum(c.ours_seconds for c in same_threads)))
    return merged


def gemm_rate(
    dtype,  # torch.float32 or torch.bfloat16
    size: int = 1024,  # square matrices of this side
    threads: int = 1,  # torch threads
) -> float:
    "Best of a few square matrix products, in GFLOP/s: what this machine gives at this minute."
    import torch

    with thread_count(threads), torch.inference_mode():
        a, b = (torch.randn(size, size, generator=torch.Generator().manual_seed(i)).to(dtype) for i in (0, 1))
        a @ b
        best = min(_seconds(lambda: a @ b, 2) for _ in range(5))
    return 2 * size**3 / best / 1e9


@dataclass
class Table:
    "Rows of one benchmark: what was measured, its bar, the ratio with quartiles, threads, verdict."

    name: str  # the benchmark's name: results/benchmarks/<name>.json
    rows: list[dict] = field(default_factory=list)  # filled by `add` and `fact`
    gemm: dict[str, float] = field(default_factory=dict)  # same-run GFLOP/s by type and threads, measured when the table is made

    def __post_init__(self):
        import torch

        for threads in (n for n in (1, 2) if n <= (os.cpu_count() or 1)):
            for dtype in (torch.float32, torch.bfloat16):
                self.gemm[f"{str(dtype).removeprefix('torch.')} {threads} thread{'s' * (threads > 1)}"] = round(gemm_rate(dtype, threads=threads), 1)

    def add(
        self,
        measured: str,  # what the row says
        comparisons: list[Comparison],  # from `compare` or `geometric_mean`; one row each
        *,
        bar: float | None = None,  # the ratio asked for; None: for information
        aim: float | None = None,  # the ratio hoped for
        at_most: bool = False,  # the bar is a ceiling (a cost), not a floor (a speed-up)
    ) -> "Table":
        "Append one row a thread count; the table itself, for chaining."
        for found in comparisons:
            first, third = found.quartiles
            self.rows.append(dict(
                measured=measured, bar=_bar_text(bar, aim, at_most), ratio=f"{found.median:.2f} [{first:.2f}, {third:.2f}]", threads=found.threads,
                verdict=_verdict(found.median, bar, aim, at_most), median=found.median, first_quartile=first, third_quartile=third,
                ratios=list(found.ratios), bar_value=bar, aim_value=aim, at_most=at_most,
            ))
        return self

    def fact(
        self,
        measured: str,  # what the row says
        value: str,  # what was found, shown in place of a ratio
        *,
        bar: str,  # what was asked for; "-" for nothing
        holds: bool,  # whether it was found
    ) -> "Table":
        "Append a row that is no ratio: a yes or no, a count."
        self.rows.append(dict(measured=measured, bar=bar, ratio=value, threads="-", verdict="-" if bar == "-" else "holds" if holds else "MISSES"))
        return self

    def markdown(self) -> str:
        "The rows as an aligned markdown table under a line with the same-run GEMM rates."
        columns = ["measured", "bar", "ratio", "threads", "verdict"]
        headings = ["measured", "bar", "ratio, median [quartiles]", "threads", "verdict"]
        cells = [headings, *([str(row[c]) for c in columns] for row in self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
        lines = ["| " + " | ".join(text.ljust(width) for text, width in zip(row, widths)) + " |" for row in cells]
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        rates = ", ".join(f"{kind} {rate:.0f}" for kind, rate in self.gemm.items())
        return "\n".join([f"{self.name}: GEMM in this run, GFLOP/s: {rates}", "", *lines])

    def write(
        self,
        folder=RESULTS,  # where; one file a benchmark
    ) -> Path:
        "Write rows, GEMM rates and versions as `<name>.json`; the path."
        import torch

        from fvlm.files import write_json

        path = Path(folder) / f"{self.name}.json"
        versions = {"python": platform.python_version(), "torch": torch.__version__, "cpu_capability": torch.backends.cpu.get_cpu_capability(), "cores": os.cpu_count()}
        write_json(path, {"benchmark": self.name, "gemm_gflops": self.gemm, "rows": self.rows, "versions": versions, "markdown": self.markdown()})
        return path


def _bar_text(bar, aim, at_most: bool) -> str:
    if bar is None:
        return "-"
    sign = "<=" if at_most else ">="
    return f"{sign} {bar:g}x" + (f" (aim {aim:g}x)" if aim is not None else "")


def _verdict(median: float, bar, aim, at_most: bool) -> str:
    if bar is None:
        return "-"
    better = (lambda a, b: a <= b) if at_most else (lambda a, b: a >= b)
    if aim is not None and better(median, aim):
        return "reaches the aim"
    return "holds" if better(median, bar) else "MISSES"
