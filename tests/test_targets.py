"""Targets of the prediction: shapes, values by hand, the way back to latents, the guard, one clear error each."""
import pytest
import torch

from fvlm.blocks.targets import BATCH_KEYS, HAS_LATENT, TARGETS, change_seen, frame_mask, guard_terms, make_previous, make_target, shifted, target_shape, to_latent
from fvlm.core import ConfigError, InputError, NonFiniteError, ShapeError, generator
from fvlm.encoders.latents import on_grid

B, T, C, H, W = 2, 4, 4, 3, 5  # latents that are not square
kinds = pytest.mark.parametrize("kind", TARGETS)


def draw(*shape, stream="x"):
    return torch.randn(*shape, generator=generator(0, stream))


@pytest.fixture
def batch():
    return {
        "latents": on_grid(draw(B, T, C, H, W, stream="latents")),
        "flow": draw(B, T - 1, 2, 8 * H, 8 * W, stream="flow"),
        "patches": draw(B, T, 6, 7, stream="patches"),
        "frames": draw(B, T, 3, 8 * H, 8 * W, stream="frames").sigmoid(),
        "clip": torch.arange(B),
    }


SHAPES = {"latent": (C, H, W), "delta": (C, H, W), "flow": (2, H, W), "patches": (7, 2, 3), "pixels": (3, H, W)}


# --- shapes and values -----------------------------------------------------------------------------------------------

@kinds
def test_every_kind_has_the_shape_it_announces(kind, batch):
    made = make_target(kind, batch, shape=SHAPES[kind])
    assert made.shape == (B, T, *SHAPES[kind]) and made.dtype == torch.float32
    assert target_shape(kind, (C, H, W), embed_dim=7, grid=(2, 3)) == SHAPES[kind]
    assert make_previous(kind, batch, shape=SHAPES[kind]).shape == made.shape
    assert frame_mask(kind, T).shape == (T,) and not made[:, ~frame_mask(kind, T)].any()


@kinds
def test_a_target_of_frame_t_depends_on_nothing_later(kind, batch):
    base = make_target(kind, batch, shape=SHAPES[kind])
    for t in range(T - 1):
        later = {k: v.clone() for k, v in batch.items()}
        for key in ("latents", "patches", "frames"):
            later[key][:, t + 1:] += 1
        later["flow"][:, t:] += 1
        moved = make_target(kind, later, shape=SHAPES[kind])
        assert torch.equal(moved[:, :t + 1], base[:, :t + 1]) and not torch.equal(moved[:, t + 1], base[:, t + 1] if kind != "delta" else base[:, t])


@kinds
def test_clips_are_independent_and_what_is_not_read_may_be_missing(kind, batch):
    alone = {BATCH_KEYS[kind]: batch[BATCH_KEYS[kind]][1:]}
    assert torch.equal(make_target(kind, alone, shape=SHAPES[kind]), make_target(kind, batch, shape=SHAPES[kind])[1:])


def test_the_latent_target_is_the_latents_themselves(batch):
    assert torch.equal(make_target("latent", batch), batch["latents"])


def test_patches_are_laid_out_row_major(batch):
    made = make_target("patches", batch, shape=(7, 2, 3))
    assert torch.equal(made[1, 2, :, 1, 0], batch["patches"][1, 2, 3]) and torch.equal(made[0, 0, :, 0, 2], batch["patches"][0, 0, 2])


def test_flow_is_in_cells_x_then_y_and_belongs_to_the_frame_it_leads_to(batch):
    flow = torch.zeros(1, 2, 2, 16, 24)
    flow[0, 1, 0, :8, 8:16] = 4.0  # half a cell of 8 pixels, rightwards, in the middle cell of the upper row
    flow[0, 1, 1, 8:, :8] = -8.0
    made = make_target("flow", {"flow": flow}, shape=(2, 2, 3))
    assert made[0, 2, 0].tolist() == [[0, 0.5, 0], [0, 0, 0]] and made[0, 2, 1].tolist() == [[0, 0, 0], [-1, 0, 0]]
    assert not made[0, :2].any()
    tall = make_target("flow", {"flow": torch.ones(1, 1, 2, 16, 24)}, shape=(2, 4, 3))  # cells 8 wide and 4 high
    assert tall[0, 1, :, 0, 0].tolist() == [1 / 8, 1 / 4]


def test_flow_of_a_clip_of_one_frame_is_nothing():
    assert make_target("flow", {"flow": torch.zeros(2, 0, 2, 8, 8)}, shape=(2, 1, 1)).shape == (2, 1, 2, 1, 1)


def test_pixels_are_means_of_cells(batch):
    made = make_target("pixels", batch)
    assert torch.allclose(made[1, 2, :, 1, 3], batch["frames"][1, 2, :, 8:16, 24:32].mean((1, 2)), atol=1e-6)


def test_latents_stored_in_half_precision_give_float32_targets(batch):
    for dtype in (torch.bfloat16, torch.float16):
        small = {"latents": batch["latents"].to(dtype)}
        made = make_target("delta", small)
        assert made.dtype == torch.float32 and torch.equal(to_latent("delta", made, shifted(small["latents"].float())), small["latents"].float())


# --- change ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("learned", [False, True])
def test_current_plus_delta_is_next_bit_for_bit(batch, learned):
    first = on_grid(draw(C, H, W, stream="first")) if learned else None
    delta, previous = make_target("delta", batch, first=first), make_previous("delta", batch, first=first)
    assert torch.equal(to_latent("delta", delta, previous), batch["latents"])
    assert torch.equal(delta[:, 1:], batch["latents"][:, 1:] - batch["latents"][:, :-1])
    assert torch.equal(delta[:, 0], batch["latents"][:, 0] - (first if learned else 0))


def test_off_the_grid_it_is_next_within_one_rounding():
    latents = draw(50, 4, 4, 8, 8, stream="off") * 5
    back = to_latent("delta", make_target("delta", {"latents": latents}), shifted(latents))
    assert not torch.equal(back, latents) and (back - latents).abs().max() <= latents.abs().max() * 2**-23


def test_no_gradient_reaches_the_start_through_a_target(batch):
    first = torch.zeros(C, H, W, requires_grad=True)
    assert not make_target("delta", batch, first=first).requires_grad
    make_previous("delta", batch, first=first).sum().backward()
    assert torch.equal(first.grad, torch.full((C, H, W), float(B)))


def test_previous_is_the_frame_before_in_the_targets_space(batch):
    for kind in ("latent", "flow", "pixels", "patches"):
        made, previous = (f(kind, batch, shape=SHAPES[kind]) for f in (make_target, make_previous))
        assert torch.equal(previous[:, 1:], made[:, :-1]) and not previous[:, 0].any()
    assert torch.equal(make_previous("delta", batch), make_previous("latent", batch))


# --- back to latents -------------------------------------------------------------------------------------------------

def test_flow_in_cells_carries_latents():
    previous = draw(1, 1, C, 4, 6, stream="carry")
    flow = torch.tensor([1.0, 0.0])[None, None, :, None, None].expand(1, 1, 2, 4, 6)
    assert torch.allclose(to_latent("flow", flow, previous)[..., 1:], previous[..., :-1], atol=1e-5)
    assert torch.allclose(to_latent("flow", 0 * flow, previous), previous, atol=1e-5)


@pytest.mark.parametrize("kind", HAS_LATENT)
def test_gradients_come_back_to_the_prediction(kind, batch):
    prediction = (0.1 * draw(B, T, *SHAPES[kind], stream="prediction")).requires_grad_()
    to_latent(kind, prediction, make_previous("latent", batch)).square().sum().backward()
    assert prediction.grad.abs().sum() > 0


def test_a_latent_prediction_is_itself_and_needs_no_previous(batch):
    assert to_latent("latent", batch["latents"], None) is batch["latents"]


# --- guard -----------------------------------------------------------------------------------------------------------

def test_the_guards_values_by_hand():
    prediction, target = torch.tensor([0.2, -0.4]).view(1, 1, 1, 1, 2), torch.tensor([4.0, -8.0]).view(1, 1, 1, 1, 2)
    terms = guard_terms(prediction, target, l1_weight=0.01, no_change_weight=2.0, least=0.5)
    assert terms["l1"].item() == pytest.approx(0.003) and terms["no_change"].item() == pytest.approx(2 * (3 - 0.3))
    off = guard_terms(prediction, target, l1_weight=0.0)
    assert off["l1"] == 0 and off["no_change"] == 0


def test_the_floor_pushes_a_silent_head_and_leaves_a_speaking_one():
    target = draw(1, 2, 1, 2, 2, stream="floor")
    quiet, loud = (0.01 * target).requires_grad_(), (0.5 * target).requires_grad_()
    for prediction in (quiet, loud):
        guard_terms(prediction, target, l1_weight=0, no_change_weight=1.0)["no_change"].backward()
    assert (quiet.grad * target < 0).all() and not loud.grad.any()  # a step against the gradient makes it louder
    still = torch.zeros(1, 2, 1, 2, 2)
    assert guard_terms(still, still, no_change_weight=1.0)["no_change"] == 0


def test_a_collapsed_head_is_noticed():
    target = draw(2, 3, 4, 2, 2, stream="seen")
    nothing, half, worse = (change_seen(k * target, target) for k in (0.0, 0.5, -1.0))
    assert nothing.collapsed and nothing.amount == 0 and nothing.skill == 0
    assert not half.collapsed and half.amount == pytest.approx(0.5) and half.skill == pytest.approx(0.75)
    assert worse.amount == pytest.approx(1) and worse.skill == pytest.approx(-3)


def test_frame_one_does_not_count_as_change_and_stillness_is_none():
    target = torch.zeros(1, 3, 1, 2, 2)
    target[:, 0] = 5
    seen = change_seen(torch.zeros_like(target), target)
    assert (seen.amount, seen.skill, seen.collapsed) == (None, None, False)
    assert change_seen(torch.zeros_like(target), target, from_frame=0).collapsed


# --- what does not fit -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("kind", "change", "options", "error", "says"), [
    ("latent", {"latents": None}, {}, InputError, "batch: .*'latents'.* is not there"),
    ("flow", {"flow": None}, {}, InputError, "batch: .*'flow'.* is not there"),
    ("patches", {"patches": None}, {}, InputError, "batch: .*'patches'.* is not there"),
    ("pixels", {"frames": None}, {}, InputError, "batch: .*'frames'.* is not there"),
    ("flows", {}, {}, ConfigError, "kind: got 'flows'.*mean 'flow'"),
    ("latent", {}, {"shape": (4, 32, 32)}, ShapeError, r"batch\['latents'\]: .*built for \(4, 32, 32\)"),
    ("pixels", {}, {"shape": (4, H, W)}, ShapeError, r"batch\['frames'\]: .*built for"),
    ("latent", {"latents": torch.zeros(2, 4, 4, 3)}, {}, ShapeError, r"batch\['latents'\]: expected 5 axes"),
    ("latent", {"latents": torch.zeros(2, 4, 4, 3, 5, dtype=torch.int64)}, {}, InputError, r"batch\['latents'\]: got torch.int64"),
    ("latent", {"latents": torch.zeros(2, 0, 4, 3, 5)}, {}, InputError, r"batch\['latents'\]: .*empty"),
    ("delta", {"latents": torch.full((2, 4, 4, 3, 5), float("inf"))}, {}, NonFiniteError, r"batch\['latents'\]"),
    ("delta", {}, {"first": torch.zeros(4, 1, 1)}, ShapeError, "first: "),
    ("flow", {"flow": torch.zeros(2, 3, 3, 24, 40)}, {}, ShapeError, r"batch\['flow'\]: axis 2 should be 2"),
    ("flow", {"flow": torch.zeros(2, 3, 2, 25, 40)}, {}, ShapeError, r"batch\['flow'\]: 25 x 40 pixels do not divide"),
    ("flow", {"latents": None}, {}, InputError, "shape: got None and the batch has no latents"),
    ("patches", {}, {"shape": (7, 4, 4)}, ShapeError, r"batch\['patches'\]: 6 patches do not fill"),
    ("patches", {}, {}, ShapeError, r"batch\['patches'\]: 6 patches .*give shape"),
])
def test_bad_batches_are_one_error_naming_the_entry(batch, kind, change, options, error, says):
    given = {k: v for k, v in {**batch, **change}.items() if v is not None}
    with pytest.raises(error, match=f"^{says}"):
        make_target(kind, given, **options)


@pytest.mark.parametrize(("call", "error", "says"), [
    (lambda x: to_latent("patches", x, x), ConfigError, "kind: "),
    (lambda x: to_latent("delta", x, None), InputError, "previous: got None"),
    (lambda x: to_latent("delta", x[:, :, :2], x), ShapeError, "prediction: "),
    (lambda x: to_latent("flow", x, x), ShapeError, "prediction: "),
    (lambda x: guard_terms(x[:1], x), ShapeError, "prediction: "),
    (lambda x: guard_terms(x, x, l1_weight=-1), ConfigError, "l1_weight: "),
    (lambda x: guard_terms(x, x, least=2), ConfigError, "least: "),
    (lambda x: change_seen(x, x, from_frame=9), ConfigError, "from_frame: "),
    (lambda x: change_seen(x * float("nan"), x), NonFiniteError, "prediction: "),
    (lambda x: target_shape("patches"), ConfigError, "target_shape: 'patches' wants"),
    (lambda x: target_shape("latent", (4, 32)), ConfigError, "latent_shape: "),
    (lambda x: target_shape("latent", (4, 0, 32)), ConfigError, "latent_shape: "),
    (lambda x: frame_mask("flow", 0), ConfigError, "num_frames: "),
])
def test_bad_calls_are_one_error_naming_the_argument(batch, call, error, says):
    with pytest.raises(error, match=f"^{says}"):
        call(batch["latents"])
