"""CKA: knows no rotation and no scale, its closed forms, one sentence a mistake."""
import pytest
import torch

from fvlm.core import NonFiniteError, ShapeError, generator
from fvlm.objectives.representation_similarity import linear_cka


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed, "heads"))


def rotation(size, seed=0):
    return torch.linalg.qr(draws(size, size, seed=seed))[0]


def test_cka_knows_no_rotation_and_no_scale():
    x, y = draws(60, 8), draws(60, 5, seed=1)
    assert linear_cka(x, x) == pytest.approx(1) and linear_cka(x, -7 * x @ rotation(8) + 3) == pytest.approx(1, abs=1e-6)
    assert linear_cka(x @ rotation(8), 0.1 * y @ rotation(5)) == pytest.approx(linear_cka(x, y), abs=1e-6) == linear_cka(y, x)
    stretched = x * torch.linspace(0.1, 3, 8)
    assert linear_cka(x, stretched) < 0.99, "invariant to rotation and one scale, not to any linear map"


def test_cka_in_closed_form():
    x, y = draws(30, 1), draws(30, 1, seed=1)
    assert linear_cka(x, y) == pytest.approx(float(torch.corrcoef(torch.cat([x, y], 1).T)[0, 1]) ** 2, abs=1e-6)
    square = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])  # both columns centred, orthogonal, length 2: X'X = 4 I
    assert linear_cka(square, square[:, :1]) == pytest.approx(16 / (32**0.5 * 4)) and linear_cka(square[:, :1], square[:, 1:]) == 0
    wide = draws(6, 50), draws(6, 40, seed=1)  # fewer rows than columns: through the kernels
    want = [value - value.mean(0) for value in wide]
    want = float((want[0].T @ want[1]).square().sum() / ((want[0].T @ want[0]).norm() * (want[1].T @ want[1]).norm()))
    assert linear_cka(*wide) == pytest.approx(want, abs=1e-5)
    assert linear_cka(x, torch.full((30, 2), 0.1)) == 0
    with pytest.raises(ShapeError, match="at least 2"):
        linear_cka(x[:1], y[:1])
    with pytest.raises(NonFiniteError):
        linear_cka(x, y / 0)
