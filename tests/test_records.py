"Run records: a strict schema, plain data only, nothing of one computer."
import json
from pathlib import Path

import pytest

from fvlm.core import InputError
from fvlm.training.records import git_commit, mean_by_clip, plain_data, read_record, read_records, versions, write_record

GOOD = dict(config={"train": {"seed": 0}}, parameters=3, metrics={"mse": 0.5}, metrics_by_clip={"mse": {"a/b.avi": 0.5}})


def written(tmp_path, **changes):
    return write_record(tmp_path, "study", "run", **{**GOOD, **changes})


def test_round_trip_and_place(tmp_path):
    path = written(tmp_path, weights=[{"name": "w", "source": "hub", "sha256": "0", "fingerprint": None}], seconds=2.0, timing={"data": 0.5})
    record = read_record(path)
    assert path == tmp_path / "study" / "run.json"
    assert (record.metrics, record.metrics_by_clip, record.timing["seconds"], record.timing["data"]) == ({"mse": 0.5}, {"mse": {"a/b.avi": 0.5}}, 2.0, 0.5)
    assert record.threads >= 1 and record.versions["python"] and "torch" in record.versions


def test_equal_inputs_equal_bytes_but_for_timing(tmp_path):
    texts = []
    for seconds in (1.0, 2.0):
        content = json.loads(written(tmp_path, seconds=seconds).read_text())
        assert content.pop("timing")["seconds"] == seconds
        texts.append(json.dumps(content))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("key", ["study", "config", "versions", "threads", "git_commit", "weights", "metrics_by_clip", "timing"])
def test_missing_key_names_path_and_key(tmp_path, key):
    path = written(tmp_path)
    content = json.loads(path.read_text())
    del content[key]
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"run.json.*missing {key}"):
        read_record(path)


@pytest.mark.parametrize("change, word", [
    ({"colour": 1}, "unknown key colour"), ({"parameters": "3"}, "parameters is str"), ({"parameters": True}, "parameters is bool"),
    ({"metrics": {"mse": "low"}}, "mse"), ({"metrics_by_clip": {"mse": 3}}, "mse"), ({"weights": [{"name": "w"}]}, "weights"),
    ({"study": "../up"}, "study"), ({"config": {"root": "/data/videos"}}, "absolute path"),
])
def test_wrong_content_is_refused(tmp_path, change, word):
    path = written(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=word) as caught:
        read_record(path)
    assert "run.json" in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "null"])
def test_not_a_record(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(InputError, match="r.json"):
        read_record(tmp_path / "r.json")


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", ".hidden", "a b", "x" * 200, 3])
def test_names_cannot_leave_the_folder(tmp_path, name):
    with pytest.raises(InputError):
        write_record(tmp_path / "results", "study", name, **GOOD)
    with pytest.raises(InputError):
        write_record(tmp_path / "results", name, "run", **GOOD)
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("value", ["/home/a/x.pt", "~/x", "C:\\x\\y", "\\\\server\\x", Path("/x"), "file:///x"])
def test_no_absolute_path_anywhere(tmp_path, value):
    for changes in ({"config": {"a": [value]}}, {"metrics_by_clip": {"mse": {str(value): 1.0}}}, {"data_fingerprint": str(value)},
                    {"weights": [{"name": str(value), "source": "path", "sha256": "0", "fingerprint": "f"}]}):
        with pytest.raises(InputError, match="absolute path"):
            written(tmp_path, **changes)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_is_refused(tmp_path, value):
    with pytest.raises(InputError, match=r"metrics_by_clip.mse.a\b.*finite"):
        written(tmp_path, metrics_by_clip={"mse": {"a": value}})


def test_plain_data_kinds():
    import numpy as np
    import torch

    assert plain_data({"a": np.float32(0.5), "b": torch.tensor(2), "c": (1, None, True), "d": {"y", "x"}, "e": Path("a/b")}) == {"a": 0.5, "b": 2, "c": [1, None, True], "d": ["x", "y"], "e": "a/b"}
    for wrong in (object(), {1: 2}, np.zeros(3), b"x"):
        with pytest.raises(InputError):
            plain_data(wrong)


def test_read_records_sorted_and_named(tmp_path):
    assert read_records(tmp_path, "none") == []
    for run in ("b", "a"):
        write_record(tmp_path, "study", run, **GOOD)
    assert [r.run for r in read_records(tmp_path, "study")] == ["a", "b"]
    (tmp_path / "study" / "a.json").rename(tmp_path / "study" / "c.json")
    with pytest.raises(InputError, match="c.json"):
        read_records(tmp_path, "study")


def test_git_commit_never_fails(tmp_path, monkeypatch):
    assert git_commit(tmp_path) is None
    assert git_commit(tmp_path / "missing") is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit() is None
    assert versions()["torch"]


def test_git_commit_of_a_checkout(tmp_path):
    import shutil
    import subprocess

    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    run = lambda *a: subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@t", *a], check=True, capture_output=True)
    (tmp_path / "a.py").write_text("1")
    run("init"), run("add", "."), run("commit", "-m", "x")
    (tmp_path / "installed").mkdir()
    assert len(git_commit(tmp_path)) == 40
    assert git_commit(tmp_path / "installed") is None, "an untracked folder inside a checkout has no commit"
    (tmp_path / "a.py").write_text("2")
    assert git_commit(tmp_path).endswith("+changed")


def test_mean_by_clip():
    assert mean_by_clip([1, 2, 4], [1, 1, 0], ["x", "y", "unused"]) == {"x": 4.0, "y": 1.5}
    for values, clips, names in (([1], [0, 0], ["a"]), ([1], [1], ["a"]), ([1], [-1], ["a"]), ([1], [0], ["a", "a"])):
        with pytest.raises(InputError):
            mean_by_clip(values, clips, names)
