"""A small predictor of codes with every weight drawn, biases and priors too: one that ignores a code by chance is not in the way of a test."""
import torch

from fvlm.blocks.pixelcnn import SpatiotemporalPixelCNN


def drawn_pixelcnn(
    spread=0.1,  # of what is added to every parameter: more, and the answers are further from even
    **changes,  # arguments of the model to set otherwise
):
    "A model in eval mode with two levels and attention, the same at every call."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SpatiotemporalPixelCNN(**{"num_codes": 3, "num_levels": 2, "grid": (5, 5), "channels": 8, "depth": 2, "attention_every": 1, "num_heads": 2, "attention_frames": 3, **changes})
        for parameter in model.parameters():
            parameter.data.add_(spread * torch.randn_like(parameter))
    return model.eval()
