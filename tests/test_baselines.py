"""Contracts of the trivial rows: closed form, shapes, determinism, no peeking at the target, bad input."""
import numpy as np
import pytest
import torch

from fvlm.core import ConfigError, InputError, NonFiniteError, ShapeError
from fvlm.models.baselines import CopyLast, LinearExtrapolation, MeanPredictor, RidgeRegression


def windows(n, M=3, D=4, seed=0):
    draw = torch.Generator().manual_seed(seed)
    context = torch.randn(n, M, D, generator=draw)
    mix = torch.randn(M * D, D, generator=torch.Generator().manual_seed(99)) / (M * D) ** 0.5
    return context, context.flatten(1) @ mix + 0.3 * torch.randn(n, D, generator=draw) + 2.0


def fitted_rows():
    train, val = windows(60), windows(20, seed=1)
    return [MeanPredictor().fit(*train), CopyLast(), LinearExtrapolation(), RidgeRegression.select(train, val)]


@pytest.mark.parametrize("n", [200, 7])  # more and fewer windows than features
@pytest.mark.parametrize("alpha", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("predict", ["embedding", "residual"])
def test_ridge_satisfies_its_normal_equations(n, alpha, predict):
    context, target = windows(n)
    ridge = RidgeRegression(alpha, predict=predict).fit(context, target)
    x = context.flatten(1).double()
    y = target.double() - (context[:, -1].double() if predict == "residual" else 0)
    x, y = x - x.mean(0), y - y.mean(0)
    gradient = x.T @ (x @ ridge.weight - y) + alpha * ridge.weight
    assert gradient.abs().max() < 1e-9 * x.square().sum()
    mean_error = (ridge({"embeddings": context.double()})["prediction"] - target.double()).mean(0)
    assert mean_error.abs().max() < 1e-9, "the intercept is not penalised, so training errors have mean zero"


def test_zero_penalty_on_too_few_windows_is_the_smallest_exact_solution():
    context, target = windows(6)
    ridge = RidgeRegression(0.0, predict="embedding").fit(context, target)
    x, y = context.flatten(1).double().numpy(), target.double().numpy()
    smallest = np.linalg.pinv(x - x.mean(0)) @ (y - y.mean(0))
    np.testing.assert_allclose(ridge.weight.numpy(), smallest, atol=1e-9)


def test_a_constant_dimension_is_harmless():
    context, target = windows(100)
    context[..., 1] = 3.0
    for alpha in (0.0, 1.0):
        assert torch.isfinite(RidgeRegression(alpha).fit(context, target).weight).all()
    still = RidgeRegression(0.0).fit(torch.ones(5, 3, 4), torch.ones(5, 4))
    assert torch.equal(still({"embeddings": torch.ones(2, 3, 4)})["prediction"], torch.ones(2, 4))


def test_blocks_of_rows_add_up():
    context, target = windows(9001)  # three blocks of 4096
    ridge = RidgeRegression(2.0).fit(context, target)
    x, y = context.flatten(1).double(), (target - context[:, -1]).double()
    x, y = x - x.mean(0), y - y.mean(0)
    direct = torch.linalg.solve(x.T @ x + 2.0 * torch.eye(12, dtype=torch.float64), x.T @ y)
    torch.testing.assert_close(ridge.weight, direct, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("n", [200, 7])
def test_select_reports_the_error_of_the_model_it_returns_and_takes_the_least(n):
    val = windows(50, seed=1)
    ridge = RidgeRegression.select(windows(n), val, alphas=[0.01, 1.0, 30.0, 1e4])
    error = float((ridge({"embeddings": val[0].double()})["prediction"] - val[1]).square().mean())
    assert error == pytest.approx(min(e for _, e in ridge.path), rel=1e-6)
    for alpha, reported in ridge.path:
        refitted = RidgeRegression(alpha).fit(*windows(n))
        assert float((refitted({"embeddings": val[0].double()})["prediction"] - val[1]).square().mean()) == pytest.approx(reported, rel=1e-6)
    assert RidgeRegression.select(windows(n), val, alphas=[1e6, 1e9]).at_edge


def test_everything_is_deterministic_and_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    batch = {"embeddings": windows(5, seed=2)[0]}
    for one, two in zip(fitted_rows(), fitted_rows()):
        assert torch.equal(one(batch)["prediction"], two(batch)["prediction"])
    assert torch.equal(before, torch.get_rng_state())


def test_no_row_reads_the_target_and_all_have_the_same_face():
    rows = fitted_rows()
    context, target = windows(5, seed=2)
    for row in rows:
        seen = row({"embeddings": context, "target": target})["prediction"]
        assert seen.shape == target.shape and seen.dtype == target.dtype
        assert torch.equal(seen, row({"embeddings": context, "target": target * 0 + 7})["prediction"])
    assert [row.num_parameters for row in rows] == [4, 0, 0, 3 * 4 * 4 + 4]


good = windows(20)
fitted = RidgeRegression().fit(*good)


@pytest.mark.parametrize("call, error, words", [
    (lambda: CopyLast()(good[0]), InputError, "expected a dict"),
    (lambda: CopyLast()({"embeddings": good[0][0]}), ShapeError, "expected 3 axes"),
    (lambda: CopyLast()({"embeddings": good[0][:, :0]}), InputError, "at least 1 context"),
    (lambda: CopyLast()({"embeddings": good[0] * float("nan")}), NonFiniteError, "NaN or Inf"),
    (lambda: LinearExtrapolation()({"embeddings": good[0][:, :1]}), InputError, "at least 2 context"),
    (lambda: MeanPredictor()({"embeddings": good[0]}), InputError, "fit"),
    (lambda: MeanPredictor().fit(*good)({"embeddings": good[0][..., :2]}), ShapeError, "axis D"),
    (lambda: RidgeRegression("1"), ConfigError, "alpha"),
    (lambda: RidgeRegression(float("nan")), ConfigError, "alpha"),
    (lambda: RidgeRegression(predict="pixel"), ConfigError, "predict"),
    (lambda: RidgeRegression().fit(good[0], good[1][:-1]), ShapeError, "axis n"),
    (lambda: RidgeRegression().fit(good[0], good[1][:, :2]), ShapeError, "axis D"),
    (lambda: RidgeRegression().fit(good[0][:0], good[1][:0]), InputError, "at least one window"),
    (lambda: RidgeRegression().fit(good[0], good[1] * float("inf")), NonFiniteError, "train target"),
    (lambda: fitted({"embeddings": good[0][..., :2]}), ShapeError, "axis D"),
    (lambda: fitted({"embeddings": torch.cat([good[0]] * 2, 1)}), ShapeError, "axis M"),
    (lambda: RidgeRegression.select(good, good, alphas=[]), ConfigError, "alphas"),
    (lambda: RidgeRegression.select(good, good, alphas=[-1]), ConfigError, "alphas"),
    (lambda: RidgeRegression.select(good, (good[0][:, :2], good[1])), ShapeError, "val context"),
])
def test_bad_input_is_one_clear_error(call, error, words):
    with pytest.raises(error, match=words):
        call()
