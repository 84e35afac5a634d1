"Going on: the same bits as a run that was never stopped, from the newest good checkpoint, or a refusal that says why."
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fvlm.core import InputError
from fvlm.training import checkpoints
from fvlm.training.batches import LoadingError, data_fingerprint, draws_kept, random_states, seed_draws, set_random_states, worker_deaths_named
from fvlm.training.checkpoints import CheckpointError, CheckpointMismatch, CheckpointWarning, load_checkpoint, save_checkpoint
from fvlm.training.live_training import LiveTraining
from fvlm.training.loop import TrainingWarning, train
from fvlm.training.run_checkpoints import only_writer, step_folder, step_folders
from fvlm.training.steps import TrainConfig, TrainingError, batch_parts

sys.path.append(str(Path(__file__).parent))
from test_loop import CONFIG, DATA, Fast, Items, Net, run, same  # noqa: E402  (the little net and its data)

SAVING = dataclasses.replace(CONFIG, save_every=2, ema_decay=0.8)


class Noisy(Items):
    "Items with noise from all three generators."

    def __getitem__(self, i):
        item = super().__getitem__(i)
        return {**item, "x": item["x"] + 0.1 * (random.random() + float(np.random.rand()) + float(torch.rand(())))}


def all_states():
    return random.getstate(), [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()], torch.get_rng_state().tolist()


def stop_at(step):
    return [lambda event: event.step == step]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# --- the same bits ---------------------------------------------------------------------------------------------------

def test_four_kills():
    "A sample of `python tests/kill_campaign.py`: real SIGKILLs, half of them inside a save."
    done = subprocess.run([sys.executable, Path(__file__).with_name("kill_campaign.py"), "--kills", "4", "--inside", "2", "--steps", "21", "--json"],
                          capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(done.stdout)
    assert counts["equal"] == counts["kills"] == 4 and counts["inside"] >= 2 and counts["unreadable"] == 0


@pytest.mark.parametrize("stopped_with, going_on_with", [(0, 0), (0, 2), (2, 0), (2, 2)])
def test_noise_of_the_data_goes_on_mid_epoch(tmp_path, stopped_with, going_on_with):
    "The draws of a sample are keyed by step and sample: neither the seam nor the number of loading processes shows."
    data = {"train": Noisy(), "val": DATA["val"]}
    model, whole = run(SAVING, data=data, out=tmp_path / "whole")
    config = dataclasses.replace(SAVING, num_workers=stopped_with)
    run(config, data=data, out=tmp_path / "cut", callbacks=stop_at(5))
    resumed, rest = run(dataclasses.replace(SAVING, num_workers=going_on_with), model=Net(seed=5), data=data, out=tmp_path / "cut", resume="auto")
    assert same(model, resumed) and rest.history == whole.history
    for name in ("model", "optimizer", "ema", "state"):
        assert (whole.last_checkpoint / f"{name}.safetensors").read_bytes() == (rest.last_checkpoint / f"{name}.safetensors").read_bytes()


def test_noise_differs_between_steps_samples_and_seeds():
    class Kept(Noisy):
        def __getitem__(self, i):
            drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
            return Items.__getitem__(self, i)

    drawn = []
    run(data={"train": Kept()})
    assert len(set(drawn)) == len(drawn) == 120
    first, drawn = drawn, []
    run(dataclasses.replace(CONFIG, seed=1), data={"train": Kept()})
    assert not set(first) & set(drawn)


def test_auto_begins_where_there_is_nothing_and_ends_where_all_is_done(tmp_path):
    model, whole = run(SAVING)
    fresh, result = run(SAVING, out=tmp_path / "run", resume="auto")
    assert same(model, fresh) and result.history == whole.history
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name not in ("record.json", ".writer")}
    done, again = run(SAVING, model=Net(seed=4), out=tmp_path / "run", resume="auto")
    assert same(model, done) and again.history == whole.history and again.best == whole.best and again.stopped == "done"
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name not in ("record.json", ".writer")}


def test_a_run_that_patience_ended_does_not_go_on(tmp_path):
    config = dataclasses.replace(CONFIG, epochs=50, learning_rate=0.0, patience=2, save_every=3)
    _, whole = run(config, model=Net(norm=False), out=tmp_path)
    _, again = run(config, model=Net(norm=False), out=tmp_path, resume="auto")
    assert whole.stopped == again.stopped == "patience" and again.history == whole.history


def test_the_generators_of_a_checkpoint_come_back(tmp_path):
    "Also those that a callback draws from."
    _, cut = run(SAVING, out=tmp_path, callbacks=stop_at(5))
    states = load_checkpoint(cut.last_checkpoint).state["random"]
    with draws_kept():
        set_random_states(states)
        first = random.random(), float(np.random.rand()), float(torch.rand(()))
        seed_draws(SAVING.seed, "other")
        set_random_states(states)
        assert first == (random.random(), float(np.random.rand()), float(torch.rand(())))


def test_generators_are_given_back():
    model, data = Net(), {"train": Noisy()}
    random.seed(3), np.random.seed(3)
    before = all_states()
    run(model=model, data=data)
    assert before == all_states()


@pytest.mark.parametrize("change", [lambda s: s.pop("numpy"), lambda s: s.update(python=3), lambda s: s["python"].update(state=torch.zeros(5)), lambda s: s.update(torch=torch.zeros(3)),
                                    lambda s: s["numpy"].update(position=-9), lambda s: s["numpy"].update(state=torch.zeros(4))])
def test_states_that_are_none_change_nothing(change):
    states, before = random_states(), all_states()
    change(states)
    with pytest.raises(InputError, match="random states"):
        set_random_states(states)
    assert before == all_states()


# --- which checkpoint ------------------------------------------------------------------------------------------------

def test_the_last_k_are_kept(tmp_path):
    run(SAVING, out=tmp_path / "two")
    assert [p.name for p in step_folders(tmp_path / "two")] == ["step-00000009", "step-00000008"]
    run(SAVING, out=tmp_path / "four", keep=4, callbacks=stop_at(7))
    assert [int(p.name[5:]) for p in step_folders(tmp_path / "four")] == [7, 6, 4, 2]
    run(SAVING, out=tmp_path / "four", keep=3, resume="auto")
    assert [int(p.name[5:]) for p in step_folders(tmp_path / "four")] == [9, 8, 7]
    run(dataclasses.replace(SAVING, epochs=2), out=tmp_path / "four", keep=3)
    assert [int(p.name[5:]) for p in step_folders(tmp_path / "four")] == [6, 4, 2], "another run's are gone"
    assert not list((tmp_path / "four").glob(".*.*")), "nothing half written or half removed"


def test_bad_ones_are_passed_over_and_named(tmp_path):
    model, whole = run(SAVING, out=tmp_path / "whole")
    run(SAVING, out=tmp_path / "run", keep=4, callbacks=stop_at(7))
    flip(tmp_path / "run" / "step-00000007" / "optimizer.safetensors")
    (tmp_path / "run" / "step-00000006" / "state.json").unlink()
    resumed = Net(seed=5)
    with pytest.warns(CheckpointWarning) as told:
        _, rest = run(SAVING, model=resumed, out=tmp_path / "run", resume="auto")
    text = "\n".join(str(w.message) for w in told)
    assert "step-00000007/optimizer.safetensors: was changed" in text and "step-00000006: state.json is missing" in text and "Going on from step-00000004" in text
    assert same(model, resumed) and rest.history == whole.history
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()
    assert [p.name for p in step_folders(tmp_path / "run")] == ["step-00000009", "step-00000008"]


def test_all_bad_is_an_error_not_a_new_beginning(tmp_path):
    run(SAVING, out=tmp_path)
    for place in step_folders(tmp_path):
        flip(place / "model.safetensors")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints is good: .*step-00000009.*step-00000008"):
        run(SAVING, out=tmp_path, resume="auto")


def test_renamed_and_linked_ones_are_bad(tmp_path):
    run(SAVING, out=tmp_path, callbacks=stop_at(5))
    step_folder(tmp_path, 5).rename(step_folder(tmp_path, 8))
    with pytest.warns(CheckpointWarning, match="step-00000008.*it holds step 5.*Going on from step-00000004"):
        run(SAVING, out=tmp_path, resume="auto", callbacks=stop_at(5))
    step_folder(tmp_path, 5).rename(tmp_path / "elsewhere")
    step_folder(tmp_path, 5).symlink_to(tmp_path / "elsewhere")
    with pytest.warns(CheckpointWarning, match="a link to elsewhere"):
        run(SAVING, out=tmp_path, resume="auto", callbacks=stop_at(5))


class Wide(Net):
    "Another model of another shape that says nothing about itself."

    def __init__(self):
        super().__init__()
        self.first, self.last, self.frozen, self.norm = nn.Linear(6, 9), nn.Linear(9, 2), nn.Linear(6, 9).requires_grad_(False), nn.BatchNorm1d(9)


Wide.__name__ = "Net"  # as if the class had been edited


def test_what_belongs_to_another_run_is_refused_with_the_difference(tmp_path):
    _, cut = run(SAVING, out=tmp_path, callbacks=stop_at(5))
    for how in ("auto", cut.last_checkpoint):
        with pytest.raises(CheckpointMismatch, match=r"config.train.learning_rate: 0.02 here, 0.01 in the checkpoint; config.train.seed: 1 here, 0 in"):
            run(dataclasses.replace(SAVING, learning_rate=0.02, seed=1), out=tmp_path, resume=how)
        with pytest.raises(CheckpointMismatch, match="config.data.train: 20 here, 40"):
            run(SAVING, data={"train": Fast(20), "val": DATA["val"]}, out=tmp_path, resume=how)
        with pytest.raises(CheckpointMismatch, match="config.data_fingerprint.train: '.*' here, '.*' in the checkpoint$"):
            run(SAVING, data={"train": Fast(seed=9), "val": DATA["val"]}, out=tmp_path, resume=how)
        with pytest.raises(CheckpointMismatch, match="first.weight has shape"):
            run(SAVING, model=Wide(), out=tmp_path, resume=how)
        with pytest.raises(CheckpointMismatch, match="config.model.class: 'Other' here, 'Net'"):
            run(SAVING, model=type("Other", (Net,), {})(), out=tmp_path, resume=how)
    assert step_folders(tmp_path)[0] == cut.last_checkpoint
    run(SAVING, out=tmp_path, resume="auto")


def test_another_number_of_threads_goes_on_with_a_warning(tmp_path):
    run(SAVING, out=tmp_path, callbacks=stop_at(5))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        with pytest.warns(CheckpointWarning, match=f"threads was {before}, is {before + 1}.*last bits may differ"):
            run(SAVING, out=tmp_path, resume="auto")
    finally:
        torch.set_num_threads(before)


def test_nothing_is_said_when_nothing_is_wrong(tmp_path):
    run(SAVING, out=tmp_path, callbacks=stop_at(5))
    with warnings.catch_warnings():
        warnings.simplefilter("error", CheckpointWarning)
        run(SAVING, out=tmp_path, resume="auto")


def test_auto_needs_a_folder_and_keep_a_number():
    with pytest.raises(InputError, match="resume.*out"):
        run(resume="auto")
    with pytest.raises(InputError, match="keep"):
        run(keep=0)


def test_what_a_checkpoint_holds(tmp_path):
    _, cut = run(SAVING, out=tmp_path, callbacks=stop_at(5))
    found = load_checkpoint(cut.last_checkpoint)
    assert {p.stem for p in cut.last_checkpoint.iterdir()} == {"model", "optimizer", "ema", "state", "manifest"}
    assert found.state["step"] == 5 and found.state["position"] == {"epoch": 1, "batch": 2} and set(found.state["random"]) == {"python", "numpy", "torch", "cuda"}
    assert found.state["environment"]["threads"] == torch.get_num_threads() and "git_commit" in found.state["environment"]
    assert {**found.config["train"], **found.state["free"]} == dataclasses.asdict(SAVING)
    assert found.config["train"]["seed"] == 0 and found.config["model"] == {"class": "Net"} and found.config["data"] == {"train": 40, "val": 11}
    assert found.config["data_fingerprint"]["train"] == data_fingerprint(DATA["train"])


def test_fingerprints():
    assert data_fingerprint(Fast()) == data_fingerprint(Fast()) != data_fingerprint(Fast(seed=1))
    assert data_fingerprint(Fast(41)) != data_fingerprint(Fast(40)) and data_fingerprint(Noisy()) == data_fingerprint(Noisy())
    known = Fast()
    known.fingerprint = "abc"
    assert data_fingerprint(known) == "abc"


# --- things that fail ------------------------------------------------------------------------------------------------

@pytest.fixture
def small_disk(tmp_path):
    "A file system of 300 kB, if we may mount one."
    place = tmp_path / "small"
    place.mkdir()
    if not hasattr(os, "geteuid") or os.geteuid() or not shutil.which("mount") or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_leaves_the_last_checkpoint_good(small_disk):
    model, whole = run(SAVING)

    def fill(event):
        if event.step == 5:
            with open(small_disk / "other", "wb", buffering=0) as file, pytest.raises(OSError, match="space"):
                while True:
                    file.write(bytes(1024))

    with pytest.raises((CheckpointError, TrainingError), match="space|written"):
        run(SAVING, out=small_disk / "run", callbacks=[fill])
    assert step_folders(small_disk / "run")[0].name == "step-00000004"
    assert not list((small_disk / "run").glob(".*.part"))
    (small_disk / "other").unlink()
    resumed, rest = run(SAVING, model=Net(seed=5), out=small_disk / "run", resume="auto")
    assert same(model, resumed) and rest.history == whole.history


@pytest.mark.parametrize("what", ["save_file", "fsync", "rename"])
def test_a_write_that_fails_leaves_the_last_checkpoint_good(tmp_path, monkeypatch, what):
    "The same where nobody can mount: the error comes out of the real path of writing."
    import safetensors.torch

    def full(*arguments, **named):
        if what == "save_file":
            raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        raise OSError(28, "No space left on device")

    def break_it(event):
        if event.step == 5:
            monkeypatch.setattr(*((safetensors.torch, "save_file") if what == "save_file" else (os, what)), full)

    with pytest.raises(CheckpointError, match="could not be written.*No space left.*what was there before"):
        run(SAVING, out=tmp_path, callbacks=[break_it])
    monkeypatch.undo()
    assert [p.name for p in step_folders(tmp_path)] == ["step-00000004", "step-00000002"] and not list(tmp_path.glob(".*.part"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", CheckpointWarning)
        run(SAVING, out=tmp_path, resume="auto")


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    def block(event):
        if event.step == 5:
            (tmp_path / "log.jsonl").unlink()
            (tmp_path / "log.jsonl").mkdir()

    with pytest.raises(TrainingError, match="log.jsonl: the log cannot be written after step 6"):
        run(SAVING, out=tmp_path, callbacks=[block])
    assert step_folders(tmp_path)[0].name == "step-00000004"


def test_two_writers_of_one_folder(tmp_path):
    code = "import sys, time\nfrom fvlm.training.run_checkpoints import only_writer\nwith only_writer(sys.argv[1]):\n    print('in', flush=True)\n    time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "in\n"
        with pytest.raises(CheckpointError, match="another process is training into this folder"):
            run(out=tmp_path)
    finally:
        other.kill(), other.wait()
    run(out=tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot be written"):
        run(out=tmp_path / "file" / "run")


def test_what_a_killed_save_left_is_removed(tmp_path):
    for name in (".step-00000004.abc.part", ".step-00000002.removed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("x")
    (tmp_path / ".log.jsonl.part").write_text("x")
    with only_writer(tmp_path):
        assert [p.name for p in tmp_path.iterdir()] == [".writer"]


class Dying(Items):
    "A loading process that kills itself at sample 30."

    def __getitem__(self, i):
        if i == 30 and torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(i)


def test_a_killed_loading_process_is_named_and_leaves_a_good_checkpoint(tmp_path):
    began = time.monotonic()
    with pytest.raises(LoadingError, match=r"data set Dying: the loading process \(pid.* \d+\).*num_workers"):
        run(dataclasses.replace(SAVING, num_workers=2), data={"train": Dying(), "val": DATA["val"]}, out=tmp_path)
    assert time.monotonic() - began < 30
    for place in step_folders(tmp_path):
        load_checkpoint(place)


@pytest.mark.parametrize("words", ["DataLoader worker (pid 41) is killed by signal: Killed. ", "DataLoader worker (pid(s) 41, 42) exited unexpectedly"])
def test_both_ways_in_which_torch_reports_a_death(words):
    with pytest.raises(LoadingError, match="data set Items: the loading process .*41.*(Killed|unexpectedly);"), worker_deaths_named(Items()):
        raise RuntimeError(words)
    with pytest.raises(RuntimeError, match="^other$"), worker_deaths_named(Items()):
        raise RuntimeError("other")


def test_an_error_of_the_data_set_stays_its_own():
    class Wrong(Items):
        def __getitem__(self, i):
            raise RuntimeError("no such frame")

    with pytest.raises(RuntimeError, match="no such frame") as found:
        run(dataclasses.replace(CONFIG, num_workers=1), data={"train": Wrong()})
    assert not isinstance(found.value, LoadingError)


# --- accumulation, skipping ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("parts", [2, 3, 16])
def test_accumulation_equals_the_big_batch(parts):
    config = dataclasses.replace(CONFIG, ema_decay=0.9)  # 40 samples in batches of 16: the last has 8
    big, whole = run(config, model=Net(dropout=0.0, norm=False))
    small, result = run(dataclasses.replace(config, accumulate=parts), model=Net(dropout=0.0, norm=False))
    for a, b in zip(big.state_dict().values(), small.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    for a, b in zip(whole.history, result.history):
        assert a.keys() == b.keys() and all(a[k] == pytest.approx(b[k], rel=1e-5) for k in a if k != "split")


def test_accumulation_goes_on_bit_for_bit(tmp_path):
    config = dataclasses.replace(SAVING, accumulate=3, precision="bf16")
    model, whole = run(config)
    run(config, out=tmp_path, callbacks=stop_at(4))
    resumed, rest = run(config, model=Net(seed=5), out=tmp_path, resume="auto")
    assert same(model, resumed) and rest.history == whole.history


def test_parts_divide_what_has_one_entry_a_sample():
    batch = {"x": torch.arange(10).view(5, 2), "name": list("abcde"), "grid": torch.zeros(7), "scale": torch.tensor(2.0), "note": "hello"}
    parts = list(batch_parts(batch, torch.arange(5), 2))
    assert [p["x"].tolist() for p, _ in parts] == [[[0, 1], [2, 3], [4, 5]], [[6, 7], [8, 9]]] and [p["name"] for p, _ in parts] == [["a", "b", "c"], ["d", "e"]]
    assert all(p["grid"] is batch["grid"] and p["scale"] is batch["scale"] and p["note"] == "hello" for p, _ in parts) and [s for _, s in parts] == [0.6, 0.4]


def test_skipping_leaves_a_bad_batch_out_and_says_so(tmp_path):
    bad = Fast()
    bad.x[21, 3] = float("nan")
    config = dataclasses.replace(SAVING, non_finite="skip")
    model = Net()
    with pytest.warns(TrainingWarning, match=r"skipped step \d.*batch of samples.*input 'x' holds 1 NaN or Inf.*sample 21 of the data set"):
        _, result = run(config, model=model, data={"train": bad, "val": DATA["val"]}, out=tmp_path / "whole")
    skipped = [row for row in result.history if row["split"] == "skipped"]
    assert len(skipped) == 3 and all("sample 21" in row["reason"] for row in skipped), "once an epoch"
    assert all(torch.isfinite(t).all() for t in model.state_dict().values()) and result.stopped == "done"
    with pytest.warns(TrainingWarning):
        run(config, data={"train": bad, "val": DATA["val"]}, out=tmp_path / "cut", callbacks=stop_at(skipped[1]["step"]))
        resumed, rest = run(config, model=Net(seed=5), data={"train": bad, "val": DATA["val"]}, out=tmp_path / "cut", resume="auto")
    assert same(model, resumed) and rest.history == result.history


def test_a_skipped_step_moves_nothing():
    class BadAt(Net):
        def loss(self, outputs, batch):
            terms = super().loss(outputs, batch)
            return {**terms, "loss": terms["loss"] * float("nan")} if self.training else terms

    model, fresh = BadAt(), BadAt()
    with pytest.warns(TrainingWarning):
        _, result = run(dataclasses.replace(CONFIG, non_finite="skip", log_every=1, weight_decay=0.5), model=model)
    assert same(model, fresh) and sum(row["split"] == "skipped" for row in result.history) == 9 and not any(row["split"] == "train" for row in result.history)


def test_skipping_has_an_end(tmp_path):
    bad = Fast()
    bad.x[:] = float("inf")
    with pytest.raises(TrainingError, match="the 10th step in a row"), pytest.warns(TrainingWarning):
        run(dataclasses.replace(CONFIG, epochs=9, non_finite="skip"), data={"train": bad})


# --- in a thread, watched ----------------------------------------------------------------------------------------------

def test_a_watched_training_gives_the_same_bits_and_stops_soon(tmp_path):
    model, whole = run(SAVING)
    watched = Net()
    live = LiveTraining(watched, DATA, SAVING, device="cpu", every=0.05)
    box = live.widget
    assert "application/vnd.jupyter.widget-view+json" in live._repr_mimebundle_()
    assert live.start().wait(60).history == whole.history and same(model, watched)
    assert box.children[1].value.startswith("done after") and box.children[0].children[1].disabled and not live.running
    long = LiveTraining(Net(), DATA, dataclasses.replace(SAVING, epochs=10**6, save_every=None, val_every=None), out=tmp_path, device="cpu").start()
    while long._last is None:
        time.sleep(0.005)
    with pytest.raises(TimeoutError, match="at step"):
        long.wait(0.01)
    began = time.monotonic()
    assert long.stop(10) and time.monotonic() - began < 5, "two seconds, on a machine that is not busy"
    result = long.wait()
    assert result.stopped == "callback" and load_checkpoint(result.last_checkpoint).state["step"] == result.history[-1]["step"]
    with pytest.raises(InputError, match="begun already"):
        long.start()


# --- other data --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("joined", [False, True])
def test_windows_that_differ_in_one_row_or_rule_are_other_data(tmp_path, joined):
    from fvlm.encoders.embedding_windows import EmbeddingWindows
    from fvlm.models.sc_vfp import SCVFP, SCVFPConfig
    from fvlm.training.embedding_splits import JoinedWindows

    def windows(row=0.0, **arguments):
        rows = np.random.default_rng(0).standard_normal((600, 16)).astype("float32")
        rows[333, 3] += row  # not a row that a sample of a few windows would meet
        made = EmbeddingWindows([rows], **arguments)
        return JoinedWindows([made]) if joined else made

    def trained(data, resume=None):
        return train(SCVFP(SCVFPConfig.preset("tiny"), seed=0), {"train": data}, TrainConfig(steps=2, batch_size=4), out=tmp_path / "run", resume=resume, progress=False, device="cpu")

    trained(windows())
    for other in (windows(row=0.5), windows(gap=3), windows(ranges=[[(0, 599)]])):
        with pytest.raises(CheckpointMismatch):
            trained(other, resume="auto")
    with pytest.raises(CheckpointMismatch, match="data_fingerprint"):
        trained(windows(row=0.5), resume="auto")
    assert trained(windows(), resume="auto").stopped == "done"


# --- twice -----------------------------------------------------------------------------------------------------------

def test_the_same_recipe_and_seed_twice(tmp_path):
    "Everything that two runs leave is equal, but for times."
    from fvlm.encoders.embedding_windows import EmbeddingWindows
    from fvlm.models.sc_vfp import SCVFP, SCVFPConfig
    from fvlm.training.recipes import sc_vfp

    rows = [np.random.default_rng(i).standard_normal((40, 16)).astype("float32") for i in range(3)]
    training = dataclasses.replace(sc_vfp().training, steps=12, batch_size=8, val_every=4, save_every=5, precision="bf16")
    for name in ("a", "b"):
        model = SCVFP(SCVFPConfig.preset("tiny", dropout=0.1, input_noise=0.1), seed=training.seed)
        train(model, {"train": EmbeddingWindows(rows[:2]), "val": EmbeddingWindows(rows[2:])}, training, out=tmp_path / name, progress=False, device="cpu")
        torch.rand(3), random.random(), np.random.rand()
    a, b = ({p.relative_to(tmp_path / name).as_posix(): p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()} for name in "ab")
    records = [json.loads(files.pop("record.json")) for files in (a, b)]
    assert all(record.pop("timing") for record in records) and records[0] == records[1]
    assert a == b and {"log.jsonl", "best/model.safetensors", "step-00000012/optimizer.safetensors"} <= set(a)


@pytest.mark.parametrize("wrong", [{"accumulate": 0}, {"accumulate": 1.5}, {"non_finite": "ignore"}, {"monitor": 3}, {"restore_best": "yes"}, {"learning_rates": [1]}, {"learning_rates": {3: 1.0}}])
def test_new_fields_are_checked(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        TrainConfig(**{"epochs": 3, **wrong})


def test_a_save_is_fsynced_before_it_is_renamed(tmp_path, monkeypatch):
    calls, fsync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append(("fsync", os.readlink(f"/proc/self/fd/{handle}") if Path("/proc/self/fd").exists() else "")), fsync(handle))[1])
    monkeypatch.setattr(os, "rename", lambda a, b: (calls.append(("rename", str(b))), rename(a, b))[1])
    save_checkpoint(step_folder(tmp_path, 1), Net(), state={"t": torch.ones(2)})
    if not calls[0][1]:
        pytest.skip("no /proc here")
    kinds = [kind for kind, _ in calls]
    at = kinds.index("rename")
    synced = " ".join(name for _, name in calls[:at])
    assert kinds.count("rename") == 1 and calls[at][1].endswith("step-00000001")
    assert all(name in synced for name in ("model.safetensors", "state.safetensors", ".state.json", ".manifest.json")) and calls[at - 1][1].endswith(".part"), "the folder last"
    assert calls[at + 1] == ("fsync", str(tmp_path)), "and its parent after the rename"
    assert checkpoints.check_checkpoint(step_folder(tmp_path, 1))
