"""Heads: scikit-learn's map and silhouettes, CKA's closed forms, the dead and the twins, one sentence a mistake."""
import copy

import numpy as np
import pytest
import torch

from fvlm.core import ConfigError, InputError, NonFiniteError, ShapeError, generator
from fvlm.instruments.head_tsne import ablation_effects, head_tsne, silhouettes_of, tsne_map
from fvlm.models.sc_vfp import SCVFP, SCVFPConfig


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed, "heads"))


def rotation(size, seed=0):
    return torch.linalg.qr(draws(size, size, seed=seed))[0]


def test_the_map_is_scikit_learns(monkeypatch):
    import sklearn.manifold

    points, asked = draws(40, 6).double().numpy(), []
    want = sklearn.manifold.TSNE(n_components=2, perplexity=9, init="pca", learning_rate="auto", random_state=4).fit_transform(points)
    heads = torch.from_numpy(points).reshape(5, 4, 2, 6).transpose(1, 2)  # (B,H,T,d): clip by clip, frame by frame, head by head
    assert np.array_equal(head_tsne(heads, perplexity=9, seed=4).points, want)

    class Asked(sklearn.manifold.TSNE):
        def fit_transform(self, x):
            asked.append((self.random_state, self.perplexity))
            return np.zeros((len(x), 2))

    monkeypatch.setattr(sklearn.manifold, "TSNE", Asked)  # from principal components the seed hardly shows in the map: look at what is asked for
    tsne_map(points, perplexity=7, seed=11)
    assert asked == [(11, 7)]


def test_points_and_colours_go_together():
    heads = torch.zeros(3, 4, 2, 1)
    heads += torch.arange(3.0)[:, None, None, None] * 100 + torch.arange(4.0)[None, :, None, None] * 10 + torch.arange(1.0, 3.0)[None, None, :, None]
    found = head_tsne(heads, labels=["a", "b", "c"], perplexity=3)
    names = np.array([100 * "abc".index(label) + 10 * head + frame for label, head, frame in zip(found.colours["label"], found.colours["head"], found.colours["frame"])])
    assert np.array_equal(found.samples[:, 0], names) and len(names) == 24


def test_silhouettes_are_scikit_learns():
    from sklearn.metrics import silhouette_score

    draw = np.random.default_rng(0)
    points, labels = draw.normal(size=(80, 5)), draw.integers(0, 4, size=(3, 80))
    points[:, 0] += 2 * labels[0]
    labels[2, :] = 0
    labels[2, 7] = 1  # one alone
    assert np.allclose(silhouettes_of(points, labels), [silhouette_score(points, each) for each in labels], atol=1e-9)


def tiny(arm="scmhsa"):
    model = SCVFP(SCVFPConfig.preset("tiny", attention=arm, num_heads=4), seed=0).eval()
    torch.nn.init.normal_(model.mlp[-1].weight, generator=generator(0, "last"))  # a fresh residual model predicts no change whatever its heads say
    batch = {"embeddings": draws(30, 5, 16)}
    with torch.no_grad():
        return model, batch, model(batch, intermediates=True)


@pytest.mark.parametrize("arm", ["scmhsa", "mhsa"])
def test_healthy_heads_raise_no_alarm(arm):
    model, batch, seen = tiny(arm)
    found = head_tsne(seen["heads"], attention=seen["attention"], effects=ablation_effects(model, batch))
    assert found.verdict().healthy and found.effect.shape == (2, 4) and found.effect.min() > 0 and found.cka.shape == (2, 4, 4)
    assert found.table()[5]["layer"] == 1 and found.table()[5]["head"] == 1


def test_ablation_is_what_zeroed_columns_do_and_leaves_no_trace():
    model, batch, seen = tiny()
    effects = ablation_effects(model.train(), batch)
    assert model.training and all(not block.attention.proj._forward_pre_hooks for block in model.encoder.blocks)
    broken, head = copy.deepcopy(model).eval(), 2
    with torch.no_grad():
        broken.encoder.blocks[1].attention.proj.weight.unflatten(1, (4, -1))[:, head] = 0
        whole, without = seen["prediction"].double(), broken(batch)["prediction"].double()
    assert effects[1, head] == pytest.approx(float((without - whole).square().mean().sqrt() / (whole - whole.mean(0)).square().mean().sqrt()), rel=1e-4)
    with pytest.raises(InputError, match="has 0 attention blocks"):
        ablation_effects(torch.nn.Linear(3, 3), batch)


def test_folded_attention_is_silenced_alike():
    model, batch, _ = tiny()
    folded = copy.deepcopy(model)
    for block in model.encoder.blocks:
        block.attention.qkv.bias.data.zero_()  # folding turns the values' bias into a constant, which silence leaves in place
    for block, other in zip(folded.encoder.blocks, model.encoder.blocks):
        block.attention = other.attention.fold()
    assert np.allclose(ablation_effects(folded, batch), ablation_effects(model, batch), rtol=1e-3)


@pytest.mark.parametrize("attention", ["scmhsa", "mhsa", "mhsa_chunked", "scmhsa_folded", "hybrid"])
def test_every_kind_of_attention_is_silenced_as_it_is_shown(attention):
    model = SCVFP(SCVFPConfig.preset("tiny", attention=attention, predict="embedding"), seed=0)
    batch = {"embeddings": draws(6, 5, 16)}
    with torch.no_grad():
        seen = model.eval()(batch, intermediates=True)
        effects = ablation_effects(model, batch)
        block = getattr(model.encoder.blocks[-1].attention, "concentrated", model.encoder.blocks[-1].attention)
        block.proj.weight.zero_()
    assert effects.shape == (len(seen["heads"]), seen["heads"][0].shape[1]) and effects.min() > 0
    assert head_tsne(seen["heads"], effects=effects, perplexity=5).effect.shape == effects.shape
    assert np.array_equal(ablation_effects(model, batch)[-1], np.zeros(effects.shape[1])), "the heads that are shown are not those that were silenced"


def test_a_constant_head_is_dead_however_long():
    heads = draws(20, 4, 5, 8)
    heads[:, 1] = 9.0
    found = head_tsne(heads)
    assert found.dead == [(0, 1)] and found.norm[0, 1] > found.norm[0, 0] and found.verdict().failures == ("dead heads",)
    assert "layer 0 head 1" in found.verdict()["dead heads"].sentence


def test_twins_need_the_same_places_and_the_same_words():
    heads, attention = draws(20, 3, 5, 8), (2 * draws(20, 3, 5, 5)).softmax(-1)
    heads[:, 2] = -3 * heads[:, 0] @ rotation(8)
    assert head_tsne(heads, attention=attention).twins == [], "they look elsewhere"
    attention[:, 2] = attention[:, 0]
    found = head_tsne(heads, attention=attention)
    assert found.twins == [(0, 0, 2)] and found.verdict().failures == ("twin heads",) and found.divergence[0, 0, 2] == 0
    assert head_tsne(heads).twins == [(0, 0, 2)], "without attention, by words alone"


def test_islands_of_an_untrained_model_are_named():
    heads = draws(40, 4, 3, 6) + 4 * draws(1, 4, 1, 6, seed=1)
    found = head_tsne(heads, untrained=heads * 2)
    silhouette = found.silhouettes["head"]
    assert silhouette.value > 0.3 > 0.05 > silhouette.permuted and silhouette.untrained == pytest.approx(silhouette.value)
    assert "an untrained model" in str(found.verdict()) and found.silhouettes["frame"].value < 0.05


def test_points_are_bounded_and_seeded():
    heads = draws(200, 4, 5, 3)
    found, again, other = (head_tsne(heads, most=100, perplexity=5, seed=seed) for seed in (0, 0, 1))
    assert len(found.samples) == 100 and np.array_equal(found.samples, again.samples) and not np.array_equal(found.samples, other.samples)
    assert "points" not in vars(found), "the map is made when it is drawn"
    assert len(found.panels()) == 3 and found.picture().width > 400 and len(found.figure().data) == 4 + 5 + 1


def test_one_head_has_no_pairs():
    found = head_tsne(draws(20, 1, 3, 4), perplexity=5)
    assert found.verdict().healthy and list(found.silhouettes) == ["frame"] and "CKA" not in found.table()[0]


GOOD = draws(4, 2, 5, 3)


@pytest.mark.parametrize("wrong, error, words", [
    (dict(heads=GOOD[0]), ShapeError, "expected 4 axes"), (dict(heads=GOOD / 0), NonFiniteError, "NaN or Inf"), (dict(heads=[]), InputError, "no layer"), (dict(heads=GOOD.long()), ShapeError, "floating-point"),
    (dict(heads=[GOOD, GOOD[:, :1]]), ShapeError, "axis H"), (dict(attention=torch.rand(4, 2, 5, 5)), InputError, "sum to 1"), (dict(attention=torch.full((4, 3, 5, 5), 0.2)), ShapeError, "that go with heads"),
    (dict(perplexity=40), InputError, "less than the number of points"), (dict(labels=["a"]), ShapeError, "expected 4, one a clip"), (dict(effects=np.ones((2, 2))), ShapeError, r"expected \(1, 2\)"),
    (dict(layer=1), ConfigError, "layer"), (dict(untrained=GOOD[:2]), ShapeError, "untrained"),
])
def test_bad_input(wrong, error, words):
    with pytest.raises(error, match=words) as caught:
        head_tsne(**{"heads": GOOD, "perplexity": 5, **wrong})
    assert "\n" not in str(caught.value)
