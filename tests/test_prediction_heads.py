"""Contracts of the prediction heads: one call for all, exact counts, exact starts, previous latents, query skip, one clear error each."""
import pytest
import torch
from torch import nn

from fvlm.blocks.head_contract import PREVIOUS_MODES, PredictionHead, weakened
from fvlm.blocks.prediction_heads import HEADS, FiLMHead, MLPHead, SpatialTransformerHead, joined, matched_width
from fvlm.core import ConfigError, InputError, NonFiniteError, ShapeError, generator

HIDDEN, LATENT = 10, (4, 6, 5)  # not square on purpose
names = pytest.mark.parametrize("name", HEADS)


def draw(*shape, stream="x"):
    return torch.randn(*shape, generator=generator(0, stream))


def make(name, latent=LATENT, **options):
    return HEADS[name](HIDDEN, latent, **{"width": 8, "generator": generator(0, name), **options})


def inputs(*lead, query=None, latent=LATENT):
    given = [draw(*lead, HIDDEN, stream="hidden"), draw(*lead, *latent, stream="previous")]
    return given + ([] if query is None else [draw(*lead, *query, stream="query")])


# the contract


@names
@pytest.mark.parametrize("lead", [(3,), (2, 3), (1, 1)])
@pytest.mark.parametrize("latent", [LATENT, (4, 8, 8), (1, 1, 1), (3, 2, 9)])
def test_prediction_has_the_shape_of_the_latents(name, lead, latent):
    head, (hidden, previous) = make(name, latent), inputs(*lead, latent=latent)
    out = head(hidden, previous)
    assert out.shape == previous.shape and out.dtype == torch.float32 and out.isfinite().all()


@names
def test_frames_do_not_meet(name):
    head, (hidden, previous) = make(name, query_dim=3), inputs(2, 3)
    query = draw(2, 3, 3, stream="query")
    together = head(hidden, previous, query)
    for b in range(2):
        for t in range(3):
            torch.testing.assert_close(together[b, t], head(hidden[b, t][None], previous[b, t][None], query[b, t][None])[0], atol=1e-5, rtol=1e-5)
    moved = hidden.clone()
    moved[1, 2] += 1
    change = (head(moved, previous, query) - together).flatten(2).abs().amax(-1)
    assert change[1, 2] > 1e-5 and change.flatten()[:-1].max() == 0


@names
def test_the_explicit_path_is_the_same_function(name):
    head, given = make(name, query_dim=3), inputs(2, 3, query=(3,))
    out, seen = head.with_intermediates(*given)
    torch.testing.assert_close(out, head(*given), atol=1e-5, rtol=1e-5)
    assert all(value.shape[:2] == (2, 3) for value in seen.values())
    assert torch.equal(seen["previous"], given[1]) and torch.equal(seen["response"], out)
    for attention in [seen[key] for key in seen if "attention" in key]:
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))


def test_named_intermediates():
    sites = LATENT[1] * LATENT[2]
    expected = {
        "film": {"features": (8, 6, 5), "gamma": (8,), "beta": (8,)},
        "spatial_film": {"features": (8, 6, 5), "gamma": (8, 6, 5), "beta": (8, 6, 5)},
        "mlp": {"first": (8,), "second": (8,)},
        "cross_attention": {"features": (8, 6, 5), "attention": (4, sites, sites)},
        "spatial_transformer": {"features": (8, 6, 5), "attention": (2, 4, sites, sites), "cross_attention": (2, 4, sites, 2)},
    }
    for name in HEADS:
        _, seen = make(name).with_intermediates(*inputs(2, 3))
        found = {key: tuple(value.shape[2:]) for key, value in seen.items()}
        assert found == expected[name] | {"previous": LATENT, "response": LATENT}


@names
@pytest.mark.parametrize("start", ["random", "copy_last"])
def test_bfloat16_and_autocast(name, start):
    head, (hidden, previous) = make(name, start=start), inputs(2, 3)
    exact = head(hidden, previous)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = head(hidden, previous)
    half = head.bfloat16()(hidden.bfloat16(), previous.bfloat16())
    assert half.dtype == torch.bfloat16
    for out in (half, mixed):
        assert (out.float() - exact).abs().mean() < 0.03 * exact.abs().mean()


@names
def test_gradients_reach_everything(name):
    head, given = make(name, query_dim=3), [x.requires_grad_() for x in inputs(2, 2, query=(3,))]
    (head(*given) * draw(2, 2, *LATENT, stream="upstream")).sum().backward()
    gradients = {"hidden": given[0].grad, "previous": given[1].grad, "query": given[2].grad, **{key: p.grad for key, p in head.named_parameters()}}
    silent = [key for key, gradient in gradients.items() if not gradient.abs().sum() > 0]
    # a constant added to all keys of a softmax changes nothing
    assert [key for key in silent if not key.endswith(".k.bias")] == []
    assert all(gradient.isfinite().all() for gradient in gradients.values())


# the equations, written the slow way


def by_the_book(name, head, hidden, previous, query):
    sites = LATENT[1] * LATENT[2]
    if name == "mlp":
        first = head.first(torch.cat([hidden, previous.flatten(1)], 1)) + head.query_proj(query)
        first = head.norm_first(torch.nn.functional.gelu(first))
        return head.last(head.norm_second(torch.nn.functional.gelu(head.second(first)))).view(-1, *LATENT)
    features = head.encoder(previous)
    if name != "spatial_transformer":
        features = features + head.query_proj(query)[:, :, None, None]
    if name == "film":
        gamma, beta = head.film(hidden)[:, :8], head.film(hidden)[:, 8:]
        return head.decoder(torch.stack([torch.stack([g[c] * f[c] + b[c] for c in range(8)]) for g, b, f in zip(gamma, beta, features)]))
    pairs = torch.cat([hidden[:, None].expand(-1, sites, -1), head.positions.expand(len(hidden), -1, -1)], -1)
    if name == "spatial_film":
        film = head.second(torch.nn.functional.gelu(head.first(pairs)))  # (n,N,2w)
        out = film[..., :8] * features.flatten(2).mT + film[..., 8:]
    elif name == "cross_attention":
        tokens = head.norm_token(features.flatten(2).mT)
        asking = head.norm_query(head.second(torch.nn.functional.gelu(head.first(pairs))))
        out = torchs(head.attention)(asking, tokens + head.position_key(head.positions), tokens)[0]
    else:
        memory = torch.stack([head.nothing[0].expand(len(hidden), -1), head.hidden_proj(hidden), head.query_proj(query)], 1)
        out = features.flatten(2).mT + head.position_proj(head.positions)
        for layer in head.layers:
            own = layer.norm_self(out)
            out = out + torchs(layer.self_attention)(own, own, own)[0]
            out = out + torchs(layer.cross_attention)(layer.norm_cross(out), memory, memory)[0]
            out = out + layer.ffn(layer.norm_ffn(out))
        out = head.norm(out)
    return head.decoder(out.mT.reshape(-1, 8, *LATENT[1:]))


def torchs(ours):
    "torch's own attention with the same weights."
    theirs = nn.MultiheadAttention(ours.q.in_features, ours.num_heads, batch_first=True)
    packed = {f"in_proj_{kind}": torch.cat([getattr(layer, kind) for layer in (ours.q, ours.k, ours.v)]) for kind in ("weight", "bias")}
    theirs.load_state_dict(packed | {"out_proj.weight": ours.out.weight, "out_proj.bias": ours.out.bias})
    return theirs


@names
def test_a_head_is_its_equation(name):
    head, (hidden, previous, query) = make(name, query_dim=3).double(), [x.double() for x in inputs(3, query=(3,))]
    for parameter in head.parameters():
        parameter.data += 0.3 * draw(*parameter.shape, stream="loud").double()  # so that nothing hides
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        out, _ = head.with_intermediates(hidden, previous, query)
        expected = by_the_book(name, head, hidden, previous, query)
    finally:
        torch.set_default_dtype(usual)
    torch.testing.assert_close(out, expected, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(head(hidden, previous, query), expected, atol=1e-9, rtol=1e-9)


# counts


def linear(a, b):
    return a * b + b


def conv(*channels):
    return sum(9 * a * b + b for a, b in zip(channels, channels[1:]))


def test_parameters_are_the_sources_exactly():
    both_ways, attention, table, norm = conv(4, 64, 128, 256) + conv(256, 128, 64, 4), 4 * linear(256, 256), 1024 * 64, 512
    by_hand = {
        "film": both_ways + linear(576, 512) + linear(512, 512),
        "spatial_film": both_ways + table + linear(640, 512) + linear(512, 512),
        "mlp": linear(4672, 2048) + 4096 + linear(2048, 2048) + 4096 + linear(2048, 4096),
        "cross_attention": both_ways + table + linear(640, 256) + linear(256, 256) + linear(64, 256) + attention + 2 * norm,
        "spatial_transformer": both_ways + table + linear(576, 256) + linear(64, 256) + 256 + norm
        + 2 * (2 * attention + linear(256, 512) + linear(512, 256) + 3 * norm),
    }
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in head().parameters()) for name, head in HEADS.items()}
    assert counts == by_hand
    assert counts["film"] == 1_300_612 and counts["mlp"] == 22_167_552 and abs(counts["cross_attention"] - 1.33e6) < 0.01 * 1.33e6


@names
@pytest.mark.parametrize("budget", [40_000, 1_300_612])
@pytest.mark.parametrize("query_dim", [None, 7])
def test_matched_width(name, budget, query_dim):
    latent = (4, 32, 32) if budget > 1e6 else (4, 8, 8)
    head, width = HEADS[name], matched_width(name, budget, 576 if budget > 1e6 else 24, latent, query_dim=query_dim)

    def off(width):
        with torch.device("meta"):
            return abs(sum(p.numel() for p in head(576 if budget > 1e6 else 24, latent, width=width, query_dim=query_dim).parameters()) - budget)

    assert off(width) < (0.02 if budget > 1e6 else 0.11) * budget  # a step of the width is coarse for a small head
    assert off(width) <= min(off(width + head.width_step), off(width - head.width_step))


def test_matched_width_refuses():
    with pytest.raises(ConfigError, match="parameters: got 100, expected at least"):
        matched_width("mlp", 100)
    with pytest.raises(ConfigError, match="name: got 'flim'.*'film'"):
        matched_width("flim", 100)


# starts, draws


@names
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("query_dim", [None, 3])
def test_an_untrained_head_is_exactly_zero_or_the_last_frame(name, dtype, query_dim):
    given = [x.to(dtype) for x in inputs(2, 3, query=query_dim and (query_dim,))]
    assert torch.equal(make(name, start="zero", query_dim=query_dim).to(dtype)(*given), torch.zeros_like(given[1]))
    assert torch.equal(make(name, start="copy_last", query_dim=query_dim).to(dtype)(*given), given[1])


@names
def test_a_zero_start_wakes_up_after_one_step(name):
    head, (hidden, previous) = make(name, start="copy_last"), inputs(2, 3)
    optimizer = torch.optim.SGD(head.parameters(), 0.1)
    for expected in (False, True):
        state = hidden.clone().requires_grad_()
        optimizer.zero_grad()
        (head(state, previous) - 2 * previous).square().mean().backward()
        assert bool(state.grad.abs().sum() > 0) == expected
        optimizer.step()


@names
def test_copy_last_adds_the_change_to_what_the_head_saw(name):
    head, given = make(name, start="copy_last", previous_mode="noise"), inputs(2, 3)
    for parameter in head.last.parameters():
        nn.init.normal_(parameter, generator=generator(0, "last"))
    out, seen = head.with_intermediates(*given, generator=generator(0, "noise"))
    assert torch.equal(out, seen["previous"] + seen["response"]) and seen["response"].abs().min() > 0


@names
def test_a_generator_decides_all_weights(name):
    one, two, other = make(name), make(name), make(name, generator=generator(1, name))
    for key, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[key])
    differ = [key for key, value in one.state_dict().items() if not torch.equal(value, other.state_dict()[key])]
    assert [key for key in one.state_dict() if key not in differ] == [key for key in one.state_dict() if "norm" in key]


@names
def test_redrawn_weights_have_torchs_distribution(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = dict(make(name, width=64, generator=None).named_parameters())
    for key, ours in make(name, width=64).named_parameters():
        if ours.numel() > 500:
            assert ours.std().item() == pytest.approx(theirs[key].std().item(), rel=0.1), key


# previous latents


@pytest.mark.parametrize("mode", PREVIOUS_MODES)
@names
def test_previous_modes(name, mode):
    head, (hidden, previous) = make(name, previous_mode=mode, previous_noise=0.5), inputs(4, 5)
    plain = make(name)
    expected = plain(hidden, previous if mode != "remove" else torch.zeros_like(previous))
    assert torch.equal(head.eval()(hidden, previous), expected)  # weakened in training only, removed always
    head.train()
    once, again = (head(hidden, previous, generator=generator(0, "weaken")) for _ in range(2))
    other = head(hidden, previous, generator=generator(1, "weaken"))
    assert torch.equal(once, again)
    assert torch.equal(once, other) == (mode in ("keep", "remove"))
    assert torch.equal(once, expected) == (mode in ("keep", "remove"))


@names
def test_removed_latents_do_not_matter_and_may_be_missing(name):
    head, (hidden, previous) = make(name, previous_mode="remove"), inputs(2, 3)
    assert torch.equal(head(hidden, previous), head(hidden, 100 * previous))
    assert torch.equal(head(hidden, previous), head(hidden, None))


def test_weakened_has_the_stated_distribution():
    x = torch.full((400, 4, 5, 5), 2.0)
    noisy = weakened(x, "noise", amount=0.1, generator=generator(0, "w")) - x
    assert abs(noisy.mean()) < 0.005 and noisy.std().item() == pytest.approx(0.1, rel=0.05)
    dropped = weakened(x, "drop", amount=0.25, generator=generator(0, "w"))
    torch.testing.assert_close(dropped.unique(), torch.tensor([0.0, 2 / 0.75]))
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    frames = weakened(x, "drop_frames", amount=0.25, generator=generator(0, "w")).flatten(1)
    assert (frames.amin(1) == frames.amax(1)).all() and (frames[:, 0] == 0).float().mean().item() == pytest.approx(0.25, abs=0.07)
    assert set(frames.unique().tolist()) == {0.0, 2.0}


# query skip


@names
def test_the_skip_costs_nothing_when_off_and_matters_when_on(name):
    plain, skipping, given = make(name), make(name, query_dim=3), inputs(2, 3, query=(3,))
    state = skipping.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in plain.state_dict().items())
    assert set(state) - set(plain.state_dict()) == {"query_proj.weight", "query_proj.bias"}
    assert (skipping(*given) - skipping(*given[:2], -given[2])).abs().max() > 1e-5


@names
def test_one_query_is_several_of_one(name):
    head, given = make(name, query_dim=3), inputs(2, 3, query=(3,))
    torch.testing.assert_close(head(*given), head(*given[:2], given[2].unsqueeze(2)))
    several = draw(2, 3, 4, 3, stream="several")
    torch.testing.assert_close(head(*given[:2], several), head(*given[:2], several.flip(2)), atol=1e-5, rtol=1e-5)  # a set
    assert (head(*given[:2], several) - head(*given[:2], several[:, :, :1])).abs().max() > 1e-5


def test_the_null_token_lets_sites_choose():
    _, seen = make("spatial_transformer").with_intermediates(*inputs(2, 3))
    assert seen["cross_attention"][..., 1].std(-1).min() > 1e-3  # sites listen to h differently


def test_depth():
    deep = SpatialTransformerHead(HIDDEN, LATENT, width=8, depth=3)
    assert len(deep.layers) == 3 and deep(*inputs(2)).shape == (2, *LATENT)
    with pytest.raises(ConfigError, match="depth: got 0"):
        SpatialTransformerHead(depth=0)


def test_joined_is_the_layer_on_the_concatenation():
    layer, h, p = nn.Linear(8, 7), draw(3, 5), draw(6, 3)
    torch.testing.assert_close(joined(layer, h, p), layer(torch.cat([h[:, None].expand(3, 6, 5), p.expand(3, 6, 3)], -1)))


# bad input


@names
def test_one_clear_error_each(name):
    head, skipping, (hidden, previous) = make(name), make(name, query_dim=3), inputs(2, 3)
    bad = hidden.clone()
    bad[1, 2, 3] = float("nan")
    blown = previous.clone()
    blown[0, 1, 2, 3, 4] = float("inf")
    for call, error, text in (
        (lambda: head(hidden[..., :9], previous), ShapeError, "hidden: axis D should be 10, got 9"),
        (lambda: head(hidden[0, 0], previous), ShapeError, "hidden: expected 2? ?1? ?axes|hidden: expected 1 axes"),
        (lambda: head([1.0], previous), ShapeError, "hidden: expected a tensor"),
        (lambda: head(hidden[:, :0], previous[:, :0]), ShapeError, "hidden: every axis should be at least 1"),
        (lambda: head(hidden, previous[:, :2]), ShapeError, "previous: axis T should be 3, got 2"),
        (lambda: head(hidden[:, 0], previous), ShapeError, "previous: expected 4 axes"),
        (lambda: head(hidden, previous.mT), ShapeError, r"previous: got latents \(4, 5, 6\), this head was built for \(4, 6, 5\)"),
        (lambda: head(hidden, None), InputError, "previous: got None"),
        (lambda: head(hidden.double(), previous), InputError, "hidden: got torch.float64, expected torch.float32"),
        (lambda: head(hidden, previous.long()), InputError, "previous: got torch.int64"),
        (lambda: head(bad, previous), NonFiniteError, r"hidden: 1 of 60 values are NaN or Inf, the first at \(1, 2, 3\)"),
        (lambda: head(hidden, blown), NonFiniteError, r"previous: 1 of .* first at \(0, 1, 2, 3, 4\)"),
        (lambda: head(hidden, previous, hidden), InputError, "query: got one, but this head has no skip"),
        (lambda: skipping(hidden, previous), InputError, "query: got None"),
        (lambda: skipping(hidden, previous, hidden), ShapeError, "query: axis D should be 3, got 10"),
        (lambda: skipping(hidden, previous, hidden[:, :1, :3]), ShapeError, "query: axis T should be 3, got 1"),
    ):
        with pytest.raises(error, match=text) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options, text", [
    (dict(hidden_size=0), "hidden_size: got 0"),
    (dict(latent_shape=(4, 32)), r"latent_shape: got \(4, 32\), expected three"),
    (dict(latent_shape=32), "latent_shape: got 32, expected three"),
    (dict(latent_shape=(4, 0, 32)), "latent_shape: got 0"),
    (dict(width=10), "width: got 10, expected a multiple of 4"),
    (dict(width=0), "width: got 0"),
    (dict(query_dim=0), "query_dim: got 0"),
    (dict(previous_mode="noised"), "previous_mode: got 'noised'.*did you mean 'noise'"),
    (dict(start="copy"), "start: got 'copy'"),
    (dict(previous_noise=-1), "previous_noise: got -1"),
    (dict(previous_dropout=1), "previous_dropout: got 1"),
    (dict(previous_mode="remove", start="copy_last"), "start: got 'copy_last' with previous_mode='remove'"),
])
def test_options_are_checked(options, text):
    with pytest.raises(ConfigError, match=text):
        FiLMHead(**options)


def test_all_are_prediction_heads_and_nothing_global_moves():
    assert all(issubclass(head, PredictionHead) for head in HEADS.values()) and MLPHead.default_width == 2048
    before = torch.random.get_rng_state()
    for name in HEADS:
        head = make(name, previous_mode="noise", generator=None)
        before = torch.random.get_rng_state()
        head(*inputs(2), generator=generator(0, "noise"))
        assert torch.equal(before, torch.random.get_rng_state())
