"""Losses: closed-form extremes, a loop over pairs as oracle, gradients at zero, one clear error a mistake."""

import pytest
import torch

from fvlm.core import ConfigError, InputError, NonFiniteError, ShapeError, generator
from fvlm.objectives.losses import SIMILARITY_KINDS, embedding_mse_loss, pixel_loss, semantic_similarity_loss, unit_vectors

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
