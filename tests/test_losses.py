"""Losses: closed-form extremes, a loop over pairs as oracle, gradients at zero, one clear error a mistake."""

import math

import pytest
import torch

from fvlm.core import ConfigError, InputError, NonFiniteError, ShapeError, generator
from fvlm.objectives.losses import (
    CONTRAST_KINDS, SIMILARITY_KINDS, caption_loss, contrastive_loss, embedding_mse_loss, entropy_margin_loss, pixel_loss, query_diversity_loss, semantic_similarity_loss,
    unit_vectors,
)

KINDS = list(SIMILARITY_KINDS)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=generator(seed, "losses"), dtype=dtype)


def by_loop(heads, kind):
    value = {"cos2": lambda c: c**2, "cos": lambda c: c, "pull": lambda c: 1 - c}[kind]
    cosines = [torch.cosine_similarity(heads[:, i], heads[:, j], dim=-1) for j in range(heads.shape[1]) for i in range(j)]
    return value(torch.stack(cosines)).mean()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 2, 3, 4), (1, 8, 5, 16), (3, 16, 1, 2), (2, 3, 7, 1)])
def test_equals_the_loop_over_pairs_in_value_and_gradient(kind, shape):
    heads = randn(*shape).requires_grad_()
    came, expected = semantic_similarity_loss(heads, kind), by_loop(heads, kind)
    torch.testing.assert_close(came, expected)
    torch.testing.assert_close(torch.autograd.grad(came, heads), torch.autograd.grad(expected, heads))


@pytest.mark.parametrize(("sign", "expected"), [(1.0, (1, 1, 0)), (0.0, (0, 0, 1)), (-1.0, (1, -1, 2))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_closed_form_extremes(sign, expected, dtype):
    x = randn(4, 1, 5, 8)
    other = sign * 3 * x if sign else torch.cat([-x[..., 4:], x[..., :4]], -1)  # rotated by 90 degrees in four planes
    heads = torch.cat([x, other], 1).to(dtype)
    for kind, value in zip(KINDS, expected):
        assert semantic_similarity_loss(heads, kind).item() == pytest.approx(value, abs=1e-2 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_order_and_scale_of_the_heads_do_not_matter(kind):
    heads = randn(2, 5, 3, 8)
    expected = semantic_similarity_loss(heads, kind)
    torch.testing.assert_close(semantic_similarity_loss(heads[:, [4, 2, 0, 1, 3]], kind), expected)
    torch.testing.assert_close(semantic_similarity_loss(heads * (randn(2, 5, 3, 1, seed=1).abs() + 0.1), kind), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_weigh_the_same_whatever_their_sizes(kind):
    blocks = [randn(2, 4, 3, 8), randn(2, 8, 3, 16, seed=1), randn(1, 2, 9, 4, seed=2)]
    expected = torch.stack([semantic_similarity_loss(b, kind) for b in blocks]).mean()
    torch.testing.assert_close(semantic_similarity_loss(blocks, kind), expected)
    torch.testing.assert_close(semantic_similarity_loss(tuple(blocks), kind), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_vectors_have_cosine_zero_and_a_finite_gradient(kind, dtype):
    heads = randn(2, 3, 4, 8).to(dtype)
    heads[:, 0] = 0
    heads[0, :, 1] = 0
    heads.requires_grad_()
    value = semantic_similarity_loss(heads, kind)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(heads.grad).all()
    assert not heads.grad[:, 0].any() and heads.grad[1, 1].any()
    pairs = torch.cosine_similarity(heads[1, 1].double(), heads[1, 2].double(), dim=-1)
    assert semantic_similarity_loss(heads[1:], "cos").item() == pytest.approx(pairs.mean().item() / 3, abs=1e-5)  # 1 of 3 pairs is not zero


def test_tiny_vectors_have_bounded_gradients():
    heads = (randn(1, 2, 1, 8) * 1e-9).requires_grad_()
    semantic_similarity_loss(heads, "cos").backward()
    assert not heads.grad.any()  # too short to have a direction
    x = unit_vectors(randn(3, 8) * 1e-3)
    torch.testing.assert_close(x.square().sum(-1), torch.ones(3, dtype=torch.float64))


def test_autocast_does_not_coarsen_the_gram_matrix():
    heads = randn(2, 8, 5, 64, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        came = semantic_similarity_loss(heads)
    assert came.item() == pytest.approx(by_loop(heads.double(), "cos2").item(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_heads_are_named(kind, bad):
    heads = [randn(2, 3, 4, 8), randn(2, 3, 4, 8)]
    heads[1][1, 2, 3, 4] = bad
    with pytest.raises(NonFiniteError, match=r"heads\[1\]: 1 of 192 values .* \(1, 2, 3, 4\)"):
        semantic_similarity_loss(heads, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_that_overflow_are_an_error_not_a_zero(kind):
    with pytest.raises(NonFiniteError, match="overflow"):
        semantic_similarity_loss(torch.full((1, 2, 1, 4), 1e25), kind)


def test_bad_heads():
    with pytest.raises(ShapeError, match="at least 2 heads on axis 1, got 1"):
        semantic_similarity_loss(randn(2, 1, 4, 8))
    with pytest.raises(ShapeError, match=r"expected 4 axes \(B H T d\)"):
        semantic_similarity_loss(randn(2, 4, 8))
    with pytest.raises(ShapeError, match="empty list"):
        semantic_similarity_loss([])
    with pytest.raises(ShapeError, match="non-empty"):
        semantic_similarity_loss(randn(0, 2, 4, 8))
    with pytest.raises(ShapeError, match="floating-point"):
        semantic_similarity_loss(torch.ones(1, 2, 3, 4, dtype=torch.int64))
    with pytest.raises(ConfigError, match="'cos2', 'cos', 'pull'"):
        semantic_similarity_loss(randn(1, 2, 3, 4), "cosine")
    with pytest.raises(ShapeError, match="ndarray|list|str"):
        semantic_similarity_loss(["heads"])


def test_embedding_mse_loss():
    a, b = randn(4, 5, 8).requires_grad_(), randn(4, 5, 8, seed=1)
    torch.testing.assert_close(embedding_mse_loss(a, b), torch.nn.functional.mse_loss(a, b))
    half = embedding_mse_loss(torch.full((2, 8), 300.0, dtype=torch.float16), torch.zeros(2, 8, dtype=torch.float16))
    assert half.dtype == torch.float32 and half.item() == 9e4  # would be inf in float16


def test_pixel_loss():
    a, b = randn(1, 2, 3, 8, 8).requires_grad_(), randn(1, 2, 3, 8, 8, seed=1).sigmoid()
    torch.testing.assert_close(pixel_loss(a, b), torch.nn.functional.mse_loss(a, b))
    torch.testing.assert_close(pixel_loss(a, b, "l1"), torch.nn.functional.l1_loss(a, b))
    with pytest.raises(ConfigError, match="kind"):
        pixel_loss(a, b, "huber")
    with pytest.raises(InputError, match=r"in \[0, 1\].*divide bytes by 255"):
        pixel_loss(a, b * 255)
    with pytest.raises(InputError, match="floating-point"):
        pixel_loss(a, (b * 255).to(torch.uint8))


@pytest.mark.parametrize("loss", [embedding_mse_loss, pixel_loss])
def test_bad_pairs(loss):
    good = torch.rand(2, 3, 8, 8, generator=generator(0))
    broken = good.clone()
    broken[0, 0, 1, 2] = float("nan")
    with pytest.raises(NonFiniteError, match=r"prediction: 1 of .* \(0, 0, 1, 2\)"):
        loss(broken, good)
    with pytest.raises(NonFiniteError, match="target"):
        loss(good, broken)
    with pytest.raises(NonFiniteError, match="overflow"):
        loss(good * 1e30, good)
    with pytest.raises(ShapeError, match="nothing is broadcast"):
        loss(good, good[:1])
    with pytest.raises(ShapeError, match="expected a tensor"):
        loss(good.tolist(), good)
    with pytest.raises(ShapeError, match="at least one value"):
        loss(good[:0], good[:0])


# --- foveation: entropy margin ---------------------------------------------------------------------------------------

def attention(*shape, seed=0, sharpness=1.0, dtype=torch.float64):
    return (sharpness * randn(*shape, seed=seed, dtype=torch.float64)).softmax(-1).to(dtype)


def test_entropy_margin_is_the_hinge_of_each_row():
    fine, coarse = attention(2, 3, 4, 1, 9, sharpness=2.0), attention(2, 3, 4, 1, 9, seed=1)
    difference = torch.distributions.Categorical(fine).entropy() - torch.distributions.Categorical(coarse).entropy()
    assert (difference + 0.5 < 0).any() and (difference + 0.5 > 0).any()
    for margin in (0.0, 0.5, 2.0):
        torch.testing.assert_close(entropy_margin_loss(fine, coarse, margin), (difference + margin).clamp_min(0).mean())
    layers = [attention(2, 3, 4, 1, 9, seed=2), attention(1, 5, seed=3)], [attention(2, 3, 4, 1, 9, seed=4), attention(1, 5, seed=5)]
    torch.testing.assert_close(entropy_margin_loss(*layers), (entropy_margin_loss(layers[0][0], layers[1][0]) + entropy_margin_loss(layers[0][1], layers[1][1])) / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_entropy_margin_closed_form_in_nats(dtype):
    wide, narrow = torch.full((2, 16), 1 / 16, dtype=dtype), torch.eye(16, dtype=dtype)[:2]
    four = torch.cat([torch.full((2, 4), 0.25, dtype=dtype), torch.zeros(2, 12, dtype=dtype)], 1)
    for fine, coarse, value in ((wide, wide, 0.5), (narrow, wide, 0.0), (wide, narrow, math.log(16) + 0.5), (four, narrow, math.log(4) + 0.5), (four, wide, 0.0)):
        assert entropy_margin_loss(fine, coarse).item() == pytest.approx(value, abs=1e-6)


def test_entropy_margin_gradient_is_finite_at_hard_attention():
    fine = torch.eye(5, dtype=torch.float64)[:2].requires_grad_()
    wide = torch.full((2, 5), 0.2, dtype=torch.float64)
    entropy_margin_loss(fine, wide, margin=3.0).backward()
    assert torch.isfinite(fine.grad).all() and not fine.grad[0, 1:].any()
    scores = randn(3, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: entropy_margin_loss(x.softmax(-1), torch.full((3, 6), 1 / 6, dtype=torch.float64), 2.0), scores)
    kept = scores.masked_fill(torch.arange(6) > 2, -math.inf).softmax(-1)  # top-k
    (gradient,) = torch.autograd.grad(entropy_margin_loss(kept, wide.new_full((3, 6), 1 / 6), 2.0), scores)
    assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0


def test_entropy_margin_mistakes():
    good = attention(2, 3, 8)
    broken = good.clone()
    broken[1, 2, 3] = float("nan")
    for fine, coarse, error, said in (
        (good, good[..., :4] * 2, ShapeError, "fine_attention.0. and coarse_attention.0.: expected one shape"),
        ([good, good], [good], ShapeError, "same number of layers, at least one, got 2 and 1"), ([], [], ShapeError, "at least one"),
        (good, good * 1.2, InputError, "coarse_attention.0.: expected rows of probabilities"), (good.log(), good, InputError, "fine_attention.0."),
        ([good, broken], [good, good], NonFiniteError, r"fine_attention\[1\]: 1 of 48 values .* \(1, 2, 3\)"),
    ):
        with pytest.raises(error, match=said):
            entropy_margin_loss(fine, coarse)
    with pytest.raises(ConfigError, match="margin"):
        entropy_margin_loss(good, good, -0.1)


# --- foveation: contrast and diversity -------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", list(CONTRAST_KINDS))
def test_contrast_closed_form(kind, dtype):
    x, mean = randn(2, 3, 8), 4 * randn(2, 3, 8, seed=1) if kind == "centred" else None
    quarter = torch.cat([-x[..., 4:], x[..., :4]], -1)
    for other, value in ((3 * x, 1), (quarter, 0), (-x, -1)):
        shift = 0 if mean is None else mean
        came = contrastive_loss((x + shift).to(dtype), (other + shift).to(dtype), kind, None if mean is None else mean.to(dtype))
        assert came.dtype != torch.bfloat16 and came.item() == pytest.approx(value, abs=5e-2 if dtype == torch.bfloat16 else 1e-5)


def test_contrast_equals_the_plain_formula_and_centring_matters():
    fine, coarse, mean = randn(2, 3, 8).requires_grad_(), randn(2, 3, 8, seed=1), 10 + randn(2, 3, 8, seed=2)
    torch.testing.assert_close(contrastive_loss(fine, coarse), torch.cosine_similarity(fine, coarse, dim=-1).mean())
    centred = contrastive_loss(fine + mean, coarse + mean, "centred", mean)
    torch.testing.assert_close(centred, contrastive_loss(fine, coarse))
    assert contrastive_loss(fine + mean, coarse + mean) > 0.9 > 0.5 > centred
    (gradient,) = torch.autograd.grad(centred, fine)
    assert gradient.abs().sum() > 0
    same = coarse.clone().requires_grad_()
    contrastive_loss(same, same.detach(), "centred", same.detach().clone()).backward()  # both are the mean: no direction, no gradient
    assert not same.grad.any()


def test_contrast_mistakes():
    x = randn(2, 3, 8)
    for arguments, error, said in (
        ((x, x, "center"), ConfigError, "'raw', 'centred'"), ((x, x, "centred"), ConfigError, "needs the mean over patches"), ((x, x, "raw", x), ConfigError, "does not use it"),
        ((x, x[:1]), ShapeError, "fine and coarse: expected one shape"), ((x, x, "centred", x[:, :1]), ShapeError, "fine and mean: expected one shape"),
        ((x * float("nan"), x), NonFiniteError, "fine: 48 of 48"), ((x, x, "centred", x / 0), NonFiniteError, "mean"),
    ):
        with pytest.raises(error, match=said):
            contrastive_loss(*arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_query_diversity_is_the_similarity_of_queries(kind):
    x, mean = randn(2, 3, 4, 8), randn(2, 3, 8, seed=1)
    torch.testing.assert_close(query_diversity_loss(x, kind), by_loop(x.transpose(1, 2), kind))
    torch.testing.assert_close(query_diversity_loss(x, kind, mean), by_loop((x - mean[:, :, None]).transpose(1, 2), kind))
    with pytest.raises(ShapeError, match="at least 2 queries on axis 2, got 1"):
        query_diversity_loss(x[:, :, :1], kind)
    with pytest.raises(ShapeError, match="mean: axis T should be 3, got 4"):
        query_diversity_loss(x, kind, randn(2, 4, 8))


# --- captions --------------------------------------------------------------------------------------------------------

def test_caption_loss_is_the_mean_over_real_words():
    logits = randn(2, 4, 7).requires_grad_()
    labels = torch.tensor([[3, 1, 6, -100], [6, -100, -100, -100]])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    came = caption_loss(logits, labels)
    torch.testing.assert_close(came, expected)
    torch.testing.assert_close(torch.autograd.grad(came, logits), torch.autograd.grad(expected, logits))
    assert caption_loss(torch.zeros(1, 3, 7), labels[:1, :3]).item() == pytest.approx(math.log(7))
    torch.testing.assert_close(caption_loss(logits, labels.where(labels >= 0, 5), ignore_index=5), expected)  # no label is 5
    sure = 100 * torch.nn.functional.one_hot(labels.clamp_min(0), 7).double()
    assert caption_loss(sure, labels) < 1e-9


def test_the_end_of_the_sentence_is_trained_and_padding_is_not():
    logits, end = torch.zeros(1, 4, 7, requires_grad=True), 6
    caption_loss(logits, torch.tensor([[2, end, -100, -100]])).backward()
    assert logits.grad[0, 1, end] < 0 and not logits.grad[0, 2:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_without_captions_costs_nothing_and_has_a_graph(dtype):
    logits = randn(2, 3, 5, dtype=torch.float32).to(dtype).requires_grad_()
    loss = caption_loss(logits, torch.full((2, 3), -100))
    loss.backward()
    assert loss.item() == 0.0 and loss.dtype == torch.float32 and torch.equal(logits.grad, torch.zeros_like(logits))
    broken = torch.full((1, 1, 5), float("nan"), requires_grad=True)  # padding may hold anything
    caption_loss(broken, torch.tensor([[-100]])).backward()
    assert torch.isfinite(broken.grad).all()


def test_caption_mistakes():
    logits, labels = randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
    for arguments, error, said in (
        ((logits, labels[:, :2]), ShapeError, "labels: axis C should be 3, got 2"), ((logits[0], labels), ShapeError, "B C V"), ((logits, labels.int()), InputError, "int64"),
        ((logits, labels + 5), InputError, "expected -100 or 0..4, got values from 5 to 5"), ((logits, labels - 1), InputError, "from -1 to -1"),
        ((logits * float("nan"), labels), NonFiniteError, "logits"),
    ):
        with pytest.raises(error, match=said):
            caption_loss(*arguments)
