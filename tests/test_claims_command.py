"""`fvlm claims`: the table, one claim in full, JSON, and mistakes."""

import json
from pathlib import Path

import pytest

from fvlm.app.claims_command import ClaimsCommand
from fvlm.core import InputError
from fvlm.evidence.claims import claims_table, judge_claims, load_claims

ROOT = Path(__file__).parents[1] / "results"


def test_the_command_prints_the_table_of_the_records(capsys):
    assert ClaimsCommand(root=ROOT, source="004").run() == 0
    assert capsys.readouterr().out == claims_table(judge_claims(ROOT, [c for c in load_claims() if c.source.startswith("004")]))


def test_claims_in_full_name_the_runs_behind_them(capsys):
    assert ClaimsCommand(root=ROOT, ids=("sc07", "sc16", "sc10")).run() == 0
    out = capsys.readouterr().out
    assert "sc_vfp_kth/layer9-mean-person--scmhsa" in out and "parameter_ratio_at_full_width" in out and "not testable here" in out
    assert out.count("\n\n") == 2


def test_json_holds_effects_and_verdicts(capsys):
    ClaimsCommand(root=ROOT, ids=("sc07", "sc10"), json=True).run()
    first, second = json.loads(capsys.readouterr().out)
    assert first["effects"][0]["interval"]["seeds"] == 5 and first["verdict"] in ("upheld", "not upheld", "not decided")
    assert second["effects"][0]["interval"] is None and second["verdict"] == "not upheld"


def test_only_those_of_a_verdict(capsys, tmp_path):
    ClaimsCommand(root=tmp_path, source="000", verdict="not testable here").run()
    out = capsys.readouterr().out
    assert out.startswith(f"{sum(not c.tests and c.source.startswith('000') for c in load_claims())} claims")


@pytest.mark.parametrize("wrong, said", [(dict(ids=("sc7",)), "sc07"), (dict(source="00x"), "source"), (dict(verdict="uphelt"), "upheld"), (dict(root=Path("nowhere")), "nowhere")])
def test_mistakes_are_one_sentence(wrong, said):
    with pytest.raises(InputError, match=said) as error:
        ClaimsCommand(**{"root": ROOT, **wrong}).run()
    assert "\n" not in str(error.value)


def test_a_folder_without_records_is_a_table_of_what_is_missing(capsys, tmp_path):
    assert ClaimsCommand(root=tmp_path).run() == 0
    assert "not run yet" in capsys.readouterr().out
