"""From query to prediction: closed forms of every similarity, five planted failures by name, no false alarm, one sentence a mistake."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fvlm.core import InputError, NonFiniteError, ShapeError, generator
from fvlm.instruments.feature_similarity import cosine_null, feature_similarity, mean_over_variance, query_spread, rank_me, whitened
from tests.planted_failures import FAULTS, MORE_FAULTS, PlantedLooker, diagnose, planted_world


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed, "features"))


# --- the five planted failures, over ten seeds -------------------------------------------------------------------------

@pytest.mark.parametrize("fault", [*FAULTS, *MORE_FAULTS])
@pytest.mark.parametrize("seed", range(10))
def test_a_planted_failure_is_named_and_nothing_else(fault, seed):
    found, model = diagnose(fault, seed)
    verdict = found.verdict()
    assert verdict.failures == (fault,), str(verdict)
    assert str(verdict).startswith(f"{fault}. {fault.upper()}: ")
    if fault == "dead heads":
        assert found.parts["heads"].dead == [(0, *model.broken)]
    if fault == "twin heads":
        assert found.parts["heads"].twins == [(0, *model.broken)]


@pytest.mark.parametrize("seed", range(10))
def test_no_false_alarm_on_the_healthy_model(seed):
    assert diagnose(None, seed)[0].verdict().healthy


def test_the_healthy_model_really_works():
    batch = planted_world(3)
    with torch.no_grad():
        errors = {fault: float((PlantedLooker(batch, fault, 3)(batch)["prediction"] - batch["latents"])[:, 2:].square().mean()) for fault in (None, "uniform attention", "identical queries", "head ignores h")}
    assert errors[None] < 0.2 and all(error > 3 * errors[None] for fault, error in errors.items() if fault)


# --- the null of a cosine ----------------------------------------------------------------------------------------------

def test_cosine_null_by_hand():
    halves = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    raw, centred = cosine_null(2.0, halves[0], halves[1])
    assert float(raw) == pytest.approx(2 / 2.5) and float(centred) == pytest.approx(-1)
    assert [float(x) for x in cosine_null(0.3, halves[0], halves[0])] == pytest.approx([1, 1])
    assert float(cosine_null(1.0, torch.full((4,), 0.25), halves[0])[1]) == 0, "a look at everything has nothing left after centring"


@pytest.mark.parametrize("r", [0.1, 1.0, 20.0])
@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_cosine_null_against_blind_looks(r, temperature):
    D, N = 256, 200
    patches = F.normalize(draws(D, seed=1), dim=0) * r**0.5 + draws(N, D) / D**0.5
    p, q = (draws(2, 300, N, seed=2) / temperature).softmax(-1)
    raw, centred = cosine_null(mean_over_variance(patches), p, q)
    mean = patches.mean(0)
    assert float(raw.mean()) == pytest.approx(float(F.cosine_similarity(p @ patches, q @ patches).mean()), abs=0.02)
    assert float(centred.mean()) == pytest.approx(float(F.cosine_similarity(p @ patches - mean, q @ patches - mean).mean()), abs=0.03)
    assert float(mean_over_variance(patches)) == pytest.approx(r, rel=0.1, abs=0.02)


def test_the_instrument_prints_the_null_of_its_own_looks():
    B, T, N, D = 6, 3, 80, 64
    patches = draws(B, T, N, D) / D**0.5 + F.normalize(draws(D, seed=1), dim=0)
    weights = {f"look {i}": draws(B, T, N, seed=2 + i).softmax(-1) for i in range(3)}
    found = feature_similarity({name: (w.unsqueeze(2) @ patches).squeeze(2) for name, w in weights.items()}, patches=patches, weights=weights, first_frame=1)
    off = ~np.eye(3, dtype=bool)
    assert np.abs(found.raw - found.null)[off].max() < 0.02 and np.abs(found.centred[off]).max() < 0.1 and found.r == pytest.approx(1, rel=0.15)
    assert "if blind" in " ".join(found.table()[0]) and len(found.panels()) == 5 and found.picture().width > 500 and len(found.figure().data) == 5


# --- whitening, rank, spread ---------------------------------------------------------------------------------------------

def test_rank_me_of_known_spectra():
    for k in (1, 4, 9):
        assert rank_me(torch.linalg.qr(draws(20, k).double())[0].T) == pytest.approx(k)
    assert rank_me(draws(40, 1).double() @ draws(1, 9, seed=1).double()) == pytest.approx(1)
    assert rank_me(torch.diag(torch.tensor([3.0, 1.0])).double()) == pytest.approx(np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25))))
    assert rank_me(7 * draws(30, 5)) == pytest.approx(rank_me(draws(30, 5)))
    with pytest.raises(InputError, match="all zero"):
        rank_me(torch.zeros(4, 3))


def test_whitening_makes_the_reference_round_and_forgets_linear_maps():
    cloud = draws(300, 4) @ draws(4, 4, seed=1) + 5
    assert torch.allclose(whitened(cloud, cloud, shrinkage=0).T.cov(correction=0), torch.eye(4).double(), atol=1e-6)
    x, mixed = cloud[:20], draws(4, 4, seed=2)
    before, after = whitened(x, cloud, shrinkage=0), whitened(x @ mixed + 1, cloud @ mixed + 1, shrinkage=0)
    assert torch.allclose(before @ before.T, after @ after.T, atol=1e-3), "inner products after whitening do not depend on the basis"
    flat = torch.cat([cloud, torch.zeros(300, 1)], 1)
    assert torch.isfinite(whitened(flat, flat, shrinkage=0)).all() and whitened(flat, flat)[:, 4].abs().max() < 1e-9
    with pytest.raises(InputError, match="do not differ"):
        whitened(x, torch.ones(9, 4))


def test_spread_of_queries():
    same = draws(1, 1, 2, 7).expand(5, 4, 2, 7)
    assert query_spread(same) == pytest.approx(0, abs=1e-6) and query_spread(same * 0) == 0, "two queries of a frame may differ: what counts is that they never change"
    assert query_spread(draws(200, 10, 1, 7)) == pytest.approx(1, abs=0.01)


# --- the verdict -----------------------------------------------------------------------------------------------------

def test_without_a_question_there_is_no_answer():
    looks = {name: draws(10, 4, 6, seed=i) for i, name in enumerate(("own", "other_clip"))}
    verdict = feature_similarity(looks).verdict()
    assert [finding.name for finding in verdict.findings] == ["common mode", "healthy"] and verdict.healthy


def test_different_queries_that_are_answered_alike():
    own = draws(10, 4, 6)
    found = feature_similarity({"own": own, "other_clip": own.clone()}, queries=draws(10, 4, 1, 5))
    assert found.verdict().failures == ("identical queries",) and "not judged" in found.verdict()["common mode"].sentence
    assert np.allclose(found.centred, 1) and np.allclose(found.cka, 1)


def test_what_follows_from_uniform_attention_is_not_reported_again():
    own = draws(10, 4, 6)
    found = feature_similarity({"own": own, "other_clip": own.clone()}, queries=draws(10, 4, 1, 5), attention=torch.full((10, 4, 2, 1, 9), 1 / 9))
    assert found.verdict().failures == ("uniform attention",)


def test_looks_that_equal_the_patch_mean_are_alike():
    patches = draws(5, 4, 9, 6)
    mean = patches.mean(2)
    found = feature_similarity({"own": mean, "other_clip": mean.clone()}, patches=patches)
    assert np.allclose(found.centred, 1) and np.isfinite(found.whitened).all() and found.rank["own"] >= 0


def test_frame_1_is_left_out():
    looks = {name: draws(10, 4, 6, seed=i) for i, name in enumerate(("own", "other_clip"))}
    spoilt = {name: torch.cat([torch.full((10, 1, 6), 9.0), x[:, 1:]], 1) for name, x in looks.items()}
    assert np.allclose(feature_similarity(spoilt).raw, feature_similarity(looks).raw) and not np.allclose(feature_similarity(spoilt, first_frame=1).raw, feature_similarity(looks, first_frame=1).raw)


LOOKS = {name: draws(3, 4, 6, seed=i) for i, name in enumerate(("own", "other_clip"))}
PATCHES = draws(3, 4, 9, 6)


@pytest.mark.parametrize("wrong, error, words", [
    (dict(looks={"own": LOOKS["own"]}), InputError, "at least two"), (dict(looks={}), InputError, "at least two"), (dict(looks=LOOKS | {"random": draws(3, 4, 5)}), ShapeError, "axis D should be 6"),
    (dict(looks=LOOKS | {"own": LOOKS["own"] / 0}), NonFiniteError, "NaN or Inf"), (dict(queries=draws(3, 4, 6)), ShapeError, "B T K D"), (dict(attention=torch.rand(3, 4, 2, 1, 9)), InputError, "sum to 1"),
    (dict(patches=PATCHES[..., :5]), ShapeError, "axis D"), (dict(patches=PATCHES, weights={"own": torch.full((3, 4, 9), 1 / 9)}), InputError, "nothing for other_clip"),
    (dict(patches=PATCHES, weights={name: torch.rand(3, 4, 9) for name in LOOKS}), InputError, "sum to 1"), (dict(sensitivities={"exchanged_h": torch.ones(3)}), InputError, "foveation_probes.sensitivity"),
    (dict(sensitivities={name: torch.tensor([float("nan")]) for name in ("exchanged_h", "relative_h", "exchanged_previous")}), NonFiniteError, "exactly zero"),
    (dict(patches=torch.ones(3, 4, 9, 6), weights={name: torch.full((3, 4, 9), 1 / 9) for name in LOOKS}), InputError, "all patches of a frame are the same"),
])
def test_bad_input(wrong, error, words):
    with pytest.raises(error, match=words) as caught:
        feature_similarity(**{"looks": LOOKS, **wrong})
    assert "\n" not in str(caught.value)
