"""Windows and splits: every window that fits and none that does not; nothing of one clip or group on two sides, ever; bad files set aside."""
import json
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fvlm.core import ConfigError, InputError, VideoError
from fvlm.data import clips
from fvlm.data.clips import ClipEntry, VideoFolder, find_videos
from fvlm.data.video import read_clip
from fvlm.frame_windows import window_indices, window_starts


def write(path, count=24, size=32, seed=0):
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    ground = np.random.default_rng(seed).integers(0, 200, (size, size, 3))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for t in range(count):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.roll(ground, 2 * t, 1).astype(np.uint8), format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    "Eight good clips of four people, a short one, and three bad ones."
    root = tmp_path_factory.mktemp("films")
    for person in range(1, 5):
        for take in (1, 2):
            write(root / f"person{person}" / f"take{take}.mp4", seed=10 * person + take)
    write(root / "person1" / "short.mp4", count=20)
    (root / "person1" / "empty.mp4").touch()
    (root / "person2" / "letter.avi").write_text("Dear reader")
    (root / "person2" / "zeros.mkv").write_bytes(bytes(4000))
    (root / "person2" / "notes.txt").write_text("not looked at")
    (root / ".hidden").mkdir()
    (root / ".hidden" / "a.mp4").write_bytes(b"not looked at")
    (root / "person2" / ".b.mp4").write_bytes(b"not looked at")
    return root


@pytest.fixture(scope="module")
def folder(films):
    return VideoFolder(films, group=r"(person\d)/")


sizes = st.tuples(st.integers(0, 80), st.integers(1, 6), st.integers(1, 6), st.integers(1, 5))
some_ranges = st.none() | st.lists(st.tuples(st.integers(0, 90), st.integers(0, 40)).map(lambda p: (p[0], p[0] + p[1])), max_size=4)


@given(sizes, some_ranges)
def test_windows_are_all_that_fit_and_only_those(shape, ranges):
    num_frames, context, gap, step = shape
    found = window_starts(num_frames, context, gap, step=step, ranges=ranges)
    inside = [set(range(first, min(stop, num_frames))) for first, stop in ([(0, num_frames)] if ranges is None else ranges)]
    fits = lambda s: any({s, s + context * gap} <= part for part in inside)  # noqa: E731
    assert found.dtype == np.int64 and sorted(set(found.tolist())) == found.tolist()
    assert all(fits(s) and window_indices(s, context, gap)[-1] < num_frames for s in found.tolist())
    if step == 1:
        assert found.tolist() == [s for s in range(num_frames) if fits(s)]


def test_window_indices_are_context_then_target():
    assert window_indices(3, 5, 4).tolist() == [3, 7, 11, 15, 19, 23] and window_indices(0, 1, 1).tolist() == [0, 1]


@pytest.mark.parametrize("wrong, says", [
    (dict(num_frames=-1), "num_frames"), (dict(context_frames=0), "context_frames"), (dict(gap=0), "gap"), (dict(step=0), "step"), (dict(gap=1.5), "gap"),
    (dict(ranges=[(5, 2)]), "ranges"), (dict(ranges=[(-1, 2)]), "ranges"), (dict(ranges=[3]), "ranges"), (dict(ranges=7), "ranges"),
])
def test_a_wrong_window_is_named(wrong, says):
    arguments = {**dict(num_frames=30, context_frames=5, gap=4), **wrong}
    with pytest.raises(InputError, match=says):
        window_starts(arguments.pop("num_frames"), arguments.pop("context_frames"), arguments.pop("gap"), **arguments)


def test_the_folder_holds_the_good_and_reports_the_rest(folder, films):
    assert [c.name for c in folder.clips] == [f"person{p}/take{t}.mp4" for p in range(1, 5) for t in (1, 2)]
    assert {c.frames for c in folder.clips} == {24} and folder.clips[0].fps == pytest.approx(25) and folder.clips[0].group == "person1"
    assert folder.short == [("person1/short.mp4", 20)] and [Path(p).name for p, _ in folder.bad] == ["empty.mp4", "letter.avi", "zeros.mkv"]
    assert len(folder) == 8 * 4 == len(folder.windows) and all(isinstance(reason, str) and reason for _, reason in folder.bad)


def test_an_item_is_the_frames_of_its_window(folder):
    for i in (0, 5, 31, -1):
        item = folder[i]
        number, start = folder.windows[i]
        assert item["clip"] == number and item["name"] == folder.clips[number].name and item["indices"].tolist() == window_indices(start, 5, 4).tolist()
        assert torch.equal(item["video"], read_clip(folder.clips[number].path, item["indices"])) and item["video"].shape == (6, 32, 32, 3)
    with pytest.raises(IndexError):
        folder[len(folder)]


def test_bad_files_are_written_once(films, tmp_path):
    log = tmp_path / "out" / "bad_files.jsonl"
    for _ in range(2):
        VideoFolder(films, bad_files=log)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(rows) == 3 and {Path(row["path"]).name for row in rows} == {"empty.mp4", "letter.avi", "zeros.mkv"} and all(row["reason"] for row in rows)


def test_a_clip_that_breaks_after_probing_is_named_and_can_be_set_aside(tmp_path):
    for k in range(3):
        write(tmp_path / "videos" / f"{k}.mp4", seed=k)
    folder = VideoFolder(tmp_path / "videos", bad_files=tmp_path / "bad_files.jsonl")
    damaged = folder.clips[1].path
    data = bytearray(damaged.read_bytes())
    start = data.find(b"mdat") + 4
    data[start : data.find(b"moov") - 4] = b"\xff" * (data.find(b"moov") - 4 - start)  # the table of contents stays good
    damaged.write_bytes(data)
    failed = []
    for number, entry in enumerate(folder.clips):  # quarantining must not disturb this loop
        try:
            read_clip(entry.path, [0, 4])
        except VideoError as error:
            failed.append(error.path)
            folder.quarantine(entry.path, error.reason)
    assert failed == [str(damaged)] and [c.name for c in folder.clips] == ["0.mp4", "2.mp4"]
    assert len(folder) == 8 and [folder[i]["name"] for i in (0, 7)] == ["0.mp4", "2.mp4"] and folder.bad[0][0] == damaged
    assert json.loads((tmp_path / "bad_files.jsonl").read_text())["path"] == str(damaged)


@pytest.mark.parametrize("build, says", [
    (lambda f: VideoFolder(f / "nowhere"), "not there"), (lambda f: VideoFolder(f / "person1" / "take1.mp4"), "a file"),
    (lambda f: VideoFolder(f, only="elephant"), "elephant"), (lambda f: VideoFolder(f, gap=30), "needs 151 frames in a row; the longest is"),
    (lambda f: VideoFolder(f, only=r"empty|zeros"), "none of 2 files"), (lambda f: VideoFolder(f, gap=0), "gap"), (lambda f: VideoFolder(f, context_frames=0), "context_frames"),
    (lambda f: VideoFolder(f, group=r"person\d"), "capture group"), (lambda f: VideoFolder(f, group=r"(elephant)"), "does not match"),
    (lambda f: VideoFolder(f, group=r"(person"), "group"), (lambda f: VideoFolder(f, group=3), "group"), (lambda f: VideoFolder(f, ranges={"person9.mp4": [(0, 9)]}), "person9.mp4"),
])
def test_trouble_is_one_sentence(films, build, says):
    with pytest.raises(InputError, match=says) as caught:
        build(films)
    assert "\n" not in str(caught.value)


def test_an_empty_folder_says_what_was_looked_for(tmp_path):
    with pytest.raises(InputError, match=r"no video files .*\.mp4"):
        VideoFolder(tmp_path)


def test_ranges_by_dict_and_by_function(films):
    name = "person1/take1.mp4"
    by_dict = VideoFolder(films, only="person[12]/take", ranges={name: [(0, 21), (3, 24)]})
    assert by_dict.windows[by_dict.windows[:, 0] == 0, 1].tolist() == [0, 3] and len(by_dict) == 2 + 3 * 4 and by_dict.clips[0].ranges == ((0, 21), (3, 24))
    by_function = VideoFolder(films, only="person[12]/take", ranges=lambda n: [(0, 21)] if n == name else None)
    assert len(by_function) == 1 + 3 * 4 and by_function.clips[1].ranges is None
    away = VideoFolder(films, only="person[12]/take", ranges=lambda n: [] if n == name else None)
    assert away.short == [(name, 24)] and len(away.clips) == 3


def test_links_are_followed_but_not_in_circles(films, tmp_path):
    write(tmp_path / "root" / "b" / "läufer 走る.mp4")
    (tmp_path / "root" / "a").symlink_to(films / "person3")
    (tmp_path / "root" / "b" / "up").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "b" / "dangling.mp4").symlink_to(tmp_path / "nowhere.mp4")
    names = list(find_videos(tmp_path / "root"))
    assert names == ["a/take1.mp4", "a/take2.mp4", "b/dangling.mp4", "b/läufer 走る.mp4"]
    folder = VideoFolder(tmp_path / "root")
    assert len(folder.clips) == 3 and folder.bad[0][1] == "a link to nothing"


def test_the_bar_is_shown_only_on_request(films, capfd):
    VideoFolder(films, only="person4")
    assert "probing" not in capfd.readouterr().err
    VideoFolder(films, only="person4", progress=True)
    assert "probing videos" in capfd.readouterr().err


def test_probing_decodes_no_whole_clip(films, monkeypatch):
    from fvlm.data import file_facts, video

    monkeypatch.setattr(file_facts, "_decoded_count", lambda *rest: pytest.fail("decoded through"))
    monkeypatch.setattr(clips, "probe", lambda path, **named: video.probe(path, isolated=False))
    VideoFolder(films, only="person4")


def test_several_probes_at_once_find_the_same(films, folder, monkeypatch):
    monkeypatch.setattr(clips, "PROBES_AT_ONCE", 2)
    for k in range(8):
        write(films / "more" / f"{k}.mp4", seed=k)
    for k in range(2):
        (films / "more" / f"bad {k}.mp4").write_bytes(bytes(2000))
    many = VideoFolder(films, only="more|person")
    monkeypatch.setattr(clips, "PROBES_AT_ONCE", 1)
    one = VideoFolder(films, only="more|person")
    assert many.clips == one.clips and many.bad == one.bad and many.windows.tolist() == one.windows.tolist() and len(many.bad) == 5
    for path in (films / "more").iterdir():
        path.unlink()


def item(name, path, **facts):
    return SimpleNamespace(**{"name": name, "path": path, "label": None, "group": None, "split": None, "caption": None, "ranges": None, **facts})


@pytest.fixture
def items(films):
    "Two takes of four people, as a data set lists them."
    return [item(f"p{p}/t{t}", films / f"person{p}" / f"take{t}.mp4", label=f"l{t}", group=f"p{p}", split="test" if p == 4 else "train", caption=None if t == 2 else f"person {p}")
            for p in range(1, 5) for t in (1, 2)]


def test_items_of_a_data_set(items, films):
    items[2].ranges = [(0, 21)]
    items += [item("broken", films / "person1" / "empty.mp4"), item("glimpse", films / "person1" / "short.mp4")]
    folder = VideoFolder.from_items(items)
    assert [c.name for c in folder.clips] == [i.name for i in items[:8]] and [c.group for c in folder.clips[:3]] == ["p1", "p1", "p2"]
    assert folder.short == [("glimpse", 20)] and folder.bad[0][0].name == "empty.mp4" and len(folder) == 7 * 4 + 1 and folder.root == films
    first, second = folder[0], folder[4]
    assert first["label"] == "l1" and first["caption"] == "person 1" and second["label"] == "l2" and "caption" not in second
    assert torch.equal(first["video"], read_clip(items[0].path, first["indices"]))
    parts = folder.split()
    assert {name: {c.group for c in part.clips} for name, part in parts.items()} == {"train": {"p1", "p2", "p3"}, "test": {"p4"}}
    by_share = folder.split({"a": 0.5, "b": 0.5})
    assert not {c.group for c in by_share["a"].clips} & {c.group for c in by_share["b"].clips}


def test_a_split_of_their_own_is_held_to_the_promise(items):
    items[0].split = "test"
    with pytest.raises(ConfigError, match="split: puts the clips of one unit, .*p1/t1.*p1/t2.* into .*test.*train"):
        VideoFolder.from_items(items).split()
    assert {len(part.clips) for part in VideoFolder.from_items(items).split(by="clip").values()} == {5, 3}
    items[0].split = items[1].split = None
    parts = VideoFolder.from_items(items).split()
    assert sum(len(part.clips) for part in parts.values()) == 6, "what the lists leave out is left out"


def test_two_segments_of_one_file_stay_together(items):
    segments = [item(f"s{k}", items[k // 2].path, ranges=[(0, 22)] if k % 2 else [(2, 24)]) for k in range(8)]
    folder = VideoFolder.from_items(segments)
    assert len(folder.clips) == 8 and {c.group for c in folder.clips} == {f"s{k}" for k in range(8)}
    for part in folder.split({"a": 0.5, "b": 0.5}, by="clip").values():
        assert len(part.clips) == 4 and len({c.path for c in part.clips}) == 2


@pytest.mark.parametrize("change, says", [
    (lambda items: items.clear(), "items: got none"), (lambda items: items.append(items[0]), "9 items with 8 names"),
    (lambda items: items.append(item("world/3", None)), "'world/3' has no file"),
])
def test_items_that_cannot_be(items, change, says):
    change(items)
    with pytest.raises(InputError, match=says):
        VideoFolder.from_items(items)


def test_pictures_and_arrays_are_clips_too(tmp_path):
    from PIL import Image

    frames = np.random.default_rng(0).integers(0, 255, (30, 16, 20, 3)).astype(np.uint8)
    (tmp_path / "pictures").mkdir()
    for k, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / "pictures" / f"{k:03d}.png")
    np.save(tmp_path / "array.npy", frames)
    folder = VideoFolder.from_items([item("p", tmp_path / "pictures"), item("a", tmp_path / "array.npy")], context_frames=2, gap=3)
    assert [c.frames for c in folder.clips] == [30, 30]
    for k in (0, 23, 24, -1):
        assert torch.equal(folder[k]["video"], torch.from_numpy(frames[folder[k]["indices"]]))


def test_sequences_of_a_stack_are_clips_too(tmp_path):
    stack = np.random.default_rng(0).integers(0, 255, (20, 6, 16, 16)).astype(np.uint8)  # time first, as Moving-MNIST has it
    np.save(tmp_path / "stack.npy", stack)
    items = [item(f"stack.npy#{n:05d}", tmp_path / f"stack.npy#{n:05d}", kind="npy_stack", split="test" if n > 3 else "train") for n in (5, 0, 1, 2, 3, 4)]
    folder = VideoFolder.from_items([*items, item("stack.npy#00006", tmp_path / "stack.npy#00006", kind="npy_stack")], context_frames=3, gap=2)
    assert [c.frames for c in folder.clips] == [20] * 6 and len(folder) == 6 * 14 and [path.name for path, _ in folder.bad] == ["stack.npy#00006"]
    assert folder.clips[0].name == "stack.npy#00005" and folder.root == tmp_path
    for k in (0, 13, 14, -1):
        number = int(folder[k]["name"][-1])
        assert np.array_equal(folder[k]["video"].numpy(), np.repeat(stack[folder[k]["indices"], number][..., None], 3, axis=-1))
    parts = folder.split(by="clip")
    assert {name: {c.name[-1] for c in part.clips} for name, part in parts.items()} == {"train": set("0123"), "test": set("45")}, "one file, and still six clips"


def test_a_repaired_file_leaves_the_list_of_bad_ones(tmp_path):
    write(tmp_path / "films" / "a.mp4")
    (tmp_path / "films" / "b.mp4").write_bytes(bytes(999))
    log = tmp_path / "bad_files.jsonl"
    log.write_text('{"path": "/elsewhere/c.mp4", "reason": "another run"}\n{"path": "/half a li')
    VideoFolder(tmp_path / "films", bad_files=log)
    assert [Path(json.loads(line)["path"]).name for line in log.read_text().splitlines()] == ["c.mp4", "b.mp4"]
    write(tmp_path / "films" / "b.mp4")
    VideoFolder(tmp_path / "films", bad_files=log)
    assert [Path(json.loads(line)["path"]).name for line in log.read_text().splitlines()] == ["c.mp4"]


def test_it_crosses_to_workers(folder):
    again = pickle.loads(pickle.dumps(folder))
    assert len(again) == len(folder) and torch.equal(again[3]["video"], folder[3]["video"])


# --- splits


def fake(entries):
    "A VideoFolder over clips that need not exist, four windows each."
    folder = object.__new__(VideoFolder)
    folder.root, folder.context_frames, folder.gap, folder.step, folder.size, folder.cache, folder.bad_files = Path("/videos"), 5, 4, 1, None, None, None
    folder.bad, folder.short = [], []
    folder.clips = [ClipEntry(path=Path("/videos") / name, name=name, frames=24, fps=25.0, group=group, ranges=None) for name, group in entries]
    folder.windows = np.array([(k, s) for k in range(len(entries)) for s in range(4)], np.int64)
    return folder


entries_of = st.lists(st.integers(0, 7), min_size=1, max_size=20).map(lambda groups: [(f"c{k:02d}.mp4", f"g{g}") for k, g in enumerate(groups)])
shares_of = st.lists(st.integers(1, 10), min_size=1, max_size=4).map(lambda n: {f"part{k}": x / sum(n) for k, x in enumerate(n)})


@given(entries_of, shares_of, st.sampled_from(["clip", "group"]), st.integers(0, 5))
def test_nothing_is_ever_on_two_sides(entries, shares, by, seed):
    folder = fake(entries)
    units = {group if by == "group" else name for name, group in entries}
    if len(units) < len(shares):
        with pytest.raises(ConfigError, match="at least one unit a part"):
            folder.split(shares, by=by, seed=seed)
        return
    parts = folder.split(shares, by=by, seed=seed)
    assert list(parts) == list(shares)
    sides = [{(c.group if by == "group" else c.name) for c in part.clips} for part in parts.values()]
    assert all(sides) and sum(map(len, sides)) == len(units) == len(set().union(*sides))
    assert sorted(c.name for part in parts.values() for c in part.clips) == sorted(name for name, _ in entries)
    assert sum(len(part) for part in parts.values()) == len(folder)
    for part, side in zip(parts.values(), sides):
        assert {part.clips[k].name for k in part.windows[:, 0]} == {c.name for c in part.clips} and len(part) == 4 * len(part.clips)
    counts = np.array([len(side) for side in sides])
    wanted = np.array(list(shares.values())) * len(units)
    assert (np.abs(counts - wanted) < len(shares) + 1e-9).all()


@given(entries_of, st.integers(0, 5), st.randoms())
def test_the_deal_depends_on_names_and_seed_alone(entries, seed, random):
    shuffled = entries[:]
    random.shuffle(shuffled)
    shares = {"train": 1.0} if len({g for _, g in entries}) < 2 else {"train": 0.5, "test": 0.5}
    a, b = (fake(order).split(shares, seed=seed) for order in (entries, shuffled))
    assert all({c.name for c in a[part].clips} == {c.name for c in b[part].clips} for part in shares)


def test_seeds_differ_and_the_default_has_three_parts():
    folder = fake([(f"c{k}.mp4", f"g{k}") for k in range(40)])
    parts = folder.split()
    assert {name: len(part.clips) for name, part in parts.items()} == {"train": 28, "val": 6, "test": 6}
    assert {c.name for c in parts["train"].clips} != {c.name for c in folder.split(seed=1)["train"].clips}


def test_two_names_of_one_file_stay_together(tmp_path):
    for k in range(6):
        write(tmp_path / "real" / f"{k}.mp4", seed=k)
        os.symlink(tmp_path / "real" / f"{k}.mp4", tmp_path / f"alias{k}.mp4")
    folder = VideoFolder(tmp_path)
    assert len(folder.clips) == 12
    for seed in range(4):
        for by in ("clip", "group"):
            parts = folder.split({"a": 0.5, "b": 0.5}, by=by, seed=seed)
            sides = [{os.path.realpath(c.path) for c in part.clips} for part in parts.values()]
            assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 6
    with pytest.raises(ConfigError, match="share a file"):
        folder.split(rule=lambda name: "alias" if name.startswith("alias") else "real")


def test_a_rule_decides(folder):
    parts = folder.split(rule=lambda person: {"person1": "test", "person4": None}.get(person, "train"))
    assert {name: sorted({c.group for c in part.clips}) for name, part in parts.items()} == {"test": ["person1"], "train": ["person2", "person3"]}
    assert torch.equal(parts["test"][0]["video"], folder[0]["video"])
    by_clip = folder.split(rule=lambda name: "one" if name.endswith("take1.mp4") else "two", by="clip")
    assert all(len(part.clips) == 4 for part in by_clip.values())


def test_quarantine_in_one_view_leaves_the_other(folder):
    parts = folder.split({"train": 0.5, "test": 0.5})
    parts["train"].quarantine(parts["train"].clips[0].path, "it broke")
    assert len(parts["train"].clips) == 3 and len(parts["test"].clips) == 4 and len(folder.clips) == 8
    assert len(parts["train"].bad) == len(folder.bad) + 1


@pytest.mark.parametrize("arguments, says", [
    (dict(fractions={"train": 0.5, "test": 0.4}), "sum of 0.9"), (dict(fractions={}), "fractions"), (dict(fractions=[0.5, 0.5]), "fractions"),
    (dict(fractions={"train": 1.5, "test": -0.5}), "fractions"), (dict(fractions={"train": 1.0, "test": 0}), "fractions"), (dict(fractions={"train": "all"}), "fractions"),
    (dict(by="window"), "by"), (dict(fractions={"train": 1.0}, rule=str), "fractions and rule"), (dict(rule=lambda g: None), "none of"),
    (dict(fractions={f"p{k}": 0.2 for k in range(5)}), "5 parts for 4 units"),
])
def test_a_wrong_split_is_named(folder, arguments, says):
    with pytest.raises(ConfigError, match=says):
        folder.split(**arguments)


def test_the_reader_that_probe_found_is_used(folder, monkeypatch):
    seen = []
    monkeypatch.setattr(clips, "decode", lambda path, indices, **options: seen.append(options["backend"]) or SimpleNamespace(frames=None))
    part = folder.view([0])
    for backend in ("decord", "pyav"):
        part.clips = [ClipEntry(**{**vars(part.clips[0]), "backend": backend})]
        part[0]
    assert seen == ["auto", "pyav"]


@pytest.mark.clips
def test_kth_by_person(shared_clips):
    root = shared_clips / "videos" / "kth"
    if not root.is_dir():
        pytest.skip("no KTH clips")
    folder = VideoFolder(root, group=r"person(\d\d)_", only=r"person(0[1-3]|1[789])_", size=32)
    parts = folder.split(rule=lambda person: "train" if int(person) <= 16 else "test")
    assert not {c.group for c in parts["train"].clips} & {c.group for c in parts["test"].clips} and len(parts["train"]) > 1000
    assert parts["test"][len(parts["test"]) - 1]["video"].shape == (6, 32, 32, 3)
