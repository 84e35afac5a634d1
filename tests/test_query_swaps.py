"""Looks swapped in a trained or untrained model: what is exchanged, what cannot change, and that the model is left as it was."""
import numpy as np
import pytest
import torch
from tests.random_clips import RandomClips

from fvlm.core import ConfigError, InputError, ShapeError, generator
from fvlm.evidence.query_swaps import (
    QUERY_LOOKS, SWAPS, attention_replaced, deranged, foveation_value, looks_of, mask_weights, own_queries, swap_errors, swap_table, swapped_queries,
)
from fvlm.models.foveated_vlm import FoveatedVLM


@pytest.fixture(scope="module")
def clips():
    return RandomClips(5, 5)


@pytest.mark.parametrize("changes", [{}, {"num_queries": 3}, {"attention_mode": "shallow"}, {"include_cls": False}, {"target": "delta"}, {"query_skip": True}], ids=str)
def test_every_look_runs_and_reaches_only_what_it_can(clips, changes):
    model = FoveatedVLM.tiny(**changes)
    kinds = [kind for kind in QUERY_LOOKS] + ([] if changes.get("include_cls") is False else ["cls"])
    found = swap_errors(model, clips, kinds=kinds, batch_size=2)
    for kind, errors in found.items():
        assert errors.shape == (5, 5) and np.isfinite(errors).all()
        assert np.allclose(errors[:, 0], found["own"][:, 0], rtol=1e-5), "frame 1 is predicted from nothing"
        if kind in ("time_shuffled", "other_clip"):
            assert np.allclose(errors[:, 1], found["own"][:, 1], rtol=1e-5), "frame 2 was looked at with the query of every clip"
        if kind != "own":
            assert not np.allclose(errors[:, 2:], found["own"][:, 2:], rtol=1e-6), kind


def test_own_is_the_models_own_error_and_nothing_stays_changed(clips):
    model = FoveatedVLM.tiny()
    with torch.no_grad():
        batch = clips.batch(torch.arange(5))
        direct = model.errors(model.eval()(batch), batch)["fine"].numpy()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = swap_errors(model.train(), clips, kinds=tuple(SWAPS), masks=torch.ones(5, 5, 28, 28, dtype=torch.bool), batch_size=5)
    assert np.allclose(found["own"], direct, rtol=1e-5)
    assert model.training and "weigh" not in vars(model.query_attention)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert np.array_equal(swap_errors(model, clips, kinds=["random"])["random"], swap_errors(model, clips, kinds=["random"])["random"])


def test_static_looks_give_the_features_of_the_coarse_pass(clips):
    for changes in ({}, {"num_queries": 3}):
        model, batch = FoveatedVLM.tiny(**changes).eval(), clips.batch(torch.arange(5))
        with torch.no_grad():
            looks = looks_of("static", own_queries(model, clips), model)
            outputs = model({**batch, **looks}, passes="both")
        assert torch.equal(outputs["features"], outputs["features_coarse"])


def test_the_replaced_attention_is_the_attention_used(clips):
    model, batch = FoveatedVLM.tiny().eval(), clips.batch(torch.arange(5))
    weights = torch.rand(5, 5, 16)
    weights /= weights.sum(-1, keepdim=True)
    seen = {}
    with torch.no_grad():
        for kind in ("uniform", "cls", "oracle"):
            with attention_replaced(model.query_attention, kind, weights):
                seen[kind] = model(batch, intermediates=True)["attention"]
    for layer in range(model.encoder.depth):
        assert torch.allclose(seen["uniform"][layer], torch.tensor(1 / 17))
        assert (seen["cls"][layer][..., 0] == 1).all() and (seen["cls"][layer][..., 1:] == 0).all()
        assert (seen["oracle"][layer][..., 0] == 0).all() and torch.allclose(seen["oracle"][layer][..., 1:], weights[:, :, None, None].expand(-1, -1, 2, 1, -1))


def test_uniform_is_the_mean_pool_of_an_infinite_temperature(clips):
    batch, cold, hot = clips.batch(torch.arange(5)), FoveatedVLM.tiny().eval(), FoveatedVLM.tiny(temperature=1e9).eval()
    with torch.no_grad():
        given = {**batch, "queries": cold(batch)["queries"]}
        with attention_replaced(cold.query_attention, "uniform"):
            uniform = cold(given, passes="fine")["features"]
        assert torch.allclose(uniform, hot(given, passes="fine")["features"], atol=1e-5)


def test_contexts_do_not_nest_and_leave_on_errors(clips):
    attention = FoveatedVLM.tiny().query_attention
    with pytest.raises(InputError, match="do not nest"), attention_replaced(attention, "uniform"), attention_replaced(attention, "cls"):
        pass
    assert "weigh" not in vars(attention)
    with pytest.raises(ConfigError, match="kind"), attention_replaced(attention, "own"):
        pass


@pytest.mark.parametrize("size", [2, 3, 7, 64])
def test_nothing_keeps_its_place(size):
    for seed in range(20):
        order = deranged(size, generator(seed, "order"))
        assert (order != torch.arange(size)).all() and order.sort().values.tolist() == list(range(size))


def test_bad_input(clips):
    model = FoveatedVLM.tiny()
    with pytest.raises(ConfigError, match="kinds: got 'shuffled'"):
        swap_errors(model, clips, kinds=["shuffled"])
    with pytest.raises(InputError, match="oracle.*masks"):
        swap_errors(model, clips, kinds=["oracle"])
    with pytest.raises(ShapeError, match="masks"):
        swap_errors(model, clips, kinds=["oracle"], masks=torch.ones(2, 5, 28, 28, dtype=torch.bool))
    with pytest.raises(InputError, match="class token"):
        swap_errors(FoveatedVLM.tiny(include_cls=False), clips, kinds=["cls"])
    with pytest.raises(InputError, match="at least 2"):
        swapped_queries("other_clip", torch.randn(1, 4, 1, 8))
    with pytest.raises(InputError, match="at least 3"):
        swapped_queries("time_shuffled", torch.randn(3, 2, 1, 8))
    with pytest.raises(ShapeError, match="static"):
        swapped_queries("static", torch.randn(3, 4, 1, 8), static=torch.randn(2, 8))
    with pytest.raises(ShapeError, match="cannot be cut"):
        mask_weights(torch.ones(1, 1, 9, 9, dtype=torch.bool), (4, 4))
    with pytest.raises(InputError, match="no 'own'"):
        foveation_value({"static": np.ones((2, 3, 4))}, "static")
    with pytest.raises(ShapeError, match="at least 5 frames"):
        foveation_value({"own": np.ones((2, 3, 4)), "static": np.ones((2, 3, 4))}, "static", first_frame=5)


def test_the_value_has_its_sign_and_its_frames():
    draw = np.random.default_rng(0)
    own = 1 + 0.1 * draw.random((3, 20, 5))
    errors = {"own": own, "static": own + [5, 5, 0.2, 0.2, 0.2] + 0.01 * draw.standard_normal(own.shape), "random": own - 0.1 + 0.01 * draw.standard_normal(own.shape)}
    value = foveation_value(errors, "static")
    assert abs(value.interval.estimate - 0.2) < 0.01 and abs(value.share - 0.2 / own[..., 2:].mean()) < 0.01, "frames 1 and 2 stay out"
    assert value.per_frame[0] > 4 and foveation_value(errors, "random").interval.high < 0
    table = swap_table(errors)
    assert table.count("\n") == 4 and "| static | 1.2" in table and "differs" in table
