"Checkpoints: whole or not there, unchanged or refused, nothing executed, nothing half loaded."
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fvlm.core import InputError
from fvlm.files import sha256_of
from fvlm.training import checkpoints
from fvlm.training.checkpoints import CheckpointError, check_checkpoint, join_tensors, load_checkpoint, save_checkpoint, split_tensors


class Net(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.a, self.norm = nn.Linear(width, width), nn.BatchNorm1d(width)

    def forward(self, x):
        return self.norm(self.a(x))


def trained(width=3, steps=2):
    model = Net(width)
    optimizer = torch.optim.AdamW([{"params": model.a.parameters()}, {"params": model.norm.parameters(), "weight_decay": 0.0}], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, width)).square().sum().backward()
        optimizer.step()
    return model, optimizer


@pytest.fixture
def saved(tmp_path):
    model, optimizer = trained()
    ema = {name: p.detach() + 1 for name, p in model.named_parameters()}
    state = {"step": 2, "rng": torch.get_rng_state(), "nested": {"list": [1, (2, 3)], 4: "x", "none": None}}
    return save_checkpoint(tmp_path / "last", model, optimizer=optimizer, ema=ema, state=state, config={"width": 3}), model, optimizer, ema, state


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def test_everything_comes_back(saved):
    place, model, optimizer, ema, state = saved
    other, other_optimizer = trained(steps=1)
    average = {name: torch.zeros_like(t) for name, t in ema.items()}
    found = load_checkpoint(place, other, optimizer=other_optimizer, ema=average, config={"width": 3})
    assert same(model, other) and all(torch.equal(ema[n], average[n]) for n in ema)
    assert torch.equal(found.state.pop("rng"), state.pop("rng")) and found.state == state and found.config == {"width": 3} and found.model == "Net"
    a, b = optimizer.state_dict(), other_optimizer.state_dict()
    assert a["param_groups"] == b["param_groups"] and all(torch.equal(a["state"][i][k], b["state"][i][k]) for i in a["state"] for k in a["state"][i])


def test_no_pickle_in_the_folder_and_names_only_ours(saved):
    assert sorted(p.name for p in saved[0].iterdir()) == ["ema.safetensors", "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json", "state.safetensors"]
    assert [p.name for p in saved[0].parent.iterdir()] == ["last"], "nothing is left beside"


def test_loaded_optimizer_outlives_the_folder(saved):
    place = saved[0]
    model, optimizer = trained()
    load_checkpoint(place, model, optimizer=optimizer)
    before = sha256_of(saved[0] / "optimizer.safetensors")
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    assert sha256_of(saved[0] / "optimizer.safetensors") == before


def refused(place, receiver=None, word=".", **arguments):
    model, optimizer = (receiver, None) if receiver is not None else trained()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=word):
        load_checkpoint(place, model, **({"optimizer": optimizer} if optimizer else {}), **arguments)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items()), "half loaded"


@pytest.mark.parametrize("name", ["ema.safetensors", "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json", "state.safetensors"])
def test_every_file_guarded(saved, name, tmp_path):
    place, content = saved[0], (saved[0] / name).read_bytes()
    for position in (0, len(content) // 3, len(content) // 2, len(content) - 2):
        (place / name).write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1:])
        refused(place)
    for length in (0, 7, len(content) - 2):
        (place / name).write_bytes(content[:length])
        refused(place)
    (place / name).write_bytes(content + b"\n{")
    refused(place)
    (place / name).unlink()
    refused(place, word=name)
    (place / name).mkdir()
    refused(place)
    (place / name).rmdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(content)
    if name != "manifest.json":
        (place / name).symlink_to(elsewhere)
        refused(place, word="plain file")
        (place / name).unlink()
    (place / name).write_bytes(content)
    load_checkpoint(place, trained()[0])


def test_extra_and_swapped_files(saved):
    place = saved[0]
    (place / "extra.bin").write_bytes(b"x")
    refused(place, word="extra.bin is not in the manifest")
    (place / "extra.bin").unlink()
    a, b = (place / "model.safetensors").read_bytes(), (place / "ema.safetensors").read_bytes()
    (place / "model.safetensors").write_bytes(b), (place / "ema.safetensors").write_bytes(a)
    refused(place)


def resigned(place):
    "An attacker who knows the format fits the manifest to the files."
    manifest = json.loads((place / "manifest.json").read_text())
    manifest["files"] = {p.name: {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in sorted(place.iterdir()) if p.name != "manifest.json"}
    (place / "manifest.json").write_text(json.dumps(checkpoints._signed(manifest)))


class Command:
    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_pickle_is_never_run(saved, name, tmp_path):
    place, canary = saved[0], tmp_path / "canary"
    (place / name).write_bytes(pickle.dumps(Command(canary)))
    resigned(place)
    refused(place)
    assert not canary.exists()


@pytest.mark.parametrize("change", [
    lambda c: c.pop("optimizer"), lambda c: c.pop("tied"), lambda c: c.update(state={"__tensor__": "nowhere"}), lambda c: c.update(optimizer=3),
    lambda c: c.update(optimizer={"state": 3, "param_groups": []}), lambda c: c["optimizer"]["param_groups"].pop(), lambda c: c["optimizer"]["param_groups"][0].update(evil=1),
    lambda c: c.update(tied={n: {"a": "../../x"} for n in c["tied"]}), lambda c: c.update(state={"__items__": 5}), lambda c: c.update(state={"__items__": [[[], 1]]}),
])
def test_crafted_state(saved, change):
    place = saved[0]
    content = json.loads((place / "state.json").read_text())
    change(content)
    (place / "state.json").write_text(json.dumps(content))
    resigned(place)
    refused(place)


@pytest.mark.parametrize("manifest", ["[]", "3", "{}", '{"format": "fvlm checkpoint", "version": 2}', "[" * 100_000, "9" * 5000, '{"format": "fvlm checkpoint", "version": 1, "model": null, "files": 3, "sha256": ""}'])
def test_crafted_manifest(saved, manifest):
    (saved[0] / "manifest.json").write_text(manifest)
    refused(saved[0])


def test_wrong_receivers_are_named(saved):
    place = saved[0]
    refused(place, Net(4), "a.weight has shape")
    refused(place, nn.Linear(3, 3), "missing bias, weight")
    refused(place, Net().double(), "dtype")
    refused(place, Net(), "config.width: 4 here, 3 in the checkpoint", config={"width": 4})
    refused(place, Net(), "config.depth: 2 here, absent", config={"width": 3, "depth": 2})
    refused(place, Net(), "no scheduler state", scheduler=torch.optim.lr_scheduler.ConstantLR(trained()[1]))
    model = Net()
    with pytest.raises(CheckpointError, match="parameter groups"):
        load_checkpoint(place, model, optimizer=torch.optim.AdamW(model.parameters()))
    with pytest.raises(CheckpointError, match="ema"):
        load_checkpoint(place, ema={"other": torch.zeros(2)})


def test_not_strict_loads_what_is_common(saved):
    class More(Net):
        def __init__(self):
            super().__init__()
            self.extra = nn.Linear(2, 2)

    refused(saved[0], More(), "missing extra")
    more = More()
    load_checkpoint(saved[0], more, strict=False)
    assert torch.equal(more.a.weight, saved[1].a.weight)
    refused(saved[0], Net(4), "shape", strict=False)


@pytest.mark.parametrize("place", ["missing", "file"])
def test_nothing_there(tmp_path, place):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        check_checkpoint(tmp_path / place)


@pytest.mark.parametrize("failing", ["rename", "fsync"])
def test_failure_while_writing_leaves_the_old_one(saved, monkeypatch, failing):
    place, calls = saved[0], []

    def fails(*arguments):
        calls.append(arguments)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, fails)
    with pytest.raises(CheckpointError, match="No space left"):
        save_checkpoint(place, Net(), state={"step": 99})
    monkeypatch.undo()
    assert calls and load_checkpoint(place).state["step"] == 2
    assert [p.name for p in place.parent.iterdir()] == ["last"]


def test_replacing_keeps_one_whole_checkpoint_at_any_moment(saved, monkeypatch):
    place, seen, rename = saved[0], [], os.rename

    def watching(*arguments):
        seen.append(load_checkpoint(place).state["step"])
        rename(*arguments)
        seen.append(load_checkpoint(place).state["step"])

    monkeypatch.setattr(os, "rename", watching)
    save_checkpoint(place, Net(), state={"step": 3})
    assert seen == [2, 2, 2, 3]


def test_what_cannot_be_saved_is_named(tmp_path):
    for state in ({"f": print}, {"loss": float("nan")}, {(1, 2): 3}, {1: "a", "1": "b"}, {"x": Path("/abs")}):
        with pytest.raises(InputError):
            save_checkpoint(tmp_path / "c", Net(), state=state)
    assert not list(tmp_path.iterdir())


def test_views_and_ties(tmp_path):
    buffer = torch.arange(6.0)
    tensors = {"a": buffer[:3], "b": buffer[3:], "c": buffer[:3], "t": torch.arange(6.0).view(2, 3).T, "empty": torch.zeros(0), "empty2": torch.zeros(0)}
    save_checkpoint(tmp_path / "c", tensors)

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            for name, tensor in tensors.items():
                self.register_buffer(name, torch.full_like(tensor, -1))

    holder = Holder()
    load_checkpoint(tmp_path / "c", holder)
    assert all(torch.equal(getattr(holder, name), tensor) for name, tensor in tensors.items())


LEAVES = st.one_of(st.none(), st.booleans(), st.integers(-10**6, 10**6), st.floats(allow_nan=False, allow_infinity=False), st.text("abc_ äπ", max_size=5), st.builds(lambda n: torch.arange(n), st.integers(0, 3)))
KEYS = st.one_of(st.text("ab", max_size=3), st.sampled_from(["__tensor__", "__tuple__", "__items__"]), st.integers(0, 9))
TREES = st.recursive(LEAVES, lambda inner: st.one_of(st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple), st.dictionaries(KEYS, inner, max_size=3)), max_leaves=8)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


@settings(max_examples=150, deadline=None)
@given(TREES)
def test_split_and_join_are_inverse(tree):
    plain, tensors = split_tensors(tree)
    assert equal(tree, join_tensors(json.loads(json.dumps(plain)), tensors))
