"""A foveated model made by hand that works, and the same model with one thing broken: what the instruments must name, and what they must not.

Every frame shows twelve places. A place has a key (its colour) and a value (three numbers); the frame's cue names the key to look up in the next frame, and the next latent follows the
value found there. Query, attention, feature, state and prediction are linear maps set by hand in a random basis, so nothing is trained and ten seeds cost seconds.
"""
from functools import cache
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from fvlm.blocks.self_attention import MHSA
from fvlm.core import check_choice, generator
from fvlm.evidence.headroom import headroom, views_of
from fvlm.instruments.attention_entropy import attention_entropy, different_looks
from fvlm.instruments.diagnosis import Diagnoses
from fvlm.instruments.feature_similarity import feature_similarity
from fvlm.instruments.head_tsne import ablation_effects, head_tsne
from fvlm.recipes.foveation_probes import sensitivity

FAULTS = ("uniform attention", "identical queries", "head ignores h", "dead heads", "no headroom")  # the five
MORE_FAULTS = ("common mode", "twin heads")
PLACES, KEY, VALUE, LATENT, HEADS = 12, 12, 4, 3, 4
DIM = KEY + VALUE


def planted_world(seed: int, clips: int = 90, frames: int = 5, *, searched: bool = True, shared: float = 0.3) -> dict[str, Tensor]:
    "patches (n,T,N,D), cue (n,T,KEY), latents (n,T,3,1,1), location (n,T,N): a batch. searched=False: the latent follows the mean of all values."
    draw = generator(seed, "planted failures")
    order = torch.rand(clips, frames, PLACES, generator=draw).argsort(-1)
    values = torch.randn(clips, frames, PLACES, VALUE, generator=draw)
    wanted = torch.randint(PLACES, (clips, frames + 1), generator=draw)
    basis = torch.linalg.qr(torch.randn(DIM, DIM, generator=draw))[0]
    common = shared * torch.nn.functional.normalize(torch.randn(DIM, generator=draw), dim=0) * DIM**0.5
    patches = torch.cat([torch.eye(KEY)[order] * 2, values], -1) @ basis.T + common
    location = (order == wanted[:, :frames, None]).float()
    seen = (location[..., None] * values).sum(2) if searched else values.mean(2) * PLACES**0.5
    known = torch.cat([torch.zeros(clips, 1, LATENT), seen[:, :-1, :LATENT]], 1)
    latents = known + 0.3 * torch.randn(known.shape, generator=draw)
    return {"patches": patches, "cue": torch.eye(KEY)[wanted[:, 1:]], "latents": latents[..., None, None], "location": location, "basis": basis.expand(clips, DIM, DIM), "common": common.expand(clips, DIM)}


class PlantedLooker(nn.Module):
    "Looks up what the last cue named. `fault` breaks one part."

    def __init__(self, batch: dict[str, Tensor], fault: str | None = None, seed: int = 0):
        super().__init__()
        check_choice("fault", fault, (None, *FAULTS, *MORE_FAULTS))
        draw = generator(seed, "planted looker", fault)
        self.basis, self.common, self.fault = batch["basis"][0], batch["common"][0], fault
        self.config = SimpleNamespace(num_queries=1)
        self.q_static = nn.Parameter(torch.randn(1, KEY, generator=generator(seed, "static")) / 2)
        self.to_key = nn.Linear(DIM, KEY, bias=False)
        self.sharpness = 0.0 if fault == "uniform attention" else 3.0
        self.mix = MHSA(DIM, HEADS, causal=True)
        self.read = nn.Linear(2 * DIM, LATENT)
        with torch.no_grad():
            for parameter in (*self.mix.parameters(), self.read.weight):
                parameter.copy_(torch.randn(parameter.shape, generator=generator(seed, "weights", *parameter.shape)) / parameter.shape[-1] ** 0.5)
            self.to_key.weight.copy_(self.basis[:, :KEY].T)
            self.read.weight[:, :DIM] = self.basis[:, KEY: KEY + LATENT].T
            self.read.weight[:, DIM:] *= 0.1
            self.read.bias.zero_()
            if fault == "head ignores h":
                self.read.weight.zero_()
                self.read.bias.fill_(0.5)
            head = int(torch.randint(HEADS, (1,), generator=draw))
            packed, bias = self.mix.qkv.weight.unflatten(0, (3, HEADS, -1)), self.mix.qkv.bias.unflatten(0, (3, HEADS, -1))
            if fault == "dead heads":
                self.broken = (head,)
                if seed % 2:
                    packed[2, head], bias[2, head] = 0, 0  # its values
                else:
                    self.mix.proj.weight.unflatten(1, (HEADS, -1))[:, head] = 0  # it speaks, nobody listens
            if fault == "twin heads":
                other = (head + 1) % HEADS
                self.broken = tuple(sorted((head, other)))
                turn = torch.linalg.qr(torch.randn(DIM // HEADS, DIM // HEADS, generator=draw))[0]
                packed[:2, other], bias[:2, other] = packed[:2, head], bias[:2, head]
                packed[2, other], bias[2, other] = 2 * turn @ packed[2, head], 2 * turn @ bias[2, head]

    def forward(self, batch, *, passes="both", intermediates=False):
        patches, (B, T) = batch["patches"], batch["patches"].shape[:2]
        if "queries" in batch:
            queries = batch["queries"]
        elif self.fault == "identical queries":
            queries = self.q_static.expand(B, T, 1, -1)
        else:
            queries = torch.cat([self.q_static.expand(B, 1, 1, -1), batch["cue"][:, :-1, None]], 1)
        outputs = {"queries": queries, **self._pass(queries, patches, batch)}
        if passes == "both":
            outputs |= {f"{name}_coarse": value for name, value in self._pass(self.q_static.expand(B, T, 1, -1), patches, batch).items()}
        return outputs

    def _pass(self, queries, patches, batch):
        keys = self.to_key(patches - self.common)
        attention = (self.sharpness * queries @ keys.mT).softmax(-1)
        features = (attention @ patches).squeeze(2)
        mixed, seen = self.mix.with_intermediates(features - self.common)
        looked = torch.cat([features - self.common, mixed], -1)
        hidden = torch.cat([torch.zeros_like(looked[:, :1]), looked[:, :-1]], 1)  # frame t is predicted from frame t-1
        return {"attention": [attention.unsqueeze(2)], "features": features, "hidden": hidden, "heads": [seen["heads"]], "time_attention": [seen["attention"]], "prediction": self.head(hidden, None)}

    def head(self, hidden, previous):
        return self.read(hidden)[..., None, None]


@cache
def planted_room(seed: int, searched: bool):
    "The headroom of the world, once a seed."
    batch = planted_world(seed, 150, searched=searched)
    return headroom(views_of(batch["patches"], location=batch["location"]), batch["latents"], {"train": range(80), "val": range(80, 110), "test": range(110, 150)}, penalties=(0.1, 10.0, 1000.0))


def diagnose(fault: str | None, seed: int) -> tuple[Diagnoses, PlantedLooker]:
    "All three instruments on the model with this fault, None for the healthy one."
    searched = fault != "no headroom"
    batch = planted_world(seed, searched=searched, shared=30.0 if fault == "common mode" else 0.3)
    model = PlantedLooker(batch, fault, seed).eval()
    looks = different_looks(model, batch, seed=seed)
    own = looks["own"]
    heard = sensitivity(lambda h, previous: model.head(h, previous), own["hidden"][:, 1:], batch["latents"][:, :-1])
    return Diagnoses(parts={
        "attention": attention_entropy(own["attention"], coarse=own["attention_coarse"], shuffled=looks["other_clip"]["attention"]),
        "heads": head_tsne(own["heads"], attention=own["time_attention"], effects=ablation_effects(model, batch), most=120, perplexity=10),
        "features": feature_similarity(
            {name: each["features"] for name, each in looks.items()}, queries=own["queries"], attention=own["attention"], patches=batch["patches"],
            weights={name: each["attention"][0][:, :, 0, 0] for name, each in looks.items()}, sensitivities=heard, headroom=planted_room(seed, searched)),
    }), model
