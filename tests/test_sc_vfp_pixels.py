"""Windows with pictures, losses through a decoder, their cells and grid, and how far two measures agree."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from fvlm.app.pixel_study import SC_VFP_PIXELS, pixel_settings
from fvlm.app.sc_vfp_commands import STUDIES
from fvlm.core import ConfigError, InputError, NonFiniteError, ShapeError
from fvlm.data.embedding_cache import EmbeddingCache
from fvlm.data.worlds import BouncingSprites
from fvlm.encoders.embeddings import FrameEmbedder
from fvlm.evidence.metric_agreement import VIEWS, agreement, better, correlation
from fvlm.evidence.pixel_cells import (
    AHEAD, EMBEDDING_RANGE, PAINTED, PIXEL_ROWS, gradients, judged_cell, judged_pixels, paint, painted_windows, participation_ratio, pixel_conventions, predicted, trained_decoder, trained_predictor)
from fvlm.evidence.pixel_grid import of_cell, pixel_cells, pixel_table, run_pixels
from fvlm.evidence.sc_vfp_cells import errors_ahead
from fvlm.models.baselines import CopyLast
from fvlm.models.pixel_decoder import PixelDecoder, PixelDecoderConfig
from fvlm.recipes.pixel_windows import LOOKS, FrameSource, FrameWindows, PatchGrid, ScenePatches, spread_windows
from fvlm.recipes.question_windows import long_windows
from fvlm.recipes.sc_vfp_pixels import PIXEL_ARMS, PixelRecipe, ThroughDecoder, open_pixels, pixel_base
from fvlm.training.embedding_splits import drawn_split, embed_world, make_splits
from fvlm.training.loop import train
from fvlm.training.records import read_records


@pytest.fixture(scope="module")
def world():
    return BouncingSprites(num_clips=10, num_frames=20, size=32, speed=(2.0, 3.0), seed=0)


@pytest.fixture(scope="module")
def recipe():
    full = pixel_base("worlds")
    base = replace(full.base, gap=2, size=replace(full.base.size, width=16, num_heads=4, ffn_dim=32, mlp_dims=()), training=replace(full.base.training, steps=6, batch_size=16, val_every=3, precision="fp32"))
    return replace(full, image_size=32, grid=(2, 2), scene_windows=12, test_windows=3, base=base, decoder_training=replace(full.decoder_training, steps=6, batch_size=8, val_every=3, precision="fp32"))


@pytest.fixture(scope="module")
def data(world, recipe, tmp_path_factory):
    embedder, cache = FrameEmbedder.tiny(pooling="mean"), EmbeddingCache(tmp_path_factory.mktemp("cache"))
    clips = embed_world(world, "toy", embedder, cache, progress=False)
    splits = make_splits(clips, drawn_split([c.group for c in clips]), encoder="tiny", gap=2, gap_jitter=1)
    return open_pixels(recipe, splits, long_windows(splits, "test", recipe.base, AHEAD), PatchGrid(embedder, (2, 2)), FrameSource(32, worlds={"toy": world}), cache)


@pytest.fixture(scope="module")
def decoders(recipe, data):
    return {look: trained_decoder(recipe, data, look)[0] for look in LOOKS}


# Windows and frames


def test_every_batch_holds_the_frame_of_its_target_at_every_gap(world, data):
    side = FrameWindows(data.splits.train, data.frames["train"])
    assert len(data.splits.train.parts) == 3  # gaps 2, 1 and 3
    embedder = FrameEmbedder.tiny(pooling="mean")
    for number in np.linspace(0, len(side) - 1, 12).astype(int):
        batch = side.batch([number])
        truth = data.splits.standardiser.apply(embedder(batch["frame"][:, None])[:, 0])
        torch.testing.assert_close(truth, batch["target"], atol=0.05, rtol=0.02)  # rows are kept in half precision


def test_the_scene_is_the_last_frame_seen_and_own_is_painted_from_it(data):
    embedder = FrameEmbedder.tiny(pooling="mean")
    own = data.decoder_windows("train", "own").batch([0, 1])
    torch.testing.assert_close(own["patches"], data.scene["train"].standardiser.apply(embedder.patches(own["frame"][:, None])[:, 0].unflatten(1, (2, 2, 2, 2)).mean((2, 4)).flatten(1, 2)), atol=0.05, rtol=0.02)
    scene = data.decoder_windows("train", "scene").batch([0, 1])
    assert torch.equal(scene["patches"], own["patches"]) and not torch.equal(scene["frame"], own["frame"])
    assert not torch.equal(scene["vector"], own["vector"])
    assert len(data.decoder_windows("train", "vector")) == len(data.splits.train)
    assert set(data.decoder_windows("val", "vector").batch([0])) == {"vector", "frame"}


def test_spread_windows_take_a_few_of_each_clip(data):
    windows = data.splits.val
    chosen = spread_windows(windows, 3)
    assert all(1 <= int((windows.clip_of_window[chosen] == c).sum()) <= 3 for c in windows.clip_of_window.unique())
    assert torch.equal(spread_windows(windows, 10**6), torch.arange(len(windows)))


def test_patches_come_from_the_cache_the_second_time(world, data, tmp_path):
    clips, source, embedder = data.splits.clips["val"], FrameSource(32, worlds={"toy": world}), FrameEmbedder.tiny(pooling="mean")
    read = lambda reader: ScenePatches.read(clips, [[3, 1, 3]] * len(clips), reader, source, EmbeddingCache(tmp_path))
    first = read(PatchGrid(embedder, (2, 2)))
    silent = PatchGrid(embedder, (2, 2))
    silent.embedder.patches = None  # reading again would fail
    second = read(silent)
    at = torch.tensor([0]), torch.tensor([3])
    assert first.rows[0].tolist() == [1, 3] and torch.equal(first.at(*at), second.at(*at))
    with pytest.raises(InputError, match="frame 2 of clip 0 was not read"):
        first.at(torch.tensor([0]), torch.tensor([2]))


def test_what_cannot_be_read_is_named(world, data):
    with pytest.raises(ConfigError, match="grid"):
        PatchGrid(FrameEmbedder.tiny(), (3, 3))
    with pytest.raises(InputError, match="scene: got None"):
        FrameWindows(data.splits.test, data.frames["test"], look="scene")
    with pytest.raises(InputError, match="frames: got those of 0 clips"):
        FrameWindows(data.splits.test, [])
    with pytest.raises(ConfigError, match="look"):
        FrameWindows(data.splits.test, data.frames["test"], look="scenery")
    with pytest.raises(ShapeError, match="32 x 32 pixels, expected 64 x 64"):
        FrameSource(64, worlds={"toy": world}).small(data.splits.clips["test"][0])


# Losses


@pytest.mark.parametrize("arm", PIXEL_ARMS)
def test_each_loss_trains_what_it_says(arm, recipe, data, decoders):
    cell = ThroughDecoder(recipe.predictor(32, 0), decoders["vector"], pixel_variance=data.pixel_variance, **PIXEL_ARMS[arm][1])
    batch = FrameWindows(data.splits.train, data.frames["train"]).batch(range(8))
    terms = cell.loss(cell(batch), batch)
    terms["loss"].backward()
    touched = lambda part: any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
    assert touched(cell.model) and touched(cell.decoder) == (arm == "pixel_joint")
    assert not touched(decoders["vector"])  # the arm has a copy
    wanted = {"embedding": terms["mse"], "embedding_pixel": terms["mse"] + terms.get("pixel", 0)}.get(arm, terms.get("pixel"))
    assert terms["loss"].item() == pytest.approx(wanted.item()) and ("pixel" in terms) == (arm != "embedding")


def test_the_embedding_loss_is_the_training_of_the_other_questions(recipe, data, decoders):
    cell = trained_predictor(replace(recipe, arm="embedding"), data, decoders["vector"])[0]
    alone = recipe.predictor(32, recipe.base.training.seed)
    train(alone, {"train": data.splits.train, "val": data.splits.val}, recipe.base.training, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(cell.model.state_dict().values(), alone.state_dict().values()))


def test_training_is_a_function_of_the_seed(recipe, data, decoders):
    weights = [trained_predictor(replace(recipe, arm="pixel_joint"), data, decoders["vector"])[0].state_dict() for _ in range(2)]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    again = trained_decoder(recipe, data, "scene")[0].state_dict()
    assert all(torch.equal(again[k], value) for k, value in decoders["scene"].state_dict().items())


@pytest.mark.parametrize(("wrong", "says"), [(dict(embedding_weight=0.0), "pixel_weight"), (dict(pixel_weight=-1.0), "pixel_weight"), (dict(pixel_variance=0.0), "pixel_variance")])
def test_weights_that_cannot_be(wrong, says, recipe, decoders):
    with pytest.raises(ConfigError, match=says):
        ThroughDecoder(recipe.predictor(32, 0), decoders["vector"], **wrong)


def test_a_decoder_that_does_not_fit_and_bad_frames(recipe, data, decoders):
    for wrong in (decoders["scene"], PixelDecoder(PixelDecoderConfig(embed_dim=16, image_size=32))):
        with pytest.raises(ConfigError, match="decoder: got"):
            ThroughDecoder(recipe.predictor(32, 0), wrong)
    cell = ThroughDecoder(recipe.predictor(32, 0), decoders["vector"], pixel_weight=1.0)
    batch = FrameWindows(data.splits.train, data.frames["train"]).batch(range(4))
    with pytest.raises(ShapeError, match="prediction and target"):
        cell.loss(cell(batch), {**batch, "frame": batch["frame"][..., :16, :16]})
    with pytest.raises(NonFiniteError):
        cell.loss(cell(batch), {**batch, "frame": torch.full_like(batch["frame"], float("nan"))})
    with pytest.raises(NonFiniteError, match="embeddings"):
        cell({**batch, "embeddings": torch.full_like(batch["embeddings"], float("nan"))})
    with pytest.raises(ConfigError, match="arm"):
        PixelRecipe(base=recipe.base, arm="pixels")


# Judging


def test_the_painted_windows_are_those_of_the_other_judge(data):
    shown, windows = painted_windows(data), data.long
    assert shown["truth"].shape[1] == AHEAD and len(shown["clip"]) == len(data.painted["test"])
    from fvlm.training.records import mean_by_clip

    vectors = predicted("copy_last", CopyLast(), shown)
    mine = mean_by_clip((vectors - shown["truth"]).square().mean(-1)[:, 2], shown["clip"], windows.clip_names)
    every = replace(data, painted={**data.painted, "test": torch.arange(len(windows))})
    everything = painted_windows(replace(every, scene={"test": _Anything()}))
    whole = mean_by_clip((predicted("copy_last", CopyLast(), everything) - everything["truth"]).square().mean(-1)[:, 2], everything["clip"], windows.clip_names)
    assert whole == pytest.approx(errors_ahead(CopyLast(), windows)["ahead_3"], rel=1e-5) and set(mine) == set(whole)


class _Anything:
    def at(self, clip, row):
        return torch.zeros(len(clip), 4, 32)


def test_metrics_are_what_their_conventions_say(data, decoders):
    shown, names = painted_windows(data), data.splits.test.clip_names
    found = judged_pixels("copy_last", CopyLast(), shown, decoders, names)
    assert set(found) <= set(pixel_conventions()) and len(found) == AHEAD * (2 + 3 * len(PAINTED))
    clip = names[int(shown["clip"][0])]
    mine = shown["clip"] == shown["clip"][0]
    vector = shown["embeddings"][mine][:, -1]
    painted = decoders["scene"]({"vector": vector, "patches": shown["patches"][mine]})["prediction"]
    wrong = (painted - shown["frames"][mine][:, 1]).square().mean((1, 2, 3))
    assert found["scene_mse_2"][clip] == pytest.approx(wrong.mean().item(), rel=1e-4)
    assert found["scene_psnr_2"][clip] == pytest.approx((-10 * wrong.log10()).mean().item(), rel=1e-4)
    beside = (vector - shown["truth"][mine][:, 1]).square().mean(-1)
    assert found["embedding_psnr_2"][clip] == pytest.approx((10 * torch.log10(EMBEDDING_RANGE**2 / beside)).mean().item(), rel=1e-4)


def test_rows_without_a_prediction(data, decoders):
    shown, names = painted_windows(data), data.splits.test.clip_names
    truth, still = (judged_cell(name, None, data, shown, decoders)[0] for name in ("truth", "pixel_copy"))
    assert set(truth) == set(still) and not any(m.startswith(("embedding", "gradient")) for m in truth)
    assert still["vector_mse_1"] == still["scene_mse_1"]
    clip = names[int(shown["clip"][0])]
    mine = shown["clip"] == shown["clip"][0]
    assert still["vector_mse_3"][clip] == pytest.approx((shown["seen"] - shown["frames"][:, 2])[mine].square().mean().item(), rel=1e-4)


def test_gradients_are_those_of_the_losses(data, decoders):
    shown = painted_windows(data)
    vectors = shown["embeddings"][:, -1].clone()
    for look in PAINTED:
        beside, through = gradients(decoders[look], vectors, shown["truth"][:, 0], shown["frames"][:, 0], shown["patches"], 0.05)
        one = vectors[:1].clone().requires_grad_()
        asked = {"vector": one, "patches": shown["patches"][:1]}
        ((decoders[look](asked)["prediction"] - shown["frames"][:1, 0]).square().mean() / 0.05).backward()
        torch.testing.assert_close(through[:1], one.grad, rtol=1e-4, atol=1e-7)
        two = vectors[:1].clone().requires_grad_()
        (two - shown["truth"][:1, 0]).square().mean().backward()
        torch.testing.assert_close(beside[:1], two.grad)
    assert participation_ratio(torch.eye(5)) == pytest.approx(5) and participation_ratio(torch.ones(9, 5)) == pytest.approx(1)
    with torch.no_grad():
        assert paint(decoders["vector"], shown["truth"], shown["patches"]).shape == shown["frames"].shape


# The grid


def test_a_grid_is_stopped_gone_on_with_and_refused_when_it_changed(recipe, data, tmp_path):
    ask = lambda recipe, seeds=(0,), **more: run_pixels("toy", {"small": recipe}, seeds, lambda _: (data, None), root=tmp_path, work=tmp_path / "work", progress=False, **more)
    half = ask(recipe, shard=(0, 2))
    rest = ask(recipe)
    cells = list(pixel_cells({"small": recipe}, (0,)))
    assert sorted(half + rest) == sorted(cells) and half == cells[::2]
    assert ask(recipe) == []
    kept = sorted((tmp_path / "work").rglob("model.safetensors"))
    assert len(kept) == len(LOOKS)
    before = {r.run: r.metrics for r in read_records(tmp_path, "toy")}
    (tmp_path / "toy" / "small--pixel--seed0.json").unlink()
    assert ask(recipe) == ["small--pixel--seed0"]
    assert {r.run: r.metrics for r in read_records(tmp_path, "toy")} == before  # with the decoder read from its file
    with pytest.raises(ConfigError, match="was run with another recipe"):
        ask(replace(recipe, test_windows=2))
    records = read_records(tmp_path, "toy")
    assert str(tmp_path) not in json.dumps([r.config for r in records])
    table = pixel_table(records, "small")
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == [*PIXEL_ROWS, *PIXEL_ARMS] and pixel_table(records, "other") is None
    assert of_cell(records, "small", "pictures")[0].config["picture"] and of_cell(records, "small", "decoder_own")[0].metrics["own_psnr"] > 0
    scores = better(records, [f"small--{n}" for n in ("copy_last", "ridge", "embedding")], "embedding_mse", AHEAD)
    assert scores.shape == (3, AHEAD, len(data.splits.test.clip_names)) and (scores < 0).all()
    with pytest.raises(InputError, match="no record"):
        better(records, ["small--nobody"], "embedding_mse", AHEAD)


def test_the_study_is_registered_and_shows_only_generated_clips():
    assert STUDIES["sc_vfp_pixels"] == "fvlm.app.pixel_study:SC_VFP_PIXELS"
    assert SC_VFP_PIXELS.settings() == pixel_settings() and len(SC_VFP_PIXELS.seeds) >= 5
    assert {run.split("--")[0] for run in pixel_cells(pixel_settings(), (0,)) if run.endswith("pictures")} == {"worlds"}


# Agreement


def test_agreement_knows_clips_from_predictors():
    draw = np.random.default_rng(1)
    hard, skill = draw.normal(size=(1, 1, 20)) * 5, np.arange(6)[:, None, None]
    noise = lambda: 0.01 * draw.normal(size=(6, 4, 20))
    a, b = hard + skill + noise(), hard - skill + noise()
    assert agreement(a, b, "clips").low > 0.9 and agreement(a, b, "predictors").high < -0.9 and agreement(a, b, "predictors_one_clip").high < -0.9
    same = [agreement(a, a, view, "pearson").estimate for view in VIEWS]
    assert same == pytest.approx([1.0] * len(VIEWS))
    assert str(agreement(a, b, "ahead", seed=2)) == str(agreement(a, b, "ahead", seed=2))
    assert np.isnan(correlation([1, 2, 3], [1, 1, 1]))


@pytest.mark.parametrize(("a", "b", "error", "says"), [
    (np.zeros((2, 4, 5)), np.zeros((2, 4, 6)), ShapeError, "expected one shape"),
    (np.zeros((2, 4)), np.zeros((2, 4)), ShapeError, "expected one shape"),
    (np.full((3, 4, 5), np.nan), np.zeros((3, 4, 5)), NonFiniteError, "better_a"),
    (np.zeros((2, 4, 5)), np.zeros((2, 4, 5)), InputError, "got 2 values to correlate over"),
])
def test_agreement_refuses(a, b, error, says):
    with pytest.raises(error, match=says):
        agreement(a, b, "predictors")
