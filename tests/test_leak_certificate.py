"""The certificate catches planted leaks of every kind, passes the default model in all its shapes, and refuses to be empty; gradient routes say which loss reaches which part."""
import math

import pytest
import torch

from fvlm.core import ConfigError, InputError, generator
from fvlm.evidence.leak_certificate import PERTURBATIONS, gradient_routes, leak_certificate, perturbed
from fvlm.models.foveated_vlm import FoveatedVLM


def example(clips=3, frames=5, **extra):
    draw = generator(0, "leak example")
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]][:clips], dtype=torch.bool)
    return {"frames": torch.rand(clips, frames, 3, 28, 28, generator=draw), "latents": torch.randn(clips, frames, 4, 4, 4, generator=draw),
            "text": torch.randint(250, (clips, 4), generator=draw), "text_mask": mask, "caption": torch.randint(250, (clips, 6), generator=draw), **extra}


def test_the_default_passes_every_question():
    found = leak_certificate(FoveatedVLM.tiny(caption_weight=1.0), example())
    assert found.passes and not found.absent and set(found.leaks) == set(PERTURBATIONS)
    assert all(change == 0 for row in found.leaks.values() for change in row.values())
    assert all(found.effects[name] > 0 for name in ("later_frames", "other_clips", "caption")) and found.effects["padding"] == 0
    for output in ("prediction", "prediction_coarse", "features", "queries", "hidden", "attention", "caption_logits"):
        assert output in found.leaks["other_clips"], output
    assert str(found).startswith("no leak") and found.table().count("\n") == 5


@pytest.mark.parametrize("changes", [{"num_queries": 3}, {"attention_mode": "shallow"}, {"target": "delta"}, {"fine_passes": 2}, {"query_skip": True}, {"text_position": "after"},
                                     {"top_k": 4}, {"gumbel": True}, {"separate_heads": True}, {"trained_pass": "coarse"}, {"head": "spatial_film"}], ids=str)
def test_other_shapes_of_the_model_pass(changes):
    found = leak_certificate(FoveatedVLM.tiny(caption_weight=1.0, **changes), example())
    assert found.passes, str(found)


def test_the_legacy_norm_fails():
    found = leak_certificate(FoveatedVLM.tiny(caption_weight=1.0, norm="legacy"), example())
    assert not found.passes and str(found).startswith("LEAKS")
    for name in ("later_frames", "other_clips"):
        assert found.leaks[name]["prediction"] > 0 and found.leaks[name]["hidden_coarse"] > 0
        assert found.leaks[name]["features_coarse"] == 0, "the coarse features are made before the norm"
    assert found.leaks["later_frames"]["queries"] > 0, "where it looks early depends on late frames"
    assert found.figure().width > 100


@pytest.mark.parametrize("frame", [1, 2, 4])
def test_every_frame_can_be_the_first_perturbed(frame):
    assert leak_certificate(FoveatedVLM.tiny(), example(), frame=frame).passes


def test_cached_keys_and_values_are_perturbed_too():
    model, batch = FoveatedVLM.tiny(), example()
    cached = {**model.encoder.keys_values(batch.pop("frames")).as_batch(), **batch}
    found = leak_certificate(model, cached)
    assert found.passes and found.effects["later_frames"] > 0
    assert not leak_certificate(FoveatedVLM.tiny(norm="legacy"), cached).passes


class Leaky(torch.nn.Module):
    "A model with one planted leak."

    def __init__(self, leak):
        super().__init__()
        self.inner, self.leak = FoveatedVLM.tiny(caption_weight=1.0), leak
        self.language_model = self.inner.language_model

    def forward(self, batch, **options):
        outputs = self.inner(batch, **options)
        if self.leak == "next frame":
            outputs["prediction"][:, :-1] += 1e-6 * batch["latents"][:, 1:]
            outputs["prediction"][:, 2] += 1e-3 * batch["frames"][:, 2].mean()
        elif self.leak == "clips":
            outputs["queries"] = outputs["queries"] + 1e-4 * batch["frames"].mean()
        elif self.leak == "caption":
            outputs["hidden"] = outputs["hidden"] + 1e-4 * batch["caption"].float().mean()
        elif self.leak == "caption ahead":
            outputs["caption_logits"] = outputs["caption_logits"] + 1e-4 * batch["caption"][:, -1:, None]
        elif self.leak == "padding":
            outputs["features"] = outputs["features"] + 1e-5 * batch["text"].float().mean((1), keepdim=True)[..., None]
        return outputs


@pytest.mark.parametrize("leak, perturbation, output", [("next frame", "later_frames", "prediction"), ("clips", "other_clips", "queries"), ("caption", "caption", "hidden"),
                                                        ("caption ahead", "caption", "caption_logits"), ("padding", "padding", "features")])
def test_planted_leaks_are_found(leak, perturbation, output):
    found = leak_certificate(Leaky(leak), example())
    assert not found.passes and (perturbation, output) in [(name, where) for name, where, _ in found.found], str(found)
    clean = Leaky("none")
    assert leak_certificate(clean, example()).passes


def test_nan_is_a_leak():
    class Broken(Leaky):
        def forward(self, batch, **options):
            outputs = self.inner(batch, **options)
            outputs["prediction"] = outputs["prediction"] * float("nan")
            return outputs

    assert not leak_certificate(Broken("none"), example()).passes


def test_a_perturbation_that_moves_nothing_is_no_certificate():
    class Blind(Leaky):
        def forward(self, batch, **options):
            return {"prediction": torch.zeros_like(batch["latents"])}

    found = leak_certificate(Blind("none"), example())
    assert not found.found and found.blunt and not found.passes and str(found).startswith("no certificate")


def test_perturbations_change_what_they_say_and_nothing_else():
    batch = example(flow=torch.zeros(3, 4, 2, 8, 8))
    options = dict(frame=2, word=3, vocab_size=250)
    later = perturbed("later_frames", batch, **options)
    for key in ("frames", "latents"):
        assert torch.equal(later[key][:, :2], batch[key][:, :2]) and not (later[key][:, 2:] == batch[key][:, 2:]).flatten(2).all(-1).any()
    assert torch.equal(later["flow"][:, :1], batch["flow"][:, :1]) and (later["flow"][:, 1:] != batch["flow"][:, 1:]).any() and torch.equal(later["text"], batch["text"])
    assert later["frames"].min() >= 0 and later["frames"].max() <= 1
    padding = perturbed("padding", batch, **options)
    assert torch.equal(padding["text"][batch["text_mask"]], batch["text"][batch["text_mask"]]) and (padding["text"] != batch["text"])[~batch["text_mask"]].all()
    assert perturbed("padding", {**batch, "text_mask": torch.ones(3, 4, dtype=torch.bool)}, **options) is None


def test_bad_input():
    model = FoveatedVLM.tiny()
    with pytest.raises(InputError, match="at least 2 of at least 3"):
        leak_certificate(model, example(clips=1))
    with pytest.raises(InputError, match="at least 2 of at least 3"):
        leak_certificate(model, example(frames=2))
    with pytest.raises(ConfigError, match="frame"):
        leak_certificate(model, example(), frame=0)


def test_gradient_routes():
    batch = {name: x for name, x in example().items() if name in ("frames", "latents", "caption")}
    for arm, never in (("fine", "pool_init"), ("coarse", "fine_token"), ("both", "no_text_token")):
        model = FoveatedVLM.tiny(trained_pass=arm)
        model.q_static.grad = torch.ones_like(model.q_static)
        routes = gradient_routes(model, batch)
        assert torch.equal(model.q_static.grad, torch.ones_like(model.q_static)) and all(p.grad is None for name, p in model.named_parameters() if name != "q_static")
        assert "encoder" in routes.frozen and routes.norms["loss"]["encoder"] == 0
        assert routes.norms["loss"]["head"] > 0 and routes.table().count("\n") == len(model.parts()) + 1
    fine, coarse = (gradient_routes(FoveatedVLM.tiny(trained_pass=arm), batch).norms["loss"] for arm in ("fine", "coarse"))
    assert coarse["fine_token"] == coarse["q_init"] == coarse["llm_to_query"] == 0 < coarse["q_static"]
    assert fine["fine_token"] > 0 and fine["llm_to_query"] > 0 and fine["q_static"] > 0, "the static query is reached through the queries"
    captioned = gradient_routes(FoveatedVLM.tiny(trained_pass="fine", caption_weight=1.0), batch)
    assert captioned.norms["caption"]["head"] == 0 < captioned.norms["caption"]["dino_to_llm"] and captioned.norms["caption"]["video_end_token"] > 0
    model = FoveatedVLM.tiny(trained_pass="both")
    terms, joint = gradient_routes(model, batch).norms, [p for p in model.parameters() if p.requires_grad]
    model.loss(model(batch), batch)["loss"].backward()
    total = math.sqrt(sum(float(p.grad.square().sum()) for p in joint if p.grad is not None))
    assert total == pytest.approx(math.sqrt(sum(norm**2 for norm in terms["loss"].values())), rel=1e-4)
