"""Bar iii: PixelCNN sampling, everything known kept, against a pass for every code; and what the walk costs over one parallel pass."""
import os
import time

import torch

from benchmarks.timing import Comparison, Table, thread_count
from fvlm.blocks.pixelcnn import SpatiotemporalPixelCNN

SHAPES = (((4, 8, 8, 4), 30), ((4, 16, 16, 1), 60), ((4, 16, 16, 16), 300))  # (frames, h, w, batch), bar
ROUNDS, POSITIONS = 8, 4  # a round's naive time is extrapolated from 4 positions: 32 in all, none twice


def box(shape, **changes):
    "A model of the preset, one frame of context and the frames to sample."
    frames, height, width, clips = shape
    rng = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SpatiotemporalPixelCNN.preset("bench", grid=(height, width), **changes).eval()
    return model, torch.randint(model.num_codes, (clips, 1 + frames, model.num_levels, height, width), generator=rng)


def seconds(call) -> float:
    "Of one call."
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def same_codes(shape) -> None:
    "Assert that both samplers draw the same codes from the same generator, and logits that agree."
    model, codes = box(shape)
    found = [model.sample(codes[:, :1], shape[0], cached=cached, generator=torch.Generator().manual_seed(1), return_logits=True) for cached in (True, False)]
    assert torch.equal(found[0][0], found[1][0]), "the two samplers drew different codes"
    assert torch.allclose(found[0][1], found[1][1], atol=1e-4), "the logits differ"


def sampling(shape, **changes):
    "Naive / cached and cached / one parallel pass, a Comparison a thread count each; in every round all three are timed, in turn."
    model, codes = box(shape, **changes)
    frames, height, width, _ = shape
    sites = frames * height * width
    order = torch.randperm(sites, generator=torch.Generator().manual_seed(2))[:ROUNDS * POSITIONS].view(ROUNDS, POSITIONS)

    def cached():
        model.sample(codes[:, :1], frames, generator=torch.Generator().manual_seed(1))

    def parallel():
        with torch.inference_mode():
            model(codes, start=1)

    def one_code(position):  # what the naive sampler runs for it: a pass over the frames so far, the last one asked for
        t = 1 + position // (height * width)
        with torch.inference_mode():
            model(codes[:, :t + 1], start=t)

    speed, cost = [], []
    for threads in (n for n in (1, 2) if n <= (os.cpu_count() or 1)):
        with thread_count(threads):
            found = {"speed": [], "cost": [], "seconds": []}
            for call in (cached, parallel, lambda: one_code(sites - 1)):
                call()
            for turn in range(ROUNDS):
                spent, calls = {}, {"cached": cached, "parallel": parallel, "naive": lambda: [one_code(int(position)) for position in order[turn]]}
                for name in calls if turn % 2 == 0 else reversed(calls):
                    spent[name] = seconds(calls[name])
                found["speed"].append(spent["naive"] / POSITIONS * sites / spent["cached"])
                found["cost"].append(spent["cached"] / spent["parallel"])
                found["seconds"].append(spent["cached"])
        middle = sorted(found["seconds"])[ROUNDS // 2]
        speed.append(Comparison(name=str(shape), threads=threads, ratios=tuple(found["speed"]), ours_seconds=middle))
        cost.append(Comparison(name=str(shape), threads=threads, ratios=tuple(found["cost"]), ours_seconds=middle))
    return speed, cost


def main() -> Table:
    "The three shapes against their bars, the walk at batch 1 against one pass, and the same with attention and three levels for information."
    table = Table("pixelcnn_sampling")
    same_codes(SHAPES[0][0])
    for shape, bar in SHAPES:
        speed, cost = sampling(shape)
        table.add(f"iii: naive / cached, (frames,h,w,batch) = {shape}", speed, bar=bar)
        table.add(f"cached / one parallel pass, {shape}{', aim: at most 4' if shape[-1] == 1 else ''}", cost)
    shape = SHAPES[1][0]
    for what, changes in (("three levels of 16 codes", dict(num_codes=16, num_levels=3)), ("attention after every second block", dict(attention_every=2))):
        _, cost = sampling(shape, **changes)
        table.add(f"cached / one parallel pass, {shape}, {what}", cost)
    return table
