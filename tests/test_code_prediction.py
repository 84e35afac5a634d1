"""Contracts of the evaluation of predicted frames: arrays on paper, rows, intervals, planted cases, keeping, bad input."""
import json

import numpy as np
import pytest
import torch

from fvlm.core import ConfigError, InputError, NonFiniteError, ShapeError, WeightsError
from fvlm.data.moving_mnist import MovingMNIST
from fvlm.evidence import code_prediction
from fvlm.evidence.code_prediction import BestOf, Ceiling, OneFuture, ToldThePath, judge_frames
from fvlm.evidence.frame_results import FramePredictionResult, runs_of
from fvlm.models.hr_vqvae import HRVQVAE
from fvlm.models.frame_predictor import PixelCopyLast
from fvlm.models.rivals import ConvLSTM
from fvlm.objectives.frame_scores import FRAME_CONVENTIONS, centre_errors, first_turns, frame_scores, gradient_energy, looks_of, motion_scores, painted_at
from fvlm.recipes.frame_clips import FrameClips, held_world


def clips(n=6, T=8, size=16, C=1, seed=0, owners=None):
    frames = torch.randint(0, 256, (n * T, C, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return FrameClips(frames, torch.arange(n) * T, T, torch.arange(n) if owners is None else owners, [f"clip{i}" for i in range(n)])


class Off:
    "The truth, off by a number that may depend on the frame ahead."

    num_parameters = 7

    def __init__(self, *sizes):
        self.sizes = sizes

    def predict_by_truth(self, context, target):
        size = torch.tensor(self.sizes).expand(target.shape[1]).view(1, -1, 1, 1, 1)
        return torch.where(target < 0.5, target + size, target - size)


class Codes:
    "Predicts noise around the last frame, as its generator says."

    num_parameters = 3

    def predict(self, context, frames, *, greedy=False, temperature=1.0, top_k=None, generator=None):
        last = context[:, -1:].expand(-1, frames, -1, -1, -1)
        return last if greedy else (last + 0.3 * temperature * torch.randn(last.shape, generator=generator)).clamp(0, 1)


def test_arrays_on_paper():
    data = clips()
    found = judge_frames({"off": [Off(0.1), Off(0.2)]}, data, context_frames=3, with_lpips=False)
    frames = data.batch(torch.arange(6))["frames"]
    assert set(found.values) == {"copy_last", "linear", "off", "truth"} and found.horizon == 5 and found.context_frames == 3
    assert set(found.values["off"]) == {"mse", "mse_sum", "psnr", "ssim", "sharpness"} <= set(FRAME_CONVENTIONS)
    assert found.values["off"]["mse"].shape == (2, 6, 5) and found.values["copy_last"]["mse"].shape == (1, 6, 5)
    np.testing.assert_allclose(found.values["off"]["mse"], np.array([0.01, 0.04])[:, None, None] * np.ones((1, 6, 5)), rtol=1e-4)
    np.testing.assert_allclose(found.values["off"]["mse_sum"], found.values["off"]["mse"] * 256, rtol=1e-6)
    np.testing.assert_allclose(found.values["off"]["psnr"][0], 20.0, rtol=1e-3)
    copied = (frames[:, 2:3] - frames[:, 3:]).square().mean((2, 3, 4))
    np.testing.assert_allclose(found.values["copy_last"]["mse"][0], copied.numpy(), rtol=1e-5)
    np.testing.assert_allclose(found.per_horizon("copy_last"), copied.mean(0).numpy(), rtol=1e-5)
    np.testing.assert_allclose(found.values["truth"]["sharpness"][0], gradient_energy(frames[:, 3:]).numpy(), rtol=1e-5)
    assert not found.values["truth"]["mse"].any() and (found.values["truth"]["psnr"] == 60).all()


def test_the_batch_size_changes_nothing_and_the_future_may_be_shorter():
    data, rows = clips(), {"off": Off(0.1)}
    a, b = (judge_frames(rows, data, context_frames=2, future_frames=3, batch_size=size, with_lpips=False) for size in (4, 100))
    for metric, values in a.values["off"].items():
        np.testing.assert_allclose(values, b.values["off"][metric], rtol=1e-6)
    assert a.horizon == 3


def test_windows_of_one_clip_are_one_observation():
    owners = torch.tensor([3, 3, 3, 5, 1, 1])
    one, each = (judge_frames({}, clips(owners=o), context_frames=3, with_lpips=False).values["copy_last"]["mse"][0] for o in (owners, None))
    np.testing.assert_allclose(one, np.stack([each[4:6].mean(0), each[:3].mean(0), each[3]]), rtol=1e-12)
    assert judge_frames({}, clips(owners=owners), context_frames=3, with_lpips=False).clip_names == ["clip1", "clip3", "clip5"]


def test_from_which_frame_on():
    data = clips(n=12)
    found = judge_frames({
        "always": Off(0.05), "never": Off(0.49), "late": Off(0.49, 0.49, 0.05, 0.05, 0.05), "early": Off(0.05, 0.05, 0.05, 0.05, 0.49), "again": Off(0.05, 0.49, 0.05, 0.05, 0.05),
    }, data, context_frames=3, with_lpips=False)
    assert {name: found.beats_from(name) for name in ("always", "never", "late", "early", "again")} == {"always": 1, "never": None, "late": 3, "early": None, "again": 3}
    assert found.beats_from("always", metric="psnr") == 1 and found.beats_from("never", metric="psnr") is None and found.beats_from("never", "always") is None
    assert found.beats_from("copy_last") is None  # not better than itself
    table = found.table()
    assert "from frame 3 on" in table and "not at frame 5" in table and len({line.count("|") for line in table.splitlines()}) == 1
    assert found.interval("always").high < 0 < found.interval("always", statistic="skill").low and found.interval("late", ahead=1).low > 0
    assert found.table(upto=2) != table


def test_greedy_one_sample_and_the_best_of_several():
    data, model = clips(), Codes()
    found = judge_frames({"greedy": OneFuture(model), "one": OneFuture(model, greedy=False), "again": OneFuture(model, greedy=False), "cold": OneFuture(model, greedy=False, temperature=1e-9),
                          "best": BestOf(model, 5), "other": OneFuture(model, greedy=False, seed=1)}, data, context_frames=3, with_lpips=False)
    values = {name: of["mse"] for name, of in found.values.items()}
    assert np.array_equal(values["greedy"], values["copy_last"]) and np.allclose(values["cold"], values["greedy"], atol=1e-6)
    assert np.array_equal(values["one"], values["again"]) and not np.array_equal(values["one"], values["other"])
    singles = [judge_frames({"one": OneFuture(model, greedy=False)}, data, context_frames=3, with_lpips=False)]
    assert (values["best"].mean(2) <= singles[0].values["one"]["mse"].mean(2) + 1e-9).all() and (values["best"].mean(2) < values["one"].mean(2)).any()
    assert found.parameters["best"] == found.parameters["greedy"] == 3


def test_the_ceiling_is_the_reconstruction():
    data, model = clips(), HRVQVAE.tiny().train()
    found = judge_frames({"ceiling": Ceiling(model)}, data, context_frames=3, with_lpips=False)
    future = data.batch(torch.arange(6))["frames"][:, 3:]
    np.testing.assert_allclose(found.values["ceiling"]["mse"][0], frame_scores(model.reconstruct(future), future)["mse"].numpy(), rtol=1e-5)
    assert found.bytes_per_frame["ceiling"] == 12 and found.bytes_per_frame["copy_last"] == 256 and found.parameters["ceiling"] == model.num_parameters
    assert model.training, "the mode of a model is put back"


def test_places_in_a_world():
    data = held_world(MovingMNIST(num_clips=4, num_frames=8, seed=2), answers=True)
    found = judge_frames({"off": Off(0.02)}, data, context_frames=4, with_lpips=False)
    assert np.median(found.values["truth"]["centre"]) < 1 and abs(found.values["off"]["centre"] - found.values["truth"]["centre"]).mean() < 0.5
    assert found.per_horizon("copy_last", "centre")[-1] > 5 and "centre off by, px" in found.table()
    frames, answers = data.batch(torch.arange(4))["frames"], data.answers
    moved = torch.roll(frames[:, 4:], (3, -2), (3, 4))
    from_truth = centre_errors(moved, frames[:, :4], answers["masks"], answers["trajectories"])
    assert abs(from_truth.median() - 13**0.5) < 1.0


def test_lpips_is_used_or_said_to_be_missing(monkeypatch):
    def missing():
        raise WeightsError("lpips: not here; put it there")

    monkeypatch.setattr(code_prediction, "lpips_weights", missing)
    found = judge_frames({}, clips(), context_frames=3)
    assert "lpips" not in found.values["copy_last"] and any("no LPIPS" in note for note in found.notes)
    with pytest.raises(WeightsError):
        judge_frames({}, clips(), context_frames=3, with_lpips=True)


def test_one_clip_and_one_seed_have_no_interval():
    found = judge_frames({"off": Off(0.1)}, clips(n=1), context_frames=3, with_lpips=False)
    assert found.interval("off") is None and found.beats_from("off") is None and "[" not in found.table().split("\n")[-1]
    assert judge_frames({"off": [Off(0.1), Off(0.2)]}, clips(n=1), context_frames=3, with_lpips=False).interval("off").clips == 1


def test_a_still_clip_has_no_skill():
    still = FrameClips(torch.full((8, 1, 16, 16), 9, dtype=torch.uint8), [0, 0], 8, [0, 1], ["a", "b"])
    table = judge_frames({"off": Off(0.1)}, still, context_frames=3, with_lpips=False).table()
    assert "nan" not in table and "inf" not in table


def test_kept_and_read_again():
    found = judge_frames({"off": Off(0.1)}, clips(), context_frames=3, with_lpips=False)
    again = FramePredictionResult.from_plain(json.loads(json.dumps(found.plain(), allow_nan=False)))
    assert again.table() == found.table() and again.by_clip() == found.by_clip() and set(again.by_clip()["off/mse"]) == set(found.clip_names)
    assert found.figure().size[0] > 100 and found.figure("sharpness", ["off", "truth"]).size[0] > 100


def rejected(error, text, call):
    with pytest.raises(error, match=text) as caught:
        call()
    assert isinstance(caught.value, InputError) and len(str(caught.value).splitlines()) == 1


def test_bad_input():
    data = clips()

    class Wrong:
        def predict(self, context, frames):
            return context[:, -1]

    class Broken:
        def predict(self, context, frames):
            return context[:, -1:].expand(-1, frames, -1, -1, -1) * float("nan")

    found = judge_frames({}, data, context_frames=3, with_lpips=False)
    rejected(ConfigError, "context_frames: got 0", lambda: judge_frames({}, data, context_frames=0))
    rejected(ConfigError, "context_frames: got 8", lambda: judge_frames({}, data, context_frames=8))
    rejected(ConfigError, "future_frames", lambda: judge_frames({}, data, context_frames=3, future_frames=6))
    rejected(ConfigError, "ssim_window", lambda: judge_frames({}, data, context_frames=3, ssim_window="uniform"))
    rejected(ShapeError, "wrong: predicted", lambda: judge_frames({"wrong": Wrong()}, data, context_frames=3, with_lpips=False))
    rejected(NonFiniteError, "prediction", lambda: judge_frames({"broken": Broken()}, data, context_frames=3, with_lpips=False))
    rejected(ShapeError, "axis H should be 16", lambda: judge_frames({"small": ConvLSTM.tiny()}, clips(size=20), context_frames=3, with_lpips=False))
    rejected(InputError, "expected at least the 3", lambda: judge_frames({"m": ConvLSTM.tiny()}, data, context_frames=2, with_lpips=False))
    rejected(ConfigError, "row: got 'of'", lambda: found.beats_from("of"))
    rejected(ConfigError, "metric: got 'mae'", lambda: found.per_horizon("copy_last", "mae"))
    rejected(ConfigError, "upto", lambda: found.table(upto=6))
    rejected(ConfigError, "not a result", lambda: FramePredictionResult.from_plain({"values": 3}))
    rejected(ConfigError, "samples", lambda: BestOf(PixelCopyLast(), 1))


def test_verdicts_by_frame_in_words():
    assert runs_of(["open", "better", "better", "worse", "better"], "better") == "frames 2 to 3 and 5" and runs_of(["open", "better"], "better") == "frame 2" and runs_of(["open"], "worse") == "no frame"
    found = judge_frames({"always": Off(0.05), "never": Off(0.49), "late": Off(0.49, 0.49, 0.05, 0.05, 0.05), "early": Off(0.05, 0.05, 0.05, 0.05, 0.49)}, clips(n=12), context_frames=3, with_lpips=False)
    assert found.against("late") == ["worse", "worse", "better", "better", "better"]
    said = {name: found.sentence(name) for name in ("always", "never", "late", "early")}
    assert "less mse than copy_last" in said["always"] and said["always"].endswith("better in every frame.")
    assert "more mse than copy_last" in said["never"] and "better in no frame of 5; worse in frames 1 to 5" in said["never"]
    assert "better from frame 3 on, to the last of 5; worse in frames 1 to 2" in said["late"] and "better in frames 1 to 4 of 5, not to the end; worse in frame 5" in said["early"]
    assert "less" in found.sentence("always", "never", "mse") and found.sentence("always", "never", "psnr").count("better in every frame") == 1
    alone = judge_frames({"off": Off(0.1)}, clips(n=1), context_frames=3, with_lpips=False)
    assert "no interval" in alone.sentence("off")


def test_rows_that_learn_nothing():
    data = clips()
    found = judge_frames({}, data, context_frames=3, with_lpips=False, mean_of=data)
    mean = data.frames.float().mean(0) / 255
    future = data.batch(torch.arange(6))["frames"][:, 3:]
    np.testing.assert_allclose(found.values["mean_frame"]["mse"][0], (future - mean).square().mean((2, 3, 4)).numpy(), rtol=1e-4)
    assert found.parameters["mean_frame"] == 256 and "told_the_path" not in found.values
    assert set(judge_frames({"off": Off(0.1)}, data, context_frames=3, with_lpips=False, trivial=False).values) == {"off", "truth"}
    with pytest.raises(InputError, match="told the answers"):
        judge_frames({"told": ToldThePath()}, data, context_frames=3, with_lpips=False)


def test_who_is_told_the_path_draws_moving_mnist_exactly():
    data = held_world(MovingMNIST(num_clips=4, num_frames=12, seed=1), answers=True)
    found = judge_frames({"off": Off(0.02)}, data, context_frames=6, with_lpips=False)
    told, copied = (found.values[row] for row in ("told_the_path", "copy_last"))
    assert told["mse"].mean() < 0.02 * copied["mse"].mean() and told["centre"].mean() < 0.5 and np.median(told["bounce"]) == 0
    assert found.interval("told_the_path", statistic="skill") is None and "told_the_path" in found.table()
    assert (copied["speed"] > 1).all() and (copied["bounce"] >= told["bounce"]).all() and found.values["off"]["identity"].mean() > 0.9


def test_first_turns_on_paper():
    walk = lambda *x: torch.tensor(x, dtype=torch.float32)
    path = torch.stack([torch.stack([walk(1, 3, 5, 4, 2, 4)], -1), torch.stack([walk(9, 8, 7, 6, 5, 4)], -1)], -1)[:, 0][:, None]  # x turns after the third frame, y goes on
    assert first_turns(torch.tensor([[2.0, -1.0]]), path).tolist() == [[3.0, 7.0]]
    assert first_turns(torch.tensor([[-2.0, 1.0]]), path).tolist() == [[1.0, 1.0]], "against what was seen: turned at once"
    assert first_turns(torch.tensor([[0.0, 0.1]]), path).tolist() == [[7.0, 7.0]], "what stood still has no direction to turn from"
    assert first_turns(torch.tensor([[2.0, -1.0]]), path, back=4.0).tolist() == [[7.0, 7.0]]


def test_motion_of_planted_futures():
    world = MovingMNIST(num_clips=3, num_frames=20, seed=4)
    data = held_world(world, answers=True)
    frames, (masks, paths) = data.batch(torch.arange(3))["frames"], (data.answers[name] for name in ("masks", "trajectories"))
    looks = [looks_of(frames[i, :8], masks[i, :8], paths[i, :8]) for i in range(3)]
    score = lambda places: motion_scores(torch.stack([painted_at(look, p, (64, 64)) for look, p in zip(looks, places)]), frames[:, :8], masks, paths)
    right, still = score(paths[:, 8:]), score(paths[:, 7:8].expand(-1, 12, -1, -1))
    assert set(right) == {"centre", "speed", "likeness", "identity", "bounce"} and all(x.shape == (3, 12) for x in right.values())
    assert right["centre"].max() < 1 and right["speed"].max() < 1 and right["likeness"].mean() > 0.8 and right["identity"].mean() > 0.95 and right["bounce"].max() <= 0.5
    assert still["speed"].mean() > 2 and still["bounce"].mean() > 1
    late = score(paths[:, 5:17])
    assert late["bounce"].mean() > right["bounce"].mean() and late["likeness"].mean() > 0.7
    exchanged = motion_scores(torch.stack([painted_at([look[1], look[0]], p.flip(1) * 0 + torch.stack([p[:, 0] - look[0].centre + look[1].centre, p[:, 1] - look[1].centre + look[0].centre], 1), (64, 64)) for look, p in zip(looks, paths[:, 8:])]), frames[:, :8], masks, paths)
    assert exchanged["centre"].mean() > 3
    grey = motion_scores(torch.full_like(frames[:, 8:], 0.2), frames[:, :8], masks, paths)
    assert grey["likeness"].abs().max() < 1e-3 and not grey["identity"].any()
    one = motion_scores(frames[:, 8:], frames[:, :8], masks[:, :, :1], paths[:, :, :1])
    assert "identity" not in one and "bounce" not in motion_scores(frames[:, 8:], frames[:, 7:8], masks[:, 7:], paths[:, 7:])
    with pytest.raises(ShapeError):
        motion_scores(frames[:, 8:], frames[:, :8], masks[:, :9], paths)
