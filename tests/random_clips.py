"""Clips of noise as a tiny foveated model takes them: a data set with `batch`, whose frames and latents are drawn once."""
import torch

from fvlm.core import generator


class RandomClips:
    def __init__(self, n, T):
        draw = generator(0, "clips")
        self.tensors = {"frames": torch.rand(n, T, 3, 28, 28, generator=draw), "latents": torch.randn(n, T, 4, 4, 4, generator=draw)}

    def __len__(self):
        return len(self.tensors["frames"])

    def batch(self, indices):
        return {name: values[indices] for name, values in self.tensors.items()}
