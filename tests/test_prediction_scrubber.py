"""PredictionScrubber: what is shown beside what, its numbers, its page and picture, bad input."""
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

from fvlm.core import ConfigError, InputError, NonFiniteError, ShapeError, numpy_generator
from fvlm.instruments.live_picture import MAX_SIDE
from fvlm.instruments.nearest_frames import nearest_frames
from fvlm.instruments.prediction_scrubber import COPY_LAST, PredictionScrubber
from tests.widget_pages import is_one_sentence, state_of


def film(n, seed=0, height=12, width=16):
    return numpy_generator(seed, "film", n).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


@pytest.fixture
def scrubber():
    return PredictionScrubber(film(3), film(5, 1), {"a": film(5, 2), "b": film(5, 3)})


def frames_of(sheet, n, height, width):
    "The frames in a sheet, as a browser takes them out."
    import io

    picture = np.asarray(Image.open(io.BytesIO(sheet)).convert("RGB"))
    return np.stack([picture[i // 8 * height: (i // 8 + 1) * height, i % 8 * width: (i % 8 + 1) * width] for i in range(n)])


def test_errors_are_mean_squares_and_copy_last_is_always_there(scrubber):
    truth, context, named = film(5, 1) / 255, film(3) / 255, {"a": film(5, 2) / 255, "b": film(5, 3) / 255}
    assert list(scrubber.errors) == ["a", "b", COPY_LAST]
    for name, frames in named.items():
        assert np.allclose(scrubber.errors[name], np.square(frames - truth).mean((1, 2, 3)))
    copy = np.square(context[-1:] - truth).mean((1, 2, 3))
    assert np.allclose(scrubber.errors[COPY_LAST], copy)
    assert np.allclose(scrubber.ratio()["a"], np.array(scrubber.errors["a"]) / copy)
    scene = scrubber._scene
    assert scene["names"] == ["truth", "a", "b", COPY_LAST] and len(scrubber._sheets) == 4 and (scene["context"], scene["future"]) == (3, 5)
    assert np.array_equal(frames_of(scrubber._sheets[2], 5, 12, 16), film(5, 2))


def test_bytes_and_floats_are_the_same_film():
    context, truth, found = film(2), film(3, 1), film(3, 2)
    as_floats = [torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255 for x in (context, truth, found)]
    one, two = PredictionScrubber(context, truth, found), PredictionScrubber(*as_floats)
    assert one.errors == two.errors and one._sheets == two._sheets


def test_large_frames_are_made_smaller_and_their_errors_are_not():
    context, truth, found = (film(2, i, 300, 600) for i in range(3))
    large = PredictionScrubber(context, truth, found)
    assert (large._scene["width"], large._scene["height"]) == (MAX_SIDE, MAX_SIDE // 2)
    assert large.errors["prediction"][0] == pytest.approx(np.square(found[0] / 255 - truth[0] / 255).mean())


def test_standing_still_where_nothing_moves_has_no_ratio():
    still = np.repeat(film(1), 4, 0)
    assert all(math.isnan(r) for r in PredictionScrubber(still[:1], still[1:], film(3, 1)).ratio()["prediction"])


def test_given_errors_replace_those_of_the_pixels():
    errors = {"prediction": torch.tensor([1.0, 2.0]), COPY_LAST: [4.0, 4.0]}
    shown = PredictionScrubber(film(1), film(2, 1), film(2, 2), errors=errors, unit="distance", notes={"prediction": ["one", 2]})
    assert shown.ratio()["prediction"] == [0.25, 0.5] and shown._scene["unit"] == "distance" and shown.notes == {"prediction": ["one", "2"]}


class Model:
    "Predicts by a rule; remembers what it was shown."

    def predict(self, context, frames, *, shade=0.5):
        self.shown = context
        return torch.full((1, frames, *context.shape[2:]), shade)

    def rollout(self, batch, steps):
        self.shown = batch["embeddings"]
        return batch["embeddings"][:, -1:] + torch.arange(1.0, steps + 1)[None, :, None]


def test_a_model_of_frames_sees_the_context_alone():
    frames, model = torch.rand(6, 1, 8, 8), Model()
    shown = PredictionScrubber.from_model(model, frames, context_frames=4, shade=0.25)
    assert torch.equal(model.shown, frames[None, :4])
    assert shown.errors["prediction"] == pytest.approx([float((torch.full((8, 8), 64 / 255) - (f * 255).round() / 255).square().mean()) for f in frames[4:, 0]], abs=1e-6)


@pytest.mark.parametrize("other_bank", [False, True])
def test_a_model_of_embeddings_is_shown_as_real_frames_it_has_not_seen(other_bank):
    frames, embeddings = film(7), torch.linspace(0, 6, 7)[:, None].repeat(1, 3)
    bank = (torch.tensor([[5.2, 5.2, 5.2], [100.0, 100.0, 100.0]]), film(2, 9)) if other_bank else None
    model = Model()
    shown = PredictionScrubber.from_embeddings({"m": model}, embeddings, frames, context_frames=4, bank=bank)
    assert torch.equal(model.shown, embeddings[None, :4])
    assert shown.errors["m"] == [0, 0, 0] and shown.errors[COPY_LAST] == [1, 4, 9] and shown.ratio()["m"] == [0, 0, 0]
    vectors, pictures = (embeddings[4:], frames[4:]) if bank is None else bank
    expected = nearest_frames(embeddings[4:], vectors).indices[:, 0]
    assert np.array_equal(shown.predictions["m"], np.asarray(pictures)[expected.numpy()])
    assert shown.notes["m"][0].startswith(f"nearest: frame {0 if other_bank else 4}, ")


def test_the_models_of_this_package():
    from fvlm.models.frame_predictor import PixelCopyLast
    from fvlm.models.s_hr_vqvae import SHRVQVAE
    from fvlm.models.sc_vfp import SCVFP

    grey = torch.rand(5, 1, 16, 16)
    shown = PredictionScrubber.from_model({"codes": SHRVQVAE.tiny(), "copy": PixelCopyLast()}, grey, context_frames=3)
    assert shown.ratio()["copy"] == pytest.approx([1, 1], abs=1e-6) and len(shown.errors["codes"]) == 2
    vectors = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
    copies = PredictionScrubber.from_embeddings(SCVFP.tiny().eval(), vectors, film(9), context_frames=5)
    assert copies.ratio()["prediction"] == pytest.approx([1] * 4)  # untrained, it predicts the residual zero


def test_the_page_needs_nothing_else(scrubber, tmp_path):
    scrubber.horizon, scrubber.playing, scrubber.title = 4, True, "a </script> & <b>"
    page = scrubber.save_html(tmp_path / "p.html").read_text(encoding="utf-8")
    state = state_of(page)
    assert state["horizon"] == 4 and state["playing"] is False and state["_sheets"] == scrubber._sheets and state["_scene"] == scrubber._scene
    assert not re.search(r'(?:src|href|import|fetch)[=(\s]+["\']?(?:https?:)?//', page)
    assert "a &lt;/script&gt; &amp; &lt;b&gt;" in page and page.count("</script>") == 4
    assert (tmp_path / "p.html").stat().st_size <= 4 / 3 * sum(map(len, scrubber._sheets)) + 200_000


def test_the_picture_stands_in_where_nothing_is_live(scrubber, tmp_path):
    data, _ = scrubber._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data and len(data["image/png"]) > 1000
    assert Image.open(scrubber.save_png(tmp_path / "p.png")).size == scrubber.picture().size


def test_one_frame_and_many():
    assert PredictionScrubber(film(1), film(1, 1), film(1, 2)).picture().width > 300
    assert PredictionScrubber(film(30), film(40, 1), film(40, 2)).picture().width < 1000


F = film(4)
BAD = {
    "shorter": (lambda: PredictionScrubber(F, F, F[:2]), ShapeError, "one for each frame of the truth"),
    "smaller": (lambda: PredictionScrubber(F, F, F[:, :4]), ShapeError, "the size of the truth"),
    "context of another size": (lambda: PredictionScrubber(F[:, :4], F, F), ShapeError, "context: frames of 4x16"),
    "nothing predicted": (lambda: PredictionScrubber(F, F, {}), InputError, "one to six"),
    "seven": (lambda: PredictionScrubber(F, F, {str(i): F for i in range(7)}), InputError, "one to six"),
    "named like the rival": (lambda: PredictionScrubber(F, F, {"copy-last": F}), InputError, "always there"),
    "NaN": (lambda: PredictionScrubber(torch.full((1, 3, 12, 16), float("nan")), F, F), NonFiniteError, "context"),
    "out of range": (lambda: PredictionScrubber(F, F, {"a": torch.full((4, 3, 12, 16), 7.0)}), InputError, r"predictions\['a'\]"),
    "no rival among errors": (lambda: PredictionScrubber(F, F, F, errors={"prediction": [0] * 4}), InputError, "never shown without copy-last"),
    "errors too short": (lambda: PredictionScrubber(F, F, F, errors={"prediction": [0], COPY_LAST: [0] * 4}), ShapeError, r"errors\['prediction'\]"),
    "errors NaN": (lambda: PredictionScrubber(F, F, F, errors={"prediction": [math.nan] * 4, COPY_LAST: [0] * 4}), NonFiniteError, "finite"),
    "notes of nobody": (lambda: PredictionScrubber(F, F, F, notes={"b": [""] * 4}), ConfigError, "notes"),
    "notes too short": (lambda: PredictionScrubber(F, F, F, notes={"prediction": [""]}), ShapeError, "1 for 4"),
    "speed": (lambda: PredictionScrubber(F, F, F, fps=0), ConfigError, "fps"),
    "nothing left to predict": (lambda: PredictionScrubber.from_model(Model(), torch.rand(4, 3, 8, 8), context_frames=4), ConfigError, "context_frames"),
    "a frame too few": (lambda: PredictionScrubber.from_embeddings(Model(), torch.zeros(5, 2), F, context_frames=2), ShapeError, "one for each embedding"),
    "another bank": (lambda: PredictionScrubber.from_embeddings(Model(), torch.zeros(4, 2), F, context_frames=2, bank=(torch.zeros(3, 2), F)), ShapeError, "bank"),
    "another dimension": (lambda: PredictionScrubber.from_embeddings(Model(), torch.zeros(4, 2), F, context_frames=2, bank=(torch.zeros(4, 3), F)), ShapeError, r"bank\[0\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case):
    is_one_sentence(*BAD[case])
