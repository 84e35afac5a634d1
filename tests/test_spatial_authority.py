"""Contracts of spatial authority: closed forms, whispers, FiLM on a torus, exact derivatives, one clear error each."""
import pytest
import torch
from torch import nn

from fvlm.blocks.prediction_heads import HEADS
from fvlm.blocks.spatial_authority import responses, spatial_authority
from fvlm.core import InputError, ShapeError, generator

HIDDEN, LATENT = 10, (4, 6, 5)  # not square on purpose
names = pytest.mark.parametrize("name", HEADS)


def draw(*shape, stream="x"):
    return torch.randn(*shape, generator=generator(0, stream))


def make(name, **options):
    return HEADS[name](HIDDEN, LATENT, **{"width": 8, "generator": generator(0, name), **options})


def inputs(n):
    return [draw(n, HIDDEN, stream="hidden"), draw(n, *LATENT, stream="previous")]


class Plain(nn.Module):
    "y = W h."

    def __init__(self, weight):
        super().__init__()
        self.weight = weight
        self.eval()

    def forward(self, hidden, previous, query=None):
        return torch.einsum("chwk,nk->nchw", self.weight, hidden)


REGION = torch.zeros(6, 5, dtype=torch.bool)
REGION[:3, :2] = True
AREA = 6 / 30


def authority(weight, **options):
    return spatial_authority(Plain(weight), draw(2, weight.shape[-1]), draw(2, *weight.shape[:3]), REGION, **options)


def test_authority_has_its_closed_forms():
    everywhere = draw(4, 1, 1, 6).expand(4, 6, 5, 6)
    found = authority(everywhere)
    assert found.inside == pytest.approx(AREA, abs=1e-6) and found.score == pytest.approx(0, abs=1e-6) and found.area == pytest.approx(AREA)
    for c in (0.5, 2.0, 30.0):
        louder = everywhere[..., :1] * (1 + c * REGION[..., None])
        assert authority(louder).inside == pytest.approx((1 + c) ** 2 * AREA / ((1 + c) ** 2 * AREA + 1 - AREA), abs=1e-6)
    sites = torch.eye(30).view(1, 6, 5, 30)
    found = authority(sites)
    assert found.score == pytest.approx(1, abs=1e-6)
    assert found.energy[~REGION].abs().max() < 1e-9 and found.direction.norm().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(found.direction.view(6, 5)[~REGION], torch.zeros(24), atol=1e-6, rtol=0)
    outside = sites[..., ~REGION.flatten()]
    assert authority(outside).score == pytest.approx(-AREA / (1 - AREA), abs=1e-6)  # it can reach everything but the region


def test_whispers_are_left_out_and_directions_restrict():
    loud, whisper = torch.ones(4, 6, 5), REGION * torch.full((4, 6, 5), 1e-3)
    weight = torch.stack([loud, whisper], -1)
    assert authority(weight).inside == pytest.approx(AREA, abs=1e-6)
    assert authority(weight, whisper=1e-9).inside == pytest.approx(1, abs=1e-4)
    assert authority(weight, directions=torch.diag(torch.tensor([1.0, 1e5]))).inside == pytest.approx(AREA, abs=1e-6)  # however the span is written
    sites = torch.eye(30).view(1, 6, 5, 30)
    assert authority(sites, directions=torch.ones(1, 30)).inside == pytest.approx(AREA, abs=1e-6)
    assert authority(sites, chunk=7).score == pytest.approx(1, abs=1e-6)


def test_no_direction_of_film_on_a_torus_prefers_a_region():
    for name in ("film", "spatial_film"):
        head, x = make(name).eval(), draw(*LATENT)
        for layer in head.modules():
            if isinstance(layer, nn.Conv2d):
                layer.padding_mode = "circular"
        shifts = torch.stack([x.roll((dy, dx), (1, 2)) for dy in range(6) for dx in range(5)])
        score = spatial_authority(head, draw(1, HIDDEN).expand(30, -1), shifts, REGION).score
        assert (abs(score) < 1e-4) == (name == "film"), (name, score)


@names
def test_responses_are_the_derivative(name):
    head, (hidden, previous) = make(name, query_dim=3).double().eval(), [x.double() for x in inputs(1)]
    query, directions = draw(3).double(), draw(2, HIDDEN).double()
    found, step = responses(head, hidden[0], previous[0], directions, query), 1e-5
    for direction, response in zip(directions, found):
        finite = (head(hidden + step * direction, previous, query[None]) - head(hidden - step * direction, previous, query[None]))[0] / (2 * step)
        torch.testing.assert_close(response, finite, atol=1e-7, rtol=1e-5)
    spatial_authority(head, hidden, previous, REGION, query=query[None])


def test_authority_refuses():
    given = inputs(2)
    for head, region, error, text in (
        (make("film"), REGION, InputError, "training mode"),
        (make("film", start="zero").eval(), REGION, InputError, "does not answer to the hidden state at all"),
        (make("film").eval(), REGION.float(), ShapeError, "region: got torch.float32"),
        (make("film").eval(), REGION[:2], ShapeError, r"region: got torch.bool \(2, 5\), expected bool \(6, 5\)"),
        (make("film").eval(), REGION & False, InputError, "region: got 0 of 30"),
        (make("film").eval(), REGION | True, InputError, "region: got 30 of 30"),
    ):
        with pytest.raises(error, match=text):
            spatial_authority(head, *given, region)
