"""Bar vi, SC-VFP: forward and backward of a training step against the bare matrix products of that very step, in fp32 and bf16."""
import torch

from benchmarks.step_products import products_of
from benchmarks.timing import Table, compare
from fvlm.blocks.encoder_block import dropout
from fvlm.models.sc_vfp import SCVFP, SCVFPConfig

TOKENS = 2050  # 410 windows of 5 frames
PRESETS = {
    "paper_budget (2 of 6 blocks), SCMHSA": dict(name="paper_budget", depth=2),  # the blocks are alike: the share is the same, the wait is not
    "small, SCMHSA": dict(name="small"),
}


def step_of(changes: dict, half: bool):
    "A callable for one forward and backward, dropout included, no optimizer; the shape of things as in training."
    config = SCVFPConfig.preset(**changes)
    model, draw = SCVFP(config).train(), torch.Generator().manual_seed(0)
    windows = torch.randn(TOKENS // config.context_frames, config.context_frames + 1, config.embed_dim, generator=draw)
    batch = {"embeddings": windows[:, :-1].contiguous(), "target": windows[:, -1].contiguous()}

    def step():
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model.loss(model(batch), batch)["loss"]
        loss.backward()
        return float(loss.detach())

    return step


def same_law(x):
    "Whether both dropouts keep nine in ten and scale them alike."
    ours, theirs = dropout(x, 0.1, True), torch.nn.functional.dropout(x, 0.1)
    both = (ours != 0) & (theirs != 0)
    return torch.allclose(ours[both].float(), theirs[both].float(), rtol=1e-2) and abs(float((ours != 0).float().mean() - (theirs != 0).float().mean())) < 2e-3


def main() -> Table:
    "One row a preset and type: the share of a step's time that its own matrix products would take alone (1 means nothing else costs time)."
    table = Table("sc_vfp_step")
    for name, changes in PRESETS.items():
        for half, kind, bar, aim in ((False, "fp32", 0.5, 0.7), (True, "bf16", 0.4, 0.65)):
            step = step_of(changes, half)
            products, flops = products_of(step)
            rows = compare(f"{name}, {kind}", ours=step, theirs=products, check=lambda: torch.isfinite(torch.tensor(step())).item(), rounds=5, threads=(1, 2) if changes["name"] == "small" else (1,), min_seconds=0.01)
            text = f"{name}, {kind}: step of {TOKENS} tokens, {flops / 1e9:.0f} GFLOP, share of its GEMM rate"
            for row in rows:
                table.add(text, [row], bar=bar if row.threads == 1 else None, aim=aim if row.threads == 1 else None)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(TOKENS, 1792).to(dtype)
        rows = compare("dropout", lambda: dropout(x, 0.1, True), lambda: torch.nn.functional.dropout(x, 0.1), check=lambda: same_law(x), rounds=7, threads=(1,))
        table.add(f"dropout in {str(dtype).removeprefix('torch.')}, ours against torch's", rows)
    return table
