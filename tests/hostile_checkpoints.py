"""Two hundred checkpoints and configurations that are broken, foreign or malicious, and what is done with them.

    python tests/hostile_checkpoints.py            all; prints the counts by kind
    python tests/hostile_checkpoints.py --list     and every refusal

Each case damages a copy of a good checkpoint (many also fit the manifest to the damage, as somebody who knows the format
would) and loads it into a model, optimizer and average, or goes on from it with `train`. It must be refused with a typed
error in under two seconds, without moving a weight, and without creating the canary file that every payload tries to make.
"""
import argparse
import gzip
import json
import os
import pickle
import shutil
import struct
import sys
import tempfile
import time
import zipfile
from io import BytesIO
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from torch import nn  # noqa: E402

from fvlm.core import InputError, generator  # noqa: E402
from fvlm.files import sha256_of  # noqa: E402
from fvlm.training.checkpoints import CheckpointError, _signed, load_checkpoint  # noqa: E402
from fvlm.training.loop import TrainConfig, train  # noqa: E402
from fvlm.training.saved_runs import from_plain  # noqa: E402

FILES = ("ema.safetensors", "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json", "state.safetensors")
TENSORS = [name for name in FILES if name.endswith(".safetensors")]


class Net(nn.Module):
    "Two layers and a buffer."

    def __init__(self, width=6, seed=0):
        super().__init__()
        self.first, self.second = nn.Linear(4, width), nn.Linear(width, 2)
        self.register_buffer("scale", torch.ones(3))
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator(seed, "net")))

    def forward(self, batch):
        return {"prediction": self.second(torch.tanh(self.first(batch["x"])))}

    def loss(self, outputs, batch):
        return {"loss": (outputs["prediction"] - batch["y"]).square().mean()}


class Points:
    "24 samples."

    def __init__(self):
        draw = generator(0, "points")
        self.x, self.y = torch.randn(24, 4, generator=draw), torch.randn(24, 2, generator=draw)

    def __len__(self):
        return 24

    def batch(self, indices):
        return {"x": self.x[indices], "y": self.y[indices]}


CONFIG = TrainConfig(steps=8, batch_size=8, ema_decay=0.9, save_every=3, val_every=3, log_every=2)
DATA = {"train": Points(), "val": Points()}


def go(out, resume=None, model=None, stop=None, config=CONFIG):
    model = Net() if model is None else model
    return train(model, DATA, config, out=out, resume=resume, progress=False, device="cpu", callbacks=[lambda event: event.step == stop])


# --- damage ----------------------------------------------------------------------------------------------------------

def resigned(place):
    "Fit the manifest to the files, as somebody who knows the format would."
    manifest = json.loads((place / "manifest.json").read_text())
    manifest["files"] = {p.name: {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in sorted(place.iterdir()) if p.name != "manifest.json"}
    (place / "manifest.json").write_text(json.dumps(_signed(manifest)))


def written(name, content, sign=True):
    def change(place):
        (place / name).write_bytes(content)
        if sign and name != "manifest.json":
            resigned(place)
    return change


def edited(change_state):
    "Change the parsed state.json and sign the result."
    def change(place):
        content = json.loads((place / "state.json").read_text())
        change_state(content)
        (place / "state.json").write_text(json.dumps(content))
        resigned(place)
    return change


def manifest_edited(change_manifest, sign=True):
    def change(place):
        manifest = json.loads((place / "manifest.json").read_text())
        change_manifest(manifest)
        (place / "manifest.json").write_text(json.dumps(_signed(manifest) if sign else manifest))
    return change


def tensors_edited(name, change_tensors):
    def change(place):
        from safetensors.torch import load_file, save_file

        tensors = {key: tensor.clone() for key, tensor in load_file(place / name).items()}
        change_tensors(tensors)
        (place / name).unlink()
        save_file(tensors, place / name)
        resigned(place)
    return change


def flipped(name, share):
    def change(place):
        content = bytearray((place / name).read_bytes())
        content[int(share * (len(content) - 1))] ^= 1 << int(share * 7)
        (place / name).write_bytes(content)
    return change


def truncated(name, share, sign):
    def change(place):
        os.truncate(place / name, int(share * (place / name).stat().st_size))
        if sign:
            resigned(place)
    return change


def header(text, data=b"", length=None):
    "A safetensors file with a header of one's own."
    text = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def one_tensor(**fields):
    return json.dumps({"first.weight": {"dtype": "F32", "shape": [6, 4], "data_offsets": [0, 96], **fields}})


class Payload:
    "Whoever unpickles this makes the canary."

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def pickles(canary):
    "The same command in five wrappings."
    plain, archive, saved = pickle.dumps(Payload(canary)), BytesIO(), BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", plain)
    torch.save(Payload(canary), saved)
    text = f"cos\nsystem\n(S'touch {canary}'\ntR.".encode()
    return {"pickle": plain, "protocol 0": text, "zip with a pickle": archive.getvalue(), "torch.save": saved.getvalue(), "header then pickle": header("{}", plain)}


def bombs():
    "Small files that claim to be large."
    packed, nested = BytesIO(), b"[" * 200_000 + b"]" * 200_000
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("zeros", bytes(30_000_000))
    return {"zip bomb": packed.getvalue(), "gzip bomb": gzip.compress(bytes(30_000_000)), "nested lists": nested, "long number": b"9" * 100_000,
            "nested dicts": b'{"a":' * 100_000 + b"1" + b"}" * 100_000}


def replaced_by(name, what):
    def change(place):
        content = (place / name).read_bytes()
        (place / name).unlink()
        if what == "a directory":
            (place / name).mkdir()
        elif what == "a pipe":
            os.mkfifo(place / name)
        elif what == "a link to the real file":
            (place.parent / "elsewhere").write_bytes(content)
            (place / name).symlink_to(place.parent / "elsewhere")
        elif what == "a link to /dev/zero":
            (place / name).symlink_to("/dev/zero")
        elif what == "a link that dangles":
            (place / name).symlink_to(place / "nowhere")
        elif what == "a link to itself":
            (place / name).symlink_to(name)
    return change


def sparse(name, size):
    "A file of holes with a manifest that admits its size."
    def change(place):
        os.truncate(place / name, size)
        manifest = json.loads((place / "manifest.json").read_text())
        manifest["files"][name]["bytes"] = size
        (place / "manifest.json").write_text(json.dumps(_signed(manifest)))
    return change


def swapped(a, b, sign):
    def change(place):
        one, other = (place / a).read_bytes(), (place / b).read_bytes()
        (place / a).write_bytes(other), (place / b).write_bytes(one)
        if sign:
            resigned(place)
    return change


def setting(*path, value):
    "state.json[path[0]][path[1]]... = value"
    def change(content):
        *before, last = path
        for key in before:
            content = content[key]
        content[last] = value
    return edited(change)


def without(*path):
    def change(content):
        *before, last = path
        for key in before:
            content = content[key]
        del content[last]
    return edited(change)


def loading_cases(canary):
    "Name -> damage, each for `load_checkpoint` into a model, optimizer and average."
    cases = {}
    for name in FILES:
        for share in (0.0, 0.2, 0.5, 0.8, 1.0):
            cases[f"bit flipped at {share} of {name}"] = flipped(name, share)
        for share in (0.0, 0.5, 0.97):
            cases[f"{name} cut to {share}"] = truncated(name, share, False)
        cases[f"{name} missing"] = lambda place, name=name: (place / name).unlink()
        cases[f"{name} with a byte more"] = lambda place, name=name: (place / name).open("ab").write(b"x")
        for what in ("a directory", "a pipe", "a link to the real file", "a link to /dev/zero", "a link that dangles", "a link to itself"):
            if what == "a link to the real file" or name in ("manifest.json", "model.safetensors", "state.json"):
                cases[f"{name} is {what}"] = replaced_by(name, what)
    for name in TENSORS:
        cases[f"{name} cut and signed"] = truncated(name, 0.6, True)
        cases[f"{name} empty and signed"] = truncated(name, 0.0, True)
        cases[f"{name} missing and signed"] = lambda place, name=name: ((place / name).unlink(), resigned(place))
    for a, b in (("model.safetensors", "ema.safetensors"), ("model.safetensors", "optimizer.safetensors"), ("ema.safetensors", "optimizer.safetensors"), ("state.json", "manifest.json")):
        cases[f"{a} and {b} swapped"] = swapped(a, b, False)
    for a, b in (("model.safetensors", "optimizer.safetensors"), ("ema.safetensors", "optimizer.safetensors"), ("model.safetensors", "state.safetensors")):
        cases[f"{a} and {b} swapped and signed"] = swapped(a, b, True)
    for wrapping, content in pickles(canary).items():
        for name in ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"):
            cases[f"{wrapping} as {name}"] = written(name, content)
    cases["a pickle beside"] = lambda place: (place / "data.pkl").write_bytes(pickles(canary)["pickle"])
    cases["a pickle beside, signed as a tensor file"] = lambda place: ((place / "pytorch_model.bin").write_bytes(pickles(canary)["torch.save"]), (place / "state.json").write_bytes(b"{}"), resigned(place))
    for bomb, content in bombs().items():
        for name in ("model.safetensors", "state.json", "manifest.json"):
            cases[f"{bomb} as {name}"] = written(name, content)
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        cases[f"{name} of a terabyte of holes"] = sparse(name, 1 << 40)
    many = json.dumps({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(50_000)})
    for what, content in {
        "header longer than the file": header("{}", length=1 << 40), "header of 2**64 - 1": header("{}", length=2**64 - 1), "header of -1": header("{}", length=2**63),
        "header of 20 MB of blanks": header(b" " * 20_000_000 + b"{}"), "header that is no JSON": header("{not json"), "header that is a list": header("[]"), "header that is no text": header(b"\xff\xfe" * 8),
        "50,000 tensors": header(many), "offsets backwards": header(one_tensor(data_offsets=[96, 0]), bytes(96)), "offsets beyond": header(one_tensor(data_offsets=[0, 9600]), bytes(96)),
        "negative offsets": header(one_tensor(data_offsets=[-96, 0]), bytes(96)), "offsets that skip": header(one_tensor(data_offsets=[8, 104]), bytes(104)), "shape that overflows": header(one_tensor(shape=[2**62, 2**62]), bytes(96)),
        "negative shape": header(one_tensor(shape=[-6, -4]), bytes(96)), "shape of text": header(one_tensor(shape="6,4"), bytes(96)), "unknown dtype": header(one_tensor(dtype="F33"), bytes(96)),
        "dtype of another width": header(one_tensor(dtype="F64"), bytes(96)), "data after the last tensor": header(one_tensor(), bytes(4096)), "one of many tensors": header(one_tensor(), bytes(96)), "no tensor": header("{}"),
        "metadata that is no text": header(json.dumps({"__metadata__": {"a": {"b": 1}}})), "name with a path": header(one_tensor().replace("first.weight", "../../first.weight"), bytes(96)),
    }.items():
        cases[f"safetensors: {what}"] = written("model.safetensors", content)
    for what, change in {
        "a shape": lambda t: t.update({"first.weight": torch.zeros(4, 6)}), "one more axis": lambda t: t.update({"first.weight": torch.zeros(1, 6, 4)}), "a name missing": lambda t: t.pop("second.bias"),
        "a name more": lambda t: t.update(extra=torch.zeros(2)), "a name in other letters": lambda t: t.update({"First.weight": t.pop("first.weight")}), "float64": lambda t: t.update({"scale": t["scale"].double()}),
        "integers": lambda t: t.update({"first.bias": t["first.bias"].int()}), "NaN": lambda t: t["first.weight"].fill_(float("nan")), "one Inf": lambda t: t["second.weight"][0].fill_(float("inf")), "nothing": lambda t: t.clear(),
    }.items():
        cases[f"model of other tensors, signed: {what}"] = tensors_edited("model.safetensors", change)
        if what not in ("float64", "nothing"):
            cases[f"average of other tensors, signed: {what}"] = tensors_edited("ema.safetensors", change)
    for what, change in {
        "format": lambda m: m.update(format="other"), "version": lambda m: m.update(version=2), "version as text": lambda m: m.update(version="1"), "no files": lambda m: m.update(files={}), "files a list": lambda m: m.update(files=[]),
        "unknown key": lambda m: m.update(run="touch canary"), "key missing": lambda m: m.pop("model"), "path upwards": lambda m: m["files"].update({"../../../etc/passwd": {"bytes": 1, "sha256": ""}}),
        "absolute path": lambda m: m["files"].update({"/etc/passwd": {"bytes": 1, "sha256": ""}}), "negative bytes": lambda m: m["files"]["model.safetensors"].update(bytes=-1), "sha256 a number": lambda m: m["files"]["model.safetensors"].update(sha256=7),
        "entry a number": lambda m: m["files"].update({"model.safetensors": 3}), "path in place of a file": lambda m: m["files"].update({"../last/model.safetensors": m["files"].pop("model.safetensors")}),
    }.items():
        cases[f"manifest, signed: {what}"] = manifest_edited(change)
    cases["manifest edited, not signed"] = manifest_edited(lambda m: m.update(model="Other"), sign=False)
    for what, content in {"a list": b"[]", "a number": b"3", "null": b"null", "NaN": b'{"format": NaN}', "half a character": b'"\xc3', "nothing": b""}.items():
        cases[f"manifest is {what}"] = written("manifest.json", content)
        cases[f"state.json is {what}"] = written("state.json", content)
    group = ("optimizer", "param_groups", 0)
    for what, change in {
        "optimizer missing": without("optimizer"), "optimizer a number": setting("optimizer", value=3), "no state": without("optimizer", "state"), "groups a number": setting("optimizer", "param_groups", value=1),
        "no groups": setting("optimizer", "param_groups", value=[]), "NaN learning rate": setting(*group, "lr", value=float("nan")), "infinite learning rate": setting(*group, "lr", value=float("inf")), "negative learning rate": setting(*group, "lr", value=-1.0),
        "learning rate as text": setting(*group, "lr", value="0.1"), "NaN decay": setting(*group, "weight_decay", value=float("nan")), "another decay": setting(*group, "weight_decay", value=7.0), "betas of 5": setting(*group, "betas", value={"__tuple__": [5, 5]}),
        "unknown setting": setting(*group, "evil", value=1), "parameters of another group": setting(*group, "params", value=[0, 1, 2, 3, 9]), "state of a parameter that is not there": edited(lambda c: c["optimizer"]["state"]["__items__"].append([99, {}])),
        "state of a negative parameter": edited(lambda c: c["optimizer"]["state"]["__items__"].append([-1, c["optimizer"]["state"]["__items__"][0][1]])), "moment missing": edited(lambda c: c["optimizer"]["state"]["__items__"][0][1].pop("exp_avg")),
        "moment of another shape": edited(lambda c: c["optimizer"]["state"]["__items__"][0][1].update(exp_avg={"__tensor__": "optimizer/state/1/exp_avg"})), "moment as text": edited(lambda c: c["optimizer"]["state"]["__items__"][0][1].update(exp_avg="zero")),
        "tensor that is not there": edited(lambda c: c["optimizer"]["state"]["__items__"][0][1].update(exp_avg={"__tensor__": "../../model"})), "items that are none": setting("optimizer", "state", value={"__items__": 5}), "tuple of a number": setting(*group, "betas", value={"__tuple__": 5}),
        "ties missing": without("tied"), "ties to nowhere": setting("tied", value={n: {"first.weight": "../../x"} for n in ("model", "ema", "optimizer", "scheduler", "state")}), "ties a list": setting("tied", value=[]),
        "unknown key": setting("command", value="touch canary"), "config missing": without("config"),
    }.items():
        cases[f"state.json, signed: {what}"] = change
    cases["optimizer, signed: NaN moment"] = tensors_edited("optimizer.safetensors", lambda t: t["optimizer/state/0/exp_avg"].fill_(float("nan")))
    cases["optimizer, signed: moment of another shape"] = tensors_edited("optimizer.safetensors", lambda t: t.update({"optimizer/state/0/exp_avg": torch.zeros(5, 5)}))
    return cases


def going_on_cases():
    "Name -> damage, each for `train(resume=...)`: well-formed and signed, but nothing a run would write."
    cases = {}
    for what, value in {"text": "5", "negative": -5, "beyond the end": 9, "huge": 10**30, "a fraction": 4.5, "true": True, "null": None, "a list": [5], "another step": 4}.items():
        cases[f"step {what}"] = setting("state", "step", value=value)
    for key in ("step", "position", "history", "best", "best_weights", "since_best", "recent", "random", "environment", "free"):
        cases[f"{key} missing"] = without("state", key)
        if key not in ("step", "best", "best_weights", "free"):
            cases[f"{key} a number below zero"] = setting("state", key, value=-3)
            cases[f"{key} text"] = setting("state", key, value="../../x")
    cases |= {
        "unknown key": setting("state", "command", value="touch canary"), "state a list": setting("state", value=[]), "history of numbers": setting("state", "history", value=[1, 2]), "history of another kind": setting("state", "history", value=[{"split": "test"}]),
        "recent of text": setting("state", "recent", value=[{"loss": "0"}]), "recent of different rows": setting("state", "recent", value=[{"loss": 1.0}, {"mse": 1.0}]), "best without its number": setting("state", "best", value={"split": "val", "step": 3}),
        "best null, weights not": setting("state", "best", value=None), "best weights of another tensor": setting("state", "best_weights", value={"first.weight": {"__tensor__": "state/best_weights/scale"}}),
        "best weights a number": setting("state", "best_weights", value=1), "position of another epoch": setting("state", "position", value={"epoch": 7, "batch": 2}), "random state of another kind": setting("state", "random", "python", value={"version": 3, "state": [1], "gauss": None}),
        "position in the random state": setting("state", "random", "numpy", "position", value=10**9), "another seed in the configuration": setting("config", "train", "seed", value=1), "unknown field in the configuration": setting("config", "train", "evil", value=1),
        "NaN in the configuration": setting("config", "train", "learning_rate", value=float("nan")), "another class": setting("config", "model", "class", value="os.system"), "another data set": setting("config", "data_fingerprint", "train", value="0" * 64),
        "NaN in the best weights": tensors_edited("state.safetensors", lambda t: t["state/best_weights/first.weight"].fill_(float("nan"))), "best weights of another shape": tensors_edited("state.safetensors", lambda t: t.update({"state/best_weights/first.weight": torch.zeros(3)})),
    }
    return cases


def config_cases():
    "Fields of TrainConfig, as JSON might give them."
    nan, inf = float("nan"), float("inf")
    values = {
        "learning_rate": (nan, inf, -1.0, "fast", None, [], {}), "steps": (0, -3, 1.5, "9", nan, True, []), "batch_size": (0, -1, 2.5, "8", None), "weight_decay": (nan, -1, "x"), "warmup_fraction": (2, -0.1, nan, None),
        "schedule": ("os.system", None, 3, ["cosine"]), "clip_norm": (0, -1, nan, "1"), "ema_decay": (0, 1, 2, nan, "0.9"), "seed": (-1, 0.5, "0", None), "precision": ("fp16", None, "__import__('os')"),
        "learning_rates": ({"a": nan}, {"a": -1}, [1], 5, "a", {"a": None}), "num_workers": (-1, 1.5, "2"), "accumulate": (0, -2, nan), "non_finite": ("ignore", None), "monitor": (3, None), "restore_best": ("no", 1),
    }
    cases = {f"{name} = {value!r}": {"steps": 8, name: value} for name, options in values.items() for value in options}
    for name, content in {"unknown field": {"steps": 8, "learning_rat": 0.1}, "a path as a field": {"steps": 8, "../x": 1}, "dunder": {"steps": 8, "__class__": "x"}, "both lengths": {"steps": 8, "epochs": 1}, "no length": {}, "a list": [], "text": "steps", "null": None}.items():
        cases[name] = content
    return cases


# --- what happens ----------------------------------------------------------------------------------------------------

def verdict(action, untouched):
    "(the error or None, whether it is typed, seconds, whether nothing moved)"
    before = {name: tensor.clone() for name, tensor in untouched.state_dict().items()} if untouched is not None else {}
    start, error = time.perf_counter(), None
    try:
        action()
    except Exception as caught:
        error = caught
    seconds = time.perf_counter() - start
    still = all(torch.equal(before[name], tensor) for name, tensor in untouched.state_dict().items()) if untouched is not None else True
    return error, seconds, still


def all_verdicts(folder, only=None):
    "Yields (kind, name, error, seconds, nothing moved, canary) of every case; `only` keeps every n-th."
    folder, canary = Path(folder), Path(folder) / "canary"
    go(folder / "good", stop=5)
    good = folder / "good" / "step-00000005"
    # What is refused must be refused for its damage, so the untouched copy has to load.
    remembered = load_checkpoint(good)
    assert remembered.state["step"] == 5

    def receivers():
        from fvlm.training.steps import parameter_groups

        model = Net(seed=1)
        optimizer = torch.optim.AdamW(parameter_groups(model, learning_rate=CONFIG.learning_rate, weight_decay=CONFIG.weight_decay), fused=True)
        return model, optimizer, {name: torch.zeros_like(p) for name, p in model.named_parameters()}

    def loaded(place, model, optimizer, ema):
        load_checkpoint(place, model, optimizer=optimizer, ema=ema, config=remembered.config)

    loaded(good, *receivers())
    go(folder / "check", resume=good)
    plan = [("load", name, change) for name, change in loading_cases(canary).items()] + [("go on", name, change) for name, change in going_on_cases().items()]
    plan += [("config", name, fields) for name, fields in config_cases().items()]
    for kind, name, change in plan[::only]:
        place = folder / "case" / good.name
        shutil.rmtree(place.parent, ignore_errors=True)
        if kind == "config":
            error, seconds, still = verdict(lambda fields=change: from_plain(TrainConfig, fields, "training"), None)
        else:
            shutil.copytree(good, place)
            change(place)
            model, optimizer, ema = receivers()
            action = (lambda: loaded(place, model, optimizer, ema)) if kind == "load" else (lambda: go(folder / "out", resume=place, model=model))
            error, seconds, still = verdict(action, model)
            if seconds > 2:  # the machine may be busy: the better of two
                seconds = verdict(action, model)[1]
            still = still and not any(bool(t.any()) for t in ema.values()) and not optimizer.state_dict()["state"]
        yield kind, name, error, seconds, still, canary.exists()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="example: python tests/hostile_checkpoints.py --list")
    parser.add_argument("--list", action="store_true", help="print every case with its refusal")
    arguments = parser.parse_args(argv)
    counts, kinds = {"cases": 0, "executed": 0, "loaded": 0, "untyped": 0, "moved": 0, "slow": 0}, {}
    slowest = 0.0
    with tempfile.TemporaryDirectory(prefix="fvlm-hostile-") as folder:
        for kind, name, error, seconds, still, canary in all_verdicts(folder):
            typed = isinstance(error, InputError if kind == "config" else CheckpointError)
            bad = {"executed": canary, "loaded": error is None, "untyped": error is not None and not typed, "moved": not still, "slow": seconds > 2}
            counts["cases"] += 1
            kinds[kind], slowest = kinds.get(kind, 0) + 1, max(slowest, seconds)
            for what, happened in bad.items():
                counts[what] += happened
            if arguments.list or any(bad.values()):
                print(f"{'BAD ' + str([w for w, b in bad.items() if b]) if any(bad.values()) else 'refused'} {seconds:.3f} s  {kind}: {name}: {type(error).__name__}: {str(error).replace(folder, '')[:230]}", flush=True)
    print(f"{counts['cases']} cases ({', '.join(f'{n} {kind}' for kind, n in kinds.items())}): {counts['executed']} executed, {counts['loaded']} loaded silently, {counts['untyped']} untyped errors, "
          f"{counts['moved']} moved something, {counts['slow']} over 2 s (the slowest took {slowest:.2f} s)")
    return 0 if counts["cases"] >= 200 and not any(counts[what] for what in ("executed", "loaded", "untyped", "moved", "slow")) else 1


if __name__ == "__main__":
    sys.exit(main())
