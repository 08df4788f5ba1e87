"""How long students are waited for. That they are trained, tests/engine shows."""

import os
from types import SimpleNamespace

import pytest

from pipelines.options import AdaptOptions
from pipelines.student_group import PLACES_WAITED_FOR, Losses, is_elastic, patience, unless_set


@pytest.mark.parametrize(
    ("students", "least", "elastic"), [(1, None, False), (2, None, False), (2, 2, False), (2, 1, True), (4, 2, True)]
)
def test_students_are_elastic_where_fewer_would_do(students, least, elastic):
    assert is_elastic(AdaptOptions(students=students, min_students=least)) is elastic


@pytest.mark.parametrize("least", [None, 1])
def test_places_are_waited_for_a_day_in_all(least):
    seconds, again = patience(AdaptOptions(students=2, min_students=least))
    assert seconds * again >= 86400


def test_elastic_students_count_places_again_within_half_a_minute():
    """Ray Train may have counted a lost node, and would wait for it where others could go on."""
    seconds, _ = patience(AdaptOptions(students=2, min_students=1))
    assert seconds <= 30


def test_a_variable_is_there_for_as_long_as_it_is_needed(monkeypatch):
    monkeypatch.delenv(PLACES_WAITED_FOR, raising=False)
    with unless_set(PLACES_WAITED_FOR, "20"):
        assert os.environ[PLACES_WAITED_FOR] == "20"
    assert PLACES_WAITED_FOR not in os.environ
    with pytest.raises(KeyError), unless_set(PLACES_WAITED_FOR, "20"):
        os.environ["NOBODY_HAS_SET_THIS"]
    assert PLACES_WAITED_FOR not in os.environ


def test_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setenv(PLACES_WAITED_FOR, "5")
    with unless_set(PLACES_WAITED_FOR, "20"):
        assert os.environ[PLACES_WAITED_FOR] == "5"
    assert os.environ[PLACES_WAITED_FOR] == "5"


class Telling:
    """A run's log that hears of losses."""

    def __init__(self):
        self.told = []
        self.lose_students = SimpleNamespace(remote=lambda *told: self.told.append(told))


def test_the_log_hears_who_died_and_of_what_in_a_sentence():
    log = Telling()
    # As Ray 2.60 words a killed process.
    words = (
        "A health check failed.\n\tpid: 7\nThe actor is dead because its worker process has died. Worker exit type: 1"
    )
    Losses(log).after_exception(None, {1: ValueError("collateral"), 0: RuntimeError(words)})
    assert log.told == [([0, 1], "The actor is dead because its worker process has died")]
    Losses(log).after_exception(None, {2: ValueError()})
    assert log.told[1:] == [([2], "ValueError")]


def test_ray_train_hands_the_variable_to_whoever_waits():
    from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

    assert PLACES_WAITED_FOR in ENV_VARS_TO_PROPAGATE
