"""The query-swap instrument: values agree with the layer of evidence, planted faults are named over seeds, bad input is one sentence."""
import numpy as np
import pytest
import torch

from fvlm.core import ConfigError, InputError, NonFiniteError, ShapeError
from fvlm.evidence.query_swaps import foveation_value, own_queries, swap_errors
from fvlm.instruments.query_swap_table import QuerySwapTable, query_swap_table, zero_errors
from fvlm.models.foveated_vlm import FoveatedVLM
from fvlm.recipes.example_models import example_clips, example_model


@pytest.fixture(scope="module")
def clips():
    "Held-out clips of the example."
    return example_clips("fvlm", num_clips=40)


@pytest.fixture(scope="module")
def found(clips):
    "The table of the example."
    return query_swap_table(example_model("fvlm"), clips.inputs, masks=clips.masks)


def test_values_are_those_of_the_layer_of_evidence(found, clips):
    errors = swap_errors(example_model("fvlm"), clips.inputs, kinds=("own", "static", "other_clip"))
    for look in ("static", "other_clip"):
        assert found.values[look].interval == foveation_value({name: found.errors[name] for name in ("own", look)}, look).interval
        np.testing.assert_allclose(found.errors[look][0], errors[look], rtol=1e-5)
    rows = {row["look"]: row for row in found.table()}
    assert rows["own"]["error"] == pytest.approx(errors["own"][:, 2:].mean(), rel=1e-5)
    assert rows["static"]["error"] == pytest.approx(errors["static"][:, 2:].mean(), rel=1e-5)
    assert list(rows) == ["own", "static", "time shuffled", "other clip", "random", "uniform", "oracle", "zero"]


def test_the_healthy_example_is_healthy(found):
    assert found.verdict().healthy and not found.verdict().failures
    assert all(value.interval.low > 0 for value in found.values.values())
    assert "own queries is better than static" in str(found.verdict())


def test_zero_is_the_query_of_zeros(clips):
    model = example_model("fvlm")
    own, batch = own_queries(model, clips.inputs), clips.inputs.batch(torch.arange(len(clips)))
    with torch.no_grad():
        given = {**batch, "queries": torch.zeros_like(own["queries"])}
        expected = model.errors(model(given, passes="fine"), given)["fine"].double().numpy()
    np.testing.assert_allclose(zero_errors(model, clips.inputs, own, batch_size=7), expected, rtol=1e-4)


def fault(kind, seed):
    "The example with one fault, a different one in detail for each seed."
    model, draw = example_model("fvlm"), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        if kind == "dead link":
            model.query_attention.query_input_proj.weight.zero_()
        else:
            model.llm_to_query.weight.zero_()
            model.llm_to_query.bias.copy_(torch.randn(model.llm_to_query.bias.shape, generator=draw))
    return model


@pytest.mark.parametrize("kind", ["dead link", "identical queries"])
@pytest.mark.parametrize("seed", range(10))
def test_planted_faults_are_named_and_nothing_else(kind, seed, clips):
    assert query_swap_table(fault(kind, seed), clips.inputs, looks=("static", "other_clip", "random"), seed=seed).verdict().failures == (kind,)


@pytest.mark.parametrize("seed", range(10))
def test_no_false_alarm_over_seeds(seed, clips):
    assert query_swap_table(example_model("fvlm"), clips.inputs, looks=("static", "random"), masks=clips.masks, seed=seed).verdict().healthy


def test_several_queries_a_frame(clips):
    from fvlm.recipes.planted_foveation import planted_model

    model = planted_model(clips.encoder, "both", 0, num_queries=3)
    said = query_swap_table(model, clips.inputs)
    assert said.errors["zero"].shape == (1, 40, 5) and len(said.table()) == 7


def test_no_headroom_is_said_of_equal_errors():
    draw = np.random.default_rng(0)
    errors = {look: draw.random((30, 5)) for look in ("own", "uniform", "oracle")}
    verdict = QuerySwapTable(errors=errors).verdict()
    assert verdict.failures == ("no headroom",)
    errors["oracle"] = errors["uniform"] - 0.1
    assert QuerySwapTable(errors=errors).verdict().healthy


def test_pictures_and_words(found):
    assert found.picture().width > 400
    assert {trace.type for trace in found.figure().data} == {"scatter", "heatmap"}
    assert found._repr_markdown_().count("\n|") >= 9
    with pytest.raises(Exception):
        found.errors = {}


def test_frames_without_a_target_before_the_first_frame_do_not_matter(found):
    errors = {look: values.copy() for look, values in found.errors.items()}
    for values in errors.values():
        values[..., 0] = np.nan
    assert QuerySwapTable(errors=errors).own == pytest.approx(found.own)


def test_bad_input_is_named(clips):
    good = {"own": np.ones((3, 5)), "static": np.ones((3, 5))}
    for errors, kind, said in (({}, InputError, "own"), ({"own": good["own"]}, InputError, "at least one other look"), ({**good, "up": good["own"]}, ConfigError, "up"),
                               ({**good, "static": np.ones((4, 5))}, ShapeError, "static"), ({"own": np.ones(3), "static": np.ones(3)}, ShapeError, "own"),
                               ({**good, "static": np.full((3, 5), np.inf)}, NonFiniteError, "static")):
        with pytest.raises(kind, match=said):
            QuerySwapTable(errors=errors)
    with pytest.raises(ConfigError, match="first_frame"):
        QuerySwapTable(errors=good, first_frame=6)
    model = FoveatedVLM.tiny()
    with pytest.raises(ConfigError, match="sideways"):
        query_swap_table(model, clips.inputs, looks=("sideways",))
    with pytest.raises(InputError, match="nobody to swap with"):
        query_swap_table(example_model("fvlm"), example_clips("fvlm", num_clips=1).inputs)


def test_replaced_attention_is_no_exchange_of_the_query(clips):
    found = query_swap_table(fault("dead link", 0), clips.inputs, masks=clips.masks)
    assert found.values["uniform"].interval.estimate != 0 and "dead link" in found.verdict().failures
    assert "dead link" not in QuerySwapTable(errors={look: found.errors[look] for look in ("own", "uniform")}).verdict().failures
