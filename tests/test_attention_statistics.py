"""Attention statistics: closed forms, scipy as oracle, one clear error a mistake."""

import math

import numpy as np
import pytest
import torch

from fvlm.core import ConfigError, InputError, NonFiniteError, ShapeError, generator
from fvlm.objectives.attention_statistics import effective_count, entropy, head_cosine, mean_head_cosine, head_divergence, jensen_shannon, normalised_entropy, top_k_mass


def maps(*shape, seed=0, dtype=torch.float64):
    return torch.softmax(2 * torch.randn(*shape, generator=generator(seed, "maps"), dtype=dtype), -1)


ROW_STATISTICS = {
    "entropy": entropy,
    "normalised_entropy": normalised_entropy,
    "effective_count": effective_count,
    "top_k_mass": lambda x: top_k_mass(x, 2),
    "head_divergence": head_divergence,
}


@pytest.mark.parametrize("n", [2, 5, 256])
@pytest.mark.parametrize("k", [1, 2])
def test_k_equal_places(n, k):
    row = torch.cat([torch.full((k,), 1 / k), torch.zeros(n - k)])
    assert entropy(row).item() == pytest.approx(math.log(k), abs=1e-6)
    assert normalised_entropy(row).item() == pytest.approx(math.log(k) / math.log(n), abs=1e-6)
    assert effective_count(row).item() == pytest.approx(k)
    assert top_k_mass(row, 1).item() == pytest.approx(1 / k) and top_k_mass(row, n).item() == pytest.approx(1)


def test_against_scipy():
    from scipy.spatial.distance import jensenshannon
    from scipy.stats import entropy as scipy_entropy

    p, q = maps(20, 9), maps(20, 9, seed=1)
    np.testing.assert_allclose(entropy(p).numpy(), scipy_entropy(p.numpy(), axis=-1), rtol=1e-10)
    np.testing.assert_allclose(jensen_shannon(p, q).numpy(), jensenshannon(p.numpy(), q.numpy(), axis=-1) ** 2, rtol=1e-8)


def test_shapes_follow_the_leading_axes():
    x = maps(2, 3, 4, 5, 6)
    for name in ("entropy", "normalised_entropy", "effective_count", "top_k_mass"):
        assert ROW_STATISTICS[name](x).shape == (2, 3, 4, 5)
    assert head_divergence(x).shape == () and head_divergence(x, reduction="none").shape == (2, 3)


def test_jensen_shannon_is_symmetric_and_bounded():
    p, q = maps(50, 7), maps(50, 7, seed=1)
    torch.testing.assert_close(jensen_shannon(p, q), jensen_shannon(q, p))
    assert (jensen_shannon(p, q) > 0).all() and (jensen_shannon(p, q) < math.log(2)).all()
    assert (jensen_shannon(p.float(), p.float()) >= 0).all()
    for other in (maps(50, 6), maps(7)):
        with pytest.raises(ShapeError, match="one shape"):
            jensen_shannon(p, other)


@pytest.mark.parametrize("heads", [2, 3, 8])
def test_head_divergence_against_the_loop_over_pairs(heads):
    x = maps(2, heads, 4, 5)
    loop = torch.stack([jensen_shannon(x[:, i], x[:, j]) for i in range(heads) for j in range(i)])
    torch.testing.assert_close(head_divergence(x), loop.mean())
    torch.testing.assert_close(head_divergence(x, reduction="none"), loop.mean((0, 2)))
    torch.testing.assert_close(head_divergence(x[:, torch.randperm(heads, generator=generator(0))]), loop.mean())
    layers = [x, maps(2, 2, 3, 3, seed=1)]
    torch.testing.assert_close(head_divergence(layers), torch.stack([head_divergence(y) for y in layers]).mean())


def test_bfloat16_rows_are_accepted():
    x = maps(2, 4, 8, 256, dtype=torch.float32)
    torch.testing.assert_close(entropy(x.bfloat16()), entropy(x), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("name", ROW_STATISTICS)
def test_bad_rows(name):
    statistic, good = ROW_STATISTICS[name], maps(2, 3, 4, 5)
    for wrong in (good * 0.9, good - 0.5, torch.randn(2, 3, 4, 5, generator=generator(0)), torch.zeros(2, 3, 4, 5)):
        with pytest.raises(InputError, match="attention: expected rows of probabilities that sum to 1"):
            statistic(wrong)
    broken = good.clone()
    broken[0, 1, 2, 3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"attention: 1 of 120 .* \(0, 1, 2, 3\)"):
        statistic(broken)
    with pytest.raises(ShapeError, match="non-empty floating-point"):
        statistic(good[:0])
    with pytest.raises(ShapeError, match="non-empty floating-point"):
        statistic(torch.ones(2, 3, 4, 5, dtype=torch.int64))


def test_bad_arguments():
    good = maps(2, 3, 4, 5)
    for k in (0, 6, 1.5):
        with pytest.raises(ConfigError, match="k: got"):
            top_k_mass(good, k)
    with pytest.raises(ShapeError, match="at least 2 places"):
        normalised_entropy(torch.ones(3, 1))
    with pytest.raises(ShapeError, match="at least 2 heads"):
        head_divergence(good[:, :1])
    with pytest.raises(ShapeError, match="0 layers"):
        head_divergence([])
    with pytest.raises(InputError, match="reduction"):
        head_divergence(good, reduction="sum")


def test_head_cosine():
    heads = torch.randn(2, 4, 5, 8, generator=generator(0), dtype=torch.float64)
    matrix = head_cosine(heads)
    for i in range(4):
        for j in range(4):
            cosine = torch.cosine_similarity(heads[:, i], heads[:, j], dim=-1)
            torch.testing.assert_close(matrix[i, j], cosine.mean())
            torch.testing.assert_close(head_cosine(heads, squared=True)[i, j], cosine.square().mean())
    torch.testing.assert_close(head_cosine(torch.cat([heads, -heads], 1))[:4, 4:], -matrix)
    heads[:, 2] = 0
    assert not head_cosine(heads)[2].any() and head_cosine(heads[:, :1]).shape == (1, 1)


def test_bad_heads():
    heads = torch.randn(2, 4, 5, 8, generator=generator(0))
    with pytest.raises(ShapeError, match="B H T d"):
        head_cosine(heads[0])
    with pytest.raises(ShapeError, match="non-empty floating-point"):
        head_cosine(heads.long())
    with pytest.raises(NonFiniteError, match="overflow"):
        head_cosine(heads * 1e30)
    heads[1, 1, 1, 1] = float("inf")
    with pytest.raises(NonFiniteError, match="heads: 1 of 320"):
        head_cosine(heads)


def test_the_mean_over_pairs_of_heads():
    draw = torch.Generator().manual_seed(3)
    same, turned = torch.randn(2, 1, 5, 8, generator=draw).expand(-1, 4, -1, -1), torch.eye(4)[None, :, None].expand(2, -1, 5, -1)
    assert mean_head_cosine(same) == pytest.approx(1) and mean_head_cosine(turned) == 0, "a head with itself is no pair"
    heads = torch.randn(2, 3, 5, 8, generator=draw)
    table = head_cosine(heads, squared=True)
    assert mean_head_cosine(heads, squared=True) == pytest.approx(float(table[0, 1] + table[0, 2] + table[1, 2]) / 3)
