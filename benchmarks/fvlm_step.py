"""Bar vi, foveated VLM: forward and backward of a training step at the source's sizes against the bare matrix products of that very step; and its peak memory."""
import resource
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.timing import Table, compare
from fvlm.encoders.keys_values import VisionEncoder
from fvlm.encoders.language_model import LanguageModel
from fvlm.models.foveated_vlm import FoveatedVLM
from fvlm.models.foveation_config import FoveationConfig

CLIPS, FRAMES, MEMORY_GB = 2, 8, 8.0
ENCODER = dict(image_size=224, embed_dim=384, depth=12, heads=6, patch_size=14)  # DINOv2-S: 257 keys a frame and layer, 4,112 in a batch; random weights cost the same
ARMS = {"language model trained, both passes": dict(language_train="all", trained_pass="both"), "adapters of rank 8, fine pass": dict(language_train="lora:8", trained_pass="fine")}


class Products(TorchDispatchMode):
    "Notes every matrix product inside as (rows, inner, columns, type): mm, addmm, bmm a matrix, and convolutions as the products they come down to, forward and backward."

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            a, b = args[-2:]
            self.seen[(*a.shape, b.shape[1], a.dtype)] += 1
        elif func is torch.ops.aten.bmm.default:
            a, b = args
            self.seen[(*a.shape[1:], b.shape[2], a.dtype)] += len(a)
        elif func is torch.ops.aten.convolution.default:
            x, weight = args[:2]
            self.seen[(found[:, 0].numel(), weight[0].numel(), len(weight), x.dtype)] += 1
        elif func is torch.ops.aten.convolution_backward.default:
            grad, x, weight = args[:3]
            places, inner, out = grad[:, 0].numel(), weight[0].numel(), len(weight)
            self.seen[(inner, places, out, x.dtype)] += int(found[1] is not None)
            self.seen[(places, out, inner, x.dtype)] += int(found[0] is not None)
        return found


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


def products_of(step):
    "A callable that runs the step's matrix products alone, and their FLOPs."
    with Products() as products:
        step()
    pairs = [(torch.randn(rows, inner).to(dtype), torch.randn(inner, columns).to(dtype), times) for (rows, inner, columns, dtype), times in products.seen.items()]
    flops = sum(2 * a.shape[0] * a.shape[1] * b.shape[1] * times for a, b, times in pairs)

    def run():
        with torch.no_grad():
            for a, b, times in pairs:
                for _ in range(times):
                    a @ b

    return run, flops


def main() -> Table:
    "One row an arm and type: the share of a step's time that its own matrix products would take alone (1: nothing else costs time)."
    table = Table("fvlm_step")
    language_model = LanguageModel.from_pretrained("smollm2_135m_instruct")
    for name, changes in ARMS.items():
        for half, kind, bar, aim in ((False, "fp32", 0.5, 0.7), (True, "bf16", 0.4, 0.65)):
            step = step_of(changes, half, language_model)
            products, flops = products_of(step)
            rows = compare(f"{name}, {kind}", ours=step, theirs=products, check=lambda: torch.isfinite(torch.tensor(step())).item(), rounds=5, threads=(1,), min_seconds=0.01)
            table.add(f"{name}, {kind}: {CLIPS} clips of {FRAMES} frames, {flops / 1e9:.0f} GFLOP, share of its GEMM rate", rows, bar=bar, aim=aim)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return table.fact("peak memory of this process, all arms one after another", f"{peak:.1f} GB", bar=f"<= {MEMORY_GB:g} GB", holds=peak <= MEMORY_GB)
