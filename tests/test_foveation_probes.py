"""Contracts of the quick probes, the cued gaze and their records: known answers, bad input, nothing done twice."""
import math
from dataclasses import replace

import pytest
import torch

from fvlm.core import ConfigError, InputError, ShapeError, generator
from fvlm.encoders.keys_values import VisionEncoder
from fvlm.encoders.language_model import LanguageModel
from fvlm.encoders.latents import load_codec
from fvlm.models.foveated_vlm import FoveatedVLM
from fvlm.objectives.gaze_statistics import gaze_of, mass_on, patch_cover
from fvlm.recipes.cued_gaze import STUDY, TaughtGaze, cued_sides, gaze_by_question, run_gaze, with_states
from fvlm.recipes.foveated_vlm import Parts, build, tiny
from fvlm.recipes.foveation_probes import at_temperature, autocorrelation, likeness_of, noise_frames, sensitivity, share_above_one, width_of
from fvlm.recipes.quick_experiments import QUICK, record_once, rounded, run_looks, run_steps
from fvlm.training.loop import TrainConfig
from fvlm.training.records import read_records


@pytest.fixture(scope="module")
def parts():
    return Parts(encoder=VisionEncoder.tiny(), codec=load_codec("dct"), language_model=LanguageModel.tiny())


@pytest.fixture(scope="module")
def recipe():
    base = tiny()
    return replace(base, source="cued", words=True, world_clips=10, model=base.model.changed(caption_weight=1.0), training=TrainConfig(steps=2, batch_size=4, learning_rate=1e-2, log_every=1))


@pytest.fixture(scope="module")
def sides(recipe, parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoded")
    return [cued_sides(recipe, parts, asked=asked, dir=folder, fractions={"train": 0.6, "test": 0.4}) for asked in (0, 1)]


def test_width_of_uniform_and_one_hot():
    uniform, one = torch.full((2, 3, 2, 4, 8), 1 / 8), torch.eye(8)[:4].expand(2, 3, 2, 4, 8)
    found = width_of([uniform, one])
    assert found["entropy"].shape == (2, 4)
    torch.testing.assert_close(found["entropy"], torch.full((2, 4), math.log(8) / 2))
    torch.testing.assert_close(found["effective_count"], torch.full((2, 4), 4.5))
    torch.testing.assert_close(found["largest"], torch.full((2, 4), (1 + 1 / 8) / 2))


@pytest.mark.parametrize("mode", ["deep", "shallow"])
def test_another_temperature_keeps_the_projections(parts, mode):
    block = FoveatedVLM.tiny(attention_mode=mode).query_attention
    same = at_temperature(block, 1.0, num_queries=1)
    seen = parts.encoder.keys_values(noise_frames(2, 3, 28))
    queries = torch.randn(2, 3, 1, block.query_dim)
    assert torch.equal(same(queries, seen, parts.encoder), block(queries, seen, parts.encoder))
    assert not torch.equal(at_temperature(block, 0.1, num_queries=1)(queries, seen, parts.encoder), block(queries, seen, parts.encoder))


def test_likeness_of_known_features():
    centre = torch.zeros(2, 3, 4)
    axes = torch.eye(4)[:3].expand(2, 3, 3, 4)
    found = likeness_of(axes, centre)
    assert found["raw"].shape == (2, 2) and found["raw"].abs().max() == 0 and torch.equal(found["raw"], found["centred"])
    assert torch.allclose(found["query_share"], torch.ones(2).double())
    moved = likeness_of(axes + 100, centre + 100)
    assert moved["raw"].min() > 0.99 and moved["centred"].abs().max() < 1e-9
    with pytest.raises(ShapeError, match="at least 2"):
        likeness_of(axes[:, :, :1], centre)


def test_noise_frames_are_pictures_and_repeat():
    frames = noise_frames(2, 2, 14, seed=3)
    assert frames.shape == (2, 2, 3, 14, 14) and 0 <= frames.min() and frames.max() <= 1 and torch.equal(frames, noise_frames(2, 2, 14, seed=3))


def test_sensitivity_hears_what_the_head_hears():
    h, previous = torch.randn(4, 2, 6, generator=generator(0, "h")), torch.randn(4, 2, 4, 3, 3, generator=generator(0, "p"))
    deaf = sensitivity(lambda h, previous: previous * 2, h, previous)
    assert all(deaf[f"{kind}_h"].abs().max() == 0 for kind in ("absolute", "relative", "exchanged"))
    torch.testing.assert_close(deaf["relative_previous"], torch.full((4,), 0.1), rtol=0.4, atol=0)
    torch.testing.assert_close(deaf["absolute_previous"], torch.full((4,), 0.2), rtol=0.4, atol=0)
    doubled = sensitivity(lambda h, previous: previous, h, previous * 2)
    torch.testing.assert_close(doubled["exchanged_previous"], deaf["exchanged_previous"])
    with pytest.raises(InputError, match="at least two"):
        sensitivity(lambda h, previous: previous, h[:1], previous[:1])
    with pytest.raises(ShapeError):
        sensitivity(lambda h, previous: previous, h, previous[:, :1])


def test_shares_and_ties():
    one = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0]])
    assert share_above_one(one, torch.full((2, 4), 2.0)).tolist() == [0.625, 0.0]
    with pytest.raises(ShapeError):
        share_above_one(one, one[:, :2])


def test_autocorrelation_of_known_series():
    swing = torch.tensor([[1.0, -1.0] * 50, [2.0] * 100])
    assert autocorrelation(swing, 1)[0] < -0.95 and autocorrelation(swing, 2)[0] > 0.95 and autocorrelation(swing, 1)[1] == 0
    assert torch.allclose(autocorrelation(swing[:1], 0), torch.ones(1).double())
    with pytest.raises(ConfigError):
        autocorrelation(swing, 99)


def test_same_clips_other_question(sides):
    for name in ("train", "test"):
        first, second = (side[name] for side in sides)
        assert first.names == second.names
        for i in range(len(first)):
            assert torch.equal(first[i]["values"], second[i]["values"]) and torch.equal(first[i]["cover"], second[i]["cover"]) and "caption" not in second[i]
    asked = [[clip.question for clip in side["test"].clips] for side in sides]
    assert all(a != b for a, b in zip(*asked))
    for clip in sides[0]["test"].clips:
        assert clip.question in clip.caption.lower()


def test_the_cued_shape_comes_first(sides, recipe, parts):
    clip = sides[0]["test"].clips[0]
    found = clip.read()
    cued = patch_cover(found["masks"][:, found["cue"]], parts.encoder.grid)
    assert torch.equal(sides[0]["test"][0]["cover"][:, 0], cued)


def test_bad_questions(recipe, parts, tmp_path, sides):
    with pytest.raises(ConfigError):
        cued_sides(recipe, parts, asked=3, dir=tmp_path)
    with pytest.raises(InputError, match="different clips"):
        gaze_by_question(build(recipe, parts), [sides[0]["test"], sides[1]["train"]])


def test_static_query_does_not_hear_the_question(sides, recipe, parts):
    table = gaze_by_question(build(recipe, parts), [side["test"] for side in sides])
    assert table["static_on_0"].shape == (len(sides[0]["test"]), recipe.frames)
    shown = gaze_by_question(build(recipe, parts), [sides[1]["test"], sides[1]["test"]])
    assert (table["static_on_0"] == shown["static_on_0"]).all()  # of either question


def test_taught_alone_moves_the_query_map_and_equals_the_whole_model(sides, recipe, parts):
    model = build(recipe, parts, seed=0)
    lesson = with_states(sides[0]["train"], model)
    net = TaughtGaze(model, 1.0, alone=True)
    batch = torch.utils.data.default_collate([lesson[i] for i in range(3)])
    terms = net.loss(net(batch), batch)
    whole = torch.utils.data.default_collate([sides[0]["train"][i] for i in range(3)])
    whole = {name: x for name, x in whole.items() if name != "caption"}
    torch.testing.assert_close(mass_on(gaze_of(model(whole, intermediates=True)["attention"], patches=whole["cover"].shape[-1]), whole["cover"][:, :, 0])[:, 1:].nanmean(), terms["on_object"])
    assert {name for name, p in net.named_parameters() if p.requires_grad} == {"model.llm_to_query.weight", "model.llm_to_query.bias"}
    assert torch.equal(terms["loss"], terms["gaze"])


def test_a_weight_of_zero_changes_no_loss(sides, recipe, parts):
    model = build(recipe, parts, seed=0).eval()
    batch = torch.utils.data.default_collate([sides[0]["train"][i] for i in range(3)])
    plain, taught = model.loss(model(batch), batch), TaughtGaze(model, 0.0)
    assert torch.equal(taught.loss(taught(batch), batch)["loss"], plain["loss"])


def test_records_are_written_once(sides, recipe, parts, tmp_path):
    run_gaze("untrained", replace(recipe, world_clips=10), parts, steps=0, root=tmp_path, dir=tmp_path / "clips")
    (record,) = read_records(tmp_path, STUDY)
    assert record.metrics["asked_0_on_0"] > 0 and record.config["taught"]["steps"] == 0 and len(record.metrics_by_clip["chance_of_0_frame_2"]) == 2
    clips = sides[0]["test"].view(range(len(sides[0]["test"])))
    clips.parts = (*clips.parts, "patches", "cls")
    runs = run_looks(recipe, parts, clips, seeds=(0,), root=tmp_path)
    assert len(runs) == 4 and run_looks(recipe, parts, clips, seeds=(0,), root=tmp_path) == []
    few = dict(pairs=2, steps=14, first=2, seeds=(0, 1), batches=5, batch_size=2, root=tmp_path)
    assert len(run_steps(recipe, parts, clips, **few)) == 2 and run_steps(recipe, parts, clips, **few) == []
    share = next(r for r in read_records(tmp_path, QUICK) if r.run == "steps--twins").metrics_by_clip["share"]
    assert len(share) == 2 and all(0 <= x <= 1 for x in share.values())


def test_rounded_leaves_out_what_is_not_a_number():
    assert rounded({"a": torch.tensor([1.234567, float("nan")])}, ["x", "y"]) == {"a": {"x": 1.2346}}
