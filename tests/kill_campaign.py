"""Kill a real small training at random moments and compare what comes out with a run that nobody killed.

    python tests/kill_campaign.py                         50 kills, 20 of them inside a save
    python tests/kill_campaign.py --kills 4 --inside 2    a sample
    python tests/kill_campaign.py --workers 2             the same with two loading processes

Each trial trains in a process of its own (forked, so that it starts in milliseconds), ends it with a real SIGKILL, looks
at what lies on the disk, and lets a second process go on with resume="auto". Weights, optimizer, averaged weights, best
weights and log must have the sha256 they have without a kill. A kill counts as inside a save if the half-written
directory is still there.
"""
import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import accelerate  # noqa: E402, F401  (everything heavy is imported once, before the first fork)
import numpy as np  # noqa: E402
import safetensors.torch  # noqa: E402, F401
import torch  # noqa: E402
import torch._dynamo  # noqa: E402, F401
import tqdm.auto  # noqa: E402, F401

from fvlm.core import numpy_generator  # noqa: E402
from fvlm.encoders.embedding_windows import EmbeddingWindows  # noqa: E402
from fvlm.models.sc_vfp import SCVFP, SCVFPConfig  # noqa: E402
from fvlm.training.checkpoints import CheckpointError, check_checkpoint  # noqa: E402
from fvlm.training.loop import TrainConfig, train  # noqa: E402
from fvlm.training.run_checkpoints import step_folders  # noqa: E402


class Jittered:
    "The windows one by one, with noise from all three generators: what an augmentation would do."

    def __init__(self, windows):
        self.windows = windows

    def __len__(self):
        return len(self.windows)

    def __getitem__(self, i):
        item = self.windows[i]
        scale = 1 + 0.01 * (random.random() + float(np.random.rand()) + float(torch.rand(())))
        return {**item, "embeddings": scale * item["embeddings"]}


def training(out, workers, steps):
    "One run of SC-VFP with dropout, input noise, warm-up, averaging and a save every third step."
    clips = [numpy_generator(clip, "clip").standard_normal((60, 16)).cumsum(0).astype("float32") / 4 for clip in range(4)]
    data = {"train": EmbeddingWindows(clips[:3]), "val": EmbeddingWindows(clips[3:])}
    if workers is not None:
        data["train"] = Jittered(data["train"])
    model = SCVFP(SCVFPConfig.preset("tiny", dropout=0.1, input_noise=0.05), seed=0)
    config = TrainConfig(steps=steps, batch_size=16, learning_rate=3e-3, warmup_fraction=0.1, ema_decay=0.9, val_every=9, log_every=2, save_every=3, num_workers=workers or 0)
    train(model, data, config, out=out, resume="auto", progress=False, device="cpu")


def started(out, arguments):
    "The id of a process that trains into `out`. Its complaints go to the file beside."
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with open(out.with_suffix(".txt"), "a") as said:
            os.dup2(said.fileno(), 1), os.dup2(said.fileno(), 2)
            try:
                training(out, arguments.workers, arguments.steps)
                code = 0
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(code)


def ended(child):
    "The exit code, or minus the number of the signal."
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def running(child):
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def half_written(out):
    return {path.name for path in out.glob(".*.part")} if out.is_dir() else set()


def digest(out):
    "The sha256 of all that must be equal."
    newest, found = step_folders(out)[0], hashlib.sha256()
    for path in [newest / "model.safetensors", newest / "optimizer.safetensors", newest / "ema.safetensors", newest / "state.safetensors", out / "best" / "model.safetensors", out / "log.jsonl"]:
        found.update(f"{path.relative_to(out)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return found.hexdigest()


def killed(out, arguments, whole_seconds, inside, draw):
    "Whether a process was killed as asked, its folder left as it was then."
    shutil.rmtree(out, ignore_errors=True)
    child = started(out, arguments)
    if inside:  # wait for the n-th save, then a moment
        wanted, seen = draw.randint(1, 14), set()
        while running(child) and len(seen) < wanted:
            seen |= half_written(out)
            time.sleep(0.0002)
        time.sleep(draw.uniform(0, 0.012))
    else:
        time.sleep(draw.uniform(0, whole_seconds))
    os.kill(child, signal.SIGKILL)
    return ended(child) == -signal.SIGKILL and (not inside or bool(half_written(out)))


def unreadable(out):
    "What is wrong with the newest checkpoint and with the best one, if anything."
    wrong = []
    for place in [*step_folders(out)[:1], *([out / "best"] if (out / "best").exists() else [])]:
        try:
            check_checkpoint(place)
        except CheckpointError as error:
            wrong.append(str(error))
    return wrong


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="example: python tests/kill_campaign.py --kills 50 --inside 20")
    parser.add_argument("--kills", type=int, default=50, help="SIGKILLs in all (50)")
    parser.add_argument("--inside", type=int, default=20, help="how many of them inside a save (20)")
    parser.add_argument("--workers", type=int, default=None, help="load one by one, with noise, in so many processes (0: in the main one); without: by one gather a batch")
    parser.add_argument("--steps", type=int, default=36, help="steps of the training (36)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    arguments = parser.parse_args(argv)
    draw, counts = random.Random(arguments.seed), {"kills": 0, "inside": 0, "equal": 0, "unreadable": 0, "misses": 0}
    began, steps_found = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="fvlm-kills-") as folder:
        whole = Path(folder) / "whole"
        start = time.monotonic()
        if ended(started(whole, arguments)):
            raise SystemExit(whole.with_suffix(".txt").read_text())
        whole_seconds, expected = time.monotonic() - start, digest(whole)
        while counts["kills"] < arguments.kills:
            inside = counts["inside"] < arguments.inside and counts["kills"] % 5 < 2 or arguments.kills - counts["kills"] <= arguments.inside - counts["inside"]
            out = Path(folder) / f"trial{counts['kills']}"
            if not killed(out, arguments, whole_seconds, inside, draw):
                counts["misses"] += 1
                continue
            counts["kills"] += 1
            counts["inside"] += bool(half_written(out))
            counts["unreadable"] += bool(wrong := unreadable(out))
            steps_found.append(int(step_folders(out)[0].name[5:]) if step_folders(out) else 0)
            code = ended(started(out, arguments))
            same = code == 0 and digest(out) == expected and not half_written(out)
            counts["equal"] += same
            if wrong or not same:
                print(f"trial {counts['kills']}: killed after step {steps_found[-1]}, exit {code}, {'equal' if same else 'DIFFERENT'} {wrong}\n{out.with_suffix('.txt').read_text()}", flush=True)
            shutil.rmtree(out)
    counts |= {"seconds": round(time.monotonic() - began, 1), "sha256": expected, "found_at_steps": sorted(set(steps_found))}
    print(json.dumps(counts) if arguments.json else
          f"{counts['equal']} of {counts['kills']} killed runs ended like the one that was not ({expected[:16]}); {counts['inside']} kills inside a save, "
          f"{counts['unreadable']} unreadable checkpoints, {counts['seconds']} s; found at steps {counts['found_at_steps']}")
    return 0 if counts["equal"] == counts["kills"] and not counts["unreadable"] and counts["inside"] >= arguments.inside else 1


if __name__ == "__main__":
    raise SystemExit(main())
