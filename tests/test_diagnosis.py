"""The contract of every instrument: findings by name, verdicts in order, tables in Markdown, one description for both pictures."""
import json

import numpy as np
import pytest
from PIL import Image

from fvlm.core import ConfigError, InputError, NonFiniteError
from fvlm.evidence.statistics import paired_bootstrap
from fvlm.instruments.diagnosis import (
    FAILURES, MEANINGS, SHOWN_ROWS, CurvesPanel, Diagnoses, Diagnosis, Finding, MatrixPanel, ScatterPanel, Verdict, markdown_table, panels_figure,
)


def finding(name="dead heads", failed=True, value=0.5, reference=1.0):
    return Finding(name=name, failed=failed, sentence=f"about {name}", value=value, reference=reference)


class Rows(Diagnosis):
    def __init__(self, rows=2, failed=True):
        self.rows, self.failed = rows, failed

    def table(self):
        return [{"row": i, "value": i / 2} for i in range(self.rows)]

    def verdict(self):
        return Verdict(findings=(finding(failed=self.failed),))

    def panels(self):
        return [MatrixPanel(title="m", values=[[1.0, 2.0], [3.0, -4.0]]), CurvesPanel(title="c", series={"a": [1, 2, 3], "b": ([5, 6], [1, 2])}, x_label="x"),
                ScatterPanel(title="s", points=np.eye(2), labels=["p", "q"])]


def test_every_failure_has_a_meaning():
    assert set(FAILURES) == set(MEANINGS) and len(set(FAILURES)) == len(FAILURES)
    assert {"uniform attention", "identical queries", "common mode", "head ignores h", "dead heads", "no headroom", "dead link"} <= set(FAILURES)


def test_failures_are_named_once_and_in_the_order_of_the_way_through_a_model():
    verdict = Verdict(findings=(finding("no headroom"), finding("dead heads", failed=False), finding("uniform attention"), finding("no headroom", value=0.7)))
    assert verdict.failures == ("uniform attention", "no headroom") and not verdict.healthy
    words = str(verdict)
    assert words.startswith("uniform attention, no headroom. UNIFORM ATTENTION: about uniform attention.")
    assert words.endswith("not dead heads: about dead heads.")
    assert verdict["no headroom"].value == 0.5 and not verdict["dead heads"].failed


def test_a_failed_finding_is_found_before_one_that_passed():
    assert Verdict(findings=(finding(failed=False), finding(failed=True, value=0.1)))["dead heads"].value == 0.1


def test_words_of_a_healthy_verdict():
    verdict = Verdict(findings=(finding("no headroom", failed=False), finding("healthy", failed=False)))
    assert verdict.healthy and verdict.failures == ()
    assert str(verdict) == "healthy. headroom: about no headroom. note: about healthy."


@pytest.mark.parametrize("wrong, error, words", [
    (dict(name="dead head"), ConfigError, "did you mean 'dead heads'"), (dict(name="healthy"), InputError, "expected one of FAILURES"),
    (dict(value=float("nan")), NonFiniteError, "got NaN for 'dead heads'"), (dict(sentence=" "), InputError, "expected words"),
])
def test_wrong_findings(wrong, error, words):
    with pytest.raises(error, match=words) as caught:
        Finding(**{"name": "dead heads", "failed": True, "sentence": "s", "value": 0.5, "reference": 1.0, **wrong})
    assert "\n" not in str(caught.value)


def test_asking_for_a_finding_that_is_not_there():
    with pytest.raises(InputError, match="no finding about 'dead link', only about dead heads"):
        Rows().verdict()["dead link"]


def test_markdown_of_all_kinds_of_values():
    interval = paired_bootstrap(np.ones((1, 8)) * 2, np.ones((1, 8)), resamples=100)
    text = markdown_table([{"name": "a|b", "value": 0.123456, "n": 3, "ok": True}, {"name": "c", "value": interval, "extra": np.float64(2)}, {"value": None}])
    lines = text.splitlines()
    assert lines[0] == "| name | value | n | ok | extra |" and lines[1].split("|")[1:3] == ["---", "---:"]
    assert lines[2] == "| a\\|b | 0.1235 | 3 | yes |  |" and "1 [1, 1]" in lines[3] and lines[4] == "|  |  |  |  |  |"
    with pytest.raises(InputError, match="at least one row"):
        markdown_table([])


def test_a_long_table_is_cut_in_the_notebook_only():
    shown = Rows(SHOWN_ROWS + 5)._repr_markdown_()
    assert shown.startswith("**Verdict:** dead heads.") and "5 more rows" in shown and f"| {SHOWN_ROWS - 1} |" in shown and f"| {SHOWN_ROWS} |" not in shown
    assert "more rows" not in Rows(SHOWN_ROWS)._repr_markdown_()


def test_picture_and_figure_show_the_same_numbers():
    diagnosis = Rows()
    assert isinstance(diagnosis.picture(), Image.Image)
    data = diagnosis.figure().data
    assert [trace.type for trace in data] == ["heatmap", "scatter", "scatter", "scatter", "scatter"]
    assert np.array_equal(data[0].z, [[1, 2], [3, -4]]) and (data[0].zmin, data[0].zmax) == (-4, 4)
    assert list(data[2].x) == [5, 6] and data[3].mode == "markers" and data[1].mode == "lines+markers"
    assert len({trace.xaxis for trace in data}) == 3
    assert len(json.loads(diagnosis.figure().to_json())["data"]) == 5
    with pytest.raises(InputError, match="panels: got none"):
        panels_figure([])


@pytest.mark.parametrize("part", ["table", "verdict", "panels"])
def test_an_instrument_that_lacks_a_part_cannot_be_made(part):
    with pytest.raises(TypeError, match=f"abstract method '?{part}"):
        type("Bare", (Rows,), {part: getattr(Diagnosis, part)})()


def test_several_instruments_as_one():
    both = Diagnoses(parts={"first": Rows(), "second": Rows(failed=False)})
    assert both.verdict().failures == ("dead heads",) and [row["instrument"] for row in both.table()] == ["first", "second"]
    assert [row["failed"] for row in both.table()] == [True, False] and len(both.panels()) == 2 and both.picture().width > 200
    with pytest.raises(InputError, match="at least one"):
        Diagnoses(parts={})
