"""The matrix products of a training step, run alone: what a step would cost if nothing else cost time. Not a benchmark by itself."""
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

MM = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


class Products(TorchDispatchMode):
    """Notes every matrix product that runs inside, by shape, stride and type of its two matrices: mm and addmm.

    With `everything` also bmm, and convolutions as the products they come down to, forward and backward.
    """

    def __init__(
        self,
        everything: bool = False,  # also bmm and convolutions
    ):
        super().__init__()
        self.everything, self.seen = everything, Counter()

    def note(self, rows: int, inner: int, columns: int, dtype: torch.dtype, times: int = 1) -> None:
        "A dense product of that shape."
        if times:
            self.seen[((rows, inner), (inner, 1), (inner, columns), (columns, 1), dtype)] += times

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in MM:
            a, b = args[-2:]
            self.seen[(tuple(a.shape), a.stride(), tuple(b.shape), b.stride(), a.dtype)] += 1
        elif self.everything and func is torch.ops.aten.bmm.default:
            a, b = args  # many small products in one call: one by one they would cost more than in the step
            self.seen[(tuple(a.shape), a.stride(), tuple(b.shape), b.stride(), a.dtype)] += 1
        elif self.everything and func is torch.ops.aten.convolution.default:
            x, weight = args[:2]
            self.note(result[:, 0].numel(), weight[0].numel(), len(weight), x.dtype)
        elif self.everything and func is torch.ops.aten.convolution_backward.default:
            grad, x, weight = args[:3]
            places, inner, out = grad[:, 0].numel(), weight[0].numel(), len(weight)
            self.note(inner, places, out, x.dtype, int(result[1] is not None))
            self.note(places, out, inner, x.dtype, int(result[0] is not None))
        return result


def products_of(
    step,  # a callable without arguments: forward and backward
    *,
    everything: bool = False,  # also bmm and convolutions
):
    "A callable that runs the matrix products of `step`, each as often and in the layout in which the step runs it; and their FLOPs."
    with Products(everything) as products:
        step()
    assert products.seen, "the step ran no matrix product that was seen"
    pairs = []
    for (a, a_stride, b, b_stride, dtype), times in products.seen.items():
        made = [torch.randn(1 + sum((n - 1) * step for n, step in zip(shape, stride))).to(dtype).as_strided(shape, stride) for shape, stride in ((a, a_stride), (b, b_stride))]
        pairs.append((*made, times))
    flops = sum(2 * a.numel() * b.shape[-1] * times for a, b, times in pairs)

    def run():
        with torch.no_grad():
            for a, b, times in pairs:
                for _ in range(times):
                    a @ b

    return run, flops
