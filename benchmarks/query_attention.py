"""Bar vii: deep query attention, nine queries a frame against one, keys and values computed once."""
import torch

from benchmarks.timing import Table, compare
from fvlm.blocks.query_attention import QueryAttention
from fvlm.encoders.keys_values import KeysValues, VisionEncoder

CLIPS, FRAMES, MANY = 1, 4, 9
SIZES = dict(image_size=224, embed_dim=384, depth=12, heads=6, patch_size=14)  # DINOv2-S; the weights do not matter for the time
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}


def near(ours, theirs, kind: str) -> None:
    "Assert that two tensors agree to the tolerance of a type, relative to the larger one's largest value."
    error = (ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()
    assert error <= TOLERANCE[kind], f"relative difference {error:.1e}, expected at most {TOLERANCE[kind]:.0e}"


def blocks() -> tuple[QueryAttention, QueryAttention, torch.Tensor]:
    "A block for one query and one for MANY with the same weights, and MANY queries."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        one, many, queries = QueryAttention(), QueryAttention(num_queries=MANY), torch.randn(CLIPS, FRAMES, MANY, 384)
    many.load_state_dict(one.state_dict(), strict=False)
    return one, many, queries


def costs(table: Table, kind: str) -> None:
    "Cost of MANY queries as a multiple of one: whole call and query part alone, forward, and forward with backward to query and projections."
    encoder = VisionEncoder.tiny(**SIZES, dtype=kind)
    frames = torch.rand(CLIPS, FRAMES, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    one, many, queries = blocks()
    kept = encoder.keys_values(frames)

    def ask(block, keys_values):
        return block.with_intermediates(queries[:, :, : block.num_queries], keys_values or encoder.keys_values(frames), encoder)[1]["per_query"]

    def learn(block, keys_values):
        ask(block, keys_values).square().sum().backward()
        block.zero_grad()

    def agree():
        with torch.no_grad():
            near(ask(many, kept)[:, :, :1], ask(one, None), kind)

    for part, given, bar in (("encoder pass and queries", None, 1.3), ("queries alone, keys and values at hand", kept, None)):
        with torch.no_grad():
            table.add(f"vii: {part}, {kind}, forward, {MANY} queries / 1", compare(part, lambda: ask(one, given), lambda: ask(many, given), check=agree, rounds=5), bar=bar, aim=bar and 1.1, at_most=True)
        table.add(f"vii: {part}, {kind}, forward and backward, {MANY} queries / 1", compare(part, lambda: learn(one, given), lambda: learn(many, given), check=None, rounds=5), bar=bar, aim=bar and 1.1, at_most=True)

    def anew():
        return torch.cat([one.with_intermediates(queries[:, :, i:i + 1], encoder.keys_values(frames), encoder)[1]["per_query"] for i in range(MANY)], 2)

    with torch.no_grad():
        table.add(f"{MANY} queries, keys and values kept / an encoder pass for every query, {kind}",
                  compare("kept", lambda: ask(many, None), anew, check=lambda: near(ask(many, None), anew(), kind), rounds=5, threads=(1,)))
    as_stored = {name: tensor.contiguous() for name, tensor in kept.as_batch().items()}
    frame_by_frame = KeysValues(as_stored["keys"], as_stored["values"], encoder.prefix, encoder.grid)
    table.add(f"queries alone, 1 query, {kind}, step: one layer a piece of memory / one frame a piece",
              compare("layout", lambda: learn(one, kept), lambda: learn(one, frame_by_frame), check=None, threads=(1,)))


def main() -> Table:
    "Both types; the bar is for the whole call, everything else is for information."
    table = Table("query_attention")
    for kind in ("fp32", "bf16"):
        costs(table, kind)
    return table
