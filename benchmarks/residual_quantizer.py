"""Bar ii: residual quantisation, flat against lucidrains' ResidualVQ (eval and a training step), the tree against a loop over parents."""
import torch

from benchmarks.timing import Table, compare, geometric_mean
from fvlm.blocks.residual_quantizer import HierarchicalResidualQuantizer

FLAT = ((4096, 64, 64, 3), (4096, 64, 256, 4), (16384, 32, 16, 3))  # N vectors, D, m codes, L levels
TREE = ((4096, 64, 8, 3), (4096, 64, 16, 3), (16384, 32, 8, 3))


def quantizer_of(shape, books):
    "A quantiser with codewords of one level's scale below the level before, and vectors."
    vectors, dim, codes, levels = shape
    rng = torch.Generator().manual_seed(0)
    quantizer = HierarchicalResidualQuantizer(dim, codes, levels, books=books, kmeans_steps=0, count_total=False, restart_below=None)
    for level in range(levels):
        book = quantizer._book(level)
        book.copy_(torch.randn(book.shape, generator=rng) * 0.5**level)
    quantizer.counts.fill_(1)
    return quantizer, torch.randn(vectors, dim, generator=rng)


def lucidrains(quantizer):
    "Their ResidualVQ with the same codebooks, settings and no restarts."
    from vector_quantize_pytorch import ResidualVQ

    theirs = ResidualVQ(dim=quantizer.dim, codebook_size=quantizer.num_codes, num_quantizers=quantizer.num_levels, decay=quantizer.decay,
                        commitment_weight=quantizer.commitment_weight, rotation_trick=False, threshold_ema_dead_code=0)
    for level, layer in enumerate(theirs.layers):
        for buffer in (layer._codebook.embed, layer._codebook.embed_avg):
            buffer.copy_(quantizer._book(level))
    return theirs


class LoopOverParents:
    "The tree with a Python loop over the books of a level: pick their vectors, search, put back; in training, update each book by its two running sums."

    def __init__(self, quantizer):
        self.quantizer = quantizer
        self.books = [quantizer._book(level).clone() for level in range(quantizer.num_levels)]
        self.counts = [torch.ones(book.shape[:2]) for book in self.books]
        self.sums = [book.clone() for book in self.books]

    def __call__(self, x, training=False):
        left, total, book, indices, loss = x.detach(), torch.zeros_like(x), torch.zeros(len(x), dtype=torch.long), [], 0.0
        for level, codebooks in enumerate(self.books):
            code, words = torch.empty_like(book), torch.empty_like(left)
            for parent in range(len(codebooks)):
                here = (book == parent).nonzero().squeeze(1)
                if not len(here):
                    continue
                mine = left[here]
                found = torch.cdist(mine, codebooks[parent]).argmin(1)
                code[here], words[here] = found, codebooks[parent][found]
                if training:
                    self.update(level, parent, mine, found)
            total, indices = total + words, [*indices, code]
            loss = loss + self.quantizer.commitment_weight * (words - (x - (total - words))).square().mean()
            left, book = left - words, book * self.quantizer.num_codes + code
        return x + (total - x).detach(), torch.stack(indices, 1), loss

    def update(self, level, parent, mine, found):
        "One EMA step of one book."
        decay, counts, sums = self.quantizer.decay, self.counts[level][parent], self.sums[level][parent]
        chosen = torch.nn.functional.one_hot(found, len(counts)).to(mine.dtype)
        counts.mul_(decay).add_(chosen.sum(0), alpha=1 - decay)
        sums.mul_(decay).add_(chosen.t() @ mine, alpha=1 - decay)
        self.books[level][parent] = sums / counts.unsqueeze(1)


def agree(ours, theirs) -> None:
    "Assert equal indices, and equal vectors to rounding."
    out, (quantized, indices, *_) = ours(), theirs()
    same = (out.indices == indices).all(1).double().mean()
    assert torch.equal(out.indices, indices), f"indices of {100 * float(1 - same):.3f} % of the vectors differ"
    assert torch.allclose(out.quantized, quantized, atol=1e-5)


def evaluation(shape, books, rival):
    "Search and sum, no gradients."
    quantizer, x = quantizer_of(shape, books)
    quantizer.eval()
    other = rival(quantizer)
    if isinstance(other, torch.nn.Module):
        other.eval()
    with torch.inference_mode():
        return compare(name(shape), lambda: quantizer(x), lambda: other(x), check=lambda: agree(lambda: quantizer(x), lambda: other(x)))


def training(shape, books, rival):
    "Forward with the EMA step, and the gradient of quantised vectors and loss with respect to the input."
    quantizer, x = quantizer_of(shape, books)
    other = rival(quantizer)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    x.requires_grad_()

    def ours():
        out = quantizer(x)
        return torch.autograd.grad((out.quantized, out.loss), x, (upstream, torch.ones(())))

    def step(rival):
        return rival(x) if isinstance(rival, torch.nn.Module) else rival(x, training=True)

    def theirs():
        quantized, _, loss = step(other)
        return torch.autograd.grad((quantized, loss.sum()), x, (upstream, torch.ones(())))

    def check():
        fresh, _ = quantizer_of(shape, books)
        same = rival(fresh)
        agree(lambda: fresh(x), lambda: step(same))  # and both have learned
        moved = [layer._codebook.embed[0] for layer in same.layers] if isinstance(same, torch.nn.Module) else same.books
        for level, book in enumerate(moved):
            assert torch.allclose(fresh._book(level).flatten(), book.flatten(), atol=1e-3), f"level {level}: the codebooks differ after one step"

    return compare(name(shape), ours, theirs, check=check)


def name(shape) -> str:
    "A shape for the table."
    return "N,D,m,L = {},{},{},{}".format(*shape)


def main() -> Table:
    "Every shape for information, the geometric mean against its bar."
    table = Table("residual_quantizer")
    for measured, run, shapes, books, rival, bar, aim in (
        ("ii: flat, eval / lucidrains", evaluation, FLAT, "shared", lucidrains, 2.0, 4.0),
        ("ii: flat, training step / lucidrains", training, FLAT, "shared", lucidrains, 3.0, 6.0),
        ("ii: tree, eval / loop over parents", evaluation, TREE, "path", LoopOverParents, 2.0, 6.0),
        ("ii: tree, training step / loop over parents", training, TREE, "path", LoopOverParents, 2.0, 6.0),
    ):
        found = [run(shape, books, rival) for shape in shapes]
        for comparison in found:
            table.add(f"{measured}, {comparison[0].name}", comparison)
        table.add(f"**{measured}, geometric mean**", geometric_mean(measured, *found), bar=bar, aim=aim)
    return table
