"""Moving-MNIST: the field's rule to the letter, digits that no two parts share, an answer key without exceptions, and the files it reads."""
import gzip
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fvlm.core import InputError
from fvlm.data.moving_mnist import SHARES, FixedMovingMNIST, MovingMNIST, digit_bank, stopped_at_walls


def by_the_rule(x, y, v_x, v_y, num_frames):
    "One digit, one number at a time, as the published generators are written."
    found = []
    for _ in range(num_frames):
        x, y = x + v_x, y + v_y
        if x <= 0:
            x, v_x = 0, -v_x
        if x >= 1:
            x, v_x = 1, -v_x
        if y <= 0:
            y, v_y = 0, -v_y
        if y >= 1:
            y, v_y = 1, -v_y
        found.append((x, y))
    return np.array(found)


def idx(array):
    return b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


@pytest.fixture
def mnist(tmp_path):
    "A folder laid out as MNIST is published, with made-up digits."
    rng = np.random.default_rng(0)
    for stem, count in (("train", 60), ("t10k", 20)):
        images, labels = rng.integers(0, 256, (count, 28, 28)).astype(np.uint8), rng.integers(0, 10, count).astype(np.uint8)
        (tmp_path / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images), mtime=0))
        (tmp_path / f"{stem}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels), mtime=0))
    return tmp_path


# --- the path

unit = st.floats(0, 1)
step = st.floats(-0.4, 0.4)


@given(st.lists(st.tuples(unit, unit, step, step), min_size=1, max_size=4), st.integers(1, 60))
def test_the_path_is_the_published_loop(digits, num_frames):
    digits = np.array(digits)
    found = stopped_at_walls(digits[:, :2], digits[:, 2:], num_frames)
    expected = np.stack([by_the_rule(*row, num_frames) for row in digits.tolist()], axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert found.shape == (num_frames, len(digits), 2) and found.min() >= 0 and found.max() <= 1


def test_arguments_are_left_alone():
    start, velocity = np.array([[0.05, 0.5]]), np.array([[-0.1, 0.0]])
    stopped_at_walls(start, velocity, 5)
    assert start.tolist() == [[0.05, 0.5]] and velocity.tolist() == [[-0.1, 0.0]]


@pytest.fixture(scope="module")
def many():
    "(20,3000,2) paths at the field's speed, and (3000,) angles."
    rng = np.random.default_rng(0)
    angles = rng.random(3000) * 2 * np.pi
    return stopped_at_walls(rng.random((3000, 2)), 0.1 * np.stack([np.cos(angles), np.sin(angles)], -1), 20)


def test_speed_is_constant_between_bounces_and_cut_at_them(many):
    steps, at_wall = np.linalg.norm(np.diff(many, axis=0), axis=-1), ((many == 0) | (many == 1)).any(-1)[1:]
    np.testing.assert_allclose(steps[~at_wall], 0.1, atol=1e-12)
    assert (steps[at_wall] <= 0.1 + 1e-12).all() and (steps[at_wall] < 0.0999).mean() > 0.8


def test_turning_points_lie_exactly_on_the_walls(many):
    moves = np.diff(many, axis=0)
    for axis in (0, 1):
        turned = np.sign(moves[1:, :, axis]) * np.sign(moves[:-1, :, axis]) < 0
        assert turned.sum() > 1000 and np.isin(many[1:-1, :, axis][turned], (0.0, 1.0)).all()


def test_directions_are_uniform():
    world, angles = MovingMNIST(num_clips=200, num_frames=3, size=128, digits=6, speed=(20.0, 20.0), seed=5), []
    for clip in world:
        moves = np.diff(clip["trajectories"].numpy(), axis=0)
        full = moves[np.hypot(*np.moveaxis(moves, -1, 0)) > 18.5]  # not cut at a wall
        angles += np.arctan2(full[:, 1], full[:, 0]).tolist()
    counts = np.histogram(np.abs(np.array(angles)) % (np.pi / 2), bins=6, range=(0, np.pi / 2))[0]
    expected = counts.sum() / 6
    assert counts.sum() > 700 and ((counts - expected) ** 2 / expected).sum() < 20.5  # chi-squared, 5 degrees of freedom, p = 0.001
    signs = np.histogram(angles, bins=4, range=(-np.pi, np.pi))[0]
    assert ((signs - signs.mean()) ** 2 / signs.mean()).sum() < 16.3


# --- clips


@pytest.mark.parametrize("settings", [{}, dict(digits=1), dict(digits=4, num_frames=12), dict(size=96), dict(static=True), dict(speed=(1.0, 9.0)), dict(part="test")])
def test_the_answer_key_has_no_exceptions(settings):
    world = MovingMNIST(num_clips=6, seed=1, **settings)
    for clip in world:
        frames, masks, flow = clip["frames"].numpy(), clip["masks"].numpy(), clip["flow"].numpy()
        steps, count = world.num_frames, world.digits
        assert frames.shape == (steps, world.size, world.size, 3) and frames.dtype == np.uint8 and (frames[..., :1] == frames).all()
        assert masks.shape == (steps, count, world.size, world.size) and masks.sum(1).max() <= 1
        assert (masks.any(1) == (frames[..., 0] > 0)).all(), "every lit pixel belongs to one digit, and no dark one does"
        corners = clip["trajectories"].numpy() - 13.5
        assert (corners == corners.round()).all() and corners.min() >= 0 and corners.max() <= world.size - 28
        np.testing.assert_array_equal(flow, flow.round())
        assert not flow[:, :, ~masks.any(1).any(0)].any()
        for t in range(steps - 1):
            for k in range(count):
                y, x = np.nonzero(masks[t, k])
                dx, dy = (corners[t + 1, k] - corners[t, k]).astype(int)
                assert (flow[t, 0][y, x] == dx).all() and (flow[t, 1][y, x] == dy).all()
                assert (frames[t + 1, y + dy, x + dx] >= frames[t, y, x]).all(), "ink arrives, or something brighter lies on it"
        assert len(clip["objects"]) == count == len(clip["labels"]) and clip["caption"].endswith(".") and "scikit-learn" in clip["source"]
        if world.static:
            assert (frames == frames[:1]).all() and not flow.any() and "stand still" in clip["caption"]


def test_overlap_is_the_brighter_of_the_two():
    "The frame is the maximum of what each digit alone would draw."
    found = 0
    for clip in MovingMNIST(num_clips=10, seed=2):
        frames, masks, corners = clip["frames"].numpy()[..., 0], clip["masks"].numpy(), (clip["trajectories"].numpy() - 13.5).astype(int)
        digits = []
        for k in range(2):
            digit = np.zeros((28, 28), np.uint8)
            for t in range(20):
                x, y = corners[t, k]
                seen = np.where(masks[t, k], frames[t], 0)[y : y + 28, x : x + 28]
                digit = np.maximum(digit, seen)
            digits.append(digit)
        for t in range(20):
            alone = np.zeros((2, 64, 64), np.uint8)
            for k, (x, y) in enumerate(corners[t]):
                alone[k, y : y + 28, x : x + 28] = digits[k]
            np.testing.assert_array_equal(frames[t], alone.max(0))
            found += ((alone > 0).all(0)).sum()
    assert found > 500, "some of it overlaps"


def test_the_same_seed_is_the_same_clip_and_another_is_not():
    world = MovingMNIST(num_clips=5, seed=7)
    again = pickle.loads(pickle.dumps(world))
    for k in range(5):
        assert torch.equal(world[k]["frames"], again[k]["frames"]) and world[k]["caption"] == again[k]["caption"]
    assert torch.equal(world[-1]["frames"], world[4]["frames"])
    others = [MovingMNIST(num_clips=5, seed=8), MovingMNIST(num_clips=5, seed=7, part="val")]
    assert all(not torch.equal(world[0]["frames"], other[0]["frames"]) for other in others) and not torch.equal(world[0]["frames"], world[1]["frames"])
    with pytest.raises(IndexError):
        world[5]
    assert torch.equal(MovingMNIST(num_clips=9999, seed=7)[2]["frames"], world[2]["frames"]), "the number of clips changes none of them"


@pytest.mark.parametrize("settings, says", [
    (dict(part="valid"), "part.*did you mean 'val'"), (dict(digits=0), "digits"), (dict(digits=7), "digits"), (dict(whole_pixels=False), "whole_pixels"), (dict(num_frames=1), "num_frames"),
    (dict(speed=(3.0, 2.0)), "speed"), (dict(source="nowhere"), "nowhere"), (dict(size=20), "size"),
])
def test_wrong_settings_are_named(settings, says):
    with pytest.raises(InputError, match=says):
        MovingMNIST(**settings)


# --- digits


def test_offline_digits_are_disjoint_and_look_like_mnist():
    banks = {part: digit_bank(None, part) for part in SHARES}
    contents = {part: {image.tobytes() for image in bank.images} for part, bank in banks.items()}
    assert sum(map(len, contents.values())) == len(set().union(*contents.values())), "no digit in two parts"
    for bank in banks.values():
        assert bank.images.shape[1:] == (28, 28) and bank.images.dtype == np.uint8 and set(bank.labels) == set(range(10)) and not bank.images.flags.writeable
        rows = (bank.images > 60).any(2).sum(1)
        assert 14 <= rows.mean() <= 22 and 0.05 < (bank.images > 127).mean() < 0.25
    assert sum(len(bank.images) for bank in banks.values()) == 1797


def test_a_folder_of_mnist_keeps_its_own_test_digits(mnist):
    train, val, test = (digit_bank(str(mnist), part) for part in ("train", "val", "test"))
    assert [len(bank.images) for bank in (train, val, test)] == [54, 6, 20] and train.name == "MNIST, train-images-idx3-ubyte.gz" and "t10k" in test.name
    assert len({image.tobytes() for bank in (train, val, test) for image in bank.images}) == 80
    clip = MovingMNIST(source=str(mnist), part="test", num_clips=3)[0]
    assert clip["source"] == test.name and clip["labels"].tolist() == [int(name.split()[1]) for name in clip["objects"]]
    one = MovingMNIST(source=str(mnist), part="test", num_clips=3, digits=1)[0]
    x, y = (one["trajectories"][0, 0] - 13.5).int().tolist()
    assert one["frames"][0, y : y + 28, x : x + 28, 0].numpy().tobytes() in {image.tobytes() for image in test.images}


def test_single_files_of_every_kind(mnist, tmp_path):
    packed = mnist / "train-images-idx3-ubyte.gz"
    plain = tmp_path / "plain" / "train-images-idx3-ubyte"
    plain.parent.mkdir()
    plain.write_bytes(gzip.decompress(packed.read_bytes()))
    images = digit_bank(str(packed), "train").images
    np.savez(tmp_path / "some.npz", x=np.concatenate([digit_bank(str(packed), part).images for part in SHARES]))
    for path in (packed, plain, tmp_path / "some.npz"):
        parts = [digit_bank(str(path), part) for part in SHARES]
        assert [len(bank.images) for bank in parts] == [42, 9, 9] and np.array_equal(parts[0].images, images)
    assert digit_bank(str(tmp_path / "some.npz")).labels is None and digit_bank(str(packed)).labels is not None
    clip = MovingMNIST(source=str(plain), num_clips=1)[0]
    assert "labels" not in clip and clip["objects"] == ["handwritten digit"] * 2


@pytest.mark.parametrize("content", [b"", b"hello", b"\0\0\x08\x03" + bytes(12), b"\0\0\x08\x03" + np.array([9, 28, 28], ">i4").tobytes() + bytes(100), idx(np.zeros((5, 20, 20), np.uint8)),
                                     idx(np.zeros(40, np.uint8)), gzip.compress(idx(np.zeros((30, 28, 28), np.uint8)), mtime=0)[:-9]])
def test_files_that_are_no_digits(tmp_path, content):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(InputError, match="source: .*train-images-idx3-ubyte"):
        MovingMNIST(source=str(tmp_path / "train-images-idx3-ubyte"))


def test_an_empty_folder_says_what_was_looked_for(tmp_path):
    with pytest.raises(InputError, match="train-images-idx3-ubyte.gz"):
        MovingMNIST(source=str(tmp_path))


@pytest.mark.clips
def test_real_mnist(shared_clips):
    folder = shared_clips / "mnist"
    if not folder.is_dir():
        pytest.skip("no MNIST")
    parts = {part: {image.tobytes() for image in digit_bank(str(folder), part).images} for part in SHARES}
    assert not parts["train"] & parts["test"] and not parts["train"] & parts["val"] and not parts["val"] & parts["test"] and min(map(len, parts.values())) >= 900
    assert MovingMNIST(source=str(folder), part="test")[0]["source"] == "MNIST, t10k-images-idx3-ubyte.gz"


# --- the fixed file


def test_the_fixed_file_is_read_by_sequence(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (20, 7, 64, 64)).astype(np.uint8)
    np.save(tmp_path / "mnist_test_seq.npy", array)
    fixed = FixedMovingMNIST(tmp_path / "mnist_test_seq.npy")
    assert len(fixed) == 7 and fixed.num_frames == 20 and len(list(fixed)) == 7
    for k in (0, 6, -1):
        item = pickle.loads(pickle.dumps(fixed))[k]
        assert item["frames"].shape == (20, 64, 64, 3) and item["frames"].dtype == torch.uint8 and item["name"] == f"mnist_test_seq/{k % 7}"
        np.testing.assert_array_equal(item["frames"][..., 1], array[:, k])
    with pytest.raises(IndexError):
        fixed[7]


@pytest.mark.parametrize("array", [np.zeros((20, 3, 64, 64), np.float32), np.zeros((20, 64, 64), np.uint8), np.zeros((20, 3, 64, 60), np.uint8), np.array([{}], dtype=object), None])
def test_other_files_are_refused(tmp_path, array):
    path = tmp_path / "seq.npy"
    np.save(path, array, allow_pickle=True) if array is not None else path.write_text("no")
    with pytest.raises(InputError, match="seq.npy"):
        FixedMovingMNIST(path)
    with pytest.raises(InputError, match="nowhere"):
        FixedMovingMNIST(tmp_path / "nowhere.npy")
