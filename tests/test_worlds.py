"""Generated worlds: the answer key is exact, the clip depends on seed and index alone, bad arguments get one clear error."""

import pickle
import re

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fvlm.core import ConfigError, InputError, ShapeError
from fvlm.data import sprites as parts
from fvlm.data.worlds import BouncingSprites, CuedTarget, MovingDigits, PhotoPan

WORLDS = (MovingDigits, BouncingSprites, CuedTarget, PhotoPan)
DIRECTIONS = {"right": (1, 0), "down and right": (1, 1), "down": (0, 1), "down and left": (-1, 1), "left": (-1, 0), "up and left": (-1, -1), "up": (0, -1), "up and right": (1, -1)}
COUNTS = {"once": 1, "twice": 2, **{f"{word} times": n for n, word in enumerate(parts.NUMBERS) if n > 2}}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a)


@pytest.mark.parametrize("kind", WORLDS)
@pytest.mark.parametrize("size", [32, 49, 64])
def test_shapes_and_types(kind, size):
    clip = kind(num_frames=4, size=size)[0]
    objects = len(clip["objects"])
    expected = {"frames": ((4, size, size, 3), torch.uint8), "masks": ((4, objects, size, size), torch.bool), "flow": ((3, 2, size, size), torch.float32), "trajectories": ((4, objects, 2), torch.float32)}
    for name, (shape, dtype) in expected.items():
        assert clip[name].shape == shape and clip[name].dtype == dtype and clip[name].is_contiguous(), name
    assert clip["caption"][0].isupper() and clip["caption"].endswith(".")
    assert set(clip) - {"cue"} == {*expected, "objects", "caption"} and ("cue" in clip) == (kind is CuedTarget)


@pytest.mark.parametrize("kind", WORLDS)
def test_a_clip_depends_on_seed_and_index_alone(kind):
    world = kind(num_clips=9, seed=4)
    backwards = [world[i] for i in (8, 3, 0)]
    fresh = kind(num_clips=1000, seed=4)
    assert all(same(a, fresh[i]) for a, i in zip(backwards, (8, 3, 0)))
    assert same(pickle.loads(pickle.dumps(world))[3], backwards[1])
    assert not torch.equal(kind(seed=5)[3]["frames"], backwards[1]["frames"])
    assert not torch.equal(world[2]["frames"], backwards[1]["frames"])
    longer = kind(num_frames=25, seed=4)[3]
    for name in ("frames", "masks", "trajectories"):
        assert torch.equal(longer[name][:10], backwards[1][name])


def test_no_global_random_state():
    before, numpy_before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    for kind in WORLDS:
        kind()[0]
    assert torch.equal(before, torch.random.get_rng_state()) and np.array_equal(numpy_before, np.random.get_state()[1])


@pytest.mark.parametrize("kind", WORLDS)
def test_sequence_protocol(kind):
    world = kind(num_clips=3, num_frames=2, size=32)
    assert len(world) == 3 and len(list(world)) == 3
    assert same(world[-1], world[2]) and same(world[np.int64(1)], world[1])
    for past in (3, -4):
        with pytest.raises(IndexError, match=str(past)):
            world[past]
    for wrong in (slice(0, 2), 1.0, "0"):
        with pytest.raises(TypeError):
            world[wrong]


def test_feeds_a_dataloader_with_workers():
    batches = list(DataLoader(MovingDigits(num_clips=4, num_frames=3), batch_size=2, num_workers=1))
    assert batches[1]["frames"].shape == (2, 3, 64, 64, 3)
    assert torch.equal(batches[1]["frames"][1], MovingDigits(num_frames=3)[3]["frames"])


@pytest.mark.parametrize("kind", WORLDS)
@pytest.mark.parametrize("whole", [False, True])
def test_masks_are_disjoint_and_flow_is_the_step_of_the_owner(kind, whole):
    for i in range(4):
        clip = kind(seed=1, whole_pixels=whole, speed=(1, 6))[i]
        masks, steps = clip["masks"], clip["trajectories"].diff(dim=0)
        assert masks.sum(1).max() <= 1
        assert (clip["flow"].permute(0, 2, 3, 1)[~masks[:-1].any(1)] == 0).all()
        for t, k in np.ndindex(*steps.shape[:2]):
            here = clip["flow"][t][:, masks[t, k]]
            assert torch.allclose(here, steps[t, k, :, None].expand_as(here), atol=1e-4)
        assert (steps.abs() <= 6 + 1 + 1e-3).all() and steps.abs().sum() > 0
        if whole:
            assert torch.equal(clip["flow"], clip["flow"].round())


@pytest.mark.parametrize("kind", WORLDS)
def test_flow_leads_to_the_same_pixel_of_the_next_frame(kind):
    compared = 0
    for i in range(5):
        clip = kind(seed=2, whole_pixels=True, speed=(1, 5))[i]
        frames, masks = clip["frames"].numpy(), clip["masks"].numpy()
        for t, k in np.ndindex(9, masks.shape[1]):
            y, x = np.nonzero(masks[t, k])
            dx, dy = clip["flow"][t].numpy()[:, y, x].astype(int)
            keep = (x + dx >= 0) & (x + dx < 64) & (y + dy >= 0) & (y + dy < 64)
            y, x, dx, dy = (v[keep] for v in (y, x, dx, dy))
            seen = masks[t + 1, k, y + dy, x + dx]
            assert np.array_equal(frames[t, y[seen], x[seen]], frames[t + 1, (y + dy)[seen], (x + dx)[seen]])
            covered = masks[t + 1][:, (y + dy)[~seen], (x + dx)[~seen]]
            assert covered.any(0).all()  # an object pixel only vanishes behind another object
            compared += int(seen.sum())
    assert compared > 10_000


@pytest.mark.parametrize("kind", [MovingDigits, BouncingSprites, CuedTarget])
def test_centres_are_the_middle_of_what_is_seen(kind):
    for i in range(4):
        clip = kind(whole_pixels=True, seed=3)[i]
        rows, columns = clip["masks"][:, 0].any(2), clip["masks"][:, 0].any(1)  # object 0 is in front: never covered
        for t in range(10):
            y, x = rows[t].nonzero().flatten().float(), columns[t].nonzero().flatten().float()
            assert clip["trajectories"][t, 0].tolist() == [(x[0] + x[-1]) / 2, (y[0] + y[-1]) / 2]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("digits", [1, 2, 4])
def test_bounces_keep_digits_inside_at_constant_speed(whole, digits):
    clip = MovingDigits(digits=digits, num_frames=80, speed=(4, 7), whole_pixels=whole)[0]
    front = clip["masks"][:, 0].flatten(1).sum(1)
    assert front.max() - front.min() <= (0 if whole else 0.25 * front.max())  # nothing is cut off at a wall
    steps = clip["trajectories"].diff(dim=0).abs()
    assert (steps.max(0).values - steps.median(0).values).max() < 1e-3  # one speed, but for steps that a wall cuts short
    assert (clip["trajectories"] > 0).all() and (clip["trajectories"] < 63).all()
    assert all(parts.turns(clip["trajectories"][:, k].numpy()) > 2 for k in range(digits))


@pytest.mark.parametrize("kind", WORLDS)
@pytest.mark.parametrize("whole", [False, True])
def test_static_twin_is_the_first_frame(kind, whole):
    for i in range(3):
        live, twin = (kind(seed=7, static=s, whole_pixels=whole)[i] for s in (False, True))
        assert torch.equal(twin["frames"], live["frames"][:1].expand_as(live["frames"]))
        assert torch.equal(twin["masks"], live["masks"][:1].expand_as(live["masks"]))
        assert torch.equal(twin["trajectories"], live["trajectories"][:1].expand_as(live["trajectories"]))
        assert not twin["flow"].any() and twin["objects"] == live["objects"] and twin.get("cue") == live.get("cue")
        assert re.search(r"stands? still|rests on", twin["caption"])
        assert not torch.equal(live["frames"][0], live["frames"][-1])


def check_motion(phrase, path):
    "The direction of a caption within 22.5 degrees of the first step, and its bounces those of the path."
    found = re.search(r"(?:sets off|pans) ((?:up|down)(?: and (?:left|right))?|left|right)(?: and bounces ([\w ]+?(?:times)|once|twice))?", phrase)
    assert found, phrase
    step = np.diff(path, axis=0)[0]
    said = np.array(DIRECTIONS[found[1]])
    assert step @ said >= np.linalg.norm(step) * np.linalg.norm(said) * np.cos(np.pi / 8 + 1e-3), phrase
    if "camera" in phrase:
        assert ("turns at an edge" in phrase) == (parts.turns(path) > 0), phrase
    else:
        assert COUNTS.get(found[2], 0) == parts.turns(path), phrase


@pytest.mark.parametrize("seed", range(3))
def test_captions_are_true(seed):
    for i in range(8):
        clip = MovingDigits(seed=seed, speed=(3, 5))[i]
        clauses = clip["caption"].split(", and ")
        for k, clause in enumerate(clauses):
            assert clip["objects"][k] in clause
            check_motion(clause, clip["trajectories"][:, k].numpy())
        clip = BouncingSprites(seed=seed, distractors=3, speed=(3, 5))[i]
        assert clip["objects"][0] in clip["caption"] and "among three other shapes" in clip["caption"] and len(clip["objects"]) == 4
        check_motion(clip["caption"], clip["trajectories"][:, 0].numpy())
        clip = CuedTarget(seed=seed, cue="caption", speed=(3, 5))[i]
        assert clip["objects"][clip["cue"]] in clip["caption"]
        check_motion(clip["caption"], clip["trajectories"][:, clip["cue"]].numpy())
        clip = PhotoPan(seed=seed)[i]
        check_motion(clip["caption"], -clip["trajectories"][:, 0].numpy())  # the camera goes against the picture
        assert ("pagoda" in clip["caption"]) == (clip["objects"] == ["china"])


def test_named_colours_are_the_colours_shown():
    for i in range(10):
        clip = BouncingSprites(seed=9, whole_pixels=True)[i]
        for k, name in enumerate(clip["objects"]):
            shown = clip["frames"][0][clip["masks"][0, k]].float().mean(0).numpy()
            distance = {c: np.linalg.norm(shown / np.linalg.norm(shown) - np.array(rgb) / np.linalg.norm(rgb)) for c, rgb in parts.COLOURS.items()}
            assert min(distance, key=distance.get) == name.split()[0]
        assert len({n.split()[0] for n in clip["objects"]}) == len({n.split()[1] for n in clip["objects"]}) == 3


def test_a_cue_marks_its_target_and_nothing_else():
    for i in range(12):
        border, patch, plain = (CuedTarget(seed=3, cue=c, cue_frames=2, whole_pixels=True)[i] for c in ("border", "patch", "caption"))
        assert not any(name in border["caption"] + patch["caption"] for name in border["objects"])
        changed = (border["frames"] != CuedTarget(seed=3, cue="caption", whole_pixels=True)[i]["frames"]).any(-1)
        assert changed[:2].flatten(1).any(1).all() and not changed[2:].any()
        assert not (changed & border["masks"].any(1)).any()  # behind all shapes
        y, x = changed[0].nonzero(as_tuple=True)
        centre = border["trajectories"][0, border["cue"]]
        others = [k for k in range(3) if k != border["cue"]]
        middle = torch.stack([x.float().mean(), y.float().mean()])
        assert all((middle - centre).norm() < (middle - border["trajectories"][0, k]).norm() for k in others)
        swatch = patch["frames"][0, 2, 2].float() / 255
        colour = torch.tensor(parts.COLOURS[patch["objects"][patch["cue"]].split()[0]])
        assert torch.allclose(swatch, colour.float(), atol=0.01)
        assert plain["objects"][plain["cue"]] in plain["caption"]


def test_sub_pixel_pan_is_the_photograph_between_its_pixels():
    clip = PhotoPan(photo="china", seed=1)[0]
    flow = clip["flow"][0, :, 0, 0]
    assert (flow != flow.round()).all() and (clip["flow"] == clip["flow"][:, :, :1, :1]).all() and clip["masks"].all()
    grid = torch.stack(torch.meshgrid(torch.arange(64), torch.arange(64), indexing="xy"), -1) + flow
    ahead = torch.nn.functional.grid_sample(clip["frames"][1].permute(2, 0, 1)[None].float(), grid[None] / 63 * 2 - 1, align_corners=True)[0].permute(1, 2, 0)
    inner = np.s_[6:-6, 6:-6]
    now = clip["frames"][0].float()
    assert (ahead - now)[inner].abs().mean() < 0.5 * (clip["frames"][1].float() - now)[inner].abs().mean()


def test_pan_steps_are_read_off_a_ramp(monkeypatch):
    def ramp(name, height):
        y, x = np.mgrid[: round(height), : round(height * 1.5)] / (height * 1.5)
        return np.stack([x, y, 0 * x], -1).astype(np.float32)

    monkeypatch.setattr("fvlm.data.worlds.photograph", ramp)
    for i in range(6):
        clip = PhotoPan(zoom=1.25, seed=1)[i]
        seen = -clip["frames"].double().mean((1, 2)).diff(dim=0)[:, :2] * 120 / 255  # the picture brightens as the window moves on
        assert torch.allclose(seen, clip["flow"].double().mean((2, 3)), atol=0.08)  # bytes are rounded


def test_half_covered_is_the_rule_for_a_pixel():
    square = parts.Sprite(np.ones((4, 5, 4), np.float32), "square")
    for x, y in ((0.2, 0.0), (0.5, 0.0), (0.7, 0.9), (0.3, 0.4), (0.0, 0.6)):
        frames, masks = parts.painted(np.zeros((8, 9, 3)), [square], np.array([[[1 + x, 2 + y]]]))
        assert np.array_equal(masks[0, 0], frames[0, ..., 0] >= 128) and masks.any()


def test_bounced_is_the_walk_with_reflections():
    room, position, velocity = np.array([[17.0, 5.0]]), np.array([[3.0, 4.0]]), np.array([[2.0, -1.0]])
    path = parts.bounced(position, velocity, room, 40)
    for t in range(40):
        assert np.array_equal(path[t], position)
        position = position + velocity
        velocity = np.where((position < 0) | (position > room), -velocity, velocity)
        position = np.where(position < 0, -position, np.where(position > room, 2 * room - position, position))
        velocity = np.where((position == 0) & (velocity < 0) | (position == room) & (velocity > 0), -velocity, velocity)
    assert not parts.bounced([[0, 0]], [[3, 3]], [[0, 0]], 5).any()


@pytest.mark.parametrize(
    ("kind", "options", "name"),
    [
        *[(kind, {name: value}, name) for kind in WORLDS for name, value in {"num_clips": 0, "num_frames": 1, "size": 8, "seed": 0.5, "speed": (3, 1)}.items()],
        (MovingDigits, {"speed": 3.0}, "speed"),
        (MovingDigits, {"speed": (0, 1)}, "speed"),
        (MovingDigits, {"speed": (1, float("nan"))}, "speed"),
        (MovingDigits, {"digits": 0}, "digits"),
        (MovingDigits, {"digits": 11}, "digits"),
        (MovingDigits, {"digit_size": 0.9}, "digit_size"),
        (BouncingSprites, {"distractors": 7}, "distractors"),
        (BouncingSprites, {"distractors": -1}, "distractors"),
        (BouncingSprites, {"sprite_size": (0.3, 0.2)}, "sprite_size"),
        (CuedTarget, {"distractors": 0}, "distractors"),
        (CuedTarget, {"cue": "boarder"}, "did you mean 'border'"),
        (CuedTarget, {"cue_frames": 11}, "cue_frames"),
        (PhotoPan, {"photo": "moon"}, "photo"),
        (PhotoPan, {"zoom": 1.0}, "zoom"),
    ],
)
def test_bad_arguments(kind, options, name):
    with pytest.raises(ConfigError, match=name):
        kind(**options)


def test_a_typo_is_no_option():
    with pytest.raises(TypeError, match="num_frame"):
        MovingDigits(num_frame=3)
    with pytest.raises(TypeError):
        MovingDigits(10)


def test_parts_refuse_nonsense():
    with pytest.raises(ConfigError, match="did you mean 'star'"):
        parts.shape_sprite("stra", "red", 10)
    with pytest.raises(ConfigError, match="colour"):
        parts.shape_sprite("star", "mauve", 10)
    with pytest.raises(ConfigError, match="size"):
        parts.shape_sprite("star", "red", 1)
    with pytest.raises(ShapeError, match="scan"):
        parts.digit_sprite(np.zeros((28, 28)), 20, "digit")
    with pytest.raises(ShapeError, match="leaves the"):
        parts.painted(np.zeros((16, 16, 3)), [parts.shape_sprite("disc", "red", 8)], np.array([[[12.0, 0.0]]]))
    with pytest.raises(ShapeError, match="leaves the"):
        parts.painted(np.zeros((16, 16, 3)), [parts.shape_sprite("disc", "red", 8)], np.array([[[-3.0, 0.0]]]))
    with pytest.raises(ShapeError, match="corners"):
        parts.painted(np.zeros((16, 16, 3)), [], np.zeros((2, 1, 2)))
    with pytest.raises(ShapeError, match="trajectories"):
        parts.object_flow(np.zeros((2, 1, 4, 4), bool), np.zeros((2, 2, 2)))
    for start, room in (([[0, 0, 0]], [[1, 1, 1]]), ([[0, 0]], [[-1, 1]])):
        with pytest.raises(InputError):
            parts.bounced(start, np.ones_like(start), room, 3)
