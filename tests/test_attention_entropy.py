"""How wide a model looks: closed forms, the ends, causal maps, nulls, one sentence a mistake."""
import math

import numpy as np
import pytest
import torch

from fvlm.core import ConfigError, InputError, NonFiniteError, ShapeError, generator
from fvlm.instruments.attention_entropy import attention_entropy, attention_rows, different_looks, temperature_table
from fvlm.objectives.attention_statistics import effective_count, entropy, jensen_shannon
from tests.planted_failures import PlantedLooker, planted_world


def maps(*shape, seed=0, sharp=2.0):
    return (sharp * torch.randn(*shape, generator=generator(seed, "maps"))).softmax(-1)


@pytest.mark.parametrize("places", [2, 5, 324])
def test_uniform_is_log_n_and_one_hot_is_zero(places):
    uniform = attention_entropy(torch.full((2, 3, 4, 1, places), 1 / places))
    one_hot = attention_entropy(torch.nn.functional.one_hot(torch.zeros(2, 3, 4, 1, dtype=torch.long), places).float())
    assert np.allclose(uniform.entropy, 1, atol=1e-6) and np.allclose(uniform.effective, 1, atol=1e-5)
    assert np.abs(one_hot.entropy).max() == 0 and np.allclose(one_hot.effective, 1 / places) and np.allclose(one_hot.top, 1)
    assert uniform.verdict().failures == ("uniform attention",) and one_hot.verdict().healthy
    assert uniform.verdict()["uniform attention"].value == pytest.approx(1, abs=1e-5)


def test_by_layer_head_and_frame():
    layers = [maps(3, 4, 2, 5, 9, seed=i) for i in range(3)]
    found = attention_entropy(layers, prefix=2, top_k=3)
    assert found.entropy.shape == (3, 2, 4)
    assert found.entropy[1, 0, 2] == pytest.approx(float(entropy(layers[1][:, 2, 0]).mean()) / math.log(9), abs=1e-6)
    assert found.effective[2, 1, 3] == pytest.approx(float(effective_count(layers[2][:, 3, 1]).mean()) / 9, abs=1e-6)
    assert found.top[0, 1, 0] == pytest.approx(float(layers[0][:, 0, 1].topk(3).values.sum(-1).mean()), abs=1e-6)
    assert found.prefix_mass[0, 0, 0] == pytest.approx(float(layers[0][:, 0, 0, :, :2].sum(-1).mean()), abs=1e-6)
    rows = found.table()
    assert len(rows) == 6 and rows[5]["layer"] == 2 and rows[5]["head"] == 1 and rows[5]["H / ln N"] == pytest.approx(found.entropy[2, 1].mean())


def test_over_time_a_row_is_a_frame():
    attention = maps(6, 3, 5, 5)
    found = attention_entropy(attention)
    assert found.entropy.shape == (1, 3, 5)
    assert found.entropy[0, 2, 4] == pytest.approx(float(entropy(attention[:, 2, 4]).mean()) / math.log(5), abs=1e-6)


def test_a_causal_map_is_judged_by_the_places_it_has():
    lower = torch.tril(torch.ones(5, 5))
    averaging = (lower / lower.sum(-1, keepdim=True)).expand(2, 3, 5, 5)
    found = attention_entropy(averaging, causal=True)
    assert np.isnan(found.entropy[..., 0]).all() and np.allclose(found.entropy[..., 1:], 1, atol=1e-6) and found.verdict().failures == ("uniform attention",)
    assert attention_entropy(averaging).verdict().healthy
    assert found.picture().width > 200 and len(found.figure().data) == 3
    with pytest.raises(InputError, match="looks into its future with weight"):
        attention_entropy(maps(2, 3, 5, 5), causal=True)
    with pytest.raises(ShapeError, match="expected attention over time"):
        attention_entropy(maps(2, 5, 3, 1, 9), causal=True)


def test_nulls_and_coarse_pass():
    own, coarse, exchanged, fresh = (maps(4, 3, 2, 1, 8, seed=i, sharp=3 - i / 2) for i in range(4))
    found = attention_entropy(own, coarse=coarse, shuffled=exchanged, untrained=fresh)
    assert found.divergence[0, 1, 2] == pytest.approx(float(jensen_shannon(own[:, 2, 1], coarse[:, 2, 1]).mean()), abs=1e-6)
    assert found.moved.mean() == pytest.approx(float(jensen_shannon(own, exchanged).mean()), abs=1e-6)
    assert found.untrained.mean() > found.coarse.mean() > found.entropy.mean()
    assert len(found.panels()) == 3 and {"coarse to fine, nats", "queries exchanged, nats", "untrained H / ln N"} <= set(found.table()[0])
    assert np.allclose(attention_entropy(own, coarse=own).divergence, 0, atol=1e-6)
    with pytest.raises(ShapeError, match="untrained: got 2 layers"):
        attention_entropy(own, untrained=[fresh, fresh])


def test_half_precision_is_good_enough():
    attention = maps(2, 3, 4, 1, 64)
    assert np.allclose(attention_entropy(attention.half()).entropy, attention_entropy(attention).entropy, atol=2e-3)


@pytest.mark.parametrize("attention, error, words", [
    (torch.rand(2, 3, 4, 1, 9), InputError, "sum to 1"), (torch.full((2, 4, 5, 5), float("nan")), NonFiniteError, "NaN"), (maps(4, 9), ShapeError, "over time"), (maps(2, 4, 5, 6), ShapeError, "over time"),
    ([], InputError, "no layer"), ([maps(2, 3, 4, 1, 9), maps(2, 3, 4, 1, 8)], InputError, "expected one shape"), (torch.ones(2, 3, 4, 1, 1), ShapeError, "nothing to choose"), ("attention", ShapeError, "got str"),
])
def test_bad_input(attention, error, words):
    with pytest.raises(error, match=words) as caught:
        attention_entropy(attention if not isinstance(attention, str) else [attention])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", [dict(prefix=9), dict(prefix=-1), dict(top_k=10), dict(top_k=0)])
def test_options_out_of_range(wrong):
    with pytest.raises(ConfigError):
        attention_entropy(maps(2, 3, 4, 1, 9), **wrong)


def test_temperature_is_exact_without_the_scores():
    scores = torch.randn(50, 40, generator=generator(0, "scores"))
    rows = temperature_table(scores.softmax(-1), (0.1, 0.5, 1.0, 3.0))
    for row in rows:
        assert row["entropy"] == pytest.approx(float(entropy((scores / row["temperature"]).softmax(-1)).mean()), abs=2e-4)
    assert [row["entropy"] for row in rows] == sorted(row["entropy"] for row in rows)
    ends = temperature_table(torch.tensor([[0.5, 0.3, 0.2, 0.0]]), (0, math.inf))
    assert ends[0]["largest"] == 1 and ends[1]["effective count"] == pytest.approx(3), "a weight of nothing stays nothing at any temperature"
    with pytest.raises(ConfigError, match="temperatures"):
        temperature_table(scores.softmax(-1), (-1.0,))


def test_different_looks_are_those_of_the_query_swaps():
    batch = planted_world(0, 6)
    model = PlantedLooker(batch).train()
    looks = different_looks(model, batch)
    assert model.training and list(looks) == ["own", "static", "other_clip", "random"]
    assert torch.equal(looks["static"]["queries"], model.q_static.expand(6, 5, 1, -1)) and "features_coarse" in looks["own"]
    assert not torch.equal(looks["other_clip"]["features"][:, 1:], looks["own"]["features"][:, 1:]) and not looks["own"]["features"].requires_grad
    assert torch.equal(looks["static"]["features"], looks["own"]["features_coarse"])
    with pytest.raises(ConfigError, match="kinds"):
        different_looks(model, batch, ["own", "uniform"])


def test_rows_keep_gradients_out():
    attention = maps(2, 3, 4, 1, 9).requires_grad_()
    assert not attention_rows(attention)[0].requires_grad
