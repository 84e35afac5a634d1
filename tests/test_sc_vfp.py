"""Contracts of SC-VFP: arms, parameter counts, paths, leaks, seeds, saving, bad input."""
import copy
import dataclasses
import json

import pytest
import torch
from torch import nn

from fvlm.blocks.encoder_block import ATTENTION_ARMS, attention_arm
from fvlm.core import ConfigError, InputError, NonFiniteError, ShapeError, derive_seed
from fvlm.models.baselines import RidgeRegression
from fvlm.models.sc_vfp import PRESETS, SCVFP, SCVFPConfig, start_from_ridge

ARMS = list(ATTENTION_ARMS)


def model_of(seed=0, **changes):
    return SCVFP(SCVFPConfig.preset("tiny", **changes), seed=seed)


def batch_of(n=6, M=5, D=16, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return {"embeddings": torch.randn(n, M, D, generator=draw), "target": torch.randn(n, D, generator=draw)}


class Blind(nn.Module):
    "An attention block that shows nothing."

    def __init__(self, width=32):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return self.linear(x.mean(1, keepdim=True)).expand_as(x)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("name", ARMS)
def test_every_arm_has_the_contract_and_equal_paths(name, norm):
    model, batch = model_of(attention=name, norm=norm, predict="embedding", depth=3).eval(), batch_of()
    quick, seen = model(batch), model(batch, intermediates=True)
    torch.testing.assert_close(quick["prediction"], seen["prediction"], atol=1e-5, rtol=1e-5)
    assert set(quick) == {"prediction", "hidden"} and set(seen) == {"prediction", "hidden", "attention", "heads"}
    assert quick["prediction"].shape == (6, 16) and [x.shape for x in quick["hidden"]] == [(6, 5, 32)] * 3
    assert [a.shape for a in seen["attention"]] == [(6, 2, 5, 5)] * 3
    assert all(h.shape[:3] == (6, 2, 5) for h in seen["heads"]) and len(seen["heads"]) == 3
    torch.testing.assert_close(seen["attention"][0].sum(-1), torch.ones(6, 2, 5))


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_learns_and_every_parameter_gets_a_gradient(name):
    model, batch = model_of(attention=name, predict="embedding", norm="post", similarity_weight=0.1), batch_of()
    model.loss(model(batch), batch)["loss"].backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or (not p.grad.any() and "qkv.bias" not in n)]
    assert not without
    first = float(model.loss(model(batch), batch)["loss"].detach())
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(15):
        optimizer.zero_grad()
        model.loss(model(batch), batch)["loss"].backward()
        optimizer.step()
    assert float(model.loss(model(batch), batch)["loss"].detach()) < 0.5 * first


def closed_form(c: SCVFPConfig) -> int:
    "Parameters counted on paper."
    d, w = c.embed_dim, c.encoder_width
    inner = {"mhsa": w, "scmhsa": c.num_heads * (c.head_dim or w)}
    linear = lambda a, b: (a + 1) * b
    if c.attention == "mhsa_chunked":
        attention = 3 * w * w // c.num_heads + 3 * w + linear(w, w)
    elif c.attention == "scmhsa_folded":
        attention = linear(w, c.num_heads * w) + linear(c.num_heads * w, w)
    elif c.attention == "hybrid":
        attention = 1 + sum(linear(w, 3 * n) + linear(n, w) for n in inner.values())
    else:
        attention = linear(w, 3 * inner[c.attention]) + linear(inner[c.attention], w)
    block = attention + linear(w, c.ffn_dim) + linear(c.ffn_dim, w) + 4 * w
    sizes = (w, *c.mlp_dims, d)
    return (0 if w == d else linear(d, w)) + c.depth * block + 2 * w + sum(linear(a, b) for a, b in zip(sizes, sizes[1:]))


@pytest.mark.parametrize("name", ARMS)
@pytest.mark.parametrize("preset", list(PRESETS))
def test_parameter_counts(preset, name):
    config = SCVFPConfig.preset(preset, attention=name, **({"head_dim": None} if name == "scmhsa_folded" else {}))
    with torch.device("meta"):
        assert SCVFP(config).num_parameters == closed_form(config)


def test_published_budget_to_three_decimals_and_full_width_as_computed():
    with torch.device("meta"):
        count = lambda preset, **changes: SCVFP(SCVFPConfig.preset(preset, **changes)).num_parameters / 1e6
        assert round(count("paper_budget"), 3) == 42.665 and round(count("paper_budget", attention="mhsa"), 3) == 31.447
        assert round(count("paper", mlp_dims=()), 1) == 132.9 and round(count("paper", mlp_dims=(), attention="mhsa"), 1) == 33.7


@pytest.mark.parametrize("changes", [{}, {"linear_skip": True}, {"norm": "post", "mlp_dims": (8,), "dropout": 0.5, "input_noise": 1.0}])
def test_an_untrained_residual_model_is_copy_last_in_training_too(changes):
    batch = batch_of()
    assert torch.equal(model_of(**changes).train()(batch)["prediction"], batch["embeddings"][:, -1])


def test_the_target_is_not_looked_at():
    model, batch = model_of(predict="embedding").eval(), batch_of()
    assert torch.equal(model(batch)["prediction"], model({"embeddings": batch["embeddings"]})["prediction"])


@pytest.mark.parametrize("name", ARMS)
def test_causal_tokens_see_no_future(name):
    model, batch = model_of(attention=name, causal=True).eval(), batch_of()
    changed = {"embeddings": batch["embeddings"].clone()}
    changed["embeddings"][:, -1] += 3
    for a, b in zip(model(batch)["hidden"], model(changed)["hidden"]):
        assert torch.equal(a[:, :-1], b[:, :-1]) and not torch.equal(a[:, -1], b[:, -1])


def test_order_matters():
    model, batch = model_of(predict="embedding").eval(), batch_of()
    swapped = batch["embeddings"][:, [1, 0, 2, 3, 4]]
    assert (model(batch)["prediction"] - model({"embeddings": swapped})["prediction"]).abs().max() > 1e-4


def test_gates_are_those_of_the_hybrid_arm():
    assert model_of(attention="hybrid").gates == [0.5, 0.5] and model_of().gates == []


def test_seed_decides_the_parameters_and_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = model_of(seed=1).state_dict()
    torch.rand(3)
    two, other = model_of(seed=1).state_dict(), model_of(seed=2).state_dict()
    torch.set_rng_state(before)
    model_of(seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not torch.equal(one["encoder.embed.weight"], other["encoder.embed.weight"])


@pytest.mark.parametrize("name", ARMS)
def test_draws_keep_their_order(name):
    "Projection, then block by block attention, feed-forward, and the MLP last: with another order an old seed would be another model."
    model = model_of(attention=name, seed=3, predict="embedding", mlp_dims=(8,))
    config = model.config
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(3, "initial parameters"))
        embed, expected = nn.Linear(16, 32), []
        for _ in range(config.depth):
            attention = attention_arm(name, 32, config.num_heads, config.head_dim)
            expected.append((attention.state_dict(), nn.Linear(32, config.ffn_dim).weight, nn.Linear(config.ffn_dim, 32).weight))
        mlp = nn.Linear(32, 8), nn.Linear(8, 16)
    assert torch.equal(model.encoder.embed.weight, embed.weight)
    for block, (attention, expand, contract) in zip(model.encoder.blocks, expected):
        assert all(torch.equal(value, block.attention.state_dict()[key]) for key, value in attention.items())
        assert torch.equal(block.expand.weight, expand) and torch.equal(block.contract.weight, contract)
    assert all(torch.equal(ours.weight, theirs.weight) for ours, theirs in zip(model.mlp, mlp))


def test_a_seeded_training_pass_repeats_and_evaluation_draws_nothing():
    model, batch = model_of(dropout=0.3, embedding_dropout=0.2, head_dropout=0.2, input_noise=0.1, predict="embedding", mlp_dims=(8,), mlp_dropout=0.2), batch_of()
    found = []
    for _ in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            found.append(model.train()(batch)["prediction"])
    assert torch.equal(*found) and not torch.equal(found[0], model.train()(batch)["prediction"])
    before = torch.get_rng_state()
    model.eval()(batch)
    assert torch.equal(before, torch.get_rng_state())


def test_loss_is_the_weighted_sum_of_its_terms():
    batch = batch_of()
    plain, weighted = model_of(predict="embedding"), model_of(predict="embedding", similarity_weight=0.7)
    terms = plain.loss(plain(batch), batch)
    assert set(terms) == {"loss", "mse"} and terms["loss"] == terms["mse"]
    torch.testing.assert_close(terms["mse"], (plain(batch)["prediction"] - batch["target"]).square().mean())
    terms = weighted.loss(weighted(batch), batch)
    assert set(terms) == {"loss", "mse", "similarity"}
    torch.testing.assert_close(terms["loss"], terms["mse"] + 0.7 * terms["similarity"])
    assert weighted.eval()(batch)["heads"], "the validation loss is the same formula"


def test_bf16_autocast_stays_near_and_returns_the_type_of_the_embeddings():
    batch = batch_of()
    for name in ARMS:
        model = model_of(attention=name, predict="embedding", similarity_weight=0.1)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(batch)
            loss = model.loss(outputs, batch)["loss"]
        loss.backward()
        assert outputs["prediction"].dtype == torch.float32
        assert (outputs["prediction"] - model(batch)["prediction"]).abs().max() < 0.05


def test_rollout_feeds_predictions_back():
    model, batch = model_of(predict="embedding").eval(), batch_of()
    ahead = model.rollout(batch, 3)
    first = model(batch)["prediction"]
    second = model({"embeddings": torch.cat([batch["embeddings"][:, 1:], first[:, None]], 1)})["prediction"]
    assert ahead.shape == (6, 3, 16) and torch.equal(ahead[:, 0], first) and torch.equal(ahead[:, 1], second)


def test_start_from_ridge_is_ridge():
    batch = batch_of(100)
    for predict in ("residual", "embedding"):
        ridge = RidgeRegression(5.0, predict=predict).fit(batch["embeddings"], batch["target"])
        model = start_from_ridge(model_of(linear_skip=True, predict=predict), ridge).eval()
        if predict == "residual":
            torch.testing.assert_close(model(batch)["prediction"], ridge(batch)["prediction"], atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="no linear skip"):
        start_from_ridge(model_of(), ridge)
    for wrong in (RidgeRegression(), RidgeRegression().fit(batch["embeddings"], batch["target"]), RidgeRegression(predict="embedding").fit(batch["embeddings"][:, :3], batch["target"])):
        with pytest.raises(ConfigError, match="ridge: got"):
            start_from_ridge(model_of(linear_skip=True, predict="embedding"), wrong)


# --- a block of one's own ----------------------------------------------------------------------------------------------

def test_own_attention_runs_trains_and_comes_back(tmp_path):
    calls = []
    own = SCVFP(SCVFPConfig.preset("tiny"), attention=lambda index: calls.append(index) or Blind(), seed=3)
    batch = batch_of()
    own.loss(own(batch), batch)["loss"].backward()
    assert calls == [0, 1] and own.config.attention == "custom"
    own.save_pretrained(tmp_path / "own")
    with pytest.raises(ConfigError, match="custom"):
        SCVFP.from_pretrained(tmp_path / "own")
    again = SCVFP.from_pretrained(tmp_path / "own", attention=lambda index: Blind())
    assert torch.equal(again(batch)["prediction"], own.eval()(batch)["prediction"])


def test_own_attention_is_drawn_from_the_models_seed():
    one, two = (SCVFP(SCVFPConfig.preset("tiny"), attention=lambda index: Blind(), seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_own_attention_mistakes():
    own = SCVFP(SCVFPConfig.preset("tiny"), attention=lambda index: Blind())
    with pytest.raises(InputError, match="Blind has no with_intermediates"):
        own(batch_of(), intermediates=True)
    with pytest.raises(ConfigError, match="similarity_weight"):
        SCVFP(SCVFPConfig.preset("tiny", similarity_weight=0.1), attention=lambda index: Blind())
    with pytest.raises(ShapeError, match="returned shape"):
        SCVFP(SCVFPConfig.preset("tiny"), attention=lambda index: nn.Linear(32, 31))(batch_of())


# --- saving ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", [{"attention": name} for name in ARMS] + [{"mlp_dims": (8, 4), "linear_skip": True, "similarity_weight": 0.5}])
def test_saved_and_read_back_is_the_same_model(tmp_path, changes):
    model, batch = model_of(predict="embedding", **changes), batch_of()
    model.save_pretrained(tmp_path / "m")
    again = SCVFP.from_pretrained(str(tmp_path / "m"))
    assert again.config == model.config and not again.training
    assert torch.equal(again(batch)["prediction"], model.eval()(batch)["prediction"])
    assert {path.suffix for path in (tmp_path / "m").iterdir()} == {".json", ".safetensors", ".md"}


def test_copies_are_independent_and_equal():
    model, batch = model_of(predict="embedding").eval(), batch_of()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(batch)["prediction"], model(batch)["prediction"]) and twin.config == model.config
    nn.init.zeros_(twin.mlp[-1].weight)
    assert not torch.equal(twin(batch)["prediction"], model(batch)["prediction"])


# --- configuration and bad input ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", [
    dict(embed_dim=0), dict(embed_dim=2.5), dict(embed_dim="16"), dict(context_frames=0), dict(width=0), dict(depth=-1), dict(num_heads=0),
    dict(attention="sc-mhsa"), dict(head_dim=0), dict(causal="yes"), dict(ffn_dim=0), dict(mlp_dims=8), dict(mlp_dims=(0,)), dict(mlp_dims=("8",)),
    dict(activation="tanh"), dict(norm="none"), dict(dropout=1.0), dict(dropout=-0.1), dict(head_dropout=2), dict(embedding_dropout=float("nan")),
    dict(mlp_dropout=True), dict(input_noise=-1), dict(predict="pixel"), dict(linear_skip=None), dict(similarity_weight=-1), dict(similarity_kind="sin"),
    dict(attention="mhsa", num_heads=3), dict(attention="hybrid", num_heads=5), dict(attention="scmhsa_folded", head_dim=4),
    dict(similarity_weight=0.1, num_heads=1), dict(similarity_weight=0.1, depth=0), dict(dropuot=0.1),
])
def test_every_field_is_checked(changes):
    name = list(changes)[0]
    with pytest.raises(ConfigError) as caught:
        SCVFPConfig.preset("tiny", **changes)
    assert any(key in str(caught.value) for key in (*changes, "config field")), (name, str(caught.value))


def test_config_is_frozen_plain_and_round():
    config = SCVFPConfig.preset("paper_budget", mlp_dims=[8, 4])
    assert SCVFPConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config and config.mlp_dims == (8, 4)
    assert hash(config) == hash(dataclasses.replace(config))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.depth = 3
    with pytest.raises(ConfigError, match="did you mean 'paper'"):
        SCVFPConfig.preset("papre")
    with pytest.raises(ConfigError, match="custom"):
        model_of(attention="custom")
    with pytest.raises(ConfigError, match="'custom'"):
        SCVFPConfig.preset("tiny", attention="own")


@pytest.mark.parametrize("batch, error, words", [
    ({}, InputError, "expected a dict"),
    (torch.zeros(2, 5, 16), InputError, "expected a dict"),
    ({"embeddings": torch.zeros(5, 16)}, ShapeError, "3 axes"),
    ({"embeddings": torch.zeros(2, 4, 16)}, ShapeError, "axis M should be 5"),
    ({"embeddings": torch.zeros(2, 5, 17)}, ShapeError, "axis D should be 16"),
    ({"embeddings": torch.full((2, 5, 16), float("inf"))}, NonFiniteError, "embeddings"),
    ({"embeddings": [[0.0]]}, ShapeError, "expected a tensor"),
])
def test_bad_batches(batch, error, words):
    with pytest.raises(error, match=words):
        model_of()(batch)


def test_bad_targets_and_steps():
    model, batch = model_of(), batch_of()
    outputs = model(batch)
    for target, error in ((None, InputError), (torch.zeros(6, 15), ShapeError), (torch.full((6, 16), float("nan")), NonFiniteError)):
        with pytest.raises(error, match="target"):
            model.loss(outputs, {"embeddings": batch["embeddings"]} if target is None else {**batch, "target": target})
    with pytest.raises(ConfigError, match="steps"):
        model.rollout(batch, 0)


def test_smallest_models():
    for changes in (dict(depth=0), dict(context_frames=1), dict(embed_dim=1, width=1, num_heads=1), dict(embed_dim=32), dict(num_heads=1, head_dim=3)):
        model = model_of(**{"predict": "embedding", **changes})
        found = model(batch_of(M=model.config.context_frames, D=model.config.embed_dim))
        assert found["prediction"].shape == (6, model.config.embed_dim)
    assert SCVFP.tiny(seed=2).config == SCVFPConfig.preset("tiny")
