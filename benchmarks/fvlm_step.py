"""Bar vi, foveated VLM: forward and backward of a training step at the source's sizes against the bare matrix products of that very step; and its peak memory.

A share above 1 is no mistake: a 3x3 convolution in fp32 is counted as the product it comes down to, and the library computes it with fewer operations.
"""
import resource

import torch

from benchmarks.step_products import products_of
from benchmarks.timing import Table, compare
from fvlm.encoders.keys_values import VisionEncoder
from fvlm.encoders.language_model import LanguageModel
from fvlm.models.foveated_vlm import FoveatedVLM
from fvlm.models.foveation_config import FoveationConfig

CLIPS, FRAMES, MEMORY_GB = 2, 8, 8.0
ENCODER = dict(image_size=224, embed_dim=384, depth=12, heads=6, patch_size=14)  # DINOv2-S: 257 keys a frame and layer, 4,112 in a batch; random weights cost the same
ARMS = {"language model trained, both passes": dict(language_train="all", trained_pass="both"), "adapters of rank 8, fine pass": dict(language_train="lora:8", trained_pass="fine")}


def step_of(changes: dict, half: bool, language_model: LanguageModel):
    "A callable for one forward and backward on cached keys and values; no optimizer."
    encoder, draw = VisionEncoder.tiny(**ENCODER), torch.Generator().manual_seed(0)
    model = FoveatedVLM(FoveationConfig.preset("seed", **changes), encoder, language_model).train()
    keys = encoder.keys_values(torch.rand(CLIPS, FRAMES, 3, 224, 224, generator=draw), dtype=torch.bfloat16).as_batch()
    batch = {**keys, "latents": torch.randn(CLIPS, FRAMES, 4, 32, 32, generator=draw)}

    def step():
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model.loss(model(batch), batch)["loss"]
        loss.backward()
        return float(loss.detach())

    return step


def main() -> Table:
    "One row an arm and type: the share of a step's time that its own matrix products would take alone (1: nothing else costs time)."
    table = Table("fvlm_step")
    language_model = LanguageModel.from_pretrained("smollm2_135m_instruct")
    for name, changes in ARMS.items():
        for half, kind, bar, aim in ((False, "fp32", 0.5, 0.7), (True, "bf16", 0.4, 0.65)):
            step = step_of(changes, half, language_model)
            products, flops = products_of(step, everything=True)
            rows = compare(f"{name}, {kind}", ours=step, theirs=products, check=lambda: torch.isfinite(torch.tensor(step())).item(), rounds=5, threads=(1,), min_seconds=0.01)
            table.add(f"{name}, {kind}: {CLIPS} clips of {FRAMES} frames, {flops / 1e9:.0f} GFLOP, share of its GEMM rate", rows, bar=bar, aim=aim)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return table.fact("peak memory of this process, all arms one after another", f"{peak:.1f} GB", bar=f"<= {MEMORY_GB:g} GB", holds=peak <= MEMORY_GB)
