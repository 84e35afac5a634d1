"""Metrics: conventions against scikit-image, scikit-learn and torchmetrics; one clear error a mistake; LPIPS never substituted."""

import inspect
import math
import socket

import numpy as np
import pytest
import torch

from fvlm.core import ConfigError, InputError, NonFiniteError, ShapeError, WeightsError, generator
from fvlm.objectives import metrics
from fvlm.objectives.metrics import LPIPS_BACKBONES, SSIM_WINDOWS, embedding_cosine, embedding_mse, embedding_psnr, lpips, lpips_weights, mse, psnr, r2, skill, ssim


def frames(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, generator=generator(seed, "frames"), dtype=dtype)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("data_range", [1.0, 255.0, 2.0])
def test_psnr_and_ssim_against_scikit_image(channels, data_range):
    measure = pytest.importorskip("skimage.metrics")
    a, b = frames(2, 3, channels, 33, 24), frames(2, 3, channels, 33, 24, seed=1)
    b = (0.7 * a + 0.3 * b) * data_range
    a = a * data_range
    values = {"psnr": psnr(b, a, data_range=data_range, reduction="none")}
    values |= {window: ssim(b, a, data_range=data_range, window=window, reduction="none") for window in ("gaussian11", "uniform7")}
    for i in range(2):
        for j in range(3):
            x, y = a[i, j].numpy(), b[i, j].numpy()
            assert values["psnr"][i, j].item() == pytest.approx(measure.peak_signal_noise_ratio(x, y, data_range=data_range), abs=1e-5)
            options = {"data_range": data_range, "channel_axis": 0}
            gaussian = measure.structural_similarity(x, y, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, **options)
            assert values["gaussian11"][i, j].item() == pytest.approx(gaussian, abs=1e-6)
            assert values["uniform7"][i, j].item() == pytest.approx(measure.structural_similarity(x, y, **options), abs=1e-6)


def test_padded_window_is_the_default_of_torchmetrics():
    from torchmetrics.functional.image import structural_similarity_index_measure

    a, b = frames(4, 3, 20, 20), frames(4, 3, 20, 20, seed=1)
    torch.testing.assert_close(ssim(a, b, data_range=1.0, window="gaussian11_padded"), structural_similarity_index_measure(a, b, data_range=1.0))


def test_bytes_and_fractions_agree():
    a = (frames(2, 3, 16, 16) * 255).to(torch.uint8)
    b = (frames(2, 3, 16, 16, seed=1) * 255).to(torch.uint8)
    assert mse(a, b).item() == pytest.approx(((a.double() - b.double()) ** 2).mean().item(), rel=1e-5)  # bytes do not wrap around
    torch.testing.assert_close(psnr(a, b, data_range=255), psnr(a / 255, b / 255, data_range=1))
    torch.testing.assert_close(ssim(a, b, data_range=255), ssim(a / 255, b / 255, data_range=1), rtol=1e-4, atol=1e-5)


def test_reductions_name_what_they_do():
    a, b = frames(2, 5, 3, 12, 14), frames(2, 5, 3, 12, 14, seed=1)
    by_frame = mse(a, b, reduction="none")
    assert by_frame.shape == (2, 5)
    torch.testing.assert_close(mse(a, b), by_frame.mean())
    torch.testing.assert_close(mse(a, b, reduction="sum_pixels"), by_frame.mean() * 3 * 12 * 14)
    assert ssim(a, b, data_range=1, reduction="none").shape == psnr(a, b, data_range=1, reduction="none").shape == (2, 5)
    assert psnr(a, b, data_range=1, reduction="pooled").item() == pytest.approx(-10 * math.log10(by_frame.mean().item()), abs=1e-5)
    torch.testing.assert_close(psnr(a, b, data_range=1), psnr(a, b, data_range=1, reduction="none").mean())
    single = mse(a[0, 0], b[0, 0], reduction="none")  # one frame without leading axes
    assert single.shape == () and single == by_frame[0, 0]


def test_identical_frames():
    a = frames(2, 3, 16, 16)
    assert mse(a, a) == 0 and psnr(a, a, data_range=1) == float("inf")
    for window in SSIM_WINDOWS:
        assert ssim(a, a, data_range=1, window=window).item() == pytest.approx(1)
    black = torch.zeros(1, 3, 16, 16)
    assert ssim(black, black, data_range=1) == 1  # a constant frame has no variance, the constants keep it defined


def test_data_range_has_no_default():
    for metric in (psnr, ssim, embedding_psnr):
        assert inspect.signature(metric).parameters["data_range"].default is inspect.Parameter.empty


IMAGE_METRICS = {
    "mse": mse,
    "psnr": lambda a, b: psnr(a, b, data_range=1),
    "ssim": lambda a, b: ssim(a, b, data_range=1),
    "lpips": lpips,
}


@pytest.mark.parametrize("name", IMAGE_METRICS)
def test_bad_frames(name):
    metric, good = IMAGE_METRICS[name], frames(1, 3, 40, 40)
    broken = good.clone()
    broken[0, 1, 2, 3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"prediction: 1 of 4800 values .* \(0, 1, 2, 3\)"):
        metric(broken, good)
    with pytest.raises(NonFiniteError, match="target"):
        metric(good, broken)
    with pytest.raises(ShapeError, match="one shape"):
        metric(good, good[..., :39])
    with pytest.raises(ShapeError, match="prediction: expected at least 3 axes"):
        metric(good[0, 0], good[0, 0])
    with pytest.raises(ShapeError, match="at least one value|at least 32x32"):
        metric(good[:0], good[:0])


def test_bad_options_and_ranges():
    a = frames(1, 3, 40, 40)
    with pytest.raises(InputError, match="span .* more than data_range=1"):
        psnr(a * 255, a * 255, data_range=1)
    with pytest.raises(InputError, match="span"):
        ssim(a * 255, a * 255, data_range=1)
    for wrong in (0, -1, float("nan")):
        with pytest.raises(ConfigError, match="data_range"):
            psnr(a, a, data_range=wrong)
        with pytest.raises(ConfigError, match="data_range"):
            embedding_psnr(a, a, data_range=wrong)
    with pytest.raises(ConfigError, match="did you mean 'gaussian11'"):
        ssim(a, a, data_range=1, window="gaussian")
    for metric in (mse, embedding_mse, embedding_cosine):
        with pytest.raises(ConfigError, match="reduction"):
            metric(a, a, reduction="sum")
    with pytest.raises(ShapeError, match="at least 11x11"):
        ssim(a[..., :10], a[..., :10], data_range=1)
    assert torch.isfinite(ssim(a[..., :7, :7], a[..., :7, :7], data_range=1, window="uniform7"))
    with pytest.raises(ShapeError, match="channels last"):
        ssim(frames(1, 40, 40, 11), frames(1, 40, 40, 11), data_range=1)


# LPIPS ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("FVLM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    metrics._lpips_network.cache_clear()
    yield tmp_path
    metrics._lpips_network.cache_clear()


def forbid_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_lpips_without_weights_is_an_error_and_touches_no_network(no_weights, monkeypatch):
    forbid_network(monkeypatch)
    a = frames(1, 3, 40, 40)
    for net, (_, file) in LPIPS_BACKBONES.items():
        with pytest.raises(WeightsError, match=f"{file}.*path=.*download=True"):
            lpips(a, a, net=net)
    with pytest.raises(WeightsError, match="nowhere.pth"):
        lpips(a, a, path=no_weights / "nowhere.pth")


def test_lpips_download_offline_is_an_error(no_weights, monkeypatch, capsys):
    import urllib.error
    import urllib.request

    def unreachable(url, timeout):
        assert timeout <= 30
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    with pytest.raises(WeightsError, match="cannot be reached"):
        lpips_weights("alex", download=True)
    assert "downloading" in capsys.readouterr().out
    assert not [p for p in (no_weights / "home" / "lpips").iterdir()]


def test_lpips_refuses_another_file_under_the_name(no_weights):
    folder = no_weights / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / LPIPS_BACKBONES["alex"][1]).write_bytes(b"not the weights")
    with pytest.raises(WeightsError, match="sha256"):
        lpips(frames(1, 3, 40, 40), frames(1, 3, 40, 40))


@pytest.mark.parametrize("net", ["alex", "squeeze"])
def test_lpips_equals_torchmetrics_with_the_same_backbone(no_weights, monkeypatch, net):
    torchvision = pytest.importorskip("torchvision")
    from torchmetrics.functional.image.lpips import learned_perceptual_image_patch_similarity

    from fvlm.files import sha256_of

    architecture = getattr(torchvision.models, LPIPS_BACKBONES[net][0])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = architecture(weights=None)
    draft = no_weights / "draft.pth"
    torch.save({k: v for k, v in model.state_dict().items() if k.startswith("features.")}, draft)
    file = f"random-{sha256_of(draft)[:8]}.pth"
    (no_weights / "hub" / "checkpoints").mkdir(parents=True)
    draft.rename(no_weights / "hub" / "checkpoints" / file)
    monkeypatch.setitem(LPIPS_BACKBONES, net, (LPIPS_BACKBONES[net][0], file))
    a, b = frames(2, 3, 3, 40, 48, dtype=torch.float32), frames(2, 3, 3, 40, 48, seed=1, dtype=torch.float32)
    with monkeypatch.context() as downloaded:
        downloaded.setattr(torchvision.models, LPIPS_BACKBONES[net][0], lambda weights=None: model)
        expected = learned_perceptual_image_patch_similarity(a.flatten(0, 1), b.flatten(0, 1), net_type=net, reduction="none", normalize=True)
    came = lpips(a, b, net=net, reduction="none")
    torch.testing.assert_close(came, expected.reshape(2, 3))
    assert (came > 0).all()
    torch.testing.assert_close(lpips(a, b, net=net), came.mean())
    assert lpips(a, a, net=net) == 0
    with pytest.raises(InputError, match=r"expected frames in \[0, 1\]"):
        lpips(a + 0.5, b, net=net)


def test_lpips_weights_that_do_not_fit(no_weights, monkeypatch):
    from fvlm.files import sha256_of

    draft = no_weights / "draft.pth"
    torch.save({"features.0.weight": torch.zeros(3)}, draft)
    file = f"small-{sha256_of(draft)[:8]}.pth"
    monkeypatch.setitem(LPIPS_BACKBONES, "alex", ("alexnet", file))
    with pytest.raises(WeightsError, match="does not fit"):
        lpips(frames(1, 3, 40, 40), frames(1, 3, 40, 40), path=draft)


# embeddings ----------------------------------------------------------------------------------------------------------


def test_embedding_metrics():
    a, b = frames(6, 5, 16), frames(6, 5, 16, seed=1)
    std = frames(16, seed=2) + 0.1
    assert embedding_mse(a, b, reduction="none").shape == embedding_cosine(a, b, reduction="none").shape == (6, 5)
    torch.testing.assert_close(embedding_mse(a, b), (a - b).square().mean())
    torch.testing.assert_close(embedding_mse(a, b, std=std), (a / std - b / std).square().mean())
    torch.testing.assert_close(embedding_cosine(a, b), torch.cosine_similarity(a, b, dim=-1).mean())
    assert embedding_cosine(torch.zeros(1, 4), torch.ones(1, 4)) == 0
    assert embedding_cosine(torch.ones(1, 4), -torch.ones(1, 4)).item() == pytest.approx(-1)
    by_vector = 10 * torch.log10(9 / embedding_mse(a, b, reduction="none"))
    torch.testing.assert_close(embedding_psnr(a, b, data_range=3.0, reduction="none"), by_vector)
    torch.testing.assert_close(embedding_psnr(a, b, data_range=3.0), by_vector.mean())
    torch.testing.assert_close(embedding_psnr(a, b, data_range=3.0, reduction="pooled"), 10 * torch.log10(9 / embedding_mse(a, b)))


def test_half_precision_is_computed_wide():
    a = torch.full((4, 384), 100.0, dtype=torch.float16)
    assert embedding_mse(a * 4, a).item() == pytest.approx(9e4)  # 300^2 does not fit into float16
    assert embedding_mse(a, a * 0).dtype == torch.float32


@pytest.mark.parametrize("average", ["variance_weighted", "uniform_average", "raw_values"])
def test_r2_against_scikit_learn(average):
    from sklearn.metrics import r2_score

    a, b = frames(50, 7), frames(50, 7, seed=1)
    a = b + 0.3 * a
    np.testing.assert_allclose(r2(a, b, average=average).numpy(), r2_score(b, a, multioutput=average), rtol=1e-9)
    torch.testing.assert_close(r2(a.view(10, 5, 7), b.view(10, 5, 7), average=average), r2(a, b, average=average))


def test_r2_of_the_mean_is_zero_and_of_a_constant_is_undefined():
    b = frames(50, 7)
    assert r2(b.mean(0).expand_as(b), b).item() == pytest.approx(0, abs=1e-12) and r2(b, b) == 1
    b[:, 2] = 0.5
    with pytest.raises(InputError, match="1 of 7 variances are 0"):
        r2(b, b, average="uniform_average")
    assert r2(b, b) == 1
    with pytest.raises(InputError, match="variances are 0"):
        r2(b[:1], b[:1])


def test_skill():
    assert skill(0.3, 0.4).item() == pytest.approx(0.25) and skill(0.8, 0.4).item() == pytest.approx(-1)
    ours, theirs = frames(9), frames(9, seed=1) + 0.1
    torch.testing.assert_close(skill(ours, theirs), 1 - ours.mean() / theirs.mean())
    torch.testing.assert_close(skill(ours, theirs, reduction="none"), 1 - ours / theirs)
    with pytest.raises(InputError, match="still clips"):
        skill(0.1, 0.0)
    with pytest.raises(InputError, match="1 of 2 .*still clips"):
        skill(torch.ones(2), torch.tensor([0.0, 1.0]), reduction="none")
    with pytest.raises(ShapeError, match="one shape"):
        skill(torch.ones(2), torch.ones(3))
    with pytest.raises(InputError, match="errors >= 0"):
        skill(-0.1, 1.0)
    with pytest.raises(NonFiniteError):
        skill(float("nan"), 1.0)


@pytest.mark.parametrize("metric", [embedding_mse, embedding_cosine, r2, lambda a, b: embedding_psnr(a, b, data_range=1)])
def test_bad_embeddings(metric):
    good = frames(4, 8)
    broken = good.clone()
    broken[2, 1] = float("inf")
    with pytest.raises(NonFiniteError, match=r"prediction: 1 of 32"):
        metric(broken, good)
    with pytest.raises(ShapeError, match="nothing is broadcast"):
        metric(good, good[:1])
    with pytest.raises(InputError, match="floating-point"):
        metric(good.long(), good)
    with pytest.raises(ShapeError, match="at least one value"):
        metric(good[:0], good[:0])


def test_bad_standard_deviations():
    good = frames(4, 8)
    with pytest.raises(ShapeError, match="std: axis D should be 8"):
        embedding_mse(good, good, std=torch.ones(7))
    with pytest.raises(InputError, match="1 of 8"):
        embedding_mse(good, good, std=torch.tensor([1.0] * 7 + [0.0]))
