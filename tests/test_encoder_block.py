"""Contracts of the encoder block: arms by name, the gate, dropout, what a block asks of its attention, the order of blocks, bad input."""
import pytest
import torch
from torch import nn

from fvlm.blocks.encoder_block import (ATTENTION_ARMS, EmbeddingEncoder, EncoderBlock, HybridAttention, attention_arm, check_arm, dropout,
                                       sinusoidal_positions)
from fvlm.core import ConfigError, InputError, ShapeError, generator


class Blind(nn.Module):
    "An attention block that shows nothing."

    def forward(self, x):
        return x.mean(1, keepdim=True).expand_as(x)


def encoder_of(width=8, embed_dim=8, **changes):
    return EmbeddingEncoder(embed_dim, width, 2, lambda index: EncoderBlock(Blind(), width, 16, dropout=0.0), context_frames=5, **changes)


def test_positions_have_every_shape_and_start_at_zero_and_one():
    for length, dim in ((4, 7), (4, 1), (1, 6)):
        found = sinusoidal_positions(length, dim)
        assert found.shape == (length, dim) and found[0].tolist() == [0.0, 1.0] * (dim // 2) + [0.0] * (dim % 2)


# attention by name


@pytest.mark.parametrize("name", ATTENTION_ARMS)
def test_an_arm_keeps_the_shape_and_shows_what_it_does(name):
    arm, x = attention_arm(name, 16, 4).eval(), torch.randn(3, 5, 16, generator=generator(0, "x"))
    out, seen = arm.with_intermediates(x)
    assert arm(x).shape == x.shape and seen["attention"].shape == (3, 4, 5, 5) and seen["heads"].shape[:3] == (3, 4, 5)
    torch.testing.assert_close(arm(x), out)
    causal = attention_arm(name, 16, 4, causal=True, head_dropout=0.5)
    assert not causal.eval().with_intermediates(x)[1]["attention"].triu(1).any()
    halves = [module.p for module in causal.modules() if type(module).__name__ == "HeadDropout"]
    assert halves and set(halves) == {0.5}


def test_a_rank_reaches_the_arms_that_have_one():
    assert {name: attention_arm(name, 16, 2, 6).with_intermediates(torch.zeros(1, 3, 16))[1]["heads"].shape[-1] for name in ("scmhsa", "hybrid", "mhsa")} == {
        "scmhsa": 6, "hybrid": 6, "mhsa": 8}


@pytest.mark.parametrize("arguments, words", [
    (("mhas", 16, 4), "did you mean 'mhsa'"),
    (("custom", 16, 4), "attention: got 'custom'"),
    (("mhsa", 16, 3), "num_heads: got 3, expected a divisor of the width 16"),
    (("hybrid", 16, 3), "num_heads"),
    (("mhsa_chunked", 16, 0), "num_heads"),
    (("scmhsa_folded", 16, 4, 8), "head_dim: got 8, expected None"),
])
def test_an_arm_that_cannot_be_is_refused(arguments, words):
    for call in (check_arm, attention_arm):
        with pytest.raises(ConfigError, match=words):
            call(*arguments)
    assert check_arm("scmhsa_folded", 16, 3, 16) == "scmhsa_folded"


def test_hybrid_starts_half_way_and_reaches_both_ends():
    block, x = HybridAttention(16, 2).eval(), torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(block(x), 0.5 * (block.concentrated(x) + block.ordinary(x)))
    for gate, side in ((30.0, block.concentrated), (-30.0, block.ordinary)):
        nn.init.constant_(block.gate, gate)
        torch.testing.assert_close(block(x), side(x))


# dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.99])
def test_dropout_keeps_and_scales_as_it_should(dtype, p):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = torch.ones(311, 1001, dtype=dtype, requires_grad=True)
        y = dropout(x, p, True)
        torch.manual_seed(0)
        assert torch.equal(y != 0, dropout(torch.ones(311, 1001), p, True) != 0), "one mask for every type"
    assert y.dtype == dtype and abs(float((y != 0).float().mean()) - (1 - p)) < 0.005
    assert float(y.max().detach()) == pytest.approx(1 / (1 - p), rel=1e-2)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    assert dropout(x, p, False) is x and dropout(x, 0.0, True) is x


def test_dropout_takes_odd_sizes_and_views():
    with torch.random.fork_rng(devices=[]):
        for x in (torch.ones(()), torch.ones(0, 3), torch.ones(7), torch.ones(5, 9).T):
            assert dropout(x, 0.5, True).shape == x.shape


# block and encoder


def test_a_silent_pre_norm_block_is_the_identity_and_a_post_norm_block_normalises():
    x = 3 * torch.randn(2, 5, 8, generator=generator(0, "x"))
    for norm in ("pre", "post"):
        block = EncoderBlock(attention_arm("mhsa", 8, 2), 8, 16, norm=norm, dropout=0.0)
        for part in (block.attention.proj, block.contract):
            nn.init.zeros_(part.weight), nn.init.zeros_(part.bias)
        out, seen = block(x)
        assert seen == {} and torch.equal(out, x) == (norm == "pre")
        assert norm == "pre" or torch.allclose(out.var(-1, unbiased=False), torch.ones(2, 5), atol=1e-4)


def test_blocks_are_asked_for_in_order_after_the_projection():
    "With one generator of random numbers, the order of draws is part of what a seed means."
    asked = []
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        first = nn.Linear(6, 8)
        torch.default_generator.manual_seed(0)
        encoder = EmbeddingEncoder(6, 8, 3, lambda index: (asked.append(index), EncoderBlock(Blind(), 8, 16))[1], context_frames=5)
    assert asked == [0, 1, 2] and torch.equal(encoder.embed.weight, first.weight)
    assert "positions" not in encoder.state_dict() and isinstance(encoder_of().embed, nn.Identity)


def test_noise_and_dropout_act_in_training_only():
    x = torch.randn(2, 5, 8, generator=generator(0, "x"))
    for changes in (dict(input_noise=1.0), dict(dropout=0.5)):
        encoder = encoder_of(**changes)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            assert not torch.equal(encoder.train()(x)["tokens"], encoder(x)["tokens"])
        assert torch.equal(encoder.eval()(x)["tokens"], encoder(x)["tokens"])


def test_the_attention_owes_a_shape_and_nothing_else():
    x = torch.zeros(2, 5, 8)
    assert [one.shape for one in encoder_of()(x)["hidden"]] == [x.shape] * 2
    with pytest.raises(InputError, match="Blind has no with_intermediates"):
        encoder_of()(x, intermediates=True)
    with pytest.raises(ShapeError, match=r"Linear returned shape \(2, 5, 7\), expected that of its input"):
        EncoderBlock(nn.Linear(8, 7), 8, 16)(x)


@pytest.mark.parametrize("build, words", [
    (lambda: EncoderBlock(Blind(), 8, 16, norm="before"), "norm: got 'before'"),
    (lambda: EncoderBlock(Blind(), 8, 16, activation="tanh"), "activation: got 'tanh'"),
    (lambda: EncoderBlock(Blind(), 8, 16, dropout=1.0), "dropout: got 1.0"),
    (lambda: encoder_of(dropout=-0.1), "dropout: got -0.1"),
    (lambda: encoder_of(input_noise=-1), "input_noise: got -1"),
])
def test_bad_settings(build, words):
    with pytest.raises(ConfigError, match=words):
        build()
