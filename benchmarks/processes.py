"""Bar ix: samples a second of two processes of one thread each, under torchrun and gloo, over one process of one thread."""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.timing import Comparison, Table

ROUNDS, WARM, STEPS, BATCH = 5, 6, 30, 256


class Windows:
    "Random windows of the size of the studies' embeddings."

    def __init__(self):
        import torch

        self.x = torch.randn(2048, 6, 384, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.x)

    def batch(self, indices):
        return {"embeddings": self.x[indices, :5], "target": self.x[indices, 5]}

    def __getitem__(self, i):
        return {key: value[0] for key, value in self.batch([i]).items()}


def train_and_time(
    out: Path,  # where rank 0 writes {"rate": samples a second, "loss": last loss}
) -> None:
    "One process's part: SC-VFP `small`, fp32, timed after the warm-up."
    import torch

    from fvlm.models.sc_vfp import SCVFP, SCVFPConfig
    from fvlm.training.loop import TrainConfig, train

    torch.set_num_threads(1)
    moments = []
    model = SCVFP(SCVFPConfig.preset("small", dropout=0.0), seed=0)
    config = TrainConfig(steps=STEPS, batch_size=BATCH, learning_rate=1e-3, log_every=STEPS, seed=0)
    result = train(model, {"train": Windows()}, config, callbacks=[lambda event: moments.append(time.perf_counter())], progress=False, device="cpu")
    if int(os.environ.get("RANK", 0)) == 0:
        rate = BATCH * (len(moments) - WARM) / (moments[-1] - moments[WARM - 1])
        out.write_text(json.dumps({"rate": rate, "loss": result.history[-1]["loss"]}))


def launched(
    processes: int,  # 1 or 2
) -> dict:
    "What the run of that many processes measured."
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
        script = [str(Path(__file__).resolve()), "--out", str(out)]
        root = str(Path(__file__).resolve().parents[1])
        subprocess.run([sys.executable, *launcher, *script], check=True, capture_output=True, text=True, timeout=600,
                       env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": root})
        return json.loads(out.read_text())


def main() -> Table:
    "Interleaved runs; both end at the same loss, or nothing is reported."
    ratios, seconds = [], []
    for turn in range(ROUNDS):
        found = {n: launched(n) for n in ((1, 2) if turn % 2 == 0 else (2, 1))}
        assert abs(found[1]["loss"] - found[2]["loss"]) < 1e-3, f"the runs differ: losses {found[1]['loss']} and {found[2]['loss']}"
        ratios.append(found[2]["rate"] / found[1]["rate"])
        seconds.append(BATCH / found[2]["rate"])
    row = Comparison(name="two processes", threads=1, ratios=tuple(ratios), ours_seconds=statistics.median(seconds))
    return Table("processes").add("two processes over one, samples a second (SC-VFP small, global batch 256, fp32)", [row], bar=1.4, aim=1.8)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where to write what was measured")
    train_and_time(parser.parse_args().out)
