"""The ledger of claims: its file, its rule, its pairing, and the table that the README shows."""

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest

from fvlm.core import InputError
from fvlm.evidence.claims import VERDICTS, Claim, JudgedClaim, Ledger, claims_table, inside, judge_claims, load_claims, measured
from fvlm.recipes.published_numbers import EXACT, published_architecture
from fvlm.training.records import write_record

ROOT = Path(__file__).parents[1]
FIELDS = dict(id="x", source="000_2c225b8339b00e91.txt", place="somewhere", says="a is better than b", protocol="", controls=[], reason="", confounded="", study="s")


def claim(*tests, **changed):
    return Claim(**{**FIELDS, "tests": list(tests), **changed})


def less(a="toy/a", b="toy/b", claimed=(0, None), **more):
    return dict(label="a against b", of=a, against=b, effect="less error", claimed=list(claimed), **more)


@pytest.fixture
def results(tmp_path):
    "Arm a has half the error of b on 12 clips and 5 seeds; c is b with noise; one has no seed."
    draw = np.random.default_rng(0)
    hard = draw.uniform(0.5, 1.5, 12)

    def write(run, errors, **more):
        clips = {f"clip{i}": float(e) for i, e in enumerate(errors)}
        write_record(tmp_path, "toy", run, config={}, parameters=1, metrics_by_clip={"standardised_mse": clips, "frame_03": clips, "frame_04": {k: 3 * v for k, v in clips.items()}}, **more)

    for seed in range(5):
        b = hard * draw.uniform(0.95, 1.05, 12)
        write(f"b--seed{seed}", b)
        write(f"a--seed{seed}", b / 2)
        write(f"c--seed{seed}", b * draw.uniform(0.9, 1.1, 12))
    write("alone", hard)
    return tmp_path


def test_the_file_holds_at_least_thirty_testable_claims_of_sc_vfp_and_a_reason_for_every_other():
    claims = load_claims()
    of_source = [c for c in claims if c.source.startswith("000")]
    assert sum(bool(c.tests) for c in of_source) >= 30
    assert {c.source[:3] for c in claims} == {"000", "001", "002", "003", "004"}
    notebooks = {p.stem for p in (ROOT / "nbs").glob("*/*.ipynb")}
    planned = {"07_attention_arms_and_data", "08_similarity_loss", "09_how_wide_a_head", "10_rollout", "11_what_the_published_numbers_could_mean",
               "06_futures_of_codes"}
    for c in claims:
        assert c.says.endswith((".", "!")) and c.place and (c.tests or c.reason), c.id
        assert c.study in notebooks | planned, c.id


def test_a_threshold_says_whose_it_is():
    for c in load_claims():
        for test in (*c.tests, *c.controls):
            if test["effect"] != "exact" and not {end for end in test["claimed"] if end} <= {1}:
                assert re.search(r"\bours?\b|the source's|the line of sc19", c.protocol), f"{c.id}: {test['claimed']}, and the protocol does not say whether that is the source's number or ours"


def test_every_exact_test_names_a_fact_and_every_run_is_a_study_and_a_run():
    from fvlm.evidence.claims import _FACTS_OF_RECORDS

    for c in load_claims():
        for test in (*c.tests, *c.controls):
            if test["effect"] == "exact":
                assert test["exact"] in EXACT or test["exact"] in _FACTS_OF_RECORDS
            else:
                assert all(test[key].count("/") == 1 for key in ("of", "against", "before_of", "before_against") if key in test), c.id


def test_every_run_that_is_claimed_about_is_one_that_a_study_makes():
    from fvlm.app.sc_vfp_questions import question_settings
    from fvlm.evidence.experiment import BASELINES

    settings = question_settings()
    for c in load_claims():
        for test in (*c.tests, *c.controls):
            for key in ("of", "against", "before_of", "before_against"):
                study, _, run = test.get(key, "").partition("/")
                if study == "sc_vfp_questions":
                    setting, arm = run.split("--")
                    assert arm in settings[setting] or arm in BASELINES, f"{c.id}: {run}"


@pytest.mark.parametrize("low, high, claimed, verdict", [
    (0.1, 0.2, (0, None), "upheld"), (-0.2, -0.1, (0, None), "not upheld"), (-0.1, 0.1, (0, None), "not decided"),
    (0.1, 0.2, (None, 0), "not upheld"), (-0.2, -0.1, (None, 0), "upheld"), (-0.01, 0.01, (-0.02, 0.02), "upheld"),
    (0.03, 0.04, (-0.02, 0.02), "not upheld"), (0.01, 0.04, (-0.02, 0.02), "not decided"), (-0.5, 0.5, (-0.02, 0.02), "not decided"),
    (0.0, 0.0, (0, 0), "upheld")])
def test_the_rule_of_one_test(low, high, claimed, verdict):
    assert inside(low, high, list(claimed)) == verdict


def verdict_of(results, *tests, **changed):
    ledger = Ledger(results)
    c = claim(*tests, **changed)
    return JudgedClaim(claim=c, effects=[measured(t, ledger) for t in c.tests], controls=[measured(t, ledger) for t in c.controls]).verdict


def test_a_verdict_is_a_function_of_records(results):
    assert verdict_of(results, less()) == "upheld"
    assert verdict_of(results, less("toy/b", "toy/a")) == "not upheld"
    assert verdict_of(results, less("toy/c", "toy/b")) == "not decided"
    assert verdict_of(results, less(claimed=(0.6, None))) == "not upheld", "an effect of a half is not one of six tenths"
    assert verdict_of(results, less(), less("toy/nobody", "toy/b")) == "not run yet"
    assert verdict_of(results, less(), controls=[less("toy/c", "toy/b")]) == "confounded"
    assert verdict_of(results, less(), confounded="both changed") == "confounded"
    assert verdict_of(results, reason="no data") == "not testable here"
    assert {verdict_of(results, less()), verdict_of(results, reason="no data")} <= set(VERDICTS)


def test_runs_are_paired_by_seed_and_clip_and_one_without_seeds_with_all(results):
    a, alone = Ledger(results).paired(("toy/a", "standardised_mse"), ("toy/alone", "standardised_mse"))
    assert a.shape == (5, 12) and alone.shape == (5, 12) and np.ptp(alone, axis=0).max() == 0
    (results / "toy" / "b--seed2.json").unlink()
    a, b = Ledger(results).paired(("toy/a", "standardised_mse"), ("toy/b", "standardised_mse"))
    assert a.shape == b.shape == (4, 12)
    np.testing.assert_allclose(a * 2, b)


def test_a_pattern_of_metrics_is_their_mean_and_effects_have_the_right_size(results):
    ledger = Ledger(results)
    assert measured(less(metric="frame_0[34]"), ledger).value == pytest.approx(0.5)
    one, both = (next(iter(ledger.table("toy/b", m)[0].values())) for m in ("frame_03", "frame_0[34]"))
    assert both == pytest.approx(2 * one)
    growth = dict(label="g", of="toy/a", against="toy/b", before_of="toy/b", before_against="toy/b", effect="growth", claimed=[0, None])
    for metrics in ({}, dict(metric="frame_03", metric_against="frame_04")):
        assert measured({**growth, **metrics}, ledger).value == pytest.approx(np.log(2)), "both pairs compare the same two metrics"
    mean = np.mean(ledger.paired(("toy/a", "standardised_mse"))[0])
    assert measured(dict(label="v", of="toy/a", effect="value", claimed=[0, 1]), ledger).value == pytest.approx(mean)


def test_runs_on_other_clips_or_other_data_are_refused(results):
    write_record(results, "toy", "other", config={}, parameters=1, metrics_by_clip={"standardised_mse": {"elsewhere": 1.0, "there": 2.0}})
    with pytest.raises(InputError, match="different clips"):
        measured(less("toy/a", "toy/other"), Ledger(results))
    record = json.loads((results / "toy" / "alone.json").read_text())
    (results / "toy" / "moved.json").write_text(json.dumps({**record, "run": "moved", "data_fingerprint": "another"}))
    with pytest.raises(InputError, match="different data"):
        measured(less("toy/alone", "toy/moved"), Ledger(results))


def test_one_training_decides_nothing_and_says_so(results):
    for seed in range(1, 5):
        (results / "toy" / f"a--seed{seed}.json").unlink()
    once = measured(less(), Ledger(results))
    assert once.verdict == "not decided" and once.interval.low > 0 and str(once).endswith("one training")
    assert "one training" not in str(measured(less("toy/c", "toy/b"), Ledger(results)))
    assert "detectable" in str(measured(less("toy/c", "toy/b"), Ledger(results)))


@pytest.mark.parametrize("change, said", [
    (dict(tests=[], reason=""), "neither"), (dict(reason="both"), "both"), (dict(source="005.txt"), "source"),
    (dict(tests=[{**less(), "efect": 1}]), "efect"), (dict(tests=[{**less(), "effect": "bigger"}]), "effect"),
    (dict(tests=[{k: v for k, v in less().items() if k != "against"}]), "against")])
def test_a_claim_that_cannot_be_judged_is_refused(change, said):
    with pytest.raises(InputError, match=said):
        Claim(**{**FIELDS, "tests": [less()], **change})


def test_the_file_is_checked(tmp_path):
    entries = [{**FIELDS, "tests": [less()]}]
    for broken, said in (([{**entries[0], "effect": "+3 %"}], "keys"), (entries * 2, "same id")):
        (tmp_path / "claims.json").write_text(json.dumps(broken))
        with pytest.raises(InputError, match=said):
            load_claims(tmp_path / "claims.json")


def test_no_effect_and_no_verdict_is_written_in_the_file():
    raw = json.loads((ROOT / "fvlm" / "static" / "claims.json").read_text())
    for entry in raw:
        for test in (*entry["tests"], *entry["controls"]):
            assert not {"value", "estimate", "low", "high", "verdict", "interval"} & set(test)


def test_the_table_is_the_same_to_the_byte_and_changes_with_the_records(results):
    claims = [claim(less(), id="one"), claim(less("toy/c", "toy/b"), id="two"), claim(id="three", reason="a | b")]
    table = claims_table(judge_claims(results, claims))
    assert table == claims_table(judge_claims(results, copy.deepcopy(claims)))
    assert table.startswith("3 claims: 1 upheld, 1 not decided, 1 not testable here.\n") and "a \\| b" in table and table.endswith("|\n")
    for path in (results / "toy").glob("a--*.json"):
        path.unlink()
    assert claims_table(judge_claims(results, claims)) != table


def test_the_table_in_the_readme_equals_results():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    if "| sc01 |" not in readme:
        pytest.skip("the README does not show the ledger")
    shown = [line for line in readme.splitlines() if line.startswith(tuple(f"| {c.id} |" for c in load_claims()))]
    assert shown == [line for line in claims_table(judge_claims(ROOT / "results")).splitlines() if not line.startswith(("| |", "|--")) and line.startswith("|")]


def test_parameters_are_counted_as_a_network_has_them():
    from fvlm.models.sc_vfp import SCVFP, SCVFPConfig

    for head_dim in (6, 48):
        built = SCVFP(SCVFPConfig(embed_dim=48, depth=3, num_heads=8, ffn_dim=64, head_dim=head_dim)).num_parameters
        assert built == published_architecture(head_dim, 64, 48, depth=3)
