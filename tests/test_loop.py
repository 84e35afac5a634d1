"The loop: a pure function of model, data and configuration; stops before harm; gives everything back."
import dataclasses
import json
import math
import os
import signal
import threading

import pytest
import torch
from torch import nn

from fvlm.core import ConfigError, InputError, NonFiniteError, generator
from fvlm.training.batches import EpochBatches, evaluate, evaluating, load_batches
from fvlm.training.checkpoints import CheckpointError, load_checkpoint
from fvlm.training.loop import train
from fvlm.training.records import read_record
from fvlm.training.run_checkpoints import step_folders
from fvlm.training.steps import AveragedWeights, TrainConfig, TrainingError, first_bad_tensor, learning_rate_factor, parameter_groups


class Items:
    "40 samples, one at a time."

    def __init__(self, n=40, seed=0):
        draw = generator(seed, "items")
        self.x = torch.randn(n, 6, generator=draw)
        self.y = self.x @ torch.randn(6, 2, generator=generator(0, "truth"))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"x": self.x[i], "y": self.y[i], "name": f"clip{i}"}


class Fast(Items):
    "The same with one gather a batch."

    def batch(self, indices):
        return {"x": self.x[indices], "y": self.y[indices]}


class Net(nn.Module):
    "A net with dropout, buffers that move in forward, and a frozen part kept in evaluation mode."

    def __init__(self, seed=0, dropout=0.2, norm=True):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.Linear(8, 2)
        self.dropout, self.frozen = nn.Dropout(dropout), nn.Linear(6, 8).requires_grad_(False)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.3 * torch.randn(p.shape, generator=generator(seed, "net")))

    def forward(self, batch):
        return {"prediction": self.last(self.dropout(torch.tanh(self.norm(self.first(batch["x"]))) + self.frozen(batch["x"])))}

    def loss(self, outputs, batch):
        mse = (outputs["prediction"] - batch["y"]).square().mean()
        size = outputs["prediction"].square().mean()
        return {"loss": mse + 0.01 * size, "mse": mse, "size": size}


DATA = {"train": Fast(), "val": Fast(11, seed=1)}
CONFIG = TrainConfig(epochs=3, batch_size=16, learning_rate=0.01, log_every=2)


def run(config=CONFIG, model=None, data=DATA, **arguments):
    model = Net() if model is None else model
    return model, train(model, data, config, **{"progress": False, "device": "cpu", **arguments})


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("changes", [{}, {"ema_decay": 0.9}, {"precision": "bf16"}, {"clip_norm": None}, {"steps": 7, "epochs": None, "val_every": 3}, {"restore_best": False}])
def test_the_same_seed_gives_the_same_bits(changes):
    config = dataclasses.replace(CONFIG, **changes)
    model, result = run(config)
    torch.rand(5)
    again, second = run(config)
    assert same(model, again) and result.history == second.history and result.best == second.best
    assert not same(model, run(dataclasses.replace(config, seed=1))[0])
    assert not same(model, Net()), "it trained"
    assert torch.equal(model.frozen.weight, Net().frozen.weight), "frozen stays frozen"


def test_every_step_draws_from_its_own_stream():
    class Drawing(Net):
        def forward(self, batch):
            self.drawn = getattr(self, "drawn", []) + [float(torch.rand(()))] * self.training
            return super().forward(batch)

    first, second, other = (run(dataclasses.replace(CONFIG, seed=seed), model=Drawing())[0].drawn for seed in (0, 0, 1))
    assert first == second and len(set(first)) == 9 and not set(first) & set(other)


def test_nothing_global_changes():
    from accelerate.state import AcceleratorState, GradientState, PartialState

    model = Net()
    before = torch.get_rng_state(), torch.get_num_threads(), signal.getsignal(signal.SIGINT), dict(os.environ), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
    run(dataclasses.replace(CONFIG, precision="bf16"), model=model)
    after = torch.get_rng_state(), torch.get_num_threads(), signal.getsignal(signal.SIGINT), dict(os.environ), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    assert not PartialState._shared_state and not AcceleratorState._shared_state and not GradientState._shared_state
    assert set(vars(model)) == set(vars(Net())), "nothing is left on the model"
    assert not model.training and all(p.grad is None for p in model.parameters())


def test_after_an_error_the_world_is_as_before_too():
    from accelerate.state import PartialState

    model, handler = Net(), signal.getsignal(signal.SIGINT)
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        run(model=model, callbacks=[lambda event: 1 / 0])
    assert torch.equal(before, torch.get_rng_state()) and signal.getsignal(signal.SIGINT) is handler and not PartialState._shared_state


@pytest.mark.parametrize("workers", [0, 2])
def test_one_by_one_equals_the_fast_gather(workers):
    slow, first = run(dataclasses.replace(CONFIG, num_workers=workers), data={"train": Items(), "val": Items(11, seed=1)})
    fast, second = run()
    assert same(slow, fast) and first.history == second.history


def test_one_epoch_sees_every_sample_once_in_the_named_order():
    seen = []

    class Watched(Fast):
        def batch(self, indices):
            seen.append(indices.clone())
            return super().batch(indices)

    run(dataclasses.replace(CONFIG, epochs=2), data={"train": Watched()})
    assert sorted(torch.cat(seen[:3]).tolist()) == list(range(40)) == sorted(torch.cat(seen[3:]).tolist())
    assert torch.cat(seen[:3]).tolist() != torch.cat(seen[3:]).tolist()
    assert all(torch.equal(a, b) for a, b in zip(seen[4:], EpochBatches(40, 16, 0, first=4, last=6)))


def test_processes_share_every_batch_without_overlap():
    whole = list(EpochBatches(41, 8, seed=3, last=9))
    parts = [list(EpochBatches(41, 8, seed=3, last=9, rank=r, world=3)) for r in range(3)]
    for step, indices in enumerate(whole):
        assert sorted(indices.tolist()) == sorted(i for part in parts for i in part[step].tolist())


@pytest.mark.parametrize("at", [1, 3, 5, 6, 8])
@pytest.mark.parametrize("changes", [{}, {"ema_decay": 0.8, "val_every": 2}, {"learning_rates": {"first": 0.1}, "precision": "bf16", "warmup_fraction": 0.5, "accumulate": 2, "clip_norm": 0.1}])
def test_going_on_after_a_stop_is_bit_equal(tmp_path, at, changes):
    config = dataclasses.replace(CONFIG, **changes)
    model, whole = run(config, out=tmp_path / "whole")
    _, cut = run(config, out=tmp_path / "cut", callbacks=[lambda event: event.step == at])
    resumed, rest = run(config, model=Net(seed=5), out=tmp_path / "cut", resume=cut.last_checkpoint)
    assert cut.stopped == "callback" and rest.stopped == "done"
    assert rest.history == whole.history and rest.best == whole.best
    same_but_frozen = [n for n in model.state_dict() if not torch.equal(model.state_dict()[n], resumed.state_dict()[n])]
    assert not same_but_frozen
    assert (tmp_path / "whole" / "log.jsonl").read_bytes() == (tmp_path / "cut" / "log.jsonl").read_bytes()
    for name in ("best", "step-00000009"):
        assert (tmp_path / "whole" / name / "manifest.json").read_bytes() == (tmp_path / "cut" / name / "manifest.json").read_bytes()


def test_resume_refuses_what_is_not_its_own(tmp_path):
    _, cut = run(out=tmp_path / "a", callbacks=[lambda event: event.step == 4])
    for changes, word in (({"learning_rate": 0.02}, "learning_rate: 0.02 here, 0.01"), ({"epochs": 4}, "epochs")):
        with pytest.raises(CheckpointError, match=word):
            run(dataclasses.replace(CONFIG, **changes), resume=cut.last_checkpoint)
    with pytest.raises(CheckpointError, match="data.train: 20 here, 40"):
        run(data={"train": Fast(20), "val": DATA["val"]}, resume=cut.last_checkpoint)
    with pytest.raises(CheckpointError, match="optimizer"):
        run(resume=cut.best_checkpoint)
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        run(resume=tmp_path / "nowhere")


def test_what_is_written(tmp_path):
    model, result = run(out=tmp_path / "out", record={"root": tmp_path / "results", "study": "s", "run": "r", "conventions": {"val_mse": "mean"}, "config": {"arm": "net"}})
    rows = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert rows == result.history and [r["step"] for r in rows if r["split"] == "val"] == [3, 6, 9]
    assert {"loss", "mse", "size", "grad_norm", "learning_rate", "step", "epoch", "split"} == set(rows[0])
    assert result.best["loss"] == result.best_metric == min(r["loss"] for r in rows if r["split"] == "val")
    fresh = Net(seed=7)
    load_checkpoint(result.best_checkpoint, fresh)
    assert same(model, fresh), "the model ends with the best weights"
    record = read_record(result.record)
    assert result.record == tmp_path / "results" / "s" / "r.json" and record.metrics["val_loss"] == result.best_metric
    assert record.config["train"]["batch_size"] == 16 and record.config["arm"] == "net" and record.config["best_step"] == result.best["step"]
    assert record.parameters == sum(p.numel() for p in Net().parameters() if p.requires_grad)
    assert set(record.timing) == {"data", "validation", "seconds", "finished"}
    x, y = result.curve("val", "mse")
    assert x == [3, 6, 9] and len(y) == 3


def test_two_runs_leave_equal_records_but_for_times(tmp_path):
    texts = []
    for name in ("a", "b"):
        _, result = run(out=tmp_path / name)
        content = json.loads(result.record.read_text())
        content.pop("timing")
        texts.append(content)
    assert texts[0] == texts[1]


def test_validation_is_the_mean_over_samples_without_dropout():
    model, result = run(dataclasses.replace(CONFIG, batch_size=4))  # 11 samples: the last batch is smaller
    by_sample = evaluate(model, DATA["val"], metrics={"mse": lambda o, b: (o["prediction"] - b["y"]).square().mean(1)}, batch_size=5)
    assert by_sample["mse"].mean() == pytest.approx(result.best["mse"], rel=1e-5)


def test_averaged_weights_are_the_ones_judged_and_kept(tmp_path):
    model, result = run(dataclasses.replace(CONFIG, ema_decay=0.5, restore_best=False), out=tmp_path)
    average = {n: torch.zeros_like(p) for n, p in model.named_parameters() if p.requires_grad}
    load_checkpoint(result.last_checkpoint, ema=average)
    assert all(torch.equal(average[n], p) for n, p in model.named_parameters() if p.requires_grad)


def test_bf16_is_not_fp32_but_near():
    a, b = run()[1].history[-1]["loss"], run(dataclasses.replace(CONFIG, precision="bf16"))[1].history[-1]["loss"]
    assert a != b and a == pytest.approx(b, rel=0.1)


def test_equals_a_loop_by_hand():
    model, _ = run(dataclasses.replace(CONFIG, steps=5, epochs=None, restore_best=False), model=Net(dropout=0.0, norm=False))
    hand = Net(dropout=0.0, norm=False)
    trained = [p for p in hand.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.01}, {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}])
    for step, indices in enumerate(EpochBatches(40, 16, 0, last=5)):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * learning_rate_factor(step, 5)
        batch = DATA["train"].batch(indices)
        optimizer.zero_grad()
        hand.loss(hand(batch), batch)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    for (name, a), b in zip(hand.state_dict().items(), model.state_dict().values()):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("fast", [True, False])
def test_a_bad_input_stops_before_the_weights(tmp_path, value, fast):
    bad = (Fast if fast else Items)()
    bad.x[21, 3] = value
    model = Net()
    with pytest.raises(TrainingError, match=r"step \d+ \(epoch \d\).*input 'x' holds 1 NaN or Inf.*sample 21 of the data set"):
        run(model=model, data={"train": bad, "val": DATA["val"]}, out=tmp_path)
    assert all(torch.isfinite(t).all() for t in model.state_dict().values()), "neither weights nor running statistics"
    for place in [*tmp_path.glob("best"), *step_folders(tmp_path)]:
        load_checkpoint(place, Net())


def test_a_bad_validation_input_is_named():
    bad = Fast(11)
    bad.x[4, 0] = math.nan
    with pytest.raises(TrainingError, match="validation after step 3: input 'x'.*sample 4 "):
        run(data={"train": DATA["train"], "val": bad})


class Odd(Net):
    "A net whose loss is given."

    def __init__(self, change):
        super().__init__(norm=False)
        self.change = change

    def loss(self, outputs, batch):
        return self.change(super().loss(outputs, batch), outputs["prediction"])


@pytest.mark.parametrize("change, word", [
    (lambda terms, p: {**terms, "loss": terms["loss"] + math.nan}, "loss term 'loss' is nan"),
    (lambda terms, p: {"loss": terms["loss"] + p.sum() / 0, "mse": terms["mse"], "ratio": p.sum() / 0}, "loss term 'ratio'"),
    (lambda terms, p: {**terms, "loss": terms["loss"] + (p - p).abs().sqrt().sum()}, "the gradient of parameter 'first.weight'"),
    (lambda terms, p: {**terms, "loss": terms["loss"] * 1e30}, "overflowed|gradient"),
])
def test_a_bad_loss_or_gradient_is_named(change, word):
    model, fresh = Odd(change), Odd(change)
    with pytest.raises(TrainingError, match=word):
        run(model=model)
    assert same(model, fresh), "the first step was not taken"


def test_weights_that_come_in_bad_are_named():
    model = Net(norm=False)
    with torch.no_grad():
        model.last.bias[0] = math.nan
    with pytest.raises(TrainingError, match="parameter 'last.bias' already held"):
        run(model=model)


@pytest.mark.parametrize("change, error, word", [
    (lambda terms, p: terms["loss"], InputError, "expected a dict of scalar terms"),
    (lambda terms, p: {"mse": terms["mse"]}, InputError, "'loss'"),
    (lambda terms, p: {"loss": p}, InputError, "scalar"),
    (lambda terms, p: {"loss": terms["loss"].detach()}, TrainingError, "does not depend"),
])
def test_a_broken_contract_is_named(change, error, word):
    with pytest.raises(error, match=word):
        run(model=Odd(change))


@pytest.mark.parametrize("data, word", [
    (Fast(), "data: got Fast"), ({}, "train"), ({"train": Fast(), "test": Fast()}, "test"), ({"train": Fast(0)}, "empty"), ({"train": Fast(), "val": Fast(0)}, "val.*empty"),
    ({"train": iter([])}, "no length"), ({"train": torch.zeros(4, 2)}, "a batch is Tensor"),
])
def test_bad_data_is_named(data, word):
    with pytest.raises(InputError, match=word):
        run(data=data)


def test_bad_models_configs_records_and_devices():
    for model, word in ((nn.Linear(2, 2), "loss"), (print, "nn.Module"), (Net().requires_grad_(False), "requires_grad")):
        with pytest.raises(InputError, match=word):
            run(model=model)
    with pytest.raises(ConfigError, match="TrainConfig"):
        run({"epochs": 3})
    with pytest.raises(InputError, match="missing run"):
        run(record={"root": ".", "study": "s"})
    with pytest.raises(ConfigError, match="device"):
        run(device="gpu")
    with pytest.raises(ConfigError, match="monitor.*mse"):
        run(dataclasses.replace(CONFIG, monitor="accuracy"))
    with pytest.raises(ConfigError, match="encoder"):
        run(dataclasses.replace(CONFIG, learning_rates={"encoder": 0.1}))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="cuda"):
            run(device="cuda")


@pytest.mark.parametrize("wrong", [
    {"epochs": None}, {"steps": 4}, {"epochs": 0}, {"epochs": 1.5}, {"batch_size": 0}, {"batch_size": True}, {"learning_rate": -1}, {"learning_rate": math.nan}, {"learning_rate": "fast"},
    {"weight_decay": -0.1}, {"warmup_fraction": 1.5}, {"schedule": "linear"}, {"clip_norm": 0}, {"ema_decay": 0}, {"ema_decay": 1}, {"seed": -1}, {"seed": 0.5}, {"precision": "fp16"},
    {"val_every": 0}, {"patience": 0}, {"num_workers": -1}, {"log_every": 0}, {"save_every": 0}, {"learning_rates": {"a": -1}},
])
def test_every_field_is_checked(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        TrainConfig(**{"epochs": 3, **wrong})


def test_config_is_frozen_and_knows_its_fields():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CONFIG.seed = 1
    with pytest.raises(TypeError, match="batchsize"):
        TrainConfig(epochs=1, batchsize=3)


def test_patience_stops_and_monitor_chooses():
    _, result = run(dataclasses.replace(CONFIG, epochs=50, learning_rate=0.0, patience=2), model=Net(norm=False))
    assert result.stopped == "patience" and [r["step"] for r in result.history if r["split"] == "val"] == [3, 6, 9]
    _, by_size = run(dataclasses.replace(CONFIG, monitor="size"))
    assert by_size.best["size"] == min(r["size"] for r in by_size.history if r["split"] == "val") == by_size.best_metric


def test_ctrl_c_ends_with_a_good_checkpoint(tmp_path):
    handler = signal.getsignal(signal.SIGINT)

    class Pressed(Net):
        def forward(self, batch):
            self.count = getattr(self, "count", 0) + self.training
            if self.training and self.count == 4:
                os.kill(os.getpid(), signal.SIGINT)  # in the middle of a step
            return super().forward(batch)

    _, result = run(model=Pressed(), out=tmp_path)
    assert result.stopped == "interrupted" and signal.getsignal(signal.SIGINT) is handler
    assert load_checkpoint(result.last_checkpoint).state["step"] == 4 and (tmp_path / "record.json").exists()


def test_an_interrupt_from_a_callback_is_an_end_too(tmp_path):
    def press(event):
        if event.step == 5:
            raise KeyboardInterrupt

    _, result = run(out=tmp_path, callbacks=[press])
    assert result.stopped == "interrupted" and load_checkpoint(result.last_checkpoint).state["step"] == 5


def test_an_interrupt_inside_a_step_is_passed_on(tmp_path):
    class Twice(Net):
        def forward(self, batch):
            if self.training:
                raise KeyboardInterrupt
            return super().forward(batch)

    with pytest.raises(KeyboardInterrupt):
        run(model=Twice(), out=tmp_path)
    assert not step_folders(tmp_path)


def test_runs_in_a_thread_and_stops_on_request():
    results, asked = [], threading.Event()

    def stop(event):
        if event.step == 3:
            asked.set()
        return asked.is_set()

    thread = threading.Thread(target=lambda: results.append(run(callbacks=[stop])[1]))
    thread.start()
    thread.join(30)
    assert results and results[0].stopped == "callback" and asked.is_set()


def test_callbacks_see_every_step_and_every_row():
    events = []
    _, result = run(callbacks=[events.append])
    assert [e.step for e in events] == list(range(1, 10)) and events[0].steps == 9
    assert [row for e in events for row in e.rows] == result.history


def test_without_validation(tmp_path):
    model, result = run(data={"train": DATA["train"]}, out=tmp_path)
    assert result.best["split"] == "train" and result.best_checkpoint == tmp_path / "step-00000009"
    assert not (tmp_path / "best").exists() and same_as(model, result.last_checkpoint)


def same_as(model, place):
    fresh = Net(seed=3)
    load_checkpoint(place, fresh)
    return same(model, fresh)


def test_groups_by_prefix_and_decay():
    class Gated(Net):
        def __init__(self):
            super().__init__()
            self.mix_gate, self.position = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(1, 2, 2))

        def no_weight_decay(self):
            return {"position"}

    groups = parameter_groups(Gated(), learning_rate=0.1, weight_decay=0.5, learning_rates={"first": 0.1, "first.bias": 0.0})
    rates = {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]}
    assert rates["first.weight"] == (pytest.approx(0.01), 0.5) and rates["first.bias"] == (0.0, 0.0) and rates["last.weight"] == (0.1, 0.5)
    assert all(rates[name][1] == 0 for name in ("mix_gate", "position", "norm.weight", "last.bias")) and "frozen.weight" not in rates


def test_learning_rate_by_group_reaches_the_weights():
    model, _ = run(dataclasses.replace(CONFIG, learning_rates={"first": 0.0}))
    assert torch.equal(model.first.weight, Net().first.weight) and not torch.equal(model.last.weight, Net().last.weight)


def test_schedule_ends():
    factors = [learning_rate_factor(s, 100, warmup_fraction=0.1) for s in range(100)]
    assert factors[0] == 0.1 and factors[9] == 1.0 == max(factors) and factors[10:] == sorted(factors[10:], reverse=True) and 0 < factors[-1] < 1e-3
    assert {learning_rate_factor(s, 5, warmup_fraction=0.0, schedule="constant") for s in range(5)} == {1.0}
    assert learning_rate_factor(0, 1) == 1.0 and learning_rate_factor(3, 4, warmup_fraction=1.0) == 1.0


def test_average_is_given_back_after_an_error():
    model = Net()
    average = AveragedWeights(model, 0.9)
    with torch.no_grad():
        model.last.weight.add_(1)
    own = model.last.weight.detach().clone()
    with pytest.raises(ZeroDivisionError), average.in_place():
        1 / 0
    assert torch.equal(model.last.weight, own)


def test_evaluate_is_aligned_and_strict():
    data = Items(23)
    metrics = {"first": lambda outputs, batch: batch["x"][:, 0]}
    for dataset, workers in ((data, 0), (data, 2), (Fast(23), 0)):
        scores = evaluate(lambda batch: batch, dataset, metrics=metrics, batch_size=5, num_workers=workers)
        assert scores["first"].tolist() == data.x[:, 0].double().tolist()
    model = Net()
    model.frozen.eval()
    evaluate(model, data, metrics=metrics)
    assert model.training and model.norm.training and not model.frozen.training
    for metric, error in ((lambda o, b: b["x"], InputError), (lambda o, b: 0.5, InputError), (lambda o, b: b["x"][:, 0] / 0, NonFiniteError)):
        with pytest.raises(error, match="wrong"):
            evaluate(model, data, metrics={"wrong": metric})
    with pytest.raises(ConfigError):
        evaluate(model, data, metrics=metrics, precision="half")


def test_evaluating_restores_after_an_error():
    model = Net()
    with pytest.raises(ZeroDivisionError), evaluating(model):
        1 / 0
    assert model.training and torch.is_grad_enabled()


def test_a_dead_worker_is_reported():
    class Dies(Items):
        def __getitem__(self, i):
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RuntimeError, match="worker"):
        for _ in load_batches(Dies(), EpochBatches(40, 8, 0), num_workers=1):
            pass


def test_first_bad_tensor_reads_every_kind():
    model = Net()
    assert "input 'z'" in first_bad_tensor({"name": ["a"], "i": torch.arange(2), "z": torch.tensor([1.0, math.inf])}, {}, model, torch.tensor([5, 6]))
    assert "sample 6" in first_bad_tensor({"z": torch.tensor([1.0, math.inf])}, {}, model, torch.tensor([5, 6]))
    assert "overflowed" in first_bad_tensor({}, {"loss": torch.tensor(1.0)}, model)
