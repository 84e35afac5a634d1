"""A small training that can be started once or as several processes; tests/test_processes.py starts it.

    python -m torch.distributed.run --standalone --nproc-per-node 2 tests/two_processes.py OUT [--single] [--die RANK STEP]
"""
import argparse
import os
import signal
from pathlib import Path

import torch

from fvlm.models.sc_vfp import SCVFP, SCVFPConfig
from fvlm.training.loop import TrainConfig, train

STEPS, ODD = 24, 101  # 101 samples in batches of 16: the last batch of an epoch holds 5, which two processes cannot share evenly


class Windows(torch.utils.data.Dataset):
    "Seeded windows of random walks."

    def __init__(self, n, seed, dtype):
        walk = torch.randn(n, 6, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).cumsum(1).to(dtype)
        self.x, self.y = walk[:, :5], walk[:, 5]

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"embeddings": self.x[i], "target": self.y[i]}


def run(out, *, resume=None, callbacks=(), single=False):
    """The same training whoever calls it. Dropout is off, because every process draws its own masks, and numbers are float64: there nothing
    but the last bits can differ. `single` is float32 at a third of the rate: Adam turns the rounding of a sum in another order into steps."""
    dtype, rate = (torch.float32, 1e-3) if single else (torch.float64, 3e-3)
    model = SCVFP(SCVFPConfig.preset("tiny", dropout=0.0), seed=0).to(dtype)
    config = TrainConfig(steps=STEPS, batch_size=16, learning_rate=rate, ema_decay=0.9, val_every=6, save_every=4, log_every=2, seed=0)
    data = {"train": Windows(ODD, 1, dtype), "val": Windows(37, 2, dtype)}
    result = train(model, data, config, out=out, resume=resume, callbacks=callbacks, progress=False, device="cpu", keep=10)
    return model, result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the run's folder")
    parser.add_argument("--die", type=int, nargs=2, metavar=("RANK", "STEP"), help="this process kills itself after this step, once")
    parser.add_argument("--single", action="store_true", help="float32 instead of float64")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    marker = asked.out.with_suffix(".died")

    def perhaps_die(event):
        if asked.die and int(os.environ.get("RANK", 0)) == asked.die[0] and event.step == asked.die[1] and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    run(asked.out, resume="auto", callbacks=[perhaps_die], single=asked.single)


if __name__ == "__main__":
    main()
