"""Bar v: an epoch over cached embeddings against encoding the frames again; the first epoch, which fills the cache, against bare encoding."""
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.timing import Table, compare
from fvlm.data.embedding_cache import EmbeddingCache
from fvlm.encoders.embedding_windows import EmbeddingWindows
from fvlm.data.video import read_clip
from fvlm.encoders.embeddings import FrameEmbedder, Preprocessing
from fvlm.encoders.extraction import embed_clip

CLIPS, FRAMES, SIZE = 2, 32, (120, 160)


def write_clips(
    folder: Path,  # where
) -> list[Path]:
    "Small videos of a drifting texture, the size of the KTH clips."
    import av

    paths = []
    for number in range(CLIPS):
        texture = np.random.default_rng(number).integers(0, 255, size=(SIZE[0] // 8, SIZE[1] // 8, 3)).repeat(8, 0).repeat(8, 1)
        paths.append(folder / f"{number}.mp4")
        with av.open(str(paths[-1]), "w") as container:
            stream = container.add_stream("mpeg4", rate=25, width=SIZE[1], height=SIZE[0], pix_fmt="yuv420p")
            for t in range(FRAMES):
                frame = np.ascontiguousarray(np.roll(texture, t, 1).astype(np.uint8))
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    return paths


def encoder() -> FrameEmbedder:
    "ViT-S/14 at 224 pixels with random weights: the architecture sets the cost, the weights do not."
    import timm

    model = timm.create_model("vit_small_patch14_dinov2", pretrained=False, img_size=224, num_classes=0)
    return FrameEmbedder(model, name="random_vit_small", preprocessing=Preprocessing())


def main() -> Table:
    "Two bars: reading rows against encoding frames, and what filling the cache adds to encoding."
    table = Table("embedding_cache")
    with tempfile.TemporaryDirectory() as folder:
        paths, embedder = write_clips(Path(folder)), encoder()
        cache = EmbeddingCache(Path(folder) / "cache")
        windows = EmbeddingWindows([embed_clip(path, embedder, cache) for path in paths])
        keys = [(entry["clip_key"], entry["fingerprint"]) for entry in cache.entries()]
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))

        def encode() -> list[torch.Tensor]:
            return [embedder(read_clip(path))[0] for path in paths]

        def read() -> list[torch.Tensor]:
            return [torch.from_numpy(cache.get(*key).astype(np.float32)) for key in keys]

        def reopen() -> list[torch.Tensor]:
            fresh = EmbeddingCache(cache.dir)  # the first read of a process: index, map and checksums
            return [torch.from_numpy(fresh.get(*key).astype(np.float32)) for key in keys]

        def epoch() -> int:
            return sum(len(windows.batch(part)["target"]) for part in order.split(32))

        def first_epoch() -> list[torch.Tensor]:
            with tempfile.TemporaryDirectory(dir=folder) as new:
                empty = EmbeddingCache(new)
                return [torch.from_numpy(embed_clip(path, embedder, empty).astype(np.float32)) for path in paths]

        def same(a, b) -> bool:
            a, b = (torch.stack(sorted(rows, key=lambda x: float(x[0, 0]))) for rows in (a, b))
            return bool(((a - b).abs() <= 2e-3 * (1 + b.abs())).all())  # float16 steps

        def all_windows() -> bool:
            return epoch() == len(windows) and same(windows.matrix.split(FRAMES), encode())

        table.add("shuffled epoch of windows (batch 32) over cached rows", compare("epoch", epoch, encode, check=all_windows, rounds=5, threads=(1,)), bar=500, aim=5000)
        table.add("every cached row as float32", compare("read", read, encode, check=lambda: same(read(), encode()), rounds=5, threads=(1,)), bar=500, aim=5000)
        table.add("the same, opened and checksummed first", compare("reopen", reopen, encode, check=lambda: same(reopen(), encode()), rounds=5, threads=(1,)))
        table.add("first epoch (decode, encode, store) over bare decode and encode, seconds",
                  compare("first", encode, first_epoch, check=lambda: same(first_epoch(), encode()), rounds=5), bar=1.03, at_most=True)
    return table
