"""Studies of the foveated VLM: what is missing runs and nothing else, another recipe is an error, and captions are judged by what the frames say of them."""
from dataclasses import replace

import numpy as np
import pytest
import torch

import fvlm.app.foveation_study as studies
from fvlm.app.cli import main
from fvlm.app.foveation_study import FOVEATED_CAPTIONS, FOVEATED_GAZE, FOVEATED_HEADS, FOVEATED_QUICK, GAZE_CELLS, recorded_scores
from fvlm.blocks.prediction_heads import HEADS
from fvlm.core import InputError, generator
from fvlm.evidence.caption_evidence import caption_nll, caption_scores, commonest, partners_of, sentences_right
from fvlm.recipes.foveated_vlm import FoveationRecipe, tiny
from fvlm.training.records import read_records


def test_the_study_covers_every_head_and_phase():
    settings = FOVEATED_HEADS.settings()
    assert list(settings) == ["short", "videos", "from_copy", "phase1", "phase2", "phase3"] and set(settings["videos"][1]) == set(HEADS) and len(FOVEATED_HEADS.seeds) >= 3
    assert all(isinstance(recipe, FoveationRecipe) and set(chosen) <= set(HEADS) for recipe, chosen in settings.values())


def test_a_study_runs_what_is_missing_and_only_that(own_home, tmp_path, capsys, monkeypatch):
    small = replace(FOVEATED_HEADS, settings=lambda: {"small": (tiny(), ("film",)), "other": (tiny(), ("mlp",))}, seeds=(0,))
    monkeypatch.setattr(studies, "FOVEATED_HEADS", small)
    words = ["study", "foveated_heads", "--root", str(tmp_path), "--settings", "small"]
    assert main([*words, "--show"]) == 0 and "| R0 |" not in capsys.readouterr().out and not list(tmp_path.glob("*/*.json"))
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "small--film--plain--fine--seed0" in told and "| film | plain | 1 |" in told and "other" not in told
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "foveated_heads").glob("*.json")}
    assert len(written) == 4
    assert main(words) == 0 and "--seed0 " not in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "foveated_heads").glob("*.json")} == written
    assert main([*words[:-1], "smal"]) == 2 and "did you mean 'small'" in capsys.readouterr().err
    assert main(["study", "foveated_head"]) == 2 and "did you mean 'foveated_heads'" in capsys.readouterr().err


def small_captions():
    recipe = replace(tiny(), words=True, world_clips=24)
    recipe = replace(recipe, model=recipe.model.changed(caption_weight=1.0, prediction_weight=0.5, trained_pass="both"))
    return {"joint": recipe, "prediction_alone": replace(recipe, model=recipe.model.changed(caption_weight=0.0))}


def test_captions_run_what_is_missing_and_refuse_another_recipe(own_home, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(studies, "FOVEATED_CAPTIONS", replace(FOVEATED_CAPTIONS, settings=small_captions, seeds=(0,)))
    words = ["study", "foveated_captions", "--root", str(tmp_path)]
    assert main(words) == 0
    told = capsys.readouterr().out
    records = {record.run: record for record in read_records(tmp_path, "foveated_captions")}
    assert set(records) == {"joint--seed0", "prediction_alone--seed0", "all--trivial"} and "joint--seed0 | fine" in told
    joint, alone = records["joint--seed0"], records["prediction_alone--seed0"]
    assert "nll_fine" in joint.metrics and "nll_fine" not in alone.metrics and "fine_from_frame_3" in alone.metrics
    assert recorded_scores(joint).own["fine"].mean() == pytest.approx(joint.metrics["nll_fine"], abs=1e-4)
    assert set(joint.metrics_by_clip["right"]) == set(alone.metrics_by_clip["fine_frame_03"])  # paired clip by clip
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.json")}
    assert main(words) == 0 and {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.json")} == before
    other = {name: replace(recipe, gap=2) for name, recipe in small_captions().items()}
    monkeypatch.setattr(studies, "FOVEATED_CAPTIONS", replace(FOVEATED_CAPTIONS, settings=lambda: other, seeds=(0,)))
    assert main(words) == 2 and "gap: 4 then, 2 now" in capsys.readouterr().err


def test_the_other_studies_know_their_cells():
    assert set(FOVEATED_GAZE.settings()) == set(GAZE_CELLS) and list(FOVEATED_QUICK.settings()) == ["untrained"]
    assert all(callable(cell) for study in (FOVEATED_GAZE, FOVEATED_QUICK) for cell in study.settings().values())
    settings = FOVEATED_CAPTIONS.settings()
    assert settings["captions_alone"].model.prediction_weight == 0 and settings["prediction_alone"].model.caption_weight == 0 and settings["joint"].model.trains_fine


# --- caption evidence ------------------------------------------------------------------------------------------------

class Speaker(torch.nn.Module):
    "Says word w with probability that depends on the first pixel of the clip as much as `looks` says."

    def __init__(self, looks):
        super().__init__()
        self.looks, self.weight = looks, torch.nn.Parameter(torch.zeros(()))

    def forward(self, batch, passes="both"):
        seen = batch["frames"][:, 0].long()
        logits = torch.nn.functional.one_hot(seen, 5).double()[:, None].expand(-1, batch["caption"].shape[1], -1) * self.looks
        return {"caption_logits": logits, "caption_labels": batch["caption"]}


def worded(n=20):
    "Clips that are a number, and whose caption is that number."
    return [{"frames": torch.tensor([i % 4 + 1.0]), "caption": torch.tensor([i % 4 + 1, -100])} for i in range(n)], [f"number {i % 4 + 1}" for i in range(n)]


def test_gain_is_the_closed_form_and_nil_without_looking():
    clips, words = worded()
    found = caption_scores(Speaker(3.0), clips, words, others=3)
    odds = np.exp(3.0)
    assert found.own["fine"] == pytest.approx(-np.log(odds / (odds + 4))) and found.other["fine"] == pytest.approx(-np.log(1 / (odds + 4)))
    assert found.gain("fine").estimate == pytest.approx(3.0) and found.told_apart("fine") == 1.0
    blind = caption_scores(Speaker(0.0), clips, words, others=3)
    assert blind.gain("fine").estimate == 0.0 and blind.told_apart("fine") == 0.5 and "| fine |" in blind.table()


def test_partners_say_something_else_and_are_drawn_from_the_seed():
    _, words = worded()
    found = partners_of(words, others=6, seed=1)
    assert found.shape == (20, 6) and all(words[i] != words[j] for i, row in enumerate(found.tolist()) for j in row)
    assert torch.equal(found, partners_of(words, others=6, seed=1)) and not torch.equal(found, partners_of(words, others=6, seed=2))


def test_captions_of_all_lengths_count_alike():
    logits = torch.randn(2, 4, 7, generator=generator(0, "logits"))
    labels = torch.tensor([[1, 2, 3, 4], [5, -100, -100, -100]])
    expected = [-logits[0].log_softmax(-1)[range(4), labels[0]].mean().double(), -logits[1, 0].log_softmax(-1)[5].double()]
    assert torch.allclose(caption_nll(logits, labels), torch.stack(expected), atol=1e-6)


@pytest.mark.parametrize("wrong, words", [
    (lambda: partners_of(["a"] * 3, others=1), "all say 'a'"),
    (lambda: caption_scores(Speaker(1.0), worded()[0], ["a", "b"]), "got 2 for 20 clips"),
    (lambda: caption_nll(torch.zeros(1, 2, 5), torch.full((1, 2), -100)), "caption 0 has no word"),
    (lambda: sentences_right(["a"], [], "a"), "1 sentences for 0 clips"),
])
def test_bad_input_gets_one_sentence(wrong, words):
    with pytest.raises(InputError, match=words):
        wrong()


def test_the_commonest_sentence_is_a_rival():
    assert commonest(["b", "a", "b", "a", "c"]) == "a"
    assert sentences_right(["a", "b", "x", "a"] * 5, ["a", "b", "b", "c"] * 5, "c").estimate == pytest.approx(0.5 - 0.25)
