"""A grid of foveated models: finished cells are skipped, shards share it, a killed one ends alike, records are enough for every ratio."""
from dataclasses import replace

import numpy as np
import pytest
import torch

import fvlm.evidence.foveation_grid as grid
from fvlm.core import ConfigError, InputError
from fvlm.evidence.foveation_grid import (
    PLAIN, Cell, CountedOperations, at_equal_flops, by_clip_and_frame, cells_of, errors_from_records, from_record, gigaflops_per_step, grid_table, protocols, run_foveation_grid,
)
from fvlm.evidence.foveation_protocol import ARMS
from fvlm.evidence.query_swaps import path_errors
from fvlm.recipes.foveated_vlm import load_foveation_recipe, load_parts, open_clips, train_twin
from fvlm.training.records import RunRecord, read_records


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    recipe = load_foveation_recipe("tiny")
    recipe = replace(recipe, training=replace(recipe.training, steps=2))
    parts = load_parts(recipe)
    return recipe, parts, open_clips(recipe, parts, dir=tmp_path_factory.mktemp("clips"), progress=False)


@pytest.fixture(scope="module")
def done(opened, tmp_path_factory):
    recipe, parts, sides = opened
    root = tmp_path_factory.mktemp("results")
    options = dict(heads=("film", "mlp"), seeds=(0, 1), root=root, open_data=lambda recipe: (parts, sides), progress=False)
    ran = run_foveation_grid("study", {"tiny": recipe}, **options)
    return root, options, ran


def test_every_cell_once(done):
    root, options, ran = done
    assert len(ran) == len(set(ran)) == 1 + 2 * 2 * 3 and [r.run for r in read_records(root, "study")] == sorted(ran)
    assert ran[1:7] == [Cell(setting="tiny", head=head, idea=PLAIN, arm=arm, seed=0).name for head in ("film", "mlp") for arm in ARMS]  # whole comparisons first


def test_finished_cells_are_skipped_and_two_shards_make_the_same_table(done, opened, tmp_path):
    root, options, ran = done
    recipe = opened[0]
    assert run_foveation_grid("study", {"tiny": recipe}, **options) == []
    here = {**options, "root": tmp_path}
    first = run_foveation_grid("study", {"tiny": recipe}, **here, shard=(1, 2))
    second = run_foveation_grid("study", {"tiny": recipe}, **here, shard=(0, 2))
    assert sorted(first + second) == sorted(ran) and not set(first) & set(second)
    assert grid_table(read_records(tmp_path, "study"), "tiny") == grid_table(read_records(root, "study"), "tiny")


def test_a_killed_grid_ends_in_the_same_table(done, opened, tmp_path, monkeypatch):
    root, options, ran = done
    left, original = [5], grid.run_cell

    def until_the_power_goes(*arguments, **named):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return original(*arguments, **named)

    monkeypatch.setattr(grid, "run_cell", until_the_power_goes)
    with pytest.raises(KeyboardInterrupt):
        run_foveation_grid("study", {"tiny": opened[0]}, **{**options, "root": tmp_path})
    assert len(read_records(tmp_path, "study")) == 6
    monkeypatch.setattr(grid, "run_cell", original)
    run_foveation_grid("study", {"tiny": opened[0]}, **{**options, "root": tmp_path})
    assert grid_table(read_records(tmp_path, "study"), "tiny") == grid_table(read_records(root, "study"), "tiny")


def test_records_hold_what_the_models_say(done, opened):
    root, _, _ = done
    recipe, parts, sides = opened
    cell = Cell(setting="tiny", head="mlp", idea=PLAIN, arm="both", seed=1)
    model, _ = train_twin(cell.recipe(recipe), parts, sides["train"], trained_pass="both", seed=1, progress=False)
    record = next(r for r in read_records(root, "study") if r.run == cell.name)
    order = np.argsort(sides["test"].names)
    for name, errors in path_errors(model, sides["test"]).items():
        assert np.allclose(from_record(record, name, frames=4), errors[order], rtol=1e-5), name
    assert record.metrics["gigaflops_per_step"] > 0 and record.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_all_four_ratios_from_records_alone(done):
    root, _, _ = done
    records = read_records(root, "study")
    found = protocols(records, "tiny")
    assert set(found) == {("film", PLAIN), ("mlp", PLAIN)} and set(found["film", PLAIN].ratios) == {"R0", "R1", "R2", "R3"}
    errors = errors_from_records(records, "tiny", "film")
    assert errors.fine.shape == errors.swapped["static"].shape and errors.fine.shape[0] == 2 and np.isnan(errors.trivial["linear"][:, :2]).all()
    assert np.array_equal(errors.swapped["own"], errors.fine) and not np.array_equal(errors.untrained_coarse, errors.coarse)


def test_half_a_seed_is_left_out(done):
    root, _, _ = done
    records = [r for r in read_records(root, "study") if r.run != "tiny--film--plain--coarse--seed1"]
    assert len(errors_from_records(records, "tiny", "film").fine) == 1
    none = [r for r in records if "--film--plain--coarse--" not in r.run]
    assert set(protocols(none, "tiny")) == {("mlp", PLAIN)}
    with pytest.raises(InputError, match="no seed of tiny--film--plain has all of fine, coarse, both"):
        errors_from_records(none, "tiny", "film")


def test_other_clips_are_not_compared(done):
    root, _, _ = done
    records = [replace(r, data_fingerprint="other") if "--coarse--" in r.run else r for r in read_records(root, "study")]
    with pytest.raises(InputError, match="different clips"):
        errors_from_records(records, "tiny", "film")


def test_another_recipe_is_refused_by_name(done, opened):
    root, options, _ = done
    longer = replace(opened[0], training=replace(opened[0].training, steps=3))
    with pytest.raises(ConfigError, match="study/tiny--trivial: was run with another recipe .*steps: 2 then, 3 now"):
        run_foveation_grid("study", {"tiny": longer}, **options)


def test_ideas_are_switched_on_in_their_cells(opened):
    recipe = opened[0]
    cells = {(cell.idea, cell.arm): cell.recipe(recipe).model for cell in cells_of(["tiny"], ["film"], [PLAIN, "top_k", "contrastive_centred"], [0])}
    assert cells["top_k", "fine"].top_k == 16 and cells[PLAIN, "fine"].top_k is None
    assert cells["contrastive_centred", "fine"].contrastive_weight > 0 == cells["contrastive_centred", "coarse"].contrastive_weight
    with pytest.raises(ConfigError, match="ideas: got 'topk'"):
        cells_of(["tiny"], ["film"], ["topk"], [0])


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_operations_are_counted_in_every_mode(mode):
    net, x = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(5 * 16, 7)), torch.rand(2, 3, 4, 4)
    with mode(), CountedOperations() as counted:
        net(x)
    assert counted.total == 2 * 2 * (16 * 5 * 3 * 9 + 5 * 16 * 7)


def test_operations_are_counted_and_can_be_made_equal(opened):
    recipe, parts, sides = opened
    film = Cell(setting="tiny", head="film", idea=PLAIN, arm="fine", seed=0).recipe(recipe)
    twice = replace(film, training=replace(film.training, batch_size=8))
    once, double = (gigaflops_per_step(r, parts, sides["train"]) for r in (film, twice))
    assert 1.9 < double / once <= 2.0
    coarse = gigaflops_per_step(Cell(setting="tiny", head="film", idea=PLAIN, arm="coarse", seed=0).recipe(recipe), parts, sides["train"])
    assert coarse < once
    long = replace(film, training=replace(film.training, steps=100))
    assert at_equal_flops(replace(twice, training=replace(twice.training, steps=100)), long, parts, sides).training.steps in (50, 51, 52)


def test_errors_come_back_from_a_record():
    errors = np.array([[np.nan, 0.5, 1 / 3], [np.nan, 2.0, 3.0]])
    rows = by_clip_and_frame("linear", errors, ["b", "a"])
    assert list(rows) == ["linear_frame_02", "linear_frame_03"] and rows["linear_frame_03"]["b"] == 0.333333
    record = RunRecord.__new__(RunRecord)
    object.__setattr__(record, "metrics_by_clip", rows)
    assert np.allclose(from_record(record, "linear", frames=3), errors[::-1], rtol=1e-5, equal_nan=True)
    object.__setattr__(record, "study", "s"), object.__setattr__(record, "run", "r")
    with pytest.raises(InputError, match="s/r: has no errors of 'ridge'"):
        from_record(record, "ridge", frames=3)
