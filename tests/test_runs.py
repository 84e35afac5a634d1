"""Runs are found by name, compared in pairs or not at all, and their logs replayed row by row."""
import json

import numpy as np
import pytest

from fvlm.app.cli import main
from fvlm.app.runs_commands import log_rows, numbers_of, text_table
from fvlm.core import InputError
from fvlm.evidence.run_comparison import compare_runs, differing_fields, find_runs, seed_of, study_names
from fvlm.training.records import write_record

CLIPS = [f"c{i}" for i in range(8)]


def record(root, run, errors, *, data="one", config=None, clips=CLIPS, study="study", metric="mse"):
    write_record(root, study, run, config=config or {"arm": run.split("--")[0], "training": {"seed": 0}}, parameters=5, data_fingerprint=data,
                 metrics={metric: float(np.mean(errors))}, metrics_by_clip={metric: dict(zip(clips, map(float, errors)))}, conventions={metric: "by clip"})


@pytest.fixture
def root(tmp_path):
    draw = np.random.default_rng(0)
    hard = draw.gamma(2.0, 0.4, size=8) + 0.2
    for seed in (2, 0, 1):
        record(tmp_path, f"a--seed{seed}", hard * 0.8 + 0.01 * draw.random(8))
        record(tmp_path, f"b--seed{seed}", hard + 0.01 * draw.random(8))
    record(tmp_path, "ridge", hard * 0.9)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/x.json").write_text("{}")
    return tmp_path


def test_a_name_without_its_seed_means_all_seeds_in_order(root):
    assert [r.run for r in find_runs("study/a", root)] == ["a--seed0", "a--seed1", "a--seed2"]
    assert [r.run for r in find_runs("study/a--seed1", root)] == ["a--seed1"]
    assert len(find_runs("study", root)) == 7 and study_names(root) == ["study"]
    assert find_runs(str(root / "study/ridge.json"))[0].run == "ridge"
    assert seed_of("a--seed12") == 12 and seed_of("a") is None


def test_a_training_folder_gives_its_trained_run_not_its_baselines(root, tmp_path):
    for name in ("run--ridge", "run--scmhsa--seed3"):
        record(tmp_path / "mine/records", name, np.ones(8), study="run")
    assert [r.run for r in find_runs(str(tmp_path / "mine"))] == ["run--scmhsa--seed3"]


@pytest.mark.parametrize("name, said", [("study/c", "expected one of 'a', 'b', 'ridge'"), ("studdy/a", "did you mean 'study'"), ("study/a--seed7", "a--seed2")])
def test_a_wrong_name_is_answered_with_the_right_ones(root, name, said):
    with pytest.raises(InputError, match=said):
        find_runs(name, root)


def test_no_results_folder(tmp_path):
    with pytest.raises(InputError, match="no run records"):
        find_runs("study/a", tmp_path / "nowhere")
    assert main(["runs", "list", "--root", str(tmp_path / "nowhere")]) == 0


def test_the_comparison_is_paired_and_signed(root):
    a, b = find_runs("study/a", root), find_runs("study/b", root)
    found, back = compare_runs(a, b), compare_runs(b, a)
    assert found.difference.estimate < 0 and found.difference.excludes() and found.verdict().startswith("a has the lower mse")
    assert back.difference.estimate == pytest.approx(-found.difference.estimate) and back.verdict().startswith("a has the lower mse")
    assert found.skill.estimate == pytest.approx(0.2, abs=0.02) and found.p_value == pytest.approx(2 / 2**8)
    mean = {c: np.mean([r.metrics_by_clip["mse"][c] for r in a]) for c in CLIPS}
    assert {c: pair[0] for c, pair in found.by_clip.items()} == pytest.approx(mean)


def test_pairs_follow_the_seed_not_the_order(root, tmp_path):
    draw, noise = np.random.default_rng(1), {s: 10 * s for s in (0, 1, 2)}
    for seed in (0, 1, 2):
        record(tmp_path, f"x--seed{seed}", 1 + noise[seed] + 0.001 * draw.random(8), study="paired")
    for seed in (1, 2, 3):
        record(tmp_path, f"y--seed{seed}", 2 + noise.get(seed, 500) + 0.001 * draw.random(8), study="paired")
    found = compare_runs(find_runs("paired/x", tmp_path), find_runs("paired/y", tmp_path))
    assert found.difference.estimate == pytest.approx(-1, abs=0.01) and found.difference.seeds == 2


def test_a_baseline_without_seeds_stands_against_every_seed(root):
    found = compare_runs(find_runs("study/a", root), find_runs("study/ridge", root))
    assert found.difference.seeds == 3 and found.difference.estimate < 0


@pytest.mark.parametrize("change, said", [
    (dict(data="two"), "different data"), (dict(clips=[f"d{i}" for i in range(8)]), "different clips"), (dict(metric="cosine"), "none in common")])
def test_what_cannot_be_paired_is_refused(root, change, said):
    record(root, "other--seed0", np.ones(8), **change)
    with pytest.raises(InputError, match=said):
        compare_runs(find_runs("study/a", root), find_runs("study/other", root))


def test_seeds_of_one_run_on_other_clips_are_refused(root):
    record(root, "a--seed3", np.ones(7), clips=CLIPS[:7])
    with pytest.raises(InputError, match="a--seed3: judged on other clips"):
        compare_runs(find_runs("study/a", root), find_runs("study/b", root))


def test_no_pair_of_seeds(root, tmp_path):
    for name, seeds in (("x", (0, 1)), ("y", (2, 3))):
        for seed in seeds:
            record(tmp_path, f"{name}--seed{seed}", np.ones(8), study="apart")
    with pytest.raises(InputError, match="no seed in common"):
        compare_runs(find_runs("apart/x", tmp_path), find_runs("apart/y", tmp_path))
    with pytest.raises(InputError, match="none on one side"):
        compare_runs([], find_runs("apart/y", tmp_path))


def test_what_differs_leaves_seeds_out(tmp_path):
    record(tmp_path, "x--seed0", np.ones(8), config={"arm": "x", "training": {"seed": 0, "rate": 0.1}})
    record(tmp_path, "y--seed1", np.ones(8), config={"arm": "y", "training": {"seed": 1, "rate": 0.1}, "more": True})
    x, y = find_runs("study/x", tmp_path), find_runs("study/y", tmp_path)
    assert differing_fields(x, y) == [("arm", "'x'", "'y'"), ("more", "absent", "True")]


def test_the_command_speaks_json_and_text(root, capsys):
    assert main(["runs", "compare", "study/a", "study/b", "--root", str(root), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["difference"]["estimate"] < 0 and "lower mse" in told["verdict"] and set(told["by_clip"]) == set(CLIPS)
    assert main(["runs", "list", "--root", str(root)]) == 0
    assert "study/a--seed0" in capsys.readouterr().out
    assert main(["runs", "show", "study/ridge", "--root", str(root)]) == 0
    assert json.loads(capsys.readouterr().out)["run"] == "ridge"


@pytest.mark.parametrize("words, said", [
    (["compare", "study/a"], "expected 2"), (["show"], "expected 1"), (["export", "nowhere"], "no log.jsonl"), (["compare", "study/a", "study/b", "--metric", "msse"], "did you mean 'mse'")])
def test_mistakes_are_one_line_and_code_2(root, capsys, words, said):
    assert main(["runs", *words, "--root", str(root)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error


def test_a_log_is_replayed_row_by_row(tmp_path, monkeypatch, capsys):
    import fvlm.app.runs_commands as module

    (tmp_path / "log.jsonl").write_text('{"split": "train", "step": 1, "loss": 0.5}\n{"split": "val", "step": 1, "loss": 0.6, "good": true, "note": "x"}\n')
    assert [numbers_of(r) for r in log_rows(tmp_path)] == [{"train/loss": 0.5}, {"val/loss": 0.6}]
    monkeypatch.setattr(module, "find_spec", lambda name: None)  # as where the tracker is not installed
    assert main(["runs", "export", str(tmp_path), "--to", "trackio"]) == 2
    assert "pip install trackio" in capsys.readouterr().err
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": ')
    with pytest.raises(InputError, match="line 2"):
        log_rows(tmp_path)


def test_columns_line_up():
    assert text_table(("name", "n"), [("a", "1.5"), ("long", "22")]).splitlines() == ["name    n", "a     1.5", "long   22"]


def test_an_error_is_compared_first_and_of_a_cosine_more_is_better(root, capsys):
    def both(run, cosine):
        tables = {"cosine": dict.fromkeys(CLIPS, cosine), "mse": {c: 1 - cosine + 0.001 * i for i, c in enumerate(CLIPS)}}
        write_record(root, "two", run, config={}, parameters=1, metrics={name: 0.5 for name in tables}, metrics_by_clip=tables)
        return find_runs(f"two/{run}", root)

    near, far = both("near", 0.9), both("far", 0.7)
    assert compare_runs(near, far).metric == "mse" and compare_runs(near, far).verdict().startswith("near has the lower mse")
    for found in (compare_runs(near, far, metric="cosine"), compare_runs(far, near, metric="cosine")):
        assert found.skill is None and found.verdict().startswith("near has the higher cosine")
    assert main(["runs", "list", "two", "--root", str(root)]) == 0
    assert "cosine" not in capsys.readouterr().out


def test_a_folder_of_trainings_is_listed_by_the_names_that_compare_takes(root, tmp_path, capsys):
    for name in ("mine", "other"):
        record(tmp_path / "runs" / name / "records", "run--scmhsa--seed0", np.arange(1, 9), study="run")
        (tmp_path / "runs" / name / "record.json").write_text((tmp_path / "runs" / name / "records/run/run--scmhsa--seed0.json").read_text())
    for words in (["list", str(tmp_path / "runs")], ["list", "--root", str(tmp_path / "runs")]):
        assert main(["runs", *words]) == 0
        rows = capsys.readouterr().out.splitlines()[1:]
        assert [row.split()[0] for row in rows] == [str(tmp_path / "runs" / name) for name in ("mine", "other")]
    assert main(["runs", "compare", *(row.split()[0] for row in rows)]) == 0
    (tmp_path / "runs/cut").mkdir()
    with pytest.raises(InputError, match="without a finished run"):
        find_runs(str(tmp_path / "runs/cut"), root)
    with pytest.raises(InputError, match="no run records"):
        find_runs(str(tmp_path / "runs/nowhere"), tmp_path / "nowhere")
