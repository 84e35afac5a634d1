"""What benchmarks measure is what they say: the shapes that they build fit, whatever the arm."""
import pytest

from benchmarks.pixelcnn_sampling import box


@pytest.mark.parametrize("changes", [{}, dict(num_codes=16, num_levels=3), dict(attention_every=2)])
def test_the_sampled_box_has_the_models_levels(changes):
    model, codes = box((1, 2, 3, 2), **changes)
    assert codes.shape == (2, 2, model.num_levels, 2, 3) and int(codes.max()) < model.num_codes
    assert model.sample(codes[:, :1], 1).shape == codes[:, 1:].shape
