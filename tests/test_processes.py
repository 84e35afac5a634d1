"""Two processes are one process with half the work each: the same weights, every sample once, nobody left waiting."""
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fvlm.training.batches import EpochBatches

SCRIPT = Path(__file__).with_name("two_processes.py")
sys.path.insert(0, str(SCRIPT.parent))
# TORCH_DISABLE_SHARE_RDZV_TCP_STORE: without it restarted workers read the addresses of the dead ones (pytorch issue 135712).
ENVIRONMENT = {**{k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def launched(*arguments, restarts=0, timeout=240):
    "The script as two processes under torchrun."
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts), str(SCRIPT), *map(str, arguments)],
        capture_output=True, text=True, timeout=timeout, env=ENVIRONMENT)


def weights(folder):
    "The weights of the newest step checkpoint."
    return load_file(sorted(folder.glob("step-*"))[-1] / "model.safetensors")


def furthest(a, b):
    return max(float((a[name].float() - b[name].float()).abs().max()) for name in a)


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    "The run of one process."
    from two_processes import run

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("alone") / "run"
    run(out)
    yield out
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    "The run of two processes."
    out = tmp_path_factory.mktemp("together") / "run"
    done = launched(out)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.parametrize("n, batch, world", [(101, 16, 2), (7, 4, 2), (16, 16, 4), (33, 5, 3)])
def test_every_sample_is_counted_once_an_epoch(n, batch, world):
    steps = -(-n // batch)
    whole = [list(indices) for indices in EpochBatches(n, batch, 0, 0, steps, 0, 1)]
    parts = [[list(indices) for indices in EpochBatches(n, batch, 0, 0, steps, rank, world)] for rank in range(world)]
    assert sorted(int(i) for indices in whole for i in indices) == list(range(n))
    for step in range(steps):
        shared = [int(i) for part in parts for i in part[step]]
        assert set(shared) == {int(i) for i in whole[step]}
        assert len(shared) == len(whole[step]) or len(whole[step]) < world  # fewer samples than processes: somebody repeats one


def test_two_processes_end_where_one_does(alone, together):
    assert furthest(weights(alone), weights(together)) < 1e-9
    one, two = log(alone), log(together)
    assert [(row["split"], row["step"]) for row in one] == [(row["split"], row["step"]) for row in two]
    assert [row["loss"] for row in one if row["split"] == "val"] == pytest.approx([row["loss"] for row in two if row["split"] == "val"], abs=1e-9)


def test_in_float32_two_processes_stay_within_1e_5_of_one(alone, tmp_path):
    from two_processes import run

    run(tmp_path / "alone", single=True)
    done = launched(tmp_path / "together", "--single")
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = weights(tmp_path / "alone"), weights(tmp_path / "together")
    assert next(iter(one.values())).dtype == torch.float32 and furthest(one, two) < 1e-5


def test_saved_by_two_goes_on_as_one(alone, together, tmp_path):
    from two_processes import run

    middle = sorted(together.glob("step-*"))[2]
    assert 0 < int(middle.name.split("-")[1]) < 24
    model, result = run(tmp_path / "on", resume=middle)
    assert furthest(weights(alone), weights(tmp_path / "on")) < 1e-9 and len(log(tmp_path / "on")) == len(log(alone))


def test_stopped_and_gone_on_by_two_is_the_run_of_two(together, tmp_path):
    """From the middle, with as many processes as before: every bit of log, weights and moments.

    The checkpoint lies where a row of the log ends. Between two rows it holds the steps since the last one as means over processes in float32, and the
    next row, a mean of means in another order, may differ in its last bits; weights do not depend on the log."""
    middle = sorted(together.glob("step-*"))[2]
    (tmp_path / "run").mkdir()
    shutil.copytree(middle, tmp_path / "run" / middle.name)
    done = launched(tmp_path / "run")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == (together / "log.jsonl").read_bytes()
    last = sorted(together.glob("step-*"))[-1].name
    for name in ("model", "optimizer", "ema", "state"):
        assert (tmp_path / "run" / last / f"{name}.safetensors").read_bytes() == (together / last / f"{name}.safetensors").read_bytes(), name


def test_a_process_that_dies_does_not_leave_the_other_waiting(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**ENVIRONMENT, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen([sys.executable, str(SCRIPT), str(tmp_path / "run"), "--die", "1", "5"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                         env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in (0, 1)]
    try:
        processes[1].wait(timeout=180)
        died = time.monotonic()
        _, said = processes[0].communicate(timeout=60)
        assert time.monotonic() - died < 60 and processes[1].returncode == -9
        assert processes[0].returncode not in (0, None) and said
    finally:
        for process in processes:
            process.kill()


def test_a_restart_goes_on_where_the_checkpoint_stands(alone, tmp_path):
    done = launched(tmp_path / "run", "--die", 1, 10, restarts=1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run.died").exists(), "nobody died, so nothing was shown"
    assert furthest(weights(alone), weights(tmp_path / "run")) < 1e-9
    steps = [row["step"] for row in log(tmp_path / "run") if row["split"] == "train"]
    assert steps == sorted(set(steps)) and steps[-1] == 24
