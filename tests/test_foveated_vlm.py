"""Contracts of the foveated VLM: plain when all is off, no path from the future, what is trained, what is kept, bad input."""
import json

import pytest
import torch

from fvlm.blocks.targets import shifted, to_latent
from fvlm.core import ConfigError, InputError, NonFiniteError, ShapeError, WeightsError
from fvlm.encoders.keys_values import VisionEncoder
from fvlm.encoders.language_model import LanguageModel
from fvlm.models.foveated_parts import visual_tokens, with_end
from fvlm.models.foveated_vlm import FoveatedVLM
from fvlm.models.foveation_config import IDEAS, PRESETS, FoveationConfig, with_idea

B, T = 2, 5
EVERYTHING = dict(num_queries=4, fine_passes=2, query_skip=True, separate_heads=True, include_cls=False, top_k=8, temperature=0.5)


def batch_of(clips=B, frames=T, seed=0, **more):
    draw = torch.Generator().manual_seed(seed)
    batch = {"frames": torch.rand(clips, frames, 3, 28, 28, generator=draw), "latents": torch.randn(clips, frames, 4, 4, 4, generator=draw)}
    return batch | more


def words(*rows, pad):
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows])


TEXT = {"text": words([1, 2, 3], [4], pad=0), "text_mask": torch.tensor([[True] * 3, [True, False, False]])}
CAPTION = {"caption": words([5, 6, 7, 8], [9, 10], pad=-100)}


@torch.no_grad()
def look(model, batch, **options):
    return model.eval()(batch, **options)


def trained_with(model, batch):
    "Names of the parameters that a step reaches."
    model.train().zero_grad()
    model.loss(model(batch), batch)["loss"].backward()
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def parts_of(names):
    return {name.split(".")[0] for name in names}


# --- switches --------------------------------------------------------------------------------------------------------

@torch.no_grad()
def by_hand(model, batch):
    "The two passes and the shift, written down once more without a switch."
    kept, attention = model.encoder.keys_values(batch["frames"]), model.query_attention
    clips, frames = batch["latents"].shape[:2]

    def read(queries):
        state = attention.query_input_proj(queries)
        for layer in range(model.encoder.depth):
            state, _ = model.encoder.query_step(layer, state, kept, lambda layer, scores: scores.softmax(-1))
        return attention.query_output_proj(model.encoder.finish(state))[:, :, 0]

    def think(mode, features):
        x = model.dino_to_llm(features)
        tokens = 0.14 * x / x.square().mean(-1, keepdim=True).add(1e-12).sqrt()
        states = model.language_model(torch.cat([torch.stack([model.no_text_token, mode]).expand(clips, -1, -1), tokens], 1))
        return states[:, 1:-1], states[:, 2:]

    previous = torch.cat([model.z_init.expand(clips, 1, -1, -1, -1), batch["latents"][:, :-1]], 1)
    features_coarse = read(model.q_static.expand(clips, frames, -1, -1))
    hidden_coarse, after = think(model.coarse_token, features_coarse)
    queries = torch.cat([model.q_init.expand(clips, 1, -1, -1), model.llm_to_query(after)[:, :-1, None]], 1)
    features = read(queries)
    hidden, _ = think(model.fine_token, features)
    return dict(features_coarse=features_coarse, hidden_coarse=hidden_coarse, prediction_coarse=model.head(hidden_coarse, previous), queries=queries,
                features=features, hidden=hidden, prediction=model.head(hidden, previous))


def test_with_every_switch_off_it_is_the_plain_model_bit_for_bit():
    model, batch = FoveatedVLM.tiny(), batch_of()
    found = look(model, batch)
    for name, expected in by_hand(model, batch).items():
        assert torch.equal(found[name], expected), name
    assert torch.equal(found["target"], batch["latents"]) and "attention" not in found and "caption_logits" not in found


OFF = dict(delta_l1=0.0, no_change_weight=0.0, num_queries=1, include_cls=True, temperature=1.0, temperature_mode="fixed", top_k=None, gumbel=False, previous_mode="keep", query_skip=False,
           separate_heads=False, entropy_margin_weight=0.0, contrastive_weight=0.0, caption_weight=0.0, fine_passes=1, norm="token", target="latent", attention_mode="deep")


@pytest.mark.parametrize("name", OFF)
def test_a_switch_that_is_off_leaves_outputs_and_loss_as_they_were(name):
    batch = batch_of(**TEXT, **CAPTION)
    plain, off = FoveatedVLM.tiny(), FoveatedVLM.tiny(**{name: OFF[name]})
    torch.manual_seed(3)
    a = plain.loss(plain(batch), batch)
    torch.manual_seed(3)
    b = off.loss(off(batch), batch)
    assert a.keys() == b.keys() and all(torch.equal(a[term], b[term]) for term in a)


WATCHED = ("features_coarse", "queries", "features", "prediction_coarse", "prediction", "target")
LOOKS, HEADS_ONLY, WANTS = set(WATCHED[:5]), set(WATCHED[3:5]), {"loss"}
MOVES = {  # idea -> what moves at the first step, in training; "size": the number of trained parameters
    "previous_removed": HEADS_ONLY | WANTS, "previous_noise": HEADS_ONLY | WANTS, "previous_dropout": HEADS_ONLY | WANTS, "delta": {"target"} | WANTS, "delta_guarded": {"target"} | WANTS,
    "query_skip": HEADS_ONLY | WANTS | {"size"}, "sharp": LOOKS | WANTS, "learned_temperature": {"size"}, "temperature_per_head": {"size"}, "entropy_margin": WANTS,
    "separate_heads": {"size"}, "four_queries": LOOKS | WANTS | {"size"}, "nine_queries": LOOKS | WANTS | {"size"}, "contrastive_raw": WANTS, "contrastive_centred": WANTS,
    "encoder_last_2": {"size"}, "encoder_all": {"size"}, "dynamic_data": set(), "flow": HEADS_ONLY | WANTS | {"target", "size"}, "top_k": LOOKS | WANTS, "gumbel": LOOKS | WANTS,
}


def first_step(config, batch):
    model = FoveatedVLM(config, VisionEncoder.tiny(), LanguageModel.tiny())
    torch.manual_seed(0)
    outputs = model(batch)
    size = torch.tensor(sum(p.numel() for p in model.parameters() if p.requires_grad))
    return {name: outputs[name].detach() for name in WATCHED} | {"loss": model.loss(outputs, batch)["loss"].detach(), "size": size}


@pytest.mark.parametrize("name", IDEAS)
def test_an_idea_moves_what_it_should_and_nothing_else(name):
    batch = batch_of(flow=torch.randn(B, T - 1, 2, 28, 28, generator=torch.Generator().manual_seed(1)))
    plain = FoveationConfig.preset("tiny", head_width=16)
    base, found = first_step(plain, batch), first_step(with_idea(plain, name), batch)
    assert {key for key in base if not torch.equal(base[key], found[key])} == MOVES[name]


def test_every_idea_trains_and_every_new_part_gets_a_gradient():
    batch = batch_of(**TEXT, **CAPTION)
    model = FoveatedVLM.tiny(**(EVERYTHING | dict(top_k=None)), temperature_mode="per_head", target="delta", delta_l1=0.01, no_change_weight=1.0, previous_mode="drop", caption_weight=1.0,
                             entropy_margin_weight=0.1, contrastive_weight=0.1, encoder_train="last:1")
    reached = trained_with(model, batch)
    lacking = {name for name, p in model.named_parameters() if p.requires_grad} - reached
    assert lacking <= {"no_text_token", "z_init", "pool_init"} | {name for name in lacking if "k_norm" in name or name.endswith("qkv.bias")}, lacking
    assert "pool_init" not in lacking or not model.pool_init.any()


# --- the future, other clips, the words ------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", [{}, EVERYTHING, dict(attention_mode="shallow"), dict(text_position="after"), dict(target="delta")], ids=["plain", "everything", "shallow", "after", "delta"])
@pytest.mark.parametrize("first", range(1, T))
def test_nothing_sees_the_frames_to_come(first, changes):
    "Frames from index `first` on are others: exactly nothing before them moves, and something after them does."
    model, batch, other = FoveatedVLM.tiny(**changes), batch_of(**TEXT), batch_of(seed=1, **TEXT)
    later = {name: torch.cat([batch[name][:, :first], other[name][:, first:]], 1) for name in ("frames", "latents")}
    before, after = look(model, batch), look(model, batch | later)
    for name in ("queries", "prediction", "prediction_coarse", "hidden", "hidden_coarse"):  # index `first` is made from frames before it
        assert torch.equal(before[name][:, : first + 1], after[name][:, : first + 1]), name
        assert first == T - 1 or not torch.equal(before[name][:, first + 1:], after[name][:, first + 1:]), name
    for name in ("features", "features_coarse"):
        assert torch.equal(before[name][:, :first], after[name][:, :first]), name
        assert not torch.equal(before[name][:, first], after[name][:, first]), name


@pytest.mark.parametrize("norm", ["token", "legacy"])
def test_a_clip_does_not_know_its_neighbour_unless_the_norm_is_legacy(norm):
    model, batch, other = FoveatedVLM.tiny(norm=norm), batch_of(), batch_of(seed=1)
    swapped = {name: torch.cat([x[:1], other[name][1:]]) for name, x in batch.items()}
    before, after = look(model, batch), look(model, swapped)
    for name in ("prediction", "prediction_coarse"):
        assert torch.equal(before[name][0], after[name][0]) == (norm == "token"), name
    late = {name: torch.cat([x[:, :-1], other[name][:, -1:]], 1) for name, x in batch.items()}
    assert torch.equal(before["prediction"][0], look(model, late)["prediction"][0]) == (norm == "token")


def test_the_legacy_scale_is_one_number_and_the_default_one_a_token():
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(visual_tokens(x).square().mean(-1).sqrt(), torch.full((2, 3), 0.14))
    torch.testing.assert_close(visual_tokens(x, "legacy"), 0.14 * x / (x.std() + 1e-6))
    assert torch.isfinite(visual_tokens(torch.zeros(1, 1, 8))).all()


def test_text_after_the_frames_reaches_no_prediction_and_text_before_them_does():
    batch, other = batch_of(**TEXT), {"text": TEXT["text"] + 1}
    for position in ("before", "after"):
        model = FoveatedVLM.tiny(text_position=position)
        same = [torch.equal(look(model, batch)[name], look(model, batch | other)[name]) for name in ("queries", "prediction", "prediction_coarse")]
        assert all(same) == (position == "after") and any(same) == (position == "after")


@pytest.mark.parametrize("position", ["before", "after"])
def test_padding_is_invisible(position):
    model = FoveatedVLM.tiny(text_position=position, caption_weight=1.0)
    batch = batch_of(**TEXT, **CAPTION)
    noisy = batch | {"text": torch.where(TEXT["text_mask"], TEXT["text"], torch.tensor(99))}
    a, b = look(model, batch), look(model, noisy)
    assert all(torch.equal(a[name], b[name]) for name in ("prediction", "caption_logits", "queries"))
    alone = {name: x[1:] for name, x in batch.items()} | {"text": TEXT["text"][1:, :1], "text_mask": TEXT["text_mask"][1:, :1]}
    c = look(model, alone)
    for name in ("prediction", "queries"):
        torch.testing.assert_close(c[name], a[name][1:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(c["caption_logits"][:, :3], a["caption_logits"][1:, :3], atol=1e-4, rtol=1e-4)


def test_a_clip_without_words_among_others_is_a_clip_without_text():
    model, silent = FoveatedVLM.tiny(), TEXT | {"text_mask": torch.tensor([[True] * 3, [False] * 3])}
    mixed, alone = look(model, batch_of(**silent)), look(model, {name: x[1:] for name, x in batch_of().items()})
    torch.testing.assert_close(mixed["prediction"][1:], alone["prediction"], atol=1e-5, rtol=1e-5)


# --- queries from outside --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("queries", [1, 4])
def test_static_queries_everywhere_make_the_fine_look_the_coarse_one(queries):
    model, batch = FoveatedVLM.tiny(num_queries=queries), batch_of()
    given = {"queries": model.q_static.detach().expand(B, T, -1, -1)} | ({} if queries == 1 else {"pool_state": model.pool_init.detach().expand(B, T, -1)})
    outputs = look(model, batch | given)
    assert torch.equal(outputs["features"], outputs["features_coarse"])
    assert not torch.equal(outputs["hidden"], outputs["hidden_coarse"])  # the mode token
    assert not torch.equal(look(model, batch)["features"], outputs["features"])


@pytest.mark.parametrize("changes", [{}, EVERYTHING])
def test_its_own_queries_handed_back_change_nothing(changes):
    model, batch = FoveatedVLM.tiny(**changes), batch_of()
    own = look(model, batch)
    replay = batch | {name: own[name] for name in ("queries", "pool_state") if name in own}
    for passes in ("auto", "fine"):
        again = look(model, replay, passes=passes)
        assert torch.equal(again["prediction"], own["prediction"]) and torch.equal(again["features"], own["features"])
        assert ("prediction_coarse" in again) == (passes == "auto")


def test_the_first_prediction_that_a_made_query_can_change_is_frame_3():
    for changes in ({}, dict(query_skip=True), dict(num_queries=4)):
        model, batch = FoveatedVLM.tiny(**changes), batch_of()
        own = look(model, batch)
        queries = torch.cat([own["queries"][:, :1], own["queries"][:, 1:] + 1], 1)
        pool = {"pool_state": own["pool_state"]} if "pool_state" in own else {}
        swapped = look(model, batch | {"queries": queries} | pool)
        assert torch.equal(swapped["prediction"][:, :2], own["prediction"][:, :2])
        assert all(not torch.equal(swapped["prediction"][:, t], own["prediction"][:, t]) for t in range(2, T))


def test_repeating_the_fine_pass_settles():
    "After as many passes as frames every query comes from the fine pass itself."
    batch, found = batch_of(), [look(FoveatedVLM.tiny(fine_passes=n), batch_of())["queries"] for n in (1, 2, T - 1, T, T + 1)]
    assert not torch.equal(found[0][:, 2:], found[1][:, 2:]) and torch.equal(found[-1], found[-2])
    for n in (1, 2):  # the first n queries after q_init are settled after n passes... of which the first is the coarse one's
        assert torch.equal(found[n][:, :n], found[-1][:, :n])


# --- what is trained -------------------------------------------------------------------------------------------------

def test_the_loss_is_the_weighted_sum_of_its_terms():
    batch = batch_of(**CAPTION)
    model = FoveatedVLM.tiny(caption_weight=1.0, prediction_weight=0.5, coarse_weight=0.3, entropy_margin_weight=0.2, contrastive_weight=0.1)
    terms = model.loss(model(batch), batch)
    weights = {"fine": 0.5, "caption": 1.0, "coarse": 0.15, "caption_coarse": 0.3, "entropy_margin": 0.2, "contrastive": 0.1}
    assert terms.keys() == weights.keys() | {"loss"}
    torch.testing.assert_close(terms["loss"], sum(weight * terms[name] for name, weight in weights.items()))


@pytest.mark.parametrize("arm", ["fine", "coarse", "both"])
def test_an_arm_trains_its_own_pass(arm):
    batch = batch_of()
    reached = parts_of(trained_with(FoveatedVLM.tiny(trained_pass=arm, separate_heads=True), batch))
    assert ("head" in reached) == ("fine_token" in reached) == ("llm_to_query" in reached) == (arm != "coarse")
    assert ("head_coarse" in reached) == (arm != "fine")
    assert {"q_static", "coarse_token", "dino_to_llm", "language_model", "query_attention"} <= reached  # the coarse pass makes the queries
    assert "encoder" not in reached


def test_the_error_of_a_pass_that_is_not_trained_is_reported_and_does_not_count():
    batch = batch_of()
    both, fine = FoveatedVLM.tiny(trained_pass="both"), FoveatedVLM.tiny(trained_pass="fine")
    a, b = both.loss(both(batch), batch), fine.loss(fine(batch), batch)
    assert torch.equal(a["coarse"], b["coarse"]) and torch.equal(a["fine"], b["fine"])
    assert torch.equal(b["loss"], b["fine"]) and torch.equal(a["loss"], a["fine"] + a["coarse"]) and not b["coarse"].requires_grad


def test_a_coarse_twin_computes_no_fine_pass_unless_asked(monkeypatch):
    model, batch, calls = FoveatedVLM.tiny(trained_pass="coarse"), batch_of(), []
    original = model.language_model.forward
    monkeypatch.setattr(model.language_model, "forward", lambda *a, **k: calls.append(1) or original(*a, **k))
    outputs = model(batch)
    assert len(calls) == 1 and "prediction" not in outputs and set(model.loss(outputs, batch)) == {"loss", "coarse"} and set(model.errors(outputs, batch)) == {"coarse"}
    asked = model(batch, passes="both")
    assert len(calls) == 3 and not asked["prediction"].requires_grad and asked["prediction_coarse"].requires_grad
    assert torch.equal(asked["prediction_coarse"], outputs["prediction_coarse"])


def test_a_rival_that_is_not_trained_does_not_make_room():
    batch = batch_of()
    for term in ("entropy_margin_weight", "contrastive_weight"):
        model = FoveatedVLM.tiny(trained_pass="fine", **{term: 1.0})
        outputs = model(batch)
        loss = model.loss(outputs, batch)
        name = term.removesuffix("_weight")
        rivals = [outputs["features_coarse"], *outputs.get("attention_coarse", [])]
        found = torch.autograd.grad(loss[name], [x for x in rivals if x.requires_grad], allow_unused=True, retain_graph=True)
        # through the queries the fine look depends on the coarse one; directly it does not
        queries = torch.autograd.grad(loss[name], outputs["queries"], retain_graph=True)[0]
        through = torch.autograd.grad(outputs["queries"], [x for x in rivals if x.requires_grad], queries, allow_unused=True)
        for a, b in zip(found, through):
            torch.testing.assert_close(a, b) if a is not None else None


def test_a_frozen_language_model_still_teaches_the_eye():
    reached = parts_of(trained_with(FoveatedVLM.tiny(language_train="none", trained_pass="fine"), batch_of()))
    assert {"query_attention", "q_static", "q_init", "dino_to_llm", "llm_to_query"} <= reached and not {"language_model", "encoder"} & reached


@pytest.mark.parametrize("level, expected", [("none", set()), ("last:1", {"encoder"}), ("all", {"encoder"})])
def test_the_encoder_is_trained_as_far_as_it_says(level, expected):
    assert parts_of(trained_with(FoveatedVLM.tiny(encoder_train=level), batch_of())) & {"encoder"} == expected


def test_the_same_seed_makes_the_same_model_and_a_switch_moves_no_other_part():
    a, b, c = FoveatedVLM.tiny(seed=1), FoveatedVLM.tiny(seed=1), FoveatedVLM.tiny(seed=2)
    parts = VisionEncoder.tiny(), LanguageModel.tiny()
    state = torch.get_rng_state()
    FoveatedVLM(FoveationConfig.preset("tiny", language_train="lora:2"), *parts)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters())) and not torch.equal(a.q_static, c.q_static)
    wide = dict(FoveatedVLM.tiny(seed=1, separate_heads=True, head="spatial_film", temperature_mode="learned").named_parameters())
    assert all(torch.equal(x, wide[name]) for name, x in a.named_parameters() if not name.startswith("head"))
    heads = FoveatedVLM.tiny(separate_heads=True)
    assert all(torch.equal(x, y) for x, y in zip(heads.head.parameters(), heads.head_coarse.parameters()))
    assert a.no_weight_decay() - {"query_attention.log_temperature"} <= dict(a.named_parameters()).keys()
    assert a.no_weight_decay() <= wide.keys()


def test_every_parameter_belongs_to_a_part():
    model = FoveatedVLM.tiny(separate_heads=True, num_queries=4)
    parts = model.parts()
    assert sum(len(part) for part in parts.values()) == len(list(model.parameters()))
    assert set(parts) == {"encoder", "query_attention", "dino_to_llm", "llm_to_query", "language_model", "head", "head_coarse", "q_static", "q_init", "z_init", "pool_init",
                          "coarse_token", "fine_token", "no_text_token", "video_end_token"}


# --- targets, captions, caches ---------------------------------------------------------------------------------------

def test_the_change_added_to_what_was_is_what_comes():
    model, batch = FoveatedVLM.tiny(target="delta"), batch_of()
    with torch.no_grad():
        model.z_init.normal_()
    outputs = look(model, batch)
    torch.testing.assert_close(to_latent("delta", outputs["target"], shifted(batch["latents"], model.z_init)), batch["latents"])


@pytest.mark.parametrize("target, shape", [("latent", (4, 4, 4)), ("delta", (4, 4, 4)), ("flow", (2, 4, 4)), ("patches", (32, 4, 4)), ("pixels", (3, 4, 4))])
def test_errors_are_the_loss_by_frame(target, shape):
    model, batch = FoveatedVLM.tiny(target=target, target_shape=shape), batch_of(flow=torch.rand(B, T - 1, 2, 28, 28))
    outputs = model(batch)
    errors, terms = model.errors(outputs, batch), model.loss(outputs, batch)
    for name in ("fine", "coarse"):
        assert errors[name].shape == (B, T) and errors[name].isnan().any(0).tolist() == [target == "flow"] + [False] * (T - 1)
        torch.testing.assert_close(errors[name].nanmean(), terms[name].detach())
    assert not outputs["target"].requires_grad


def test_captions_end_and_do_not_see_ahead():
    end = LanguageModel.tiny().tokenizer.eos_id
    assert with_end(CAPTION["caption"], end).tolist() == [[5, 6, 7, 8, end], [9, 10, end, -100, -100]]
    whole = words([5, end], [end], pad=-100)
    assert torch.equal(with_end(whole, end), whole) and with_end(torch.full((1, 2), -100), end).tolist() == [[-100, -100]]
    model, batch = FoveatedVLM.tiny(caption_weight=1.0), batch_of(**CAPTION)
    other = batch | {"caption": words([5, 6, 7, 30], [9, 10], pad=-100)}
    a, b = look(model, batch), look(model, other)
    assert a["caption_logits"].shape == (B, 5, 257) and torch.equal(a["caption_labels"], with_end(CAPTION["caption"], end))
    assert torch.equal(a["caption_logits"][0, :4], b["caption_logits"][0, :4]) and not torch.equal(a["caption_logits"][0, 4], b["caption_logits"][0, 4])
    assert all(torch.equal(a[name], b[name]) for name in ("prediction", "queries"))
    loss = model.loss(a, batch)
    scores, labels = a["caption_logits"].log_softmax(-1), a["caption_labels"]
    nll = torch.stack([-scores[i, j, labels[i, j]] for i in range(B) for j in range(5) if labels[i, j] != -100])
    torch.testing.assert_close(loss["caption"], nll.mean())


def test_in_training_the_pass_that_is_not_trained_reads_no_caption():
    model, batch = FoveatedVLM.tiny(caption_weight=1.0, trained_pass="fine"), batch_of(**CAPTION)
    assert "caption_logits_coarse" not in model.train()(batch) and "caption_logits_coarse" in look(model, batch)


def test_cached_keys_and_values_stand_in_for_frames():
    model, batch = FoveatedVLM.tiny(), batch_of()
    kept = model.encoder.keys_values(batch["frames"])
    cached = kept.as_batch() | {"latents": batch["latents"]}
    assert torch.equal(look(model, cached)["prediction"], look(model, batch)["prediction"])
    half = {name: x.to(torch.bfloat16) for name, x in kept.as_batch().items()} | {"latents": batch["latents"]}
    torch.testing.assert_close(look(model, half)["features"], look(model, batch)["features"], atol=0.1, rtol=0.1)


def test_it_trains_in_bfloat16_also_around_a_frozen_bfloat16_language_model():
    batch = batch_of(**TEXT, **CAPTION)
    for language_train, dtype in (("all", torch.float32), ("none", torch.bfloat16)):
        model = FoveatedVLM(FoveationConfig.preset("tiny", caption_weight=1.0, language_train=language_train), VisionEncoder.tiny(), LanguageModel.tiny().to(dtype))
        with torch.autocast("cpu", torch.bfloat16):
            terms = model.loss(model(batch), batch)
        terms["loss"].backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
        assert terms["fine"].dtype == torch.float32
        torch.testing.assert_close(terms["fine"].detach(), FoveatedVLM.tiny().loss(FoveatedVLM.tiny()(batch_of()), batch_of())["fine"].detach(), atol=0.1, rtol=0.1)


def test_the_training_loop_trains_it():
    from fvlm.training.loop import TrainConfig, train

    class Clips(torch.utils.data.Dataset):
        batch_ = batch_of(clips=6)

        def __len__(self):
            return 6

        def __getitem__(self, index):
            return {name: x[index] for name, x in self.batch_.items()}

    model = FoveatedVLM.tiny(language_train="none")
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    result = train(model, {"train": Clips(), "val": Clips()}, TrainConfig(steps=12, batch_size=3, learning_rate=1e-2, precision="bf16", log_every=4, val_every=12), progress=False)
    losses = [row["loss"] for row in result.history if row["split"] == "train"]
    assert losses[-1] < losses[0] and {"fine", "coarse"} <= result.history[-1].keys()
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


# --- saving ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", [dict(language_train="none"), dict(language_train="lora:2", separate_heads=True), dict(language_train="last:1", encoder_train="last:1", num_queries=4), dict(language_train="all")])
def test_what_is_saved_is_what_was_trained_and_it_comes_back(tmp_path, changes):
    from safetensors.torch import load_file

    model, batch = FoveatedVLM.tiny(**changes), batch_of()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.01 * torch.randn_like(p))
    model.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained <= names and all(name in trained for name in names if name.startswith(("encoder.", "language_model.")))
    again = FoveatedVLM.from_pretrained(tmp_path, encoder=VisionEncoder.tiny(), language_model=LanguageModel.tiny())
    assert again.config == model.config and not again.training
    assert torch.equal(look(again, batch)["prediction"], look(model, batch)["prediction"])


def test_a_folder_that_does_not_fit_is_refused(tmp_path):
    FoveatedVLM.tiny().save_pretrained(tmp_path)
    parts = dict(encoder=VisionEncoder.tiny(), language_model=LanguageModel.tiny())
    for part, other in (("encoder", VisionEncoder.tiny(seed=1)), ("language_model", LanguageModel.tiny(seed=1))):
        with pytest.raises(WeightsError, match=f"^{part}: .*another one"):
            FoveatedVLM.from_pretrained(tmp_path, **(parts | {part: other}))
    with pytest.raises(ConfigError, match="hidden_size: the configuration says 48, the language model passed in has 64"):
        FoveatedVLM.from_pretrained(tmp_path, **(parts | {"language_model": LanguageModel.tiny(hidden_size=64)}))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"separate_heads": True}))
    with pytest.raises(WeightsError, match="lacks .* 'head_coarse"):
        FoveatedVLM.from_pretrained(tmp_path, **parts)
    (tmp_path / "config.json").write_text(json.dumps(config | {"temperatur": 1}))
    with pytest.raises(ConfigError, match="did you mean 'temperature'"):
        FoveatedVLM.from_pretrained(tmp_path, **parts)
    (tmp_path / "parts.json").unlink()
    with pytest.raises(WeightsError, match="no parts.json"):
        FoveatedVLM.from_pretrained(tmp_path, **parts)


# --- bad input -------------------------------------------------------------------------------------------------------

def nan(x):
    return x.clone().index_fill_(0, torch.tensor([1]), float("nan"))


BAD = {
    "nothing": (lambda b: {}, InputError, r"expected \"frames\" .*got nothing"),
    "no frames": (lambda b: {"latents": b["latents"]}, InputError, r"expected \"frames\" .*\['latents'\]"),
    "keys alone": (lambda b: {"keys": torch.zeros(2, 5, 2, 2, 17, 16)}, InputError, "'values'"),
    "other keys": (lambda b: {name: torch.zeros(2, 5, 3, 2, 17, 16) for name in ("keys", "values")}, ShapeError, "depth should be 2, got 3"),
    "one frame": (lambda b: {name: x[:, :1] for name, x in b.items()}, InputError, "clips of 1 frame, expected at least 2"),
    "other latents": (lambda b: b | {"latents": torch.zeros(2, 5, 4, 8, 8)}, ShapeError, r"\(4, 8, 8\), the model was built for \(4, 4, 4\)"),
    "fewer latents": (lambda b: b | {"latents": b["latents"][:, :3]}, ShapeError, r"batch\['latents'\]: axis T should be 5, got 3"),
    "nan latents": (lambda b: b | {"latents": nan(b["latents"])}, NonFiniteError, "latents"),
    "nan frames": (lambda b: b | {"frames": nan(b["frames"])}, NonFiniteError, "frames"),
    "bytes": (lambda b: b | {"frames": b["frames"] * 255}, InputError, r"expected \[0, 1\]"),
    "a long caption": (lambda b: b | {"caption": torch.zeros(2, 300, dtype=torch.int64)}, InputError, "caption of 301 words need 308 places, the language model has 256"),
    "caption with a hole": (lambda b: b | {"caption": torch.tensor([[1, -100, 2]] * 2)}, InputError, r"batch\[\"caption\"\]: .*-100 up to the end"),
    "negative caption": (lambda b: b | {"caption": torch.tensor([[1, -5]] * 2)}, InputError, r"batch\[\"caption\"\]"),
    "captions of others": (lambda b: b | {"caption": torch.zeros(3, 4, dtype=torch.int64)}, ShapeError, "axis B should be 2, got 3"),
    "a word beyond the vocabulary": (lambda b: b | {"caption": torch.full((2, 3), 999)}, InputError, "0..256"),
    "text of floats": (lambda b: b | {"text": torch.zeros(2, 3)}, InputError, r"batch\[\"text\"\]: got torch.float32"),
    "a mask of another length": (lambda b: b | {"text": torch.zeros(2, 3, dtype=torch.int64), "text_mask": torch.ones(2, 4)}, ShapeError, "text_mask.*should be 3, got 4"),
    "other queries": (lambda b: b | {"queries": torch.zeros(2, 5, 2, 24)}, ShapeError, "axis K should be 1, got 2"),
    "nan queries": (lambda b: b | {"queries": torch.full((2, 5, 1, 24), float("nan"))}, NonFiniteError, "query"),
    "missing latents": (lambda b: {"frames": b["frames"]}, InputError, "target='latent' .*prediction_weight=1"),
    "missing caption": (lambda b: b, InputError, "expected \"caption\""),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_error(name):
    change, error, message = BAD[name]
    model, batch = FoveatedVLM.tiny(caption_weight=1.0), change(batch_of())
    with pytest.raises(error, match=message):
        model.loss(model(batch), batch)


def test_parts_and_words_that_do_not_fit():
    with pytest.raises(ConfigError, match="hidden_size: the configuration says 576, the language model passed in has 48"):
        FoveatedVLM(FoveationConfig.preset("tiny", hidden_size=576), VisionEncoder.tiny(), LanguageModel.tiny())
    with pytest.raises(ConfigError, match="embed_dim: the configuration says 384, the vision encoder passed in has 32"):
        FoveatedVLM(FoveationConfig.preset("tiny", embed_dim=384), VisionEncoder.tiny(), LanguageModel.tiny())
    model, batch = FoveatedVLM.tiny(encoder_train="all"), batch_of()
    with pytest.raises(InputError, match="cached keys and values with encoder_train='all'"):
        model(model.encoder.keys_values(batch["frames"]).as_batch() | {"latents": batch["latents"]})
    with pytest.raises(InputError, match='got "fine" without batch'):
        model(batch, passes="fine")
    with pytest.raises(ConfigError, match="passes: got 'all'"):
        model(batch, passes="all")
    with pytest.raises(InputError, match='without "pool_state"'):
        FoveatedVLM.tiny(num_queries=4)(batch | {"queries": torch.zeros(B, T, 4, 24)}, passes="fine")
    with pytest.raises(InputError, match="hold no target"):
        model.errors({}, batch)
    centred = FoveatedVLM.tiny(contrastive_weight=0.1)
    kept = centred.encoder.keys_values(batch["frames"]).as_batch()
    kept.pop("patches")
    with pytest.raises(InputError, match='has no "patches"'):
        centred(kept | {"latents": batch["latents"]})


@pytest.mark.parametrize("wrong", [
    dict(tempreature=1), dict(temperature=-1), dict(temperature=float("inf")), dict(query_dim=0), dict(num_queries=1.5), dict(target_shape=(4, 4)), dict(target_shape=4), dict(head="none"),
    dict(trained_pass="none"), dict(prediction_weight=0), dict(coarse_weight=0), dict(trained_pass="coarse", entropy_margin_weight=1), dict(trained_pass="coarse", contrastive_weight=1),
    dict(delta_l1=1), dict(no_change_weight=1), dict(gumbel=True, top_k=3), dict(top_k=0), dict(encoder_train="lora:2"), dict(encoder_train="last:0"), dict(language_train="last"), dict(language_train=None),
    dict(previous_mode="remove", head_start="copy_last"), dict(previous_dropout=1), dict(norm="batch"), dict(text_position="middle"), dict(fine_passes=0), dict(query_skip=1.5), dict(gumbel_tau=0),
])
def test_a_configuration_without_meaning_is_refused(wrong):
    with pytest.raises(ConfigError):
        FoveationConfig.preset("tiny", **wrong)


def test_presets_have_the_sizes_of_the_source():
    config = FoveationConfig.preset("seed")
    assert (config.query_dim, config.embed_dim, config.hidden_size, config.target_shape, config.head) == (384, 384, 576, (4, 32, 32), "film")
    assert set(PRESETS) == {"seed", "tiny"} and config.changed(top_k=3).top_k == 3
