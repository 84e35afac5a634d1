"""Bars i and i': SCMHSA inference, folded, against a naive loop over heads and timm; its training step in bf16 against timm in fp32."""
import torch
from torch import nn

from benchmarks.timing import Table, compare, geometric_mean
from fvlm.blocks.scmhsa import SCMHSA, FoldedSCMHSA

SHAPES = ((8, 16, 256, 8), (32, 16, 384, 6), (1, 16, 384, 6), (1, 64, 768, 8))  # B, T, d, H


class NaiveHeads(nn.Module):
    "One Linear a head and projection, a Python loop over heads: the equation as printed."

    def __init__(self, block: SCMHSA):
        super().__init__()
        weights, biases = block.qkv.weight.view(3, block.num_heads, block.head_dim, block.dim), block.qkv.bias.view(3, block.num_heads, block.head_dim)
        self.projections = nn.ModuleList(nn.ModuleList(linear_of(w, b) for w, b in zip(ws, bs)) for ws, bs in zip(weights.transpose(0, 1), biases.transpose(0, 1)))
        self.out, self.scale = linear_of(block.proj.weight, block.proj.bias), block.head_dim**-0.5

    def forward(self, x):
        heads = []
        for query, key, value in self.projections:
            attention = (query(x) @ key(x).transpose(1, 2) * self.scale).softmax(-1)
            heads.append(attention @ value(x))
        return self.out(torch.cat(heads, -1))


def linear_of(weight, bias) -> nn.Linear:
    "An nn.Linear holding copies."
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.load_state_dict({"weight": weight.detach().clone(), "bias": bias.detach().clone()})
    return linear


def sides(batch, tokens, dim, heads):
    "A block, the naive loop and timm's Attention with its weights, and an input."
    from timm.layers import Attention

    with torch.random.fork_rng():
        torch.manual_seed(0)
        block, x = SCMHSA(dim, heads), torch.randn(batch, tokens, dim)
    with torch.no_grad():
        block.qkv.weight.mul_(3**0.5)  # queries and keys of unit variance: attention that is not uniform
    timms = Attention(dim, heads, attn_head_dim=dim, qkv_bias=True)
    timms.load_state_dict(block.state_dict())
    return block, NaiveHeads(block), timms, x


def near(ours, theirs, tolerance: float) -> None:
    "Assert that two tensors agree to `tolerance` of the larger one's largest value."
    error = (ours.float() - theirs).abs().max() / theirs.abs().max()
    assert error <= tolerance, f"relative difference {error:.1e}, expected at most {tolerance:.0e}"


def inference(shape):
    "Folded against naive in fp32, folded in bf16 (conversion in and out included) against naive in fp32, folded against timm in fp32."
    block, naive, timms, x = sides(*shape)
    folded, half = block.fold().eval(), block.fold().to(torch.bfloat16).eval()

    def in_bf16():
        return half(x.to(torch.bfloat16)).float()

    name = "B,T,d,H = {},{},{},{}".format(*shape)
    with torch.inference_mode():
        return (
            compare(name, lambda: folded(x), lambda: naive(x), check=lambda: near(folded(x), naive(x), 1e-5)),
            compare(name, in_bf16, lambda: naive(x), check=lambda: near(in_bf16(), naive(x), 2e-2)),
            compare(name, lambda: folded(x), lambda: timms(x), check=lambda: near(folded(x), timms(x), 1e-5)),
        )


def training(shape):
    "Forward and backward, all gradients: ours under bf16 autocast, and the trained fold, against timm in fp32; ours against timm, both in bf16."
    block, _, timms, x = sides(*shape)
    x.requires_grad_()
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))

    def step(module, half):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = module(x)
        return [out.detach(), *torch.autograd.grad(out, [x, *module.parameters()], upstream.to(out.dtype))]

    def agree():
        for ours, theirs in zip(step(block, True), step(timms, False), strict=True):
            near(ours, theirs, 5e-2)

    folded = FoldedSCMHSA(block.dim, block.num_heads, source=block)
    name = "B,T,d,H = {},{},{},{}".format(*shape)
    return (
        compare(name, lambda: step(block, True), lambda: step(timms, False), check=agree),
        compare(name, lambda: step(folded, True), lambda: step(timms, False), check=lambda: near(step(folded, True)[0], step(timms, False)[0], 2e-2)),
        compare(name, lambda: step(block, True), lambda: step(timms, True), check=agree),
    )


def main() -> Table:
    "Every shape for information, the geometric mean against its bar."
    table = Table("attention")
    found = [inference(shape) for shape in SHAPES]
    bars = (("i: folded fp32 / naive loop fp32", 1.7, 2.0), ("i: folded bf16 / naive loop fp32", 4.0, 8.0), ("i: folded fp32 / timm fp32", 1.5, None))
    add_rows(table, found, bars)
    found = [training(shape) for shape in SHAPES]
    bars = (("i': step, bf16 autocast / timm fp32", 1.6, 3.0), ("i': step of the trained fold, bf16 / timm fp32", None, None), ("i': step, bf16 autocast / timm bf16 autocast", None, None))
    return add_rows(table, found, bars)


def add_rows(table: Table, found, bars) -> Table:
    "A row a shape and one for the mean, for each kind of comparison."
    for (measured, bar, aim), runs in zip(bars, zip(*found)):
        for run in runs:
            table.add(f"{measured}, {run[0].name}", run)
        table.add(f"**{measured}, geometric mean**", geometric_mean(measured, *runs), bar=bar, aim=aim)
    return table
