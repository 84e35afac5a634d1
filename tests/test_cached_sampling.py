"""Sampling with everything kept equals a pass for every code: same codes, same logits, whatever the model and the options."""
import pytest
import torch

from fvlm.blocks.causal_stacks import CausalTrunk, TrunkCache
from fvlm.blocks.codebook_tree import CodebookTree
from fvlm.blocks.pixelcnn import SpatiotemporalPixelCNN
from fvlm.core import generator
from tests.drawn_pixelcnn import drawn_pixelcnn


def made(**changes):
    "A small model whose answers are far from even."
    return drawn_pixelcnn(spread=0.15, **{"num_codes": 4, "grid": (3, 4), "attention_frames": 2, **changes})


def context_of(model, clips=2, frames=2):
    return torch.randint(model.num_codes, (clips, frames, model.num_levels, *model.grid), generator=generator(0, "context"))


def both(model, context, frames, **options):
    "(codes, logits) with and without the cache, from the same generator."
    found = []
    for cached in (True, False):
        rng = None if options.get("greedy") else generator(0, "draws")
        found.append(model.sample(context, frames, cached=cached, generator=rng, return_logits=True, **options))
    return found


MODELS = {
    "attention, two levels": dict(), "no attention": dict(attention_every=0), "one level": dict(num_levels=1), "three levels, by code": dict(num_levels=3, books="code"), "three levels, flat": dict(num_levels=3, books="shared"),
    "one frame": dict(kernel=(1, 3, 3)), "three frames": dict(kernel=(3, 3, 3)), "wide": dict(kernel=(2, 5, 5)), "flat kernel": dict(kernel=(2, 1, 1)), "this frame only": dict(attention_frames=1), "five frames in sight": dict(attention_frames=5),
    "attention in the middle": dict(depth=3, attention_every=2), "one column": dict(grid=(3, 1)), "one row": dict(grid=(1, 4)), "codewords of a tree": dict(tree=CodebookTree(5, 4, 2)),
}


@pytest.mark.parametrize("name", MODELS)
def test_cached_sampling_is_naive_sampling_code_for_code(name):
    model = made(**MODELS[name])
    (codes, logits), (naive, naive_logits) = both(model, context_of(model), 3)
    assert codes.shape == (2, 3, model.num_levels, *model.grid) and codes.dtype == torch.int64
    assert torch.equal(codes, naive) and torch.allclose(logits, naive_logits, atol=1e-4)
    assert codes.unique().numel() > 1


@pytest.mark.parametrize("options", [dict(greedy=True), dict(temperature=0.3), dict(temperature=2.0, top_k=2), dict(top_k=1)], ids=str)
@pytest.mark.parametrize("frames", [1, 4])
def test_and_with_every_option(options, frames):
    model = made()
    (codes, logits), (naive, naive_logits) = both(model, context_of(model, clips=3, frames=frames), 2, **options)
    assert torch.equal(codes, naive) and torch.allclose(logits, naive_logits, atol=1e-4)
    if options.get("greedy") or options.get("top_k") == 1:
        assert torch.equal(codes, logits.argmax(-1))


def test_the_logits_are_those_of_one_parallel_pass_over_what_was_drawn():
    model, context = made(), context_of(made())
    codes, logits = model.sample(context, 6, generator=generator(1), return_logits=True)
    with torch.no_grad():
        parallel = model(torch.cat([context, codes], 1), start=2)
    assert torch.allclose(logits, parallel, atol=1e-4)


def test_context_codes_are_never_altered():
    model = made()
    for context in (context_of(model), context_of(model).int()):
        before = context.clone()
        for cached in (True, False):
            future = model.sample(context, 2, cached=cached, generator=generator(2))
            assert torch.equal(context, before) and future.data_ptr() != context.data_ptr()


def test_draws_have_a_key_and_clips_do_not_look_at_each_other():
    model, context = made(), context_of(made())
    first, again, other = (model.sample(context, 2, generator=generator(key)) for key in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    greedy = model.sample(context, 3, greedy=True)
    assert torch.equal(greedy, torch.cat([model.sample(clip, 3, greedy=True) for clip in context.split(1)]))
    state = torch.get_rng_state()
    model.sample(context, 1, generator=generator(3)), model.sample(context, 1, greedy=True)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(0)
    drawn = model.sample(context, 1)
    torch.manual_seed(0)
    assert torch.equal(drawn, model.sample(context, 1))


def test_frequencies_are_the_probabilities():
    "One site, two levels: how often each pair of codes is drawn, against the model's own probabilities."
    model = made(grid=(1, 1), num_codes=3)
    context = torch.zeros(1, 1, 2, 1, 1, dtype=torch.long)
    drawn = model.sample(context.expand(20000, -1, -1, -1, -1), 1, generator=generator(5))[:, 0, :, 0, 0]
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    with torch.no_grad():
        videos = torch.cat([context.expand(9, -1, -1, -1, -1), pairs.view(9, 1, 2, 1, 1)], 1)
        share = model(videos, start=1).log_softmax(-1).gather(-1, videos[:, 1:].unsqueeze(-1)).flatten(1).sum(1).exp()
    found = torch.bincount(drawn[:, 0] * 3 + drawn[:, 1], minlength=9) / len(drawn)
    assert abs(share.sum().item() - 1) < 1e-5 and (found - share).abs().max() < 0.015


def test_what_comes_out_can_be_trained_on():
    model = made()
    future, logits = model.sample(context_of(model), 2, greedy=True, return_logits=True)
    assert not future.is_inference() and not logits.is_inference() and not logits.requires_grad
    model.loss(future, 1)["loss"].backward()


def test_sampling_follows_the_weights_as_they_are_now():
    "Nothing of an earlier call is kept."
    model, context = made(), context_of(made())
    before = model.sample(context, 1, greedy=True, return_logits=True)[1]
    with torch.no_grad():
        model.site.weight.mul_(-1)
    after, naive = (model.sample(context, 1, greedy=True, cached=cached, return_logits=True)[1] for cached in (True, False))
    assert torch.allclose(after, naive, atol=1e-4) and not torch.allclose(before, after, atol=1e-2)


def test_double_precision_agrees_to_its_last_digits():
    trunk = CausalTrunk(6, 3, (3, 3), attention_every=1, num_heads=2, attention_frames=3).double()
    x = torch.randn(2, 7, 3, 3, 6, dtype=torch.float64, generator=generator(6))
    with torch.no_grad():
        cache, rows = TrunkCache(trunk, x[:, :2]), []
        for t in range(2, 7):
            cache.begin_frame(x[:, t - 1])
            for r in range(3):
                cache.begin_row(x[:, t, r - 1] if r else cache.no_row)
                rows.append(torch.stack([cache.step(x[:, t, r, s - 1] if s else cache.nothing) for s in range(3)], 1))
        assert torch.allclose(torch.stack(rows, 1).view(2, 5, 3, 3, 6), trunk(x, start=2), atol=1e-12)
