"""Contracts of the attention blocks: equality with two libraries, with their own explicit path and with their fold; no leak; one clear error each."""
import copy
import warnings

import pytest
import torch
from torch import nn

from fvlm.blocks.scmhsa import SCMHSA, FoldedSCMHSA
from fvlm.blocks.self_attention import MHSA, HeadDropout, SelfAttention, attend, attention_weights, prefers_fused
from fvlm.core import ConfigError, InputError, NonFiniteError, ShapeError, generator

ARMS = {
    "mhsa": lambda **kw: MHSA(24, 4, **kw),
    "mhsa_chunked": lambda **kw: MHSA(24, 4, chunked=True, **kw),
    "scmhsa": lambda **kw: SCMHSA(24, 4, **kw),
    "scmhsa_rank": lambda **kw: SCMHSA(24, 4, head_dim=10, **kw),
    "scmhsa_folded": lambda **kw: FoldedSCMHSA(24, 4, **kw),
}


def draw(*shape, stream="x"):
    return torch.randn(*shape, generator=generator(0, stream))


def loud(block):
    "The block with large random weights and biases, so that nothing hides behind a zero."
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            parameter.copy_(draw(*parameter.shape, stream=name) * (0.3 if parameter.dim() > 1 else 1.0))
    return block


@pytest.fixture(params=ARMS)
def arm(request):
    return ARMS[request.param]


def gradients(block, x):
    x = x.clone().requires_grad_()
    out = block(x)
    return [out.detach(), *torch.autograd.grad((out * draw(*out.shape, stream="upstream")).sum(), [x, *block.parameters()])]


# equality with libraries


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_mhsa_equals_torch(bias, causal):
    ours = loud(MHSA(24, 4, bias=bias, causal=causal))
    theirs = nn.MultiheadAttention(24, 4, bias=bias, batch_first=True)
    names = {"qkv.weight": "in_proj_weight", "qkv.bias": "in_proj_bias", "proj.weight": "out_proj.weight", "proj.bias": "out_proj.bias"}
    theirs.load_state_dict({names[name]: value for name, value in ours.state_dict().items()})
    x = draw(3, 7, 24)
    mask = torch.ones(7, 7, dtype=torch.bool).triu(1) if causal else None
    expected, weights = theirs(x, x, x, attn_mask=mask, average_attn_weights=False)
    torch.testing.assert_close(ours(x), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.attention(x), weights, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head_dim", [None, 1, 6, 24, 40])
def test_scmhsa_equals_timm_with_gradients(head_dim):
    from timm.layers import Attention

    ours = loud(SCMHSA(24, 4, head_dim))
    theirs = Attention(24, 4, attn_head_dim=ours.head_dim, qkv_bias=True)
    theirs.load_state_dict(ours.state_dict())
    theirs.fused_attn = False  # another route to the same numbers than ours
    x = draw(3, 7, 24)
    ours_all, theirs_all = gradients(ours, x), gradients(theirs, x)
    torch.testing.assert_close(ours_all[0], theirs_all[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours_all[1:], theirs_all[1:], atol=1e-4, rtol=1e-4)


def test_one_full_head_is_standard_attention():
    ours, theirs = loud(SCMHSA(24, 1)), nn.MultiheadAttention(24, 1, batch_first=True)
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = ours.qkv.weight.data, ours.qkv.bias.data
    theirs.out_proj.load_state_dict(ours.proj.state_dict())
    x = draw(3, 7, 24)
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dim,heads,width", [(24, 4, 24), (24, 4, 10), (16, 1, 16), (24, 3, 8)])
def test_parameter_counts(dim, heads, width):
    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert count(SCMHSA(dim, heads, width, bias=False)) == 4 * heads * dim * width
    assert count(SCMHSA(dim, heads, width)) == 4 * heads * dim * width + 3 * heads * width + dim
    assert count(FoldedSCMHSA(dim, heads, bias=False)) == 2 * heads * dim**2
    if dim % heads == 0:
        assert count(MHSA(dim, heads, bias=False)) == 4 * dim**2
        assert count(MHSA(dim, heads, chunked=True, bias=False)) == 3 * dim**2 // heads + dim**2


# the paths agree


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_fast_and_explicit_paths_agree(arm, causal, bias):
    block, x = loud(arm(causal=causal, bias=bias)), draw(3, 7, 24)
    out, seen = block.with_intermediates(x)
    assert seen["attention"].shape == (3, 4, 7, 7) and seen["heads"].shape == (3, 4, 7, block.head_dim) and out.shape == x.shape
    torch.testing.assert_close(seen["attention"].sum(-1), torch.ones(3, 4, 7))
    for fast, explicit in ((block(x), out), (block.heads(x), seen["heads"]), (block.attention(x), seen["attention"])):
        torch.testing.assert_close(fast, explicit, atol=1e-5, rtol=1e-5)
    total = block.contributions(x).sum(1) + (block.proj.bias if bias else 0)
    torch.testing.assert_close(total, out, atol=1e-4, rtol=1e-4)


def test_every_row_of_the_dispatch_agrees():
    rows = set()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        for tokens, width in ((5, 8), (5, 160), (80, 160)):
            for grad in (False, True):
                q, k, v = (draw(2, 3, tokens, width, stream=s).to(dtype).requires_grad_(grad) for s in "qkv")
                with torch.set_grad_enabled(grad):
                    rows.add(prefers_fused("cpu", dtype, grad, tokens, width))
                    for causal in (False, True):
                        torch.testing.assert_close(attend(q, k, v, causal=causal), attention_weights(q, k, causal=causal) @ v, atol=tolerance, rtol=tolerance)
    assert rows == {True, False}
    assert prefers_fused("cuda", torch.bfloat16, True, 16, 64) and not prefers_fused("cpu", torch.bfloat16, True, 16, 64)


def test_folded_fused_path_agrees():
    for causal in (False, True):
        block, x = loud(FoldedSCMHSA(24, 4, causal=causal)), draw(2, 7, 24)
        torch.testing.assert_close(block._fused(x), block._attention(x) @ x, atol=1e-5, rtol=1e-5)


# folding


@pytest.mark.filterwarnings("ignore:folding")
@pytest.mark.parametrize("head_dim", [None, 1, 13, 40])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_fold_is_the_same_function(head_dim, bias, causal):
    block, x = loud(SCMHSA(24, 4, head_dim, bias=bias, causal=causal)), draw(3, 7, 24)
    folded = block.fold()
    scale = block(x).abs().max().clamp(min=1)
    assert (folded(x) - block(x)).abs().max() / scale < 1e-5
    torch.testing.assert_close(folded.attention(x), block.attention(x), atol=1e-5, rtol=1e-5)
    if not bias:  # with biases each head's share of the constant has moved into the output bias
        torch.testing.assert_close(folded.contributions(x), block.contributions(x), atol=1e-4, rtol=1e-4)


def test_fold_in_float64_is_exact_to_rounding():
    block, x = loud(SCMHSA(24, 4)).double(), draw(3, 7, 24).double()
    folded = block.fold()
    assert folded.proj.weight.dtype == torch.float64
    torch.testing.assert_close(folded(x), block(x), atol=1e-12, rtol=1e-12)


def test_fold_says_when_it_saves_nothing():
    with pytest.warns(UserWarning, match="head_dim=12 of dim=24 saves nothing"):
        SCMHSA(24, 4, head_dim=12).fold()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SCMHSA(24, 4, head_dim=13).fold()


def test_fold_carries_settings_and_leaves_the_source_alone():
    block = loud(SCMHSA(24, 4, causal=True, head_dropout=0.25)).eval()
    before = copy.deepcopy(block.state_dict())
    folded = block.fold()
    assert folded.causal and folded.drop_heads.p == 0.25 and not folded.training
    assert all(p.requires_grad and p.is_leaf for p in folded.parameters())
    with torch.no_grad():
        [p.zero_() for p in folded.parameters()]
    assert all(torch.equal(before[name], value) for name, value in block.state_dict().items())


def test_folded_on_its_own_starts_like_a_fold():
    ours, fold = FoldedSCMHSA(96, 2), SCMHSA(96, 2).fold()
    for name, parameter in ours.named_parameters():
        other = dict(fold.named_parameters())[name]
        assert parameter.shape == other.shape and 0.9 < parameter.std() / other.std() < 1.1 or parameter.dim() == 1
    assert not torch.equal(ours.score.weight, fold.score.weight)


def test_folded_trains():
    block, x = FoldedSCMHSA(24, 4), draw(8, 5, 24)
    target = SCMHSA(24, 4)(x).detach()
    optimiser = torch.optim.Adam(block.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = (block(x) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


# no leak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_leaks_nothing_at_all(arm, dtype):
    block, x = loud(arm(causal=True)).to(dtype), draw(2, 9, 24).to(dtype)
    for now in (1, 4, 8):
        changed = x.clone()
        changed[:, now:] = 50 * draw(2, 9 - now, 24, stream="future").to(dtype)
        for function in (block, block.heads, lambda z: block.with_intermediates(z)[0]):
            before, after = function(x), function(changed)
            axis = before.dim() - 2
            assert torch.equal(before.narrow(axis, 0, now), after.narrow(axis, 0, now))
            assert not torch.equal(before.narrow(axis, now, 1), after.narrow(axis, now, 1))
        assert (block.attention(x).triu(1) == 0).all()


def test_not_causal_sees_the_future(arm):
    block, x = loud(arm()), draw(1, 5, 24)
    changed = x.clone()
    changed[:, 4] += 1
    assert not torch.equal(block(x)[:, 0], block(changed)[:, 0])


def test_clips_of_a_batch_do_not_meet(arm):
    block, x = loud(arm()), draw(3, 5, 24)
    changed = x.clone()
    changed[1] += 1
    same = (block(x) == block(changed)).flatten(1).all(1)
    assert same.tolist() == [True, False, True]


def test_a_chunked_head_reads_its_chunk_only():
    block, x = loud(MHSA(24, 4, chunked=True)), draw(1, 5, 24)
    for chunk in range(4):
        changed = x.clone()
        changed[..., 6 * chunk : 6 * chunk + 6] += 1
        moved = (block.heads(x) != block.heads(changed)).any(-1).any(-1)[0]
        assert moved.tolist() == [head == chunk for head in range(4)]


def test_chunked_equals_standard_with_block_diagonal_weights():
    chunked, dense = loud(MHSA(24, 4, chunked=True)), MHSA(24, 4)
    with torch.no_grad():
        dense.qkv.weight.copy_(torch.cat([torch.block_diag(*part) for part in chunked.qkv.weight]))
        dense.qkv.bias.copy_(chunked.qkv.bias)
        dense.proj.load_state_dict(chunked.proj.state_dict())
    x = draw(2, 5, 24)
    torch.testing.assert_close(chunked(x), dense(x), atol=1e-5, rtol=1e-5)


# head dropout


def test_head_dropout_silences_whole_heads_and_keeps_the_mean():
    dropout, heads = HeadDropout(0.25), torch.ones(4000, 4, 2, 3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dropped = dropout(heads)
    per_head = dropped.flatten(2)
    assert (per_head == per_head[..., :1]).all()  # all of a head, or nothing of it
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])
    assert abs(dropped.mean() - 1) < 0.02
    assert dropout.eval()(heads) is heads


def test_head_dropout_acts_in_training_only(arm):
    block, x = loud(arm(head_dropout=0.5)), draw(2, 5, 24)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not torch.equal(block(x), block(x))
    block.eval()
    torch.testing.assert_close(block(x), block(x), atol=0, rtol=0)
    same = loud(arm()).eval()
    torch.testing.assert_close(block(x), same(x), atol=0, rtol=0)


def test_nothing_draws_without_dropout(arm):
    block, x = arm(), draw(2, 5, 24)
    state = torch.get_rng_state()
    block(x), block.with_intermediates(x)
    assert torch.equal(state, torch.get_rng_state())


# types, compilers, edges


def test_bfloat16_and_autocast(arm):
    block, x = loud(arm()), draw(2, 5, 24)
    expected = block(x)
    with torch.autocast("cpu", torch.bfloat16):
        for out in (block(x), block.with_intermediates(x)[0]):
            assert out.dtype == torch.bfloat16
            assert (out.float() - expected).abs().max() / expected.abs().max() < 4e-2
    with torch.no_grad():
        out = copy.deepcopy(block).to(torch.bfloat16)(x.to(torch.bfloat16))
    assert (out.float() - expected).abs().max() / expected.abs().max() < 4e-2


def test_autocast_gradients_are_near(arm):
    block, x = loud(arm()), draw(2, 5, 24)
    exact = gradients(block, x)
    with torch.autocast("cpu", torch.bfloat16):
        near = gradients(block, x)
    for a, b in zip(near, exact):
        assert (a.float() - b).norm() <= 5e-2 * b.norm() + 1e-3


def test_compiles_without_a_break(arm):
    block, x = loud(arm(causal=True)), draw(2, 5, 24)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), block(x))


def test_gradcheck(arm):
    block, x = loud(arm(causal=True)).double(), draw(1, 3, 24).double().requires_grad_()
    assert torch.autograd.gradcheck(block, x, fast_mode=True)


def test_edges(arm):
    block = arm()
    assert block(draw(0, 5, 24)).shape == (0, 5, 24)
    assert block(draw(2, 1, 24)).shape == (2, 1, 24)
    transposed = draw(5, 2, 24).transpose(0, 1)
    torch.testing.assert_close(block(transposed), block(transposed.contiguous()))
    again = arm()
    again.load_state_dict(block.state_dict())
    assert torch.equal(block(transposed), again(transposed))
    assert "num_heads=4" in repr(block)


# bad input: one clear error each


@pytest.mark.parametrize("make,error,message", [
    (lambda: MHSA(10, 4), InputError, "dim: got 10, expected a multiple of num_heads=4"),
    (lambda: MHSA(16, 0), ConfigError, "num_heads: got 0"),
    (lambda: MHSA(0, 4), ConfigError, "dim: got 0"),
    (lambda: SCMHSA(16, -1), ConfigError, "num_heads: got -1"),
    (lambda: SCMHSA(16, 2.5), ConfigError, "num_heads: got 2.5, expected a whole number"),
    (lambda: SCMHSA(16, 4, 0), ConfigError, "head_dim: got 0"),
    (lambda: FoldedSCMHSA(16, 0), ConfigError, "num_heads: got 0"),
    (lambda: SelfAttention(16, 4, -3), ConfigError, "head_dim: got -3"),
    (lambda: MHSA(16, 4, head_dropout=1), ConfigError, r"head_dropout: got 1, expected a number in \[0, 1\)"),
    (lambda: SCMHSA(16, 4, head_dropout=-0.1), ConfigError, "head_dropout: got -0.1"),
    (lambda: FoldedSCMHSA(16, 4, head_dropout=float("nan")), ConfigError, "head_dropout: got nan"),
    (lambda: FoldedSCMHSA(16, 4, source=SCMHSA(8, 4)), InputError, "source"),
])
def test_bad_settings(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_unknown_option_is_not_swallowed(arm):
    with pytest.raises(TypeError, match="casual"):
        arm(casual=True)


BAD = {
    "two axes": (lambda: draw(5, 24), ShapeError, r"x: expected 3 axes \(B T D\), got shape \(5, 24\)"),
    "four axes": (lambda: draw(1, 2, 5, 24), ShapeError, "x: expected 3 axes"),
    "width": (lambda: draw(2, 5, 23), ShapeError, "x: axis D should be 24, got 23"),
    "no frames": (lambda: draw(2, 0, 24), ShapeError, "x: axis T should be at least 1, got 0"),
    "list": (lambda: [[1.0]], ShapeError, "x: expected a tensor of shape .*, got list"),
    "none": (lambda: None, ShapeError, "x: expected a tensor of shape .*, got NoneType"),
    "integers": (lambda: torch.ones(2, 5, 24, dtype=torch.int64), InputError, "x: got torch.int64, expected torch.float32"),
    "float64": (lambda: draw(2, 5, 24).double(), InputError, "x: got torch.float64, expected torch.float32"),
    "nan": (lambda: draw(2, 5, 24).index_fill(1, torch.tensor(3), float("nan")), NonFiniteError, r"x: 48 of 240 values are NaN or Inf, the first at \(0, 3, 0\)"),
    "inf": (lambda: draw(2, 5, 24).index_fill(2, torch.tensor(0), float("-inf")), NonFiniteError, "x: 10 of 240"),
    "inf - inf": (lambda: torch.tensor([float("inf"), float("-inf")]).repeat(60).view(1, 5, 24), NonFiniteError, "x: 120 of 120"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("method", ["__call__", "heads", "attention", "with_intermediates", "contributions"])
def test_bad_input(arm, case, method):
    make, error, message = BAD[case]
    with pytest.raises(error, match=message):
        getattr(arm(), method)(make())


def test_integers_do_not_slip_through_autocast(arm):
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(InputError, match="x: got torch.int64"):
        arm()(torch.ones(2, 5, 24, dtype=torch.int64))


def test_large_but_finite_passes_the_guard():
    huge = torch.full((1, 5, 24), torch.finfo(torch.float32).max)
    assert not torch.isfinite(huge.sum())
    with torch.no_grad():
        SCMHSA(24, 4).project(huge)  # an honest overflow later is not the guard's business


def test_guard_in_bfloat16():
    block, x = SCMHSA(24, 4).to(torch.bfloat16), draw(2, 5, 24).to(torch.bfloat16)
    x[1, 2, 3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"x: 1 of 240 values are NaN or Inf, the first at \(1, 2, 3\)"):
        block(x)
