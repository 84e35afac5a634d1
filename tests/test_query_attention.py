"""QueryAttention: every switch off is bit-equal to the plain path and on does what it says; closed forms, gradients, streams, bad input."""
import math

import pytest
import torch

from fvlm.blocks.query_attention import QueryAttention, gumbel_choice, one_hot_of_largest, sharpened, weigh_scores
from fvlm.core import ConfigError, InputError, NonFiniteError, ShapeError
from fvlm.encoders.keys_values import KeysValues, VisionEncoder

ENCODER = VisionEncoder.tiny()
HEADS, DEPTH, KEYS = 2, 2, 17


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def kept(b=2, t=3, seed=0):
    return ENCODER.keys_values(torch.rand(b, t, 3, 28, 28, generator=gen(seed)))


def queries(k=1, b=2, t=3, seed=1):
    return torch.randn(b, t, k, 8, generator=gen(seed))


def block(seed=0, **switches):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = QueryAttention(query_dim=8, embed_dim=32, num_heads=HEADS, depth=DEPTH, **switches)
    draw = gen(seed)
    with torch.no_grad():
        for name in ("query_input_proj.weight", "query_output_proj.weight", "query_output_proj.bias"):
            parameter = made.get_parameter(name)
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.5)
    return made


def plain(made, query, keys_values):
    "The deep path, written out."
    state = made.query_input_proj(query)
    for layer in range(DEPTH):
        state, _ = ENCODER.query_step(layer, state, keys_values, lambda _, scores: scores.softmax(-1))
    return made.query_output_proj(ENCODER.finish(state))


def stacked(made, query, keys_values, **others):
    return torch.stack(made.with_intermediates(query, keys_values, ENCODER, **others)[1]["attention"])


# --- off ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("switches", [{}, dict(temperature=1), dict(temperature_mode="learned"), dict(temperature_mode="per_head"), dict(top_k=KEYS), dict(gumbel_tau=0.1), dict(state_size=7)], ids=str)
def test_every_switch_off_is_bit_equal_to_the_plain_path(switches):
    keys_values, query = kept(), queries()
    made = block(**switches)
    assert torch.equal(made(query, keys_values, ENCODER), plain(made, query, keys_values)[:, :, 0])


def test_include_cls_off_equals_keys_without_the_prefix_and_several_queries_equal_the_plain_path_each():
    keys_values, query = kept(), queries(5)
    made = block(include_cls=False, num_queries=5)
    answers = made.with_intermediates(query, keys_values, ENCODER)[1]["per_query"]
    assert torch.equal(answers, plain(made, query, keys_values.without_prefix()))
    assert torch.equal(made(query, keys_values.without_prefix(), ENCODER), made(query, keys_values, ENCODER))


@pytest.mark.parametrize("mode", ["deep", "shallow"])
def test_top_k_of_all_keys_is_soft_bit_for_bit_at_any_temperature(mode):
    keys_values, query = kept(), queries()
    for temperature in (0.1, 0.5, 1.0, 3.0, math.inf):
        assert torch.equal(block(mode=mode, temperature=temperature, top_k=KEYS)(query, keys_values, ENCODER), block(mode=mode, temperature=temperature)(query, keys_values, ENCODER))


# --- on ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", ["deep", "shallow"])
@pytest.mark.parametrize("include_cls", [True, False])
def test_temperature_ends_and_top_1(mode, include_cls):
    keys_values, query = kept(), queries()
    width = KEYS if include_cls else KEYS - 1

    def maps(**switches):
        found = stacked(block(mode=mode, include_cls=include_cls, **switches).eval(), query, keys_values)
        assert found.shape == (DEPTH if mode == "deep" else 1, 2, 3, HEADS if mode == "deep" else 1, 1, width)
        torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:-1]), atol=1e-5, rtol=0)
        return found

    torch.testing.assert_close(maps(temperature=math.inf), torch.full_like(maps(), 1 / width), atol=1e-7, rtol=0)
    hard = maps(temperature=0.0)
    assert set(hard.unique().tolist()) == {0.0, 1.0} and bool((hard.sum(-1) == 1).all())
    assert torch.equal(hard, maps(top_k=1)) and torch.equal(hard, maps(gumbel=True))
    torch.testing.assert_close(maps(temperature=1e-6), hard)
    torch.testing.assert_close(maps(temperature=1e7), maps(temperature=math.inf), atol=1e-5, rtol=0)
    four = maps(top_k=4)
    assert bool(((four > 0).sum(-1) == 4).all())
    two = maps(top_k=2, temperature=math.inf)
    assert set(two.unique().tolist()) == {0.0, 0.5}, "the mean of the two best"
    sharp, soft = maps(temperature=0.2), maps(temperature=1.0)
    assert sharp[0].amax(-1).gt(soft[0].amax(-1)).all()


def test_the_mean_pool_and_the_recomputed_answer_in_the_shallow_mode():
    keys_values, query = kept(), queries(3)
    mean = block(mode="shallow", temperature=math.inf, include_cls=False, num_queries=3)
    torch.testing.assert_close(mean(query, keys_values, ENCODER), mean.query_output_proj(keys_values.patches.mean(2)), atol=1e-5, rtol=0)
    for switches in ({}, dict(temperature=0.3), dict(top_k=3), dict(gumbel=True), dict(include_cls=False)):
        made = block(mode="shallow", num_queries=3, **switches)
        features, inside = made.with_intermediates(query, keys_values, ENCODER, generator=gen(4))
        values = keys_values.patches if made.include_cls is False else torch.cat([keys_values.cls[:, :, None], keys_values.patches], 2)
        torch.testing.assert_close(inside["per_query"], made.query_output_proj(inside["attention"][0][:, :, 0] @ values), atol=1e-5, rtol=0)
        torch.testing.assert_close(features, inside["per_query"].mean(2), atol=1e-5, rtol=0)
        score = (made.query_input_proj(query) @ values.mT / 32**0.5)
        if not made.gumbel:
            torch.testing.assert_close(inside["attention"][0][:, :, 0], weigh_scores(score, temperature=made.fixed_temperature, top_k=made.top_k), atol=1e-5, rtol=0)


def test_the_deep_attention_is_the_one_used():
    "Replay the returned maps in place of a softmax: the same features."
    keys_values, query = kept(), queries()
    for switches in (dict(temperature=0.4), dict(top_k=3), dict(gumbel=True), dict(temperature_mode="per_head")):
        made = block(**switches)
        features, inside = made.with_intermediates(query, keys_values, ENCODER, generator=gen(4))
        state = made.query_input_proj(query)
        for layer in range(DEPTH):
            state, _ = ENCODER.query_step(layer, state, keys_values, lambda layer, scores: inside["attention"][layer])
        assert torch.equal(made.query_output_proj(ENCODER.finish(state))[:, :, 0], features)


def test_learned_temperatures_start_where_told_train_and_stay_positive():
    keys_values, query = kept(), queries()
    for mode, shape in (("learned", ()), ("per_head", (DEPTH, HEADS))):
        made = block(temperature=0.5, temperature_mode=mode)
        assert made.log_temperature.shape == shape
        torch.testing.assert_close(made(query, keys_values, ENCODER), block(temperature=0.5)(query, keys_values, ENCODER), atol=1e-5, rtol=0)
        made(query, keys_values, ENCODER).square().sum().backward()
        assert made.log_temperature.grad.abs().min() > 0
    made = block(temperature_mode="per_head")
    with torch.no_grad():
        made.log_temperature[1, 0] = -100.0
    found = stacked(made, query, keys_values)
    reference = stacked(block(), query, keys_values)
    assert torch.equal(found[0], reference[0]) and torch.equal(found[1][:, :, 1], reference[1][:, :, 1]) and found[1][:, :, 0].amax(-1).min() > 0.999
    assert block(mode="shallow", temperature_mode="per_head").log_temperature.shape == (1, 1)
    block(mode="shallow", temperature_mode="per_head")(query, keys_values, ENCODER)


# --- hard attention ----------------------------------------------------------------------------------------------------

def test_gumbel_is_one_hot_random_in_training_reproducible_and_passes_a_gradient():
    keys_values, query = kept(), queries(2).requires_grad_()
    made = block(gumbel=True, num_queries=2, top_k=5).train()
    features, inside = made.with_intermediates(query, keys_values, ENCODER, generator=gen(1))
    for attention in inside["attention"]:
        assert set(attention.detach().unique().tolist()) == {0.0, 1.0} and bool((attention.detach().sum(-1) == 1).all())
    assert torch.equal(features, made(query, keys_values, ENCODER, generator=gen(1)))
    assert not torch.equal(features, made(query, keys_values, ENCODER, generator=gen(2)))
    (gradient,) = torch.autograd.grad(features.square().sum(), query)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0
    made.eval()
    assert torch.equal(made(query, keys_values, ENCODER, generator=gen(1)), made(query, keys_values, ENCODER, generator=gen(2)))


def test_gumbel_frequencies_are_the_softmax_and_masked_keys_are_never_drawn():
    scores = torch.tensor([1.0, 0.0, 2.0, -math.inf, -1.0])
    drawn = gumbel_choice(scores.expand(40_000, 5), generator=gen()).mean(0)
    torch.testing.assert_close(drawn, scores.softmax(0), atol=0.01, rtol=0)
    assert drawn[3] == 0


def test_the_straight_through_gradient_is_that_of_the_soft_choice():
    scores, upstream = torch.randn(6, 9, generator=gen(), dtype=torch.float64, requires_grad=True), torch.randn(6, 9, generator=gen(1), dtype=torch.float64)
    hard = gumbel_choice(scores, tau=0.7, noise=False)
    assert torch.equal(hard, one_hot_of_largest(scores))
    ours, theirs = torch.autograd.grad(hard, scores, upstream), torch.autograd.grad((scores / 0.7).softmax(-1), scores, upstream)
    torch.testing.assert_close(ours[0], theirs[0])


def test_gradients_of_masked_scores_are_finite_and_zero_where_masked():
    scores = torch.randn(4, 9, generator=gen(), requires_grad=True)
    weights = weigh_scores(scores, temperature=0.3, top_k=3)
    weights.square().sum().backward()
    assert scores.grad.isfinite().all() and bool(((scores.grad != 0) <= (weights > 0)).all())
    expected = torch.autograd.grad((scores.masked_fill(weights == 0, -math.inf) / 0.3).softmax(-1).square().sum(), scores)[0]
    torch.testing.assert_close(scores.grad, expected)
    ties = torch.zeros(2, 5)
    assert weigh_scores(ties, top_k=2).gt(0).sum(-1).tolist() == [2, 2] and one_hot_of_largest(ties).tolist() == [[1.0, 0, 0, 0, 0]] * 2
    assert sharpened(ties) is ties


# --- several queries ---------------------------------------------------------------------------------------------------

def test_pooling():
    keys_values, query, state = kept(), queries(4), torch.randn(2, 3, 5, generator=gen(6))
    made = block(num_queries=4, state_size=5)
    features, inside = made.with_intermediates(query, keys_values, ENCODER, pool_state=state)
    torch.testing.assert_close(inside["pooling"].sum(-1), torch.ones(2, 3))
    assert inside["pooling"].shape == (2, 3, 4) and inside["pooling"].std(-1).min() > 0
    torch.testing.assert_close(features, torch.einsum("btk,btkd->btd", inside["pooling"], inside["per_query"]))
    wish = made.pool_proj(state)
    torch.testing.assert_close(inside["pooling"], (torch.einsum("btd,btkd->btk", wish, inside["per_query"]) / 32**0.5).softmax(-1))
    single = block()(query[:, :, :1], keys_values, ENCODER)
    torch.testing.assert_close(made(query[:, :, :1].expand(-1, -1, 4, -1), keys_values, ENCODER, pool_state=state), single, atol=1e-5, rtol=0)
    nobody, inside = made.with_intermediates(query, keys_values, ENCODER)
    torch.testing.assert_close(nobody, inside["per_query"].mean(2), atol=1e-5, rtol=0)
    nobody.square().sum().backward()
    assert made.pool_vector.grad.abs().sum() > 0
    shuffled = made(query[:, :, [2, 0, 3, 1]], keys_values, ENCODER, pool_state=state)
    torch.testing.assert_close(shuffled, features, atol=1e-5, rtol=0)


def test_one_query_has_no_pooling_and_no_parameters_for_it():
    made = block(state_size=5)
    assert {name for name, _ in made.named_parameters()} == {"query_input_proj.weight", "query_output_proj.weight", "query_output_proj.bias"}
    assert made.with_intermediates(queries(), kept(), ENCODER)[1]["pooling"] is None


# --- what sees what ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", ["deep", "shallow"])
def test_frames_streams_and_clips(mode):
    keys_values, query, made = kept(2, 4), queries(2, 2, 4), block(mode=mode, num_queries=2)
    whole = made(query, keys_values, ENCODER)
    stream = torch.cat([made(query[:, t:t + 1], keys_values.frames(slice(t, t + 1)), ENCODER) for t in range(4)], 1)
    torch.testing.assert_close(stream, whole, atol=1e-5, rtol=0)
    query[1, 2] += 1
    moved = (made(query, keys_values, ENCODER) != whole).any(-1)
    assert moved.tolist() == [[False] * 4, [False, False, True, False]], "a query moves its own frame alone, and nothing else by a bit"


def test_gradients_reach_the_query_and_the_projections_and_not_the_frozen_encoder():
    keys_values, query = kept(), queries().requires_grad_()
    made = block()
    made(query, keys_values, ENCODER).square().sum().backward()
    assert query.grad.abs().sum() > 0 and all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.parameters())
    assert all(p.grad is None for p in ENCODER.parameters()) and keys_values.keys.grad_fn is None


def test_bfloat16_keys_and_autocast_stay_near():
    keys_values, query, made = kept(), queries(3), block(num_queries=3)
    reference = made(query, keys_values, ENCODER)
    half = made(query, keys_values.to(torch.bfloat16), ENCODER)
    with torch.autocast("cpu", torch.bfloat16):
        auto = made(query, keys_values, ENCODER)
    for other in (half, auto.float()):
        assert (other - reference).norm() < 0.03 * reference.norm()
    assert half.dtype == torch.float32


def test_keys_of_a_batch_and_of_the_encoder_give_the_same():
    keys_values, query, made = kept(), queries(), block()
    back = KeysValues.from_batch({name: tensor.contiguous() for name, tensor in keys_values.as_batch().items()}, prefix=1, grid=(4, 4))
    assert torch.equal(made(query, back, ENCODER), made(query, keys_values, ENCODER))


def test_a_state_dict_holds_no_encoder():
    assert sum(p.numel() for p in QueryAttention().parameters()) == 384 * 384 * 2 + 384 and not any(isinstance(m, VisionEncoder) for m in block().modules())


# --- bad input ---------------------------------------------------------------------------------------------------------

def test_bad_options():
    for pattern, switches in (
        ("query_dim: got 0", dict(query_dim=0)), ("num_queries: got 0", dict(num_queries=0)), ("num_queries: got 1.5", dict(num_queries=1.5)),
        ("mode: got 'depp', expected one of 'deep', 'shallow'; did you mean 'deep'", dict(mode="depp")), ("temperature_mode: got 'per_layer'", dict(temperature_mode="per_layer")),
        ("temperature: got -0.1", dict(temperature=-0.1)), ("temperature: got nan", dict(temperature=math.nan)),
        ("temperature: got 0, expected a finite number above 0 with gumbel", dict(temperature=0, gumbel=True)),
        ("temperature: got inf, expected a finite number above 0.001 with temperature_mode 'learned'", dict(temperature=math.inf, temperature_mode="learned")),
        ("top_k: got 0", dict(top_k=0)), ("gumbel_tau: got 0", dict(gumbel_tau=0)), ("state_size: got 0", dict(state_size=0)),
    ):
        with pytest.raises(ConfigError, match=pattern):
            QueryAttention(**dict(query_dim=8, embed_dim=32, num_heads=2, depth=2) | switches)


def test_bad_input():
    keys_values, query = kept(), queries()
    broken = keys_values.to(torch.float32)
    broken.values[0, 0, 1, 0, 3, 2] = math.nan
    bare = KeysValues(keys_values.keys, keys_values.values, 1, (4, 4))
    for error, pattern, wrong in (
        (ShapeError, "query: axis query_dim should be 8, got 7", lambda: block()(query[..., :7], keys_values, ENCODER)),
        (ShapeError, "query: axis K should be 2, got 1", lambda: block(num_queries=2)(query, keys_values, ENCODER)),
        (ShapeError, "query: expected 4 axes", lambda: block()(query[0], keys_values, ENCODER)),
        (NonFiniteError, "query: 1 of", lambda: block()(query.masked_fill(torch.arange(8) == 3, math.nan)[:1, :1], keys_values, ENCODER)),
        (NonFiniteError, "keys_values: finite queries have answers that are NaN or Inf", lambda: block()(query, broken, ENCODER)),
        (ShapeError, "keys_values: axis T should be 2, got 3", lambda: block()(query[:, :2], keys_values, ENCODER)),
        (ShapeError, "keys_values: axis heads should be 4, got 2", lambda: QueryAttention(8, 32, 4, 2)(query, keys_values, ENCODER)),
        (ConfigError, "top_k: got 18, expected at most 17", lambda: block(top_k=18)(query, keys_values, ENCODER)),
        (ConfigError, "top_k: got 17, expected at most 16", lambda: block(top_k=17, include_cls=False)(query, keys_values, ENCODER)),
        (ConfigError, "top_k: got 18, expected at most 17", lambda: block(top_k=18, temperature=0)(query, keys_values, ENCODER)),
        (ConfigError, "encoder: has 3 layers of 32 dimensions, expected 2 of 32", lambda: block()(query, keys_values, VisionEncoder.tiny(depth=3))),
        (InputError, "keys_values: hold no patches", lambda: block(mode="shallow")(query, bare, ENCODER)),
        (InputError, "pool_state: this block pools 1 answers", lambda: block(state_size=5)(query, keys_values, ENCODER, pool_state=torch.zeros(2, 3, 5))),
        (InputError, "pool_state: .* without a state; expected None, or a block made with state_size", lambda: block(num_queries=2)(queries(2), keys_values, ENCODER, pool_state=torch.zeros(2, 3, 5))),
        (ShapeError, "pool_state: axis state_size should be 5, got 4", lambda: block(num_queries=2, state_size=5)(queries(2), keys_values, ENCODER, pool_state=torch.zeros(2, 3, 4))),
    ):
        with pytest.raises(error, match=pattern):
            wrong()
