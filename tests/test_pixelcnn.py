"""Contracts of the predictor of codes: nothing peeks, at any site, level or layer; probabilities add up; one clear error each."""
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from fvlm.blocks.causal_stacks import CausalAttention, CausalTrunk
from fvlm.blocks.codebook_tree import CodebookTree, check_codes
from fvlm.blocks.pixelcnn import SpatiotemporalPixelCNN, choose, code_loss, gumbel_noise
from fvlm.core import ConfigError, InputError, ShapeError, generator
from tests.drawn_pixelcnn import drawn_pixelcnn


def drawn(*shape, codes=3, stream="codes"):
    return torch.randint(codes, shape, generator=generator(0, stream))


# --- nothing peeks ---------------------------------------------------------------------------------------------------

def words_and_rows(model, codes):
    "Codewords that want gradients, and where they lie."
    rows = model.rows(codes)
    return [F.embedding(row, model.tables.codebooks).detach().requires_grad_() for row in rows], rows


OPTIONS = [dict(), dict(kernel=(1, 3, 3)), dict(kernel=(3, 5, 5)), dict(attention_frames=1), dict(depth=3, attention_every=2), dict(attention_every=0)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_logits_have_no_gradient_from_self_and_future_at_every_site_and_level(options):
    "A box of 3x5x5 with two levels: clip i of the batch asks about place i, in the order time, row, column, level."
    model, places = drawn_pixelcnn(**options), 3 * 5 * 5 * 2
    words, rows = words_and_rows(model, drawn(places, 3, 2, 5, 5))
    logits = model.respond(words, rows).permute(0, 1, 3, 4, 2, 5).reshape(places, places, 3)
    (logits[torch.arange(places), torch.arange(places)] * torch.randn(places, 3, generator=generator(1))).sum().backward()
    gradient = torch.stack([word.grad for word in words], -2).abs().sum(-1).view(places, places)
    assert not gradient.triu().any()
    if not options:
        assert gradient[1:].any(1).all() and (gradient > 0).tril(-1).sum() > 0.9 * places * (places - 1) / 2  # it does see the past


STACKS = {"frames": lambda t, r, s: t * 25, "rows": lambda t, r, s: t * 25 + r * 5, "pixels": lambda t, r, s: t * 25 + r * 5 + s, "attended": lambda t, r, s: t * 25 + r * 5 + s}


@pytest.mark.parametrize("stack", STACKS)
def test_every_layer_of_every_stack_knows_only_what_it_may(stack):
    "Frames: nothing of the present frame; rows: nothing of the present row; pixels: nothing of the present site or after."
    trunk = drawn_pixelcnn().trunk
    first_unknown = torch.tensor([STACKS[stack](*place) for place in product(range(3), range(5), range(5))])
    count = len({})
    x = torch.randn(75, 3, 5, 5, 8, generator=generator(2))
    seen = {}
    trunk(x, 0, seen)
    for layer in range(len(seen[stack])):
        y, found = x.clone().requires_grad_(), {}
        trunk(y, 0, found)
        features = found[stack][layer].reshape(75, 75, 8)
        (features[torch.arange(75), torch.arange(75)] * torch.randn(75, 8, generator=generator(3))).sum().backward()
        depends = y.grad.abs().sum(-1).view(75, 75) > 0
        for place, unknown in enumerate(first_unknown.tolist()):
            assert not depends[place, unknown:].any(), f"{stack}, layer {layer}, place {place}"
        count += int(depends.any())
    assert count == len(seen[stack])


def test_changing_a_code_changes_nothing_before_it():
    "The same law without gradients: bit for bit."
    model, codes = drawn_pixelcnn(), drawn(1, 3, 2, 5, 5)
    before = model(codes)
    for t, level, r, s in ((0, 0, 0, 0), (1, 1, 2, 2), (2, 0, 4, 4), (1, 0, 0, 4)):
        other = codes.clone()
        other[0, t, level, r, s] = (other[0, t, level, r, s] + 1) % 3
        changed = (model(other) != before).any(-1)[0].permute(0, 2, 3, 1).flatten()
        place = ((t * 5 + r) * 5 + s) * 2 + level
        assert not changed[:place + 1].any()
        assert changed[place + 1:].any() == (place + 1 < changed.numel())


def test_all_81_videos_of_2x2x1_sites_have_probability_one():
    videos = torch.tensor(list(product(range(3), repeat=4))).view(81, 2, 1, 2, 1)
    for options in (dict(), dict(attention_every=0), dict(kernel=(1, 3, 3))):
        model = drawn_pixelcnn(num_levels=1, grid=(2, 1), **options).double()
        with torch.no_grad():
            nats = F.cross_entropy(model(videos).flatten(0, -2), videos.flatten(), reduction="none").view(81, -1).sum(1)
        assert abs((-nats).exp().sum().item() - 1) < 1e-12


def test_all_729_frames_of_two_sites_with_three_levels_have_probability_one():
    videos = torch.tensor(list(product(range(3), repeat=6))).view(729, 1, 3, 1, 2)
    model = drawn_pixelcnn(num_levels=3, grid=(1, 2)).double()
    with torch.no_grad():
        nats = F.cross_entropy(model(videos).flatten(0, -2), videos.flatten(), reduction="none").view(729, -1).sum(1)
    assert abs((-nats).exp().sum().item() - 1) < 1e-12


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_start_leaves_out_frames_and_changes_nothing_else(options):
    model, codes = drawn_pixelcnn(**options), drawn(2, 8, 2, 5, 5)
    whole = model(codes)
    for start in (0, 1, 4, 7):
        assert torch.allclose(model(codes, start=start), whole[:, start:], atol=1e-5), start


def test_sight_reaches_the_whole_past_with_attention_and_one_frame_without_time():
    def sees(**options):
        trunk = drawn_pixelcnn(grid=(7, 7), **options).trunk
        x = torch.randn(1, 4, 7, 7, 8, generator=generator(4)).requires_grad_()
        trunk(x)[0, 3, 3, 3].sum().backward()
        return (x.grad.abs().sum(-1)[0] > 0).flatten(1).double().mean(1)

    assert (sees(attention_frames=4, depth=4, attention_every=2)[:3] == 1).all()
    assert (sees(attention_every=0, kernel=(1, 3, 3))[:2] == 0).all()
    shallow, deep = sees(attention_every=0, depth=1), sees(attention_every=0, depth=2)
    assert shallow[0] == 0 and shallow[1] > 0 and deep[0] > 0  # a block of two frames reaches t-1 and t-2, the next one t-3


def test_attention_rows_are_a_mean_of_what_is_in_sight():
    "With equal values everywhere attention returns them, whatever the window and the ages."
    attention = CausalAttention(4, 2, 2)
    with torch.no_grad():
        attention.qkv.weight[8:] = 0
        attention.qkv.bias[8:] = torch.arange(4.0)
        attention.proj.weight.copy_(torch.eye(4)), attention.proj.bias.zero_()
        x = torch.randn(1, 5, 2, 3, 4, generator=generator(5))
        assert torch.allclose(attention(x) - x, torch.arange(4.0).expand_as(x), atol=1e-5)


# --- embeddings ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("books", ["path", "code", "shared"])
def test_frozen_codewords_are_a_copy_of_the_trees_and_never_move(books):
    tree = CodebookTree(6, 3, 2, books)
    model = drawn_pixelcnn(tree=tree)
    assert torch.equal(model.tables.codebooks, tree.codebooks) and model.tables.codebooks.data_ptr() != tree.codebooks.data_ptr()
    assert not any("codebooks" in name for name, _ in model.named_parameters()) and "tables.codebooks" in model.state_dict()
    model.loss(drawn(2, 3, 2, 5, 5), 1)["loss"].backward()
    assert not model.tables.codebooks.requires_grad
    codes = drawn(2, 3, 2, 5, 5)
    rows = model.rows(codes)
    for level, row in enumerate(rows):
        assert torch.equal(tree.codebooks[row], tree.codewords(codes.movedim(2, -1))[..., level, :])


def test_learned_codewords_learn():
    model = drawn_pixelcnn()
    model.loss(drawn(2, 3, 2, 5, 5), 1)["loss"].backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_a_child_is_predicted_by_its_book():
    "A code that is certain given its parent, and random without: the second level learns it, though children are numbered anew in every book."
    model = drawn_pixelcnn(grid=(2, 2), num_codes=4, depth=1)
    numbering = torch.stack([torch.randperm(4, generator=generator(6, parent)) for parent in range(4)])[:, 0]
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for step in range(60):
        parent = drawn(16, 2, 2, 2, codes=4, stream=f"step {step}")
        terms = model.loss(torch.stack([parent, numbering[parent]], 2), 1)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
    assert terms["loss_2"] < 0.1 and terms["loss_1"] > 1.2


# --- loss ------------------------------------------------------------------------------------------------------------

def test_the_loss_is_cross_entropy_over_future_frames_only():
    model, codes = drawn_pixelcnn(), drawn(2, 4, 2, 5, 5)
    terms = model.loss(codes, 2)
    nats = -model(codes).log_softmax(-1).gather(-1, codes.unsqueeze(-1)).squeeze(-1)[:, 2:]
    assert torch.allclose(terms["loss"], nats.sum(2).mean(), atol=1e-5) and torch.allclose(terms["loss"], terms["loss_1"] + terms["loss_2"])
    assert torch.allclose(terms["loss_2"], nats[:, :, 1].mean(), atol=1e-5) and 0 <= terms["accuracy_1"] <= 1


def test_a_perfect_prediction_costs_nothing_and_an_even_one_costs_log_m():
    codes = drawn(1, 2, 2, 3, 3)
    sure, even = 100 * F.one_hot(codes, 3).float(), torch.zeros(1, 2, 2, 3, 3, 3)
    assert code_loss(sure, codes)["loss"] < 1e-6 and code_loss(sure, codes)["accuracy_2"] == 1
    assert torch.allclose(code_loss(even, codes)["loss"], 2 * torch.tensor(3.0).log())


def test_autocast_trains():
    model = drawn_pixelcnn(channels=16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(drawn(2, 3, 2, 5, 5), 1)["loss"]
    loss.backward()
    assert loss.dtype == torch.float32 and all(torch.isfinite(p.grad).all() for p in model.parameters())


# --- choosing --------------------------------------------------------------------------------------------------------

def test_top_one_is_greedy_and_low_temperature_tends_to_it():
    logits = torch.randn(200, 5, generator=generator(7))
    noise = gumbel_noise(logits.shape, 1.0, generator(8))
    assert torch.equal(choose(logits, noise, 1), choose(logits, None)) and torch.equal(choose(logits, None), logits.argmax(1))
    assert torch.equal(choose(logits, noise * 1e-6), logits.argmax(1)) and not torch.equal(choose(logits, noise), logits.argmax(1))
    assert torch.isfinite(gumbel_noise((10**6,), 1.0, generator(9))).all()


# --- bad input -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("codes, error, says", [
    (torch.full((1, 2, 2, 5, 5), 3), InputError, "codes from 3 to 3, expected 0 to 2"),
    (torch.full((1, 2, 2, 5, 5), -1), InputError, "codes from -1 to -1"),
    (torch.zeros(1, 2, 2, 5, 4, dtype=torch.long), ShapeError, "axis w should be 5, got 4"),
    (torch.zeros(1, 2, 3, 5, 5, dtype=torch.long), ShapeError, "axis L should be 2, got 3"),
    (torch.zeros(2, 2, 5, 5, dtype=torch.long), ShapeError, "expected 5 axes"),
    (torch.zeros(1, 0, 2, 5, 5, dtype=torch.long), InputError, "at least one clip and one frame"),
    (torch.zeros(0, 2, 2, 5, 5, dtype=torch.long), InputError, "at least one clip and one frame"),
    (torch.full((1, 2, 2, 5, 5), float("nan")), InputError, "torch.float32, expected whole numbers"),
    ([[0]], ShapeError, "got list"),
])
def test_bad_codes(codes, error, says):
    model = drawn_pixelcnn()
    for use in (model, lambda codes: model.loss(codes, 1), lambda codes: model.sample(codes, 1), lambda codes: check_codes("codes", codes, 3, 2, (5, 5))):
        with pytest.raises(error, match=says):
            use(codes)


def test_codes_of_any_whole_type_are_the_same_codes():
    model, codes = drawn_pixelcnn(), drawn(1, 2, 2, 5, 5)
    assert torch.equal(model(codes), model(codes.to(torch.uint8))) and torch.equal(model(codes), model(codes.int()))


@pytest.mark.parametrize("call, says", [
    (lambda m: m.loss(drawn(1, 2, 2, 5, 5), 2), "context_frames: got 2"), (lambda m: m.loss(drawn(1, 2, 2, 5, 5), 0), "context_frames: got 0"),
    (lambda m: m(drawn(1, 2, 2, 5, 5), start=2), "start: got 2"), (lambda m: m.sample(drawn(1, 2, 2, 5, 5), 0), "frames: got 0"),
    (lambda m: m.sample(drawn(1, 2, 2, 5, 5), 1, temperature=0), "greedy=True"), (lambda m: m.sample(drawn(1, 2, 2, 5, 5), 1, temperature=-1), "temperature"),
    (lambda m: m.sample(drawn(1, 2, 2, 5, 5), 1, top_k=4), "top_k: got 4"), (lambda m: m.sample(drawn(1, 2, 2, 5, 5), 1, top_k=0), "top_k: got 0"),
    (lambda m: drawn_pixelcnn(kernel=(2, 4, 3)), "odd numbers"), (lambda m: drawn_pixelcnn(kernel=3), "kernel: got 3"), (lambda m: drawn_pixelcnn(grid=(0, 5)), "grid"), (lambda m: drawn_pixelcnn(depth=0), "depth"),
    (lambda m: drawn_pixelcnn(channels=9), "multiple of num_heads"), (lambda m: drawn_pixelcnn(tree=CodebookTree(4, 3, 3)), "tree: got 3 levels of 3 codes"),
    (lambda m: SpatiotemporalPixelCNN.preset("Bench", grid=(4, 4)), "did you mean 'bench'"), (lambda m: CausalTrunk(4, 1, (3, 3), attention_every=-1), "attention_every"),
])
def test_bad_settings(call, says):
    with pytest.raises((ConfigError, InputError), match=says):
        call(drawn_pixelcnn())
