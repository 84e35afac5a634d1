"Broken, foreign and malicious checkpoints and configurations: none executed, none loaded, all refused by a typed error in time."
import sys
from collections import Counter
from pathlib import Path

import pytest

from fvlm.core import InputError
from fvlm.training.checkpoints import CheckpointError

sys.path.append(str(Path(__file__).parent))
import hostile_checkpoints  # noqa: E402


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    return list(hostile_checkpoints.all_verdicts(tmp_path_factory.mktemp("hostile")))


def test_there_are_many_of_every_kind(verdicts):
    kinds = Counter(kind for kind, *_ in verdicts)
    assert sum(kinds.values()) >= 200 and kinds["load"] >= 150 and kinds["go on"] >= 30 and kinds["config"] >= 40
    names = [(kind, name) for kind, name, *_ in verdicts]
    assert len(set(names)) == len(names)


def test_nothing_is_executed(verdicts):
    assert not [name for _, name, _, _, _, canary in verdicts if canary]


def test_nothing_is_loaded_silently_and_nothing_moves(verdicts):
    assert not [(kind, name) for kind, name, error, _, still, _ in verdicts if error is None or not still]


def test_every_error_is_typed_and_says_something(verdicts):
    wrong = [(kind, name, repr(error)) for kind, name, error, *_ in verdicts if not isinstance(error, InputError if kind == "config" else CheckpointError) or len(str(error)) < 15]
    assert not wrong


def test_every_answer_comes_in_two_seconds(verdicts):
    assert not [(name, seconds) for _, name, _, seconds, _, _ in verdicts if seconds > 2]
