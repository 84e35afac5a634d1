"""Contracts of watching frame by frame: equal to training in every mode and cut, causal, and words that end."""
import pytest
import torch

from fvlm.core import ConfigError, InputError, ShapeError
from fvlm.models.foveated_vlm import FoveatedVLM
from fvlm.models.foveation_inference import MODES, FoveationStream, caption, watch

B, T = 2, 5
TEXT = {"text": torch.tensor([[1, 2, 3], [4, 0, 0]]), "text_mask": torch.tensor([[True] * 3, [True, False, False]])}
VARIANTS = {
    "plain": {}, "queries": dict(num_queries=4), "after": dict(text_position="after"), "everything": dict(num_queries=4, fine_passes=2, query_skip=True, separate_heads=True, include_cls=False),
    "delta": dict(target="delta"), "patches": dict(target="patches", target_shape=(32, 4, 4)), "flow": dict(target="flow", target_shape=(2, 4, 4)), "shallow": dict(attention_mode="shallow"),
    "top_k": dict(top_k=4), "previous_noise": dict(previous_mode="noise"), "gumbel": dict(gumbel=True),
}


def batch_of(clips=B, frames=T, seed=0, **more):
    draw = torch.Generator().manual_seed(seed)
    return {"frames": torch.rand(clips, frames, 3, 28, 28, generator=draw), "latents": torch.randn(clips, frames, 4, 4, 4, generator=draw),
            "flow": torch.randn(clips, frames - 1, 2, 28, 28, generator=draw)} | more


def model_of(**changes):
    model = FoveatedVLM.tiny(**changes).eval()
    with torch.no_grad():
        model.z_init.normal_(generator=torch.Generator().manual_seed(5))
    return model


def close(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("text", [{}, TEXT], ids=["silent", "text"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_watching_equals_the_two_passes(variant, text):
    model, batch = model_of(**VARIANTS[variant]), batch_of(**text)
    settled = model_of(**(VARIANTS[variant] | {"fine_passes": T}))
    with torch.no_grad():
        whole, fixed = model(batch), settled(batch)
    for mode in MODES:
        suffix, expected = "_coarse" if mode == "coarse" else "", fixed if mode == "one_stream" else whole
        found = watch(model, batch, mode)
        for name in ("prediction", "features"):
            close(found[name], expected[name + suffix])
        close(found["hidden"][:, :-1], expected["hidden" + suffix][:, 1:])
        if mode != "coarse":
            close(found["queries"], expected["queries"])
        assert found["next"].shape == found["prediction"][:, :1].shape


def test_one_stream_is_the_fine_pass_with_the_queries_it_made():
    model, batch = model_of(), batch_of()
    found = watch(model, batch, "one_stream")
    with torch.no_grad():
        again = model(batch | {"queries": found["queries"]}, passes="fine")
    close(again["prediction"], found["prediction"])
    close(model.queries_after(found["hidden"])[:, :-1], found["queries"][:, 1:])
    assert (found["queries"][:, 2:] - watch(model, batch, "two_stream")["queries"][:, 2:]).abs().max() > 1e-3  # the modes are not the same thing


@pytest.mark.parametrize("mode", MODES)
def test_how_frames_are_cut_into_blocks_does_not_matter(mode):
    model, batch = model_of(fine_passes=2), batch_of(frames=6)
    whole = watch(model, batch, mode)
    stream, found, start = FoveationStream(model, mode, clips=B), [], 0
    close(stream.first(), whole["prediction"][:, :1])
    for size in (1, 3, 2):
        found.append(stream.step({name: batch[name][:, start: start + size] for name in ("frames", "latents")}))
        start += size
    assert stream.frames == 6
    for name in ("features", "queries", "hidden"):
        close(torch.cat([part[name] for part in found], 1), whole[name])
    predictions = torch.cat([part["prediction"] for part in found], 1)
    close(predictions[:, :-1], whole["prediction"][:, 1:])
    close(predictions[:, -1:], whole["next"])


def test_a_flow_a_frame_after_the_first():
    model, batch = model_of(**VARIANTS["flow"]), batch_of()
    whole, stream = watch(model, batch, "two_stream"), FoveationStream(model, "two_stream", clips=B)
    first = stream.step({"frames": batch["frames"][:, :2], "flow": batch["flow"][:, :1]})
    second = stream.step({"frames": batch["frames"][:, 2:], "flow": batch["flow"][:, 1:]})
    close(torch.cat([first["prediction"], second["prediction"]], 1)[:, :-1], whole["prediction"][:, 1:])


@pytest.mark.parametrize("mode", MODES)
def test_frames_to_come_change_nothing(mode):
    model, batch, other = model_of(), batch_of(), batch_of(seed=1)
    for first in range(1, T):
        later = {name: torch.cat([batch[name][:, :first], other[name][:, first:]], 1) for name in ("frames", "latents")}
        a, b = watch(model, batch, mode), watch(model, later, mode)
        assert torch.equal(a["prediction"][:, : first + 1], b["prediction"][:, : first + 1]) or mode in ("coarse", "coarse_fine")
        close(a["prediction"][:, : first + 1], b["prediction"][:, : first + 1], 1e-6)
        assert not torch.equal(a["features"][:, first], b["features"][:, first])


def test_a_token_is_thought_once(monkeypatch):
    model, batch, places = model_of(fine_passes=2), batch_of(), []
    original = model.language_model.forward
    monkeypatch.setattr(model.language_model, "forward", lambda x, **options: places.append(x.shape[1]) or original(x, **options))
    for mode, streams in (("coarse", 1), ("one_stream", 1), ("two_stream", 3), ("coarse_fine", 3)):
        places.clear()
        watch(model, batch, mode)
        assert sum(places) == streams * (2 + T), mode
    encoded = []
    keys_values = model.encoder.keys_values
    monkeypatch.setattr(model.encoder, "keys_values", lambda frames, **options: encoded.append(frames.shape[1]) or keys_values(frames, **options))
    watch(model, batch, "two_stream")
    assert sum(encoded) == T


def test_predictions_need_latents_and_watching_does_not():
    batch = batch_of()
    found = watch(model_of(), {"frames": batch["frames"]})
    assert set(found) == {"features", "queries", "hidden"}


# --- words -----------------------------------------------------------------------------------------------------------

def greedy_by_hand(model, batch, most):
    "The likeliest words by running the whole sequence again for each."
    words = [[] for _ in range(B)]
    for i in range(B):
        row = {name: x[i: i + 1] for name, x in batch.items()}
        while len(words[i]) < most:
            said = torch.tensor([[*words[i], 0]])
            with torch.no_grad():
                outputs = model(row | {"caption": said})
            words[i].append(int(outputs["caption_logits"][0, len(words[i])].argmax()))
            if words[i][-1] == model.language_model.tokenizer.eos_id:
                words[i].pop()
                break
    return words


@pytest.mark.parametrize("changes", [{}, dict(text_position="after"), dict(fine_passes=2, num_queries=4)], ids=["before", "after", "more"])
def test_words_are_those_of_running_everything_again(changes):
    model, batch = model_of(caption_weight=1.0, **changes), batch_of(**TEXT)
    stream = FoveationStream(model, "coarse_fine", batch=batch, clips=B)
    stream.step({"frames": batch["frames"]})
    assert stream.speak(max_words=5) == greedy_by_hand(model, batch, 5)


def test_a_caption_ends_at_the_end_of_text_and_the_stream_goes_on(monkeypatch):
    model, batch = model_of(caption_weight=1.0), batch_of()
    stream = FoveationStream(model, "two_stream", clips=B)
    end, original, spoken = model.language_model.tokenizer.eos_id, model.language_model.logits, []

    def ending(hidden):
        scores = original(hidden)
        spoken.append(1)
        scores[..., end] = -1e9
        scores[0, end] = 1e9 if len(spoken) >= 3 else -1e9  # the first clip has said all after two words, the second after four
        scores[1, end] = 1e9 if len(spoken) >= 5 else -1e9
        return scores

    stream.step({"frames": batch["frames"][:, :3]})
    monkeypatch.setattr(model.language_model, "logits", ending)
    words = stream.speak(max_words=40)
    assert [len(row) for row in words] == [2, 4] and len(spoken) == 5 and not any(end in row for row in words)
    spoken.clear()
    assert [len(row) for row in stream.speak(max_words=1)] == [1, 1]
    rest = stream.step({"frames": batch["frames"][:, 3:]})
    close(rest["hidden"], watch(model, batch)["hidden"][:, 3:])


def test_captions_are_text():
    model, batch = model_of(caption_weight=1.0), batch_of(**TEXT)
    for mode in MODES:
        said = caption(model, batch, mode=mode, max_words=3)
        assert len(said) == B and all(isinstance(row, str) for row in said)
    kept = model.encoder.keys_values(batch["frames"]).as_batch()
    assert caption(model, kept | TEXT, max_words=3) == caption(model, batch, max_words=3)


# --- bad input -------------------------------------------------------------------------------------------------------

def seen(model, **step):
    stream = FoveationStream(model, clips=B)
    stream.step({"frames": batch_of()["frames"]} | step)
    return stream


BAD = {
    "mode": (lambda m: FoveationStream(m, "three_stream"), ConfigError, "mode: got 'three_stream'"),
    "training": (lambda m: FoveationStream(FoveatedVLM.tiny()), InputError, "training mode"),
    "legacy": (lambda m: FoveationStream(model_of(norm="legacy")), ConfigError, "norm: .*'legacy'"),
    "clips": (lambda m: FoveationStream(m, clips=0), ConfigError, "clips"),
    "other clips": (lambda m: FoveationStream(m, clips=3).step(batch_of()), ShapeError, "axis B should be 3, got 2"),
    "no frames": (lambda m: FoveationStream(m).step({"latents": batch_of()["latents"]}), InputError, "expected \"frames\""),
    "nothing at all": (lambda m: watch(m, {}), InputError, "expected \"frames\""),
    "other latents": (lambda m: seen(m, latents=torch.zeros(B, T, 4, 8, 8)), ShapeError, r"built for \(4, 4, 4\)"),
    "fewer latents": (lambda m: seen(m, latents=torch.zeros(B, 2, 4, 4, 4)), ShapeError, "axis n should be 5, got 2"),
    "first too late": (lambda m: seen(m).first(), InputError, "has seen 5 frames"),
    "nothing to say": (lambda m: FoveationStream(m).speak(), InputError, "seen no frame"),
    "no words": (lambda m: seen(m).speak(max_words=0), ConfigError, "max_words"),
    "too many words": (lambda m: seen(m).speak(max_words=256), InputError, "max_words: got 256.*has 256"),
    "too many frames": (lambda m: FoveationStream(m).step({"frames": torch.zeros(1, 260, 3, 28, 28)}), InputError, "256"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_error(name):
    attempt, error, message = BAD[name]
    with pytest.raises(error, match=message):
        attempt(model_of())
