"""Every card against a small copy in the dataset's own layout: items, sides, groups, lists; and against copies that are wrong."""
import re
import json
import shutil
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from fvlm.app.cards_commands import check_dataset, compare, look_at
from fvlm.app.cli import main
from fvlm.core import ConfigError, InputError
from fvlm.data.cards import list_cards, load_card
from fvlm.data.dataset import open_dataset, read_item
from fvlm.frame_windows import frame_ranges
from fvlm.item_facts import PROBLEMS, DatasetItem

# --- small copies ----------------------------------------------------------------------------------------------------


@dataclass
class Tree:
    "A copy of a dataset that a test wrote, and what its authors would say of it."

    root: Path
    group: object  # item name -> the group as the dataset's documentation defines it
    sides: dict = field(default_factory=dict)  # protocol -> {item key: side}
    lists: tuple = ()  # files without which its official split cannot be known
    moved: object = None  # writes a list in which one group stands on two sides; returns the protocol
    item: str = ""  # a file that is an item


class Writer:
    "Small files of every kind, each with content of its own."

    def __init__(self, templates):
        self.templates, self.count = templates, 0

    def video(self, path, width=64, height=48, rate=25, frames=6, codec="mpeg4"):
        import av

        key = (width, height, rate, frames, codec, path.suffix)
        made = self.templates / ("_".join(map(str, key[:5])) + path.suffix)
        if not made.exists():
            with av.open(str(made), "w") as container:
                stream = container.add_stream(codec, rate=rate, width=width, height=height, pix_fmt="yuv420p")
                for i in range(frames):
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((height, width, 3), 20 * i, np.uint8), format="rgb24")))
                container.mux(stream.encode())
        path.parent.mkdir(parents=True, exist_ok=True)
        self.count += 1
        path.write_bytes(made.read_bytes() + self.count.to_bytes(4, "big"))  # a tail that no reader looks at

    def pictures(self, folder, names, width=32, height=24, mode="RGB"):
        from PIL import Image

        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            self.count += 1
            picture = Image.new(mode, (width, height))
            picture.putpixel((self.count % width, self.count // width % height), 255 if mode == "L" else (255, 255, 255))
            picture.save(folder / name)

    def text(self, path, text):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def kth(root, write):
    people = (1, 4, 9, 17, 22, 25)
    for person in people:
        for label, folder in (("walking", "walking/"), ("handwaving", "")):
            write.video(root / f"{folder}person{person:02d}_{label}_d1_uncomp.avi", 160, 120)
    write.text(root / "00sequences.txt", "Training:   person11, 12\n\n" + "".join(f"person{p:02d}_{label}_d1\t\tframes\t1-3, 4-6\n" for p in people for label in ("walking", "handwaving"))
               + "person13_handclapping_d3\t*missing*\n")

    def sides(rule):
        return {f"person{p:02d}_{label}_d1": rule(p) for p in people for label in ("walking", "handwaving")}

    return Tree(root, lambda name: name.split("person")[1][:2], item="walking/person01_walking_d1_uncomp.avi", sides={
        "persons_16_9": sides(lambda p: "test" if p >= 17 else "val" if p % 4 == 0 else "train"),
        "persons_8_8_9": sides(lambda p: "train" if 11 <= p <= 18 else "val" if p in (19, 20, 21, 23, 24, 25, 1, 4) else "test")})


def moving_mnist(root, write):
    clips = np.random.default_rng(0).integers(0, 255, (20, 3, 64, 64), dtype=np.uint8)
    root.mkdir(parents=True)
    np.save(root / "mnist_test_seq.npy", clips)
    write.text(root / "train-images-idx3-ubyte.gz", "not read here")
    return Tree(root, lambda name: name, {"published": {f"mnist_test_seq.npy#{i:05d}": "test" for i in range(3)}}, item="mnist_test_seq.npy")


UCF = [("Archery", "Archery"), ("YoYo", "YoYo"), ("HandstandPushups", "HandStandPushups")]  # the third is spelt in two ways in the dataset itself


def ucf101(root, write):
    names = [(f"{folder}/v_{label}_g{g:02d}_c{c:02d}.avi", g) for folder, label in UCF for g in (1, 9, 16, 25) for c in (1, 2)]
    for name, _ in names:
        write.video(root / "UCF-101" / name, 320, 240)
    write.text(root / "ucfTrainTestlist/classInd.txt", "1 Archery\n")
    for n, tested in ((1, range(1, 8)), (2, range(8, 15)), (3, range(15, 22))):
        write.text(root / f"ucfTrainTestlist/trainlist0{n}.txt", "".join(f"{name} 1\r\n" for name, g in names if g not in tested))
        write.text(root / f"ucfTrainTestlist/testlist0{n}.txt", "".join(f"{name.replace('HandStand', 'Handstand')}\r\n" for name, g in names if g in tested))

    def moved():
        train, test = root / "ucfTrainTestlist/trainlist01.txt", root / "ucfTrainTestlist/testlist01.txt"
        first, rest = train.read_text().split("\n", 1)
        train.write_text(rest)
        test.write_text(test.read_text() + first.split()[0] + "\n")
        return "official_1"

    key = lambda name: name.split("/")[1].removesuffix(".avi").lower()
    return Tree(root, lambda name: (name.split("/")[1], name.split("_g")[1][:2]), {
        "by_group": {key(n): "test" if g <= 7 else "val" if g <= 10 else "train" for n, g in names},
        **{f"official_{k}": {key(n): "test" if 7 * k - 6 <= g <= 7 * k else "train" for n, g in names} for k in (1, 2, 3)}},
        tuple(f"ucfTrainTestlist/{side}list0{k}.txt" for k in (1, 2, 3) for side in ("train", "test")), moved, "UCF-101/Archery/v_Archery_g01_c01.avi")


def ucf_sports(root, write):
    clips = ["Diving-Side/001", "Diving-Side/014", "Golf-Swing-Back/005", "Golf-Swing-Front/001", "Golf-Swing-Front/002", "Kicking-Side/001", "Lifting/002", "Lifting/003", "Walk-Front/007", "Walk-Front/008"]
    for clip in clips:
        write.pictures(root / "ucf action" / clip, [f"{clip[:2]}_{i:03d}.jpg" for i in range(3)])
        write.text(root / "ucf action" / clip / "gt" / "000.txt", "1\t2\t3\t4\n")
    write.video(root / "ucf action/Diving-Side/001/2538.avi")  # the same clip once more: the pictures win
    write.video(root / "ucf action/Run-Side/001/x.avi")  # a clip that is a film only
    test = {"Diving-Side/001", "Golf-Swing-Back/005", "Golf-Swing-Front/001", "Lifting/002", "Walk-Front/007", "Run-Side/001"}
    return Tree(root, lambda name: "/".join(name.split("/")[1:3]), {"first_third": {c: "test" if c in test else "train" for c in [*clips, "Run-Side/001"]}}, item="ucf action/Run-Side/001/x.avi")


def penn_action(root, write):
    from scipy.io import savemat

    for number, train in ((1, 1), (2, -1), (2326, 1)):
        write.pictures(root / f"Penn_Action/frames/{number:04d}", [f"{i:06d}.jpg" for i in (1, 2, 3)])
        (root / "Penn_Action/labels").mkdir(exist_ok=True)
        savemat(root / f"Penn_Action/labels/{number:04d}.mat", {"action": "baseball_pitch", "train": [[train]], "nframes": [[3]], "x": np.zeros((3, 13)), "pose": "back"})
    return Tree(root, lambda name: name.split("/")[-1], {"official": {"0001": "train", "0002": "test", "2326": "train"}}, ("Penn_Action/labels",), item="Penn_Action/frames/0001/000001.jpg")


def ucsd_pedestrian(root, write):
    top, sides = root / "UCSD_Anomaly_Dataset.v1p2", {}
    for scene, size in (("UCSDped1", (238, 158)), ("UCSDped2", (360, 240))):
        for part in ("Train", "Test"):
            for n in (1, 2):
                write.pictures(top / scene / part / f"{part}{n:03d}", [f"{i:03d}.tif" for i in (1, 2, 3, 4)], *size, mode="L")
                sides[f"{scene}/{part}{n:03d}"] = part.lower()
        write.pictures(top / scene / "Test/Test001_gt", ["001.bmp"], *size, mode="L")
        write.text(top / scene / "Train/Train001/._001.tif", "left by a Mac")
        write.text(top / scene / f"Test/{scene}.m", "TestVideoFile = {};\nTestVideoFile{end+1}.gt_frame = [2:3];\nTestVideoFile{end+1}.gt_frame = [1:2, 4:4];\n")
    return Tree(root, lambda name: name, {"official": sides}, item="UCSD_Anomaly_Dataset.v1p2/UCSDped1/Test/Test001/001.tif")


def hmdb51(root, write):
    clips = [("draw_sword", f"{film}_draw_sword_f_cm_np1_le_med_{n}") for film in ("A (HQ)+!", "B_two", "C") for n in (0, 1)] + [("sword", f"{film}_sword_f_cm_np2_fr_goo_{n}") for film in ("A (HQ)+!", "D") for n in (0, 1)]
    sides = {f"official_{k}": {} for k in (1, 2, 3)}
    for label, stem in clips:
        write.video(root / "hmdb51_org" / label / f"{stem}.avi", rate=30)
    for k in (1, 2, 3):
        for label in ("draw_sword", "sword"):
            films = sorted({stem.split(f"_{label}_")[0] for own, stem in clips if own == label})
            flags = {film: (i + k) % 3 if label == "draw_sword" else 1 + (i + k) % 2 for i, film in enumerate(films)}
            lines = [(stem, flags[stem.split(f"_{label}_")[0]]) for own, stem in clips if own == label]
            write.text(root / f"testTrainMulti_7030_splits/{label}_test_split{k}.txt", "".join(f"{stem}.avi {flag} \n" for stem, flag in lines))
            sides[f"official_{k}"] |= {stem: [None, "train", "test"][flag] for stem, flag in lines}

    def moved():
        path = root / "testTrainMulti_7030_splits/sword_test_split1.txt"
        first, rest = path.read_text().split("\n", 1)
        path.write_text(first.replace(".avi 1", ".avi X").replace(".avi 2", ".avi 1").replace(".avi X", ".avi 2") + "\n" + rest)
        return "official_1"

    return Tree(root, lambda name: (name.split("/")[1], name.split("/")[2].split(f"_{name.split('/')[1]}_")[0]), sides,
                tuple(f"testTrainMulti_7030_splits/{label}_test_split1.txt" for label in ("draw_sword", "sword")), moved, "hmdb51_org/sword/D_sword_f_cm_np2_fr_goo_0.avi")


def something_something_v2(root, write):
    for i in (1, 22, 333, 78687):
        write.video(root / f"20bn-something-something-v2/{i}.webm", rate=12, codec="libvpx")
    record = lambda i: {"id": str(i), "label": f"putting cup {i} on a table", "template": "Putting [something] on [something]", "placeholders": [f"cup {i}", "a table"]}
    write.text(root / "labels/train.json", json.dumps([record(1), record(22)]))
    write.text(root / "labels/validation.json", json.dumps([record(333)]))
    write.text(root / "labels/test.json", json.dumps([{"id": "78687"}]))
    write.text(root / "labels/test-answers.csv", "78687;Putting something on something\n")
    write.text(root / "labels/labels.json", json.dumps({"Putting something on something": "0"}))
    return Tree(root, lambda name: name, {"official": {"1": "train", "22": "train", "333": "val", "78687": "test"}}, ("labels/train.json", "labels/validation.json"), item="20bn-something-something-v2/1.webm")


def kinetics400(root, write):
    clips = [("train", "air drumming", "_dbcJuKJQNs", 40), ("train", "yoga", "a-b_c-d_e-f", 5), ("val", "yoga", "R6llTwEh07w", 10), ("test", "", "SOX5yA1l24A", 7)]
    name = lambda c: f"{c[2]}_{c[3]:06d}_{c[3] + 10:06d}"
    for clip in clips:
        write.video(root / clip[0] / f"{name(clip)}.mp4")
    write.video(root / f"replacement/replacement_for_corrupted_k400/{name(clips[0])}.mp4")
    for side in ("train", "val"):
        write.text(root / f"annotations/{side}.csv", "label,youtube_id,time_start,time_end,split,is_cc\n" + "".join(f'"{c[1]}",{c[2]},{c[3]},{c[3] + 10},{side},0\n' for c in clips if c[0] == side))
    write.text(root / "annotations/test.csv", "youtube_id,time_start,time_end,split,is_cc\n" + "".join(f"{c[2]},{c[3]},{c[3] + 10},test,0\n" for c in clips if c[0] == "test"))

    def moved():
        path = root / "annotations/val.csv"
        path.write_text(path.read_text() + '"yoga",_dbcJuKJQNs,90,100,val,0\n')
        write.video(root / "val/_dbcJuKJQNs_000090_000100.mp4")
        return "official"

    return Tree(root, lambda name: name.split("/")[-1][:11], {"official": {name(c): c[0] for c in clips}}, (), moved, f"val/{name(clips[2])}.mp4")


def epic_kitchens(root, write):
    top = root / "EPIC-KITCHENS"
    for video in ("P01_01", "P01_102"):
        write.pictures(top / f"P01/rgb_frames/{video}", [f"frame_{i:010d}.jpg" for i in range(1, 9)])
    write.video(top / "P02/videos/P02_03.MP4", rate=50, frames=8)
    write.video(top / "P01/videos/P01_11.MP4", rate=50, frames=8)
    head = "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,start_frame,stop_frame"
    row = lambda n, video, a, b: f"{video}_{n},{video[:3]},{video},00:00:01.100,00:00:00.{a:02d},00:00:02.{b:02d},{a},{b}"
    full = ",take knife and plate,take,0,knife,4,\"['knife', 'plate']\",\"[4, 2]\"\n"
    write.text(root / "EPIC_100_train.csv", head + ",narration,verb,verb_class,noun,noun_class,all_nouns,all_noun_classes\n" + "".join(row(n, v, a, b) + full for n, v, a, b in ((0, "P01_01", 1, 3), (1, "P01_01", 3, 8), (0, "P01_102", 2, 5))))
    write.text(root / "EPIC_100_validation.csv", head + ",narration,verb,verb_class,noun,noun_class,all_nouns,all_noun_classes\n" + row(0, "P01_11", 1, 4) + full)
    write.text(root / "EPIC_100_test_timestamps.csv", head + "\n" + row(0, "P02_03", 4, 7) + "\n")

    def moved():
        path = root / "EPIC_100_validation.csv"
        path.write_text(path.read_text() + row(9, "P01_01", 5, 6) + full)
        return "official"

    return Tree(root, lambda name: name.split("#")[0].split("/")[-1].removesuffix(".MP4"), {"official": {"P01_01": "train", "P01_102": "train", "P01_11": "val", "P02_03": "test"}},
                ("EPIC_100_train.csv", "EPIC_100_validation.csv"), moved, "EPIC-KITCHENS/P02/videos/P02_03.MP4")


def webvid(root, write):
    for block, number in (("000001_000050", 11), ("000001_000050", 12), ("016401_016450", 1017127174)):
        write.video(root / block / f"{number}.mp4")
    for side, numbers in (("train", (11, 12)), ("val", (1017127174,))):
        write.text(root / f"results_10M_{side}.csv", "videoid,contentUrl,duration,page_dir,name\n" + "".join(f'{n},hidden,PT00H00M15S,x,"A cat, asleep"\n' for n in numbers))
    return Tree(root, lambda name: name, {"official": {"11": "train", "12": "train", "1017127174": "val"}}, ("results_10M_train.csv", "results_10M_val.csv"), item="000001_000050/11.mp4")


def sample_clips(root, write):
    for name in ("bikes", "bigbuckbunny", "carphone_pristine"):
        write.video(root / f"{name}.mp4", frames=3)
    return Tree(root, lambda name: name, item="bikes.mp4")


TREES = (kth, moving_mnist, ucf101, ucf_sports, penn_action, ucsd_pedestrian, hmdb51, something_something_v2, kinetics400, epic_kitchens, webvid, sample_clips)
BY_NAME = {write.__name__: write for write in TREES}
SPLITS = [(name, protocol) for name in BY_NAME for protocol in load_card(name).rules.splits.protocols]


@pytest.fixture(scope="session")
def copies(tmp_path_factory):
    "name -> a Tree, written once; not to be changed."
    writer, made = Writer(tmp_path_factory.mktemp("templates")), {}

    def get(name):
        if name not in made:
            made[name] = BY_NAME[name](tmp_path_factory.mktemp(name) / "copy", writer)
        return made[name]
    return get


@pytest.fixture
def own_copy(tmp_path, tmp_path_factory):
    "name -> a Tree of this test's own."
    return lambda name: BY_NAME[name](tmp_path / name, Writer(tmp_path))


def kinds(problems):
    return {p.kind for p in problems}


def test_every_card_is_tested_here():
    assert set(BY_NAME) | {"worlds"} == set(list_cards())
    assert {name for name, _ in SPLITS} | {"worlds", "sample_clips"} == set(list_cards())


# --- sides and groups ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, protocol", SPLITS)
def test_every_item_stands_where_its_authors_put_it(copies, name, protocol):
    tree = copies(name)
    found = open_dataset(name, tree.root, protocol=protocol)
    assert {item.key: item.split for item in found.items} == tree.sides[protocol]
    assert all(item in found.part(item.split) for item in found.items if item.split)
    assert kinds(found.problems) <= {"missing", "incomplete"}


@pytest.mark.parametrize("name, protocol", SPLITS)
def test_no_group_stands_on_both_sides(copies, name, protocol):
    "By the loader's groups, and by those that the test reads from the names itself."
    tree = copies(name)
    found = open_dataset(name, tree.root, protocol=protocol)
    sides = [side for side in load_card(name).protocol(protocol).sides if found.part(side)]
    assert sides
    for a, b in combinations(sides, 2):
        assert not {i.group for i in found.part(a)} & {i.group for i in found.part(b)}
        assert not {tree.group(i.name) for i in found.part(a)} & {tree.group(i.name) for i in found.part(b)}
    for item, other in combinations(found.items, 2):
        assert (item.group == other.group) == (tree.group(item.name) == tree.group(other.name)), (item.name, other.name)
    assert all(found.sides[item.group] == item.split for item in found.items if item.split)


@pytest.mark.parametrize("name", ["ucf101", "hmdb51", "kinetics400", "epic_kitchens"])
def test_a_split_that_tears_a_group_is_refused(own_copy, name):
    tree = own_copy(name)
    protocol = tree.moved()
    with pytest.raises(ConfigError, match="1 of .* groups on two sides, such as"):
        open_dataset(name, tree.root, protocol=protocol)
    found = open_dataset(name, tree.root, protocol=protocol, strict=False)
    assert [p.kind for p in found.problems if p.kind not in ("missing", "incomplete")] == ["group on both sides"]


def test_worlds_are_three_seeds():
    found = open_dataset("worlds")
    assert {(i.label, i.extra["seed"], i.split) for i in found.items} == {(w, s, side) for w in ("MovingDigits", "BouncingSprites", "CuedTarget", "PhotoPan") for s, side in (("0", "train"), ("1", "val"), ("2", "test"))}
    assert len({i.group for i in found.items}) == 12 and all(i.path is None for i in found.items)
    assert len({read_item(i).numpy().tobytes() for i in found.items}) == 12
    with pytest.raises(ConfigError, match="root: got 'x', expected None: worlds is generated"):
        open_dataset("worlds", "x")


# --- what items know -------------------------------------------------------------------------------------------------

def items_of(copies, name, **options):
    return {item.key: item for item in open_dataset(name, copies(name).root, **options).items}


def test_kth_items(copies, tmp_path):
    item = items_of(copies, "kth")["person09_walking_d1"]
    assert (item.label, item.person, item.group, item.ranges, item.extra) == ("walking", "09", "person09", ((0, 3), (3, 6)), {"scene": "1"})
    assert read_item(item).shape == (6, 120, 160, 3) and read_item(item, [5, 0], size=(12, 16)).shape == (2, 12, 16, 3)
    root = tmp_path / "no list"
    shutil.copytree(copies("kth").root, root)
    (root / "00sequences.txt").rename(tmp_path / "elsewhere.txt")
    assert items_of_root("kth", root)["person09_walking_d1"].ranges is None
    assert items_of_root("kth", root, annotations={"sequences": tmp_path / "elsewhere.txt"})["person09_walking_d1"].ranges == ((0, 3), (3, 6))


def items_of_root(name, root, **options):
    return {item.key: item for item in open_dataset(name, root, **options).items}


def test_kth_agrees_with_the_list_of_the_dataset(shared_clips):
    import re

    path = shared_clips / "kth_sequences.txt"
    found = open_dataset("kth", shared_clips / "videos" / "kth", annotations={"sequences": path})
    assert len(found) == 41
    for item in found.items:
        line = next(line for line in path.read_text().splitlines() if line.startswith(item.key))
        assert item.ranges == tuple((int(a) - 1, int(b)) for a, b in re.findall(r"(\d+)-(\d+)", line.split("frames")[1]))
        person = int(item.person)
        assert item.split == ("test" if person >= 17 else "val" if person % 4 == 0 else "train")
    assert [p.name for p in found.problems if p.kind == "unmatched"] == ["person15_handwaving.avi"]


def test_a_frame_of_two_ranges_counts_once(own_copy):
    tree = own_copy("kth")
    (tree.root / "00sequences.txt").write_text("person09_walking_d1\tframes\t3-6, 1-4\n")
    item = items_of_root("kth", tree.root)["person09_walking_d1"]
    assert item.ranges == ((2, 6), (0, 4)) and len(read_item(item)) == 6


def test_ucf101_items_take_the_label_from_the_folder(copies, tmp_path, own_copy):
    items = items_of(copies, "ucf101")
    assert {i.label for i in items.values()} == {"Archery", "YoYo", "HandstandPushups"} and items["v_handstandpushups_g09_c02"].group == "HandstandPushups_g09"
    flat = own_copy("ucf101").root
    for path in sorted(flat.rglob("*.avi")):
        path.rename(flat / path.name)
    assert {i.label for i in items_of_root("ucf101", flat).values()} == {"Archery", "YoYo", "HandStandPushups"}


def test_hmdb_items(copies, own_copy):
    items = items_of(copies, "hmdb51")
    item = items["A (HQ)+!_draw_sword_f_cm_np1_le_med_0"]
    assert item.label == "draw_sword" and item.group == "draw_sword/A (HQ)+!" and item.extra["quality"] == "med" and item.extra["people"] == "1"
    assert items["A (HQ)+!_sword_f_cm_np2_fr_goo_0"].label == "sword"
    flat = own_copy("hmdb51").root
    for path in sorted(flat.rglob("*.avi")):
        path.rename(flat / path.name)
    assert {k: i.label for k, i in items_of_root("hmdb51", flat).items()} == {k: i.label for k, i in items.items()}


def test_captions_come_with_items(copies):
    items = items_of(copies, "something_something_v2")
    assert items["22"].caption == "putting cup 22 on a table" and items["22"].label == items["78687"].label == "Putting something on something" and items["78687"].caption is None
    items = items_of(copies, "webvid")
    assert items["11"].caption == "A cat, asleep" and items["11"].extra["duration"] == "PT00H00M15S" and "hidden" not in repr(items)


def test_epic_segments_are_items(copies):
    found = open_dataset("epic_kitchens", copies("epic_kitchens").root)
    assert [i.name.rsplit("/", 1)[1] for i in found.items] == ["P01_01#P01_01_0", "P01_01#P01_01_1", "P01_102#P01_102_0", "P01_11.MP4#P01_11_0", "P02_03.MP4#P02_03_0"]
    first, *_, last = found.items
    assert (first.caption, first.label, first.ranges, first.person, first.kind) == ("take knife and plate", "take knife", ((0, 3),), "P01", "frames")
    assert (last.caption, last.ranges, last.extra["start_time"], last.kind) == (None, ((3, 7),), "00:00:00.04", "video")
    assert len(read_item(last)) == 4 and read_item(first).shape == (3, 24, 32, 3)


def test_a_segment_that_stands_twice_is_kept_once(own_copy):
    tree = own_copy("epic_kitchens")
    path = tree.root / "EPIC_100_train.csv"
    path.write_text(path.read_text() + path.read_text().splitlines()[1] + "\n")
    found = open_dataset("epic_kitchens", tree.root)
    assert len(found) == 5 and [p.name for p in found.problems if p.kind == "same key"] == ["EPIC-KITCHENS/P01/rgb_frames/P01_01#P01_01_0"]


def test_ucsd_items_know_their_anomalies(copies):
    items = items_of(copies, "ucsd_pedestrian")
    assert len(items) == 8 and items["UCSDped1/Test001"].extra["anomalous"] == ((1, 3),) and items["UCSDped2/Test002"].extra["anomalous"] == ((0, 2), (3, 4))
    assert read_item(items["UCSDped1/Test001"], [3]).shape == (1, 158, 238, 3)
    assert items["UCSDped1/Train001"].ranges is None and "anomalous" not in items["UCSDped1/Train001"].extra


def test_ucf_sports_prefers_pictures(copies):
    items = items_of(copies, "ucf_sports")
    assert items["Diving-Side/001"].kind == "frames" and items["Run-Side/001"].kind == "video" and items["Golf-Swing-Back/005"].label == "Golf-Swing" and items["Lifting/002"].label == "Lifting"


def test_penn_labels(copies):
    item = items_of(copies, "penn_action")["0002"]
    assert (item.label, item.extra["stated_frames"], item.path.name) == ("baseball_pitch", "3", "0002")


def test_kinetics_prefers_a_replacement(copies):
    items = items_of(copies, "kinetics400")
    item = items["_dbcJuKJQNs_000040_000050"]
    assert item.path.parent.name == "replacement_for_corrupted_k400" and item.label == "air drumming" and item.split == "train" and item.group == "_dbcJuKJQNs"
    assert items["SOX5yA1l24A_000007_000017"].label is None


def test_moving_mnist_sequences(copies):
    found = open_dataset("moving_mnist", copies("moving_mnist").root)
    stack = np.load(copies("moving_mnist").root / "mnist_test_seq.npy")
    frames = read_item(found.items[1])
    assert frames.shape == (20, 64, 64, 3) and all(np.array_equal(frames[..., c], stack[:, 1]) for c in range(3)) and frames.is_contiguous()
    assert read_item(found.items[1], [3], size=32).shape == (1, 32, 32, 3)
    from fvlm.data.video import probe

    assert {probe(item.path).frames for item in found.items} == {20}  # file.npy#00001 is a path like any other
    assert [path.name for path in found.known_files.values()] == ["train-images-idx3-ubyte.gz"]


# --- wrong copies ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [name for name in BY_NAME if name not in ("kth", "moving_mnist", "ucf_sports", "ucsd_pedestrian", "kinetics400", "sample_clips")])
def test_a_missing_list_is_named(own_copy, name):
    tree = own_copy(name)
    protocol = next(iter(tree.sides)) if name != "ucf101" else "official_1"
    for place in tree.lists:
        shutil.rmtree(tree.root / place) if (tree.root / place).is_dir() else (tree.root / place).unlink()
    with pytest.raises(ConfigError, match=f"protocol: {protocol!r} needs .*'none'"):
        open_dataset(name, tree.root, protocol=protocol)
    assert all(item.split is None for item in open_dataset(name, tree.root, protocol="none").items)
    found = open_dataset(name, tree.root, protocol=protocol, strict=False)
    assert [p.kind for p in found.problems].count("no list") == 1 and "no side" not in kinds(found.problems)


def test_one_of_two_lists_is_not_enough(own_copy):
    tree = own_copy("ucf101")
    (tree.root / "ucfTrainTestlist/testlist01.txt").unlink()
    with pytest.raises(ConfigError, match=r"needs testlist01.txt \(testlist01\).*'by_group', 'official_2', 'official_3'"):
        open_dataset("ucf101", tree.root, protocol="official_1")


def test_a_list_that_a_split_can_do_without(own_copy):
    tree = own_copy("something_something_v2")
    (tree.root / "labels/test.json").unlink()
    found = open_dataset("something_something_v2", tree.root)
    assert [p.name for p in found.problems if p.kind == "no side"] == ["20bn-something-something-v2/78687.webm"] and not found.part("test")


def test_a_flat_kinetics_without_lists_has_no_sides(own_copy):
    tree = own_copy("kinetics400")
    shutil.rmtree(tree.root / "annotations")
    assert {i.split for i in open_dataset("kinetics400", tree.root).items} == {None, "train", "val", "test"}  # by folder; the replacement lies in none
    for path in sorted(tree.root.rglob("*.mp4")):
        path.rename(tree.root / path.name)
    with pytest.raises(ConfigError, match="puts none of 4 items on a side"):
        open_dataset("kinetics400", tree.root)


@pytest.mark.parametrize("name", BY_NAME)
def test_a_stray_file_is_seen(own_copy, name):
    tree = own_copy(name)
    (tree.root / "stray.docx").write_text("x")
    (tree.root / ".hidden").write_text("x")
    assert [p.name for p in open_dataset(name, tree.root).problems if p.kind == "extra"] == ["stray.docx"]


@pytest.mark.parametrize("name", ["kth", "ucf101", "hmdb51", "something_something_v2", "kinetics400", "webvid"])
def test_a_name_that_does_not_fit_is_seen(own_copy, name):
    tree = own_copy(name)
    place = tree.root / tree.item
    place.rename(place.with_name("clip of ours" + place.suffix))
    problems = open_dataset(name, tree.root).problems
    assert [p.name.rsplit("/", 1)[-1] for p in problems if p.kind == "unmatched"] == ["clip of ours" + place.suffix]
    assert any(p.kind == "missing" for p in problems)


def test_two_files_for_one_item(own_copy):
    tree = own_copy("kth")
    shutil.copy(tree.root / tree.item, tree.root / Path(tree.item).name)
    problem, = [p for p in open_dataset("kth", tree.root).problems if p.kind == "same key"]
    assert "person01_walking_d1" in problem.detail and len(open_dataset("kth", tree.root)) == 12


@pytest.mark.parametrize("name, make", [
    ("ucf101", lambda root: (root / "ucfTrainTestlist/testlist02.txt").write_text("Archery/v_Archery_g01_c01.avi\n")),
    ("something_something_v2", lambda root: (root / "labels/validation.json").write_text('[{"id": "1", "label": "putting cup 1 on a table", "template": "Putting [something] on [something]"}]')),
    ("kinetics400", lambda root: (root / "val/R6llTwEh07w_000010_000020.mp4").rename(root / "train/R6llTwEh07w_000010_000020.mp4")),
])
def test_an_item_that_two_sides_claim_stands_on_none(own_copy, name, make):
    tree = own_copy(name)
    make(tree.root)
    found = open_dataset(name, tree.root, protocol={"ucf101": "official_2"}.get(name), strict=False)
    problem, = [p for p in found.problems if p.kind == "wrong split"]
    item, = [i for i in found.items if i.key == problem.name]
    assert item.split is None


def test_contradicting_labels_are_told(own_copy):
    tree = own_copy("kinetics400")
    (tree.root / "val/yoga class").mkdir()
    (tree.root / "val/R6llTwEh07w_000010_000020.mp4").rename(tree.root / "val/yoga class/R6llTwEh07w_000010_000020.mp4")
    problem, = [p for p in open_dataset("kinetics400", tree.root).problems if p.kind == "conflict"]
    assert "'yoga class'" in problem.detail and "'yoga'" in problem.detail


@pytest.mark.parametrize("name, place, text, said", [
    ("something_something_v2", "labels/train.json", "{", "cannot be read as json"),
    ("something_something_v2", "labels/train.json", '{"id": 1}', "expected a list of records"),
    ("something_something_v2", "labels/train.json", '[{"id": "1"}]', "record 0 has no 'label'"),
    ("kinetics400", "annotations/train.csv", "a,b\n1,2\n", "no column 'label' among a, b"),
    ("kinetics400", "annotations/train.csv", "", "no column 'label' among nothing"),
    ("kth", "00sequences.txt", "nothing of use\n", "no line fits"),
    ("penn_action", "Penn_Action/labels/0001.mat", "not a mat file", "cannot be read as mat"),
    ("kth", "00sequences.txt", "person01_walking_d1\tframes\t9-4\n", "got 9-4"),
    ("kth", "00sequences.txt", "person01_walking_d1\tframes\t0-4\n", "got 0-4"),
])
def test_an_unreadable_list_is_told_and_when_named_raised(own_copy, name, place, text, said):
    tree = own_copy(name)
    (tree.root / place).write_text(text)
    problems = [p for p in open_dataset(name, tree.root, strict=False).problems if p.kind == "unreadable list"]
    assert len(problems) == 1 and said in problems[0].detail
    if said.startswith("no line"):
        with pytest.raises(InputError, match="no line fits"):
            open_dataset(name, tree.root, annotations={"sequences": tree.root / place})


def test_broken_lists_raise_nothing_else(tmp_path, copies):
    "Bytes changed, cut and doubled in every kind of annotation."
    from fvlm.annotation_rows import read_rows

    rng = np.random.default_rng(0)
    for name, place, note in (("penn_action", "Penn_Action/labels/0001.mat", 0), ("kinetics400", "annotations/train.csv", 0), ("something_something_v2", "labels/train.json", 0), ("kth", "00sequences.txt", 0)):
        content, rule, read = (copies(name).root / place).read_bytes(), load_card(name).rules.annotations[note], 0
        for i in range(60):
            data = bytearray(content)
            for _ in range(int(rng.integers(1, 8))):
                data[int(rng.integers(len(data)))] = int(rng.integers(256))
            data = data[: int(rng.integers(len(data)))] if i % 3 == 0 else data
            (tmp_path / "list").write_bytes(data)
            try:
                rows = read_rows(rule, tmp_path / "list")
                read += all(isinstance(value, str) for row in rows for value in row.values())
            except InputError as error:
                assert "list" in str(error)
        assert read or name == "something_something_v2"


def test_a_broken_stack_is_told(own_copy):
    tree = own_copy("moving_mnist")
    np.save(tree.root / tree.item, np.zeros((3, 20, 64, 64), np.float32))
    problem, = [p for p in open_dataset("moving_mnist", tree.root, strict=False).problems if p.kind == "undecodable"]
    assert "float32" in problem.detail
    (tree.root / tree.item).write_bytes(b"no array")
    with pytest.raises(InputError, match="nothing below .* is an item of moving_mnist"):
        open_dataset("moving_mnist", tree.root)


def test_mistakes_of_the_caller(copies, tmp_path):
    root = copies("kth").root
    for options, said in [({"protocol": "persons"}, "expected one of 'persons_16_9'"), ({"annotations": {"list": "x"}}, "kth has no 'list', expected 'sequences'"),
                          ({"annotations": {"sequences": tmp_path / "none.txt"}}, "none.txt: cannot be read")]:
        with pytest.raises(InputError, match=said):
            open_dataset("kth", root, **options)
    with pytest.raises(InputError, match="root: .* is not there, expected the folder of a local copy of kth. From the dataset's page"):
        open_dataset("kth", tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="webvid needs the folder of a local copy. It cannot be had"):
        open_dataset("webvid")
    with pytest.raises(InputError, match="its card expects\nkth/"):
        open_dataset("kth", tmp_path)
    with pytest.raises(ConfigError, match="side: got 'training', expected one of 'train', 'val', 'test'"):
        open_dataset("kth", root).part("training")


def test_a_link_in_a_circle_ends(own_copy):
    tree = own_copy("kth")
    (tree.root / "walking" / "round").symlink_to(tree.root)
    found = open_dataset("kth", tree.root)
    assert len(found) == 12 and kinds(found.problems) == {"missing", "incomplete"}


def test_frame_ranges():
    assert frame_ranges("7, 9-11", first=0, last_included=False) == ((7, 8), (9, 11)) and frame_ranges("7", first=1, last_included=True) == ((6, 7),)
    assert frame_ranges("1-95,96 - 185", first=1, last_included=True) == ((0, 95), (95, 185)) and frame_ranges("", first=1, last_included=True) == ()
    for text in ("5-3", "0-4"):
        with pytest.raises(InputError, match="expected ranges of frames that count from 1"):
            frame_ranges(text, first=1, last_included=True)


def test_items_become_windows(copies):
    from fvlm.data.clips import VideoFolder

    found = open_dataset("kth", copies("kth").root)
    folder = VideoFolder.from_items(found.items, context_frames=1, gap=1)
    assert [clip.name for clip in folder.clips] == [item.name for item in found.items] and {c.group for c in folder.clips} == set(found.sides)
    parts = folder.split()
    assert {side: {c.name for c in part.clips} for side, part in parts.items()} == {side: {i.name for i in found.part(side)} for side in parts}
    assert len(folder) == 12 * 4  # two ranges of three frames, two windows in each


def test_the_shared_clips_by_a_card_for_their_manifest(shared_clips, tmp_path):
    "A table of captions, labels and frames over folders of many datasets: one more card, no more code."
    card = load_card("kth").path.read_text(encoding="utf-8")
    head = card[: card.index("fvlm:")].replace("KTH Human Actions", "Shared clips")
    (tmp_path / "shared.md").write_text(head + r"""fvlm:
  version: 1
  status: available
  obtain: "They lie where FVLM_DATA says."
  layout:
    tree: kth/person01_walking_d1_uncomp.avi
    items:
      - {kind: video, files: ["**/*.avi", "**/*.mp4", "**/*.mkv"], pattern: '(?P<set>[^/]+)/[^/]+'}
    fields: {key: "{name}", group: "{name}"}
  annotations:
    - {name: manifest, what: "one row a clip", kind: csv, delimiter: "	", files: ["MANIFEST.tsv"], columns: [file, dataset, label, caption, frames], key: "{file}",
       fields: {label: "{label}", caption: "{caption}", stated_frames: "{frames}", source: "{dataset}"}, lists_items: true}
  media: {items: null, labels: null, fps: null, sizes: null, frames: null, colour: null}
  splits: {default: null, protocols: {}}
  preprocessing: []
---
# Shared clips
""", encoding="utf-8")
    found = open_dataset(tmp_path / "shared.md", shared_clips / "videos")
    rows = (shared_clips / "videos" / "MANIFEST.tsv").read_text(encoding="utf-8").splitlines()
    assert len(found) == len(rows) - 1 and not found.problems and all(item.caption for item in found.items)


# --- training by a card ----------------------------------------------------------------------------------------------

def moving_pictures(seed, frames, size):
    "uint8 (T,H,W,3): noise that drifts."
    ground = np.random.default_rng(seed).integers(0, 200, (*size, 3)).astype(np.uint8)
    return [np.ascontiguousarray(np.roll(ground, 3 * t, 1)) for t in range(frames)]


@pytest.fixture
def small_ucf101(tmp_path):
    "UCF-101's own folders and lists, with real small films: two actions, groups 1, 2, 9, 16, 17 and 25 of each, two clips a group; one of them is broken."
    import av

    root, names = tmp_path / "UCF101", []
    for a, label in enumerate(("Archery", "YoYo")):
        for g in (1, 2, 9, 16, 17, 25):
            for c in (1, 2):
                names.append((f"{label}/v_{label}_g{g:02d}_c{c:02d}.avi", a, g))
                path = root / "UCF-101" / names[-1][0]
                path.parent.mkdir(parents=True, exist_ok=True)
                with av.open(str(path), "w") as container:
                    stream = container.add_stream("mpeg4", rate=25, width=64, height=48, pix_fmt="yuv420p")
                    for picture in moving_pictures((a, g, c), 12, (48, 64)):
                        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
                    container.mux(stream.encode())
    (root / "UCF-101/YoYo/v_YoYo_g25_c02.avi").write_bytes(b"RIFF" + bytes(400))
    lists = root / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 Archery\n2 YoYo\n")
    (lists / "trainlist01.txt").write_text("".join(f"{name} {a + 1}\n" for name, a, g in names if g > 7))
    (lists / "testlist01.txt").write_text("".join(f"{name}\n" for name, _, g in names if g <= 7))
    return root


def small_recipe(root, card, **changes):
    from dataclasses import replace

    from fvlm.training.recipes import sc_vfp

    return replace(sc_vfp(), videos=str(root), card=card, context_frames=3, gap=2, gap_jitter=0, **changes)


def opened(recipe, tmp_path):
    from fvlm.data.embedding_cache import EmbeddingCache
    from fvlm.encoders.embeddings import FrameEmbedder
    from fvlm.training.recipes import open_splits

    splits, folder = open_splits(recipe, FrameEmbedder.tiny(), cache=EmbeddingCache(tmp_path / "embeddings"), progress=False)
    return {side: {clip.name: clip.group for clip in clips} for side, clips in splits.clips.items()}, splits, folder


@pytest.mark.parametrize("protocol", [None, "official_1"])
def test_a_recipe_trains_on_a_copy_by_its_card(small_ucf101, tmp_path, protocol):
    sides, splits, folder = opened(small_recipe(small_ucf101, "ucf101", protocol=protocol), tmp_path)
    found = open_dataset("ucf101", small_ucf101, protocol=protocol)
    whole = {item.name for item in found.items} - {"UCF-101/YoYo/v_YoYo_g25_c02.avi"}
    assert set().union(*sides.values()) == whole and [path.name for path, _ in folder.bad] == ["v_YoYo_g25_c02.avi"]
    assert set(sides["test"]) == {item.name for item in found.part("test")} and len(sides["test"]) == 8
    if protocol is None:
        assert set(sides["val"]) == {item.name for item in found.part("val")} & whole
    else:  # the lists have no validation side: groups of the training side are drawn for it
        assert sides["val"] and set(sides["val"]) < {item.name for item in found.part("train")}
    for a, b in combinations(sides.values(), 2):
        assert not {name.rsplit("_c", 1)[0] for name in a} & {name.rsplit("_c", 1)[0] for name in b}, "a group on two sides"
    for side in ("train", "val", "test"):
        assert len(getattr(splits, side)) == 6 * len(sides[side])  # twelve frames hold six windows of 3 + 1 frames, two apart
    assert splits.train.batch([0])["embeddings"].shape == (1, 3, 32)


def test_pictures_train_by_their_card_too(tmp_path):
    "UCSD's clips are folders of tif files; its test side is its own, and validation is drawn from its training clips."
    from PIL import Image

    root = tmp_path / "ucsd"
    for n in range(1, 6):
        for part in ("Train", "Test"):
            folder = root / "UCSD_Anomaly_Dataset.v1p2/UCSDped2" / part / f"{part}{n:03d}"
            folder.mkdir(parents=True)
            for k, picture in enumerate(moving_pictures((n, part == "Test"), 10, (24, 36)), 1):
                Image.fromarray(picture[..., 0]).save(folder / f"{k:03d}.tif")
    (root / "UCSD_Anomaly_Dataset.v1p2/UCSDped2/Train/Train003/004.tif").write_bytes(b"II*\0" + bytes(50))
    sides, splits, folder = opened(small_recipe(root, "ucsd_pedestrian"), tmp_path)
    assert {path.name for path, _ in folder.bad} == {"Train003"} and "004.tif" in folder.bad[0][1]
    assert {name[-7:] for name in sides["test"]} == {f"Test{n:03d}" for n in range(1, 6)}
    assert {name[-8:] for name in {**sides["train"], **sides["val"]}} == {f"Train{n:03d}" for n in (1, 2, 4, 5)} and sides["train"] and sides["val"]
    assert len(splits.test) == 5 * 4


def test_train_by_a_card_on_the_command_line(small_ucf101, tmp_path, monkeypatch, capsys):
    from fvlm.encoders.embeddings import FrameEmbedder
    from fvlm.training.recipes import EncoderChoice

    monkeypatch.setattr(EncoderChoice, "load", lambda self, download=False: FrameEmbedder.tiny())
    monkeypatch.setenv("FVLM_HOME", str(tmp_path / "home"))
    small = "--context-frames 3 --gap 2 --size.width 16 --size.num-heads 2 --size.ffn-dim 16 --size.depth 1 --training.steps 4 --training.val-every 2 --no-progress".split()
    words = ["train", "sc_vfp", "--videos", str(small_ucf101), "--card", "ucf101", "--out", str(tmp_path / "run"), *small]
    assert main([*words, "--protocol", "official_1"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"set aside \S*v_YoYo_g25_c02\.avi: ", told) and "ridge" in told and "scmhsa" in told
    assert main([*words, "--overwrite", "--protocol", "official_9"]) == 2
    assert "did you mean 'official_" in capsys.readouterr().err
    assert main([*words[:5], "ucf102", *words[6:]]) == 2
    assert "did you mean 'ucf101'" in capsys.readouterr().err


# --- check -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [name for name in BY_NAME if name != "sample_clips"])
def test_check_finds_nothing_wrong_with_a_good_copy(copies, name):
    report = check_dataset(name, copies(name).root)
    assert report.is_good(partial=True), report.table()
    assert report.is_good() == (load_card(name).rules.media.items is None)  # nobody knows how many WebVid had: a part cannot be told from the whole
    assert set(report.counts) <= set(PROBLEMS) and json.dumps(report.as_json(), allow_nan=False)


def test_check_of_the_sample_clips(sample_clips, copies, capsys):
    assert main(["cards", "check", "sample_clips", "--quiet"]) == 0
    assert "nothing is wrong with it" in capsys.readouterr().out
    assert set(check_dataset("sample_clips", copies("sample_clips").root).counts) == {"wrong hash", "wrong size", "wrong frames"}


def test_check_of_worlds(capsys):
    assert main(["cards", "check", "worlds", "--quiet"]) == 0
    assert "train 4, val 4, test 4" in capsys.readouterr().out


def test_check_of_a_broken_copy(own_copy, tmp_path, capsys):
    tree = own_copy("kth")
    walking = tree.root / "walking"
    files = sorted(walking.glob("*.avi"))
    files[0].write_bytes(files[0].read_bytes()[:600])
    files[1].write_bytes(files[3].read_bytes())  # person 4 validates, person 17 tests
    Writer(tmp_path).video(files[2], 128, 96, 30, 4)
    files[4].unlink()
    out = tmp_path / "report.json"
    assert main(["cards", "check", "kth", str(tree.root), "--json", str(out), "--quiet"]) == 1
    shown, report = capsys.readouterr().out, json.loads(out.read_text())
    assert report["finished"] and report["items"] == 11 and report["card"] == "kth"
    by_kind = {}
    for problem in report["problems"]:
        by_kind.setdefault(problem["kind"], []).append(problem)
    assert by_kind.keys() == {"missing", "incomplete", "undecodable", "duplicate", "wrong size", "wrong rate", "wrong frames"}
    assert len(by_kind["missing"]) == 599 - 11 and by_kind["missing"][0]["name"] and "person22_walking_d1" in {p["name"] for p in by_kind["missing"]}
    assert [p["name"] for p in by_kind["undecodable"]] == [f"walking/{files[0].name}"]
    assert by_kind["duplicate"][0]["name"] == f"walking/{files[3].name}" and "it stands on test and val" in by_kind["duplicate"][0]["detail"]
    assert by_kind["wrong frames"][0]["detail"] == "4, expected at least 6, by its ranges"
    assert len(shown.splitlines()) < 14 and all(len(line) < 400 for line in shown.splitlines()), shown


def test_check_goes_on_where_it_was(own_copy, tmp_path, monkeypatch):
    from fvlm.app import cards_commands

    tree, memory, seen = own_copy("kth"), tmp_path / "report.json", []

    def look(item, decode):
        if len(seen) == 5:
            raise KeyboardInterrupt
        seen.append(item.name)
        return look_at(item, decode)

    monkeypatch.setattr(cards_commands, "look_at", look)
    first = check_dataset("kth", tree.root, memory=memory)
    assert not first.finished and not first.is_good(partial=True) and len(json.loads(memory.read_text())["looks"]) == 5
    assert main(["cards", "check", "kth", str(tree.root), "--json", str(memory), "--quiet"]) == 130
    half = list(seen)
    monkeypatch.setattr(cards_commands, "look_at", lambda item, decode: (seen.append(item.name), look_at(item, decode))[1])
    second = check_dataset("kth", tree.root, memory=memory)
    assert second.finished and len(seen) == 12 and not set(half) & set(seen[5:]) and json.loads(memory.read_text())["finished"]
    (tree.root / tree.item).write_bytes((tree.root / tree.item).read_bytes() + b"x")
    assert check_dataset("kth", tree.root, memory=memory).finished and seen[12:] == [tree.item]


def test_a_report_does_not_overwrite_another_file(own_copy, tmp_path):
    precious = tmp_path / "precious.json"
    for text in ('{"mine": 1}', "not json"):
        precious.write_text(text)
        with pytest.raises(InputError, match="precious.json"):
            check_dataset("kth", own_copy("kth").root, memory=precious)
        assert precious.read_text() == text
        shutil.rmtree(tmp_path / "kth")


@pytest.mark.parametrize("damage, said", [
    (lambda folder: (folder / "000002.jpg").unlink(), "picture 2 is missing: 2 pictures are numbered 1 to 3"),
    (lambda folder: (folder / "000003.jpg").write_bytes(b"no picture"), "picture 000003.jpg"),
    (lambda folder: (folder / "000003.jpg").write_bytes((folder / "000003.jpg").read_bytes()[:400]), "picture 000003.jpg"),
    (lambda folder: Writer(folder).pictures(folder, ["000002.jpg"], 16, 16), "its pictures have 2 sizes: 32 x 24 (2), 16 x 16 (1)"),
])
def test_broken_picture_folders(own_copy, damage, said):
    tree = own_copy("penn_action")
    damage(tree.root / "Penn_Action/frames/0001")
    report = check_dataset("penn_action", tree.root)
    problem, = [p for p in report.problems if p.kind not in ("missing", "incomplete")]
    assert problem.kind == "undecodable" and said in problem.detail


def test_broken_pictures_and_arrays_raise_nothing(tmp_path):
    "Bytes changed and cut: a look gives facts or an error, whatever the library made of it."
    import io
    import warnings

    from PIL import Image

    rng, array = np.random.default_rng(1), io.BytesIO()
    np.save(array, np.zeros((4, 3, 8, 8), np.uint8))
    sources = {"npy": array.getvalue()}
    for suffix, name in (("tif", "TIFF"), ("jpg", "JPEG"), ("png", "PNG")):
        content = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)).save(content, name)
        sources[suffix] = content.getvalue()
    for suffix, content in sources.items():
        errors = set()
        for i in range(40):
            data = bytearray(content)
            for _ in range(int(rng.integers(1, 6))):
                data[int(rng.integers(min(len(data), 128)))] = int(rng.integers(256))
            place = tmp_path / f"{suffix}{i}"
            place.mkdir()
            (place / f"1.{suffix}").write_bytes(data[: int(rng.integers(len(data)))] if i % 4 == 0 else data)
            item = {"path": place, "kind": "frames"} if suffix != "npy" else {"path": place / "1.npy#0", "kind": "npy_stack"}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = look_at(DatasetItem(name="x", key="x", **item))
            errors.add(found.error is None)
            assert found.error or found.frames, found
        assert False in errors
    (tmp_path / "mnist_test_seq.npy").write_bytes(sources["npy"].replace(b"(4, 3", b"((((("))
    problem, = [p for p in open_dataset("moving_mnist", tmp_path, strict=False).problems if p.kind == "undecodable"]
    assert "is not an .npy file" in problem.detail


def test_a_label_that_states_other_frames(own_copy):
    tree = own_copy("penn_action")
    (tree.root / "Penn_Action/frames/0001/000003.jpg").unlink()
    report = check_dataset("penn_action", tree.root)
    assert [p.detail for p in report.problems if p.kind == "wrong frames"] == ["2, expected 3 by its label"]


def test_worlds_have_no_size_to_change():
    item = open_dataset("worlds").items[0]
    assert read_item(item, [3, 0]).shape == (2, 64, 64, 3)
    with pytest.raises(ConfigError, match=r"size: got 32 .* BouncingSprites\(size=...\)"):
        read_item(item, size=32)


def test_all_frames_are_decoded_when_asked(own_copy, monkeypatch):
    from fvlm.data import video

    tree, counts = own_copy("kth"), []
    monkeypatch.setattr(video, "read_clip", lambda path, indices: counts.append(len(indices)))
    for decode, expected in (("ends", 3), ("all", 6)):
        counts.clear()
        check_dataset("kth", tree.root, decode=decode)
        assert set(counts) == {expected}
    counts.clear()
    assert check_dataset("kth", tree.root, decode="none").is_good(partial=True) and not counts


def test_rates_have_some_room():
    card = load_card("ucf101")
    item = DatasetItem(name="x", path=None, kind="video", key="x")
    from fvlm.app.cards_commands import Look

    look = lambda fps: compare(card, item, Look(bytes=1, mtime_ns=1, sha256="", frames=9, fps=fps, width=320, height=240))
    assert not look(25.0) and not look(29.97) and not look(30.0) and [p.kind for p in look(24.0)] == ["wrong rate"]


# --- the command -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("words, said", [
    (["show"], "expected the NAME of a card"), (["list", "kth"], "expected nothing"), (["check"], "expected the NAME of a card and the folder"), (["check", "a", "b", "c"], "expected the NAME"),
    (["show", "ktj"], "did you mean 'kth'"), (["check", "kth"], "kth needs the folder"), (["check", "something_something_v2"], "after registration"),
    (["check", "webvid"], "It cannot be had"), (["check", "kth", "nowhere"], "'nowhere' is not there"), (["check", "kth", ".", "--annotations", "sequences"], "expected NAME=FILE"),
    (["check", "kth", ".", "--protocol", "official"], "expected one of 'persons_16_9'"),
])
def test_mistakes_are_one_line_and_exit_2(capsys, words, said):
    assert main(["cards", *words, *(["--quiet"] if words[0] == "check" else [])]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and said in err


def test_list_show_and_schema(capsys):
    assert main(["cards", "list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in list_cards()) and "withdrawn" in shown and "gated" in shown
    for name in list_cards():
        assert main(["cards", "show", name]) == 0
        shown = capsys.readouterr().out
        assert load_card(name).header.pretty_name in shown and "how to get it" in shown and "unknown" in shown
    assert main(["cards", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["$defs"]["Rules"]["required"]


def test_check_takes_a_list_from_elsewhere_and_a_card_of_your_own(copies, tmp_path, capsys):
    root = tmp_path / "copy"
    shutil.copytree(copies("kth").root, root)
    (root / "00sequences.txt").rename(tmp_path / "list.txt")
    card = tmp_path / "mine.md"
    card.write_text(load_card("kth").path.read_text(encoding="utf-8"), encoding="utf-8")
    assert main(["cards", "check", str(card), str(root), "--annotations", f"sequences={tmp_path / 'list.txt'}", "--partial", "--quiet", "--decode", "none"]) == 0
    assert "12 of 599" in capsys.readouterr().out


def test_checking_imports_no_torch_before_it_must():
    import subprocess
    import sys

    code = "import sys\nfrom fvlm.app.cli import main\nmain(['cards', 'list'])\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip().endswith("False"), done.stdout + done.stderr
