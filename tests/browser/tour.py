"""The notebook that the browser tests play with: every widget, on real frames of a drawn world and models with random weights."""

CELLS = {
    "setup": """
import numpy as np, timm, torch
from fvlm.core import generator, numpy_generator
from fvlm.data.worlds import BouncingSprites
from fvlm.instruments.attention_cube import AttentionCube, Cells
from fvlm.instruments.attention_explorer import AttentionExplorer
from fvlm.instruments.linked_view import LinkedView
from fvlm.instruments.prediction_scrubber import PredictionScrubber
from fvlm.models.foveated_vlm import FoveatedVLM
from fvlm.models.sc_vfp import SCVFP
torch.manual_seed(0), torch.set_num_threads(1)
frames = BouncingSprites(num_clips=1, num_frames=8, seed=4)[0]["frames"]
vit = timm.create_model("vit_tiny_patch16_224", patch_size=8, img_size=64, depth=3, num_classes=0).eval()
for block in vit.blocks:
    block.attn.qkv.weight.data *= 8  # so that the heads of an untrained model look at something
""",
    "vit": "w = AttentionExplorer.from_model(vit, frames, title='A small vision transformer')\nw",
    "again": "w",
    "fvlm": "f = AttentionExplorer.from_model(FoveatedVLM.tiny(num_queries=2), frames, title='A small foveated model')\nf",
    "sc_vfp": """
projection = torch.randn(64 * 64 * 3, 16, generator=generator(0, "projection")) / 64
embed = lambda video: (video.float().flatten(1) / 255 @ projection)[None]
s = AttentionExplorer.from_model(SCVFP.tiny(), frames, embedder=embed, title='SC-VFP, over time')
s
""",
    "grids": """
def planted(rows, columns, sharp=30.0):  # every patch looks at itself and, less, at the first frame's corner
    y, x = np.mgrid[:rows, :columns]
    places = np.stack([(x.ravel() + 0.5) / columns, (y.ravel() + 0.5) / rows], 1)
    scores = -sharp * np.square(places[:, None] - places[None]).sum(-1)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    return np.broadcast_to(weights, (2, len(frames), 2, *weights.shape))
g = AttentionExplorer([AttentionCube.from_array("wide", planted(4, 4), grid=(4, 4)), AttentionCube.from_array("narrow", planted(8, 8), grid=(8, 8))], frames, title='Two grids')
g
""",
    "big": """
def fetch(layer, frame, side=16):  # 152 MB in all: too much to send at once
    scores = 3 * numpy_generator(0, "big", layer, frame).standard_normal((12, side * side + 1, side * side + 1), dtype=np.float32)
    weights = np.exp(scores)
    return weights / weights.sum(-1, keepdims=True)
b = AttentionExplorer(AttentionCube(name="patch to patch", layers=12, heads=12, frames=8, keys=Cells.grid(16, 16, 1), queries=Cells.grid(16, 16, 1), fetch=fetch), frames, title='Twelve layers, twelve heads')
b
""",
    "scrubber": """
vectors = embed(frames)[0]
p = PredictionScrubber.from_embeddings({"SC-VFP": SCVFP.tiny().eval()}, (vectors - vectors.mean(0)) / vectors.std(0), frames, context_frames=5)
c = PredictionScrubber(frames[:3], frames[3:], {"half right": ((frames[3:].int() + frames[2].int()) // 2).to(torch.uint8)}, title='Frames')
c
""",
    "linked": """
seen = []
for block in vit.blocks:
    block.attn.fused_attn = False
    block.attn.attn_drop.register_forward_hook(lambda module, given, attention: seen.append(attention.detach()))
with torch.no_grad():
    vit((frames.permute(0, 3, 1, 2).float() / 255 - torch.tensor(vit.pretrained_cfg["mean"]).view(3, 1, 1)) / torch.tensor(vit.pretrained_cfg["std"]).view(3, 1, 1))
raw = torch.stack(seen[:3]).numpy()  # (layers, frames, heads, 65, 65), what the model used, without the explorer's help
v = LinkedView.from_outputs({"attention": seen[:3]}, frames, grid=(8, 8), prefix=1, query=0, title='Heads of a small vision transformer')
v
""",
    "busy": """
import time
from pathlib import Path
end = time.monotonic() + globals().get("tired", 0)
while time.monotonic() < end and not Path("rested").exists():
    time.sleep(0.02)
""",
}
PLACES = {name: index for index, name in enumerate(CELLS)}  # of the cells
EXPLORERS = {"vit": 0, "again": 1, "fvlm": 2, "sc_vfp": 3, "grids": 4, "big": 5}  # in the order of the page
