"""The tracer: gains against closed forms, dead links named over ten seeds, no false alarm, nothing left behind in the model, bad input."""
import math

import pytest
import torch
from torch import nn

from fvlm.core import ConfigError, InputError, NonFiniteError
from fvlm.instruments.bottleneck_tracer import BottleneckTrace, Chain, Stage, sc_vfp_chain, trace_bottleneck
from fvlm.models.sc_vfp import SCVFP, SCVFPConfig
from fvlm.recipes.example_models import example_clips, example_model
from fvlm.recipes.planted_foveation import planted_model


@pytest.fixture(scope="module")
def batches():
    "Held-out clips of both examples."
    search, digits = example_clips("fvlm", num_clips=24), example_clips("sc_vfp", num_clips=16)
    return {"fvlm": search.inputs.batch(torch.arange(24)), "sc_vfp": digits.inputs.batch(torch.arange(0, len(digits.inputs), 10)), "encoder": search.encoder}


class Linear3(nn.Module):
    "y = a x + c side, z = b y: gains are known."

    def __init__(self, a, b, c=0.0):
        super().__init__()
        self.a, self.b, self.c = a, b, c
        self.second = nn.Identity()

    def forward(self, batch):
        y = self.a * batch["x"] + self.c * batch["side"]
        return {"x": batch["x"], "y": y, "z": self.b * self.second(y)}


def chain_of(model, batch):
    from contextlib import nullcontext

    from fvlm.instruments.bottleneck_tracer import replaced_input

    return Chain(batch=batch, run=model, stages=(
        Stage(name="x", read=lambda o: [o["x"]], put=lambda t: nullcontext({"x": t[0].float()})),
        Stage(name="y", read=lambda o: [o["y"]], put=lambda t: replaced_input(model.second, t[0].float())), Stage(name="z", read=lambda o: [o["z"]])))


@pytest.mark.parametrize("share", [1.0, 0.1, 0.01])
def test_gains_of_a_linear_chain_are_the_closed_form(share):
    draw = torch.Generator().manual_seed(0)
    batch = {name: torch.randn(400, 8, generator=draw) for name in ("x", "side")}
    for a, b, c in ((1.0, 3.0, 0.0), (2.0, -1.0, 0.0), (1.0, 1.0, 1.0), (1.0, 5.0, 3.0)):
        found = trace_bottleneck(Linear3(a, b, c), batch, chain=chain_of, share=share, repeats=8)
        assert found.gains[0] == pytest.approx(abs(a) / math.hypot(a, c), rel=0.05)
        assert found.gains[1] == pytest.approx(1.0, rel=1e-4)
        assert found.arrives[1] == pytest.approx(found.gains[0], rel=1e-3) and found.product == pytest.approx(found.gains[0] * found.gains[1])


def test_a_dead_link_is_not_blamed_on_the_next():
    batch = {name: torch.randn(20, 4) for name in ("x", "side")}
    first = trace_bottleneck(Linear3(0.0, 1.0), batch, chain=chain_of)
    assert first.dead == ("x → y",) and first.constant == ("y", "z") and first.gains[1] > 0.1
    assert trace_bottleneck(Linear3(1.0, 0.0), batch, chain=chain_of).dead == ("y → z",)
    weak = trace_bottleneck(Linear3(0.005, 1.0, 1.0), batch, chain=chain_of)
    assert weak.dead == ("x → y",) and trace_bottleneck(Linear3(0.05, 1.0, 1.0), batch, chain=chain_of).dead == ()


def broken(kind, seed):
    "An example model with one dead link."
    model = example_model("sc_vfp" if kind.startswith("sc") else "fvlm")
    with torch.no_grad():
        if kind == "uniform":
            model.query_attention.fixed_temperature = [math.inf, 1e9][seed % 2]
        elif kind == "feature":
            model.dino_to_llm.weight.zero_()
        elif kind == "head":
            model.head.register_forward_pre_hook(lambda _, given: (torch.zeros_like(given[0]), *given[1:]))
        elif kind == "sc uniform":
            for block in model.encoder.blocks:
                width = block.attention.num_heads * block.attention.head_dim
                block.attention.qkv.weight[:width] = 0
                block.attention.qkv.bias[:width] = 0
        elif kind == "sc heads":
            for block in model.encoder.blocks:
                block.attention.proj.weight.zero_()
        else:
            model.norm.register_forward_pre_hook(lambda _, given: (torch.zeros_like(given[0]),))
    return model


FAULTS = {"uniform": "query → attention", "feature": "feature → hidden", "head": "hidden → prediction", "sc uniform": "context → attention", "sc heads": "heads → hidden", "sc head": "hidden → prediction"}


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("seed", range(10))
def test_a_planted_dead_link_is_named_alone(kind, seed, batches):
    found = trace_bottleneck(broken(kind, seed), batches["sc_vfp" if kind.startswith("sc") else "fvlm"], repeats=1, seed=seed)
    assert found.dead == (FAULTS[kind],), found.table()
    assert found.verdict().failures == ("dead link",) and FAULTS[kind] in found.verdict()["dead link"].sentence


@pytest.mark.parametrize("name", ["fvlm", "sc_vfp"])
@pytest.mark.parametrize("seed", range(10))
def test_no_false_alarm(name, seed, batches):
    found = trace_bottleneck(example_model(name), batches[name], repeats=1, seed=seed)
    assert found.verdict().healthy and min(found.gains) > 0.3 and all(null < 1e-4 for null in found.nulls)


@pytest.mark.parametrize("attention", ["mhsa", "scmhsa", "scmhsa_folded", "hybrid"])
@pytest.mark.parametrize("predict", ["embedding", "residual"])
def test_all_arms_of_sc_vfp(attention, predict):
    model = SCVFP(SCVFPConfig.preset("tiny", attention=attention, predict=predict), seed=0)
    nn.init.normal_(model.mlp[-1].weight)
    found = trace_bottleneck(model, {"embeddings": torch.randn(12, 5, 16)}, repeats=1)
    assert found.stages == ("context", *(("attention",) if attention != "scmhsa_folded" else ()), "heads", "hidden", "prediction") and not found.dead


def test_a_model_that_starts_at_zero_has_a_dead_last_link():
    found = trace_bottleneck(SCVFP.tiny(), {"embeddings": torch.randn(12, 5, 16)})
    assert found.dead == ("hidden → prediction",)


def test_putting_a_stage_in_its_own_place_changes_nothing(batches):
    model, batch = example_model("sc_vfp").eval(), batches["sc_vfp"]
    chain = sc_vfp_chain(model, batch)
    with torch.no_grad():
        base = chain.outputs()
        for stage in chain.stages[:-1]:
            again = chain.outputs({stage.name: stage.read(base)})
            torch.testing.assert_close(again["prediction"], base["prediction"])


@pytest.mark.parametrize("changes", [dict(num_queries=3), dict(separate_heads=True), dict(query_skip=True), dict(previous_mode="keep"), dict(attention_mode="shallow")])
def test_variants_of_the_foveated_model(changes, batches):
    batch = dict(batches["fvlm"])
    if "attention_mode" in changes:
        batch["patches"] = torch.randn(24, 5, 9, 32)
    found = trace_bottleneck(planted_model(batches["encoder"], "both", 0, **changes), batch, untrained=planted_model(batches["encoder"], "both", 1, **changes), repeats=1)
    assert len(found.gains) == 4 == len(found.untrained) and all(math.isfinite(gain) for gain in found.gains)


@pytest.mark.parametrize("name", ["fvlm", "sc_vfp"])
def test_the_model_is_as_it_was(name, batches):
    model = example_model(name).train()
    before, torch_state = {key: x.clone() for key, x in model.state_dict().items()}, torch.random.get_rng_state()
    trace_bottleneck(model, batches[name], repeats=1)
    assert model.training and all(torch.equal(x, before[key]) for key, x in model.state_dict().items()) and torch.equal(torch_state, torch.random.get_rng_state())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any({"weigh", "with_intermediates"} & set(vars(module)) for module in model.modules())


def test_table_picture_and_figure(batches):
    found = trace_bottleneck(example_model("fvlm"), batches["fvlm"], repeats=1)
    assert [row["link"] for row in found.table()][:2] == ["query → attention", "attention → feature"] and len(found.table()) == 5
    assert found.picture().width > 200 and found.figure().data[0].type == "heatmap" and "narrowest link" in found._repr_markdown_()
    assert isinstance(found, BottleneckTrace) and found.clips == 24


def test_bad_input_is_named(batches):
    model = example_model("fvlm")
    one = {name: x[:1] for name, x in batches["fvlm"].items()}
    with pytest.raises(InputError, match="nobody to exchange"):
        trace_bottleneck(model, one)
    with pytest.raises(InputError, match="nobody to exchange"):
        trace_bottleneck(model, {})
    with pytest.raises(InputError, match="embeddings"):
        trace_bottleneck(example_model("sc_vfp"), batches["fvlm"])
    with pytest.raises(InputError, match="no prediction"):
        trace_bottleneck(model, {name: x for name, x in batches["fvlm"].items() if name != "latents"})
    with pytest.raises(InputError, match="Linear has no encoder"):
        trace_bottleneck(nn.Linear(1, 1), batches["fvlm"])
    with pytest.raises(InputError, match="at least one block"):
        trace_bottleneck(SCVFP(SCVFPConfig.preset("tiny", depth=0)), {"embeddings": torch.randn(4, 5, 16)})
    for name, value in (("share", 0), ("share", 1.5), ("repeats", 0)):
        with pytest.raises(ConfigError, match=name):
            trace_bottleneck(model, batches["fvlm"], **{name: value})
    bad = Linear3(float("nan"), 1.0)
    with pytest.raises(NonFiniteError, match="y: holds NaN"):
        trace_bottleneck(bad, {name: torch.randn(4, 2) for name in ("x", "side")}, chain=chain_of)
